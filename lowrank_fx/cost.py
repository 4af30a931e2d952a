"""What a layer costs, dense and factored: arithmetic only.

A dense layer is a matrix ``W`` of ``out_features x in_features`` applied to some number of rows; for a convolution a
row is one im2col patch, so ``in_features`` is channels x kernel height x kernel width and there is one row per output
position. A factored pair of rank ``r`` is ``out_features x r`` times ``r x in_features``.

With ``groups`` g the rows of ``W`` divide into g equal blocks, each applied to its own part of the input (a grouped
convolution, a batch of matrices). ``in_features`` is then what *one* block is applied to, and a rank is the rank of one
block's pair: g blocks of ``out_features / g x r`` times ``r x in_features``.

FLOPs are two times the multiply-accumulates (MACs), as in torch's flop counter; a bias costs nothing there.
"""

from __future__ import annotations


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


def break_even_rank(out_features: int, in_features: int, groups: int = 1) -> float:
    """The rank at which a pair costs exactly as much as the dense layer: ``m d / (m + g d)``; 0 for an empty weight.

    Weights and FLOPs break even at the same rank, because both are a rank times ``m + g d`` against ``m d``.

    >>> break_even_rank(384, 384)
    192.0
    >>> break_even_rank(64, 36, groups=8)  # 8 x 36 to each of 8 groups
    6.545454545454546
    """
    return out_features * in_features / max(out_features + groups * in_features, 1)


def candidate_ranks(out_features: int, in_features: int, multiple: int, groups: int = 1) -> tuple[int, ...]:
    """The ranks worth offering for a layer: all below break-even, in steps that hardware likes.

    From a break-even rank of 64 on, only multiples of ``multiple`` (8 for 4-byte numbers, 16 for 2-byte numbers) are
    offered: there a vector register or a matrix tile left part empty costs more than the ranks between are worth.

    >>> candidate_ranks(64, 64, 8)[-1]
    31
    >>> candidate_ranks(384, 384, 8)[-1]
    184
    """
    break_even = break_even_rank(out_features, in_features, groups)
    step = multiple if break_even >= 64 else 1
    return tuple(rank for rank in range(step, int(break_even) + 1, step) if rank < break_even)
