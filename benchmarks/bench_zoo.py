"""Does every architecture come out right, and is every weight of it accounted for?

The models and the checks are those of the slow test (``tests/zoo.py``, ``tests/zoo_checks.py``), which takes ten of
them; this takes all. Each runs in a fresh process, so that a crash is a row of the table and memory is its own.

The page goes to results/zoo.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common

Row = dict[str, Any]


def main() -> None:
    """Run the zoo, a model at a time, and write the page."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models; nothing is written")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time (default: %(default)s)")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep each model's findings there, run the others")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(findings(options.one)))
        return
    lines = ["# The zoo", "", *common.machine(options.date), ""]
    import zoo

    unknown = [name for name in options.only or () if name not in zoo.ZOO]
    if unknown:
        parser.error(f"--only {unknown[0]}: there are {', '.join(zoo.ZOO)}")
    names = options.only or list(zoo.ZOO)
    rows: dict[str, Row] = {}
    if options.resume is not None and options.resume.exists():
        known = (json.loads(line) for line in options.resume.read_text().splitlines())
        rows = {row["name"]: row for row in known if row["name"] in names}
    waiting = [name for name in names if name not in rows]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(in_fresh_process, waiting):
            rows[row["name"]] = row
            print(f"{row['name']:24}{row['wall']:6.0f} s  {verdict(row)}", flush=True)
            if options.resume is not None:
                with options.resume.open("a") as kept:
                    kept.write(json.dumps(row) + "\n")
    rows = {name: rows[name] for name in names}
    if not options.only:
        common.publish(options.out, "zoo.md", [*lines, *page(rows)])
    if any(row["failures"] for row in rows.values()):
        sys.exit(1)


# ---- one model -------------------------------------------------------------------------------------------------------


def findings(name: str) -> Row:
    """What the checks say about one model; an error is a finding too."""
    # It declares the operators of torchvision where those do not load, and turns the verifier on, as for the tests.
    import conftest  # noqa: F401
    import zoo
    import zoo_checks

    warnings.simplefilter("ignore")
    try:
        model, batches = zoo.make(name)
        with tempfile.TemporaryDirectory() as folder:
            found = zoo_checks.check(model, batches, Path(folder))
    except Exception as error:
        message = f"{type(error).__name__}: {brief(str(error))}"
        return {"error": message, "failures": [message]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**dataclasses.asdict(found), "peak": peak, "failures": found.failures()}


def brief(text: str) -> str:
    """The start of a text, without the folders of this machine."""
    for folder in (common.HERE.parent, tempfile.gettempdir()):
        text = text.replace(f"{folder}{os.sep}", "")
    return textwrap.shorten(text, 240, placeholder=" ...")


def in_fresh_process(name: str) -> Row:
    """The findings of one model from a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
    # Threads that spin while they wait take the cores from whoever has work to do.
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        row: Row = json.loads(run.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (run.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        message = f"the process ended with {run.returncode}: {brief(last)}"
        row = {"error": message, "failures": [message]}
    return {**row, "name": name, "wall": time.perf_counter() - start}


def verdict(row: Row) -> str:
    """One line for the terminal."""
    if "error" in row:
        return f"ERROR {row['error']}"
    said = f"{row['way']}: {row['factored']} of {row['sites']} sites factored, {len(row['left_alone'])} left alone"
    return "; ".join([said, *(f"NO: {failure}" for failure in row["failures"])])


# ---- the page --------------------------------------------------------------------------------------------------------


def page(rows: dict[str, Row]) -> list[str]:
    """The table and what explains it."""
    import zoo
    import zoo_checks

    good = {name: row for name, row in rows.items() if "error" not in row}
    worst = max(good.values(), key=lambda row: row["rewrite"] / row["rounding"], default=None)
    lines = common.paragraph(
        f"{len(rows)} architectures with random weights at small inputs, float32, eager; batch norms have the "
        "statistics of a batch, and what starts at zero has random values. Target: "
        f"`Keep(flops={zoo_checks.TARGET:g})`, or the smallest reachable share. Errors are relative L2 errors over all "
        "floating outputs of one batch."
    )
    lines += [
        "",
        f"**{sum(not row['failures'] for row in rows.values())} of {len(rows)} pass every check.**",
        "",
        *items(
            "**rewrite**: the factored model against an independent reference, the original module in float64 with the "
            "dense products of the factors for weights (* where a weight has no place of its own in the original: "
            "against the folded model). **float32**: that reference in float32 against itself in float64, which is "
            "what rounding alone does to this model.",
            "**fold**: the folded against the factored model. **dense**: the all-dense plan (`Keep(flops=1.0)`: "
            "captured, cleaned up, nothing factored) against the original; the worst of 8 rows, 1 row and 3 rows. "
            "**original**: the original in float32 against itself in float64.",
            f"Each error may be {zoo_checks.MULTIPLE:g} times the larger of *float32* and *original*, or "
            f"{zoo_checks.FLOOR:g} if that is more. Saved and loaded models, factored and folded, must be bit-equal. "
            f"Factoring must move the output by {zoo_checks.FARTHER} times as much, or the comparison would say "
            "nothing.",
            "Every parameter of two or more dimensions must be a site, be left alone with a reason, or be named by "
            "clean-up; the output must have the original's class; the original must be untouched.",
            "**s**: seconds of `optimize` with the graph verifier on, both plans included and effects measured with a "
            "twentieth of the work (how accurate a plan is, is not asked here), on a machine that did other work too. "
            "**MiB**: peak memory of the process, checks included.",
        ),
        "",
    ]
    header = ("model", "from", "captured", "sites", "factored", "left alone", "FLOPs", "rewrite", "float32", "fold")
    header += ("dense", "original", "save, load", "batch", "s", "MiB", "all met")
    lines += common.table(header, [cells(name, zoo.ZOO[name].family, row) for name, row in rows.items()], left=3)
    if worst is not None:
        lines += [
            "",
            *common.paragraph(
                f"No rewrite is further than {worst['rewrite'] / worst['rounding']:.1f} times *float32* from its "
                "reference. Where an error is above 1e-6, *float32* or *original* shows that this model amplifies any "
                "rounding that much: stacks of random convolutions under batch norms do."
            ),
        ]
    missed = [f"`{name}`: {failure}" for name, row in rows.items() for failure in row["failures"]]
    if missed:
        lines += ["", "## Not met", "", *items(*missed)]
    fixed = [f"`{name}`: {row['dynamic']}" for name, row in good.items() if row["dynamic"] != "batch"]
    if fixed:
        lines += ["", "## Shapes that stay as captured", "", *items(*fixed)]
    notes = [f"`{name}`: {brief(note)}" for name, row in good.items() for note in row["notes"]]
    if notes:
        lines += ["", "## What the plans note", "", *items(*notes)]
    return [*lines, "", "## Left alone, and why", "", *reasons(good)]


def cells(name: str, family: str, row: Row) -> list[str]:
    """A row of the table."""
    if "error" in row:
        return [name, family, "ERROR", *["-"] * 13, common.met(False)]
    star = "" if row["reference"] == "float64" else "*"
    loaded = max(row["loaded"], row["loaded_folded"])
    return [
        name,
        family,
        row["way"],
        str(row["sites"]),
        str(row["factored"]),
        str(len(row["left_alone"])),
        f"{row['kept']:.3f}",
        f"{row['rewrite']:.1e}{star}",
        f"{row['rounding']:.1e}",
        f"{row['folded']:.1e}",
        f"{max(row['dense'], row['other_batch']):.1e}",
        f"{row['own_rounding']:.1e}",
        "equal" if loaded == 0 else f"{loaded:.1e}",
        "any" if row["dynamic"] == "batch" else "fixed",
        f"{row['seconds']:.0f}",
        f"{row['peak']:.0f}",
        common.met(not row["failures"]),
    ]


def reasons(rows: dict[str, Row]) -> list[str]:
    """The reasons for which weights are left alone, over all models, numbers in them aside."""
    models: dict[str, Counter[str]] = {}
    for name, row in rows.items():
        for _, reason in row["left_alone"]:
            models.setdefault(re.sub(r"\b\d+\b", "N", reason), Counter())[name] += 1
    ordered = sorted(models.items(), key=lambda item: (-item[1].total(), item[0]))
    return common.table(
        ("weights", "reason", "models"),
        [
            (str(count.total()), reason, ", ".join(f"{name} {n}" for name, n in count.items()))
            for reason, count in ordered
        ],
        left=3,
    )


def items(*texts: str) -> list[str]:
    """Texts as a list."""
    return [f"{'- ' if first else '  '}{line}" for text in texts for first, line in _numbered(common.paragraph(text))]


def _numbered(lines: list[str]) -> list[tuple[bool, str]]:
    return [(position == 0, line) for position, line in enumerate(lines)]


if __name__ == "__main__":
    main()
