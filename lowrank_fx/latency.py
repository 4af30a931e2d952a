"""How much faster one callable is than another, measured in paired turns.

Clocks drift, caches warm up and neighbours come and go. Timing both callables side by side in every round and taking
the ratio per round cancels what changes slowly; the median ratio ignores what comes in bursts.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowrank_fx.errors import OptionError

MAX_SECONDS = 10.0
"""How long a comparison may take on a machine so noisy that it does not become precise."""

TURN_SECONDS = 0.01
"""How long a turn lasts, about; the clock's own steps and the work around a turn are nothing beside it."""

_MOST_REPEATS = 1 << 16
_PRECISE_ENOUGH = 0.005


@dataclass(frozen=True)
class PairedTiming:
    """What :func:`paired_speedup` measured.

    Attributes:
        speedup: the median over rounds of baseline time over candidate time; above 1 the candidate is faster.
        baseline_seconds: the median time of one call of the baseline.
        candidate_seconds: the median time of one call of the candidate.
        spread: the interquartile range of the ratios.
        rounds: the number of rounds.
    """

    speedup: float
    baseline_seconds: float
    candidate_seconds: float
    spread: float
    rounds: int

    @property
    def error(self) -> float:
        """The standard error of the median ratio, from ``spread`` (Gaussian: 1.2533 IQR / 1.349 / sqrt(n))."""
        return _standard_error(self.spread, self.rounds)

    @property
    def faster(self) -> bool:
        """Whether the candidate is not slower, the standard error of the measurement taken off."""
        return self.speedup - self.error >= 1


def paired_speedup(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    *,
    device: torch.device | str,
    min_rounds: int = 7,
    max_seconds: float | None = None,
    warmup: int = 2,
    turn_seconds: float = TURN_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTiming:
    """Measure how much faster ``candidate`` is than ``baseline``.

    A round times both, in the order A B and then B A in turn. A turn repeats its callable until it lasts about
    ``turn_seconds`` or more; accelerators are synchronized before the clock is read. After ``min_rounds`` further
    rounds follow until the standard error of the median ratio is at most 0.5 % of it, or ``max_seconds`` are over.

    Args:
        baseline: called without arguments; its result is dropped. Gradient modes are the caller's.
        candidate: likewise.
        device: where both compute.
        min_rounds: rounds that are always run, at least 1, however long they take.
        max_seconds: no further round starts after this many seconds, warm-up not counted; ``MAX_SECONDS`` by default.
        warmup: calls of each before anything is timed (compilation, caches), at least 0.
        turn_seconds: how long a turn lasts at least; shorter ones measure sooner, and each of them less precisely.
        clock: seconds that never go back; replaced in tests.

    Raises:
        OptionError: ``min_rounds`` or ``warmup`` is too small.
    """
    if min_rounds < 1 or warmup < 0:
        raise OptionError(
            f"min_rounds={min_rounds}, warmup={warmup} is not legal; use at least 1 round and 0 warm-up calls"
        )
    limit = MAX_SECONDS if max_seconds is None else max_seconds
    synchronize = _synchronizer(torch.device(device))

    def turn(function: Callable[[], object], repeats: int) -> float:
        synchronize()
        start = clock()
        for _ in range(repeats):
            function()
        synchronize()
        return clock() - start

    for function in (baseline, candidate):
        for _ in range(warmup):
            function()
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = clock()
        baseline_repeats = _repeats(baseline, turn, turn_seconds)
        candidate_repeats = _repeats(candidate, turn, turn_seconds)
        baseline_times: list[float] = []
        candidate_times: list[float] = []
        ratios: list[float] = []
        while len(ratios) < min_rounds or not (_is_precise(ratios) or clock() - started >= limit):
            if len(ratios) % 2 == 0:
                baseline_time = turn(baseline, baseline_repeats) / baseline_repeats
                candidate_time = turn(candidate, candidate_repeats) / candidate_repeats
            else:
                candidate_time = turn(candidate, candidate_repeats) / candidate_repeats
                baseline_time = turn(baseline, baseline_repeats) / baseline_repeats
            baseline_times.append(baseline_time)
            candidate_times.append(candidate_time)
            ratios.append(baseline_time / candidate_time)
    finally:
        if collecting:
            gc.enable()
    return PairedTiming(
        speedup=statistics.median(ratios),
        baseline_seconds=statistics.median(baseline_times),
        candidate_seconds=statistics.median(candidate_times),
        spread=_interquartile_range(ratios),
        rounds=len(ratios),
    )


def _repeats(function: Callable[[], object], turn: Callable[[Callable[[], object], int], float], aim: float) -> int:
    repeats = 1
    while repeats < _MOST_REPEATS:
        seconds = turn(function, repeats)
        if seconds >= aim:
            break
        # At most 8 times more at once: the first calls are the slowest, so the estimate is too small.
        needed = math.ceil(repeats * aim / seconds) if seconds > 0 else _MOST_REPEATS
        repeats = min(max(needed, repeats + 1), 8 * repeats, _MOST_REPEATS)
    return repeats


def _is_precise(ratios: list[float]) -> bool:
    error = _standard_error(_interquartile_range(ratios), len(ratios))
    return len(ratios) > 1 and error <= _PRECISE_ENOUGH * statistics.median(ratios)


def _standard_error(spread: float, rounds: int) -> float:
    return 1.2533 * spread / 1.349 / math.sqrt(max(rounds, 1))


def _interquartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


def _synchronizer(device: torch.device) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    return lambda: torch.accelerator.synchronize(device)
