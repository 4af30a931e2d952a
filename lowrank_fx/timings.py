"""The measured cost model: how much faster each operator is when it is factored.

A table from (operator, form, rank) to a paired timing, filled when planning asks: :meth:`Timings.survey` measures few
ranks of every form, and :meth:`Timings.estimate` reads the ranks between them off a curve that never falls;
:meth:`Timings.timing` measures the very rank that a plan has chosen. What was measured is kept on disk
(``timing_cache.py``).

Noise: ratios are medians over paired turns. A pair counts as faster by its lower end, two standard errors and at least
``LEAST_EFFECT`` below the median, and a rank that was only interpolated has to be faster by ``LEAST_GAIN``. Where a
measurement leaves in doubt which of the two is faster, it is taken again with more rounds.
"""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lowrank_fx import latency, timed_operators
from lowrank_fx._progress import Progress
from lowrank_fx.latency import PairedTiming
from lowrank_fx.timed_operators import Operator, Pair
from lowrank_fx.timing_cache import Entries, Entry, TimingCache, environment

USUAL_SECONDS = 0.15
"""How long one measurement takes at most, beside its least number of rounds."""

DOUBT_SECONDS = 1.0
"""How long it takes where the first left in doubt which is faster."""

SURVEY_SECONDS = 60.0
"""How long all measurements of a model's survey may take; what is left then is estimated from FLOPs."""

DOUBT = 3.0
"""A measurement is in doubt that is not so many standard errors away from 1."""

LEAST_GAIN = 0.02
"""A rank that was not measured itself has to be interpolated faster by so much."""

LEAST_EFFECT = 0.005
"""A rank that was measured has to be faster by so much, however small the standard error: it knows no drift."""

NOISY = 0.05
"""A measurement whose standard error is more than this share of it is in doubt too, and is not kept on disk."""

MIN_ROUNDS = 7

TURN_SECONDS = 1e-3
"""Short turns: on a machine with other work most of them are not interrupted, and the median is one of those."""

SECONDS_PER_FLOP = 1e-11
"""Of an operator, as long as none was timed; it weighs layers against each other by their FLOPs."""

CONFIDENCE = 2.0
"""How many standard errors are taken off a measured speed-up before it counts as one."""


class Measure(Protocol):
    """Times an operator; see :func:`~lowrank_fx.timed_operators.measure`."""

    def __call__(
        self,
        operator: Operator,
        pair: Pair,
        device: torch.device,
        *,
        min_rounds: int,
        max_seconds: float,
        turn_seconds: float,
    ) -> PairedTiming:
        """The paired timing."""
        ...


@dataclass(frozen=True)
class SiteSpeed:
    """How fast a site is, factored against dense, over all of its calls.

    Attributes:
        speedup: time of the dense operators over that of the factored ones.
        error: its standard error.
        dense_seconds: the median time of the dense operators.
        seconds: that of the factored ones.
        flop_ratio: FLOPs of the dense operators over those of the factored ones: the speed-up if time followed FLOPs.
    """

    speedup: float
    error: float
    dense_seconds: float
    seconds: float
    flop_ratio: float

    @property
    def faster(self) -> bool:
        """Whether it measured faster, by more than twice the standard error and ``LEAST_EFFECT``."""
        return self.speedup - max(CONFIDENCE * self.error, LEAST_EFFECT) > 1

    @property
    def of_ideal(self) -> float:
        """The share of the FLOP ratio that became speed."""
        return self.speedup / self.flop_ratio


class Timings:
    """The table of one machine.

    Args:
        device: where the model runs.
        cache: the file that keeps the table.
        measure: times an operator, by default as :func:`~lowrank_fx.timed_operators.measure` does; replaced in tests.
        clock: seconds that never go back; replaced in tests.

    Attributes:
        notes: what the user should know.
    """

    def __init__(
        self,
        device: torch.device,
        cache: TimingCache,
        *,
        measure: Measure | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device
        self._cache, self._measure, self._clock = cache, measure or timed_operators.measure, clock
        self._environment = environment(device)
        self._entries: Entries = cache.load(self._environment)
        self._new: Entries = {}
        self._seen: dict[Operator, None] = {}
        self._failed: dict[tuple[Operator, str], str] = {}
        self._left_out = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        said = list(self._cache.notes)
        if self._left_out:
            said.append(
                f"{self._left_out} ranks were not timed within {SURVEY_SECONDS:g} s; for choosing among them time is "
                "taken to follow FLOPs. The next run goes on where this one stopped"
            )
        for (operator, form), cause in self._failed.items():
            said.append(f"{form} of {operator.key} could not be timed: {cause}")
        return tuple(said)

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def survey(
        self, wanted: Iterable[tuple[Operator, Pair]], progress: bool = False, seconds: float | None = None
    ) -> float:
        """Measure pairs that the table does not have, until ``SURVEY_SECONDS`` are over, and keep them on disk.

        Args:
            wanted: in the order of their worth.
            progress: show a progress bar.
            seconds: what an earlier survey left of ``SURVEY_SECONDS``.

        Returns:
            What this one leaves of them.
        """
        most = SURVEY_SECONDS if seconds is None else seconds
        missing = [each for each in dict.fromkeys(wanted) if self._known(*each) is None]
        self._left_out = 0
        started = self._clock()
        with Progress("timing layers", len(missing), progress) as bar:
            for operator, pair in missing:
                if self._clock() - started >= most:
                    self._left_out += 1
                    continue
                self._take(operator, pair, USUAL_SECONDS)
                bar.advance(note=operator.key)
        self.flush()
        return most - (self._clock() - started)

    def timing(self, operator: Operator, pair: Pair, *, sure: bool) -> PairedTiming | None:
        """The timing of this very rank.

        Args:
            operator: what is replaced.
            pair: by what.
            sure: measure it again where it leaves in doubt which is faster.

        Returns:
            None where the operator cannot be timed.
        """
        found = self._known(operator, pair) or self._take(operator, pair, USUAL_SECONDS)
        if sure and found is not None and not found.sure and _doubtful(found.timing):
            found = self._take(operator, pair, DOUBT_SECONDS, sure=True) or found
        return None if found is None else found.timing

    def flush(self) -> None:
        """Write to disk what was measured since the last time."""
        self._cache.store(self._environment, self._new)
        self._new = {}

    # ---- reading -----------------------------------------------------------------------------------------------------

    def estimate(self, operator: Operator, pair: Pair) -> float:
        """The speed-up of a pair: as measured, or between ranks that were."""
        known = self._known(operator, pair)
        if known is not None:
            return known.timing.speedup
        points = self._curve(operator, pair)
        if not points:
            return operator.flops(None) / max(operator.flops(pair), 1)
        return 1 / interpolated(points, pair.rank)

    def is_measured(self, operator: Operator, pair: Pair) -> bool:
        """Whether the table has this very rank."""
        return self._known(operator, pair) is not None

    def dense_seconds(self, operator: Operator) -> float:
        """The median time of the dense operator; where it was never timed, after its FLOPs as fast as the others."""
        found = self._entries.get(operator.key)
        if found:
            return statistics.median(entry.timing.baseline_seconds for entry in found.values())
        rates = [self.dense_seconds(other) / max(other.flops(None), 1) for other in self._seen if other != operator]
        return operator.flops(None) * (statistics.median(rates) if rates else SECONDS_PER_FLOP)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _known(self, operator: Operator, pair: Pair) -> Entry | None:
        found = self._entries.get(operator.key)
        if found:
            self._seen[operator] = None
        return None if found is None else found.get(f"{pair.kind} {pair.rank}")

    def _take(self, operator: Operator, pair: Pair, max_seconds: float, *, sure: bool = False) -> Entry | None:
        if (operator, pair.kind) in self._failed:
            return None
        try:
            timing = self._measure(
                operator,
                pair,
                self.device,
                min_rounds=MIN_ROUNDS,
                max_seconds=min(max_seconds, latency.MAX_SECONDS),
                turn_seconds=TURN_SECONDS,
            )
        except RuntimeError as error:  # no memory for a second copy, or no kernel for it
            self._failed[operator, pair.kind] = str(error).strip().splitlines()[0] if str(error).strip() else "no cause"
            return None
        entry = Entry(timing, sure)
        for table in (self._entries, self._new) if not _noisy(timing) else (self._entries,):
            table.setdefault(operator.key, {})[f"{pair.kind} {pair.rank}"] = entry
        self._seen[operator] = None
        return entry

    def _curve(self, operator: Operator, pair: Pair) -> list[tuple[int, float]]:
        """Ranks of a form that were measured, ascending, and their time as a share of the dense one."""
        points = []
        for key, entry in self._entries.get(operator.key, {}).items():
            kind, _, rank = key.rpartition(" ")
            if kind == pair.kind:
                points.append((int(rank), 1 / entry.timing.speedup))
        return sorted(points)


def interpolated(points: Sequence[tuple[int, float]], rank: int) -> float:
    """The cost of a rank by those of others: linear between them, and never falling.

    Points that fall are replaced by their mean (the least-squares fit of costs that never fall; pool adjacent
    violators, Barlow, Bartholomew, Bremner and Brunk 1972). Below the smallest rank the cost is that of the smallest,
    above the largest it grows in proportion: neither is on offer where the survey was complete.

    >>> interpolated([(8, 0.2), (24, 0.6)], 16)
    0.4
    """
    ranks = [point[0] for point in points]
    costs = _never_falling([point[1] for point in points])
    place = bisect.bisect_left(ranks, rank)
    if place == len(ranks):
        return costs[-1] * rank / ranks[-1]
    if place == 0 or ranks[place] == rank:
        return costs[place]
    share = (rank - ranks[place - 1]) / (ranks[place] - ranks[place - 1])
    return costs[place - 1] + share * (costs[place] - costs[place - 1])


def _never_falling(values: Sequence[float]) -> list[float]:
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, one), (second, other) = blocks[-2:]
            blocks[-2:] = [((first * one + second * other) / (one + other), one + other)]
    return [value for value, count in blocks for _ in range(count)]


def survey_ranks(ranks: Sequence[int], count: int) -> tuple[int, ...]:
    """About ``count`` of the ranks on offer, the smallest and the largest among them, evenly spread in between.

    >>> survey_ranks(range(8, 192, 8), 4)
    (8, 64, 128, 184)
    """
    last = len(ranks) - 1
    places = {round(last * step / max(count - 1, 1)) for step in range(count)} if ranks else set()
    return tuple(ranks[place] for place in sorted(places))


def _doubtful(timing: PairedTiming) -> bool:
    return _noisy(timing) or abs(timing.speedup - 1) < DOUBT * timing.error


def _noisy(timing: PairedTiming) -> bool:
    return timing.error > NOISY * timing.speedup
