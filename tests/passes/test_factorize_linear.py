"""Linear layers replaced by pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Factors
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager, Refusal
from lowrank_fx.passes.factorize_linear import FactorizeLinear
from lowrank_fx.passes.verify import fake_mode_of, run_on_metas
from lowrank_fx.rewrite import factorize
from lowrank_fx.sites import Site, SiteCall
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

# A pair of full rank is the layer itself, but for two roundings to float32 and sums of at most 12 products: 4e-7
# measured.
ROUNDING = 2e-6

Factored = dict[str, tuple[Site, Factors]]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(model: nn.Module, *args: Tensor) -> GraphModule:
    return capture(model, Call(args, {})).graph_module


def factors_of(site: Site, weight: Tensor, rank: int | None = None, shift: Tensor | None = None) -> Factors:
    """A pair by plain SVD; of full rank it is the weight itself."""
    left, values, right = torch.linalg.svd(site.matrix(weight.detach()).double(), full_matrices=False)
    rank = rank or len(values)
    first, second = (values[:, None] * right)[:rank], left[:, :rank]
    return Factors(first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous(), shift)


def full(gm: GraphModule) -> Factored:
    return {
        site.name: (site, factors_of(site, gm.get_parameter(site.weight))) for site in find_sites(gm).sites
    }  # fmt: skip


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any], shape: tuple[int, ...], bias: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(rows(*shape))
        self.b = nn.Parameter(rows(bias))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 12)
        self.down = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.up(x).relu()) + x


GOLDEN = """\
%up_bias = get[up.bias]
%x = input
%up_factor_in = get[up.factor_in]
%up_factor_out = get[up.factor_out]
%linear_2 = linear(%x, %up_factor_in)
%linear = linear(%linear_2, %up_factor_out, %up_bias)
%relu = relu(%linear)
%down_factor_in = get[down.factor_in]
%down_factor_out = get[down.factor_out]
%linear_4 = linear(%relu, %down_factor_in)
%linear_1 = linear(%linear_4, %down_factor_out)
%add = add.Tensor(%linear_1, %x)
return (%add,)"""


def test_numbers_count_graph_and_names() -> None:
    model = Mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = rows(3, 5, 4)
    gm = graph_of(model, x)
    result = run_pass(gm, FactorizeLinear(full(gm)), (x,), tolerance=ROUNDING)
    assert result.changes == ("up 12 x 4 factored at rank 4", "down 4 x 12 factored at rank 4")
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    assert set(gm.state_dict()) == {"up.bias", "up.factor_in", "up.factor_out", "down.factor_in", "down.factor_out"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_equivalent(gm, model, (rows(1, 7, 4),), rtol=ROUNDING)


def test_new_nodes_say_where_they_come_from() -> None:
    gm = graph_of(Mlp(), rows(3, 4))
    before = {node.name: node.meta["nn_module_stack"] for node in gm.graph.nodes if node.op == "call_function"}
    PassManager([FactorizeLinear(full(gm))], verify=True).run(gm)
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and "linear" in node.name]
    assert [node.meta["nn_module_stack"] for node in calls[:2]] == [before["linear"]] * 2
    assert [tuple(node.meta["val"].shape)[1] for node in calls] == [4, 12, 4, 4]
    assert all(isinstance(node.meta["val"].shape[0], torch.SymInt) for node in calls)


WAYS: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...], tuple[int, ...], str]] = {
    "linear": (lambda m, x: F.linear(x, m.w, m.b), (3, 4), (6, 4), "%linear = linear(%linear_1, %w_factor_out, %b)"),
    "linear 4-D": (
        lambda m, x: F.linear(x, m.w, m.b), (3, 2, 5, 4), (6, 4), "%linear = linear(%linear_1, %w_factor_out, %b)"
    ),
    "addmm": (
        lambda m, x: torch.addmm(m.b, x, m.w), (3, 4), (4, 6), "%addmm = linear(%linear, %w_factor_out, %b)"
    ),
    "mm": (lambda m, x: torch.mm(x, m.w), (3, 4), (4, 6), "%mm = linear(%linear, %w_factor_out)"),
    "matmul": (lambda m, x: x @ m.w, (3, 5, 4), (4, 6), "%matmul = linear(%linear, %w_factor_out)"),
    "x @ w.t()": (lambda m, x: x @ m.w.t(), (3, 5, 4), (6, 4), "%matmul = linear(%linear, %w_factor_out)"),
    "linear of w.t()": (
        lambda m, x: F.linear(x, m.w.t(), m.b), (3, 5, 4), (4, 6), "%linear = linear(%linear_1, %w_factor_out, %b)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_write_a_linear_layer(name: str) -> None:
    function, shape, weight, line = WAYS[name]
    model, x = Apply(function, weight), rows(*shape)
    gm = graph_of(model, x)
    result = run_pass(gm, FactorizeLinear(full(gm)), (x,), tolerance=ROUNDING)
    assert result.changes == ("w 6 x 4 factored at rank 4",)
    assert graph_text(gm).splitlines()[-2:] == [line, f"return (%{line.split()[0][1:]},)"]
    assert {name for name in gm.state_dict() if "w" in name} == {"w_factor_in", "w_factor_out"}
    assert_equivalent(gm, model, (rows(7, *shape[1:], seed=1),), rtol=ROUNDING)


@pytest.mark.parametrize("name", [*WAYS, "transposed"])
def test_what_is_said_of_new_nodes_is_what_the_operators_give(name: str) -> None:
    turned = lambda m, x: F.linear(x.transpose(0, 1), m.w, m.b)  # noqa: E731
    function, shape, weight, _ = WAYS.get(name, (turned, (3, 5, 4), (6, 4), ""))
    gm = graph_of(Apply(function, weight), rows(*shape))
    PassManager([FactorizeLinear(full(gm))]).run(gm)
    made = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert len(made) == 2
    for node in made:
        said = node.meta["val"]
        true = run_on_metas(fake_mode_of(gm), node.target, node.args, node.kwargs, new_guards=False)
        assert (said.shape, said.stride(), said.dtype, said.device) == (
            true.shape, true.stride(), true.dtype, true.device
        )  # fmt: skip
        assert not said.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = Mlp().to(dtype), rows(3, 4).to(dtype)
    gm = graph_of(model, x)
    # Six roundings in a row, each half a unit in the last place: 3 units at most.
    result = run_pass(gm, FactorizeLinear(full(gm)), (x,), tolerance=6 * torch.finfo(dtype).eps)
    assert result.rewrites == 2
    assert {parameter.dtype for parameter in gm.parameters()} == {dtype}


def test_the_bias_takes_up_the_shift_and_the_users_bias_does_not() -> None:
    model, x = Mlp(), rows(3, 4)
    gm = graph_of(model, x)
    before = model.up.bias.detach().clone()
    site = find_sites(gm).sites[0]
    shift = torch.linspace(-1, 1, 12, dtype=torch.float64) / 3
    factors = factors_of(site, model.up.weight, 2, shift)
    PassManager([FactorizeLinear({"up": (site, factors)})], verify=True).run(gm)
    assert torch.equal(gm.get_parameter("up.bias"), (before.double() + shift).float())
    assert torch.equal(model.up.bias, before)
    product = (factors.factor_out.double() @ factors.factor_in.double()).float()
    expected = F.linear(F.linear(x, product, before + shift.float()).relu(), model.down.weight) + x
    torch.testing.assert_close(gm(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [lambda m, x: m.up(m.up(x).relu()), lambda m, x: m.up(x) + m.other(x).sin()])
def test_every_call_of_a_shared_weight_is_replaced(way: Callable[..., Any]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)
            self.other = nn.Linear(4, 4)
            self.other.weight = self.up.weight

        def forward(self, x: Tensor) -> Any:
            return way(self, x)

    model, x = Shared(), rows(3, 4)
    gm = graph_of(model, x)
    factored = full(gm)
    (site, factors) = next(iter(factored.values()))
    assert len(site.calls) == 2
    shift = torch.arange(4, dtype=torch.float64)
    biases = {call.bias: gm.get_parameter(str(call.bias)).detach().clone() for call in site.calls}
    result = run_pass(gm, FactorizeLinear(factored), (x,), tolerance=ROUNDING)
    assert result.rewrites == 1
    assert not any(name.endswith("weight") for name in gm.state_dict())
    applied = [line for line in graph_text(gm).splitlines() if " = linear(" in line]
    assert ["factor_in" in line for line in applied] == [True, False, True, False]
    # Each bias moves once, however many calls read it.
    moved = graph_of(model, x)
    PassManager([FactorizeLinear({site.name: (site, replace(factors, shift=shift))})], verify=True).run(moved)
    for name, bias in biases.items():
        torch.testing.assert_close(moved.get_parameter(str(name)), bias + shift.float(), rtol=1e-6, atol=1e-6)


def test_gradients_are_asked_for_where_they_were() -> None:
    model, x = Mlp(), rows(3, 4)
    model.up.requires_grad_(False)
    gm = graph_of(model, x)
    run_pass(gm, FactorizeLinear(full(gm)), (x,), tolerance=ROUNDING)
    assert {name: parameter.requires_grad for name, parameter in gm.named_parameters()} == {
        "up.bias": False, "up.factor_in": False, "up.factor_out": False,
        "down.factor_in": True, "down.factor_out": True,
    }  # fmt: skip
    gm(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in gm.parameters() if p.requires_grad)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_not_asked_for_is_left_alone() -> None:
    x = rows(3, 4)
    gm = graph_of(Mlp(), x)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    site, factors = full(gm)["up"]
    gone = replace(site, name="gone", calls=(*site.calls, SiteCall("linear_9", "x", None)))
    conv = replace(site, kind="conv2d")
    for factored, refusals in (
        ({}, ()),
        ({"conv": (conv, factors)}, ()),
        ({"gone": (gone, factors)}, (Refusal("gone", "the graph has no node 'linear_9'"),)),
    ):
        result = run_pass(gm, FactorizeLinear(factored), (x,), tolerance=0.0)
        assert result.changes == ()
        assert result.refusals == refusals
        assert graph_text(gm) == text


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_max_rewrites_bisects(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", str(limit))
    x = rows(3, 4)
    gm = graph_of(Mlp(), x)
    result = run_pass(gm, FactorizeLinear(full(gm)), (x,), tolerance=ROUNDING)
    assert [change.split()[0] for change in result.changes] == ["up", "down"][:limit]
    assert result.refusals == tuple(
        Refusal(name, f"LOWRANK_FX_MAX_REWRITES={limit} is used up") for name in ["up", "down"][limit:]
    )
    assert sum("factor_in" in name for name in gm.state_dict()) == limit


@pytest.mark.parametrize("clone", [True, False])
def test_a_rewrite_leaves_the_captured_graph_as_it_was(clone: bool) -> None:
    model, x = Mlp(), rows(3, 4)
    gm = graph_of(model, x)
    PassManager(order.cleanup()).run(gm)
    text, factored = graph_text(gm), full(gm)
    rewritten = factorize(gm, {"up": factored["up"]}, clone=clone)
    assert graph_text(gm) == text
    assert_equivalent(gm, model, (x,), rtol=0.0)
    assert_equivalent(rewritten, model, (x,), rtol=ROUNDING)
    shared = {id(parameter) for parameter in rewritten.parameters()} & {id(p) for p in model.parameters()}
    assert bool(shared) is not clone
