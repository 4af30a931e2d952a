"""Dense linear algebra for sketches and factors: tensors in, tensors out, in float64 on the tensors' device.

Eigen problems are solved whole. A randomised solver was measured for large sides: for half of the directions it takes
.7 to 1.4 times the time, and its error curves are off by up to 3 % (``benchmarks/results/solving.md``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_fx.errors import CalibrationError

_SAFE = 200
"""Entries between 2^-200 and 2^200 can be squared, and their squares summed, in float64."""

DEPENDENT = 1e-8
"""A column that brings no more than this share of the longest beside those before it counts as a combination of them:
half the digits of float64 are left then."""


def symmetric_eigen(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, largest first.

    A matrix of very small or large entries is scaled to entries near one before the decomposition and the values are
    scaled back: a solver that squares entries near 1e-160 or 1e160 would leave the range of float64.

    Args:
        a: symmetric [s, s] of any floating dtype; only its lower triangle counts.

    Returns:
        values [s], float64, descending, of either sign; vectors [s, s], float64, orthonormal columns in the same order.

    Raises:
        CalibrationError: ``a`` holds a value that is not finite.
    """
    a = a.to(torch.float64)
    if a.shape[0] == 0:
        return a.new_zeros(0), a
    peak = float(torch.stack(torch.aminmax(a)).abs().amax())
    if not math.isfinite(peak):
        raise CalibrationError(
            f"a symmetric matrix of side {a.shape[0]} holds values that are not finite, so it has no eigenvalues; look "
            f"for NaN or infinity in the layer's weight and inputs"
        )
    # In two steps, because the reciprocal of one power of two can leave the range of float64; most need none.
    half = 1.0 if 2.0**-_SAFE < peak < 2.0**_SAFE else 2.0 ** (math.frexp(peak)[1] // 2)
    values, vectors = torch.linalg.eigh(a if half == 1.0 else a / half / half)
    return values.flip(0) * half * half, vectors.flip(1)


def length(tensor: Tensor) -> float:
    """The Frobenius norm of a tensor whose squares may leave the range of float64."""
    peak = float(tensor.abs().amax()) if tensor.numel() else 0.0
    return peak * float(torch.linalg.vector_norm(tensor / peak)) if 0 < peak < math.inf else peak


def psd_root(gram: Tensor) -> Tensor:
    """A matrix B with B^T B = gram, one row per positive eigenvalue.

    Args:
        gram: symmetric positive semidefinite [d, d] up to rounding; negative rounding eigenvalues count as zero.

    Returns:
        B [r, d], float64, with orthogonal rows of descending length; r is the number of positive eigenvalues.

    Raises:
        CalibrationError: ``gram`` holds a value that is not finite.
    """
    values, vectors = symmetric_eigen(gram)
    positive = int((values > 0).sum())
    return (vectors[:, :positive] * values[:positive].sqrt()).T.contiguous()


def output_spectrum(
    weight: Tensor, *, gram: Tensor | None = None, root: Tensor | None = None, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Left singular vectors and squared singular values of W B^T, for B^T B the Gram matrix of a layer's inputs.

    With U_k the first k columns, W' = U_k U_k^T W minimises |(W - W') B^T|_F over all W' of rank k, and the squared
    error is the sum of the other energies (Eckart and Young 1936, applied to the layer's output W B^T).

    One symmetric eigen problem of the smallest side decides: of W B^T B W^T where W is wide, otherwise of R B^T B R^T
    with W = Q R (or of R R^T with W B^T = Q R), whose eigenvectors Q carries back. Every factor of the basis is
    orthonormal to rounding whatever the rank of W B^T, so nothing is divided by a small singular value.

    Args:
        weight: W [m, d], any floating dtype.
        gram: B^T B [d, d]; give this or ``root``.
        root: B [l, d].
        ridge: c, for B^T B + c I in place of B^T B.

    Returns:
        basis [m, q], float64, orthonormal columns; energies [q], float64, descending and non-negative; q = min(m, l, d)
        for ``root`` without a ridge, min(m, d) otherwise.

    Raises:
        ValueError: both or neither of ``gram`` and ``root`` are given.
        CalibrationError: a value is not finite.
    """
    if (gram is None) == (root is None):
        raise ValueError("output_spectrum takes exactly one of gram= and root=")
    weight = weight.to(torch.float64)
    rows, columns = weight.shape
    if root is not None:
        root = root.to(torch.float64)
        if root.shape[0] < min(rows, columns) and ridge == 0:
            outer, inner = torch.linalg.qr(weight @ root.T)
            values, vectors = symmetric_eigen(inner @ inner.T)
            return outer @ vectors, values.clamp(min=0)
        if rows <= columns:
            output = weight @ root.T
            values, vectors = symmetric_eigen(output @ output.T + ridge * (weight @ weight.T))
            return vectors, values.clamp(min=0)
        outer, inner = torch.linalg.qr(weight)
        output = inner @ root.T
        values, vectors = symmetric_eigen(output @ output.T + ridge * (inner @ inner.T))
        return outer @ vectors, values.clamp(min=0)
    assert gram is not None
    gram = gram.to(torch.float64)
    if ridge:
        gram = gram.clone()
        gram.diagonal().add_(ridge)
    if rows <= columns:
        values, vectors = symmetric_eigen(weight @ gram @ weight.T)
        return vectors, values.clamp(min=0)
    outer, inner = torch.linalg.qr(weight)
    values, vectors = symmetric_eigen(inner @ gram @ inner.T)
    return outer @ vectors, values.clamp(min=0)


def least_squares(columns: Tensor, target: Tensor) -> Tensor:
    """V^+ T, the solution of least length that minimises |V X - T|_F.

    By V = Q R and a triangular system, a few times as fast as a pseudoinverse; that is for a V whose columns depend on
    each other.

    Args:
        columns: V [m, r], float64.
        target: T [m, n], float64.

    Returns:
        [r, n], float64.
    """
    if columns.shape[0] >= columns.shape[1]:
        outer, upper = torch.linalg.qr(columns)
        pivots = upper.diagonal().abs()
        if bool((pivots > DEPENDENT * pivots.amax()).all()):
            solved: Tensor = torch.linalg.solve_triangular(upper, outer.T @ target, upper=True)
            return solved
    found: Tensor = torch.linalg.pinv(columns) @ target
    return found
