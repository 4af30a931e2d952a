"""The double-sided basis against a direct float64 computation, and its bookkeeping."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_fx.double_sided import OutputMetric, double_sided, oblique_factors, split_variant, variant
from lowrank_fx.forms import Channel, LowRank
from lowrank_fx.forms.base import with_prior
from lowrank_fx.forms.output import OutputForm
from lowrank_fx.grouped_sketch import Sketch, make_sketch
from lowrank_fx.patches import Patch
from lowrank_fx.sites import Site, SiteCall

PATCH = Patch((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


def linear(out: int, into: int, *, centered: bool = True, dtype: torch.dtype = torch.float64) -> Site:
    call = SiteCall("node", "tap", "bias" if centered else None)
    return Site("site", "linear", "weight", False, out, into, (out, into), str(dtype), None, (call,), centered)


def conv(out: int, channels: int, groups: int) -> Site:
    call = SiteCall("node", "tap", "bias")
    shape = (out, channels, 3, 3)
    return Site(
        "site", "conv2d", "weight", False, out, 9 * channels, shape, "torch.float64", PATCH, (call,), True, groups
    )


def rows(count: int, width: int, seed: int, tilt: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.arange(1, width + 1, dtype=torch.float64) ** -tilt
    return torch.randn(count, width, generator=generator, dtype=torch.float64) * scales @ mixed + 0.5


def sketched(values: Tensor, groups: int = 1, size: int | None = None) -> Sketch:
    made = make_sketch(values.shape[1], groups, size)
    made.update(values)
    return made


def power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    made: Tensor = vectors @ torch.diag(values**exponent) @ vectors.T
    return made


def shrunk(gradients: Tensor, share: float) -> Tensor:
    gamma = gradients.T @ gradients
    return (1 - share) * gamma / gamma.trace() + share * torch.eye(len(gamma), dtype=torch.float64) / len(gamma)


@pytest.mark.parametrize(("out", "into"), [(24, 40), (40, 24)])
@pytest.mark.parametrize("centered", [True, False])
def test_it_is_the_optimum_in_the_metric_of_the_gradients(out: int, into: int, centered: bool) -> None:
    site = linear(out, into, centered=centered)
    weight = rows(out, into, 1, 0.0)
    inputs, gradients = sketched(rows(300, into, 2)), rows(200, out, 3)
    form = LowRank()
    curve = double_sided(form, site, weight, inputs, sketched(gradients))
    metric = shrunk(gradients, 0.1)
    root, back = power(metric, 0.5), power(metric, -0.5)
    (part,) = inputs.parts
    gram = with_prior(part, centered)
    basis = power(gram, 0.5)
    left, lengths, right = torch.linalg.svd(root @ weight @ basis)
    plain = form.curve(site, weight, inputs)
    for rank in curve.ranks:
        best = back @ (left[:, :rank] * lengths[:rank]) @ right[:rank] @ torch.linalg.inv(basis)
        factors = oblique_factors(form, site, weight, curve, rank, inputs)
        found = factors.dense_matrix()
        # The inverse of the inputs' root has condition 1e4 here, so the reference itself is good to about 1e-9.
        assert torch.allclose(found, best, rtol=0, atol=1e-7 * float(best.abs().max())), rank
        residual = weight - found
        own = float((residual @ basis).square().sum())
        assert curve.tail[rank] == pytest.approx(own, rel=1e-8)
        assert curve.energy == pytest.approx(plain.energy, rel=1e-10)
        # In the metric it is better than the plain form, in the layer's own output error the plain form is.
        simple = weight - form.factor(site, weight, plain, rank, inputs).dense_matrix()
        assert float((root @ residual @ basis).norm()) < float((root @ simple @ basis).norm())
        assert curve.error(rank) > plain.error(rank)
        assert factors.rank == rank
        eye = torch.eye(rank, dtype=torch.float64)
        assert torch.allclose(factors.factor_out.T @ factors.factor_out, eye, atol=1e-12)
        if centered:
            assert factors.shift is not None
            assert torch.allclose(factors.shift, residual @ inputs.mean, atol=1e-9)
        else:
            assert factors.shift is None


@pytest.mark.parametrize("size", [None, 12])
def test_a_tall_weight_of_low_rank_is_projected_in_the_whole_metric(size: int | None) -> None:
    site = linear(40, 24)
    weight = rows(40, 10, 1, 0.0) @ rows(10, 24, 5, 0.0)
    inputs, gradients = sketched(rows(300, 24, 2)), rows(200, 40, 3)
    seen = sketched(gradients, size=size)
    curve = double_sided(LowRank(), site, weight, inputs, seen)
    (part,) = seen.parts
    metric = shrunk(gradients if size is None else part.matrix(centered=False), 0.1)
    root, back = power(metric, 0.5), power(metric, -0.5)
    basis = power(with_prior(inputs.parts[0], True), 0.5)
    left = torch.linalg.svd(root @ weight @ basis).U
    dual, largest = curve.dual, curve.largest
    eye = torch.eye(largest, dtype=torch.float64)
    assert torch.allclose(curve.mixed @ dual.T @ curve.basis, eye, atol=1e-10)
    for rank in (rank for rank in curve.ranks if rank <= 10):
        best = back @ left[:, :rank] @ left[:, :rank].T @ root
        # Behind a rank the directions are those of Q, whatever W has there: only up to it are they unique.
        found = curve.basis[:, :rank] @ curve.mixed[:rank, :rank] @ dual[:, :rank].T
        assert torch.allclose(found, best, rtol=0, atol=1e-9 * float(best.abs().max())), rank
        own = float(((weight - found @ weight) @ basis).square().sum())
        assert curve.tail[rank] == pytest.approx(own, rel=1e-8, abs=1e-9 * curve.energy)


def test_groups_have_metrics_of_their_own() -> None:
    site, form = conv(16, 4, 2), Channel()
    weight = rows(16, 36, 1, 0.0).reshape(16, 4, 3, 3)
    values, gradients = rows(400, 72, 2), rows(300, 16, 3)
    inputs = sketched(values, 2)
    curve = double_sided(form, site, weight, inputs, sketched(gradients, 2))
    rank = curve.ranks[0]
    factors = oblique_factors(form, site, weight, curve, rank, inputs)
    assert factors.factor_in.shape == (2 * rank, 4, 3, 3)
    assert factors.factor_out.shape == (16, rank, 1, 1)
    total = 0.0
    for group in range(2):
        own = slice(8 * group, 8 * group + 8)
        single = linear(8, 36)
        matrix, part = weight.flatten(1)[own], inputs.parts[group]
        alone = double_sided(LowRank(), single, matrix, part, sketched(gradients[:, own]))
        expected = oblique_factors(LowRank(), single, matrix, alone, rank, part).dense_matrix()
        assert torch.allclose(factors.dense_matrix()[own], expected, atol=1e-10)
        total += alone.tail[rank]
    assert curve.tail[rank] == pytest.approx(total, rel=1e-10)


def test_full_shrinkage_is_the_plain_form() -> None:
    gradients = rows(50, 12, 3)
    metric = OutputMetric.of(sketched(gradients).parts[0], shrinkage=1.0)
    value = rows(12, 5, 4)
    assert torch.allclose(metric.root(value) * 12**0.5, value, atol=1e-12)


@pytest.mark.parametrize("size", [None, 6])
def test_roots_are_inverse_to_each_other(size: int | None) -> None:
    gradients = rows(80, 12, 3)
    sketch = sketched(gradients, size=size).parts[0]
    metric = OutputMetric.of(sketch, shrinkage=0.05)
    value = rows(12, 5, 4)
    assert torch.allclose(metric.inverse_root(metric.root(value)), value, atol=1e-12)
    kept = sketch.matrix(centered=False) if size is not None else gradients
    assert torch.allclose(metric.gram(value), shrunk(kept, 0.05) @ value, atol=1e-12)
    assert torch.allclose(metric.scaled(2.0).gram(value), 4 * metric.gram(value), atol=1e-12)
    assert torch.allclose(metric.scaled(2.0).root(value), 2 * metric.root(value), atol=1e-12)


@pytest.mark.parametrize("form", [LowRank(), Channel()])
def test_few_rows_and_sketched_inputs_are_taken(form: OutputForm) -> None:
    site = linear(40, 36) if form.name == "lowrank" else conv(40, 4, 1)
    weight = rows(40, 36, 1, 0.0).reshape(site.shape)
    for inputs in (sketched(rows(5, 36, 2)), sketched(rows(100, 36, 2), size=32)):
        curve = double_sided(form, site, weight, inputs, sketched(rows(3, 40, 5)))
        assert curve.ranks == form.curve(site, weight, inputs).ranks
        factors = oblique_factors(form, site, weight, curve, curve.ranks[-1], inputs)
        assert bool(factors.dense_matrix().isfinite().all())
        assert list(curve.tail) == sorted(curve.tail, reverse=True)


def test_what_ranks_have_in_common_is_made_once_and_no_further_than_asked() -> None:
    site, form = conv(40, 4, 2), Channel()
    weight = rows(40, 36, 1, 0.0).reshape(site.shape)
    inputs = sketched(rows(300, 72, 2), 2)
    curve = double_sided(form, site, weight, inputs, sketched(rows(200, 40, 3), 2))
    alone = {}
    for rank in curve.ranks:
        alone[rank] = oblique_factors(form, site, weight, curve, rank, inputs).dense_matrix()
        curve.rest()
    for done, rank in ((2, 2), (9, 9), (9, 5)):
        found = oblique_factors(form, site, weight, curve, rank, inputs).dense_matrix()
        assert torch.allclose(found, alone[rank], rtol=0, atol=1e-12 * float(weight.abs().max()))
        assert [own.shape for own in curve.work["seen"]] == 2 * [(done, 36)]


def test_names_of_variants() -> None:
    for form, basis in (("lowrank", "gradient"), ("channel", "activation")):
        assert split_variant(variant(form, basis)) == (form, basis)
    assert variant("lowrank", "activation") == "lowrank"
