"""The re-gauge: its mathematics, and the plans that it buys."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_fx import Keep, LowRankModule, Refine, cost, load, optimize
from lowrank_fx.errors import OptionError, PlanError, TargetError
from lowrank_fx.forms import FORMS, Factors
from lowrank_fx.gauge import LARGEST, pivoted, regauge
from lowrank_fx.plan import Plan
from lowrank_fx.testing import assert_equivalent

ROUNDING = 2e-5
"""What ``LARGEST`` promises of float32."""


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def hostile(rank: int, width: int, outputs: int) -> Factors:
    """A pair of which every window of pivots is singular: all even inputs have the same column."""
    first = rows(rank, width)
    first[:, ::2] = first[:, :1]
    return Factors(first, rows(outputs, rank, seed=1), None)


# ---- the mathematics -------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(0, 99))
def test_the_product_stays(rank: int, more: int, outputs: int, seed: int) -> None:
    first, second = (
        rows(*shape, seed=seed + place, dtype=torch.float64)
        for place, shape in enumerate([(rank, rank + more), (outputs, rank)])
    )
    made = regauge(first, second, LARGEST[torch.float64])
    assert made.columns.shape == (rank, more)
    product, dense = made.second @ made.gauge.spread(made.columns), second @ first
    # 1e4 is the largest entry of C, 1e-16 a rounding, and sums have at most 24 products.
    assert float((product - dense).norm()) <= 1e-10 * float(second.norm() * first.norm())
    x = rows(2, 3, rank + more, dtype=torch.float64)
    bias = rows(outputs, dtype=torch.float64)
    computed = made.gauge.apply(x, made.columns, made.second, bias)
    torch.testing.assert_close(computed, F.linear(x, dense, bias), rtol=1e-8, atol=1e-8)


def test_the_better_end_is_chosen() -> None:
    first = rows(4, 20, dtype=torch.float64)
    first[:, 16:] *= 100.0  # pivots there make all other columns small
    made = regauge(first, rows(5, 4), 30.0)
    assert (made.gauge.start, made.gauge.order) == (16, None)
    assert float(made.columns.abs().max()) < 1.0
    assert regauge(first.flip(1), rows(5, 4), 30.0).gauge.start == 0


def test_a_window_in_the_middle_serves_where_both_ends_are_singular() -> None:
    first = rows(4, 20, dtype=torch.float64)
    first[:, :4], first[:, 16:] = first[:, :1], first[:, 16:17]
    made = regauge(first, rows(5, 4), 1e3)
    assert 0 < made.gauge.start < 16
    assert made.gauge.order is None
    torch.testing.assert_close(made.gauge.spread(made.columns), torch.linalg.solve(
        first[:, made.gauge.start : made.gauge.start + 4], first), rtol=1e-9, atol=1e-9)  # fmt: skip


def test_where_every_window_is_singular_inputs_are_gathered() -> None:
    pair = hostile(4, 24, 9)
    made = pair.regauged()
    assert made.gauge is not None
    assert made.gauge.order is not None
    order = made.gauge.order.tolist()
    assert made.gauge.start == 0
    assert sorted(order) == list(range(24))
    assert order[:4] == sorted(order[:4])
    assert sum(place % 2 == 0 for place in order[:4]) <= 1  # equal columns are no two pivots
    assert made.factor_in.shape == (4, 20)
    # Equal columns have equal entries, and with pivots chosen by size none is far above 1: .9 measured.
    assert float(made.factor_in.abs().max()) < 4.0
    torch.testing.assert_close(made.dense_matrix(), pair.dense_matrix(), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("independent", [0, 1, 3])
def test_factors_without_full_rank(independent: int) -> None:
    first = rows(4, 10, dtype=torch.float64)
    first[independent:] = 2.0 * first[:1] if independent else 0.0
    pair = Factors(first, rows(6, 4, dtype=torch.float64), None)
    made = pair.regauged()
    torch.testing.assert_close(made.dense_matrix(), pair.dense_matrix(), rtol=1e-9, atol=1e-9)
    assert bool(made.factor_in.isfinite().all())


def test_pivots_are_independent() -> None:
    basis = torch.linalg.qr(rows(30, 6, dtype=torch.float64)).Q.T
    order = pivoted(basis)
    assert sorted(order.tolist()) == list(range(30))
    assert float(torch.linalg.cond(basis[:, order[:6]])) < 20.0  # 2.3 measured; of the first six columns 168


def test_rounding_stays_near_that_of_the_pair() -> None:
    """A layer of real size."""
    first, second, x = rows(96, 384), torch.linalg.qr(rows(384, 96, seed=1)).Q, rows(64, 384, seed=2)
    made = Factors(first, second.contiguous(), None).regauged()
    assert made.gauge is not None
    true = x.double() @ (second.double() @ first.double()).T
    computed = made.gauge.apply(x, made.factor_in, made.factor_out, None).double()
    assert float((computed - true).norm() / true.norm()) < ROUNDING  # 2.8e-6 measured, 3.9e-7 of the pair


def test_scaled_and_counted() -> None:
    pair = Factors(rows(3, 8), rows(5, 3), None)
    made, scale = pair.regauged(), rows(5, seed=4, dtype=torch.float64)
    torch.testing.assert_close(
        made.scaled(scale, None).dense_matrix(), scale[:, None] * pair.dense_matrix(), rtol=ROUNDING, atol=ROUNDING
    )
    assert made.rank == 3
    assert sum(tensor.numel() for tensor in made.tensors.values()) == cost.regauged_params(5, 8, 3) == 3 * (5 + 8 - 3)
    assert cost.regauged_flops(5, 8, 3, 7) == 2 * 7 * 30


@pytest.mark.parametrize(("shape", "step"), [((6, 9), 1), ((384, 384), 8), ((1536, 384), 8), ((2, 2), 1)])
def test_every_rank_on_offer_saves_numbers(shape: tuple[int, int], step: int) -> None:
    below, beyond = cost.candidate_ranks(*shape, 8), cost.ranks_beyond(*shape, 8)
    assert [*below, *beyond] == list(range(step, min(shape), step))
    assert all(cost.regauged_params(*shape, rank) < shape[0] * shape[1] for rank in (*below, *beyond))
    assert all(cost.pair_params(*shape, rank) >= shape[0] * shape[1] for rank in beyond)


# ---- whole models ----------------------------------------------------------------------------------------------------


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    sizes, layers = (24, 32, 40, 16), []
    for number, (width, outputs) in enumerate(itertools.pairwise(sizes)):
        layer = nn.Linear(width, outputs)
        with torch.no_grad():
            layer.weight.copy_(rows(outputs, width, seed=number) / width**0.5)
            layer.bias.copy_(rows(outputs, seed=number))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype).eval()


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    mix = rows(24, 24, seed=7) * torch.logspace(0, -1, 24)
    return [(rows(32, 3, 24, seed=number) @ mix).to(dtype) for number in range(20, 26)]


@functools.cache
def optimized(way: Any, target: Keep) -> LowRankModule:
    return optimize(mlp(), batches(), target=target, capture=way, compile=False, progress=False)


HALF = Keep(params=0.6, of="sites")


@pytest.mark.parametrize("way", ["export", "modules"])
def test_it_buys_ranks_and_accuracy(way: str) -> None:
    plain, made = optimized(way, HALF), optimized(way, replace(HALF, regauge=True))
    plan = made.plan
    assert plan.error < 0.9 * plain.plan.error
    assert plan.totals.site_params[1] <= 0.6 * plan.totals.site_params[0]
    assert sum(parameter.numel() for parameter in made.parameters()) == plan.totals.model_params[1]
    for site in plan.factored:
        assert site.pivots is not None
        assert site.rank is not None
        assert site.params[1] == cost.regauged_params(site.out_features, site.in_features, site.rank)
    assert all(site.pivots is None for site in plain.plan.sites)
    # What came back computes what the plan says of it: the error is measured on the module itself.
    held_out = made.session.calibration.report_batches if made.session is not None else []
    missed = wanted = 0.0
    with torch.no_grad():
        for batch in held_out:
            reference = batch.reference[0]
            missed += float((made(*batch.call.args) - reference).double().square().sum())
            wanted += float(reference.double().square().sum())
    assert (missed / wanted) ** 0.5 == pytest.approx(plan.error, rel=1e-4)


def test_ranks_beyond_break_even_are_chosen() -> None:
    """Where much is kept, a plain plan leaves layers dense; a re-gauged one takes a little from each."""
    plain, made = (
        optimized("export", HALF).replan(Keep(params=0.85, of="sites", regauge=own)) for own in (False, True)
    )
    ranks = [(site.rank or 0, site.out_features, site.in_features) for site in made.plan.factored]
    assert any(rank > cost.break_even_rank(*shape) for rank, *shape in ranks)
    assert made.plan.error < 0.9 * plain.plan.error
    assert sum(parameter.numel() for parameter in made.parameters()) == made.plan.totals.model_params[1]


@pytest.mark.parametrize("way", ["export", "modules"])
def test_saved_loaded_folded_and_planned_again(way: str, tmp_path: Path) -> None:
    made, x = optimized(way, replace(HALF, regauge=True)), batches()[0]
    made.save(tmp_path)
    loaded = load(mlp(), tmp_path, compile=False)
    assert loaded.plan == made.plan
    assert torch.equal(loaded(x), made(x))
    assert_equivalent(made.fold(), made, (x,), rtol=ROUNDING)
    assert Plan.from_json(made.plan.to_json()).to_json() == made.plan.to_json()
    again = made.replan(replace(HALF, regauge=True))
    assert again.plan.to_json() == made.plan.to_json()
    assert made.replan(HALF).plan.to_json() == optimized(way, HALF).plan.to_json()


@pytest.mark.parametrize("way", ["export", "modules"])
def test_gathered_inputs_are_saved_too(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LARGEST, torch.float32, 1e-3)  # no window is that good
    made = optimized(way, HALF).replan(replace(HALF, regauge=True))
    assert all(site.gathered and site.pivots == 0 for site in made.plan.factored)
    assert any("gather their inputs" in note for note in made.plan.notes)
    made.save(tmp_path)
    x = batches()[0]
    loaded = load(mlp(), tmp_path, compile=False)
    assert torch.equal(loaded(x), made(x))
    made.fold().save(tmp_path)
    assert torch.equal(load(mlp(), tmp_path, compile=False)(x), made.fold()(x))
    assert sum(parameter.numel() for parameter in made.parameters()) == made.plan.totals.model_params[1]


def test_a_stand_in_offers_its_weight() -> None:
    made = optimized("modules", replace(HALF, regauge=True))
    layer = next(module for module in made.modules() if isinstance(module, nn.Linear) and hasattr(module, "pivots"))
    site = next(site for site in made.plan.factored if site.rank == layer.get_parameter("factor_out").shape[1])
    assert layer.weight.shape == (site.out_features, site.in_features)
    assert f"-> {site.rank} ->" in repr(layer)
    x = rows(5, site.in_features)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=ROUNDING, atol=ROUNDING)
    ragged = torch.nested.nested_tensor([rows(2, site.in_features), rows(3, site.in_features)], layout=torch.jagged)
    for part, own in zip(layer(ragged).unbind(), ragged.unbind(), strict=True):
        torch.testing.assert_close(part, layer(own), rtol=ROUNDING, atol=ROUNDING)


def test_it_is_refined_as_any_pair() -> None:
    start = optimized("export", replace(HALF, regauge=True))
    made = start.replan(replace(HALF, regauge=True), refine=Refine(steps=30, lr=1e-3))
    assert made.plan.select_error < start.plan.select_error
    assert [site.rank for site in made.plan.sites] == [site.rank for site in start.plan.sites]
    assert sum(parameter.numel() for parameter in made.parameters()) == made.plan.totals.model_params[1]


def test_half_precision_stays_a_pair() -> None:
    made = optimize(
        mlp(torch.bfloat16), batches(torch.bfloat16), target=replace(HALF, regauge=True), compile=False, progress=False
    )
    assert made.plan.factored
    assert all(site.pivots is None for site in made.plan.sites)
    assert any("stayed plain pairs: only linear layers in float32 or float64" in note for note in made.plan.notes)


@pytest.mark.parametrize("basis", ["activation", "gradient"])
def test_ranks_beyond_break_even_are_on_the_curve(basis: str) -> None:
    session = optimized("export", HALF).session
    assert session is not None
    for entry in session.curves.values():
        curve = entry.forms["lowrank" if basis == "activation" else "lowrank@gradient"]
        shape = (entry.site.out_features, entry.site.in_features)
        assert curve.ranks == FORMS["lowrank"].ranks(entry.site)
        assert (*curve.ranks, *curve.beyond) == tuple(range(1, min(shape)))
        errors = [curve.error(rank) for rank in (*curve.ranks, *curve.beyond)]
        assert errors == sorted(errors, reverse=True)
        # A pair of nearly full rank leaves out one direction.
        name = "lowrank" if basis == "activation" else "lowrank@gradient"
        residual = entry.site.matrix(entry.weight.detach()).double() - entry.factors(name, curve.largest).dense_matrix()
        values = torch.linalg.svdvals(residual)
        assert float(values[1:].max()) < 1e-5 * float(values[0])


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_targets() -> None:
    with pytest.raises(TargetError, match=r"Keep\(flops=0.5, regauge=True\): .* use it with params="):
        Keep(flops=0.5, regauge=True)
    with pytest.raises(TargetError, match=r"Keep\(regauge='yes'\): give True or False"):
        Keep(params=0.5, regauge="yes")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="cannot be reached: the smallest reachable is params="):
        optimized("export", HALF).replan(Keep(params=0.001, of="sites", regauge=True))


def test_bad_command_line() -> None:
    from lowrank_fx.cli_options import chosen_target

    with pytest.raises(OptionError, match="--regauge saves parameters; use it with --keep-params"):
        chosen_target(tolerance=None, params=None, flops=0.5, regauge=True)
    target = chosen_target(tolerance=None, params=0.5, flops=None, regauge=True)
    assert target == Keep(params=0.5, regauge=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pivots": None, "gathered": True}, "its inputs are gathered, yet it has no pivots"),
        ({"pivots": 1000}, "pivots at 1000 are not those of a pair, between 0 and "),
        ({"form": "channel"}, "are not those of a pair"),
        ({"pivots": "0"}, "is '0', which is no "),
    ],
)
def test_bad_plans(change: dict[str, Any], message: str) -> None:
    data = json.loads(optimized("export", replace(HALF, regauge=True)).plan.to_json())
    data["sites"][0].update(change)
    with pytest.raises(PlanError, match=message):
        Plan.from_json(json.dumps(data))
