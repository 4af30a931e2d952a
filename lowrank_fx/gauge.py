"""The re-gauge: a factored pair with r^2 numbers less that computes the same.

A pair y = B (A x) + b with A ``[r, n]`` and B ``[m, r]`` does not change when A becomes G A and B becomes B G^-1, for
any invertible G: r^2 of its r (m + n) numbers say nothing. With S a choice of r columns of A, the *pivots*, and R the
others, G = A_S^-1 turns those columns into an identity,

    y = B' (x_S + C x_R) + b,    C = A_S^-1 A_R,    B' = B A_S

and r (m + n - r) numbers and as many multiplications per row are left: less than the dense m n for every r below m and
n. (An interpolative decomposition of A: H. Cheng, Z. Gimbutas, P.-G. Martinsson, V. Rokhlin, "On the compression of low
rank matrices", SIAM J. Sci. Comput. 26, 2005, equation 1.2.)

What this costs is precision: where A_S is badly conditioned the entries of C are large, and what rounds off in
h = x_S + C x_R grows with them. On random pairs in float32 the error of a re-gauged pair is .2 to 1.3 times max|C|
times that of the pair itself, 4e-7.

Pivots that lie next to each other, a *window*, make x_S a view of x and the re-gauged pair no slower than the pair of
the same rank; a window at either end needs one product, one in the middle two. Where no window is conditioned well
enough, QR with column pivoting chooses the pivots (P. Businger, G. Golub, "Linear least squares solutions by
Householder transformations", Numer. Math. 7, 1965), and x is gathered once into the order that puts them first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST: dict[torch.dtype, float] = {torch.float32: 30.0, torch.float64: 1e4}
"""The largest entry of C that a window may give, by the dtype of the pair; what is not listed is never re-gauged.

In float32 that keeps the relative rounding error of a re-gauged pair below 2e-5, in float64 below 1e-11.
"""

WINDOWS = 9
"""How many windows are tried, at equal distances; those in the middle only where both at the ends fail."""


@dataclass(frozen=True)
class Gauge:
    """Which inputs of a re-gauged pair are its pivots.

    Attributes:
        start: the first of the r inputs, next to each other, that are the pivots.
        order: int64 ``[n]``, the inputs in the order that ``start`` and the columns of C count in; None where that is
            their own.
    """

    start: int
    order: Tensor | None = None

    def spread(self, columns: Tensor) -> Tensor:
        """The first factor of the pair that a re-gauged one stands for: ``[I, C]`` in the inputs' own order.

        Args:
            columns: C ``[r, n - r]``.

        Returns:
            ``[r, n]``, of the same dtype.
        """
        pivots = torch.eye(columns.shape[0], dtype=columns.dtype, device=columns.device)
        made = torch.cat((columns[:, : self.start], pivots, columns[:, self.start :]), 1)
        if self.order is None:
            return made
        return torch.empty_like(made).index_copy(1, self.order, made)

    def apply(self, x: Tensor, columns: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
        """What the pair computes.

        Args:
            x: ``[..., n]``.
            columns: C ``[r, n - r]``.
            second: B' ``[m, r]``.
            bias: ``[m]``, or None.

        Returns:
            ``[..., m]``.
        """
        if x.is_nested:  # rows of differing lengths are no one matrix
            return F.linear(F.linear(x, self.spread(columns)), second, bias)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        rows = x.reshape(-1, x.shape[-1])
        end = self.start + columns.shape[0]
        inner = rows[:, self.start : end]
        if self.start > 0:
            inner = torch.addmm(inner, rows[:, : self.start], columns[:, : self.start].t())
        if end < rows.shape[1]:
            inner = torch.addmm(inner, rows[:, end:], columns[:, self.start :].t())
        return F.linear(inner, second, bias).reshape(*x.shape[:-1], second.shape[0])


@dataclass(frozen=True)
class Regauged:
    """A re-gauged pair in float64.

    Attributes:
        gauge: its pivots.
        columns: C ``[r, n - r]``.
        second: B' ``[m, r]``.
    """

    gauge: Gauge
    columns: Tensor
    second: Tensor


def regauge(first: Tensor, second: Tensor, largest: float) -> Regauged:
    """The re-gauged form of a pair, with the window of pivots that is conditioned best.

    An orthonormal basis P of the rows of A takes its place in the search: A = G P has the same C, and P has r
    independent columns even where A has not.

    Args:
        first: A ``[r, n]``, r below n.
        second: B ``[m, r]``.
        largest: the largest absolute entry of C that a window may give; where each gives a larger one, the pivots come
            from a QR decomposition with column pivoting.

    Returns:
        In float64, on the device of ``first``.
    """
    first, second = first.double(), second.double()
    rank, width = first.shape
    basis = torch.linalg.qr(first.T).Q.T
    steps = [(width - rank) * place // (WINDOWS - 1) for place in range(WINDOWS)]
    for starts in ([steps[0], steps[-1]], steps[1:-1]):
        tried = [(start, _solved(basis, start)) for start in dict.fromkeys(starts)]
        start, columns = min(tried, key=lambda each: _entry(each[1]))
        if _entry(columns) <= largest:
            return Regauged(Gauge(start), columns, second @ first[:, start : start + rank])
    order = pivoted(basis)
    columns = _solved(basis[:, order], 0)
    return Regauged(Gauge(0, order), columns, second @ first[:, order[:rank]])


def pivoted(basis: Tensor) -> Tensor:
    """The columns of orthonormal rows in an order that puts r well conditioned ones first.

    Args:
        basis: float64 ``[r, n]``.

    Returns:
        int64 ``[n]``; the first r and the others ascend.
    """
    left = basis.clone()
    taken = torch.zeros(basis.shape[1], dtype=torch.bool, device=basis.device)
    for _ in range(basis.shape[0]):
        place = int(left.square().sum(0).masked_fill(taken, -1.0).argmax())
        direction = left[:, place] / torch.linalg.vector_norm(left[:, place])
        left -= torch.outer(direction, direction @ left)
        taken[place] = True
    return torch.cat((taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]))


def _solved(basis: Tensor, start: int) -> Tensor:
    """C of the window that starts at ``start``; not finite where the window is singular."""
    end = start + basis.shape[0]
    others = torch.cat((basis[:, :start], basis[:, end:]), 1)
    columns, failed = torch.linalg.solve_ex(basis[:, start:end], others)
    return columns if not int(failed) else torch.full_like(others, torch.inf)


def _entry(columns: Tensor) -> float:
    """The largest absolute entry; infinite where one is not a number."""
    entry = float(columns.abs().max())
    return entry if entry == entry else float("inf")
