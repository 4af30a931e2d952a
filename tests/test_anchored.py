"""Moments of paired rows, and the ridge regression they give: against dense float64 computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowrank_fx.anchored import RIDGES, Moments, PairSum, anchored_weight, choose_ridge, crossed
from lowrank_fx.grouped_sketch import make_sketch

GROUPS, WIDTH, FEATURES = 2, 5, 6


def pairs(seed: int, rows: int = 400, noise: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, wanted outputs, and the weight (of two groups) that gives them up to noise and a constant."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    inputs = torch.randn(rows, GROUPS * WIDTH, generator=generator, dtype=torch.float64) + 2.0
    outputs = apply(truth, inputs) + 0.7
    return inputs, outputs + noise * torch.randn(outputs.shape, generator=generator, dtype=torch.float64), truth


def apply(weight: Tensor, rows: Tensor) -> Tensor:
    blocks = zip(weight.chunk(GROUPS), rows.chunk(GROUPS, 1), strict=True)
    return torch.cat([own @ block.T for block, own in blocks], 1)


def moments(inputs: Tensor, outputs: Tensor) -> Moments:
    total = PairSum(make_sketch(inputs.shape[1], GROUPS))
    assert total.moments() is None
    for own, wanted in zip(torch.split(inputs, 150), torch.split(outputs, 150), strict=True):
        total.sketch.update(own)
        total.add(own, wanted)
    total.add(inputs[:0], outputs[:0])
    made = total.moments()
    assert made is not None
    return made


def test_moments_merge_and_are_those_of_all_rows() -> None:
    one, two = pairs(1), pairs(2, rows=170)
    joint = moments(one[0], one[1]).merged(moments(two[0], two[1]))
    inputs, outputs = torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]])
    whole = moments(inputs, outputs)
    weight = torch.randn(FEATURES, WIDTH, dtype=torch.float64)
    rest = outputs - apply(weight, inputs)
    for made in (joint, whole):
        assert made.rows == 570
        # Everything is in float64; the largest sums have about 1e4 terms.
        assert torch.allclose(made.offset(weight), rest.mean(0), atol=1e-12)
        for found, own, centre in ((made, rest - rest.mean(0), inputs.mean(0)), (made.about_zero(), rest, 0)):
            parts = zip(own.chunk(GROUPS, 1), (inputs - centre).chunk(GROUPS, 1), strict=True)
            direct = torch.cat([left.T @ into for left, into in parts])
            assert torch.allclose(found.unexplained(weight), direct, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1.0), (torch.float16, 300.0)])
def test_rows_in_half_precision_are_summed_in_more(dtype: torch.dtype, scale: float) -> None:
    inputs, outputs, truth = pairs(3)
    inputs, outputs = (scale * inputs).to(dtype), (scale * outputs).to(dtype)
    found, expected = moments(inputs, outputs), moments(inputs.double(), outputs.double())
    off = found.unexplained(truth) - expected.unexplained(truth)
    # Products in bfloat16 would be off by a hundredth, and those of large rows in float16 infinite.
    assert float(off.norm()) < 1e-4 * float(expected.unexplained(torch.zeros_like(truth)).norm())


@pytest.mark.parametrize("centered", [True, False])
def test_what_a_fit_to_one_half_does_to_the_other(centered: bool) -> None:
    data = [pairs(seed) for seed in (1, 2)]
    halves = [moments(*own[:2]) if centered else moments(*own[:2]).about_zero() for own in data]
    weight = data[0][2] + 0.1
    direct = 0.0
    for fitted, (inputs, outputs, _) in zip(halves, reversed(data), strict=True):
        for matrix, sign in ((weight, -1), (anchored_weight(fitted, weight, 0.1), 1)):
            constant = fitted.offset(matrix) if centered else 0.0
            direct += sign * float((outputs - apply(matrix, inputs) - constant).square().sum())
    left = [half.unexplained(weight) for half in halves]
    assert crossed(halves, left, weight, 0.1) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("ridge", [1e-5, 1e-2, 1.0])
def test_the_weight_satisfies_the_normal_equations(centered: bool, ridge: float) -> None:
    inputs, outputs, truth = pairs(3)
    made = moments(inputs, outputs)
    weight = torch.randn(truth.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = anchored_weight(made if centered else made.about_zero(), weight, ridge)
    rows, wanted = (each - each.mean(0) if centered else each for each in (inputs, outputs))
    for own, aim, block, start in zip(
        rows.chunk(GROUPS, 1), wanted.chunk(GROUPS, 1), found.chunk(GROUPS), weight.chunk(GROUPS), strict=True
    ):
        gram = own.T @ own
        share = ridge * gram.trace() / WIDTH
        gradient = (block @ own.T - aim.T) @ own + share * (block - start)
        assert float(gradient.abs().max()) < 1e-9 * float(gram.trace())


def test_a_singular_gram_leaves_what_no_row_shows() -> None:
    inputs, _, truth = pairs(4)
    inputs[:, [1, WIDTH + 1]] = 0
    weight = truth + 1
    found = anchored_weight(moments(inputs, apply(truth, inputs)), weight, 1e-5)
    assert torch.allclose(found[:, 1], weight[:, 1], atol=1e-9)
    others = [0, 2, 3, 4]
    # The ridge keeps this share of the way (measured: 9e-6).
    assert torch.allclose(found[:, others], truth[:, others], atol=1e-4)
    nothing = anchored_weight(moments(torch.zeros_like(inputs), apply(truth, inputs)), weight, 1e-5)
    assert torch.equal(nothing, weight)


@pytest.mark.parametrize("centered", [True, False])
def test_the_halves_have_to_confirm_each_other(centered: bool) -> None:
    halves = [moments(*pairs(seed)[:2]) for seed in (5, 6)]
    truth = pairs(5)[2]
    # The truth may be learnt from either half; what fits noise alone is refused.
    assert choose_ridge(halves, truth + 1, centered=centered) == RIDGES[0]
    few = [moments(*pairs(seed, rows=4, noise=5.0)[:2]) for seed in (7, 8)]
    assert math.isinf(choose_ridge(few, truth, centered=centered))
    assert torch.equal(anchored_weight(few[0], truth, math.inf), truth)
