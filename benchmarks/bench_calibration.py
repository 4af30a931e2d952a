"""What does calibration cost beside plain forward passes over the same batches, and planning after it?

- Seconds of ``calibrate`` (sketches, held-out batches cached) against the user's own model run eagerly over the same
  batches, in paired turns of one process: all-MiniLM-L6-v2 over 47 batches of sentences, and two image models of timm;

and on the sentence encoder alone

- peak memory of both, each in a fresh process, for a process's peak never falls again;
- seconds of every other stage of ``optimize``, and of planning again for other targets.

The page goes to results/calibration.md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import common
import torch
from common import Batch
from torch import Tensor, nn

from lowrank_fx import Keep, account
from lowrank_fx import session as planning
from lowrank_fx.batches import Assigned, Call, assign_calls, bind_batch, bound_calls
from lowrank_fx.calibration import Calibration, blank
from lowrank_fx.calibration_run import run_calibration
from lowrank_fx.capture import capture
from lowrank_fx.corrections import CORRECTIONS, Made
from lowrank_fx.curves import error_curves
from lowrank_fx.demo import load_encoder
from lowrank_fx.effects import measure_effects, measure_joint
from lowrank_fx.effort import effort_of
from lowrank_fx.gradients import output_gradients
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.latency import paired_speedup
from lowrank_fx.planners import planner
from lowrank_fx.planners.budget import by_effect
from lowrank_fx.session import Session
from lowrank_fx.sites import SiteTable

MOST_RATIO = 2.0
"""Seconds of calibration over seconds of plain forward passes that are asked for at most."""

IMAGES = {"deit_small_patch16_224": (8, 32), "resnet50": (8, 32)}
"""Image models with random weights, and how many batches of how many images of 224 x 224 calibrate them."""

MOST_SECONDS = 2.0
"""What is asked at most of planning again, without what held-out batches and corrections take."""

SHARES = (0.8, 0.67, 0.5)
ROUNDS = 5
MIB = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")


def main() -> None:
    """Measure memory first and then time, and write the page."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="paired turns, at least 3 (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="sections to measure")
    parser.add_argument("--peak-of", choices=("plain", "optimize"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 3:
        parser.error(f"--rounds {options.rounds}: at least 3 are needed for a median")
    data = common.data_dir(parser, options.data_dir)
    if data is None:
        return
    if options.peak_of is not None:
        print(json.dumps(peaks(data, options.peak_of)))
        return
    page = options.out / "calibration.md"
    kept = common.sections(page)
    for part in (part for part in PARTS if part in options.only):
        for title, text in PARTS[part](data, options.rounds).items():
            kept[title] = [*common.machine(options.date), "", *text]
        lines = ["# What calibration and planning cost", "", *common.paragraph(LEGEND)]
        for title in (RATIOS, STAGES, PLANNING, MEMORY):
            if title in kept:
                lines += ["", f"## {title}", "", *kept[title]]
        common.publish(options.out, page.name, lines)


LEGEND = (
    f"The encoder is all-MiniLM-L6-v2 with mean pooling, over {common.CALIBRATION_SENTENCES:,} sentences of STS-B "
    f"train in batches of {common.BATCH}, padded to 37 tokens in the mean."
)

RATIOS, STAGES = "Calibration against plain forward passes", "The other stages, once each"
PLANNING, MEMORY = "Planning again, after one calibration", "Peak memory"


# ---- the stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """A model up to where calibration starts."""

    model: nn.Module
    program: GraphProgram
    table: SiteTable
    bind: Callable[[Any, int], Call]

    def calibrate(self, batches: Sequence[Any]) -> Calibration:
        """Calibrate as ``optimize`` does by default."""
        pieces: Iterator[Assigned] = assign_calls(bound_calls(batches, self.bind))
        start = blank(self.program, self.table, self.model, self.bind(batches[0], 0))
        return run_calibration(self.program, self.table, pieces, start, progress=False)


def prepare(model: nn.Module, batches: Sequence[Any]) -> Prepared:
    """Capture the model, clean the graph up and find its sites."""
    signature = inspect.signature(model.forward)

    def bind(batch: Any, index: int) -> Call:
        return bind_batch(batch, signature, None, index)

    program = GraphProgram.from_capture(capture(model, bind(batches[0], 0)))
    return Prepared(model, program, program.find_sites(), bind)


def plain_passes(model: nn.Module, batches: Sequence[Any]) -> None:
    """Run the user's model over all batches; its outputs are dropped."""
    with torch.no_grad():
        for batch in batches:
            if isinstance(batch, dict):
                model(**batch)
            else:
                model(batch)


def stages(model: nn.Module, batches: Sequence[Batch], after: Callable[[str], None]) -> Session:
    """``optimize`` up to its session, stage by stage.

    Args:
        model: the user's model.
        batches: what calibrates it.
        after: called with every stage's name when it is done.
    """
    prepared = prepare(model, batches)
    after("capture, clean-up, sites")
    calibration = prepared.calibrate(batches)
    after("calibrate")
    program, table = prepared.program, prepared.table
    gradients = output_gradients(program, table, calibration, progress=False).sketches
    after("output gradients")
    curves = error_curves(program, table, calibration, None, progress=False, gradients=gradients)
    after("error curves")
    effects = measure_effects(program, curves, calibration, progress=False)
    after("effects")
    return Session(
        model=model,
        program=program,
        table=table,
        calibration=calibration,
        curves=curves,
        effects=effects,
        planner="budget",
        notes=(),
        params=sum(parameter.numel() for parameter in model.parameters()),
    )


# ---- seconds ---------------------------------------------------------------------------------------------------------


def against_plain(name: str, model: nn.Module, batches: Sequence[Any], rounds: int) -> tuple[str, ...]:
    """A row: calibration beside plain forward passes, in paired turns."""
    prepared = prepare(model, batches)
    paired = paired_speedup(
        lambda: prepared.calibrate(batches),
        lambda: plain_passes(model, batches),
        device="cpu",
        min_rounds=rounds,
        max_seconds=0,
        warmup=1,
    )
    return (
        name,
        str(len(batches)),
        f"{paired.candidate_seconds:.2f} s",
        f"{paired.baseline_seconds:.2f} s",
        f"{paired.speedup:.2f}",
        f"{paired.spread:.2f}",
        f"{MOST_RATIO:g}",
        common.met(paired.speedup <= MOST_RATIO),
        str(paired.rounds),
    )


def image_model(name: str) -> tuple[nn.Module, list[Tensor]]:
    """A model of timm with random weights, and random images for it."""
    count, size = IMAGES[name]
    generator = torch.Generator().manual_seed(0)
    return common.image_model(name), [torch.randn(size, 3, 224, 224, generator=generator) for _ in range(count)]


def ratios(data: Path, rounds: int) -> dict[str, list[str]]:
    """The section on calibration beside plain passes."""
    model, tokenizer = load_encoder()
    rows = [against_plain("all-MiniLM-L6-v2", model, common.calibration_batches(data, tokenizer), rounds)]
    rows += [against_plain(name, *image_model(name), rounds) for name in IMAGES]
    header = ("model", "batches", "plain passes", "calibrate", "ratio", "IQR", "asked, at most", "met", "paired turns")
    said = "Medians; the ratio is the median of the turns' ratios. Both eager, without gradients, after a warm-up."
    return {RATIOS: [said, "", *common.table(header, rows)]}


def planning_stages(data: Path, rounds: int) -> dict[str, list[str]]:
    """The sections on what comes after calibration."""
    model, tokenizer = load_encoder()
    taken: dict[str, float] = {}
    started = time.perf_counter()

    def after(stage: str) -> None:
        nonlocal started
        taken[stage] = time.perf_counter() - started
        started = time.perf_counter()

    session = stages(model, common.calibration_batches(data, tokenizer), after)
    del taken["calibrate"]  # once is not enough where it is compared, in a section of its own
    session.plan(Keep(params=0.75, of="sites"))  # the first plan lists the options of every site
    plans = [plan_seconds(session, share) for share in SHARES]
    low = replace(session, effort=effort_of("low"))
    plans += [(f"{name}, low effort", *rest) for name, *rest in (plan_seconds(low, share) for share in SHARES)]
    header = ("target", *PLAN_PARTS, "the rest", "in all", "in all but comparison and corrections")
    said = (
        "Seconds of `Session.plan`, after a first plan. *Comparison*: the candidates' factors made and run on held-out "
        "batches, and corrected factors and the final plan run on them. *Effects again*: around the plan. *Refit*: two "
        "numbers per output channel by least squares. *Closed loop*: every layer fitted to what the factored layers "
        "before it give. *The rest*: factors, certified bounds, what layers with one input would share. *Low effort*: "
        'from the same session, as `effort="low"` plans: nothing is measured around the plan and no loop is closed.'
    )
    stage_rows = [(name, f"{seconds:.2f}") for name, seconds in taken.items()]
    return {
        STAGES: common.table(("stage", "seconds"), stage_rows),
        PLANNING: [*common.paragraph(said), "", *common.table((*header, "asked, at most", "met"), plans)],
    }


PLAN_PARTS = ("allocation", "comparison", "effects again", "refit", "closed loop", "trade-off curve")
MEASURED = ("comparison", "effects again", "refit", "closed loop")


class Stopwatch:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def time(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """``function``, whose calls count under ``name``."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return timed


def plan_seconds(session: Session, share: float) -> tuple[str, ...]:
    """A row of seconds: what ``Session.plan`` spends where.

    The functions that it calls are timed where it finds them, so this is the plan that users get and not a copy of it.
    """
    target, watch = Keep(params=share, of="sites"), Stopwatch()
    allocators = {name: watch.time("allocation", allocator) for name, allocator in planner(session.planner).items()}
    names = {"refitted": "refit", "closed loop": "closed loop"}
    with ExitStack() as stack:
        stack.enter_context(patch.object(planning, "planner", lambda _: allocators))
        stack.enter_context(patch.object(planning, "measure_joint", watch.time("effects again", measure_joint)))
        stack.enter_context(patch.object(account, "by_effect", watch.time("trade-off curve", by_effect)))
        stack.enter_context(patch.object(Session, "_select_error", watch.time("comparison", Session._select_error)))
        stack.enter_context(patch.object(Made, "error", watch.time("comparison", Made.error)))
        ways = {how: watch.time(names[how], correct) for how, correct in CORRECTIONS.items()}
        stack.enter_context(patch.dict(CORRECTIONS, ways))
        watch.time("in all", session.plan)(target)
    parts = [watch.seconds[name] for name in PLAN_PARTS]
    whole = watch.seconds["in all"]
    own = whole - sum(watch.seconds[name] for name in MEASURED)
    figures = (*parts, whole - sum(parts), whole, own)
    asked = f"{MOST_SECONDS:g}", common.met(own <= MOST_SECONDS)
    return (str(target), *(f"{seconds:.2f}" for seconds in figures), *asked)


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory(data: Path, rounds: int) -> dict[str, list[str]]:
    """The section on memory: two fresh processes, and what calibration keeps."""
    plain, optimized = (_in_fresh_process(data, what) for what in ("plain", "optimize"))
    kept = {name: optimized.pop(name) for name in ("sketches", "cached batches")}
    rows = [
        (process, stage, f"{mib:.0f}", f"{mib - found['model and batches loaded']:.0f}")
        for process, found in (("plain passes", plain), ("optimize", optimized))
        for stage, mib in found.items()
    ]
    said = (
        "Resident memory of a fresh process at its highest until the end of each stage, in MiB; a stage that adds "
        "nothing stayed below what came before it. Calibration keeps "
        + " and ".join(f"{mib:.0f} MiB of {name}" for name, mib in kept.items())
        + "."
    )
    header = ("process", "until the end of", "peak", "above loaded")
    return {MEMORY: [*common.paragraph(said), "", *common.table(header, rows, left=2)]}


def _in_fresh_process(data: Path, what: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--data-dir", str(data), "--peak-of", what]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def peaks(data: Path, what: str) -> dict[str, float]:
    """This process's peak in MiB after every stage; for ``"optimize"`` also what calibration keeps."""
    model, tokenizer = load_encoder()
    batches = common.calibration_batches(data, tokenizer)
    found: dict[str, float] = {}

    def after(stage: str) -> None:
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        found[stage] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB

    after("model and batches loaded")
    if what == "plain":
        plain_passes(model, batches)
        after("forward passes")
        return found
    session = stages(model, batches, after)
    calibration = session.calibration
    session.plan(Keep(params=SHARES[0], of="sites"))
    after("plan")
    cached = (*calibration.effect_batches, *calibration.select_batches, *calibration.report_batches)
    return found | {
        "sketches": calibration.state_bytes / MIB,
        "cached batches": sum(batch.nbytes for batch in cached) / MIB,
    }


# Memory comes first: Linux counts what a parent holds when it starts a process as part of that process's peak.
PARTS: Mapping[str, Callable[[Path, int], dict[str, list[str]]]] = {
    "memory": memory,
    "ratios": ratios,
    "planning": planning_stages,
}

if __name__ == "__main__":
    main()
