"""One first factor for linear layers that have the same input, such as a query, a key and a value.

Apart, layers i with weights W_i [m_i, d] at ranks r_i hold the sum of r_i (d + m_i) numbers. With one first factor A
[R, d] for all of them, W_i is replaced by B_i A, which is R (d + sum of m_i) numbers: at the same cost the rank R of
each is larger than r_i, if the layers look at the same directions of their input. Whether they do is read off one
spectrum. Each layer's weight is multiplied from the left by what weighs its outputs,

    K_i = w_i (R_i W_i),    w_i^2 = (measured effect of layer i at r_i)^2 / |R_i (W_i - W_i') X^T|^2,

with R_i the root of its output metric (``double_sided.py``; the identity in the basis of activations), so that what is
lost of K_i X^T predicts the squared error of the model's output. Stacked to K = [K_1; K_2; ...] with K X^T = P S V^T,
the best A of rank R spans the rows of P_R^T K, the squared error that is left is the sum of the other s_j^2 (Eckart and
Young 1936), and the share of layer i in it is the sum over j > R of s_j^2 |P_ij|^2. A group of layers is joined where
that is less than the sum of their squared effects apart. Given A, each B_i is the least-squares fit on the
layer's own rows,

    B_i = W_i G A^T (A G A^T)^-1,    G = X^T X,

which does not depend on the metric. Held-out rows decide between the plan with joined layers and the one without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lowrank_fx import cost
from lowrank_fx.calibration import Calibration
from lowrank_fx.curves import SiteCurves
from lowrank_fx.double_sided import ObliqueCurve, variant
from lowrank_fx.forms import SHARED, Factors
from lowrank_fx.forms.base import with_prior
from lowrank_fx.forms.output import group_spectrum
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.planners.problem import Option
from lowrank_fx.sites import Site
from lowrank_fx.sketch import FrequentDirections

FORM = "lowrank"


@dataclass(frozen=True)
class Joint:
    """Layers with one input that are given one first factor.

    Attributes:
        sites: the layers; the parameter is registered under the name of the first.
        rank: of all of them.
        effects: what each is predicted to do to the model's output, squares adding up.
        errors: of each, relative, in its own metric.
        lefts: what each weight is multiplied by from the left to give its part of K: ``[m, q]``.
        stack: K for the weights that it was planned for: float64 ``[sum of q, d]``.
        basis: K's directions that are kept: float64 ``[sum of q, rank]``.
        nanoseconds: that all of them take together; 0 where no clock is obeyed.
    """

    sites: tuple[Site, ...]
    rank: int
    effects: tuple[float, ...]
    errors: tuple[float, ...]
    lefts: tuple[Tensor, ...] = field(repr=False)
    stack: Tensor = field(repr=False)
    basis: Tensor = field(repr=False)
    nanoseconds: int = 0

    @property
    def name(self) -> str:
        """The parameter that holds the first factor."""
        return self.sites[0].attribute("factor_in")

    @cached_property
    def start(self) -> Tensor:
        """The first factor for the weights and rows that it was planned for: float64 ``[rank, d]``."""
        return _spanned(self.basis, self.stack)

    def options(self, calibration: Calibration) -> dict[str, Option]:
        """What each layer costs and does, by site name; the first one pays for the first factor."""
        made, whole = {}, self.sites[0].in_features + sum(site.out_features for site in self.sites)
        for place, site in enumerate(self.sites):
            rows, own = calibration.rows_of(site), site.out_features + (0 if place else site.in_features)
            made[site.name] = Option(
                variant(FORM, SHARED),
                self.rank,
                self.rank * own,
                cost.dense_flops(own, self.rank, rows),
                self.errors[place],
                self.effects[place],
                -(-self.nanoseconds * own // whole),
            )
        return made

    def first(self, weights: Mapping[str, Tensor], sketch: Sketch) -> Tensor:
        """The first factor for weights and rows: float64 ``[rank, d]``, with orthonormal rows.

        Args:
            weights: of the layers, as stored, by site name.
            sketch: of the rows that meet them.
        """
        stack = _stacked(self.sites, self.lefts, weights)
        basis, _ = group_spectrum(stack, sketch.parts[0], self.sites[0].centered, self.rank)
        return _spanned(basis[:, : self.rank], stack)

    def second(self, site: Site, weight: Tensor, first: Tensor, sketch: Sketch) -> Factors:
        """The factors of one of the layers, in the weight's dtype and on its device.

        Args:
            site: the layer.
            weight: its weight as stored.
            first: from :meth:`first`.
            sketch: of the rows that meet it.
        """
        matrix = site.matrix(weight.detach()).double()
        factor_in = first.to(weight.dtype).contiguous()
        own = factor_in.double()
        image = _applied_gram(sketch.parts[0], site.centered, own.T)
        inverse = torch.linalg.pinv(own @ image, hermitian=True)
        factor_out = (matrix @ image @ inverse).to(weight.dtype).contiguous()
        shift = None
        if site.centered:
            shift = matrix @ sketch.mean - factor_out.double() @ (own @ sketch.mean)
        return Factors(factor_in, factor_out, shift, first=None if site == self.sites[0] else self.name)

    def factors(self, curves: Mapping[str, SiteCurves]) -> dict[str, tuple[Site, Factors]]:
        """All layers with their factors, by site name."""
        sketch = curves[self.sites[0].name].sketch
        made = {}
        for site in self.sites:
            made[site.name] = site, self.second(site, curves[site.name].weight, self.start, sketch)
        return made


def sharing_notes(joints: Sequence[Joint]) -> tuple[str, ...]:
    """What the user should know of a plan with such groups."""
    if not joints:
        return ()
    groups = "; ".join(", ".join(site.name for site in joint.sites) for joint in joints)
    return (f"layers with one input have one first factor, which is less error at the same cost: {groups}",)


def join(
    sites: tuple[Site, ...],
    curves: Mapping[str, SiteCurves],
    chosen: Mapping[str, Option],
    step: int,
    below: int | None = None,
) -> Joint | None:
    """Layers with one first factor of the rank that costs no more than their pairs; None where there is none.

    Args:
        sites: the layers.
        curves: error curves by site name.
        chosen: the options of a pick, by site name.
        step: of the ranks of wide layers.
        below: a rank that it has to be below.
    """
    rank = shared_rank(sites, chosen, step, below)
    lefts = tuple(left_of(curves[site.name], chosen[site.name]) for site in sites)
    if rank < 1 or any(left is None for left in lefts):
        return None
    kept = tuple(left for left in lefts if left is not None)
    stack = _stacked(sites, kept, {site.name: curves[site.name].weight for site in sites})
    sketch = curves[sites[0].name].sketch
    basis, energies = group_spectrum(stack, sketch.parts[0], sites[0].centered, rank)
    if rank > min(len(energies), sites[0].in_features):
        return None
    effects, errors, start = [], [], 0
    for left in kept:
        block = energies * basis[start : start + left.shape[1]].square().sum(0)
        left_over, whole = float(block[rank:].sum()), float(block.sum())
        effects.append(math.sqrt(left_over))
        errors.append(math.sqrt(left_over / whole) if whole > 0 else 0.0)
        start += left.shape[1]
    return Joint(sites, rank, tuple(effects), tuple(errors), kept, stack, basis[:, :rank])


def shared_rank(sites: Sequence[Site], chosen: Mapping[str, Option], step: int, below: int | None = None) -> int:
    """The largest rank at which one first factor costs no more than the layers' pairs; 0 where there is none.

    Args:
        sites: the layers.
        chosen: the options of a pick, by site name.
        step: of the ranks of wide layers.
        below: a rank that it has to be below.
    """
    width, outputs = sites[0].in_features, sum(site.out_features for site in sites)
    rank = sum(chosen[site.name].params for site in sites) // (width + outputs)
    rank = rank if below is None else min(rank, below - 1)
    stepped = any(cost.stepped(site.out_features, width) for site in sites)
    return rank // step * step if stepped else rank


def left_of(curves: SiteCurves, option: Option) -> Tensor | None:
    """What a weight is multiplied by from the left to give K_i: float64 ``[m, q]``; None where nothing weighs it.

    Args:
        curves: of the layer.
        option: the form and rank that it has apart.
    """
    assert option.rank is not None
    curve = curves.forms[option.form]
    count = curve.basis.shape[1]
    tail = torch.tensor(curve.tail, dtype=torch.float64, device=curve.basis.device)
    energies = (tail[:-1] - tail[1:])[:count].clamp(min=0)
    left = curve.basis[:, : len(energies)].double()
    if isinstance(curve, ObliqueCurve):
        lengths = curve.lengths[: len(energies)]
        energies, left = energies / lengths.square(), curve.dual[:, : len(energies)].double() / lengths
    missing = float(energies[option.rank :].sum())
    if missing <= 0 or option.effect <= 0 or not math.isfinite(option.effect):
        return None
    return left * (option.effect / math.sqrt(missing))


def _stacked(sites: Sequence[Site], lefts: Sequence[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """K, float64 ``[sum of q, d]``."""
    parts = zip(sites, lefts, strict=True)
    return torch.cat([left.T @ site.matrix(weights[site.name].detach()).double() for site, left in parts])


def _spanned(basis: Tensor, stack: Tensor) -> Tensor:
    """Orthonormal rows that span those of P^T K, float64 ``[rank, d]``: a first factor that rounds well."""
    orthonormal: Tensor = torch.linalg.qr((basis.T @ stack).T).Q.T
    return orthonormal


def gram_of(sketch: FrequentDirections, centered: bool) -> Tensor:
    """G as float64 ``[d, d]``, positive definite."""
    if sketch.exact:
        return with_prior(sketch, centered)
    root, ridge = sketch.completed(centered)
    gram = root.T @ root
    gram.diagonal().add_(max(ridge, float(gram.trace()) * torch.finfo(gram.dtype).eps))
    return gram


def _applied_gram(sketch: FrequentDirections, centered: bool, matrix: Tensor) -> Tensor:
    """G times a float64 matrix ``[d, n]``."""
    if sketch.exact:
        return with_prior(sketch, centered) @ matrix
    root, ridge = sketch.completed(centered)
    return root.T @ (root @ matrix) + ridge * matrix
