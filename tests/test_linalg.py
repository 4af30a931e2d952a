"""linalg: against torch's own float64 decompositions, over shapes, scales and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_fx.errors import CalibrationError
from lowrank_fx.linalg import least_squares, output_spectrum, psd_root, symmetric_eigen

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60, database=None)

ROUNDING = 1e-12
"""Relative: some hundred operations of 1.1e-16 each on matrices of at most 40 rows."""


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(seed: int, rows: int, columns: int, rank: int) -> Tensor:
    return gaussian(seed, rows, rank) @ gaussian(seed + 1, rank, columns)


def assert_orthonormal(basis: Tensor) -> None:
    gap = basis.T @ basis - torch.eye(basis.shape[1], dtype=torch.float64)
    assert basis.dtype == torch.float64
    assert bool((gap.abs() <= 1e-10).all())


@PROPERTY
@given(st.integers(0, 99), st.integers(1, 24), st.integers(0, 24), st.sampled_from([-500, -300, 0, 300, 480]))
def test_symmetric_eigen_at_any_scale(seed: int, side: int, rank: int, exponent: int) -> None:
    factor = gaussian(seed, side, rank)
    matrix = factor @ factor.T - torch.diag(gaussian(seed + 1, side))
    scale = 2.0**exponent
    values, vectors = symmetric_eigen(matrix * scale * scale)
    # Undone in the same two steps: 2^-1000 squared has no float64.
    values = values / scale / scale
    assert_orthonormal(vectors)
    assert bool((values.diff() <= 0).all())
    size = float(torch.linalg.matrix_norm(matrix)) + 1e-300
    assert float((vectors * values @ vectors.T - matrix).abs().max()) <= ROUNDING * size


def test_symmetric_eigen_reads_the_lower_triangle() -> None:
    matrix = gaussian(0, 6, 6)
    symmetric = matrix.tril() + matrix.tril(-1).T
    assert torch.equal(symmetric_eigen(matrix.tril())[0], symmetric_eigen(symmetric)[0])


@pytest.mark.parametrize("side", [0, 1, 5])
def test_symmetric_eigen_of_zeros(side: int) -> None:
    values, vectors = symmetric_eigen(torch.zeros(side, side))
    assert torch.equal(values, torch.zeros(side, dtype=torch.float64))
    assert_orthonormal(vectors)


def test_symmetric_eigen_refuses_nan() -> None:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[2, 1] = math.nan
    with pytest.raises(CalibrationError, match="side 4 holds values that are not finite"):
        symmetric_eigen(matrix)
    with pytest.raises(CalibrationError, match="not finite"):
        output_spectrum(matrix, gram=torch.eye(4))


@PROPERTY
@given(st.integers(0, 99), st.integers(1, 24), st.integers(0, 24))
def test_psd_root(seed: int, side: int, rank: int) -> None:
    gram = low_rank(seed, 30, side, rank)
    gram = gram.T @ gram
    root = psd_root(gram)
    assert root.dtype == torch.float64
    assert root.shape[1] == side
    assert root.shape[0] <= side
    size = float(gram.trace()) + 1e-300
    assert float((root.T @ root - gram).abs().max()) <= ROUNDING * size
    lengths = root.square().sum(1)
    assert bool((lengths.diff() <= ROUNDING * size).all())
    assert bool(((root @ root.T - torch.diag(lengths)).abs() <= ROUNDING * size).all())


def test_psd_root_clamps_negative_eigenvalues() -> None:
    gram = torch.diag(torch.tensor([4.0, -1e-9, 1.0, 0.0], dtype=torch.float64))
    root = psd_root(gram)
    assert root.shape == (2, 4)
    # Rows of descending length: 2 e_1 and 1 e_3, up to sign.
    assert torch.equal(root.abs(), torch.tensor([[2.0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.float64))


@PROPERTY
@given(
    st.integers(0, 99),
    st.integers(1, 40),
    st.integers(1, 24),
    st.integers(1, 40),
    st.integers(0, 24),
    st.sampled_from(["gram", "root"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([1.0, 1e30, 1e-30]),
)
def test_output_spectrum(
    seed: int, rows: int, dim: int, length: int, rank: int, kind: str, dtype: torch.dtype, scale: float
) -> None:
    weight = gaussian(seed, rows, dim).to(dtype)
    factor = low_rank(seed + 7, length, dim, rank) * scale
    basis, energies = (
        output_spectrum(weight, gram=factor.T @ factor) if kind == "gram" else output_spectrum(weight, root=factor)
    )
    sides = (rows, dim) if kind == "gram" else (rows, dim, length)
    assert basis.shape == (rows, min(sides))
    assert energies.shape == (min(sides),)
    assert_orthonormal(basis)
    assert bool((energies >= 0).all())
    assert bool((energies.diff() <= 0).all())

    output = weight.double() @ factor.T
    total = float(output.square().sum())
    expected = torch.zeros_like(energies)
    squares = torch.linalg.svdvals(output).square()[: min(sides)]
    expected[: squares.shape[0]] = squares
    # The rounding of a Gram matrix is relative to |W|^2 |B|^2, not to the product.
    size = float(weight.double().square().sum()) * float(factor.square().sum())
    assert float((energies - expected).abs().max()) <= ROUNDING * size
    for k in range(min(sides) + 1):
        left = basis[:, :k]
        lost = float((output - left @ (left.T @ output)).square().sum())
        assert abs(lost - float(expected[k:].sum())) <= ROUNDING * (size + total)


def test_output_spectrum_takes_exactly_one_factor() -> None:
    weight = torch.eye(3)
    with pytest.raises(ValueError, match="exactly one"):
        output_spectrum(weight)
    with pytest.raises(ValueError, match="exactly one"):
        output_spectrum(weight, gram=weight, root=weight)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(30, 12, 12), (12, 12, 12), (30, 12, 5), (12, 30, 12)])
def test_least_squares_is_that_of_the_pseudoinverse(rows: int, columns: int, rank: int) -> None:
    matrix, target = low_rank(1, rows, columns, rank), gaussian(3, rows, 7)
    expected = torch.linalg.pinv(matrix) @ target
    # Both are off by the condition, at most 600 here, and its square where the target is not met.
    torch.testing.assert_close(least_squares(matrix, target), expected, rtol=1e-9, atol=1e-9)


def test_columns_that_nearly_depend_on_each_other_have_the_solution_of_least_length() -> None:
    matrix, target = gaussian(1, 30, 6), gaussian(3, 30, 2)
    matrix[:, 5] = matrix[:, 0] + 1e-15 * matrix[:, 1]
    found = least_squares(matrix, target)
    torch.testing.assert_close(found[5], found[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(matrix.T @ (matrix @ found), matrix.T @ target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_the_gram_of_a_spectrum_stays_as_it_is(shape: tuple[int, int], ridge: float) -> None:
    weight, root = gaussian(1, *shape), gaussian(2, 30, shape[1])
    gram = root.T @ root
    before = gram.clone()
    _, energies = output_spectrum(weight, gram=gram, ridge=ridge)
    assert torch.equal(gram, before)
    extended = torch.cat([root, math.sqrt(ridge) * torch.eye(shape[1], dtype=torch.float64)])
    expected = torch.linalg.svdvals(weight @ extended.T)[: len(energies)].square()
    torch.testing.assert_close(energies, expected, rtol=1e-9, atol=1e-9)
