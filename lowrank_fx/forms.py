"""The forms: ways to factor a site, each with its error curve, its factors and its cost.

Both forms here project the layer's *output* on its principal directions. With ``B`` a sketch of the tap
(``B^T B`` close to ``X^T X``) and ``U_k`` the first k left singular vectors of ``W B^T``,

    W' = U_k (U_k^T W)        b' = b + (W - W') mean

is the rank-k weight of least output error on the sketched rows (Eckart and Young 1936, applied to ``W B^T``); it equals
the activation-weighted SVD without any inverse or Cholesky factor. One spectrum gives the error of every rank: the
sum of the squared singular values beyond k.

A site of g groups is g such problems side by side: each block of the weight's rows is projected on its own output
directions, every block at the same rank, and the squared errors add up. A rank is always the rank per group.

To add a form: subclass :class:`Form`, put it into ``FORMS``, and give ``passes/`` a rewrite for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx import cost
from lowrank_fx.errors import OptionError
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.linalg import output_spectrum
from lowrank_fx.sites import Site
from lowrank_fx.sketch import FrequentDirections

DENSE = "dense"

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
        tail: ``tail[k]`` is the squared output error at rank k on the sketched rows, k = 0 ... q, of all groups.
        energy: the squared norm of the layer's output on the sketched rows (about its mean where a bias takes that up).
        basis: ``[out_features, max(ranks)]``, the output directions by falling energy; each group's block of rows has
            orthonormal columns.
    """

    ranks: tuple[int, ...]
    tail: tuple[float, ...] = field(repr=False)
    energy: float
    basis: Tensor = field(repr=False)

    def error(self, rank: int) -> float:
        """Relative output error at ``rank``: the square root of tail over energy, 0 for a layer with no output."""
        return relative(self.tail[min(rank, len(self.tail) - 1)], self.energy)


@dataclass(frozen=True)
class Factors:
    """What replaces one weight.

    Attributes:
        factor_in: applied first; ``[rank, in]``, for a convolution ``[groups * rank, channels of a group, *kernel]``,
            for ``"bmm"`` ``[groups, in, rank]``.
        factor_out: applied second; ``[out, rank]``, for a convolution ``[out, rank, 1, ...]``, for ``"bmm"``
            ``[groups, rank, out of a group]``.
        shift: ``[out]``, float64; what is added to the bias, or None where the site has none to take it.
        groups: how many pairs stand side by side.
        stacked: one matrix per group along the first dimension, in before out, as ``"bmm"`` takes them.
    """

    factor_in: Tensor
    factor_out: Tensor
    shift: Tensor | None
    groups: int = 1
    stacked: bool = False

    @property
    def rank(self) -> int:
        """The rank of the pair, per group."""
        return self.factor_out.shape[1]

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The pair as matrices, one below the other for several groups: ``[groups * rank, in]``, ``[out, rank]``."""
        if self.stacked:
            return self.factor_in.mT.flatten(0, 1), self.factor_out.mT.flatten(0, 1)
        return self.factor_in.flatten(1), self.factor_out.flatten(1)

    def dense_matrix(self) -> Tensor:
        """The product of the pair as stored: float64 ``[out, in]``."""
        first, second = (matrix.double().chunk(self.groups) for matrix in self.matrices())
        return torch.cat([out @ into for out, into in zip(second, first, strict=True)])

    def scaled(self, scale: Tensor, shift: Tensor | None) -> Factors:
        """The pair with every output multiplied by its entry of ``scale``, float64 ``[out]``, and another shift."""
        shape = (self.groups, 1, -1) if self.stacked else (-1, *[1] * (self.factor_out.dim() - 1))
        factor_out = (self.factor_out.double() * scale.view(shape)).to(self.factor_out.dtype)
        return replace(self, factor_out=factor_out, shift=shift)


class Form(ABC):
    """One way to factor a site; stateless."""

    name: str
    kinds: tuple[str, ...]

    def applies(self, site: Site) -> bool:
        """Whether this form can stand for ``site``."""
        return site.kind in self.kinds

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The ranks on offer: below break-even, in the steps the dtype likes."""
        multiple = 16 if site.dtype in ("torch.bfloat16", "torch.float16") else 8
        return cost.candidate_ranks(site.out_features, site.in_features, multiple, site.groups)

    def params(self, site: Site, rank: int) -> int:
        """Weights of the pair of ``rank``."""
        return cost.pair_params(site.out_features, site.in_features, rank, site.groups)

    def flops(self, site: Site, rank: int, rows: int) -> int:
        """FLOPs of the pair of ``rank`` over ``rows`` rows of the site's taps."""
        return cost.pair_flops(site.out_features, site.in_features, rank, rows, site.groups)

    def curve(self, site: Site, weight: Tensor, sketch: Sketch) -> ErrorCurve:
        """The error of every rank, from one spectrum of ``W B^T``.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            sketch: of the rows that meet it; a sketch of l directions supports ranks up to l / 2.
        """
        ranks = self.ranks(site)
        if sketch.size is not None:
            ranks = tuple(rank for rank in ranks if rank <= sketch.size // 2) or ranks[:1]
        blocks = site.matrix(weight.detach()).chunk(site.groups)
        spectra = [
            _spectrum(block, part, site.centered, ranks[-1]) for block, part in zip(blocks, sketch.parts, strict=True)
        ]
        longest = max(len(energies) for _, energies in spectra)
        energies = torch.stack([F.pad(own, (0, longest - len(own))) for _, own in spectra]).sum(0)
        tail = torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)))
        keep = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return ErrorCurve(
            ranks=ranks,
            tail=tuple(tail.tolist()),
            energy=float(tail[0]),
            basis=torch.cat([basis[:, : ranks[-1]] for basis, _ in spectra]).to(keep).contiguous(),
        )

    def factor(self, site: Site, weight: Tensor, curve: ErrorCurve, rank: int, mean: Tensor) -> Factors:
        """The pair of ``rank``, in the weight's dtype and on its device.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            curve: from :meth:`curve`.
            rank: one of ``curve.ranks``.
            mean: float64 ``[groups * in_features]``, mean of the sketched rows.
        """
        matrix = site.matrix(weight.detach()).double()
        basis = curve.basis[:, :rank].double()
        blocks = zip(basis.chunk(site.groups), matrix.chunk(site.groups), strict=True)
        factor_in = torch.cat([own.t() @ block for own, block in blocks]).to(weight.dtype)
        factor_out = basis.to(weight.dtype)
        shift = None
        if site.centered:
            inner = apply_blocks(factor_in.double(), mean, site.groups)
            shift = apply_blocks(matrix, mean, site.groups) - apply_blocks(factor_out.double(), inner, site.groups)
        return self.assemble(site, factor_in, factor_out, shift)

    def blank(self, site: Site, weight: Tensor, rank: int) -> Factors:
        """Factors of ``rank`` that hold zeros, in the dtype and on the device of ``weight``."""
        first = weight.new_zeros(site.groups * rank, site.in_features)
        return self.assemble(site, first, weight.new_zeros(site.out_features, rank), None)

    def assemble(self, site: Site, factor_in: Tensor, factor_out: Tensor, shift: Tensor | None) -> Factors:
        """Factors from matrices.

        Args:
            site: the site.
            factor_in: matrix ``[groups * rank, in_features]``.
            factor_out: matrix ``[out_features, rank]``.
            shift: ``[out_features]``, float64, or None.
        """
        return Factors(*self.shaped(site, factor_in, factor_out), shift, site.groups, stacked=site.kind == "bmm")

    @abstractmethod
    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices of :meth:`assemble` in the shapes that the factored operators take, contiguous."""


class LowRank(Form):
    """``lowrank``: a linear layer becomes two, in -> rank -> out; likewise a batch of matrices, each by itself."""

    name = "lowrank"
    kinds = ("linear", "bmm")

    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices as they are; for ``"bmm"`` ``[groups, in, rank]`` and ``[groups, rank, out of a group]``."""
        if site.kind == "bmm":
            factor_in, factor_out = (
                each.reshape(site.groups, -1, each.shape[1]).mT for each in (factor_in, factor_out)
            )
        return factor_in.contiguous(), factor_out.contiguous()


class Channel(Form):
    """``channel``: a convolution to ``rank`` channels per group, then one of 1 x 1 within the groups.

    The im2col view makes it a linear layer over patches, so the same projection is optimal for it.
    """

    name = "channel"
    kinds = ("conv1d", "conv2d", "conv3d")

    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """``[groups * rank, channels of a group, *kernel]`` and ``[out, rank, 1, ...]``."""
        pointwise = factor_out.reshape(*factor_out.shape, *[1] * (len(site.shape) - 2))
        return factor_in.reshape(-1, *site.shape[1:]).contiguous(), pointwise.contiguous()


FORMS: dict[str, Form] = {form.name: form for form in (LowRank(), Channel())}


def forms_for(site: Site, allowed: Sequence[str] | None) -> list[Form]:
    """The forms that can stand for ``site``, among those the user allows (None: all).

    Raises:
        OptionError: ``allowed`` names a form that does not exist.
    """
    for name in allowed or ():
        if name not in FORMS:
            raise OptionError(f"forms={list(allowed or ())!r}: no form is called {name!r}; there are {list(FORMS)}")
    return [form for name, form in FORMS.items() if (allowed is None or name in allowed) and form.applies(site)]


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


def _spectrum(block: Tensor, sketch: FrequentDirections, centered: bool, rank: int) -> tuple[Tensor, Tensor]:
    """Output directions and energies of one group's weight ``[m, d]``: a basis of at least ``rank`` columns."""
    if sketch.exact:
        gram = sketch.gram(centered)
        gram.diagonal().add_(gram.trace() * (PRIOR_ROWS / (sketch.rows * sketch.dim)))
        return output_spectrum(block, gram=gram)
    root = sketch.matrix(centered)
    # Rows of zeros change no Gram; they make room for a basis of the largest rank when few rows were seen.
    return output_spectrum(block, root=F.pad(root, (0, 0, 0, max(rank - root.shape[0], 0))))


def relative(squared_error: float, energy: float) -> float:
    """The square root of a ratio of energies; 0 / 0 is 0."""
    if energy <= 0:
        return 0.0
    return math.sqrt(max(squared_error, 0.0) / energy)
