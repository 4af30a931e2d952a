"""Where a run's time goes, by what the package's functions are for: torch's profiler with scopes around them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import common
import torch
from bench_calibration import Prepared, prepare
from torch.profiler import ProfilerActivity, profile, record_function

from lowrank_fx import calibration as calibrating
from lowrank_fx import calibration_run, curves, grouped_sketch, linalg, sketch
from lowrank_fx.cache import Cache
from lowrank_fx.curves import SiteCurves, error_curves
from lowrank_fx.demo import load_encoder
from lowrank_fx.exact_gram import ExactGram
from lowrank_fx.forms.output import OutputForm
from lowrank_fx.gradients import output_gradients
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.observer import TapObserver
from lowrank_fx.patches import Patch

P = ParamSpec("P")
T = TypeVar("T")

SENTENCES = (16, 32, 32)
"""Batches, sentences in each and tokens in each of the encoder's calibration."""

REST = "everything else"
MODEL = "the model's own operators"
OBSERVER = "observer: "
EIGEN = "eigen-solves"

CALIBRATING: tuple[tuple[Any, str, str], ...] = (
    (calibration_run, "run_batch", MODEL),
    (TapObserver, "forward", f"{OBSERVER}layout and choice of rows"),
    (Patch, "blocks", f"{OBSERVER}im2col"),
    (sketch, "checked_rows", f"{OBSERVER}look for values that are not finite"),
    (grouped_sketch, "checked_rows", f"{OBSERVER}look for values that are not finite"),
    (ExactGram, "take_in", f"{OBSERVER}rows that wait"),
    (ExactGram, "_joined", f"{OBSERVER}shift, float64 probes"),
    (ExactGram, "_join_block", f"{OBSERVER}sum in float64"),
    (ExactGram, "_panel", f"{OBSERVER}products"),
    (calibrating, "make_sketch", "sketches made"),
    (Cache, "add", "batches kept for effects"),
    (calibration_run, "call_checksum", "fingerprints"),
    (calibrating, "call_checksum", "fingerprints"),
    (calibrating, "base_weights", "fingerprints"),
    (GraphProgram, "count_flops", "FLOPs counted, once"),
)
"""Where a function is found that calibration calls, its name, and what its own time counts as."""

SOLVING: tuple[tuple[Any, str, str], ...] = (
    (OutputForm, "curve", "activations' basis: the rest"),
    (curves, "double_sided", "gradients' basis: the rest"),
    (linalg, "symmetric_eigen", EIGEN),
    (linalg, "output_spectrum", "W G W^T, QR of tall weights"),
    (ExactGram, "gram", "Gram matrices read"),
)


@dataclass(frozen=True)
class Profile:
    """Where one run's time went.

    Attributes:
        seconds: of the calling thread, by what it counts as and operator.
    """

    seconds: Mapping[tuple[str, str], float]

    @property
    def whole(self) -> float:
        """Seconds of the run."""
        return sum(self.seconds.values())

    def of(self, what: str) -> float:
        """Seconds of what begins so."""
        return sum(seconds for (part, _), seconds in self.seconds.items() if part.startswith(what))

    def largest(self, what: str) -> str:
        """The part of the most seconds among those that begin so."""
        return max((part for part, _ in self.seconds if part.startswith(what)), key=self.of)

    def table(self) -> list[str]:
        """A row per part, by falling share."""
        rows = []
        for part in sorted({part for part, _ in self.seconds}, key=self.of, reverse=True):
            own = sorted(((took, name) for (other, name), took in self.seconds.items() if other == part), reverse=True)
            most = ", ".join(f"{name} {took / self.whole:.1%}" for took, name in own[:4] if took >= self.whole / 1000)
            rows.append((part, most, f"{self.of(part) / self.whole:.1%}"))
        return common.table(("what", "most of it", "share"), rows, left=2)


def profiled(run: Callable[[], T], scopes: tuple[tuple[Any, str, str], ...]) -> tuple[T, Profile]:
    """Run something; the time of an operator counts for the innermost of ``scopes`` around it.

    The functions are wrapped where the package finds them, so this is the package's own run and not a copy of it.
    """
    with ExitStack() as stack:
        for owner, name, part in scopes:
            function = getattr(owner, name)
            wrap = _stepped if name == "blocks" else _scoped
            stack.enter_context(patch.object(owner, name, wrap(part, function)))
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        with record_function(REST):
            made = run()
    parts = {REST, *(part for _, _, part in scopes)}
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for event in profiler.events() or ():
        around = event
        while around is not None and around.name not in parts:
            around = around.cpu_parent
        if around is not None:
            name = "Python" if around is event else event.name.removeprefix("aten::")
            seconds[around.name, name] += event.self_cpu_time_total / 1e6
    return made, Profile(seconds)


def _scoped(part: str, function: Callable[P, T]) -> Callable[P, T]:
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with record_function(part):
            return function(*args, **kwargs)

    return inside


def _stepped(part: str, function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """As :func:`_scoped` for a generator, whose caller works between its steps."""

    def inside(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        steps = function(*args, **kwargs)
        while True:
            with record_function(part):
                try:
                    step = next(steps)
                except StopIteration:
                    return
            yield step

    return inside


@dataclass(frozen=True)
class Solved:
    """The encoder, calibrated and solved for under the profiler."""

    weights: int
    calibrating: Profile
    solving: Profile
    curves: Mapping[str, SiteCurves]


@cache
def encoder() -> Solved:
    """Calibrate the encoder and solve for its curves, once for all sections."""
    model, _ = load_encoder()
    count, size, tokens = SENTENCES
    batches = [
        {
            "input_ids": torch.randint(1000, 30000, (size, tokens)),
            "attention_mask": torch.ones(size, tokens, dtype=torch.int64),
        }
        for _ in range(count)
    ]
    prepared = prepare(model, batches)
    found, calibration = profiled_calibration(prepared, batches)
    gradients = output_gradients(prepared.program, prepared.table, found, progress=False).sketches

    def solve() -> dict[str, SiteCurves]:
        return error_curves(prepared.program, prepared.table, found, None, progress=False, gradients=gradients)

    solve()
    made, solving = profiled(solve, SOLVING)
    return Solved(sum(parameter.nbytes for parameter in model.parameters()), calibration, solving, made)


def profiled_calibration(prepared: Prepared, batches: list[Any]) -> tuple[Any, Profile]:
    """A calibration and where its time went, after a warm-up."""
    prepared.calibrate(batches[:2])
    return profiled(lambda: prepared.calibrate(batches), CALIBRATING)
