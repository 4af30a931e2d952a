"""Least squares for a layer whose input has changed: what its weight should be now, from moments of rows.

With X' the rows that meet the layer in the compressed model and Y what it gave in the original, the weight that does
best, near the one W that there was,

    W* = argmin |Y - W* X'|_F^2 + a |W* - W|_F^2 = W + (C - W G) (G + a I)^-1,    G = X' X'^T, C = Y X'^T,

is a ridge regression (Hoerl and Kennard, "Ridge regression", Technometrics 12, 1970) shrunk towards W instead of zero.
``a`` is a share of the mean eigenvalue of G, the least one whose fit to one half of the rows beats W on the other half.
Of all matrices of one rank the projection of W* on the main directions of W* X' is then closest to Y (reduced-rank
regression: A. J. Izenman, JMVA 5, 1975), and that is what factoring W* on the second moments of X' gives.

Tensors only; groups of rows side by side are problems side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.moments import full_precision

RIDGES = (1e-2, 1e-1, 1.0)
"""The shares a that are tried: the first whose fit beats W on rows that it has not seen.

Not the one that does best there: the rank shrinks the fit once more. ResNet-20 at half its parameters, held-out error:
.354 with the best of six for the dense fit, .333 with 1e-2 everywhere (1e-5 to 1e-1: .333 to .335).
"""


GATHERED = 1024
"""So many rows of small batches are summed at once."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of pairs of rows, the inputs and the wanted outputs of a layer.

    Attributes:
        rows: how many pairs.
        mean_in: of the inputs ``[groups * d]``, float64.
        mean_out: of the wanted outputs ``[m]``, float64.
        grams: per group the centred second moment of the inputs ``[d, d]``, float64, summed over the rows.
        cross: of centred outputs with centred inputs ``[m, d]``, float64; group j owns the j-th block of its rows.
    """

    rows: int
    mean_in: Tensor
    mean_out: Tensor
    grams: tuple[Tensor, ...]
    cross: Tensor

    @property
    def groups(self) -> int:
        """How many problems stand side by side."""
        return len(self.grams)

    def merged(self, other: Moments) -> Moments:
        """The moments of the rows of both (Chan, Golub, LeVeque 1983)."""
        if not self.rows or not other.rows:
            return self if self.rows else other
        rows = self.rows + other.rows
        weight = self.rows * other.rows / rows
        into, out = self.mean_in - other.mean_in, self.mean_out - other.mean_out
        own = into.chunk(self.groups)
        return Moments(
            rows,
            (self.rows * self.mean_in + other.rows * other.mean_in) / rows,
            (self.rows * self.mean_out + other.rows * other.mean_out) / rows,
            tuple(
                one + two + weight * torch.outer(part, part)
                for one, two, part in zip(self.grams, other.grams, own, strict=True)
            ),
            self.cross + other.cross + weight * _outer(out, into, self.groups),
        )

    def about_zero(self) -> Moments:
        """The moments of the rows as they came, under means of zero: for a layer whose constant is zero for good."""
        return Moments(
            self.rows,
            torch.zeros_like(self.mean_in),
            torch.zeros_like(self.mean_out),
            tuple(
                gram + self.rows * torch.outer(part, part)
                for gram, part in zip(self.grams, self.mean_in.chunk(self.groups), strict=True)
            ),
            self.cross + self.rows * _outer(self.mean_out, self.mean_in, self.groups),
        )

    def offset(self, matrix: Tensor) -> Tensor:
        """The constant that belongs to a weight: ``mean_out - matrix mean_in``, ``[m]``."""
        parts = zip(matrix.chunk(self.groups), self.mean_in.chunk(self.groups), strict=True)
        return self.mean_out - torch.cat([block @ own for block, own in parts])

    def unexplained(self, matrix: Tensor) -> Tensor:
        """What a weight leaves of the cross moments, ``cross - matrix G``: float64 ``[m, d]``, as the weight."""
        return self.cross - _applied(matrix, self.grams)


class PairSum:
    """Collects :class:`Moments` from blocks of paired rows; the inputs' own are those of an exact sketch.

    Products are taken in float32 at least, about the means of the first rows, so that a large mean costs no digits,
    and summed in float64. Few rows wait until there are ``GATHERED`` of them, because every sum passes over a matrix.

    Args:
        sketch: an exact sketch of the inputs, which may be shared by layers that have the same input.
    """

    def __init__(self, sketch: Sketch) -> None:
        self.sketch = sketch
        self._rows = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Take in pairs of rows; the sketch is given the inputs by its owner.

        They may be views of what somebody holds, who must not write to it before :meth:`moments`.

        Args:
            inputs: floating ``[n, groups * d]``.
            outputs: ``[n, m]``, of the same dtype.
        """
        if len(inputs):
            self._waiting.append((inputs, outputs))
        if sum(len(rows) for rows, _ in self._waiting) >= GATHERED:
            self._join()

    def _join(self) -> None:
        """Sum the rows that wait."""
        if not self._waiting:
            return
        inputs, outputs = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        groups = len(self.sketch.parts)
        if not self._rows:
            self._about = inputs.mean(0), outputs.mean(0)
            width = inputs.shape[1] // groups
            self._cross = torch.zeros(outputs.shape[1], width, dtype=torch.float64, device=inputs.device)
            self._total = torch.zeros(outputs.shape[1], dtype=torch.float64, device=inputs.device)
        # Half precision would round the products, or let them overflow, before they are summed.
        wide = torch.promote_types(inputs.dtype, torch.float32)
        into, out = inputs.to(wide) - self._about[0], outputs.to(wide) - self._about[1]
        parts = zip(into.chunk(groups, 1), out.chunk(groups, 1), self._cross.chunk(groups), strict=True)
        with full_precision(inputs.device):
            for own, wanted, cross in parts:
                cross += wanted.T @ own
        self._total += out.sum(0, dtype=torch.float64)
        self._rows += len(inputs)

    def moments(self) -> Moments | None:
        """The moments so far; None if there were no rows."""
        self._join()
        if not self._rows:
            return None
        mean, out = self.sketch.mean, self._total / self._rows
        return Moments(
            self._rows,
            mean,
            self._about[1].double() + out,
            tuple(part.gram() for part in self.sketch.parts),
            self._cross - self._rows * _outer(out, mean - self._about[0].double(), len(self.sketch.parts)),
        )


def anchored_weight(moments: Moments, weight: Tensor, ridge: float) -> Tensor:
    """W*: the ridge regression of the wanted outputs on the inputs, shrunk towards ``weight``.

    Args:
        moments: of the rows; under means of zero for a layer whose bias may not move.
        weight: W, float64 ``[m, d]``.
        ridge: a as a share of the mean eigenvalue of G; infinite gives W itself.

    Returns:
        float64 ``[m, d]``; a block without any input energy stays as it is.
    """
    return weight if math.isinf(ridge) else weight + _change(moments, moments.unexplained(weight), ridge)


def choose_ridge(halves: Sequence[Moments], weight: Tensor, *, centered: bool) -> float:
    """The least ridge whose fits of each half of the rows beat W on the other half: of ``RIDGES``, or infinite for W.

    Args:
        halves: two, neither of them under means of zero.
        weight: W, float64 ``[m, d]``.
        centered: whether the layer's bias takes up the means.
    """
    halves = [half if centered else half.about_zero() for half in halves]
    left = [half.unexplained(weight) for half in halves]
    return next((ridge for ridge in RIDGES if crossed(halves, left, weight, ridge) < 0), math.inf)


def crossed(halves: Sequence[Moments], left: Sequence[Tensor], weight: Tensor, ridge: float) -> float:
    """How much more of one half of the rows' squared error its W + E leaves than W does, E fitted to the other half.

    Both ways together, each weight with the constant that suits the half it was fitted to. With D = C - W G,
    |Y - (W + E) X'|^2 - |Y - W X'|^2 = <E G, E> - 2 <E, D> = -<E, D + (D - E G)>.

    Args:
        halves: two, under means of zero where the layer's constant is zero for good.
        left: D of each.
        weight: W, float64 ``[m, d]``.
        ridge: as a share of the mean eigenvalue of G.
    """
    total = 0.0
    for fitted, seen in ((0, 1), (1, 0)):
        change = _change(halves[fitted], left[fitted], ridge)
        other, gap = halves[seen], left[seen]
        total -= float((change * (2 * gap - _applied(change, other.grams))).sum())
        for matrix, sign in ((weight, -1), (weight + change, 1)):
            apart = halves[fitted].offset(matrix) - other.offset(matrix)
            total += sign * other.rows * float(apart.square().sum())
    return total


def _applied(matrix: Tensor, grams: Sequence[Tensor]) -> Tensor:
    return torch.cat([block @ gram for block, gram in zip(matrix.chunk(len(grams)), grams, strict=True)])


def _change(moments: Moments, unexplained: Tensor, ridge: float) -> Tensor:
    """``unexplained (G + a I)^-1``, block by block; a block without any input energy stays as it is."""
    blocks = zip(moments.grams, unexplained.chunk(moments.groups), strict=True)
    return torch.cat([_ridge_solve(gram, right, ridge) for gram, right in blocks])


def _ridge_solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``right (gram + a I)^-1``; a grows where rounding leaves the sum indefinite."""
    dim = len(gram)
    mean = float(gram.diagonal().mean())
    if not mean > 0:
        return torch.zeros_like(right)
    while True:
        lifted = gram.clone()
        lifted.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(lifted)
        # The diagonal of G is its energy in each input, so at a = d the sum is diagonally dominant in the mean.
        if not int(failed) or ridge > dim:
            return torch.cholesky_solve(right.T, factor).T if not int(failed) else torch.zeros_like(right)
        ridge *= 10


def _outer(out: Tensor, into: Tensor, groups: int) -> Tensor:
    """The outer product of each group's part of two rows: ``[m, d]``."""
    parts = zip(out.chunk(groups), into.chunk(groups), strict=True)
    return torch.cat([torch.outer(own, other) for own, other in parts])
