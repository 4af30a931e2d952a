"""Frequent Directions: the mode of a sketch that keeps fewer rows than columns, and knows how much it lost.

[FD] is Ghashami, Liberty, Phillips, Woodruff 2016, "Frequent Directions: Simple and Deterministic Matrix Sketching",
SIAM J. Comput. 45(5); [DGP] is Desai, Ghashami, Phillips 2016, "Improved Practical Matrix Sketching with Guarantees",
IEEE TKDE 28(7).

**Shrinking.** When a row finds the buffer of l / 2 rows full, S = [B; the buffered rows minus their mean; v] has
s <= 3 l / 2 + 2 rows. With S S^T = V diag(lambda) V^T, lambda descending, the new B is D V_l^T S, delta grows by
lambda_{l+1}, and D_i^2 is 1, or 1 - lambda_{l+1} / lambda_i for the last h of the l directions. h is the least number
for which T, the trace of all that was dropped and shrunk, stays at or above (l / 5) delta. Shrinking no more than that
plans better than shrinking all of them as [FD] does, and gives, for A the centred rows, ::

    |A^T A - B^T B|_2 <= |A - A_k|_F^2 / (l / 5 - k) + rho    for every k < l / 5      ([DGP], alpha = .2)

because for the first k right singular vectors v_i of A, T = sum_i (|A v_i|^2 - |B v_i|^2) <= |A - A_k|_F^2 + k delta.
The sums delta and T of merged sketches keep it. The buffer holds the rows as they came (float32, or float64 where such
rows came); B is float64.

**What was lost**, M = A^T A - B^T B, is known by its trace T and by products with fixed random columns, summed beside
the stream: A^T (A P) in float64 for Gaussian P, which certifies, and A^T (A Q) in float32 for Q of random signs,
scaled by a power of two, which plans. P and Q are independent of each other and drawn again whenever they are needed.

**Rounding**, with u = 2^-53 and t the trace of S S^T. A compression of s rows costs the row Gram d u t (inner products
of length d; Higham 2002, eq. 3.5), centring 16 u t, the eigen decomposition s u t for its backward error and s u t for
V's orthonormality (LAPACK Users' Guide, section 4.7, with p(s) = s), and the product D V_l^T S, 2 sqrt(l) s u t. The
sum counts twice, because the next compression takes the rows of B to be orthogonal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fx.certificate import gaussian, missing_energy, nystrom_rows, signs
from lowrank_fx.linalg import symmetric_eigen
from lowrank_fx.moments import UNIT, Moments, block_moments, full_precision, join, panels, reading_rho

_SHARE = 0.2
"""alpha of [DGP]: what shrinking may take in all, as a trace, is at least this share of l times delta."""

_RIDGE = 0.6
"""The share of what is missing that planning spreads over all directions. Measured on the taps of a sentence encoder: 1
would expect as much where the sketch looked as where it did not; .5 to .75 plan about equally well."""

_PLAN_SEED = 1 << 32
"""Added to the dim: the co-sketch's probes have nothing to do with the certificate's."""


class _State(NamedTuple):
    """Moments of all rows, the rows [s, d] that have yet to join B for it, and what rounding that brings."""

    total: Moments
    joining: Tensor
    rounding: float


class Directions:
    """B [l, d], a buffer of rows that have yet to join it, and two co-sketches.

    From l = 64 on these are at most 16 l d bytes; 18 l d where float64 rows came.

    Attributes:
        dim: d, the length of a row.
        size: l, the most rows that B has.
        device: where the state lives.
        total: the moments of the rows that have joined B.
        delta: what shrinking took, plus the size of negative rounding eigenvalues that were clamped.
        rounding: the bound of the rounding in B^T B.
    """

    def __init__(self, dim: int, size: int, device: torch.device) -> None:
        self.dim = dim
        self.size = size
        self.device = device
        self.total = Moments(0, self._zeros(dim), 0.0, 0.0)
        self.delta = 0.0
        self.rounding = 0.0
        self._capacity = -(-size // 2)
        self._matrix = self._zeros(0, dim)
        self._energies = self._zeros(0)
        self._lost = 0.0
        # Together with B (8 l d bytes) and the buffer (2 l d) these are 16 l d bytes: 2 l d numbers of float64. More
        # buffer leaves less to the co-sketch: at l = 64, 3 l / 4 rows gave a planning loss of 1.0104, these 1.0092.
        probes = min(max(8, size // 4), 32)
        columns = min(dim, max(size // 2, 3 * size // 2 - 2 * probes - 8, 1))
        self._probed = self._zeros(dim, probes)
        self._planned = torch.zeros(dim, columns, dtype=torch.float32, device=device)
        self._exponent = 1000
        self._slip = 0.0
        self._buffer = torch.zeros(0, dim, dtype=torch.float32, device=device)
        self._buffered = 0

    @property
    def rows(self) -> int:
        """The number of rows seen."""
        return self.total.rows + self._buffered

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self._matrix, self._buffer, self._energies, self.total.mean, self._probed, self._planned

    def moments(self) -> Moments:
        """The moments of all rows, the buffered ones among them."""
        return self._state().total

    def take_in(self, rows: Tensor) -> None:
        """Buffer rows [n, d] in float32 or float64 on this device; a full buffer joins B."""
        if rows.dtype != self._buffer.dtype and rows.dtype == torch.float64:
            self._buffer = self._buffer.to(torch.float64)
        if self._buffer.shape[0] == 0:
            self._buffer = torch.zeros(self._capacity, self.dim, dtype=self._buffer.dtype, device=self.device)
        while rows.shape[0] > 0:
            if self._buffered == self._capacity:
                state = self._state()
                self._witness(state.joining)
                self._absorb(state)
                self._buffered = 0
            taken = rows[: self._capacity - self._buffered]
            self._buffer[self._buffered : self._buffered + taken.shape[0]] = taken
            self._buffered += taken.shape[0]
            rows = rows[taken.shape[0] :]

    def merge(self, other: Directions) -> None:
        """Take in the rows that another state of the same ``dim`` and ``size`` has seen."""
        theirs = other.total._replace(mean=other.total.mean.to(self.device))
        if theirs.rows > 0:
            total, shift, rounding = join(self.total, theirs)
            joining = torch.cat([other._matrix.to(self.device), shift[None]])
            self._rescale(other._exponent)
            self._planned += other._planned.to(self.device) * 4.0 ** (self._exponent - other._exponent)
            self._probed += other._probed.to(self.device)
            self._witness(shift[None])
            self._absorb(_State(total, joining, rounding))
            self.delta += other.delta
            self._lost += other._lost
            self._slip += other._slip
            self.rounding += other.rounding
        if other._buffered > 0:
            self.take_in(other._buffer[: other._buffered].to(self.device))

    def gram(self, centered: bool = True) -> Tensor:
        """The Gram matrix [d, d] of :meth:`matrix`."""
        matrix = self.matrix(centered)
        return matrix.T @ matrix

    def matrix(self, centered: bool = True) -> Tensor:
        """B, the buffered rows and v as they are, because reading changes nothing: [l', d], l' <= 3 l / 2 + 3."""
        state = self._state()
        parts = [self._matrix, state.joining]
        if not centered:
            parts.append(state.total.mean[None] * math.sqrt(state.total.rows))
        return torch.cat(parts)

    def completed(self, centered: bool = True) -> tuple[Tensor, float]:
        """Rows F [l', d] and a number c such that F^T F + c I estimates the Gram matrix.

        F holds :meth:`matrix` and the part N of what is missing that the co-sketch A^T (A Q) sees (Nystrom's
        approximation); of the trace that is missing then, a share is spread over all directions (in the spirit of
        robust frequent directions, Luo et al. 2019).
        """
        rows = self.matrix(centered)
        if self._lost == 0:
            return rows, 0.0
        missing = self._lost
        # Below 2^-16 of all energy the float32 co-sketch sees its own rounding.
        if missing > 2.0**-16 * self.total.energy:
            probes = self._plan_probes().to(torch.float64)
            image = self._planned.to(torch.float64) * 2.0**-self._exponent * 2.0**-self._exponent
            image -= self._matrix.T @ (self._matrix @ probes)
            found = nystrom_rows(probes, image, missing, 2.0**-22 * self.total.energy)
            missing = max(0.0, missing - float(found.square().sum()))
            rows = torch.cat([rows, found])
        return rows, _RIDGE * missing / self.dim

    def rho(self, centered: bool = True) -> float:
        """The bound of all rounding, as an eigenvalue of the Gram matrix."""
        return self._rho(self._state(), centered)

    def certificate(self, z: Tensor, centered: bool = True, *, certain: bool = False) -> tuple[float, float]:
        """Bounds of |Z A^T|_F^2 for Z [m, d] in float64 on this device; the lower one may be negative.

        delta and rho bound what is missing; its trace, which is known, tightens both sides, and so do the probes,
        except with probability 3e-8 over them (:func:`lowrank_fx.certificate.missing_energy`). ``certain`` leaves the
        probes out.
        """
        state = self._state()
        root = [self._matrix, state.joining]
        if not centered:
            root.append(state.total.mean[None] * math.sqrt(state.total.rows))
        energy = float((z @ torch.cat(root).T).square().sum())
        weight = float(z.square().sum())
        rho = self._rho(state, centered)
        lower, upper = energy - rho * weight, energy + (self.delta + rho) * weight
        if self.delta > 0:
            # What is missing has eigenvalues down to -rho; with rho added to all of them it is positive semidefinite.
            probes = gaussian(self.dim, self._probed.shape[1], self.dim).to(self.device)
            image = self._probed - self._matrix.T @ (self._matrix @ probes) + rho * probes
            norm = float(torch.linalg.vector_norm(probes))
            slip = self._slip + 4 * (self.dim + self.size) * UNIT * self.total.energy * norm
            trace = (self._lost * (1 - 1e-12), self._lost * (1 + 1e-12) + 2 * self.dim * rho)
            least, most, low, high = missing_energy(z, self.delta + 2 * rho, trace, probes, image, slip)
            if not certain:
                least, most = max(least, low), min(most, high)
            # rho once for the shift, and once for the rounding of ``energy``.
            lower = max(lower, energy + least - 2 * rho * weight)
            upper = min(upper, energy + most)
        return lower, upper

    def state_dict(self) -> dict[str, Tensor]:
        """What is this mode's own in the state of a sketch, copied."""
        return {
            "matrix": self._matrix.clone(),
            "energies": self._energies.clone(),
            "buffer": self._buffer[: self._buffered].clone(),
            "lost": torch.tensor([self._lost, self._slip, self._exponent], dtype=torch.float64),
            "probed": self._probed.clone(),
            "planned": self._planned.clone(),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that do not depend on the rows seen, by the name in :meth:`state_dict`."""
        return {"probed": tuple(self._probed.shape), "planned": tuple(self._planned.shape)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave; the tensors become this state's own.

        Raises:
            ValueError: a tensor's shape does not fit the others.
        """
        self._matrix, self._energies = state["matrix"], state["energies"]
        if self._matrix.shape != (self._energies.shape[0], self.dim):
            raise ValueError(
                f"matrix has shape {tuple(self._matrix.shape)} beside {tuple(self._energies.shape)} energies"
            )
        self._probed, self._planned = state["probed"], state["planned"]
        self._lost, self._slip, exponent = state["lost"].tolist()
        self._exponent = int(exponent)
        buffer = state["buffer"]
        self._buffered = buffer.shape[0]
        self._buffer = torch.zeros(self._capacity, self.dim, dtype=buffer.dtype, device=self.device)
        self._buffer[: self._buffered] = buffer

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def _rho(self, state: _State, centered: bool) -> float:
        return reading_rho(self.rounding + state.rounding, state.total, centered)

    def _state(self) -> _State:
        """The moments of all rows, with the buffered ones as the rows that would join B."""
        if self._buffered == 0:
            return _State(self.total, self._zeros(0, self.dim), 0.0)
        count = self._buffered
        joining = torch.empty(count + 1, self.dim, dtype=torch.float64, device=self.device)
        centered = joining[:count]
        centered.copy_(self._buffer[:count])
        mean = centered.mean(0)
        centered -= mean
        energy = float(torch.linalg.vector_norm(centered)) ** 2
        block = block_moments(
            count, mean, energy, math.hypot(math.sqrt(energy / count), float(torch.linalg.vector_norm(mean)))
        )
        total, joining[count], rounding = join(self.total, block)
        return _State(total, joining, rounding + block.mean_error**2 * count + 16 * UNIT * block.energy)

    def _absorb(self, state: _State) -> None:
        """Stack rows on B and shrink the stack to ``size`` rows."""
        kept, joining = self._matrix.shape[0], state.joining
        stacked = kept + joining.shape[0]
        row_gram = self._zeros(stacked, stacked)
        row_gram.diagonal()[:kept] = self._energies
        row_gram[kept:, :kept] = joining @ self._matrix.T
        for start, stop in panels(joining.shape[0]):
            row_gram[kept + start :, kept + start : kept + stop] = joining[start:] @ joining[start:stop].T
        trace = float(row_gram.trace())
        values, vectors = symmetric_eigen(row_gram)
        # One wait for the device: the spectrum decides how many rows remain.
        spectrum = values.tolist()
        shrunk = max(0.0, spectrum[self.size]) if stacked > self.size else 0.0
        dropped = math.fsum(max(0.0, value) for value in spectrum[self.size :])
        due = _SHARE * self.size * (self.delta + shrunk) - self._lost - dropped
        # The weakest directions pay, and only as many as (2) asks for: what the strong ones lose, plans lose.
        paying = min(self.size, max(0, math.ceil(due / shrunk))) if shrunk > 0 else 0
        first = max(0, min(self.size, stacked) - paying)
        energies = values[: self.size].clamp(min=0)
        energies[first:] = (energies[first:] - shrunk).clamp(min=0)
        remaining = int((energies > 0).sum())
        energies = energies[:remaining]
        self._lost += dropped + paying * shrunk
        rotation = (vectors[:, :remaining] * (energies / values[:remaining]).sqrt()).T
        self._matrix = (rotation[:, :kept] @ self._matrix).addmm_(rotation[:, kept:], joining)
        self._energies = energies
        self.delta += shrunk + max(0.0, -spectrum[-1])
        steps = 2 * stacked + 2 * math.sqrt(self.size) * stacked + self.dim + 16
        self.rounding += state.rounding + 2 * steps * UNIT * trace
        self.total = state.total

    def _rescale(self, exponent: int) -> None:
        """Lower the exponent of the co-sketch's scale to ``exponent``, if it is higher."""
        if exponent < self._exponent:
            self._planned *= 4.0 ** max(exponent - self._exponent, -500)
            self._exponent = exponent

    def _witness(self, joining: Tensor) -> None:
        """Add (rows)^T (rows) P of rows that join B to what is kept of the whole Gram matrix."""
        probes = gaussian(self.dim, self._probed.shape[1], self.dim).to(self.device)
        image = joining @ probes
        self._probed.addmm_(joining.T, image)
        lengths = torch.linalg.vector_norm(joining, dim=1)
        energy, peak, rows = *torch.stack([lengths @ lengths, lengths.amax()]).tolist(), joining.shape[0]
        norm = float(torch.linalg.vector_norm(probes))
        self._slip += ((self.dim + rows + 16) * energy + 2 * self.total.energy) * UNIT * norm
        if peak > 0:
            # Rows of length up to 2^20 leave room for sums of squares in float32, and for the squares of small entries.
            self._rescale(20 - math.frexp(peak)[1])
            with full_precision(self.device):
                scaled = (joining * 2.0**self._exponent).to(torch.float32)
                self._planned.addmm_(scaled.T, scaled @ self._plan_probes())

    def _plan_probes(self) -> Tensor:
        return signs(self.dim, self._planned.shape[1], self.dim + _PLAN_SEED).to(self.device)
