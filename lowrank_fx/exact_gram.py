"""The exact mode of a sketch: the Gram matrix of the centred rows, from float32 products, and how far off it can be.

A block of rows is scaled by a power of two, shifted by its approximate mean, multiplied in float32 (TF32 off; float64
rows in float64) and summed in float64; what the approximate mean left over is then taken out in float64. Few rows wait
for others (at most ``capacity`` of them), because every block passes over the whole matrix.

**Reading** joins the rows that wait without taking them in, so that whoever reads, and whenever, changes no later bit:
what has joined is kept on and above the diagonal, what was read last below it.

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
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fx.certificate import gaussian
from lowrank_fx.linalg import length, psd_root
from lowrank_fx.moments import UNIT, Moments, block_moments, full_precision, join, panels, reading_rho

BLOCK_ROWS = 4096
"""Rows in one float32 product: enough to hide the float64 sum behind it."""

_FEW_ROWS, _MANY_ROWS = 256, 1024
"""The least and the largest number of rows that may wait; d of them in between, half of the Gram matrix's memory."""

_CHUNK_ELEMENTS = 1 << 17
"""Entries converted to float64 at a time on a CPU (1 MiB), so that the passes over them stay in cache."""

_MIRROR = 256
"""The side of the squares in which a matrix is mirrored: two of them (1 MiB) stay in a cache."""

_PROBES = 8
"""Random vectors that measure the rounding."""

_PROBE_FACTOR = 5.9
"""|E|_F <= this * |E P|_F for any E and P of _PROBES Gaussian columns, except with probability 1e-8 over P.

Chernoff's bound for a weighted sum of chi-squares: P(|E P|_F^2 <= e |E|_F^2) <= (e exp(1) / p)^(p / 2), which is
0.9e-8 at p = 8 and e = 1 / 5.9^2.
"""


class _Joined(NamedTuple):
    """What all rows together come to beside the Gram matrix itself."""

    total: Moments
    probed: Tensor
    rounding: float


class _Reading(NamedTuple):
    """What was read last, the rows that wait among it.

    Where rows wait, the matrix that was read lies below the diagonal, and ``diagonal`` is its diagonal.
    """

    joined: _Joined
    diagonal: Tensor | None
    missed: float | None = None


class _Block(NamedTuple):
    """A block of rows that joins: its product is that of ``shifted`` [b, d] over scale^2, plus plus^T minus."""

    shifted: Tensor
    scale: float
    plus: Tensor
    minus: Tensor


class ExactGram:
    """The d x d Gram matrix of the centred rows, in float64.

    Attributes:
        dim: d, the length of a row.
        device: where the state lives.
        capacity: the most rows that wait.
        total: the moments of the rows that have joined.
        delta: 0, because nothing is left out.
        rounding: the bound of what rounding the probes cannot see, for the rows that have joined.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.dim = dim
        self.device = device
        self.capacity = min(max(dim, _FEW_ROWS), _MANY_ROWS)
        self.total = Moments(0, torch.zeros(dim, dtype=torch.float64, device=device), 0.0, 0.0)
        self.delta = 0.0
        self.rounding = 0.0
        self._gram = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        # The same for every sketch of this dim, so that sketches merge.
        self._probes = gaussian(dim, _PROBES, dim).to(device)
        self._probed = torch.zeros_like(self._probes)
        self._buffer = torch.zeros(0, dim, dtype=torch.float32, device=device)
        self._buffered = 0
        self._magnitude = 0.0
        self._last: _Reading | None = None

    @property
    def rows(self) -> int:
        """The number of rows seen."""
        return self.total.rows + self._buffered

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self._gram, self._probed, self._probes, self.total.mean, self._buffer

    def moments(self) -> Moments:
        """The moments of all rows."""
        return self._read().joined.total if self._buffered else self.total

    def take_in(self, rows: Tensor, magnitude: float) -> None:
        """Add the Gram matrix of rows whose largest absolute value is ``magnitude``."""
        self._last = None
        count = rows.shape[0]
        if 2 * count > self.capacity:
            for block in torch.split(rows, BLOCK_ROWS):
                self._join_block(block, magnitude)
            return
        if self._buffered + count > self.capacity or rows.dtype != self._buffer.dtype:
            self._join_waiting()
        if self._buffer.shape[0] == 0 or rows.dtype != self._buffer.dtype:
            self._buffer = torch.zeros(self.capacity, self.dim, dtype=rows.dtype, device=self.device)
        self._buffer[self._buffered : self._buffered + count] = rows
        self._buffered += count
        self._magnitude = max(self._magnitude, magnitude)

    def merge(self, other: ExactGram) -> None:
        """Add the Gram matrix of another state of the same ``dim``."""
        self._last = None
        theirs = other.total._replace(mean=other.total.mean.to(self.device))
        total, shift, rounding = join(self.total, theirs)
        self._gram += other._gram.to(self.device)
        self._gram.addr_(shift, shift)
        self._probed += other._probed.to(self.device)
        self._probed.addr_(shift, shift @ self._probes)
        self.rounding += other.rounding + rounding
        self.rounding += self._probe_rounding((self.dim + 16) * float(shift @ shift) + 2 * total.energy)
        self.total = total
        if other._buffered:
            self.take_in(other._buffer[: other._buffered].to(self.device), other._magnitude)

    def gram(self, centered: bool = True) -> Tensor:
        """The symmetric [d, d] matrix; eigenvalues may be negative by at most :meth:`rho`."""
        reading = self._read()
        if reading.diagonal is None:
            gram = _symmetric(self._gram.T).T
        else:
            gram = _symmetric(self._gram)
            gram.diagonal().copy_(reading.diagonal)
        if not centered:
            total = reading.joined.total
            gram.addr_(total.mean, total.mean, alpha=total.rows)
        return gram

    def matrix(self, centered: bool = True) -> Tensor:
        """A root [l', d], l' <= d + 1, with negative rounding eigenvalues clamped."""
        root = psd_root(self.gram())
        if centered:
            return root
        total = self.moments()
        return torch.cat([root, total.mean[None] * math.sqrt(total.rows)])

    def completed(self, centered: bool = True) -> tuple[Tensor, float]:
        """The root and 0: there is nothing to complete."""
        return self.matrix(centered), 0.0

    def rho(self, centered: bool = True) -> float:
        """The bound of all rounding, as an eigenvalue of the Gram matrix."""
        reading = self._read()
        joined, missed = reading.joined, reading.missed
        if missed is None:
            missed = length(self.gram() @ self._probes - joined.probed)
            self._last = reading._replace(missed=missed)
        energy = joined.total.energy
        rounding = joined.rounding + (_PROBE_FACTOR * missed + self._probe_rounding((self.dim + 2) * energy))
        return reading_rho(rounding, joined.total, centered)

    def certificate(self, z: Tensor, centered: bool = True) -> tuple[float, float]:
        """Bounds of |Z A^T|_F^2 for Z [m, d] in float64 on this device; the lower one may be negative."""
        energy = float(((z @ self.gram(centered)) * z).sum())
        slack = self.rho(centered) * float(z.square().sum())
        return energy - slack, energy + slack

    def state_dict(self) -> dict[str, Tensor]:
        """What is this mode's own in the state of a sketch, copied; the rows that wait are in it as they came."""
        return {
            "gram": _symmetric(self._gram.T).T,
            "probed": self._probed.clone(),
            "buffer": self._buffer[: self._buffered].clone(),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that do not depend on the rows seen, by the name in :meth:`state_dict`."""
        return {"gram": (self.dim, self.dim), "probed": (self.dim, _PROBES)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state_dict` gave; the tensors become this state's own.

        Raises:
            ValueError: the rows that wait are too many, too long or too short, or not float32 or float64.
        """
        buffer = state["buffer"]
        count = buffer.shape[0] if buffer.ndim == 2 else -1
        legal = buffer.shape == (count, self.dim) and buffer.dtype in (torch.float32, torch.float64)
        if not legal or count > self.capacity:
            raise ValueError(f"{buffer.dtype} rows of shape {tuple(buffer.shape)} wait, beside a dim of {self.dim}")
        self._gram, self._probed, self._last = state["gram"], state["probed"], None
        self._buffer = buffer
        if count:
            self._buffer = torch.zeros(self.capacity, self.dim, dtype=buffer.dtype, device=self.device)
            self._buffer[:count] = buffer
        self._buffered = count
        self._magnitude = float(buffer.abs().amax()) if count else 0.0

    # ---- rows that join ------------------------------------------------------------------------------------------

    def _join_waiting(self) -> None:
        if self._buffered:
            self._join_block(self._buffer[: self._buffered], self._magnitude)
            self._buffered, self._magnitude = 0, 0.0

    def _join_block(self, rows: Tensor, magnitude: float) -> None:
        """Add the Gram matrix of a block of rows."""
        joined, block = self._joined(rows, magnitude)
        for start, stop in panels(self.dim):
            self._gram[start:stop, start:].add_(self._panel(block, start, stop))
        self.total, self._probed, self.rounding = joined

    def _read(self) -> _Reading:
        """What all rows come to, those that wait among them."""
        if self._last is None and self._buffered:
            joined, block = self._joined(self._buffer[: self._buffered], self._magnitude)
            diagonal = self._gram.diagonal().clone()
            for start, stop in panels(self.dim):
                own = self._gram[start:stop, start:]
                square = own[:, : stop - start]
                read = self._panel(block, start, stop).add_(own)
                diagonal[start:stop] = read.diagonal()
                self._gram[stop:, start:stop] = read[:, stop - start :].T
                square.copy_(square.triu() + read[:, : stop - start].triu(1).T)
            self._last = _Reading(joined, diagonal)
        elif self._last is None:
            self._last = _Reading(_Joined(self.total, self._probed, self.rounding), None)
        return self._last

    def _panel(self, block: _Block, start: int, stop: int) -> Tensor:
        """What a block adds to the rows from ``start`` to ``stop``, from the diagonal on."""
        # Few rows times many columns: on a CPU an eighth faster than the transpose of it, and the sum is in one piece.
        with full_precision(self.device):
            product = block.shifted[:, start:stop].T @ block.shifted[:, start:]
        panel = product.to(torch.float64)
        return panel.addmm_(block.plus[:, start:stop].T, block.minus[:, start:], beta=block.scale**-2)

    def _joined(self, rows: Tensor, magnitude: float) -> tuple[_Joined, _Block]:
        """What all rows come to with a block of rows more, and what that adds to the Gram matrix."""
        count = rows.shape[0]
        # Entries near 2^24 leave room for the sum of 4096 squares above, and for the squares of small entries below.
        # The scale itself has to be a normal number of the dtype.
        exponent = min(126 if rows.dtype == torch.float32 else 504, 24 - math.frexp(magnitude)[1])
        scale = 2.0**exponent
        with full_precision(self.device):
            origin = torch.mv(rows.T, torch.full((count,), scale / count, dtype=rows.dtype, device=self.device))
        shifted = torch.add(-origin, rows, alpha=scale)
        origin = origin.to(torch.float64)
        # A column of ones among the probes sums the rows: what the approximate mean has left over.
        probes = torch.cat([self._probes, torch.zeros_like(self._probes[:, :1])], 1)
        # Transposed: the product then runs along the memory of the rows, which is twice as fast.
        sums = torch.zeros_like(probes.T, memory_format=torch.contiguous_format)
        energy = torch.zeros_like(sums[0, 0])
        chunk_rows = max(1, _CHUNK_ELEMENTS // self.dim) if self.device.type == "cpu" else count
        memory = origin.new_empty(min(chunk_rows, count), self.dim)
        for chunk in torch.split(rows, chunk_rows):
            exact = torch.add(-origin, chunk, alpha=scale, out=memory[: chunk.shape[0]])
            image = exact @ probes
            image[:, _PROBES] = 1.0
            sums.addmm_(image.T, exact)
            energy += torch.dot(exact.flatten(), exact.flatten())
        probed, remainder = sums[:_PROBES].T, sums[_PROBES] / count
        # The block's own Gram is about `origin`; its mean is `remainder` further.
        off = remainder * (math.sqrt(count) / scale)
        about_origin = float(energy) / scale / scale
        centered = max(0.0, about_origin - float(off @ off))
        block = block_moments(count, (origin + remainder) / scale, centered, math.sqrt(about_origin / count))
        total, shift, rounding = join(self.total, block)
        whole = torch.add(self._probed, probed, alpha=scale**-2)
        whole.addr_(shift, shift @ self._probes).addr_(off, off @ self._probes, alpha=-1)
        slip = math.sqrt(count) * block.mean_error
        steps = (self.dim + count + 16) * (2 * about_origin + float(shift @ shift)) + 2 * total.energy
        rounding += self.rounding + (2 * math.sqrt(about_origin) + slip) * slip + self._probe_rounding(steps)
        return _Joined(total, whole, rounding), _Block(
            shifted, scale, torch.stack([shift, off]), torch.stack([shift, -off])
        )

    def _probe_rounding(self, energy: float) -> float:
        return _PROBE_FACTOR * float(torch.linalg.vector_norm(self._probes)) * UNIT * energy


def _symmetric(matrix: Tensor) -> Tensor:
    """A copy of a matrix in which what is above the diagonal is made equal to what is below."""
    made = matrix.clone()
    places = range(0, made.shape[0], _MIRROR)
    for row in places:
        rows = slice(row, row + _MIRROR)
        block = made[rows, rows]
        block.copy_(block.tril() + block.tril(-1).T)
        for column in places[: row // _MIRROR]:
            columns = slice(column, column + _MIRROR)
            made[columns, rows] = made[rows, columns].T
    return made
