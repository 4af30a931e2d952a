"""The exact mode of a sketch: the Gram matrix of the centred rows, from float32 products, and how far off it can be.

A block of rows is scaled by a power of two, shifted by its approximate mean, multiplied in float32 (TF32 off; float64
rows in float64) and summed in float64; what the approximate mean left over is then taken out in float64.

**Rounding**, with u = 2^-53. For a block of b rows with the Gram's trace t the worst case of the float32 product,
b 2^-24 t, is thousands of times what happens and would hide the tail of any spectrum, so the error is measured. For
fixed Gaussian probes P [d, 8] the Gram of the rows times P is summed in float64 beside the float32 products; the error
E of the Gram then has |E|_2 <= |E|_F <= 5.9 |E P|_F, except with probability 1e-8 over P, which is drawn without
knowledge of the data. This covers centring, scaling, underflow and products. What the float64 probes can be off by is
added: (d + b + 16) u t |P|_F per block and 2 u |A|_F^2 |P|_F per join.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_fx.certificate import gaussian
from lowrank_fx.linalg import psd_root
from lowrank_fx.moments import UNIT, Moments, block_moments, full_precision, join, panels, reading_rho

_BLOCK_ROWS = 4096
"""Rows in one float32 product: enough to hide the float64 sum behind it."""

_CHUNK_ELEMENTS = 1 << 16
"""Entries converted to float64 at a time on a CPU (512 KiB), so that the passes over them stay in cache."""

_MIRROR = 256
"""The side of the squares in which a matrix is mirrored: two of them (1 MiB) stay in a cache."""

_PROBES = 8
"""Random vectors that measure the rounding."""

_PROBE_FACTOR = 5.9
"""|E|_F <= this * |E P|_F for any E and P of _PROBES Gaussian columns, except with probability 1e-8 over P.

Chernoff's bound for a weighted sum of chi-squares: P(|E P|_F^2 <= e |E|_F^2) <= (e exp(1) / p)^(p / 2), which is
0.9e-8 at p = 8 and e = 1 / 5.9^2.
"""


class ExactGram:
    """The d x d Gram matrix of the centred rows, in float64.

    Attributes:
        dim: d, the length of a row.
        device: where the state lives.
        total: the moments of all rows.
        delta: 0, because nothing is left out.
        rounding: the bound of what rounding the probes cannot see.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.dim = dim
        self.device = device
        self.total = Moments(0, torch.zeros(dim, dtype=torch.float64, device=device), 0.0, 0.0)
        self.delta = 0.0
        self.rounding = 0.0
        # Between blocks of rows only what is on and below the diagonal is kept true.
        self._gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._whole = True
        # The same for every sketch of this dim, so that sketches merge.
        self._probes = gaussian(dim, _PROBES, dim).to(device)
        self._probed = torch.zeros_like(self._probes)

    @property
    def rows(self) -> int:
        """The number of rows seen."""
        return self.total.rows

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self._gram, self._probed, self._probes, self.total.mean

    def moments(self) -> Moments:
        """The moments of all rows."""
        return self.total

    def take_in(self, rows: Tensor, magnitude: float) -> None:
        """Add the Gram matrix of rows whose largest absolute value is ``magnitude``."""
        self._whole = False
        for block in torch.split(rows, _BLOCK_ROWS):
            self._join_block(block, magnitude)

    def merge(self, other: ExactGram) -> None:
        """Add the Gram matrix of another state of the same ``dim``."""
        theirs = other.total._replace(mean=other.total.mean.to(self.device))
        total, shift, rounding = join(self.total, theirs)
        self._whole = False
        self._gram += other._gram.to(self.device)
        self._gram.addr_(shift, shift)
        self._probed += other._probed.to(self.device)
        self._probed.addr_(shift, shift @ self._probes)
        self.rounding += other.rounding + rounding
        self.rounding += self._probe_rounding((self.dim + 16) * float(shift @ shift) + 2 * total.energy)
        self.total = total

    def gram(self, centered: bool = True) -> Tensor:
        """The symmetric [d, d] matrix; eigenvalues may be negative by at most :meth:`rho`."""
        gram = self._mirrored().clone()
        if not centered:
            gram.addr_(self.total.mean, self.total.mean, alpha=self.total.rows)
        return gram

    def matrix(self, centered: bool = True) -> Tensor:
        """A root [l', d], l' <= d + 1, with negative rounding eigenvalues clamped."""
        root = psd_root(self.gram())
        if centered:
            return root
        return torch.cat([root, self.total.mean[None] * math.sqrt(self.total.rows)])

    def completed(self, centered: bool = True) -> tuple[Tensor, float]:
        """The root and 0: there is nothing to complete."""
        return self.matrix(centered), 0.0

    def rho(self, centered: bool = True) -> float:
        """The bound of all rounding, as an eigenvalue of the Gram matrix."""
        missed = torch.linalg.vector_norm(self.gram() @ self._probes - self._probed)
        rounding = self.rounding + (
            _PROBE_FACTOR * float(missed) + self._probe_rounding((self.dim + 2) * self.total.energy)
        )
        return reading_rho(rounding, self.total, centered)

    def certificate(self, z: Tensor, centered: bool = True) -> tuple[float, float]:
        """Bounds of |Z A^T|_F^2 for Z [m, d] in float64 on this device; the lower one may be negative."""
        energy = float(((z @ self.gram(centered)) * z).sum())
        slack = self.rho(centered) * float(z.square().sum())
        return energy - slack, energy + slack

    def state_dict(self) -> dict[str, Tensor]:
        """What is this mode's own in the state of a sketch, copied."""
        return {"gram": self._mirrored().clone(), "probed": self._probed.clone()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that do not depend on the rows seen, by the name in :meth:`state_dict`."""
        return {"gram": (self.dim, self.dim), "probed": (self.dim, _PROBES)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave; the tensors become this state's own."""
        self._gram, self._probed, self._whole = state["gram"], state["probed"], False

    def _mirrored(self) -> Tensor:
        """The matrix itself, what is above the diagonal made equal to what is below."""
        if not self._whole:
            places = range(0, self.dim, _MIRROR)
            for row in places:
                rows = slice(row, row + _MIRROR)
                block = self._gram[rows, rows]
                block.copy_(block.tril() + block.tril(-1).T)
                for column in places[: row // _MIRROR]:
                    columns = slice(column, column + _MIRROR)
                    self._gram[columns, rows] = self._gram[rows, columns].T
            self._whole = True
        return self._gram

    def _probe_rounding(self, energy: float) -> float:
        return _PROBE_FACTOR * float(torch.linalg.vector_norm(self._probes)) * UNIT * energy

    def _join_block(self, rows: Tensor, magnitude: float) -> None:
        """Add the Gram matrix of a block of rows."""
        count = rows.shape[0]
        # Entries near 2^24 leave room for the sum of 4096 squares above, and for the squares of small entries below.
        # The scale itself has to be a normal number of the dtype.
        exponent = min(126 if rows.dtype == torch.float32 else 504, 24 - math.frexp(magnitude)[1])
        scale = 2.0**exponent
        with full_precision(self.device):
            origin = torch.mv(rows.T, torch.full((count,), scale / count, dtype=rows.dtype, device=self.device))
            shifted = torch.add(-origin, rows, alpha=scale)
            for start, stop in panels(self.dim):
                panel = shifted[:, start:].T @ shifted[:, start:stop]
                self._gram[start:, start:stop].add_(panel, alpha=scale**-2)
        del shifted
        origin = origin.to(torch.float64)
        # A column of ones among the probes sums the rows: what the approximate mean has left over.
        probes = torch.cat([self._probes, torch.zeros_like(self._probes[:, :1])], 1)
        probed = torch.zeros_like(probes)
        energy = torch.zeros_like(probed[0, 0])
        chunk_rows = max(1, _CHUNK_ELEMENTS // self.dim) if self.device.type == "cpu" else count
        for chunk in torch.split(rows, chunk_rows):
            exact = torch.add(-origin, chunk.to(torch.float64), alpha=scale)
            image = exact @ probes
            image[:, _PROBES] = 1.0
            probed.addmm_(exact.T, image)
            energy += torch.dot(exact.flatten(), exact.flatten())
        remainder = probed[:, _PROBES] / count
        # The block's own Gram is about `origin`; its mean is `remainder` further.
        off = remainder * (math.sqrt(count) / scale)
        about_origin = float(energy) / scale / scale
        centered = max(0.0, about_origin - float(off @ off))
        block = block_moments(count, (origin + remainder) / scale, centered, math.sqrt(about_origin / count))
        total, shift, rounding = join(self.total, block)
        self._gram.addr_(shift, shift).addr_(off, off, alpha=-1)
        self._probed.add_(probed[:, :_PROBES], alpha=scale**-2)
        self._probed.addr_(shift, shift @ self._probes).addr_(off, off @ self._probes, alpha=-1)
        slip = math.sqrt(count) * block.mean_error
        self.rounding += rounding + (2 * math.sqrt(about_origin) + slip) * slip
        steps = (self.dim + count + 16) * (2 * about_origin + float(shift @ shift)) + 2 * total.energy
        self.rounding += self._probe_rounding(steps)
        self.total = total
