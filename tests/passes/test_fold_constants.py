"""Expressions of parameters alone, computed once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrizations import weight_norm

from lowrank_fx.passes.base import Refusal, RewriteBudget
from lowrank_fx.passes.fold_constants import FoldConstants
from lowrank_fx.testing import graph_text, run_pass

# The same operators run on the same values, so most results are equal bit for bit; a copy of another memory layout may
# take another kernel of the matrix product: 1e-7 measured.
ROUNDING = 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(model: nn.Module) -> nn.Module:
    source = generator(7)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=source))
    return model.eval()


def capture(model: nn.Module, *args: Tensor, dynamic: bool = True) -> GraphModule:
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in args) if dynamic else None
    gm = torch.export.export(model, args, dynamic_shapes=batch, strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def _tensor(model: nn.Module, name: str) -> Tensor:
    """An attribute by its dotted name, computed ones among them."""
    found = operator.attrgetter(name)(model)
    assert isinstance(found, Tensor)
    return found


class Apply(nn.Module):
    """A few tensors, put together by ``way``."""

    mask: Tensor
    count: Tensor
    positions: Tensor

    def __init__(self, way: Callable[[Apply, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.a = nn.Parameter(torch.empty(4, 4))
        self.b = nn.Parameter(torch.empty(4, 4), requires_grad=False)
        self.column = nn.Parameter(torch.empty(4, 1))
        self.packed = nn.Parameter(torch.empty(12, 4))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0, 1.0]))
        self.register_buffer("count", torch.zeros(4))
        self.register_buffer("positions", torch.arange(8))
        self.embedding = nn.Embedding(8, 4)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def folded(way: Callable[[Apply, Tensor], Any], *, dynamic: bool = True) -> tuple[GraphModule, tuple[str, ...]]:
    """The graph of ``way`` after the pass, with its numbers checked, and what was changed."""
    x = torch.randn(3, 4, generator=generator())
    gm = capture(seeded(Apply(way)), x, dynamic=dynamic)
    result = run_pass(gm, FoldConstants(), (x,), tolerance=ROUNDING)
    assert result.refusals == ()
    return gm, result.changes


class Norms(nn.Module):
    """Weight norm on a convolution and on a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(2, 3, 3))
        self.fc = weight_norm(nn.Linear(3, 5))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.conv(x).mean((2, 3)))


NORMS = """\
%conv_bias = get[conv.bias]
%fc_bias = get[fc.bias]
%x = input
%conv_weight = get[conv.weight]
%conv2d = conv2d(%x, %conv_weight, %conv_bias)
%mean = mean.dim(%conv2d, [2, 3])
%fc_weight = get[fc.weight]
%linear = linear(%mean, %fc_weight, %fc_bias)
return (%linear,)"""


def test_weight_norm() -> None:
    model = seeded(Norms())
    x = torch.randn(2, 2, 5, 5, generator=generator())
    gm = capture(model, x)
    result = run_pass(gm, FoldConstants(), (x,), tolerance=ROUNDING)
    assert result.changes == (
        "conv.weight computed from conv.parametrizations.weight.original1, conv.parametrizations.weight.original0",
        "fc.weight computed from fc.parametrizations.weight.original1, fc.parametrizations.weight.original0",
    )
    assert result.refusals == ()
    assert graph_text(gm) == NORMS
    assert sorted(gm.state_dict()) == ["conv.bias", "conv.weight", "fc.bias", "fc.weight"]
    assert all(parameter.requires_grad for parameter in gm.parameters())
    assert torch.equal(gm.get_parameter("fc.weight"), _tensor(model, "fc.weight"))
    assert not hasattr(gm.fc, "parametrizations")


PACKED = """\
%fc_weight = get[fc.weight]
%fc_bias = get[fc.bias]
%x = input
%packed_0 = get[packed_0]
%packed_1 = get[packed_1]
%packed_2 = get[packed_2]
%linear = linear(%x, %packed_0)
%linear_1 = linear(%x, %packed_1)
%add = add.Tensor(%linear, %linear_1)
%linear_2 = linear(%x, %packed_2)
%add_1 = add.Tensor(%add, %linear_2)
%linear_3 = linear(%add_1, %fc_weight, %fc_bias)
return (%linear_3,)"""


def packed_projection(m: Apply, x: Tensor) -> Any:
    q, k, v = m.packed.chunk(3)
    return m.fc(F.linear(x, q) + F.linear(x, k) + F.linear(x, v))


def test_the_parts_of_a_packed_projection() -> None:
    gm, changes = folded(packed_projection)
    assert changes == tuple(f"packed_{part} computed from packed" for part in range(3))
    assert graph_text(gm) == PACKED
    assert {"packed_0", "packed_1", "packed_2"} <= set(gm.state_dict())
    assert "packed" not in gm.state_dict()
    # Each part owns its memory, so that a part that is factored frees its own.
    assert len({gm.get_parameter(f"packed_{part}").untyped_storage().data_ptr() for part in range(3)}) == 3


def test_cross_attention_has_sites_afterwards() -> None:
    attention = seeded(nn.MultiheadAttention(8, 2, batch_first=True))
    query = torch.randn(2, 3, 8, generator=generator())
    memory = torch.randn(2, 5, 8, generator=generator(1))
    gm = torch.export.export(attention, (query, memory, memory), strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    result = run_pass(gm, FoldConstants(), (query, memory, memory), tolerance=ROUNDING)
    assert result.rewrites == 4
    assert "linear(%transpose, %in_proj_weight_0, %in_proj_bias_0)" in graph_text(gm)
    assert "linear(%transpose_1, %in_proj_weight_1, %in_proj_bias_1)" in graph_text(gm)
    assert [tuple(gm.get_parameter(f"in_proj_weight_{part}").shape) for part in range(2)] == [(8, 8), (16, 8)]


def test_a_weight_computed_from_itself_keeps_its_name() -> None:
    def standardised(m: Apply, x: Tensor) -> Any:
        return F.linear(x, m.a - m.a.mean(1, keepdim=True)) + F.linear(x, m.fc.weight * 2, m.fc.bias + 1)

    gm, changes = folded(standardised)
    # The functional calls belong to no layer, so the reader's name is the root's.
    assert changes == (
        "weight computed from a",
        "weight_folded computed from fc.weight",
        "bias computed from fc.bias",
    )

    class Standardised(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Standardised(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    model = seeded(Holder())
    old = model.get_parameter("layer.weight").detach().clone()
    x = torch.randn(3, 4, generator=generator())
    gm = capture(model, x)
    result = run_pass(gm, FoldConstants(), (x,), tolerance=ROUNDING)
    assert result.changes == ("layer.weight computed from layer.weight",)
    assert sorted(gm.state_dict()) == ["layer.bias", "layer.weight"]
    assert torch.equal(gm.get_parameter("layer.weight"), old - old.mean(1, keepdim=True))
    assert torch.equal(model.get_parameter("layer.weight"), old)


def test_a_name_that_stays_in_use_is_not_taken() -> None:
    class Shifted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.v = nn.Parameter(torch.empty(4, 4))

        def forward(self, x: Tensor) -> Any:
            return F.linear(x, self.v * 2) + F.linear(x, self.weight)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Shifted()

        def forward(self, x: Tensor) -> Any:
            return self.layer(x)

    x = torch.randn(3, 4, generator=generator())
    gm = capture(seeded(Holder()), x)
    result = run_pass(gm, FoldConstants(), (x,), tolerance=ROUNDING)
    assert result.changes == ("layer.weight_folded computed from layer.v",)
    assert sorted(gm.state_dict()) == ["layer.bias", "layer.weight", "layer.weight_folded"]


def test_equal_expressions_stay_one_weight() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = weight_norm(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Any:
            return self.layer(self.layer(x).relu())

    x = torch.randn(3, 4, generator=generator())
    gm = capture(seeded(Twice()), x)
    assert graph_text(gm).count("_weight_norm(") == 2
    result = run_pass(gm, FoldConstants(), (x,), tolerance=ROUNDING)
    assert result.rewrites == 1
    assert graph_text(gm).count("get[layer.weight]") == 1
    assert graph_text(gm).count("%layer_weight, %layer_bias)") == 2


def test_gradients_and_buffers() -> None:
    gm, changes = folded(lambda m, x: F.linear(x, m.b * 2) + (1 - m.mask) * -9.0 + m.positions[:4].remainder(3))
    assert changes == (
        "weight computed from b",
        "mask_folded computed from mask",
        "positions_folded computed from positions",
    )
    assert not gm.get_parameter("weight").requires_grad
    buffers = dict(gm.named_buffers())
    assert buffers["mask_folded"].dtype == torch.float32
    assert buffers["positions_folded"].dtype == torch.int64
    assert {"mask_folded", "positions_folded"} <= set(gm.state_dict())
    gm, _ = folded(lambda m, x: F.linear(x, m.a * m.b))
    assert gm.get_parameter("weight").requires_grad


def test_embedded_positions_of_a_static_sequence() -> None:
    gm, changes = folded(lambda m, x: x + m.embedding(m.positions[:3]), dynamic=False)
    assert changes == ("embedding.weight_folded computed from embedding.weight, positions",)
    assert graph_text(gm).splitlines()[-3:] == [
        "%embedding_weight_folded = get[embedding.weight_folded]",
        "%add = add.Tensor(%x, %embedding_weight_folded)",
        "return (%add,)",
    ]


def test_dropout_in_inference_is_no_obstacle() -> None:
    _, changes = folded(lambda m, x: F.linear(x, F.dropout(m.a * 2, 0.5, m.training)))
    assert changes == ("weight computed from a",)


def test_max_rewrites_leaves_a_true_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, generator=generator())
    for limit in range(4):
        monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", str(limit))
        gm = capture(seeded(Apply(packed_projection)), x)
        result = run_pass(gm, FoldConstants(), (x,), tolerance=ROUNDING)
        assert result.rewrites == limit
        assert [refusal.reason for refusal in result.refusals] == [f"LOWRANK_FX_MAX_REWRITES={limit} is used up"] * (
            3 - limit
        )
        assert ("packed" in gm.state_dict()) == (limit < 3)


# Near misses ----------------------------------------------------------------------------------------------------------


def by_itself(m: Apply, x: Tensor) -> Any:
    return m.fc(x) + m.mask


def plain_transpose(m: Apply, x: Tensor) -> Any:
    return x @ m.a.t() + F.linear(x, m.a.T) + F.linear(x, m.b.transpose(0, 1)) + x @ m.b.permute(1, 0)


def view_that_costs_nothing(m: Apply, x: Tensor) -> Any:
    return x + m.mask.unsqueeze(0) + m.a[0]


def depends_on_the_input(m: Apply, x: Tensor) -> Any:
    return F.linear(x, m.a * x.mean()) + m.positions[: x.shape[0], None]


@pytest.mark.parametrize(
    "way", [by_itself, plain_transpose, view_that_costs_nothing, depends_on_the_input], ids=lambda way: way.__name__
)
def test_what_is_no_expression(way: Callable[[Apply, Tensor], Any]) -> None:
    x = torch.randn(3, 4, generator=generator())
    gm = capture(seeded(Apply(way)), x)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    result = run_pass(gm, FoldConstants(), (x,), tolerance=0.0)
    assert (result.changes, result.refusals) == ((), ())
    assert graph_text(gm) == text


def larger(m: Apply, x: Tensor) -> Any:
    return F.linear(x, m.column @ m.column.t())


def tied(m: Apply, x: Tensor) -> Any:
    return F.linear(x, m.a[:2]) @ m.a[:2] + F.linear(x, m.a)


def stays_in_use(m: Apply, x: Tensor) -> Any:
    return F.linear(x, m.a * 2) + F.linear(x, m.a)


def random(m: Apply, x: Tensor) -> Any:
    return F.linear(x, m.a + torch.bernoulli(m.mask) * 0)


def written(m: Apply, x: Tensor) -> Any:
    m.count.add_(1.0)
    return x + m.count * 0.5


def written_through_a_view(m: Apply, x: Tensor) -> Any:
    m.count[1:].zero_()
    return x + m.count * 0.5


NEAR_MISSES: dict[Callable[[Apply, Tensor], Any], tuple[Refusal, ...]] = {
    larger: (Refusal("matmul", "the value of an expression of column would bring 16 numbers and free 4"),),
    tied: (Refusal("slice_1", "the value of an expression of a would bring 8 numbers and free 0 (a stays in use)"),),
    stays_in_use: (
        Refusal("mul", "the value of an expression of a would bring 16 numbers and free 0 (a stays in use)"),
    ),
    random: (Refusal("bernoulli", "aten.bernoulli.default is random, so its result is no constant"),),
    written: (Refusal("mul", "the graph writes to count"),),
    written_through_a_view: (Refusal("mul", "the graph writes to count"),),
}


@pytest.mark.parametrize("way", NEAR_MISSES, ids=lambda way: way.__name__)
def test_near_misses_are_left_alone(way: Callable[[Apply, Tensor], Any]) -> None:
    x = torch.randn(3, 4, generator=generator())
    gm = capture(seeded(Apply(way)), x)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    with torch.no_grad():
        result = FoldConstants().run(gm, RewriteBudget())
    assert result.changes == ()
    assert result.refusals == NEAR_MISSES[way]
    assert graph_text(gm) == text


def test_a_weight_written_in_place_after_it_was_computed_is_left_alone() -> None:
    def in_place(m: Apply, x: Tensor) -> Any:
        weight = m.a * 2
        weight.add_(1.0)
        return F.linear(x, weight)

    x = torch.randn(3, 4, generator=generator())
    gm = capture(seeded(Apply(in_place)), x)
    result = run_pass(gm, FoldConstants(), (x,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == (Refusal("add_", "the graph writes to mul"),)


def test_of_several_values_only_the_ones_that_pay_are_folded() -> None:
    def two(m: Apply, x: Tensor) -> Any:
        small = m.a.sum(0)
        return F.linear(x, torch.cat([m.a, m.a * 2])).sum(1, keepdim=True) + x * small

    x = torch.randn(3, 4, generator=generator())
    gm = capture(seeded(Apply(two)), x)
    result = run_pass(gm, FoldConstants(), (x,), tolerance=0.0)
    assert result.changes == ()
    reasons = {refusal.node: refusal.reason for refusal in result.refusals}
    # The 32 numbers go first; then the 16 stay in use, and folding the 4 would free nothing.
    assert reasons == {
        "cat": "the value of an expression of a would bring 36 numbers and free 16",
        "sum_1": "the value of an expression of a would bring 4 numbers and free 0 (a stays in use)",
    }
