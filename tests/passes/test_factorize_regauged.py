"""Linear layers replaced by re-gauged pairs, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx import cost
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Factors
from lowrank_fx.gauge import Gauge
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager, Refusal
from lowrank_fx.passes.edit import call_node
from lowrank_fx.passes.factorize_linear import FactorizeLinear
from lowrank_fx.passes.factorize_regauged import FactorizeRegauged
from lowrank_fx.passes.fold_factors import FoldFactors
from lowrank_fx.sites import Site
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

aten = torch.ops.aten

ROUNDING = 2e-6
"""Sums of at most 8 products, and pivots whose C has no large entries: 2e-7 measured."""


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Layer(nn.Module):
    """A linear layer in front of something else, with or without a bias, and called once or twice."""

    def __init__(self, bias: bool = True, twice: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6, bias=bias)
        with torch.no_grad():
            self.up.weight.copy_(rows(6, 6, seed=5))
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x)
        return self.up(y.relu()) if self.twice else y.relu()


class Stored(nn.Module):
    """A weight that is stored ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(rows(6, 8)), nn.Parameter(rows(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x, self.w) if x.dim() == 2 else x @ self.w


def pair_of(site: Site, weight: Tensor, gauge: Gauge | None, rank: int = 5) -> Factors:
    """The best pair of a rank, re-gauged with given pivots or those that are chosen."""
    left, values, right = torch.linalg.svd(site.matrix(weight.detach()).double(), full_matrices=False)
    first, second = (values[:, None] * right)[:rank], left[:, :rank]
    plain = Factors(first.to(weight.dtype), second.to(weight.dtype).contiguous(), None)
    if gauge is None:
        return plain.regauged()
    places = torch.arange(first.shape[1]) if gauge.order is None else gauge.order
    place = places[gauge.start : gauge.start + rank]
    rest = torch.cat((places[: gauge.start], places[gauge.start + rank :]))
    columns, out = torch.linalg.solve(first[:, place], first[:, rest]), second @ first[:, place]
    return Factors(columns.to(weight.dtype), out.to(weight.dtype).contiguous(), None, gauge=gauge)


def graph_of(model: nn.Module, x: Tensor) -> GraphModule:
    gm = capture(model, Call((x,), {})).graph_module
    gm.graph.eliminate_dead_code()
    return gm


def regauged(model: nn.Module, x: Tensor, gauge: Gauge | None, rank: int) -> tuple[GraphModule, nn.Module, Site]:
    """A graph with its layer re-gauged, a model whose layer has the same low rank, and the site."""
    gm = graph_of(model, x)
    (site,) = find_sites(gm).sites
    factors = pair_of(site, gm.get_parameter(site.weight), gauge, rank)
    with torch.no_grad():
        model.get_parameter(site.weight).copy_(site.unmatrix(factors.dense_matrix()))
    result = run_pass(gm, FactorizeRegauged({site.name: (site, factors)}), (x,), tolerance=ROUNDING)
    assert result.changes == (f"{site.name} {site.out_features} x 6 factored at rank {rank}, re-gauged",)
    return gm, model, site


ORDERED = Gauge(0, torch.tensor([1, 4, 0, 2, 3, 5]))

MIDDLE = """\
%x = input
%up_factor_in = get[up.factor_in]
%up_factor_out = get[up.factor_out]
%reshape = reshape(%x, [-1, 6])
%slice_1 = slice.Tensor(%reshape, 1, 1, 3)
%t = t(%up_factor_in)
%slice_2 = slice.Tensor(%reshape, 1, 0, 1)
%slice_3 = slice.Tensor(%t, 0, 0, 1)
%addmm = addmm(%slice_1, %slice_2, %slice_3)
%slice_4 = slice.Tensor(%reshape, 1, 3, 6)
%slice_5 = slice.Tensor(%t, 0, 1, 4)
%addmm_1 = addmm(%addmm, %slice_4, %slice_5)
%linear_1 = linear(%addmm_1, %up_factor_out)
%sym_size = sym_size.int(%x, 0)
%sym_size_1 = sym_size.int(%x, 1)
%linear = view(%linear_1, [%sym_size, %sym_size_1, 6])
%relu = relu(%linear)
return (%relu,)"""

GATHERED = """\
%x = input
%up_factor_in = get[up.factor_in]
%up_factor_out = get[up.factor_out]
%up_gauge_order = get[up.gauge_order]
%index_select = index_select(%x, -1, %up_gauge_order)
%slice_1 = slice.Tensor(%index_select, 1, 0, 2)
%t = t(%up_factor_in)
%slice_2 = slice.Tensor(%index_select, 1, 2, 6)
%addmm = addmm(%slice_1, %slice_2, %t)
%linear = linear(%addmm, %up_factor_out)
%relu = relu(%linear)
return (%relu,)"""


@pytest.mark.parametrize(("gauge", "shape", "golden"), [(Gauge(1), (4, 3, 6), MIDDLE), (ORDERED, (4, 6), GATHERED)])
def test_the_graph(gauge: Gauge, shape: tuple[int, ...], golden: str) -> None:
    gm, _, _ = regauged(Layer(bias=False), rows(*shape), gauge, 2)
    assert graph_text(gm) == golden


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 3, 6), (2, 3, 4, 6), (2, 1, 3, 2, 6)])
@pytest.mark.parametrize(("gauge", "rank"), [(Gauge(0), 2), (Gauge(4), 2), (Gauge(2), 3), (ORDERED, 2), (None, 5)])
def test_numbers_and_the_way_back(gauge: Gauge | None, rank: int, shape: tuple[int, ...]) -> None:
    x = rows(*shape)
    gm, model, site = regauged(Layer(), x, gauge, rank)
    assert_equivalent(gm, model, (x,), rtol=ROUNDING)
    if len(shape) > 1:  # the size of a batch is not part of the graph
        assert_equivalent(gm, model, (rows(7, *shape[1:], seed=3),), rtol=ROUNDING)
    numbers = sum(parameter.numel() for name, parameter in gm.named_parameters() if "factor" in name)
    assert numbers == cost.regauged_params(6, 6, rank)
    result = run_pass(gm, FoldFactors({site.name: site}), (x,), tolerance=ROUNDING)
    assert result.changes == ("up folded to 6 x 6",)
    assert set(gm.state_dict()) == {"up.weight", "up.bias"}
    torch.testing.assert_close(gm.get_parameter("up.weight"), model.get_parameter("up.weight"), rtol=0, atol=0)
    assert "linear(%x, %up_weight" in graph_text(gm)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6)])
def test_a_weight_that_is_stored_in_out(shape: tuple[int, ...]) -> None:
    gm, model, site = regauged(Stored(), rows(*shape), None, 3)
    assert_equivalent(gm, model, (rows(*shape, seed=2),), rtol=ROUNDING)
    run_pass(gm, FoldFactors({site.name: site}), (rows(*shape),), tolerance=ROUNDING)
    assert gm.get_parameter("w").shape == (6, 8)


@pytest.mark.parametrize("gauge", [Gauge(1), ORDERED])
def test_every_call_of_a_shared_weight(gauge: Gauge) -> None:
    x = rows(5, 3, 6)
    gm, model, site = regauged(Layer(twice=True), x, gauge, 2)
    assert len(site.calls) == 2
    assert_equivalent(gm, model, (x,), rtol=ROUNDING)
    result = run_pass(gm, FoldFactors({site.name: site}), (x,), tolerance=ROUNDING)
    assert result.rewrites == 1
    assert graph_text(gm).count("linear(") == 2


def test_near_misses() -> None:
    x = rows(4, 6)
    gm = graph_of(Layer(), x)
    (site,) = find_sites(gm).sites
    weight = gm.get_parameter(site.weight)
    plain = {site.name: (site, replace(pair_of(site, weight, Gauge(0)), gauge=None))}
    assert run_pass(gm, FactorizeRegauged(plain), (x,), tolerance=0).rewrites == 0
    own = {site.name: (site, pair_of(site, weight, None))}
    assert run_pass(gm, FactorizeLinear(own), (x,), tolerance=0).rewrites == 0
    lost = replace(site, calls=(replace(site.calls[0], node="nowhere"),))
    result = run_pass(gm, FactorizeRegauged({site.name: (lost, own["up"][1])}), (x,), tolerance=0)
    assert result.refusals == (Refusal("up", "the graph has no node 'nowhere'"),)


def test_a_fold_leaves_what_others_changed() -> None:
    x = rows(4, 6)
    gm, _, site = regauged(Layer(), x, Gauge(1), 2)
    (last,) = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    inner = last.args[0]
    last.update_arg(0, call_node(gm, aten.relu.default, (inner,), like=last, before=last))
    result = run_pass(gm, FoldFactors({site.name: site}), (x,), tolerance=0)
    assert result.refusals == (Refusal("up", "its factors are not applied one right after the other"),)


def test_verified_after_every_pass() -> None:
    """The rewriting stage as a whole, with the verifier on."""
    x = rows(4, 3, 6)
    gm = graph_of(Layer(), x)
    (site,) = find_sites(gm).sites
    pair = {site.name: (site, pair_of(site, gm.get_parameter(site.weight), None))}
    results = PassManager(order.rewriting(pair), verify=True).run(gm)
    assert {name: result.rewrites for name, result in results if result.rewrites} == {"factorize-regauged": 1}
