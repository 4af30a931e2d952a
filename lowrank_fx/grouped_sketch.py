"""A sketch of rows whose equal parts meet weights of their own: one Frequent Directions sketch per group.

Only what happens within a part matters to a grouped layer. In exact mode g sketches of rows of d numbers keep g d^2
numbers, where one of rows of g d numbers would keep (g d)^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from lowrank_fx.errors import CalibrationError, OptionError, StorageError
from lowrank_fx.moments import checked_rows
from lowrank_fx.sketch import FrequentDirections


class GroupedSketch:
    """One sketch per group, for rows [n, g d] whose j-th part of d numbers belongs to group j.

    All parts see the same rows. What it says of a whole row (``mean``, ``certificate``) puts the groups together; the
    second moments stay with :attr:`parts`, because nothing between two groups is kept.

    Attributes:
        dim: g d, the length of a row.
        groups: g.
        size: the number l of rows of each part's sketch, or None in exact mode.
        device: where the state lives.
        parts: the sketches of the groups.
    """

    def __init__(
        self, dim: int, groups: int, size: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Start an empty sketch.

        Args:
            dim: the length g d of a row, a multiple of ``groups``.
            groups: g, at least 1.
            size: the number l of rows of each part's sketch; None, or d and above, is exact mode.
            device: where the state lives. Default: the CPU.

        Raises:
            OptionError: ``groups`` does not divide ``dim``, or one of the numbers is below 1.
        """
        if groups < 1 or dim % groups:
            raise OptionError(f"GroupedSketch(dim={dim}, groups={groups}) is not legal; groups must divide dim")
        self.dim = dim
        self.groups = groups
        self.parts = tuple(FrequentDirections(dim // groups, size, device) for _ in range(groups))
        self.size = self.parts[0].size
        self.device = self.parts[0].device

    def __repr__(self) -> str:
        """The mode, the dimensions and the number of rows."""
        size = "exact" if self.size is None else f"size={self.size}"
        return f"GroupedSketch(dim={self.dim}, groups={self.groups}, {size}, rows={self.rows})"

    @property
    def exact(self) -> bool:
        """Whether the d x d Gram matrix of every group is kept."""
        return self.size is None

    @property
    def rows(self) -> int:
        """n, the number of rows seen."""
        return self.parts[0].rows

    @property
    def mean(self) -> Tensor:
        """The mean of the rows [g d], float64; zero where there are none."""
        return torch.cat([part.mean for part in self.parts])

    @property
    def squared_norm(self) -> float:
        """The squared Frobenius norm of the centred rows, all groups together."""
        return sum(part.squared_norm for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the buffers."""
        return sum(part.nbytes for part in self.parts)

    def update(self, rows: Tensor) -> None:
        """Take in rows; nothing is changed unless all of them are good.

        Args:
            rows: [n, g d] of any floating dtype on any device; n may be 0.

        Raises:
            CalibrationError: the shape or dtype is wrong, or a value is NaN, infinite, or 2^480 and above.
        """
        rows, magnitudes = checked_rows(rows, self.dim, self.groups, self.device)
        if magnitudes:
            for part, own, magnitude in zip(self.parts, rows.chunk(self.groups, 1), magnitudes, strict=True):
                part.take_in(own, magnitude)

    def merge(self, other: GroupedSketch) -> None:
        """Take in the rows that another sketch has seen; the other one is left as it is.

        Args:
            other: a sketch of the same ``dim``, ``groups`` and ``size``.

        Raises:
            CalibrationError: one of them differs.
        """
        if (self.dim, self.groups, self.size) != (other.dim, other.groups, other.size):
            raise CalibrationError(f"cannot merge {other!r} into {self!r}; dim, groups and size must be the same")
        for part, theirs in zip(self.parts, other.parts, strict=True):
            part.merge(theirs)

    def certificate(self, z: Tensor, centered: bool = True) -> tuple[float, float]:
        """Bounds of the energy that a change Z of the weight makes in a grouped layer's output over the rows.

        The groups' outputs are different numbers, so their energies and bounds add up; see
        :meth:`FrequentDirections.certificate`.

        Args:
            z: Z [m, d], any floating dtype; the j-th of its g blocks of rows is applied to the j-th part of a row.
            centered: for the rows minus their mean; False for the rows as they came.

        Returns:
            The lower and the upper bound, in the squared unit of the layer's output.

        Raises:
            CalibrationError: Z does not have d columns, or g does not divide its rows.
        """
        if z.ndim != 2 or z.shape[0] % self.groups:
            raise CalibrationError(f"a sketch of {self.groups} groups cannot bound Z of shape {tuple(z.shape)}")
        blocks = z.reshape(self.groups, -1, z.shape[1])
        bounds = [part.certificate(block, centered) for part, block in zip(self.parts, blocks, strict=True)]
        return sum(least for least, _ in bounds), sum(most for _, most in bounds)

    def copy(self) -> GroupedSketch:
        """A sketch of the same rows that shares no storage with this one."""
        return GroupedSketch.from_state_dict(self.state_dict(), self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors that share no storage with the sketch; the groups' own under ``<group>.``."""
        state = {
            f"{number}.{name}": tensor
            for number, part in enumerate(self.parts)
            for name, tensor in part.state_dict().items()
        }
        return {"groups": torch.tensor(self.groups)} | state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], device: torch.device | str | None = None) -> GroupedSketch:
        """The sketch that :meth:`state_dict` was taken from.

        Args:
            state: what :meth:`state_dict` returned; copied.
            device: where the sketch lives from now on. Default: the CPU.

        Raises:
            StorageError: a tensor is missing, has a shape that does not fit the others, or the groups do not agree.
        """
        try:
            groups = int(state["groups"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise StorageError(f"this is not the state of a GroupedSketch: {error!r}") from error
        parts = []
        for number in range(groups):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
            parts.append(FrequentDirections.from_state_dict(own, device))
        if len({(part.dim, part.size, part.rows) for part in parts}) != 1:
            raise StorageError(f"the {groups} groups of a GroupedSketch are not of one dim, size and number of rows")
        sketch = cls(parts[0].dim * groups, groups, parts[0].size, device)
        sketch.parts = tuple(parts)
        return sketch


Sketch: TypeAlias = FrequentDirections | GroupedSketch
"""What is kept of a tap's rows. ``parts`` gives one :class:`FrequentDirections` per group of either."""


def make_sketch(dim: int, groups: int = 1, size: int | None = None, device: torch.device | str | None = None) -> Sketch:
    """An empty sketch for rows of ``dim`` numbers in ``groups`` parts.

    Raises:
        OptionError: ``groups`` does not divide ``dim``, or one of the numbers is below 1.
    """
    return FrequentDirections(dim, size, device) if groups == 1 else GroupedSketch(dim, groups, size, device)


def load_sketch(state: Mapping[str, Tensor], device: torch.device | str | None = None) -> Sketch:
    """The sketch, of either kind, that a ``state_dict`` was taken from.

    Raises:
        StorageError: a tensor is missing, or has a shape that does not fit the others.
    """
    kind = GroupedSketch if "groups" in state else FrequentDirections
    return kind.from_state_dict(state, device)


def merge_sketches(into: Sketch, other: Sketch) -> None:
    """Let ``into`` take in the rows of ``other``.

    Raises:
        CalibrationError: they are of different kinds, dims, groups or sizes.
    """
    if len(into.parts) != len(other.parts) or into.dim != other.dim:
        raise CalibrationError(f"cannot merge {other!r} into {into!r}; dim and groups must be the same")
    for part, theirs in zip(into.parts, other.parts, strict=True):
        part.merge(theirs)
