"""What every sketch counts beside its second moment, and what it asks of the rows it takes in.

Two parts of n_a and n_b rows with means m_a and m_b have the joint centred Gram A_a^T A_a + A_b^T A_b + v v^T with
v = sqrt(n_a n_b / (n_a + n_b)) (m_a - m_b) (Chan, Golub, LeVeque 1983).

**Rounding**, with u = 2^-53: a block's mean is off by e <= (b + 16) u times the root mean square of its b rows, which
moves v by e' = e sqrt(n_a n_b / n) and the Gram by 2 |v| e' + e'^2. e is carried from join to join.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fx.errors import CalibrationError

UNIT = 2.0**-53
"""Unit roundoff of float64."""

_LARGEST = 2.0**480
"""From here on, sums of squares could leave the range of float64."""

_PANELS = 6
"""Panels in which a triangle of a Gram matrix is computed: 7/12 of the work of the whole square."""


class Moments(NamedTuple):
    """Rows joined into one: their number, mean [d], bound of the mean's error in length, centred squared norm."""

    rows: int
    mean: Tensor
    mean_error: float
    energy: float


def block_moments(count: int, mean: Tensor, energy: float, spread: float) -> Moments:
    """Moments of a block whose mean was summed in float64 from rows of root mean square length ``spread``."""
    error = (count + 16) * UNIT * spread + 4 * UNIT * float(torch.linalg.vector_norm(mean))
    return Moments(count, mean, error, energy)


def join(a: Moments, b: Moments) -> tuple[Moments, Tensor, float]:
    """Joint moments, the extra row v of the joint centred Gram matrix, and the rounding in it."""
    if a.rows == 0 or b.rows == 0:
        return (b if a.rows == 0 else a), torch.zeros_like(a.mean), 0.0
    count = a.rows + b.rows
    weight = math.sqrt(a.rows * b.rows / count)
    shift = (a.mean - b.mean) * weight
    lengths = torch.linalg.vector_norm(torch.stack([shift, a.mean, b.mean]), dim=1)
    length, *means = lengths.tolist()
    slip = weight * (a.mean_error + b.mean_error) + 4 * UNIT * length
    mean = a.mean + (b.mean - a.mean) * (b.rows / count)
    mean_error = (a.rows * a.mean_error + b.rows * b.mean_error) / count + 4 * UNIT * sum(means)
    return Moments(count, mean, mean_error, a.energy + b.energy + length**2), shift, (2 * length + slip) * slip


def reading_rho(rounding: float, total: Moments, centered: bool) -> float:
    """The bound of all rounding in a reading of |Z H Z^T|, as an eigenvalue of the Gram matrix.

    Evaluating it in float64 costs (6 d + 4100) u |A|_F^2: 2 d for the products, 2 s <= 4 d + 4, sums.

    Args:
        rounding: what is in the second moment itself.
        total: of all rows.
        centered: whether H is of the rows minus their mean; otherwise the mean's own error is in it too.
    """
    energy = total.energy
    if not centered:
        length = float(torch.linalg.vector_norm(total.mean))
        energy += total.rows * length**2
        rounding += total.rows * (2 * length + total.mean_error) * total.mean_error
    return rounding + (6 * total.mean.shape[0] + 4100) * UNIT * energy


def panels(side: int) -> Iterator[tuple[int, int]]:
    """Where each panel starts and stops; products are efficient from 128 columns on, and in multiples of that."""
    width = 128 * -(-side // (128 * _PANELS))
    return ((start, min(start + width, side)) for start in range(0, side, width))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever the process allows elsewhere (TF32, bfloat16)."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


def checked_rows(rows: Tensor, dim: int, groups: int, device: torch.device) -> tuple[Tensor, list[float]]:
    """Rows that a sketch can take in, and the largest absolute value in each of their equal parts.

    Args:
        rows: [n, dim] of any floating dtype on any device; n may be 0.
        dim: the length that a row has to have.
        groups: into how many parts a row divides.
        device: where the sketch lives.

    Returns:
        The rows on ``device`` in float32, or float64 where they came so; and ``groups`` magnitudes, none for no rows.

    Raises:
        CalibrationError: the shape or dtype is wrong, or a value is NaN, infinite, or 2^480 and above.
    """
    if rows.ndim != 2 or rows.shape[1] != dim or not rows.is_floating_point():
        raise CalibrationError(
            f"a sketch of dim {dim} was given {rows.dtype} rows of shape {tuple(rows.shape)}; "
            f"it takes floating rows of shape (n, {dim})"
        )
    rows = rows.detach().to(device)
    if rows.dtype != torch.float64:
        rows = rows.to(torch.float32)
    if rows.shape[0] == 0:
        return rows, []
    if groups == 1:
        ends = torch.stack(torch.aminmax(rows)).view(2, 1)  # four times as fast as by columns
    else:
        ends = torch.stack([rows.amin(0).view(groups, -1).amin(1), rows.amax(0).view(groups, -1).amax(1)])
    low, high = ends.tolist()
    magnitudes = [max(-least, most) for least, most in zip(low, high, strict=True)]
    if not any(math.isnan(least) for least in low) and max(magnitudes) < _LARGEST:
        return rows, magnitudes
    bad = torch.nonzero(~(rows.abs() < _LARGEST))
    row, column = bad[0].tolist()
    raise CalibrationError(
        f"row {row} of {rows.shape[0]} holds {float(rows[row, column])} in column {column}; a sketch takes finite "
        f"values below 2^480. Look at what the model computes for this batch, or leave the batch out"
    )
