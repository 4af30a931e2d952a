"""What a form is: a way to factor a site, with its error curve, its factors and its cost."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_fx import cost
from lowrank_fx.gauge import LARGEST, Gauge, regauge
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.moments import full_precision
from lowrank_fx.sites import Site
from lowrank_fx.sketch import FrequentDirections

DENSE = "dense"

ACTIVATION, GRADIENT, SHARED = "activation", "gradient", "shared"
"""What chooses the directions that a form keeps: the outputs, their gradients besides, or several layers together."""

PRIOR_ROWS = 1.0
"""Rows of white noise, of the data's mean energy, that every exact sketch is taken to have seen as well.

Next to thousands of rows they are nothing. Where there are fewer rows than dimensions they order the directions that no
row has shown, by the weight itself, and keep their error above zero.
"""


@dataclass(frozen=True)
class ErrorCurve:
    """A site's output error for every rank of one form.

    Attributes:
        ranks: the ranks on offer, ascending, all below break-even.
        tail: ``tail[k]`` is the squared output error at rank k on the sketched rows, k = 0 ... q, of all groups. Where
            a form improves its factors by alternation, :meth:`Form.factor` reaches less.
        energy: the squared norm of the layer's output on the sketched rows (about its mean where a bias takes that up).
        basis: what :meth:`Form.factor` starts from, by falling worth: for ``lowrank`` and ``channel`` the output
            directions ``[out_features, largest]``, for the others a first factor of each group's largest rank.
        beyond: the ranks from break-even on, ascending, that are on offer to a re-gauged pair alone.
        made: factors that were expensive to find, by rank.
        work: what :meth:`Form.start` keeps from one rank to the next; :meth:`rest` lets go of it.
    """

    ranks: tuple[int, ...]
    tail: tuple[float, ...] = field(repr=False)
    energy: float
    basis: Tensor = field(repr=False)
    beyond: tuple[int, ...] = field(default=(), repr=False)
    made: dict[int, Factors] = field(default_factory=dict, repr=False, compare=False)
    work: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def largest(self) -> int:
        """The largest rank on offer to any pair."""
        return (*self.ranks, *self.beyond)[-1]

    def rest(self) -> None:
        """Let go of what was kept for the next rank."""
        self.work.clear()

    def error(self, rank: int) -> float:
        """Relative output error at ``rank``: the square root of tail over energy, 0 for a layer with no output."""
        return relative(self.tail[min(rank, len(self.tail) - 1)], self.energy)


@dataclass(frozen=True)
class Factors:
    """What replaces one weight.

    Attributes:
        factor_in: applied first; ``[rank, in]``, for a convolution ``[groups * rank, channels of a group, *kernel]``,
            for ``"bmm"`` ``[groups, in, rank]``.
        factor_out: applied last; ``[out, rank]``, for a convolution ``[out, rank, *kernel]``, for ``"bmm"``
            ``[groups, rank, out of a group]``.
        shift: ``[out]``, float64; what is added to the bias, or None where the site has none to take it.
        groups: how many of them stand side by side.
        stacked: one matrix per group along the first dimension, in before out, as ``"bmm"`` takes them.
        factor_mid: of a form with three factors, applied between the two: ``[groups * rank, rank of factor_in,
            *kernel]``.
        gauge: the pivots of a pair that is re-gauged, whose ``factor_in`` is ``[rank, in - rank]``; None for any other.
        first: the fully qualified name of the parameter that holds ``factor_in``, where that is another layer's; None
            where the site has one of its own.

    The kernels of a convolution's factors never both span a dimension; ``geometry.py`` says which of them strides.
    """

    factor_in: Tensor
    factor_out: Tensor
    shift: Tensor | None
    groups: int = 1
    stacked: bool = False
    factor_mid: Tensor | None = None
    gauge: Gauge | None = None
    first: str | None = None

    @property
    def rank(self) -> int:
        """The rank, per group: what ``factor_out`` is applied to."""
        return self.factor_out.shape[1]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The factors by the names that they are registered under, in the order of their application."""
        mid = {} if self.factor_mid is None else {"factor_mid": self.factor_mid}
        return {"factor_in": self.factor_in, **mid, "factor_out": self.factor_out}

    def names(self, site: Site) -> dict[str, str]:
        """Where a graph holds each of :attr:`tensors` for a site: fully qualified names of parameters."""
        own = {leaf: site.attribute(leaf) for leaf in self.tensors}
        return own if self.first is None else own | {"factor_in": self.first}

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A pair as matrices, one below the other for several groups: ``[groups * rank, in]``, ``[out, rank]``."""
        if self.stacked:
            return self.factor_in.mT.flatten(0, 1), self.factor_out.mT.flatten(0, 1)
        if self.gauge is not None:
            return self.gauge.spread(self.factor_in), self.factor_out
        return self.factor_in.flatten(1), self.factor_out.flatten(1)

    def dense_matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The product of the factors as stored: ``[out, in]``, multiplied in ``dtype``."""
        if self.stacked or self.factor_in.dim() == 2:
            first, second = (matrix.to(dtype).chunk(self.groups) for matrix in self.matrices())
            made = [out @ into for out, into in zip(second, first, strict=True)]
            return made[0] if len(made) == 1 else torch.cat(made)
        kernels = [tensor.to(dtype) for tensor in self.tensors.values()]
        return composed(kernels, self.groups).flatten(1)

    def stand_in(self) -> Tensor:
        """:meth:`dense_matrix` in the factors' dtype, for a weight while a plan is searched.

        Factors in float32 are multiplied in float32, which rounds no more than the factored layer does itself.
        """
        dtype = self.factor_in.dtype
        if dtype != torch.float32:
            return self.dense_matrix().to(dtype)
        with full_precision(self.factor_in.device):
            return self.dense_matrix(dtype)

    def regauged(self) -> Factors:
        """The pair with ``rank^2`` numbers less that computes the same, in the same dtype; see ``gauge.py``.

        Of a :meth:`Form.regauges` site only.
        """
        made = regauge(self.factor_in, self.factor_out, LARGEST[self.factor_in.dtype])
        columns, second = (each.to(self.factor_in.dtype).contiguous() for each in (made.columns, made.second))
        return replace(self, factor_in=columns, factor_out=second, gauge=made.gauge)

    def scaled(self, scale: Tensor, shift: Tensor | None) -> Factors:
        """The pair with every output multiplied by its entry of ``scale``, float64 ``[out]``, and another shift."""
        shape = (self.groups, 1, -1) if self.stacked else (-1, *[1] * (self.factor_out.dim() - 1))
        factor_out = (self.factor_out.double() * scale.view(shape)).to(self.factor_out.dtype)
        return replace(self, factor_out=factor_out, shift=shift)


class Form(ABC):
    """One way to factor a site; stateless.

    Attributes:
        name: what plans call it.
        kinds: of sites that it can stand for.
        needs: what these are, in words.
    """

    name: str
    kinds: tuple[str, ...]
    needs: str

    def applies(self, site: Site) -> bool:
        """Whether this form can stand for ``site``."""
        return site.kind in self.kinds

    def regauges(self, site: Site) -> bool:
        """Whether the pairs of a site can be re-gauged."""
        return False

    @abstractmethod
    def ranks(self, site: Site) -> tuple[int, ...]:
        """The ranks on offer: below break-even, in the steps the dtype likes."""

    @abstractmethod
    def params(self, site: Site, rank: int) -> int:
        """Weights of the factors of ``rank``."""

    @abstractmethod
    def flops(self, site: Site, rank: int, rows: int, space: Sequence[int] = ()) -> int:
        """FLOPs of the factors of ``rank`` over ``rows`` rows of one of the site's taps.

        Args:
            site: the site.
            rank: the rank.
            rows: how many rows meet the site: for a convolution, positions of its output.
            space: for a convolution, the size in space of the input that has these rows. A factor in front of the
                stride works on more positions than the output has.
        """

    @abstractmethod
    def curve(self, site: Site, weight: Tensor, sketch: Sketch) -> ErrorCurve:
        """The error of every rank on offer.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            sketch: of the rows that meet it; a sketch of l directions supports ranks up to l / 2.
        """

    @abstractmethod
    def factor(self, site: Site, weight: Tensor, curve: ErrorCurve, rank: int, sketch: Sketch) -> Factors:
        """The factors of ``rank``, in the weight's dtype and on its device.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            curve: from :meth:`curve`.
            rank: one of ``curve.ranks``.
            sketch: the one that :meth:`curve` took.
        """

    def start(self, site: Site, weight: Tensor, curve: ErrorCurve, rank: int, sketch: Sketch) -> Factors:
        """Factors of ``rank`` whose error is what the curve says; :meth:`factor` may do better, and take longer.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            curve: from :meth:`curve`.
            rank: one of ``curve.ranks``.
            sketch: the one that :meth:`curve` took.
        """
        return self.factor(site, weight, curve, rank, sketch)

    @abstractmethod
    def blank(self, site: Site, weight: Tensor, rank: int) -> Factors:
        """Factors of ``rank`` that hold zeros, in the dtype and on the device of ``weight``."""


def dense_params(site: Site) -> int:
    """Weights that a site has for itself while dense: none where something else needs the same weight anyway."""
    return 0 if site.tied else cost.dense_params(site.out_features, site.in_features)


def dense_flops(site: Site, rows: int) -> int:
    """FLOPs of a dense site over ``rows`` rows of its taps."""
    return cost.dense_flops(site.out_features, site.in_features, rows)


def apply_blocks(matrix: Tensor, row: Tensor, groups: int) -> Tensor:
    """A matrix of ``groups`` blocks of rows applied to one row, each block to its own part: ``[m]``.

    Args:
        matrix: ``[m, d]``.
        row: ``[groups * d]``, of the same dtype.
        groups: how many blocks there are.
    """
    parts = zip(matrix.chunk(groups), row.chunk(groups), strict=True)
    return torch.cat([block @ own for block, own in parts])


def composed(kernels: Sequence[Tensor], groups: int) -> Tensor:
    """The kernel of convolutions applied one after another, no dimension of space being spanned by two of them.

    Args:
        kernels: ``[groups * r_1, channels of a group, *k_1]``, ``[groups * r_2, r_1, *k_2]``, ... of one dtype, in the
            order of their application.
        groups: of each convolution.

    Returns:
        ``[out, channels of a group, *kernel]``.
    """
    made = kernels[0]
    dims = made.dim() - 2
    for kernel in kernels[1:]:
        spans = kernel.shape[2:], made.shape[2:]
        after = kernel.movedim(1, -1).reshape(groups, -1, kernel.shape[1])
        product = (after @ made.reshape(groups, kernel.shape[1], -1)).reshape(
            kernel.shape[0], *spans[0], made.shape[1], *spans[1]
        )
        both = [place for axis in range(dims) for place in (1 + axis, 2 + dims + axis)]
        sizes = [one * other for one, other in zip(*spans, strict=True)]
        made = product.permute(0, 1 + dims, *both).reshape(kernel.shape[0], made.shape[1], *sizes)
    return made


def rank_step(dtype: str) -> int:
    """The steps of the ranks that are on offer for a dtype, given as ``str(tensor.dtype)``; see ``cost.fast_ranks``."""
    return 16 if dtype in ("torch.bfloat16", "torch.float16") else 8


def with_prior(sketch: FrequentDirections, centered: bool) -> Tensor:
    """The Gram of one group's rows in exact mode, that of the prior rows added: ``[d, d]``, float64, a new tensor."""
    gram = sketch.gram(centered)
    gram.diagonal().add_(gram.trace() * (PRIOR_ROWS / (sketch.rows * sketch.dim)))
    return gram


def relative(squared_error: float, energy: float) -> float:
    """The square root of a ratio of energies; 0 / 0 is 0."""
    if energy <= 0:
        return 0.0
    return math.sqrt(max(squared_error, 0.0) / energy)
