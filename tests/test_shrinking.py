"""One compression of Frequent Directions, against what it says of itself, evaluated densely in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank_fx.certificate import gaussian, norm_factor
from lowrank_fx.shrinking import SHARE, Shrunk, adjoint, image, shrink
from lowrank_fx.sparse_signs import sparse_signs

SIZE, DIM, JOINING = 24, 150, 18
PROBES = gaussian(DIM, 8, 0)


def stack(dtype: torch.dtype, decay: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """B with orthogonal rows, their squared lengths, and rows that join them."""
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(DIM, SIZE, generator=generator, dtype=torch.float64)).Q
    lengths = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -decay
    joining = torch.randn(JOINING, DIM, generator=generator, dtype=torch.float64) * DIM**-0.5
    return (basis * lengths).T.to(dtype).contiguous(), lengths.square(), joining.to(dtype)


def dense(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    return matrix.T @ matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("owed", [0.0, 0.05])
def test_what_is_lost_is_what_was_said(dtype: torch.dtype, decay: float, owed: float) -> None:
    matrix, energies, joining = stack(dtype, decay)
    done = shrink(matrix, energies, joining, SIZE, owed, PROBES)
    assert done.matrix.dtype == dtype
    assert done.matrix.shape[0] <= SIZE
    before = dense(torch.cat([matrix, joining]))
    lost = before - dense(done.matrix)
    spectrum = torch.linalg.eigvalsh(lost)
    # Float32 rounds each product to 6e-8, and its sums of 150 about as well; float64 to its own.
    rounding = (1e-6 if dtype == torch.float32 else 1e-14) * float(before.trace())
    assert float(spectrum[0]) >= -rounding
    assert float(spectrum[-1]) <= done.delta + done.excess + rounding
    assert float(lost.trace()) == pytest.approx(done.trace, abs=4 * rounding)
    torch.testing.assert_close(done.missed, lost @ PROBES, rtol=0, atol=10 * rounding)
    assert 0 < done.slip <= 1e-11 * float(before.trace())
    torch.testing.assert_close(done.energies, done.matrix.double().square().sum(1), rtol=1e-3, atol=rounding)
    # T makes up for what is owed and comes to (l / 5) delta, unless all l directions paying is less than that.
    assert done.trace >= min(SHARE * SIZE * done.delta + owed, SIZE * done.delta) - 4 * rounding
    # Rows that the compression made are orthogonal again, up to rounding.
    row_gram = (done.matrix @ done.matrix.T).double()
    assert float((row_gram - torch.diag(row_gram.diagonal())).abs().max()) <= rounding


def test_the_excess_covers_what_wrong_lengths_do() -> None:
    """Rows that are longer than they are counted: what that does to lambda is measured, and covered."""
    matrix, energies, joining = stack(torch.float32)
    off = 1.01 * matrix
    done, silent = (shrink(given, energies, joining, SIZE, 0.0, PROBES) for given in (off, matrix))
    lost = dense(torch.cat([off, joining])) - dense(done.matrix)
    excess = float(torch.linalg.eigvalsh(lost)[-1]) - done.delta
    assert excess > 2 * silent.excess  # without measuring it, the bound would be wrong
    assert excess <= done.excess


def test_a_stack_that_fits_loses_nothing() -> None:
    matrix, energies, joining = stack(torch.float64)
    done = shrink(matrix[:4], energies[:4], joining, SIZE, 0.0, PROBES)
    assert (done.delta, done.trace) == (0.0, 0.0)
    stacked = dense(torch.cat([matrix[:4], joining]))
    torch.testing.assert_close(dense(done.matrix), stacked, rtol=0, atol=1e-14)


def test_zero_rows_are_dropped() -> None:
    rows = torch.zeros(5, DIM)
    done: Shrunk = shrink(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.float64), rows, SIZE, 0.0, PROBES)
    assert done.matrix.shape == (0, DIM)
    assert (done.delta, done.trace, done.slip, done.excess) == (0.0, 0.0, 0.0, 0.0)
    assert not bool(done.missed.any())


@pytest.mark.parametrize("rows", [0, 1, 7, 4000])
def test_float64_products_of_float32_rows(rows: int) -> None:
    """4,000 rows of 150 are more than one chunk."""
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randn(rows, DIM, generator=generator)
    left = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(image(matrix, PROBES), matrix.double() @ PROBES, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adjoint(matrix, left), matrix.double().T @ left, rtol=1e-12, atol=1e-10)


def test_the_factor_for_rarer_failures_is_larger() -> None:
    generator = torch.Generator().manual_seed(0)
    assert norm_factor(16, 1e-11) > norm_factor(16) > norm_factor(32)
    # |E P|_F^2 is |E|_F^2 times a chi-square of 16 where E has rank one: the worst case.
    draws = torch.randn(20_000, 16, generator=generator).square().sum(1).sqrt()
    assert float(draws.min()) * norm_factor(16, 1e-4) >= 0.9
    assert float(draws.min()) * norm_factor(16) >= 1


# ---- sparse signs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "columns"), [(1, 1), (7, 7), (10, 3), (500, 56), (40, 400)])
def test_products_with_sparse_signs(dim: int, columns: int) -> None:
    made = sparse_signs(dim, columns, 5)
    dense_signs = made.dense()
    assert dense_signs.shape == (dim, columns)
    rows = torch.randn(9, dim, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made.times(rows).double(), rows.double() @ dense_signs, rtol=1e-5, atol=1e-5)
    assert torch.equal(sparse_signs.__wrapped__(dim, columns, 5).dense(), dense_signs)
    assert dim * columns == 1 or not torch.equal(sparse_signs(dim, columns, 6).dense(), dense_signs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sparse_signs_ask_for_no_default(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        made = sparse_signs.__wrapped__(30, 9, 4)
        rows = torch.ones(2, 30, dtype=torch.float32, device="cpu")
        assert made.times(rows).dtype == torch.float32
        assert made.dense().device.type == "cpu"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(made.dense(), sparse_signs(30, 9, 4).dense())


def test_sparse_signs_look_at_every_row_equally_often() -> None:
    made = sparse_signs(500, 56, 0)
    assert made.rows.shape == (56, 8 * 500 // 56)
    often = torch.bincount(made.rows.flatten(), minlength=500)
    assert set(often.tolist()) <= {7, 8}
    assert set(made.signs.flatten().tolist()) == {-1.0, 1.0}
    # Signs are fair: 3,976 of them, five standard deviations.
    assert abs(float(made.signs.sum())) < 5 * math.sqrt(made.signs.numel())


def test_sparse_signs_leave_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    sparse_signs(31, 8, 12)
    assert torch.equal(torch.random.get_rng_state(), state)
