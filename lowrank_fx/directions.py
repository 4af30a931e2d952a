"""Frequent Directions: the mode of a sketch that keeps fewer rows than columns, and knows how much it lost.

[FD] is Ghashami, Liberty, Phillips, Woodruff 2016, "Frequent Directions: Simple and Deterministic Matrix Sketching",
SIAM J. Comput. 45(5); [DGP] is Desai, Ghashami, Phillips 2016, "Improved Practical Matrix Sketching with Guarantees",
IEEE TKDE 28(7).

**Shrinking.** When a row finds the buffer of 3 l / 4 rows full, S = [B; the buffered rows minus their mean; v] has
s <= 7 l / 4 + 2 rows, and ``shrinking.py`` makes the new B of them: of the l strongest directions of S the last h pay
lambda_{l+1}, the others stay as they are, and delta grows by lambda_{l+1}. h is the least number for which T, the trace
of all that was dropped and shrunk, stays at or above (l / 5) delta. Shrinking no more than that plans better than
shrinking all of them as [FD] does, and gives, for A the centred rows, ::

    |A^T A - B^T B|_2 <= |A - A_k|_F^2 / (l / 5 - k) + rho    for every k < l / 5      ([DGP], alpha = .2)

because for the first k right singular vectors v_i of A, T = sum_i (|A v_i|^2 - |B v_i|^2) <= |A - A_k|_F^2 + k delta,
up to the rounding of T. The sums delta and T of merged sketches keep it. B and the buffer are float32, or float64 once
such rows came; B is scaled by a power of two, so that its rows have squares in float32.

**What was lost**, A^T A - B^T B, is known by its trace and by products with fixed random columns, summed beside the
stream: A^T (A P) in float64 for Gaussian P, which certifies, and A^T (A Q) in float32 for Q of sparse random signs,
scaled like B, which plans. P and Q are independent of each other and drawn again whenever they are needed.

**Rounding**, with u = 2^-53. A^T A = B^T B + M + E for the sum M of what compressions took and the rounding E of all
float32 products, of B, of the rows and of eigenvectors. |E|_2 <= f |E P|_F, except with probability 1e-8
(:func:`lowrank_fx.certificate.norm_factor`); E P is known because A^T A P, M P and B^T B P are float64 products. What
compressions may have taken beyond delta, the *excess*, is measured in each (``shrinking.py``). Centring costs 16 u t
for the trace t of the rows that join.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fx.certificate import gaussian, missing_energy, norm_factor, nystrom_rows, rounding_energy
from lowrank_fx.linalg import length
from lowrank_fx.moments import UNIT, Moments, block_moments, full_precision, join, reading_rho
from lowrank_fx.shrinking import SHARE, adjoint, image, shrink
from lowrank_fx.sparse_signs import SparseSigns, sparse_signs

_RIDGE = 0.6
"""The share of what is missing that planning spreads over all directions. Measured on the taps of a sentence encoder: 1
would expect as much where the sketch looked as where it did not; .5 to .75 plan about equally well."""

_PLAN_SEED = 1 << 31
"""Added to the dim: the co-sketch's probes have nothing to do with the certificate's. Generators take 32 bits of it."""

_EXPONENT = 500
"""Of the scale before any rows: those of 2^-480 scale to 2^20, and what is smaller counts as zero."""


class _State(NamedTuple):
    """Moments of all rows, the rows [s, d] that have yet to join B for it, and what rounding that brings."""

    total: Moments
    joining: Tensor
    rounding: float


class Directions:
    """B [l, d], a buffer of rows that have yet to join it, and two co-sketches.

    From l = 64 on these are at most 16 l d bytes; 22 l d where float64 rows came.

    Attributes:
        dim: d, the length of a row.
        size: l, the most rows that B has.
        device: where the state lives.
        total: the moments of the rows that have joined B.
        delta: what shrinking took.
        rounding: the bound of what centring rounded.
    """

    def __init__(self, dim: int, size: int, device: torch.device) -> None:
        self.dim = dim
        self.size = size
        self.device = device
        self.total = Moments(0, self._zeros(dim), 0.0, 0.0)
        self.delta = 0.0
        self.rounding = 0.0
        self._capacity = -(-3 * size // 4)
        self._matrix = torch.zeros(0, dim, dtype=torch.float32, device=device)
        self._energies = self._zeros(0)
        self._lost, self._excess, self._slip = 0.0, 0.0, 0.0
        # In bytes from l = 64 on: B 4 l d, the buffer 3 l d, the probes and the co-sketch at most 8 l d.
        probes = min(max(8, size // 4), 32)
        columns = min(dim, size, max(size // 2, 3 * size // 2 - 2 * probes - 8, 1))
        self._probed, self._missed = self._zeros(dim, probes), self._zeros(dim, probes)
        self._planned = torch.zeros(dim, columns, dtype=torch.float32, device=device)
        self._exponent = _EXPONENT
        self._buffer = torch.zeros(0, dim, dtype=torch.float32, device=device)
        self._buffered = 0

    @property
    def rows(self) -> int:
        """The number of rows seen."""
        return self.total.rows + self._buffered

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return (
            *(self._matrix, self._buffer, self._energies, self.total.mean),
            *(self._probed, self._missed, self._planned),
        )

    def moments(self) -> Moments:
        """The moments of all rows, the buffered ones among them."""
        return self._state().total

    def take_in(self, rows: Tensor) -> None:
        """Buffer rows [n, d] in float32 or float64 on this device; a full buffer joins B."""
        if rows.dtype == torch.float64:
            self._matrix, self._buffer = self._matrix.to(torch.float64), self._buffer.to(torch.float64)
        if self._buffer.shape[0] == 0:
            self._buffer = torch.zeros(self._capacity, self.dim, dtype=self._buffer.dtype, device=self.device)
        while rows.shape[0] > 0:
            if self._buffered == self._capacity:
                self._absorb(self._state())
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
            joining = torch.cat([other._kept().to(self.device), shift[None]])
            if other._matrix.dtype == torch.float64:
                self._matrix = self._matrix.to(torch.float64)
            self._rescale(other._exponent)
            self._planned += other._planned.to(self.device) * 4.0 ** (self._exponent - other._exponent)
            self._probed += other._probed.to(self.device)
            self._missed += other._missed.to(self.device)
            self._absorb(_State(total, joining, rounding), seen=shift[None])
            self.delta += other.delta
            self._lost += other._lost
            self._excess += other._excess
            self._slip += other._slip
            self.rounding += other.rounding
        if other._buffered > 0:
            self.take_in(other._buffer[: other._buffered].to(self.device))

    def gram(self, centered: bool = True) -> Tensor:
        """The Gram matrix [d, d] of :meth:`matrix`."""
        matrix = self.matrix(centered)
        return matrix.T @ matrix

    def matrix(self, centered: bool = True) -> Tensor:
        """B, the buffered rows and v as they are, because reading changes nothing: [l', d], l' <= 7 l / 4 + 3."""
        state = self._state()
        parts = [self._kept(), state.joining]
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
            probes = self._plan_probes().dense().to(self.device)
            seen = self._planned.to(torch.float64) * 2.0**-self._exponent * 2.0**-self._exponent
            kept = self._kept()
            seen -= kept.T @ (kept @ probes)
            found = nystrom_rows(probes, seen, missing, 2.0**-22 * self.total.energy)
            missing = max(0.0, missing - float(found.square().sum()))
            rows = torch.cat([rows, found])
        return rows, _RIDGE * missing / self.dim

    def rho(self, centered: bool = True) -> float:
        """The bound of all rounding, as an eigenvalue of the Gram matrix; may fail with probability 2e-8."""
        state = self._state()
        inexact, slip = self._inexact()
        measured = norm_factor(inexact.shape[1]) * (length(inexact) + slip)
        return reading_rho(self.rounding + state.rounding + self._excess + measured, state.total, centered)

    def certificate(self, z: Tensor, centered: bool = True, *, certain: bool = False) -> tuple[float, float]:
        """Bounds of |Z A^T|_F^2 for Z [m, d] in float64 on this device; the lower one may be negative.

        It is |Z B^T|_F^2 + <M, Z^T Z> + <E, Z^T Z>. M >= 0 is at most delta and the excess, and its trace is known;
        that, the bound of E and the probes limit both (:func:`lowrank_fx.certificate.missing_energy`,
        :func:`lowrank_fx.certificate.rounding_energy`), except with probability 8e-8 over the probes. ``certain``
        leaves out what the probes say of this Z; they still measure E and the excess.
        """
        state = self._state()
        root = [self._kept(), state.joining]
        if not centered:
            root.append(state.total.mean[None] * math.sqrt(state.total.rows))
        energy = float((z @ torch.cat(root).T).square().sum())
        weight = float(z.square().sum())
        reading = reading_rho(self.rounding + state.rounding, state.total, centered) * weight
        probes = self._probes()
        inexact, slip = self._inexact()
        widest = norm_factor(probes.shape[1]) * (length(inexact) + slip)
        # |trace of E| <= sqrt(d) |E|_F; the squared norms are off by less than 4 (d + l) u of all energy.
        lost = self.total.energy - float(torch.linalg.vector_norm(root[0])) ** 2
        unsure = math.sqrt(self.dim) * widest + 4 * (self.dim + self.size) * UNIT * self.total.energy
        trace = (max(0.0, lost - unsure), max(0.0, lost + unsure))
        least, most, low, high = missing_energy(z, self.delta + self._excess, trace, probes, self._missed, self._slip)
        if certain:
            return energy + least - widest * weight - reading, energy + most + widest * weight + reading
        under, over = rounding_energy(z, probes, inexact, slip)
        lower = energy + max(least, low) + max(under, -widest * weight) - reading
        return lower, energy + min(most, high) + min(over, widest * weight) + reading

    def state_dict(self) -> dict[str, Tensor]:
        """What is this mode's own in the state of a sketch, copied."""
        return {
            "matrix": self._matrix.clone(),
            "energies": self._energies.clone(),
            "buffer": self._buffer[: self._buffered].clone(),
            "lost": torch.tensor([self._lost, self._excess, self._slip, self._exponent], dtype=torch.float64),
            "probed": self._probed.clone(),
            "missed": self._missed.clone(),
            "planned": self._planned.clone(),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that do not depend on the rows seen, by the name in :meth:`state_dict`."""
        products = {"probed": self._probed, "missed": self._missed, "planned": self._planned}
        return {name: tuple(product.shape) for name, product in products.items()}

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
        self._probed, self._missed, self._planned = state["probed"], state["missed"], state["planned"]
        self._lost, self._excess, self._slip, exponent = state["lost"].tolist()
        self._exponent = int(exponent)
        buffer = state["buffer"]
        self._buffered = buffer.shape[0]
        self._buffer = torch.zeros(self._capacity, self.dim, dtype=buffer.dtype, device=self.device)
        self._buffer[: self._buffered] = buffer

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def _inexact(self) -> tuple[Tensor, float]:
        """E P [d, p], float64, and what that may be off by in Frobenius norm."""
        probes = self._probes()
        slip = 2 * self._slip + 4 * (self.dim + self.size) * UNIT * self.total.energy * length(probes)
        return self._probed - self._missed - self._kept_times(probes), slip

    def _kept_times(self, probes: Tensor) -> Tensor:
        """B^T (B P) [d, p], float64."""
        product = adjoint(self._matrix, image(self._matrix, probes))
        return product * 2.0**-self._exponent * 2.0**-self._exponent

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

    def _absorb(self, state: _State, seen: Tensor | None = None) -> None:
        """Stack rows on B and shrink the stack to ``size`` rows.

        Args:
            state: what B is to stand for then.
            seen: those of the rows that are new to the products with P and Q; default: all.
        """
        scaled = self._witness(state.joining if seen is None else seen)
        if seen is not None:
            scaled = self._scaled(state.joining)
        owed = SHARE * self.size * self.delta - self._lost
        done = shrink(self._matrix, self._energies, scaled, self.size, self._squared(owed), self._probes())
        self._matrix, self._energies = done.matrix, done.energies
        self.delta += self._unsquared(done.delta)
        self._lost += self._unsquared(done.trace)
        self._missed += done.missed * 2.0**-self._exponent * 2.0**-self._exponent
        self._excess += self._unsquared(done.excess)
        self._slip += self._unsquared(done.slip)
        self.rounding += state.rounding
        self.total = state.total

    def _scaled(self, rows: Tensor) -> Tensor:
        """Rows [n, d] in the scale and dtype of B."""
        scaled = torch.empty_like(rows, dtype=self._matrix.dtype)
        return torch.mul(rows, 2.0**self._exponent, out=scaled)

    def _squared(self, value: float) -> float:
        """A squared length in the scale of B."""
        return math.ldexp(value, 2 * self._exponent)

    def _unsquared(self, value: float) -> float:
        """A squared length in the scale of B, back in the rows' own."""
        return math.ldexp(value, -2 * self._exponent)

    def _kept(self) -> Tensor:
        """B in the rows' own scale [l', d], float64."""
        return self._matrix.to(torch.float64) * 2.0**-self._exponent

    def _rescale(self, exponent: int) -> None:
        """Lower the exponent of the scale of B and of the co-sketch to ``exponent``, if it is higher."""
        if exponent < self._exponent:
            step = max(exponent - self._exponent, -500)
            self._matrix *= 2.0**step
            self._energies *= 4.0**step
            self._planned *= 4.0**step
            self._exponent = exponent

    def _witness(self, rows: Tensor) -> Tensor:
        """Add A^T (A P) and A^T (A Q) of rows A [n, d] to what is kept of the whole Gram matrix.

        Returns:
            A in the scale and dtype of B, which has room for it now.
        """
        probes = self._probes()
        self._probed.addmm_(rows.T, rows @ probes)
        lengths = torch.linalg.vector_norm(rows, dim=1)
        energy, peak = torch.stack([lengths @ lengths, lengths.amax()]).tolist()
        self._slip += ((self.dim + rows.shape[0] + 16) * energy + 2 * self.total.energy) * UNIT * length(probes)
        if peak > 0:
            # Rows of length up to 2^20 leave room for sums of squares in float32, and for the squares of small entries.
            self._rescale(20 - math.frexp(peak)[1])
        scaled = self._scaled(rows)
        single = scaled.to(torch.float32)
        with full_precision(self.device):
            self._planned.addmm_(single.T, self._plan_probes().times(single))
        return scaled

    def _probes(self) -> Tensor:
        return gaussian(self.dim, self._probed.shape[1], self.dim).to(self.device)

    def _plan_probes(self) -> SparseSigns:
        return sparse_signs(self.dim, self._planned.shape[1], self.dim + _PLAN_SEED)
