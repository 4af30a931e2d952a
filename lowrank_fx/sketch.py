"""Frequent Directions: what is kept of a tap's rows, with a certificate of how much was lost.

Source of the method: Ghashami, Liberty, Phillips, Woodruff 2016, "Frequent Directions: Simple and Deterministic Matrix
Sketching", SIAM J. Comput. 45(5), called [FD] below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_fx.errors import OptionError

_UNIT = 2.0**-53
"""Unit roundoff of float64."""

_LARGEST = 2.0**480
"""Above this, sums of squares leave the range of float64."""

_BLOCK_ROWS = 4096
"""Rows in one float32 product of exact mode: enough to hide the float64 sum behind it."""

_CHUNK_ELEMENTS = 1 << 17
"""Elements converted to float64 at a time (1 MiB), so that the passes over them stay in cache."""

_PANEL = 256
"""Columns per panel of the lower triangle; the products above the diagonal blocks are not computed."""

_PROBES = 8
"""Random vectors that measure the rounding of exact mode."""

_PROBE_FACTOR = 5.9
"""|E|_F <= this * |E G|_F for G of _PROBES Gaussian columns, except with probability 1e-8 over G.

Chernoff: P(|E G|_F^2 <= e |E|_F^2) <= (e * exp(1) / p)^(p / 2) for every E, which is 1e-8 at p = 8, e = 1 / 5.9^2.
"""


class FrequentDirections:
    """The centred second moment of a stream of rows, exact (d x d) or as a Frequent Directions sketch (l x d).

    For the rows x_1..x_n it keeps n, their mean and either the Gram matrix of the rows minus their mean (*exact mode*,
    ``size`` is None or at least ``dim``) or a matrix B of at most ``size`` rows and a buffer of ``size`` rows (*FD mode*).
    Write A for the n x d matrix of centred rows and M for the matrix that :meth:`matrix` returns. Then

        -rho I <= A^T A - M^T M <= (delta + rho) I                                                               (1)
        |A^T A - M^T M|_2 <= |A - A_k|_F^2 / (l - k) + rho    for every k < l            ([FD] Theorem 1.1)       (2)

    **Centring** is exact: two parts of n_a and n_b rows with means m_a and m_b have the joint centred Gram
    A_a^T A_a + A_b^T A_b + v v^T with v = sqrt(n_a n_b / (n_a + n_b)) (m_a - m_b) (Chan, Golub, LeVeque 1983), so v is one
    more row of the sketch whenever a block or another sketch joins.

    **FD mode.** When the buffer is full, S = [B; its centred rows; v] has s <= 2 l + 1 rows. With S S^T = V diag(lambda) V^T
    the new B is D V_l^T S, D_i^2 = 1 - lambda_{l+1} / lambda_i, and delta grows by lambda_{l+1}. Each time |S|_F^2 loses at
    least (l + 1) lambda_{l+1}, which gives (2). Everything is float64 except the buffer, which holds the rows as they came.

    **Exact mode.** A block of rows is shifted by its approximate mean, scaled by a power of two, multiplied in float32 (TF32
    off; float64 rows in float64) and summed in float64; the remaining mean of the shifted block is taken out exactly.

    **delta** is what shrinking took, plus the size of any negative eigenvalue that was clamped. It is zero in exact mode.

    **rho** bounds the rounding, u = 2^-53, with t the trace of S S^T or of the block:

    - a compression of s rows: the row Gram d u t (inner products of length d; Higham 2002, eq. 3.5), centring 8 u t, the
      eigen decomposition s u t for its backward error and as much for the orthonormality of V (LAPACK Users' Guide 4.7, with
      p(n) = n), the product D V^T S at most 2 sqrt(l) s u t; twice the sum, because the next row Gram takes B B^T to be
      diagonal.
    - a block of exact mode: the worst case of a float32 product of b rows, b 2^-24 t, is thousands of times what happens
      and would hide the tail of any spectrum. The error is measured instead: for fixed Gaussian probes G [d, 8] the exact
      Gram times G is summed in float64 beside the float32 products, and |E|_2 <= |E|_F <= 5.9 |E G|_F for the error E of
      the Gram, except with probability 1e-8 over G, which knows nothing of the data (Chernoff's bound for a weighted sum of
      chi-squares). The probes cover centring, scaling, underflow and float32 products; the rounding of the probes is added.
    - means: a mean that is off by e moves v by e sqrt(n_a n_b / n), hence the Gram by 2 |v| e' + e'^2. e is carried along.

    Args:
        dim: d, the length of a row; at least 1.
        size: l, the number of rows of the sketch, at least 1; None, or ``dim`` and above, is exact mode.
        device: where the state lives and the work is done; rows are moved there. Default: the CPU.

    Raises:
        OptionError: ``dim`` or ``size`` is below 1.
    """

    def __init__(self, dim: int, size: int | None = None, device: torch.device | str | None = None) -> None:
        if dim < 1:
            raise OptionError(f"FrequentDirections(dim={dim}): a row needs at least one entry")
        if size is not None and size < 1:
            raise OptionError(
                f"FrequentDirections(dim={dim}, size={size}): use a size of at least 1, or None for exact mode"
            )
        self.dim = dim
        self.size = size if size is not None and size < dim else None
        self.device = torch.device(device) if device is not None else torch.device("cpu")
        self._delta = 0.0
        self._rounding = 0.0
        self._joined = 0
        self._joined_mean = self._zeros(dim)
        self._joined_mean_error = 0.0
        if self.size is None:
            self._gram = self._zeros(dim, dim)
            self._probed = self._zeros(dim, _PROBES)
        else:
            self._matrix = self._zeros(0, dim)
            self._energies = self._zeros(0)
            self._buffer = torch.zeros(0, dim, device=self.device)
            self._buffered = 0

    @property
    def exact(self) -> bool:
        """Whether the full Gram matrix is kept."""
        return self.size is None

    @property
    def rows(self) -> int:
        """n, the number of rows seen."""
        return self._joined if self.size is None else self._joined + self._buffered

    @property
    def mean(self) -> Tensor:
        """The mean of the rows [d], float64; zero where there are none."""
        if self.size is None or self._buffered == 0:
            return self._joined_mean.clone()
        block_mean = self._buffer[: self._buffered].to(torch.float64).mean(0)
        return self._joined_mean + (block_mean - self._joined_mean) * (self._buffered / self.rows)

    @property
    def squared_norm(self) -> float:
        """|A|_F^2, the squared Frobenius norm of the centred rows, to about float32 accuracy in exact mode."""
