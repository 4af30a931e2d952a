"""The output forms in a basis that output gradients choose: the double-sided SVD.

With G = B^T B the second moment of a site's inputs and Gamma that of the gradients at its output (``gradients.py``),

    W' = R^-1 U_k U_k^T R W,    U_k the first k left singular vectors of R W B^T,    R^T R = Gamma'

minimises |R (W - W') B^T|_F over all W' of rank k (Eckart and Young 1936, applied to R W B^T): the layer's output error
in the metric of Gamma, which weighs a direction by how far it moves the model's output, taking inputs and gradients as
independent (J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML
2015, section 3). Gamma is estimated from few rows and speaks of small changes only, so it is shrunk towards the
identity (O. Ledoit, M. Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", JMVA 88, 2004,
with a fixed share),

    Gamma' = (1 - a) Gamma / tr Gamma + a I / m

whose least eigenvalue a / m is also the floor of the inverse root. One spectrum gives the projections of all ranks.
With R W B^T = sum of s_i u_i v_i^T, the output error itself, which is what bounds and reports speak of, is
|(W - W') B^T|_F^2 = sum over i > k of s_i^2 |R^-1 u_i|^2, because the v_i are orthonormal.

Where W [m, d] is tall, all of it happens in the span of its outputs: with W = Q T and Q^T Gamma' Q = S^T S the vectors
are those of S T B^T, and R^-1 U = Q S^-1 V. Only d x d matrices are factored then, whatever the rank of W.

The *basis* of a curve is ``"activation"`` (the plain forms) or ``"gradient"`` (here); a *variant* is a form with a
basis, written ``lowrank`` or ``lowrank@gradient``. The basis ``"shared"`` is that of layers with one first factor
(``shared_inputs.py``), which have no curve each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx.forms.base import ACTIVATION, ErrorCurve, Factors, apply_blocks
from lowrank_fx.forms.output import OutputForm, group_spectrum
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.sites import Site
from lowrank_fx.sketch import FrequentDirections

SHRINKAGE = 0.1
"""The share a of the identity in Gamma'. On real models .03, .1 and .3 give plans of nearly the same error."""


def variant(form: str, basis: str) -> str:
    """The name of a form with a basis.

    >>> variant("lowrank", "gradient"), variant("lowrank", "activation")
    ('lowrank@gradient', 'lowrank')
    """
    return form if basis == ACTIVATION else f"{form}@{basis}"


def split_variant(name: str) -> tuple[str, str]:
    """Form and basis of a variant's name.

    >>> split_variant("lowrank@gradient"), split_variant("channel")
    (('lowrank', 'gradient'), ('channel', 'activation'))
    """
    form, _, basis = name.partition("@")
    return form, basis or ACTIVATION


class OutputMetric(ABC):
    """R of one group: any R with R^T R = Gamma' gives the same W', so each kind has the one that is cheapest."""

    @staticmethod
    def of(gradients: FrequentDirections, shrinkage: float = SHRINKAGE) -> OutputMetric:
        """The metric that the sketched gradients of one group give.

        Args:
            gradients: of rows ``[m]``; not all of them zero.
            shrinkage: a, in (0, 1].
        """
        least = shrinkage / gradients.dim
        if gradients.exact:
            gram = gradients.gram(centered=False)
            gram *= (1 - shrinkage) / gram.trace()
            gram.diagonal().add_(least)
            return WholeMetric(gram)
        _, lengths, right = torch.linalg.svd(gradients.matrix(centered=False), full_matrices=False)
        values = lengths.square()
        return SketchedMetric(right.T, ((1 - shrinkage) * values / values.sum() + least).sqrt(), least**0.5)

    @abstractmethod
    def root(self, matrix: Tensor) -> Tensor:
        """R times a float64 matrix ``[m, n]``."""

    @abstractmethod
    def gram(self, matrix: Tensor) -> Tensor:
        """Gamma' = R^T R times a float64 matrix ``[m, n]``."""

    @abstractmethod
    def inverse_root(self, matrix: Tensor) -> Tensor:
        """R^-1 times a float64 matrix ``[m, n]``."""

    @abstractmethod
    def scaled(self, by: float) -> OutputMetric:
        """R times a positive number."""


@dataclass(frozen=True)
class WholeMetric(OutputMetric):
    """R as the transposed Cholesky factor of Gamma', which the floor keeps positive definite.

    Attributes:
        gamma: Gamma' ``[m, m]``, float64.
    """

    gamma: Tensor

    @cached_property
    def upper(self) -> Tensor:
        """R ``[m, m]``, float64, upper triangular."""
        factor: Tensor = torch.linalg.cholesky(self.gamma).T
        return factor

    def root(self, matrix: Tensor) -> Tensor:
        """R times a float64 matrix ``[m, n]``."""
        return self.upper @ matrix

    def gram(self, matrix: Tensor) -> Tensor:
        """Gamma' = R^T R times a float64 matrix ``[m, n]``."""
        return self.gamma @ matrix

    def inverse_root(self, matrix: Tensor) -> Tensor:
        """R^-1 times a float64 matrix ``[m, n]``."""
        solved: Tensor = torch.linalg.solve_triangular(self.upper, matrix, upper=True)
        return solved

    def scaled(self, by: float) -> WholeMetric:
        """R times a positive number."""
        return WholeMetric(by * by * self.gamma)


@dataclass(frozen=True)
class SketchedMetric(OutputMetric):
    """R = Gamma'^(1/2) for few directions of Gamma, as floor I + V diag(roots - floor) V^T.

    Attributes:
        vectors: V ``[m, r]``, float64, orthonormal columns.
        roots: ``[r]``, float64: square roots of the eigenvalues of Gamma' along V, none below ``floor``.
        floor: the square root of a / m, that of all other directions.
    """

    vectors: Tensor
    roots: Tensor
    floor: float

    def root(self, matrix: Tensor) -> Tensor:
        """R times a float64 matrix ``[m, n]``."""
        return self.floor * matrix + self.vectors @ ((self.roots - self.floor)[:, None] * (self.vectors.T @ matrix))

    def gram(self, matrix: Tensor) -> Tensor:
        """Gamma' = R^T R times a float64 matrix ``[m, n]``; this R is symmetric."""
        return self.root(self.root(matrix))

    def inverse_root(self, matrix: Tensor) -> Tensor:
        """R^-1 times a float64 matrix ``[m, n]``."""
        change = 1 / self.roots - 1 / self.floor
        return matrix / self.floor + self.vectors @ (change[:, None] * (self.vectors.T @ matrix))

    def scaled(self, by: float) -> SketchedMetric:
        """R times a positive number."""
        return SketchedMetric(self.vectors, by * self.roots, by * self.floor)


@dataclass(frozen=True, kw_only=True)
class ObliqueCurve(ErrorCurve):
    """An error curve whose projections are oblique: W' = basis_k mixed_kk dual_k^T W, block by block.

    ``basis_k mixed_kk`` are the first k columns of R^-1 U, scaled to length one. An orthonormal basis of them makes
    sure that rounding a pair to its dtype costs no more than in the plain forms.

    Attributes:
        mixed: per group upper triangular ``[largest, largest]``, stacked; float64.
        dual: ``[out_features, largest]``, like ``basis``; within a group ``mixed dual^T basis`` is the identity.
        lengths: ``|R^-1 u_i|`` of all groups, ``[groups * largest]``, float64; ``dual`` is ``R^T U`` times these.
    """

    mixed: Tensor = field(repr=False)
    dual: Tensor = field(repr=False)
    lengths: Tensor = field(repr=False)


def double_sided(form: OutputForm, site: Site, weight: Tensor, sketch: Sketch, gradients: Sketch) -> ObliqueCurve:
    """The error of every rank that ``form`` offers, in the basis that the gradients choose.

    Args:
        form: what is offered in another basis.
        site: the site.
        weight: its weight as stored in the model.
        sketch: of the rows that meet it.
        gradients: at its output, from :func:`~lowrank_fx.gradients.output_gradients`.

    Returns:
        A curve whose ``tail`` is the layer's own output error, as that of every curve.
    """
    ranks, beyond = form.supported(site, sketch)
    largest = (*ranks, *beyond)[-1]
    blocks = site.matrix(weight.detach()).double().chunk(site.groups)
    made = [
        _oblique(OutputMetric.of(own), block, part, site.centered, largest)
        for block, part, own in zip(blocks, sketch.parts, gradients.parts, strict=True)
    ]
    longest = max(len(own.energies) for own in made)
    energies = torch.stack([F.pad(own.energies, (0, longest - len(own.energies))) for own in made]).sum(0)
    tail = torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)))
    keep = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return ObliqueCurve(
        ranks=ranks,
        tail=tuple(tail.tolist()),
        energy=float(tail[0]),
        basis=torch.cat([own.basis for own in made]).to(keep).contiguous(),
        beyond=beyond,
        mixed=torch.cat([own.mixed for own in made]),
        dual=torch.cat([own.dual for own in made]).to(keep).contiguous(),
        lengths=torch.cat([own.lengths for own in made]),
    )


class _Oblique(NamedTuple):
    """Of one group: the output error of every direction ``[q]``, and its part of an :class:`ObliqueCurve`."""

    energies: Tensor
    basis: Tensor
    mixed: Tensor
    dual: Tensor
    lengths: Tensor


def _oblique(metric: OutputMetric, block: Tensor, sketch: FrequentDirections, centered: bool, largest: int) -> _Oblique:
    """The oblique projections of one group's weight ``[m, d]``, float64, up to the rank ``largest``."""
    outer: Tensor | None = None
    weighed: Tensor | None = None
    if block.shape[0] > block.shape[1]:
        outer, block = torch.linalg.qr(block)
        weighed = metric.gram(outer)
        metric = WholeMetric(outer.T @ weighed)  # no worse conditioned than Gamma'
    directions, energies = group_spectrum(metric.root(block), sketch, centered, largest)
    back = metric.inverse_root(directions)
    lengths = torch.linalg.vector_norm(back, dim=0)
    energies = energies * lengths.square()
    back, lengths = back[:, :largest], lengths[:largest]
    basis, mixed = _orthonormal(back / lengths)
    stretched = back * lengths
    if outer is None or weighed is None:
        return _Oblique(energies, basis, mixed, metric.gram(stretched), lengths)
    return _Oblique(energies, outer @ basis, mixed, weighed @ stretched, lengths)


def _orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Q and upper triangular R with Q R = ``columns``, from the Cholesky factor of their Gram matrix.

    That squares the condition, which is at most that of R^-1: (m / a)^(1/2). Q is orthonormal to about m / a times
    float64's rounding.
    """
    upper = torch.linalg.cholesky(columns.T @ columns).T
    return torch.linalg.solve_triangular(upper, columns, upper=True, left=False), upper


def oblique_factors(
    form: OutputForm, site: Site, weight: Tensor, curve: ObliqueCurve, rank: int, sketch: Sketch
) -> Factors:
    """The factors of one rank of :func:`double_sided`, in the weight's dtype and on its device.

    What ranks have in common is kept until the curve may rest.
    """
    matrix = site.matrix(weight.detach()).double()
    mixes = zip(curve.mixed.chunk(site.groups), _seen(curve, matrix, rank, site.groups), strict=True)
    inner = [mixed[:rank, :rank] @ seen for mixed, seen in mixes]
    outer = [basis[:, :rank] for basis in curve.basis.chunk(site.groups)]
    factor_in, factor_out = (torch.cat(each).to(weight.dtype) for each in (inner, outer))
    factors = form.assemble(site, factor_in, factor_out, None)
    if not site.centered:
        return factors
    first = apply_blocks(factor_in.double(), sketch.mean, site.groups)
    kept = apply_blocks(factor_out.double(), first, site.groups)
    return replace(factors, shift=apply_blocks(matrix, sketch.mean, site.groups) - kept)


def _seen(curve: ObliqueCurve, matrix: Tensor, rank: int, groups: int) -> list[Tensor]:
    """The first ``rank`` rows of every group's ``dual^T W``, float64; rows are made once while the curve works."""
    kept: list[Tensor] | None = curve.work.get("seen")
    done = 0 if kept is None else len(kept[0])
    if done < rank:
        blocks = zip(curve.dual.chunk(groups), matrix.chunk(groups), strict=True)
        more = [dual[:, done:rank].double().T @ block for dual, block in blocks]
        kept = more if kept is None else [torch.cat(both) for both in zip(kept, more, strict=True)]
        curve.work["seen"] = kept
    assert kept is not None
    return [own[:rank] for own in kept]
