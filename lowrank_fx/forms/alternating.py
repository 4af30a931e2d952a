"""Least squares for a weight that is a composition of two maps, over tensors alone.

A kernel whose positions fall into two sets is, reordered, a weight ``W [m, q, c]``: m outputs, q positions that the
second map sees, and c numbers (channels and positions of the first map) at each of these. The composition of a first
map ``H [r, c]`` and a second map ``V [m, r, q]`` is ``W'[m, q, c] = sum_r V[m, r, q] H[r, c]``, and

    |(W - W') G^(1/2)|_F^2      G [q c, q c], the Gram of the rows that meet the weight

is the energy of the error of the layer's output. It is quadratic in each of the two maps, so they are solved for in
turn: V exactly, H by preconditioned conjugate gradients. Neither can raise the error, so the alternation is monotone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_fx.linalg import symmetric_eigen

_FLOORS = (1e-13, 1e-10, 1e-7, 1e-4, 1e-1)
"""What is added to a Gram's diagonal, relative to its mean, until a Cholesky factor of it exists."""

_GAUGE_FLOORS = (1e-9, 1e-6, 1e-3)
"""The same where only coordinates depend on it: directions that no row has shown stay of moderate size."""


class Composition:
    """A weight to be written as a composition of two maps, and the Gram of the rows that meet it.

    Args:
        weight: W ``[m, q, c]``, float64.
        gram: G ``[q c, q c]`` in any shape, float64, symmetric positive semidefinite, contiguous.
    """

    def __init__(self, weight: Tensor, gram: Tensor) -> None:
        self.weight = weight
        _, self.places, self.width = weight.shape
        self.gram = gram.view(self.places, self.width, self.places, self.width)
        self.mean_gram = self.gram.diagonal(dim1=0, dim2=2).mean(-1)

    @property
    def energy(self) -> float:
        """``|W G^(1/2)|^2``."""
        flat = self.weight.flatten(1)
        return float(((flat @ self.gram.view(flat.shape[1], -1)) * flat).sum())

    def start(self, rank: int) -> Tensor:
        """First maps for every rank up to ``rank``: ``[rank, c]``, the best of rank k being nearly the first k rows.

        Where the q positions have the same Gram and nothing in common, the error is ``|(R - V H) G_0^(1/2)|^2`` for W
        as a matrix R ``[m q, c]`` and the positions' mean Gram G_0, and these rows are optimal at every rank (Eckart
        and Young 1936). Any root L L^T of G_0 does, since |M G_0^(1/2)| = |M L|.
        """
        matrix = self.weight.flatten(0, 1)
        root = _cholesky(self.mean_gram, _GAUGE_FLOORS)
        inner = matrix.T @ matrix
        _, directions = symmetric_eigen(root.T @ inner @ root)
        # H = directions^T root^-1 spans the same rows as this, which needs no inverse.
        return self.orthonormal(directions[:, :rank].T @ root.T @ inner)

    def orthonormal(self, first: Tensor) -> Tensor:
        """Rows orthonormal on the mean Gram; the first k, for every k, span what the first k of ``first`` do."""
        rows = first / first.norm(dim=1, keepdim=True).clamp(min=torch.finfo(first.dtype).tiny)
        factor = _cholesky(rows @ self.mean_gram @ rows.T, _GAUGE_FLOORS)
        made: Tensor = torch.linalg.solve_triangular(factor, rows, upper=False)
        return made

    def behind(self, first: Tensor) -> SecondMaps:
        """The best second maps behind ``first`` ``[r, c]``, and behind its first k rows for every k."""
        spread = torch.matmul(first, self.gram.reshape(self.places, self.width, -1))
        inner = spread.view(self.places, -1, self.places, self.width) @ first.T
        side = first.shape[0] * self.places
        # W G H^T through G H^T, which is there already.
        goal = self.weight.flatten(1) @ spread.reshape(-1, self.places * self.width).T
        goal = goal.view(-1, self.places, first.shape[0]).mT.contiguous()
        return SecondMaps(_cholesky(inner.permute(1, 0, 3, 2).reshape(side, side)), goal)

    def projected(self, directions: Tensor) -> Composition:
        """The same for the outputs along orthonormal ``directions`` ``[m, k]`` alone."""
        return Composition(torch.einsum("mk,mqc->kqc", directions, self.weight), self.gram)

    def error(self, first: Tensor, second: Tensor) -> float:
        """The error's energy for two maps."""
        left = (self.weight - torch.einsum("mrq,rc->mqc", second, first)).flatten(1)
        gram = self.gram.reshape(left.shape[1], left.shape[1])
        return float(((left @ gram) * left).sum())

    def first(self, second: Tensor, first: Tensor, steps: int) -> Tensor:
        """A better first map ``[r, c]`` for ``second``, from ``first``, by conjugate gradients.

        They solve

            sum_qp (V_q^T V_p) H G_pq = sum_q V_q^T (W G)_q

        preconditioned by ``(sum_q V_q^T V_q)^-1`` on the left and the mean Gram's inverse on the right.
        """
        rank = first.shape[0]
        by_place = second.permute(2, 0, 1).contiguous()
        left = _cholesky(torch.einsum("qmr,qms->rs", by_place, by_place), _GAUGE_FLOORS)
        right = _cholesky(self.mean_gram, _GAUGE_FLOORS)
        products = by_place[:, None].mT @ by_place  # [q, p, r, s]
        products = products.permute(2, 1, 3, 0).reshape(rank, -1)  # r by (p, s, q), as the rows of spread

        def apply(direction: Tensor) -> Tensor:
            spread = torch.matmul(direction, self.gram.reshape(self.places, self.width, -1))
            return products @ spread.view(-1, self.width)

        def condition(residual: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(residual, left).T, right).T

        # V_q^T W comes first: it has as many rows as the rank, not as the outputs.
        pulled = by_place.mT @ self.weight.flatten(1)
        goal = (pulled @ self.gram.view(-1, self.places, self.width).transpose(0, 1)).sum(0)
        residual = goal - apply(first)
        step = condition(residual)
        slope = float((residual * step).sum())
        scale = slope
        for _ in range(steps):
            if slope <= 1e-12 * scale or slope <= 0:
                break
            image = apply(step)
            curvature = float((step * image).sum())
            if curvature <= 0:
                break
            length = slope / curvature
            first = first + length * step
            residual = residual - length * image
            conditioned = condition(residual)
            now = float((residual * conditioned).sum())
            step, slope = conditioned + (now / slope) * step, now
        return first

    def improved(self, first: Tensor, sweeps: int, steps: int) -> Tensor:
        """``first`` after ``sweeps`` rounds of: the best second map, then a better first map by ``steps`` steps."""
        for _ in range(sweeps):
            second = self.behind(first).second(len(first))
            first = self.orthonormal(self.first(second, first, steps))
        return first


@dataclass(frozen=True)
class SecondMaps:
    """The best second maps behind the first k rows of one first map, for every k.

    The features of fewer rows come first, so one Cholesky factor serves them all.

    Attributes:
        factor: the lower Cholesky factor of the features' Gram ``[r q, r q]``.
        goal: the features' products with the outputs, ``[m, r, q]``.
    """

    factor: Tensor
    goal: Tensor

    def second(self, rank: int) -> Tensor:
        """The best second map ``[m, rank, q]`` behind the first ``rank`` rows."""
        goal = self.goal[:, :rank]
        flat = goal.flatten(1).T
        return torch.cholesky_solve(flat, self.factor[: len(flat), : len(flat)]).T.reshape(goal.shape)

    def fitted(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best second map ``[m, rank, q]``, and the Gram ``[m, m]`` of the outputs that it gives."""
        second = self.second(rank)
        return second, second.flatten(1) @ self.goal[:, :rank].flatten(1).T

    def explained(self) -> Tensor:
        """The energy that the best second map explains behind the first k rows: ``[r]``, k = 1 ... r."""
        _, rows, places = self.goal.shape
        return self._parts().square().sum(1).view(rows, places).sum(1).cumsum(0)

    def grams(self, ranks: Sequence[int]) -> Iterator[Tensor]:
        """The Gram ``[m, m]`` of the best outputs behind the first k rows, for each k of ``ranks``, never falling."""
        parts, places = self._parts(), self.goal.shape[2]
        total, done = parts.new_zeros(parts.shape[1], parts.shape[1]), 0
        for rank in ranks:
            more = parts[done : rank * places]
            total = total + more.T @ more
            done = rank * places
            yield total

    def _parts(self) -> Tensor:
        parts: Tensor = torch.linalg.solve_triangular(self.factor, self.goal.flatten(1).T, upper=False)
        return parts


def _cholesky(gram: Tensor, floors: Sequence[float] = _FLOORS) -> Tensor:
    """The lower Cholesky factor of a Gram that may be singular: as little as needed is added to its diagonal."""
    mean = float(gram.diagonal().mean()) or 1.0
    for floor in floors:
        moved = gram.clone()
        moved.diagonal().add_(floor * mean)
        factor, failed = torch.linalg.cholesky_ex(moved)
        if not int(failed):
            made: Tensor = factor
            return made
    raise AssertionError("a Gram is positive semidefinite up to rounding")
