"""How much do Frequent Directions give away against exact second moments, and how tight is their certificate?

On the taps of all-MiniLM-L6-v2 over 1,500 sentences, with sketches of l = 2 k rows for factors of rank k. Both kinds of
factors are measured on the exact Gram. *Loss*: the error of the factors planned from the sketch over that of the
factors planned from the exact Gram. *Bound*: what the sketch certifies for its own factors, over their error. Then the
time that each mode takes for rows of noise, and memory and throughput at the widths that Frequent Directions are for,
over rows of a falling spectrum. The page goes to results/sketch.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import common
import torch

from lowrank_fx import calibrate
from lowrank_fx.calibration import Calibration
from lowrank_fx.demo import load_encoder
from lowrank_fx.forms import FORMS
from lowrank_fx.latency import paired_speedup
from lowrank_fx.pipeline import take
from lowrank_fx.sketch import FrequentDirections

RANKS = (32, 64, 96)
MOST_LOSS, MOST_BOUND = 1.01, 1.5
"""What is asked at most of the median layer, as ratios of errors (not squared)."""

MIB = 1 << 20

SPEEDS = ((384, 192), (1536, 192), (4096, 512))
ROWS = 8192

WIDE = ((4096, 512, None), (11008, 1024, 0.67))
"""Widths, sizes of the sketch, and the throughput that is asked for at least, over that of the exact Gram."""

MOST_MEMORY = 0.25
"""The share of an exact Gram's memory that is asked for at most, the buffer among it."""

WIDE_ROWS, WIDE_BLOCK, WIDE_ROUNDS = 1536, 768, 9
"""Rows per turn: two or more compressions of a sketch that is full."""


def main() -> None:
    """Measure, and write the page."""
    parser = common.option_parser(__doc__)
    options = parser.parse_args()
    data = common.data_dir(parser, options.data_dir)
    if data is None:
        return
    lines = ["# Frequent Directions against exact second moments", "", *common.machine(options.date), ""]
    lines += [*common.paragraph(LEGEND), "", *quality(data), "", "## Speed", "", *common.paragraph(SPEED), "", *speed()]
    lines += ["", "## Wide rows", "", *common.paragraph(WIDE_LEGEND), "", *wide()]
    common.publish(options.out, "sketch.md", lines)


LEGEND = (
    "all-MiniLM-L6-v2, the taps of its 36 linear layers over 1,500 sentences; sketches of l = 2 k rows. *Loss*: the "
    "error of the rank-k factors planned from the sketch over that of those planned from the exact Gram, both on the "
    "exact Gram. *Bound*: what the sketch certifies of its factors' error over that error."
)

SPEED = f"Seconds for {ROWS:,} float32 rows of standard normal numbers in blocks of 1,024, in paired turns."

WIDE_LEGEND = (
    f"Float32 rows whose second moment has eigenvalues that fall as 1 / i, {WIDE_ROWS:,} per turn in blocks of "
    f"{WIDE_BLOCK}, after the sketch is full; paired turns. *Memory*: all that Frequent Directions hold, over all that "
    "exact mode holds, each after those rows. *Throughput*: rows per second, over those of exact mode."
)


def quality(data: Path) -> list[str]:
    """A row per rank."""
    model, tokenizer = load_encoder()
    batches = common.calibration_batches(data, tokenizer)
    exact = calibrate(model, batches)
    rows = []
    for rank in RANKS:
        losses, bounds = measured(model, exact, calibrate(model, batches, sketch_size=2 * rank), rank)
        met = statistics.median(losses) <= MOST_LOSS and statistics.median(bounds) <= MOST_BOUND
        rows.append((str(rank), str(2 * rank), *spread(losses), *spread(bounds), common.met(met)))
    header = ("k", "l", "loss, median", "worst", "bound, median", "worst", f"median within {MOST_LOSS}, {MOST_BOUND}")
    return common.table(header, rows, left=0)


def measured(
    model: torch.nn.Module, exact: Calibration, sketched: Calibration, rank: int
) -> tuple[list[float], list[float]]:
    """Loss and bound of every linear layer."""
    program = take(model, exact.example)
    table = program.find_sites()
    losses, bounds = [], []
    for site in table.sites:
        truth, sketch = exact.sketch_of(table, site), sketched.sketch_of(table, site)
        form = FORMS["lowrank"]
        if truth is None or sketch is None or not form.applies(site) or rank not in form.ranks(site):
            continue
        weight = program.weight(site)
        errors = {}
        for name, own in (("exact", truth), ("sketched", sketch)):
            curve = form.curve(site, weight, own)
            residual = site.matrix(weight).double() - form.factor(site, weight, curve, rank, own).dense_matrix()
            errors[name] = math.sqrt(truth.certificate(residual, centered=site.centered)[0])
        most = math.sqrt(sketch.certificate(residual, centered=site.centered)[1])
        losses.append(errors["sketched"] / errors["exact"])
        bounds.append(most / errors["sketched"])
    return losses, bounds


def spread(values: Sequence[float]) -> tuple[str, str]:
    """Median and worst."""
    return f"{statistics.median(values):.4f}", f"{max(values):.4f}"


def speed() -> list[str]:
    """A row per width."""
    rows = []
    for width, size in SPEEDS:
        blocks = torch.split(torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0)), 1024)

        def feed(mode: int | None, width: int = width, blocks: Sequence[torch.Tensor] = blocks) -> None:
            sketch = FrequentDirections(width, mode)
            for block in blocks:
                sketch.update(block)

        timing = paired_speedup(
            lambda feed=feed: feed(None),  # type: ignore[misc]
            lambda feed=feed, size=size: feed(size),  # type: ignore[misc]
            device="cpu",
            max_seconds=20.0,
        )
        rows.append(
            (
                str(width),
                str(size),
                f"{timing.baseline_seconds:.2f} s",
                f"{timing.candidate_seconds:.2f} s",
                f"{1 / timing.speedup:.2f}",
            )
        )
    return common.table(("d", "l", "exact", "Frequent Directions", "ratio"), rows, left=0)


def wide() -> list[str]:
    """A row per width: memory and throughput against exact mode."""
    rows = []
    for width, size, asked in WIDE:
        generator = torch.Generator().manual_seed(0)
        spectrum = torch.arange(1, width + 1) ** -0.5
        blocks = [
            torch.randn(WIDE_BLOCK, width, generator=generator) * spectrum for _ in range(WIDE_ROWS // WIDE_BLOCK)
        ]
        exact, sketch = FrequentDirections(width), FrequentDirections(width, size)

        def feed(into: FrequentDirections, blocks: Sequence[torch.Tensor] = blocks) -> None:
            for block in blocks:
                into.update(block)

        while sketch.rows < 2 * size:
            feed(sketch)
        timing = paired_speedup(
            lambda feed=feed, exact=exact: feed(exact),  # type: ignore[misc]
            lambda feed=feed, sketch=sketch: feed(sketch),  # type: ignore[misc]
            device="cpu",
            min_rounds=WIDE_ROUNDS,
            max_seconds=0.0,
            warmup=0,
        )
        memory = sketch.nbytes / exact.nbytes
        rows.append(
            (
                str(width),
                str(size),
                f"{exact.nbytes / MIB:.0f}",
                f"{sketch.nbytes / MIB:.0f}",
                f"{memory:.3f}",
                common.met(memory <= MOST_MEMORY),
                f"{timing.baseline_seconds:.2f} s",
                f"{timing.candidate_seconds:.2f} s",
                f"{timing.speedup:.2f}",
                "" if asked is None else f"{asked:g}",
                "" if asked is None else common.met(timing.speedup >= asked),
            )
        )
    header = ("d", "l", "exact, MiB", "FD, MiB", "memory", f"at most {MOST_MEMORY}")
    return common.table((*header, "exact", "FD", "throughput", "asked", "met"), rows, left=0)


if __name__ == "__main__":
    main()
