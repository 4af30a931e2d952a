"""Factored pairs folded back into dense operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Channel, Factors, LowRank
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager, Refusal
from lowrank_fx.passes.edit import call_node
from lowrank_fx.passes.fold_factors import FoldFactors
from lowrank_fx.rewrite import factorize, fold
from lowrank_fx.sites import Site
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

aten = torch.ops.aten

# A fold is exact but for one rounding of the product and another order of summation of at most 45 products: 4e-7
# measured.
ROUNDING = 3e-6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def factors_of(site: Site, weight: Tensor, rank: int) -> Factors:
    """A pair by plain SVD of each group's matrix."""
    first, second = [], []
    for block in site.matrix(weight.detach()).double().chunk(site.groups):
        left, values, right = torch.linalg.svd(block, full_matrices=False)
        first.append((values[:, None] * right)[:rank])
        second.append(left[:, :rank])
    form = Channel() if site.patch is not None else LowRank()
    return form.assemble(site, torch.cat(first).to(weight.dtype), torch.cat(second).to(weight.dtype), None)


def graph_of(model: nn.Module, x: Tensor) -> GraphModule:
    gm = capture(model, Call((x,), {})).graph_module
    gm.graph.eliminate_dead_code()
    return gm


def factored(model: nn.Module, x: Tensor, rank: int = 2) -> tuple[GraphModule, dict[str, Site]]:
    """The model with every site factored, and its sites."""
    gm = graph_of(model, x)
    sites = find_sites(gm).sites
    pairs = {site.name: (site, factors_of(site, gm.get_parameter(site.weight), rank)) for site in sites}
    PassManager(order.rewriting(pairs), verify=True).run(gm)
    return gm, {site.name: site for site in sites}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2))
        self.same = nn.Conv2d(4, 4, 3, padding="same", bias=False)
        self.head = nn.Linear(4, 6)
        self.last = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.head(self.same(self.conv(x)).mean((2, 3))).relu())


GOLDEN = """\
%conv_bias = get[conv.bias]
%head_bias = get[head.bias]
%x = input
%conv_weight_1 = get[conv.weight]
%conv2d = conv2d(%x, %conv_weight_1, %conv_bias, [2, 2], [1, 2], [1, 2])
%same_weight_1 = get[same.weight]
%conv2d_1 = conv2d.padding(%conv2d, %same_weight_1, None, [1, 1], 'same')
%mean = mean.dim(%conv2d_1, [2, 3])
%head_weight_1 = get[head.weight]
%linear = linear(%mean, %head_weight_1, %head_bias)
%relu = relu(%linear)
%last_weight_1 = get[last.weight]
%linear_1 = linear(%relu, %last_weight_1)
return (%linear_1,)"""


def test_numbers_count_graph_and_names() -> None:
    x = rows(2, 3, 9, 9)
    model = Model()
    gm, sites = factored(model, x)
    products = {
        name: site.unmatrix(
            gm.get_parameter(f"{name}.factor_out").flatten(1).double()
            @ gm.get_parameter(f"{name}.factor_in").flatten(1).double()
        ).float()
        for name, site in sites.items()
    }
    result = run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert result.changes == (
        "conv folded to 4 x 45", "same folded to 4 x 36", "head folded to 6 x 4", "last folded to 5 x 6",
    )  # fmt: skip
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    assert {name: tuple(tensor.shape) for name, tensor in gm.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    for name, product in products.items():
        assert torch.equal(gm.get_parameter(f"{name}.weight"), product)
    assert gm(rows(5, 3, 9, 9)).shape == (5, 5)


def test_a_fold_of_full_rank_is_the_model_again() -> None:
    x, model = rows(2, 3, 9, 9), Model()
    original = graph_text(graph_of(model, x))
    gm, sites = factored(model, x, rank=100)
    run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert_equivalent(gm, model, (rows(3, 3, 9, 9, seed=1),), rtol=ROUNDING)
    # The same operators on the same nodes: only where the weights are read has moved.
    folded = graph_text(gm).replace("_weight_1", "_weight")
    calls = [[line for line in text.splitlines() if "get[" not in line] for text in (folded, original)]
    assert calls[0] == calls[1]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(gm.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


class Apply(nn.Module):
    def __init__(self, function: Callable[..., Any], shape: tuple[int, ...] = (4, 6)) -> None:
        super().__init__()
        self.w = nn.Parameter(rows(*shape))
        self.b = nn.Parameter(rows(6))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


LAYOUTS: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...], tuple[int, ...], str]] = {
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (3, 4), (4, 6), "%addmm = addmm(%b, %x, %w_1)"),
    "mm": (lambda m, x: torch.mm(x, m.w), (3, 4), (4, 6), "%mm = matmul(%x, %w_1)"),
    "matmul": (lambda m, x: x @ m.w, (3, 5, 4), (4, 6), "%matmul = matmul(%x, %w_1)"),
    "x @ w.t()": (lambda m, x: x @ m.w.t(), (3, 5, 4), (6, 4), "%matmul = linear(%x, %w_1)"),
    "linear of w.t()": (lambda m, x: F.linear(x, m.w.t(), m.b), (3, 5, 4), (4, 6), "%linear = linear(%x, %t_1, %b)"),
    "linear of w.t(), 2-D": (lambda m, x: F.linear(x, m.w.t(), m.b), (3, 4), (4, 6), "%linear = addmm(%b, %x, %w_1)"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_weight_keeps_its_own_layout(name: str) -> None:
    function, shape, weight, line = LAYOUTS[name]
    model, x = Apply(function, weight), rows(*shape)
    gm, sites = factored(model, x, rank=4)
    result = run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert result.changes == ("w folded to 6 x 4",)
    assert line in graph_text(gm).splitlines()
    torch.testing.assert_close(gm.get_parameter("w"), model.w, rtol=1e-5, atol=1e-6)
    assert gm.get_parameter("w").is_contiguous()
    assert_equivalent(gm, model, (rows(7, *shape[1:], seed=1),), rtol=ROUNDING)


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(6, 4)), rows(3, 5, 4)  # type: ignore[no-untyped-call]
    gm, sites = factored(model, x, rank=4)
    run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert "addmm(" in graph_text(gm)
    assert {name: tuple(tensor.shape) for name, tensor in gm.state_dict().items()} == {
        "0.weight": (4, 6), "0.bias": (6,),
    }  # fmt: skip


def test_a_shared_pair_is_folded_at_every_call() -> None:
    x = rows(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    gm, sites = factored(model, x)
    assert len(next(iter(sites.values())).calls) == 2
    result = run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert result.rewrites == 1
    assert sum(" = linear(" in line for line in graph_text(gm).splitlines()) == 2
    assert sum(name.endswith("weight") for name in gm.state_dict()) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_product_is_rounded_once(dtype: torch.dtype) -> None:
    x = rows(3, 4).to(dtype)
    gm, sites = factored(nn.Sequential(nn.Linear(4, 6)).to(dtype), x)
    pair = [gm.get_parameter(f"0.{name}").double() for name in ("factor_out", "factor_in")]
    # The pair rounds its middle value, the fold its weight: 2 units in the last place of either.
    run_pass(gm, FoldFactors(sites), (x,), tolerance=4 * torch.finfo(dtype).eps)
    assert torch.equal(gm.get_parameter("0.weight"), (pair[0] @ pair[1]).to(dtype))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(4, 6, 2, groups=2, bias=False)
        self.wave = nn.Conv1d(6, 6, 3, padding="same", groups=2)
        self.experts = nn.Parameter(rows(2, 4, 6))

    def forward(self, x: Tensor) -> Any:
        x = self.wave(self.volume(x).flatten(2))
        return x.unsqueeze(1).narrow(3, 0, 4) @ self.experts


GOLDEN_GROUPS = """\
%wave_bias = get[wave.bias]
%x = input
%volume_weight_1 = get[volume.weight]
%conv3d = conv3d(%x, %volume_weight_1, None, [1, 1, 1], [0, 0, 0], [1, 1, 1], 2)
%flatten = flatten.using_ints(%conv3d, 2)
%wave_weight_1 = get[wave.weight]
%conv1d = conv1d.padding(%flatten, %wave_weight_1, %wave_bias, [1], 'same', [1], 2)
%unsqueeze = unsqueeze(%conv1d, 1)
%narrow = narrow(%unsqueeze, 3, 0, 4)
%experts_1 = get[experts]
%matmul = matmul(%narrow, %experts_1)
return (%matmul,)"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_groups_are_folded_each_by_itself(dtype: torch.dtype) -> None:
    model, x = Grouped().to(dtype), rows(3, 4, 3, 3, 4).to(dtype)
    gm, sites = factored(model, x, rank=1)
    assert set(sites) == {"volume", "wave", "experts"}
    # The pair rounds its middle value, the fold its weight, in three layers one after the other.
    run_pass(gm, FoldFactors(sites), (x,), tolerance=12 * torch.finfo(dtype).eps)
    assert graph_text(gm) == GOLDEN_GROUPS
    for name, site in sites.items():
        matrix = site.matrix(gm.get_parameter(site.weight)).double()
        for group, block in enumerate(matrix.chunk(site.groups)):
            values = torch.linalg.svdvals(block)
            assert values[1] <= 4 * torch.finfo(dtype).eps * values[0], (name, group)


def test_a_weight_whose_name_is_taken_goes_under_a_free_one() -> None:
    x = rows(3, 4)
    gm, sites = factored(nn.Sequential(nn.Linear(4, 6)), x)
    other = nn.Parameter(rows(6, 4, seed=5))
    gm.get_submodule("0").register_parameter("weight", other)
    result = run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert result.rewrites == 1
    assert gm.get_parameter("0.weight") is other
    assert "%_0_weight_1 = get[0.weight_1]" in graph_text(gm)


def test_gradients_are_asked_for_where_they_were() -> None:
    x = rows(2, 3, 9, 9)
    model = Model()
    model.conv.requires_grad_(False)
    gm, sites = factored(model, x)
    run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert {name: p.requires_grad for name, p in gm.named_parameters()} == {
        name: not name.startswith("conv") for name in model.state_dict()
    }


# Near misses ----------------------------------------------------------------------------------------------------------


def pair_of(gm: GraphModule) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node]:
    inner, outer = (node for node in gm.graph.nodes if node.target is aten.linear.default)
    return inner, outer, next(iter(gm.graph.find_nodes(op="output")))


def middle_is_returned(gm: GraphModule) -> None:
    inner, outer, output = pair_of(gm)
    total = call_node(gm, aten.sum.default, (inner,), like=outer, before=output)
    result = call_node(gm, aten.add.Tensor, (outer, total), like=outer, before=output)
    output.replace_input_with(outer, result)
    result.args = (outer, total)


def middle_is_changed(gm: GraphModule) -> None:
    inner, outer, _ = pair_of(gm)
    outer.replace_input_with(inner, call_node(gm, aten.relu.default, (inner,), like=outer, before=outer))


def second_factor_alone(gm: GraphModule) -> None:
    inner, outer, output = pair_of(gm)
    extra = call_node(gm, aten.linear.default, (inner.args[0], inner.args[1]), like=outer, before=outer)
    changed = call_node(gm, aten.sin.default, (extra,), like=outer, before=outer)
    again = call_node(gm, aten.linear.default, (changed, outer.args[1]), like=outer, before=output)
    result = call_node(gm, aten.add.Tensor, (outer, again), like=outer, before=output)
    output.replace_input_with(outer, result)
    result.args = (outer, again)


BETWEEN = "its factors are not applied one right after the other"
NEAR_MISSES: dict[Callable[[GraphModule], None], str] = {
    middle_is_returned: "the middle value 'linear_1' has another user",
    middle_is_changed: BETWEEN,
    second_factor_alone: BETWEEN,
}


@pytest.mark.parametrize("change", NEAR_MISSES, ids=lambda change: change.__name__)
def test_near_misses_are_left_alone(change: Callable[[GraphModule], None]) -> None:
    x = rows(3, 4)
    gm, sites = factored(nn.Sequential(nn.Linear(4, 6)), x)
    change(gm)
    gm.recompile()
    text = graph_text(gm)
    result = run_pass(gm, FoldFactors(sites), (x,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == (Refusal("0", NEAR_MISSES[change]),)
    assert graph_text(gm) == text


def test_a_site_that_was_not_factored_is_left_alone() -> None:
    x = rows(3, 4)
    gm = graph_of(nn.Sequential(nn.Linear(4, 6)), x)
    sites = {site.name: site for site in find_sites(gm).sites}
    result = run_pass(gm, FoldFactors(sites), (x,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == (Refusal("0", "the graph has no pair of this name"),)


@pytest.mark.parametrize("limit", [0, 3])
def test_max_rewrites_bisects(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    x = rows(2, 3, 9, 9)
    gm, sites = factored(Model(), x)
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", str(limit))
    result = run_pass(gm, FoldFactors(sites), (x,), tolerance=ROUNDING)
    assert result.rewrites == limit
    assert result.refusals == tuple(
        Refusal(name, f"LOWRANK_FX_MAX_REWRITES={limit} is used up") for name in list(sites)[limit:]
    )


def test_factorize_and_fold_share_nothing_with_what_they_read() -> None:
    x, model = rows(2, 3, 9, 9), Model()
    gm = graph_of(model, x)
    sites = find_sites(gm).sites
    pairs = {site.name: (site, factors_of(site, gm.get_parameter(site.weight), 2)) for site in sites}
    small = factorize(gm, pairs, clone=True)
    text = graph_text(small)
    dense = fold(small, {site.name: site for site in sites})
    assert graph_text(small) == text
    assert_equivalent(dense, small, (x,), rtol=ROUNDING)
    tensors = [{tensor.data_ptr() for tensor in module.parameters()} for module in (model, small, dense)]
    assert len(set.union(*tensors)) == sum(len(each) for each in tensors)
