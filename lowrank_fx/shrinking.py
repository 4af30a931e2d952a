"""One compression of Frequent Directions: the rows of B and those that join it become at most l rows again.

With S the s stacked rows and S S^T = V diag(lambda) V^T, lambda descending, the new B is D V_l^T S. D_i^2 is 1, or
1 - lambda_{l+1} / lambda_i for the last h of the l directions, those that *pay*. What is lost is ::

    M = S^T V (I - D^2) V^T S,    0 <= M <= (lambda_{l+1} + excess) I,    trace(M) = dropped + h lambda_{l+1}

with D_i = 0 for the directions that are dropped. Products run in the rows' own dtype, float32 as a rule: they are most
of the work. Their rounding is measured and not bounded by the worst case, which is thousands of times what happens:

- of S S^T, in the directions that M is made of and no others, because with G for what was decomposed in place of S S^T
  and W^2 = I - D^2, M <= (lambda_{l+1} + |W V^T (S S^T - G) V W|) I. In G the rows of B, which are orthogonal up to
  rounding, count as orthogonal.
- of D V_l^T S and of V, by the caller: M P is returned for its probes P, and whatever is missing from A^T A P beyond
  the sum of all M P is rounding.

With u = 2^-53, t the trace of S S^T and Q the s x 16 probes here, the float64 products with probes are off by
(3 s + d + 16) u t |P|_F, and |Q|_F: two of inner length s, one of d, one of s again. The worst case of an inner product
(Higham 2002, eq. 3.5) is taken for what its error is, and not also the sqrt(s) of a dense V; rounding errors that are
not all of one sign stay sqrt(s) below that (Higham and Mary 2019, "A new approach to probabilistic rounding error
analysis", SIAM J. Sci. Comput. 41(5)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fx.certificate import gaussian, norm_factor
from lowrank_fx.linalg import length, symmetric_eigen
from lowrank_fx.moments import UNIT, full_precision, panels

SHARE = 0.2
"""alpha of [DGP] (``directions.py``): what shrinking takes in all, as a trace, is at least this share of l delta."""

_PROBES, _ODDS = 16, 1e-11
"""Random vectors that measure what is wrong with S S^T, and the probability that they miss it: 1e-8 over a thousand
compressions."""

_CHUNK_ELEMENTS = 1 << 19
"""Entries converted to float64 at a time on a CPU (4 MiB): more leave its cache, and few rows make slow products."""


class Shrunk(NamedTuple):
    """What one compression gives.

    Attributes:
        matrix: the new B [l', d], l' <= l, in the dtype of the old one.
        energies: squared lengths of its rows [l'], float64.
        delta: lambda_{l+1}.
        trace: of M.
        missed: M P [d, p], float64.
        slip: what ``missed`` may be off by, in Frobenius norm.
        excess: how far M may exceed lambda_{l+1} I.
    """

    matrix: Tensor
    energies: Tensor
    delta: float
    trace: float
    missed: Tensor
    slip: float
    excess: float


def shrink(matrix: Tensor, energies: Tensor, joining: Tensor, size: int, owed: float, probes: Tensor) -> Shrunk:
    """Compress B and the rows that join it to at most ``size`` rows.

    Args:
        matrix: B [l', d], float32 or float64, its rows orthogonal up to rounding.
        energies: the squared lengths of its rows [l'], float64.
        joining: rows [b, d] in the dtype of B, of lengths whose squares that dtype can sum.
        size: l.
        owed: how far T is below (l / 5) delta before; directions pay until T reaches it (``directions.py``).
        probes: P [d, p], float64, drawn without knowledge of the rows.
    """
    kept = matrix.shape[0]
    row_gram = _row_gram(matrix, energies, joining)
    total = float(row_gram.trace())
    values, vectors = symmetric_eigen(row_gram)
    spared, delta, trace = _spared(values, size, owed)
    remaining = spared.shape[0]
    rotation = (vectors[:, :remaining] * spared.sqrt()).T.to(matrix.dtype)
    with full_precision(matrix.device):
        rotated = (rotation[:, :kept] @ matrix).addmm_(rotation[:, kept:], joining)
    gone = torch.ones_like(values)
    gone[:remaining] -= spared
    own_probes = gaussian(len(gone), _PROBES, len(gone)).to(gone.device)
    missed, wrong = _measured(matrix, joining, values, vectors, gone, probes, own_probes)
    steps = (3 * len(gone) + matrix.shape[1] + 16) * UNIT * total
    excess = norm_factor(_PROBES, _ODDS) * (wrong + steps * length(own_probes))
    return Shrunk(rotated, values[:remaining] * spared, delta, trace, missed, steps * length(probes), excess)


def image(matrix: Tensor, right: Tensor) -> Tensor:
    """A matrix [s, d] of any dtype times ``right`` [d, p], in float64 throughout: [s, p]."""
    return torch.cat([part @ right for part in _parts(matrix)])


def adjoint(matrix: Tensor, left: Tensor) -> Tensor:
    """The transpose of a matrix [s, d] of any dtype times ``left`` [s, p], in float64 throughout: [d, p]."""
    # Transposed: the product then runs along the memory of the rows.
    whole = left.new_zeros(left.shape[1], matrix.shape[1])
    for part, own in zip(_parts(matrix), torch.split(left, _rows_of(matrix)), strict=True):
        whole.addmm_(own.T, part)
    return whole.T


def _row_gram(matrix: Tensor, energies: Tensor, joining: Tensor) -> Tensor:
    """S S^T [s, s], float64, its lower triangle."""
    kept, count = matrix.shape[0], joining.shape[0]
    row_gram = energies.new_zeros(kept + count, kept + count)
    row_gram.diagonal()[:kept] = energies
    with full_precision(matrix.device):
        row_gram[kept:, :kept] = joining @ matrix.T
        for start, stop in panels(count):
            row_gram[kept + start :, kept + start : kept + stop] = joining[start:] @ joining[start:stop].T
    return row_gram


def _spared(values: Tensor, size: int, owed: float) -> tuple[Tensor, float, float]:
    """D^2 of the directions that remain [l'], delta and the trace of M, for the eigenvalues lambda [s] of S S^T."""
    # One wait for the device: the spectrum decides how many rows remain.
    spectrum = values.tolist()
    shrunk = max(0.0, spectrum[size]) if len(spectrum) > size else 0.0
    dropped = math.fsum(max(0.0, value) for value in spectrum[size:])
    due = SHARE * size * shrunk + owed - dropped
    # The weakest directions pay, and only as many as are asked for: what the strong ones lose, plans lose.
    paying = min(size, max(0, math.ceil(due / shrunk))) if shrunk > 0 else 0
    first = max(0, min(size, len(spectrum)) - paying)
    left = values[:size].clamp(min=0)
    left[first:] = (left[first:] - shrunk).clamp(min=0)
    remaining = int((left > 0).sum())
    spared = left[:remaining] / values[:remaining]
    return spared, shrunk, dropped + paying * shrunk


def _measured(
    matrix: Tensor,
    joining: Tensor,
    values: Tensor,
    vectors: Tensor,
    gone: Tensor,
    probes: Tensor,
    own_probes: Tensor,
) -> tuple[Tensor, float]:
    """M P [d, p], and |W V^T (S S^T - G) V W Q|_F for the row Gram matrix G that was decomposed.

    Args:
        matrix: B [l', d].
        joining: the other rows of S.
        values: lambda [s].
        vectors: V [s, s].
        gone: the diagonal of W^2 = I - D^2 [s].
        probes: P [d, p].
        own_probes: Q [s, q].
    """
    kept, weights = matrix.shape[0], gone.sqrt()[:, None]
    along = vectors.T @ torch.cat([image(matrix, probes), image(joining, probes)])
    turned = vectors @ torch.cat([gone[:, None] * along, weights * own_probes], 1)
    back = adjoint(matrix, turned[:kept]) + adjoint(joining, turned[kept:])
    missed, seen = back[:, : probes.shape[1]], back[:, probes.shape[1] :]
    found = vectors.T @ torch.cat([image(matrix, seen), image(joining, seen)])
    wrong = weights * found - (gone * values)[:, None] * own_probes
    return missed, length(wrong)


def _rows_of(matrix: Tensor) -> int:
    """How many rows are converted at a time."""
    if matrix.device.type != "cpu" or matrix.dtype == torch.float64:
        return max(1, matrix.shape[0])
    return max(1, _CHUNK_ELEMENTS // matrix.shape[1])


def _parts(matrix: Tensor) -> Iterator[Tensor]:
    """A matrix in float64, some rows at a time; each part holds until the next one is asked for."""
    if matrix.dtype == torch.float64:
        yield matrix
        return
    # One piece of memory for all of them: fresh memory would cost more than the conversion.
    memory = matrix.new_empty(min(_rows_of(matrix), matrix.shape[0]), matrix.shape[1], dtype=torch.float64)
    for part in torch.split(matrix, _rows_of(matrix)):
        yield memory[: part.shape[0]].copy_(part)
