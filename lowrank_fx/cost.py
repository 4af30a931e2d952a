"""What a layer costs, dense and factored: arithmetic only.

A dense layer is a matrix ``W`` of ``out_features x in_features`` applied to some number of rows; for a convolution a
row is one im2col patch, so ``in_features`` is channels x kernel height x kernel width and there is one row per output
position. A factored pair of rank ``r`` is ``out_features x r`` times ``r x in_features``.

With ``groups`` g the rows of ``W`` divide into g equal blocks, each applied to its own part of the input (a grouped
convolution, a batch of matrices). ``in_features`` is then what *one* block is applied to, and a rank is the rank of one
block's pair: g blocks of ``out_features / g x r`` times ``r x in_features``.

FLOPs are two times the multiply-accumulates (MACs), as in torch's flop counter; a bias costs nothing there.

A pair without groups that is *re-gauged* (``gauge.py``) holds ``rank^2`` numbers less and computes as much less.
"""

from __future__ import annotations

from collections.abc import Sequence

FAST_STEP = 16
"""Ranks between its multiples took up to a quarter longer than they cost (``benchmarks/results/speed_ideas.md``).

Targets that obey a clock read the step off this machine's times (``fast_steps.py``).
"""


def dense_params(out_features: int, in_features: int) -> int:
    """Number of weights of a dense layer.

    >>> dense_params(4, 6)
    24
    """
    return out_features * in_features


def pair_params(out_features: int, in_features: int, rank: int, groups: int = 1) -> int:
    """Number of weights of a factored pair: ``r (m + g d)``.

    >>> pair_params(4, 6, 2)
    20
    """
    return rank * (out_features + groups * in_features)


def regauged_params(out_features: int, in_features: int, rank: int) -> int:
    """Number of weights of a re-gauged pair: ``r (m + d - r)``, below ``m d`` for every r below m and d.

    >>> regauged_params(4, 6, 2)
    16
    """
    return rank * (out_features + in_features - rank)


def dense_flops(out_features: int, in_features: int, rows: int) -> int:
    """FLOPs of a dense layer applied to ``rows`` rows.

    >>> dense_flops(4, 6, 10)
    480
    """
    return 2 * rows * out_features * in_features


def pair_flops(out_features: int, in_features: int, rank: int, rows: int, groups: int = 1) -> int:
    """FLOPs of a factored pair applied to ``rows`` rows.

    >>> pair_flops(4, 6, 2, 10)
    400
    """
    return 2 * rows * pair_params(out_features, in_features, rank, groups)


def regauged_flops(out_features: int, in_features: int, rank: int, rows: int) -> int:
    """FLOPs of a re-gauged pair applied to ``rows`` rows.

    >>> regauged_flops(4, 6, 2, 10)
    320
    """
    return 2 * rows * regauged_params(out_features, in_features, rank)


def break_even_rank(out_features: int, in_features: int, groups: int = 1) -> float:
    """The rank at which a pair costs exactly as much as the dense layer: ``m d / (m + g d)``; 0 for an empty weight.

    Weights and FLOPs break even at the same rank, because both are a rank times ``m + g d`` against ``m d``.

    >>> break_even_rank(384, 384)
    192.0
    >>> break_even_rank(64, 36, groups=8)  # 8 x 36 to each of 8 groups
    6.545454545454546
    """
    return out_features * in_features / max(out_features + groups * in_features, 1)


def stepped(out_features: int, in_features: int, groups: int = 1) -> bool:
    """Whether the ranks on offer for a layer go in steps, as they do from a break-even rank of 64 on."""
    return break_even_rank(out_features, in_features, groups) >= 64


def candidate_ranks(out_features: int, in_features: int, multiple: int, groups: int = 1) -> tuple[int, ...]:
    """The ranks worth offering for a layer: all below break-even, in steps that hardware likes.

    Where they are :func:`stepped`, only multiples of ``multiple`` (8 for 4-byte numbers, 16 for 2-byte numbers) are
    offered: there a vector register or a matrix tile left part empty costs more than the ranks between are worth.

    >>> candidate_ranks(64, 64, 8)[-1]
    31
    >>> candidate_ranks(384, 384, 8)[-1]
    184
    """
    break_even = break_even_rank(out_features, in_features, groups)
    step = multiple if stepped(out_features, in_features, groups) else 1
    return tuple(rank for rank in range(step, int(break_even) + 1, step) if rank < break_even)


def fast_ranks(ranks: Sequence[int], step: int = FAST_STEP) -> tuple[int, ...]:
    """Those of the ranks on offer that are fast for what they cost: the multiples of ``step``.

    Below a ``step`` above ``FAST_STEP`` the multiples of that stay, which are faster than the step. Where all ranks are
    on offer, because the layer is small, all stay; where none of them is a multiple, the first.

    >>> fast_ranks((8, 16, 24, 32)), fast_ranks((1, 2, 3)), fast_ranks((8,)), fast_ranks((8, 16, 24, 32, 40, 48), 32)
    ((16, 32), (1, 2, 3), (8,), (16, 32))
    """
    few = min(step, FAST_STEP)
    fast = tuple(rank for rank in ranks if ranks[0] == 1 or rank % (few if rank < step else step) == 0)
    return fast or tuple(ranks[:1])


def ranks_beyond(out_features: int, in_features: int, multiple: int) -> tuple[int, ...]:
    """The ranks from break-even on, below full rank, in the steps of :func:`candidate_ranks`.

    A pair of such a rank costs more than the dense layer; only a re-gauged one still costs less.

    >>> ranks_beyond(384, 384, 8)[0], ranks_beyond(384, 384, 8)[-1]
    (192, 376)
    """
    break_even = break_even_rank(out_features, in_features)
    step = multiple if stepped(out_features, in_features) else 1
    return tuple(rank for rank in range(step, min(out_features, in_features), step) if rank >= break_even)
