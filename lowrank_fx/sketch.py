"""Frequent Directions: what is kept of a tap's rows, with a certificate of how much was lost.

Source of the method: Ghashami, Liberty, Phillips, Woodruff 2016, "Frequent Directions: Simple and Deterministic Matrix
Sketching", SIAM J. Comput. 45(5), called [FD] below.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_fx.errors import CalibrationError, OptionError, StorageError
from lowrank_fx.linalg import psd_root, symmetric_eigen

_UNIT = 2.0**-53
"""Unit roundoff of float64."""

_LARGEST = 2.0**480
"""From here on, sums of squares could leave the range of float64."""

_BLOCK_ROWS = 4096
"""Rows in one float32 product of exact mode: enough to hide the float64 sum behind it."""

_CHUNK_ELEMENTS = 1 << 16
"""Entries converted to float64 at a time on a CPU (512 KiB), so that the passes over them stay in cache."""

_PANELS = 6
"""Panels in which the lower triangle of a Gram matrix is computed: 7/12 of the work of the whole square."""

_PROBES = 8
"""Random vectors that measure the rounding of exact mode."""

_PROBE_FACTOR = 5.9
"""|E|_F <= this * |E P|_F for any E and P of _PROBES Gaussian columns, except with probability 1e-8 over P.

Chernoff's bound for a weighted sum of chi-squares: P(|E P|_F^2 <= e |E|_F^2) <= (e exp(1) / p)^(p / 2), which is
0.9e-8 at p = 8 and e = 1 / 5.9^2.
"""


class _Moments(NamedTuple):
    """Rows joined into one: their number, mean [d], bound of the mean's error in length, centred squared norm."""

    rows: int
    mean: Tensor
    mean_error: float
    energy: float


class _State(NamedTuple):
    """Moments of all rows, the rows [s, d] that have yet to join B for it, and what rounding that brings."""

    total: _Moments
    joining: Tensor
    rounding: float


def _moments(count: int, mean: Tensor, energy: float, spread: float) -> _Moments:
    """Moments of a block whose mean was summed in float64 from rows of root mean square length ``spread``."""
    error = (count + 16) * _UNIT * spread + 4 * _UNIT * float(torch.linalg.vector_norm(mean))
    return _Moments(count, mean, error, energy)


def _join(a: _Moments, b: _Moments) -> tuple[_Moments, Tensor, float]:
    """Joint moments, the extra row v of the joint centred Gram matrix, and the rounding in it."""
    if a.rows == 0 or b.rows == 0:
        return (b if a.rows == 0 else a), torch.zeros_like(a.mean), 0.0
    count = a.rows + b.rows
    weight = math.sqrt(a.rows * b.rows / count)
    shift = (a.mean - b.mean) * weight
    lengths = torch.linalg.vector_norm(torch.stack([shift, a.mean, b.mean]), dim=1)
    length, *means = lengths.tolist()
    slip = weight * (a.mean_error + b.mean_error) + 4 * _UNIT * length
    mean = a.mean + (b.mean - a.mean) * (b.rows / count)
    mean_error = (a.rows * a.mean_error + b.rows * b.mean_error) / count + 4 * _UNIT * sum(means)
    return _Moments(count, mean, mean_error, a.energy + b.energy + length**2), shift, (2 * length + slip) * slip


def _panels(side: int) -> Iterator[tuple[int, int]]:
    """Where each panel starts and stops; below 128 columns a product is no longer efficient."""
    width = max(128, -(-side // _PANELS))
    return ((start, min(start + width, side)) for start in range(0, side, width))


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
    low, high = torch.stack([rows.amin(0).view(groups, -1).amin(1), rows.amax(0).view(groups, -1).amax(1)]).tolist()
    magnitudes = [max(-least, most) for least, most in zip(low, high, strict=True)]
    if not any(math.isnan(least) for least in low) and max(magnitudes) < _LARGEST:
        return rows, magnitudes
    bad = torch.nonzero(~(rows.abs() < _LARGEST))
    row, column = bad[0].tolist()
    raise CalibrationError(
        f"row {row} of {rows.shape[0]} holds {float(rows[row, column])} in column {column}; a sketch takes finite "
        f"values below 2^480. Look at what the model computes for this batch, or leave the batch out"
    )


def _probes(dim: int) -> Tensor:
    """The Gaussian probes [d, _PROBES] in float64: the same for every sketch of this dim, so that sketches merge."""
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(dim, _PROBES, generator=generator, dtype=torch.float64, device="cpu")


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever the process allows elsewhere (TF32, bfloat16)."""
    backend = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = before


class FrequentDirections:
    """The centred second moment of a stream of rows: exact (d x d) or a Frequent Directions sketch (l x d).

    For the rows x_1..x_n it keeps n, their mean and either the Gram matrix of the rows minus their mean (*exact mode*:
    ``size`` is None or at least ``dim``) or a matrix B of at most ``size`` rows and a buffer of as many (*FD mode*).
    Write A for the n x d matrix of centred rows and H for what :meth:`gram` returns. Then::

        -rho I <= A^T A - H <= (delta + rho) I                                                             (1)
        |A^T A - H|_2 <= |A - A_k|_F^2 / (l - k) + rho    for every k < l      ([FD], Theorem 1.1)         (2)

    **Centring** is exact: two parts of n_a and n_b rows with means m_a and m_b have the joint centred Gram
    A_a^T A_a + A_b^T A_b + v v^T with v = sqrt(n_a n_b / (n_a + n_b)) (m_a - m_b) (Chan, Golub, LeVeque 1983), so v is
    one more row of the sketch whenever a block or another sketch joins.

    **FD mode.** When a row finds the buffer full, S = [B; the buffered rows minus their mean; v] has s <= 2 l + 1 rows.
    With S S^T = V diag(lambda) V^T, lambda descending, the new B is D V_l^T S, D_i^2 = 1 - lambda_{l+1} / lambda_i, and
    delta grows by lambda_{l+1}. |B|_F^2 falls by at least (l + 1) lambda_{l+1} each time, which gives (2). The buffer
    holds the rows as they came (float32, or float64 where such rows came); all else is float64.

    **Exact mode.** A block of rows is scaled by a power of two, shifted by its approximate mean, multiplied in float32
    (TF32 off; float64 rows in float64) and summed in float64; what the approximate mean left over is then taken out in
    float64.

    **delta** is what shrinking took, plus the size of negative rounding eigenvalues that were clamped; 0 in exact mode.

    **rho** bounds the rounding. With u = 2^-53 and t the trace of S S^T, or of the block's Gram:

    - A compression of s rows: the row Gram d u t (inner products of length d; Higham 2002, eq. 3.5), centring 16 u t,
      the eigen decomposition s u t for its backward error and s u t for V's orthonormality (LAPACK Users' Guide,
      section 4.7, with p(s) = s), and the product D V_l^T S, 2 sqrt(l) s u t. The sum counts twice, because the next
      compression takes the rows of B to be orthogonal.
    - A block of b rows in exact mode: the worst case of its float32 product, b 2^-24 t, is thousands of times what
      happens and would hide the tail of any spectrum, so the error is measured. For fixed Gaussian probes P [d, 8] the
      Gram of the rows times P is summed in float64 beside the float32 products; the error E of the Gram then has
      |E|_2 <= |E|_F <= 5.9 |E P|_F, except with probability 1e-8 over P, which is drawn without knowledge of the data.
      This covers centring, scaling, underflow and products. What the float64 probes can be off by is added:
      (d + b + 16) u t |P|_F per block and 2 u |A|_F^2 |P|_F per join.
    - Means: a block's mean is off by e <= (b + 16) u times the root mean square of its rows, which moves v by
      e' = e sqrt(n_a n_b / n) and the Gram by 2 |v| e' + e'^2. e is carried from join to join.
    - Evaluating |Z H Z^T| in float64: (6 d + 4100) u |A|_F^2 (2 d for the products, 2 s <= 4 d + 4, sums).

    Values are to be below 2^480 in magnitude; what is below 2^-480 may count as zero.

    Attributes:
        dim: d, the length of a row.
        size: l, the number of rows of B, or None in exact mode.
        device: where the state lives and the work is done.
    """

    def __init__(self, dim: int, size: int | None = None, device: torch.device | str | None = None) -> None:
        """Start an empty sketch.

        Args:
            dim: the length d of a row, at least 1.
            size: the number l of rows of the sketch, at least 1; None, or ``dim`` and above, is exact mode.
            device: where the state lives; rows are moved there. Default: the CPU.

        Raises:
            OptionError: ``dim`` or ``size`` is below 1.
        """
        if dim < 1:
            raise OptionError(f"FrequentDirections(dim={dim}) is not legal; a row needs at least one entry")
        if size is not None and size < 1:
            raise OptionError(f"FrequentDirections(size={size}) is not legal; use at least 1, or None for exact mode")
        self.dim = dim
        self.size = size if size is not None and size < dim else None
        self.device = torch.device("cpu" if device is None else device)
        self._total = _Moments(0, self._zeros(dim), 0.0, 0.0)
        self._delta = 0.0
        self._rounding = 0.0
        if self.size is None:
            self._gram = self._zeros(dim, dim)  # Only the blocks on and below the diagonal are kept true.
            self._probes = _probes(dim).to(self.device)
            self._probed = torch.zeros_like(self._probes)
        else:
            self._matrix = self._zeros(0, dim)
            self._energies = self._zeros(0)
            self._buffer = torch.zeros(0, dim, dtype=torch.float32, device=self.device)
            self._buffered = 0

    def __repr__(self) -> str:
        """The mode, the dimensions and the number of rows."""
        size = "exact" if self.size is None else f"size={self.size}"
        return f"FrequentDirections(dim={self.dim}, {size}, rows={self.rows})"

    @property
    def exact(self) -> bool:
        """Whether the d x d Gram matrix itself is kept."""
        return self.size is None

    @property
    def rows(self) -> int:
        """n, the number of rows seen."""
        return self._total.rows if self.size is None else self._total.rows + self._buffered

    @property
    def mean(self) -> Tensor:
        """The mean of the rows [d], float64; zero where there are none."""
        return self._state().total.mean.clone()

    @property
    def squared_norm(self) -> float:
        """|A|_F^2, the squared Frobenius norm of the centred rows, to float64 accuracy in both modes."""
        return self._state().total.energy

    @property
    def delta(self) -> float:
        """The sum of what shrinking took, as an eigenvalue of the Gram matrix; see (1). Zero in exact mode."""
        return self._delta

    @property
    def rho(self) -> float:
        """The bound of all rounding, as an eigenvalue of the centred Gram matrix; see (1) and the list above."""
        return self._rho(self._state(), centered=True)

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the buffer."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())

    @property
    def parts(self) -> tuple[FrequentDirections, ...]:
        """The sketches of a row's independent parts: here one, of the whole row."""
        return (self,)

    def update(self, rows: Tensor) -> None:
        """Take in rows.

        One host synchronisation per call checks that the values are finite, before anything is changed.

        Args:
            rows: [n, d] of any floating dtype on any device; n may be 0.

        Raises:
            CalibrationError: the shape or dtype is wrong, or a value is NaN, infinite, or 2^480 and above.
        """
        rows, magnitudes = checked_rows(rows, self.dim, 1, self.device)
        if magnitudes:
            self.take_in(rows, magnitudes[0])

    def take_in(self, rows: Tensor, magnitude: float) -> None:
        """Take in rows that :func:`checked_rows` has checked.

        Args:
            rows: [n, d], float32 or float64, on the sketch's device; n at least 1.
            magnitude: their largest absolute value.
        """
        if self.size is None:
            for block in torch.split(rows, _BLOCK_ROWS):
                self._join_block(block, magnitude)
            return
        if rows.dtype != self._buffer.dtype and rows.dtype == torch.float64:
            self._buffer = self._buffer.to(torch.float64)
        if self._buffer.shape[0] == 0:
            self._buffer = torch.zeros(self.size, self.dim, dtype=self._buffer.dtype, device=self.device)
        while rows.shape[0] > 0:
            if self._buffered == self.size:
                self._absorb(self._state())
                self._buffered = 0
            taken = rows[: self.size - self._buffered]
            self._buffer[self._buffered : self._buffered + taken.shape[0]] = taken
            self._buffered += taken.shape[0]
            rows = rows[taken.shape[0] :]

    def merge(self, other: FrequentDirections) -> None:
        """Take in the rows that another sketch has seen; the other one is left as it is.

        In exact mode the result is that of one sketch of all rows up to rounding; in FD mode (1) and (2) hold for any
        tree of merges, but the result is not the one of a single run.

        Args:
            other: a sketch of the same ``dim`` and ``size``.

        Raises:
            CalibrationError: ``dim`` or ``size`` differ.
        """
        if self.dim != other.dim or self.size != other.size:
            raise CalibrationError(f"cannot merge {other!r} into {self!r}; dim and size must be the same")
        if other is self:
            other = self.copy()
        theirs = other._total._replace(mean=other._total.mean.to(self.device))
        if self.size is None:
            total, shift, rounding = _join(self._total, theirs)
            self._gram += other._gram.to(self.device)
            self._gram.addr_(shift, shift)
            self._probed += other._probed.to(self.device)
            self._probed.addr_(shift, shift @ self._probes)
            self._rounding += other._rounding + rounding
            self._rounding += self._probe_rounding((self.dim + 16) * float(shift @ shift) + 2 * total.energy)
            self._total = total
            return
        if theirs.rows > 0:
            total, shift, rounding = _join(self._total, theirs)
            joining = torch.cat([other._matrix.to(self.device), shift[None]])
            self._absorb(_State(total, joining, rounding))
            self._delta += other._delta
            self._rounding += other._rounding
        self.update(other._buffer[: other._buffered])

    def gram(self, centered: bool = True) -> Tensor:
        """H, the Gram matrix of the rows up to (1).

        Args:
            centered: of the rows minus their mean; False adds n mean mean^T.

        Returns:
            [d, d], float64, symmetric. In exact mode its eigenvalues may be negative by at most ``rho``.
        """
        if self.size is not None:
            matrix = self.matrix(centered)
            return matrix.T @ matrix
        gram = self._gram.tril()
        gram += self._gram.tril(-1).T
        if not centered:
            gram.addr_(self._total.mean, self._total.mean, alpha=self._total.rows)
        return gram

    def matrix(self, centered: bool = True) -> Tensor:
        """A matrix whose Gram matrix is :meth:`gram`.

        Args:
            centered: for the rows minus their mean; False appends the row sqrt(n) mean.

        Returns:
            [l', d], float64. In FD mode l' <= 2 l + 2: B, the buffered rows and v as they are, because reading a sketch
            never changes it. In exact mode l' <= d + 1, with negative rounding eigenvalues clamped.
        """
        state = self._state()
        parts = [psd_root(self.gram())] if self.size is None else [self._matrix, state.joining]
        if not centered:
            parts.append(state.total.mean[None] * math.sqrt(state.total.rows))
        return torch.cat(parts)

    def certificate(self, z: Tensor, centered: bool = True) -> tuple[float, float]:
        """Bounds of |Z A^T|_F^2, the energy that a change Z of the weight makes in a layer's output over the rows.

        By (1), |Z M^T|_F^2 - rho |Z|_F^2 <= |Z A^T|_F^2 <= |Z M^T|_F^2 + (delta + rho) |Z|_F^2 for M^T M = H.

        Args:
            z: Z [m, d], any floating dtype.
            centered: for the rows minus their mean; False for the rows as they came.

        Returns:
            The lower and the upper bound, in the squared unit of the layer's output; the lower one is at least 0.

        Raises:
            CalibrationError: Z does not have ``dim`` columns.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise CalibrationError(f"a sketch of dim {self.dim} cannot bound Z of shape {tuple(z.shape)}")
        z = z.detach().to(self.device, torch.float64)
        state = self._state()
        if self.size is None:
            energy = float(((z @ self.gram(centered)) * z).sum())
        else:
            energy = float((z @ self.matrix(centered).T).square().sum())
        weight = float(z.square().sum())
        rho = self._rho(state, centered)
        return max(0.0, energy - rho * weight), max(0.0, energy + (self._delta + rho) * weight)

    def copy(self) -> FrequentDirections:
        """A sketch of the same rows that shares no storage with this one."""
        return FrequentDirections.from_state_dict(self.state_dict(), self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors that share no storage with the sketch.

        A sketch made by :meth:`from_state_dict` goes on exactly as this one would have, bit by bit.
        """
        count, mean, mean_error, energy = self._total
        state = {
            "geometry": torch.tensor([self.dim, self.size or 0, count]),
            "scalars": torch.tensor([self._delta, self._rounding, mean_error, energy], dtype=torch.float64),
            "mean": mean.clone(),
        }
        if self.size is None:
            return state | {"gram": self._gram.clone(), "probed": self._probed.clone()}
        return state | {
            "matrix": self._matrix.clone(),
            "energies": self._energies.clone(),
            "buffer": self._buffer[: self._buffered].clone(),
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], device: torch.device | str | None = None
    ) -> FrequentDirections:
        """The sketch that :meth:`state_dict` was taken from.

        Args:
            state: what :meth:`state_dict` returned; copied.
            device: where the sketch lives from now on. Default: the CPU.

        Raises:
            StorageError: a tensor is missing, or has a shape that does not fit the others.
        """
        try:
            dim, size, count = (int(number) for number in state["geometry"].tolist())
            sketch = cls(dim, size or None, device)
            sketch._delta, sketch._rounding, mean_error, energy = state["scalars"].tolist()
            parts = {name: part.to(sketch.device, copy=True) for name, part in state.items()}
            sketch._total = _Moments(count, parts["mean"], mean_error, energy)
            if sketch.size is None:
                sketch._gram, sketch._probed = parts["gram"], parts["probed"]
            else:
                sketch._matrix, sketch._energies = parts["matrix"], parts["energies"]
                sketch._buffered = parts["buffer"].shape[0]
                sketch._buffer = torch.zeros(sketch.size, dim, dtype=parts["buffer"].dtype, device=sketch.device)
                sketch._buffer[: sketch._buffered] = parts["buffer"]
        except (KeyError, ValueError, RuntimeError, OptionError) as error:
            raise StorageError(f"this is not the state of a FrequentDirections sketch: {error!r}") from error
        kept = sketch._energies.shape[0] if sketch.size is not None else 0
        legal = {"mean": (dim,), "gram": (dim, dim), "probed": (dim, _PROBES), "matrix": (kept, dim)}
        for name in legal.keys() & parts.keys():
            if parts[name].shape != legal[name]:
                raise StorageError(
                    f"{name} of a sketch of dim {dim} has shape {tuple(parts[name].shape)}, not {legal[name]}"
                )
        return sketch

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def _tensors(self) -> tuple[Tensor, ...]:
        if self.size is None:
            return self._gram, self._probed, self._probes, self._total.mean
        return self._matrix, self._buffer, self._energies, self._total.mean

    def _probe_rounding(self, energy: float) -> float:
        return _PROBE_FACTOR * float(torch.linalg.vector_norm(self._probes)) * _UNIT * energy

    def _rho(self, state: _State, centered: bool) -> float:
        total = state.total
        energy, rounding = total.energy, self._rounding + state.rounding
        if self.size is None:
            missed = torch.linalg.vector_norm(self.gram() @ self._probes - self._probed)
            rounding += _PROBE_FACTOR * float(missed) + self._probe_rounding((self.dim + 2) * energy)
        if not centered:
            length = float(torch.linalg.vector_norm(total.mean))
            energy += total.rows * length**2
            rounding += total.rows * (2 * length + total.mean_error) * total.mean_error
        return rounding + (6 * self.dim + 4100) * _UNIT * energy

    def _state(self) -> _State:
        """The moments of all rows, with the buffered ones as the rows that would join B."""
        if self.size is None or self._buffered == 0:
            return _State(self._total, self._zeros(0, self.dim), 0.0)
        count = self._buffered
        joining = self._zeros(count + 1, self.dim)
        centered = joining[:count]
        centered.copy_(self._buffer[:count])
        mean = centered.mean(0)
        centered -= mean
        energy = float(torch.linalg.vector_norm(centered)) ** 2
        block = _moments(
            count, mean, energy, math.hypot(math.sqrt(energy / count), float(torch.linalg.vector_norm(mean)))
        )
        total, joining[count], rounding = _join(self._total, block)
        return _State(total, joining, rounding + block.mean_error**2 * count + 16 * _UNIT * block.energy)

    def _absorb(self, state: _State) -> None:
        """Stack rows on B and shrink the stack to ``size`` rows."""
        assert self.size is not None
        kept, joining = self._matrix.shape[0], state.joining
        stacked = kept + joining.shape[0]
        row_gram = self._zeros(stacked, stacked)
        row_gram[:kept, :kept] = torch.diag(self._energies)
        row_gram[kept:, :kept] = joining @ self._matrix.T
        for start, stop in _panels(joining.shape[0]):
            row_gram[kept + start :, kept + start : kept + stop] = joining[start:] @ joining[start:stop].T
        trace = float(row_gram.trace())
        values, vectors = symmetric_eigen(row_gram)
        # One wait for the device: the spectrum decides how many rows remain.
        spectrum = values.tolist()
        shrunk = max(0.0, spectrum[self.size]) if stacked > self.size else 0.0
        remaining = sum(value > shrunk for value in spectrum[: self.size])
        energies = values[:remaining] - shrunk
        rotation = (vectors[:, :remaining] * (energies / values[:remaining]).sqrt()).T
        self._matrix = torch.addmm(rotation[:, :kept] @ self._matrix, rotation[:, kept:], joining)
        self._energies = energies
        self._delta += shrunk + max(0.0, -spectrum[-1])
        steps = 2 * stacked + 2 * math.sqrt(self.size) * stacked + self.dim + 16
        self._rounding += state.rounding + 2 * steps * _UNIT * trace
        self._total = state.total

    def _join_block(self, rows: Tensor, magnitude: float) -> None:
        """Exact mode: add the Gram matrix of a block of rows."""
        count = rows.shape[0]
        # Entries near 2^24 leave room for the sum of 4096 squares above, and for the squares of small entries below.
        # The scale itself has to be a normal number of the dtype.
        exponent = min(126 if rows.dtype == torch.float32 else 504, 24 - math.frexp(magnitude)[1])
        scale = 2.0**exponent
        with _full_precision(self.device):
            origin = torch.mv(rows.T, torch.full((count,), scale / count, dtype=rows.dtype, device=self.device))
            shifted = torch.add(-origin, rows, alpha=scale)
            for start, stop in _panels(self.dim):
                panel = shifted[:, start:].T @ shifted[:, start:stop]
                self._gram[start:, start:stop].add_(panel, alpha=scale**-2)
        del shifted
        origin = origin.to(torch.float64)
        # A column of ones among the probes sums the rows: what the approximate mean has left over.
        probes = torch.cat([self._probes, self._zeros(self.dim, 1)], 1)
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
        block = _moments(count, (origin + remainder) / scale, centered, math.sqrt(about_origin / count))
        total, shift, rounding = _join(self._total, block)
        self._gram.addr_(shift, shift).addr_(off, off, alpha=-1)
        self._probed.add_(probed[:, :_PROBES], alpha=scale**-2)
        self._probed.addr_(shift, shift @ self._probes).addr_(off, off @ self._probes, alpha=-1)
        slip = math.sqrt(count) * block.mean_error
        self._rounding += rounding + (2 * math.sqrt(about_origin) + slip) * slip
        steps = (self.dim + count + 16) * (2 * about_origin + float(shift @ shift)) + 2 * total.energy
        self._rounding += self._probe_rounding(steps)
        self._total = total
