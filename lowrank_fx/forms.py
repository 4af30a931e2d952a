"""The forms: ways to factor a site, each with its error curve, its factors and its cost.

Both forms here project the layer's *output* on its principal directions. With ``B`` a sketch of the tap
(``B^T B`` close to ``X^T X``) and ``U_k`` the first k left singular vectors of ``W B^T``,

    W' = U_k (U_k^T W)        b' = b + (W - W') mean

is the rank-k weight of least output error on the sketched rows (Eckart and Young 1936, applied to ``W B^T``); it equals
the activation-weighted SVD without any inverse or Cholesky factor. One spectrum gives the error of every rank: the
sum of the squared singular values beyond k.

To add a form: subclass :class:`Form`, put it into ``FORMS``, and give ``passes/`` a rewrite for it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx import cost
from lowrank_fx.errors import OptionError
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
        tail: ``tail[k]`` is the squared output error at rank k on the sketched rows, k = 0 ... q.
        energy: the squared norm of the layer's output on the sketched rows (about its mean where a bias takes that up).
        basis: ``[out_features, max(ranks)]``, orthonormal columns, the output directions by falling energy.
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
        factor_in: applied first; ``[rank, in]``, or ``[rank, channels, kh, kw]``.
        factor_out: applied second; ``[out, rank]``, or ``[out, rank, 1, 1]``.
        shift: ``[out]``, float64; what is added to the bias, or None where the site has none to take it.
    """

    factor_in: Tensor
    factor_out: Tensor
    shift: Tensor | None

    @property
    def rank(self) -> int:
        """The rank of the pair."""
        return self.factor_in.shape[0]

    def dense_matrix(self) -> Tensor:
        """The product of the pair as stored: float64 ``[out, in]``."""
        return self.factor_out.flatten(1).double() @ self.factor_in.flatten(1).double()


class Form(ABC):
    """One way to factor a site; stateless."""

    name: str
    kind: str

    def applies(self, site: Site) -> bool:
        """Whether this form can stand for ``site``."""
        return site.kind == self.kind

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The ranks on offer: below break-even, in the steps the dtype likes."""
        multiple = 16 if site.dtype in ("torch.bfloat16", "torch.float16") else 8
        return cost.candidate_ranks(site.out_features, site.in_features, multiple)

    def curve(self, site: Site, weight: Tensor, sketch: FrequentDirections) -> ErrorCurve:
        """The error of every rank, from one spectrum of ``W B^T``.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            sketch: of the rows that meet it; a sketch of l directions supports ranks up to l / 2.
        """
        ranks = self.ranks(site)
        if sketch.size is not None:
            ranks = tuple(rank for rank in ranks if rank <= sketch.size // 2) or ranks[:1]
        matrix = site.matrix(weight.detach())
        if sketch.exact:
            gram = sketch.gram(centered=site.centered)
            gram.diagonal().add_(gram.trace() * (PRIOR_ROWS / (sketch.rows * sketch.dim)))
            basis, energies = output_spectrum(matrix, gram=gram)
        else:
            root = sketch.matrix(centered=site.centered)
            # Rows of zeros change no Gram; they make room for a basis of the largest rank when few rows were seen.
            root = F.pad(root, (0, 0, 0, max(ranks[-1] - root.shape[0], 0)))
            basis, energies = output_spectrum(matrix, root=root)
        tail = torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)))
        keep = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return ErrorCurve(
            ranks=ranks,
            tail=tuple(tail.tolist()),
            energy=float(tail[0]),
            basis=basis[:, : ranks[-1]].to(keep).contiguous(),
        )

    def factor(self, site: Site, weight: Tensor, curve: ErrorCurve, rank: int, mean: Tensor) -> Factors:
        """The pair of ``rank``, in the weight's dtype and on its device.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            curve: from :meth:`curve`.
            rank: one of ``curve.ranks``.
            mean: float64 ``[in_features]``, mean of the sketched rows.
        """
        matrix = site.matrix(weight.detach()).double()
        basis = curve.basis[:, :rank].double()
        factor_in = (basis.t() @ matrix).to(weight.dtype)
        factor_out = basis.to(weight.dtype)
        shift = None
        if site.centered:
            shift = matrix @ mean - factor_out.double() @ (factor_in.double() @ mean)
        return Factors(*self.shaped(site, factor_in, factor_out), shift)

    @abstractmethod
    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices ``[rank, in]`` and ``[out, rank]`` in the shapes that the factored operators take."""


class LowRank(Form):
    """``lowrank``: a linear layer becomes two, in -> rank -> out."""

    name = "lowrank"
    kind = "linear"

    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """Matrices as they are."""
        return factor_in.contiguous(), factor_out.contiguous()


class Channel(Form):
    """``channel``: a k x k convolution to ``rank`` channels, then a 1 x 1 convolution.

    The im2col view makes it a linear layer over patches, so the same projection is optimal for it.
    """

    name = "channel"
    kind = "conv2d"

    def shaped(self, site: Site, factor_in: Tensor, factor_out: Tensor) -> tuple[Tensor, Tensor]:
        """``[rank, channels, kh, kw]`` and ``[out, rank, 1, 1]``."""
        return factor_in.reshape(-1, *site.shape[1:]).contiguous(), factor_out[:, :, None, None].contiguous()


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


def relative(squared_error: float, energy: float) -> float:
    """The square root of a ratio of energies; 0 / 0 is 0."""
    if energy <= 0:
        return 0.0
    return math.sqrt(max(squared_error, 0.0) / energy)
