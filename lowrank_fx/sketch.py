"""What is kept of a tap's rows: their second moment, exact or by Frequent Directions, and a certificate of the loss.

Two rooms do the work: ``exact_gram.py`` and ``directions.py``. ``moments.py`` counts what both of them count.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_fx.directions import Directions
from lowrank_fx.errors import CalibrationError, OptionError, StorageError
from lowrank_fx.exact_gram import ExactGram
from lowrank_fx.moments import Moments, checked_rows


class FrequentDirections:
    """The centred second moment of a stream of rows: exact (d x d) or a Frequent Directions sketch (l x d).

    For the rows x_1..x_n it keeps n, their mean and either the Gram matrix of the rows minus their mean (*exact mode*:
    ``size`` is None or at least ``dim``) or a matrix B of at most ``size`` rows, a buffer and two co-sketches, at most
    16 l d bytes in all from l = 64 on (*FD mode*; 22 l d where float64 rows came). Few rows at a time wait in exact
    mode, at most ``min(max(d, 256), 1024)`` of them, and join as one block; reading never changes when.
    Write A for the n x d matrix of centred rows and H for what :meth:`gram` returns. Then::

        -rho I <= A^T A - H <= (delta + rho) I                                                             (1)
        |A^T A - H|_2 <= |A - A_k|_F^2 / (l / 5 - k) + rho    for every k < l / 5                            (2)

    delta is what shrinking took; 0 in exact mode.
    Why (2) holds, and what else is known of what was lost, is said in ``directions.py``. rho bounds the rounding, and
    is derived where it arises: in float32 products (``exact_gram.py``), in compressions (``shrinking.py``), in means
    and in the evaluation of |Z H Z^T| (``moments.py``). Centring is exact, by an extra row whenever a block or another
    sketch joins (``moments.py``).

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
        self._kept: ExactGram | Directions
        if self.size is None:
            self._kept = ExactGram(dim, self.device)
        else:
            self._kept = Directions(dim, self.size, self.device)

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
        return self._kept.rows

    @property
    def mean(self) -> Tensor:
        """The mean of the rows [d], float64; zero where there are none."""
        return self._kept.moments().mean.clone()

    @property
    def squared_norm(self) -> float:
        """|A|_F^2, the squared Frobenius norm of the centred rows, to float64 accuracy in both modes."""
        return self._kept.moments().energy

    @property
    def delta(self) -> float:
        """The sum of what shrinking took, as an eigenvalue of the Gram matrix; see (1). Zero in exact mode."""
        return self._kept.delta

    @property
    def rho(self) -> float:
        """The bound of all rounding, as an eigenvalue of the centred Gram matrix; see (1)."""
        return self._kept.rho()

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the buffer."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.tensors)

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
        if isinstance(self._kept, Directions):
            self._kept.take_in(rows)
        else:
            self._kept.take_in(rows, magnitude)

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
        if isinstance(self._kept, Directions):
            assert isinstance(other._kept, Directions)
            self._kept.merge(other._kept)
        else:
            assert isinstance(other._kept, ExactGram)
            self._kept.merge(other._kept)

    def gram(self, centered: bool = True) -> Tensor:
        """H, the Gram matrix of the rows up to (1).

        Args:
            centered: of the rows minus their mean; False adds n mean mean^T.

        Returns:
            [d, d], float64, symmetric. In exact mode its eigenvalues may be negative by at most ``rho``.
        """
        return self._kept.gram(centered)

    def matrix(self, centered: bool = True) -> Tensor:
        """A matrix whose Gram matrix is :meth:`gram`.

        Args:
            centered: for the rows minus their mean; False appends the row sqrt(n) mean.

        Returns:
            [l', d], float64. In FD mode l' <= 7 l / 4 + 3: B, the buffered rows and v as they are, because reading a
            sketch never changes it. In exact mode l' <= d + 1, with negative rounding eigenvalues clamped.
        """
        return self._kept.matrix(centered)

    def completed(self, centered: bool = True) -> tuple[Tensor, float]:
        """What plans are made from: rows F and a number c such that F^T F + c I estimates the Gram matrix.

        F holds :meth:`matrix` and, in FD mode, the part N of what is missing that the co-sketch A^T (A Q) of fixed
        random signs Q sees (Nystrom's approximation); of the trace that is missing then, a share is spread over all
        directions (in the spirit of robust frequent directions, Luo et al. 2019). An estimate, certified by nothing:
        :meth:`certificate` uses other probes, and so holds for what is planned from it.

        Args:
            centered: for the rows minus their mean; False for the rows as they came.

        Returns:
            F [l', d], float64, l' <= 11 l / 4 + 3 in FD mode; c, 0 in exact mode.
        """
        return self._kept.completed(centered)

    def certificate(self, z: Tensor, centered: bool = True, *, certain: bool = False) -> tuple[float, float]:
        """Bounds of |Z A^T|_F^2, the energy that a change Z of the weight makes in a layer's output over the rows.

        By (1), |Z M^T|_F^2 - rho |Z|_F^2 <= |Z A^T|_F^2 <= |Z M^T|_F^2 + (delta + rho) |Z|_F^2 for M^T M = H. In FD
        mode the trace of what is missing, which is known, tightens both sides, and so do the probes, except with
        probability 8e-8 over them (:func:`lowrank_fx.certificate.missing_energy`).

        Args:
            z: Z [m, d], any floating dtype; chosen without knowledge of the probes, as everything in this package is.
            centered: for the rows minus their mean; False for the rows as they came.
            certain: leave out what the probes of FD mode say of Z, so that the bounds hold whatever Z. rho stays
                measured by them.

        Returns:
            The lower and the upper bound, in the squared unit of the layer's output; the lower one is at least 0.

        Raises:
            CalibrationError: Z does not have ``dim`` columns.
        """
        if z.ndim != 2 or z.shape[1] != self.dim:
            raise CalibrationError(f"a sketch of dim {self.dim} cannot bound Z of shape {tuple(z.shape)}")
        z = z.detach().to(self.device, torch.float64)
        if isinstance(self._kept, Directions):
            lower, upper = self._kept.certificate(z, centered, certain=certain)
        else:
            lower, upper = self._kept.certificate(z, centered)
        return max(0.0, lower), max(0.0, upper)

    def copy(self) -> FrequentDirections:
        """A sketch of the same rows that shares no storage with this one."""
        return FrequentDirections.from_state_dict(self.state_dict(), self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors that share no storage with the sketch.

        A sketch made by :meth:`from_state_dict` goes on exactly as this one would have, bit by bit.
        """
        count, mean, mean_error, energy = self._kept.total
        scalars = [self._kept.delta, self._kept.rounding, mean_error, energy]
        return {
            "geometry": torch.tensor([self.dim, self.size or 0, count]),
            "scalars": torch.tensor(scalars, dtype=torch.float64),
            "mean": mean.clone(),
        } | self._kept.state_dict()

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
            kept = sketch._kept
            kept.delta, kept.rounding, mean_error, energy = state["scalars"].tolist()
            parts = {name: part.to(sketch.device, copy=True) for name, part in state.items()}
            kept.total = Moments(count, parts["mean"], mean_error, energy)
            legal = {"mean": (dim,)} | kept.shapes()
            for name, shape in legal.items():
                if parts[name].shape != shape:
                    raise StorageError(
                        f"{name} of a sketch of dim {dim} has shape {tuple(parts[name].shape)}, not {shape}"
                    )
            kept.load(parts)
        except (KeyError, ValueError, RuntimeError, OptionError) as error:
            raise StorageError(f"this is not the state of a FrequentDirections sketch: {error!r}") from error
        return sketch
