"""Which ranks run fast for what they cost, read off measured times.

Kernels compute in tiles. A rank that fills its last tile in part takes the time of one that fills it: time steps where
FLOPs grow evenly. How wide the steps are depends on the machine and the dtype, so a few ranks next to each other are
timed: if those half-way between the multiples of twice a step take longer than the line between their neighbours says,
only the multiples of twice the step are fast.

    step -> 2 step    while    median over odd multiples r of    2 t(r) / (t(r - step) + t(r + step))    > 1 / AS_FAST
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

AS_FAST = 0.97
"""Ranks are fast that reach this share of the speed which the line between their neighbours gives."""

PROBES = 9
"""Ranks in a row that are timed: from a multiple of four steps on, with four odd multiples of it, two of its double."""

LEAST_ODD = 2
"""A step is doubled by the word of so many ranks at least."""


def probe_ranks(ranks: Sequence[int]) -> tuple[int, ...]:
    """The ranks to be timed: ``PROBES`` in a row about the middle of those on offer; none where these are too few.

    Args:
        ranks: on offer, all multiples of the first.

    >>> probe_ranks(range(8, 192, 8))
    (64, 72, 80, 88, 96, 104, 112, 120, 128)
    >>> probe_ranks(range(8, 64, 8)), probe_ranks(range(1, 40))
    ((), ())
    """
    if len(ranks) < PROBES + 3 or ranks[0] == 1:
        return ()
    middle = (len(ranks) - PROBES) // 2
    first = max(middle - (middle + 1) % 4, 3)  # from a multiple of four steps to another
    return tuple(ranks[first : first + PROBES])


def fast_step(times: Mapping[int, float], finest: int) -> int:
    """The step of the ranks that are fast for what they cost.

    Args:
        times: by rank, in any unit.
        finest: the step that the ranks on offer have.

    >>> fast_step({rank: float(-(-rank // 32)) for rank in range(64, 136, 8)}, 8)  # tiles of 32
    32
    >>> fast_step({rank: 3.0 + rank for rank in range(64, 136, 8)}, 8)
    8
    """
    step = finest
    while True:
        beside = {
            rank: (times[rank - step] + times[rank + step]) / 2
            for rank in times
            if rank % (2 * step) == step and rank - step in times and rank + step in times
        }
        if len(beside) < LEAST_ODD:
            return step
        if statistics.median(times[rank] / line for rank, line in beside.items()) <= 1 / AS_FAST:
            return step
        step *= 2
