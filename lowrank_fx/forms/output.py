"""The forms that project a layer's *output* on its principal directions: ``lowrank`` and ``channel``.

With ``B`` a sketch of the tap (``B^T B`` close to ``X^T X``) and ``U_k`` the first k left singular vectors of
``W B^T``,

    W' = U_k (U_k^T W)        b' = b + (W - W') mean

is the rank-k weight of least output error on the sketched rows (Eckart and Young 1936, applied to ``W B^T``); it equals
the activation-weighted SVD without any inverse or Cholesky factor. One spectrum gives the error of every rank: the
sum of the squared singular values beyond k.

A site of g groups is g such problems side by side: each block of the weight's rows is projected on its own output
directions, every block at the same rank, and the squared errors add up. A rank is always the rank per group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx import cost
from lowrank_fx.forms.base import ErrorCurve, Factors, Form, apply_blocks, rank_step, with_prior
from lowrank_fx.gauge import LARGEST
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.linalg import output_spectrum
from lowrank_fx.sites import Site
from lowrank_fx.sketch import FrequentDirections


class OutputForm(Form):
    """A pair whose second factor spans the principal directions of the layer's output."""

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The ranks on offer: below break-even, in the steps the dtype likes."""
        return cost.candidate_ranks(site.out_features, site.in_features, rank_step(site.dtype), site.groups)

    def params(self, site: Site, rank: int) -> int:
        """Weights of the pair of ``rank``."""
        return cost.pair_params(site.out_features, site.in_features, rank, site.groups)

    def flops(self, site: Site, rank: int, rows: int, space: Sequence[int] = ()) -> int:
        """FLOPs of the pair of ``rank`` over ``rows`` rows of the site's taps; the first one strides already."""
        return cost.pair_flops(site.out_features, site.in_features, rank, rows, site.groups)

    def curve(self, site: Site, weight: Tensor, sketch: Sketch) -> ErrorCurve:
        """The error of every rank, from one spectrum of ``W B^T``.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            sketch: of the rows that meet it; a sketch of l directions supports ranks up to l / 2.
        """
        ranks, beyond = self.supported(site, sketch)
        largest = (*ranks, *beyond)[-1]
        blocks = site.matrix(weight.detach()).chunk(site.groups)
        spectra = [
            group_spectrum(block, part, site.centered, largest)
            for block, part in zip(blocks, sketch.parts, strict=True)
        ]
        longest = max(len(energies) for _, energies in spectra)
        energies = torch.stack([F.pad(own, (0, longest - len(own))) for _, own in spectra]).sum(0)
        tail = torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)))
        keep = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return ErrorCurve(
            ranks=ranks,
            tail=tuple(tail.tolist()),
            energy=float(tail[0]),
            basis=torch.cat([basis[:, :largest] for basis, _ in spectra]).to(keep).contiguous(),
            beyond=beyond,
        )

    def supported(self, site: Site, sketch: Sketch) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ranks on offer that a sketch supports: those below break-even, and those for a re-gauged pair alone."""
        ranks = self.ranks(site)
        beyond: tuple[int, ...] = ()
        if self.regauges(site):
            beyond = cost.ranks_beyond(site.out_features, site.in_features, rank_step(site.dtype))
        if sketch.size is None:
            return ranks, beyond
        most = sketch.size // 2
        return (
            tuple(rank for rank in ranks if rank <= most) or ranks[:1],
            tuple(rank for rank in beyond if rank <= most),
        )

    def factor(self, site: Site, weight: Tensor, curve: ErrorCurve, rank: int, sketch: Sketch) -> Factors:
        """The pair of ``rank``, in the weight's dtype and on its device.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            curve: from :meth:`curve`.
            rank: one of ``curve.ranks`` or ``curve.beyond``.
            sketch: the one that :meth:`curve` took.
        """
        matrix = site.matrix(weight.detach()).double()
        basis = curve.basis[:, :rank].double()
        blocks = zip(basis.chunk(site.groups), matrix.chunk(site.groups), strict=True)
        factor_in = torch.cat([own.t() @ block for own, block in blocks]).to(weight.dtype)
        factor_out = basis.to(weight.dtype)
        shift = None
        if site.centered:
            inner = apply_blocks(factor_in.double(), sketch.mean, site.groups)
            shift = apply_blocks(matrix, sketch.mean, site.groups) - apply_blocks(
                factor_out.double(), inner, site.groups
            )
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


class LowRank(OutputForm):
    """``lowrank``: a linear layer becomes two, in -> rank -> out; likewise a batch of matrices, each by itself."""

    name = "lowrank"
    kinds = ("linear", "bmm")
    needs = "linear layers and products of batched matrices"

    def regauges(self, site: Site) -> bool:
        """Those of linear layers in float32 and float64; fewer digits would not survive it."""
        return site.kind == "linear" and site.groups == 1 and site.dtype in map(str, LARGEST)

    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices as they are; for ``"bmm"`` ``[groups, in, rank]`` and ``[groups, rank, out of a group]``."""
        if site.kind == "bmm":
            factor_in, factor_out = (
                each.reshape(site.groups, -1, each.shape[1]).mT for each in (factor_in, factor_out)
            )
        return factor_in.contiguous(), factor_out.contiguous()


class Channel(OutputForm):
    """``channel``: a convolution to ``rank`` channels per group, then one of 1 x 1 within the groups.

    The im2col view makes it a linear layer over patches, so the same projection is optimal for it.
    """

    name = "channel"
    kinds = ("conv1d", "conv2d", "conv3d")
    needs = "convolutions"

    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """``[groups * rank, channels of a group, *kernel]`` and ``[out, rank, 1, ...]``."""
        pointwise = factor_out.reshape(*factor_out.shape, *[1] * (len(site.shape) - 2))
        return factor_in.reshape(-1, *site.shape[1:]).contiguous(), pointwise.contiguous()


def group_spectrum(block: Tensor, sketch: FrequentDirections, centered: bool, rank: int) -> tuple[Tensor, Tensor]:
    """Output directions and energies of one group's weight ``[m, d]``: a basis of at least ``rank`` columns."""
    if sketch.exact:
        return output_spectrum(block, gram=with_prior(sketch, centered))
    root, ridge = sketch.completed(centered)
    # Rows of zeros change no Gram; they make room for a basis of the largest rank when few rows were seen.
    return output_spectrum(block, root=F.pad(root, (0, 0, 0, max(rank - root.shape[0], 0))), ridge=ridge)
