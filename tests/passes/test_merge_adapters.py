"""Adapters beside layers become part of the layers' weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.passes.base import RewriteBudget
from lowrank_fx.passes.merge_adapters import MergeAdapters
from lowrank_fx.testing import graph_text, run_pass

# float32: one product in place of three of depth <= 27, rounded once; measured 2e-7.
ROUNDING = 3e-6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(model: nn.Module, *inputs: Tensor) -> GraphModule:
    gm = capture(model.eval(), Call(inputs, {})).graph_module
    gm.graph.eliminate_dead_code()
    return gm


class Adapted(nn.Module):
    """A layer with an adapter beside it."""

    def __init__(self, layer: nn.Module, down: nn.Module, up: nn.Module, scale: float | None = 0.5) -> None:
        super().__init__()
        self.layer, self.down, self.up, self.scale = layer, down, up, scale

    def beside(self, x: Tensor) -> Any:
        inner = self.up(self.down(x))
        return inner if self.scale is None else inner * self.scale

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) + self.beside(x)


def linear(**options: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Linear(16, 20), nn.Linear(16, 3, bias=False), nn.Linear(3, 20, bias=False, **options)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        down = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False)
        self.stem = Adapted(conv, down, nn.Conv2d(2, 16, 1, bias=False), None)
        self.head = Adapted(*linear())
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu().mean((2, 3))
        return self.head.layer(x) + 2 * self.head.up(self.head.down(self.dropout(x)))


GOLDEN = """\
%stem_layer_weight = get[stem.layer.weight]
%head_layer_weight = get[head.layer.weight]
%head_layer_bias = get[head.layer.bias]
%x = input
%conv2d = conv2d(%x, %stem_layer_weight, None, [2, 2], [1, 1])
%relu = relu(%conv2d)
%mean = mean.dim(%relu, [2, 3])
%linear = linear(%mean, %head_layer_weight, %head_layer_bias)
return (%linear,)"""


def test_numbers_count_graph_and_names() -> None:
    x, model = rows(2, 3, 9, 9), Model()
    gm = graph_of(model, x)
    result = run_pass(gm, MergeAdapters(), (x,), tolerance=ROUNDING)
    assert result.changes == (
        "stem.down and stem.up, an adapter of rank 2, merged into stem.layer",
        "head.down and head.up, an adapter of rank 3, merged into head.layer",
    )
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    base, up, down = (model.get_parameter(f"head.{name}.weight").double() for name in ("layer", "up", "down"))
    assert torch.equal(gm.get_parameter("head.layer.weight"), (base + 2 * up @ down).float())


class Turned(nn.Module):
    """As Hugging Face's ``Conv1D``: the weight is stored [in, out], and applied between two views."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(rows(16, 20)), nn.Parameter(rows(20))

    def forward(self, x: Tensor) -> Any:
        return torch.addmm(self.bias, x.reshape(-1, 16), self.weight).reshape(*x.shape[:-1], 20)


class Divided(Adapted):
    def beside(self, x: Tensor) -> Any:
        return self.up(self.down(x)) / 4


class Weighted(Adapted):
    def forward(self, x: Tensor) -> Any:
        return torch.add(self.layer(x), self.beside(x), alpha=0.5)


class Several(Adapted):
    def __init__(self) -> None:
        super().__init__(*linear())
        self.other = nn.ModuleList(linear()[1:])

    def forward(self, x: Tensor) -> Any:
        return self.other[1](self.other[0](x)) + (self.layer(x) + self.beside(x))


@pytest.mark.parametrize(
    ("model", "shape", "count"),
    [
        (lambda: Adapted(Turned(), *linear()[1:]), (2, 5, 16), 1),
        (Several, (4, 16), 2),
        (lambda: Divided(*linear()), (4, 16), 1),
        (lambda: Weighted(*linear()), (4, 16), 1),
        (lambda: Adapted(nn.Linear(16, 20), nn.Linear(16, 3), nn.Linear(3, 20)), (4, 16), 1),
        (lambda: Adapted(nn.Linear(16, 20), nn.Linear(16, 30), nn.Linear(30, 20)), (4, 16), 1),
    ],
)
def test_other_ways_to_write_it(model: Callable[[], nn.Module], shape: tuple[int, ...], count: int) -> None:
    x, own = rows(*shape), model()
    gm = graph_of(own, x)
    result = run_pass(gm, MergeAdapters(), (x,), tolerance=ROUNDING)
    assert result.rewrites == count
    layer = own.get_submodule("layer")
    assert {name: tensor.shape for name, tensor in gm.state_dict().items()} == {
        f"layer.{name}": tensor.shape for name, tensor in layer.state_dict().items()
    }


class Forward(Adapted):
    """An adapter that is called in some other way."""

    def __init__(self, function: Callable[[Adapted, Tensor], Any], **options: Any) -> None:
        super().__init__(*linear(**options))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(into: int, out: int, kernel: int, **options: int) -> nn.Conv2d:
    chosen: Any = {"bias": False, **options}
    return nn.Conv2d(into, out, kernel, **chosen)


def drawn(x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.3, True)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (lambda: Forward(lambda own, x: own.layer(x) + own.beside(drawn(x))), (4, 16), "applied to different values"),
        (lambda: Forward(lambda own, x: own.layer(x) + own.beside(x + 1)), (4, 16), "applied to different values"),
        (lambda: Forward(lambda own, x: (own.layer(x) + own.beside(x), own.down(x))), (4, 16), "also used by linear_3"),
        (
            lambda: Forward(lambda own, x: (lambda y: (y + own.beside(x), y))(own.layer(x))), (4, 16),
            "the value 'linear' has another user",
        ),
        (
            lambda: Adapted(nn.Linear(16, 20, bias=False), nn.Linear(16, 3), nn.Linear(3, 20)), (4, 16),
            "the adapter has a bias, and the layer has none to take it",
        ),
        (lambda: Adapted(nn.Linear(16, 1), nn.Linear(16, 3), nn.Linear(3, 20)), (4, 16), "have other shapes"),
        (
            lambda: Adapted(conv(3, 8, 3, padding=2, dilation=2), conv(3, 2, 3, padding=1), conv(2, 8, 1)),
            (2, 3, 7, 7),
            "step over their input in different ways",
        ),
        (lambda: Adapted(conv(3, 8, 3, padding=1), conv(3, 2, 3), conv(2, 8, 3, padding=2)), (2, 3, 7, 7), "span"),
    ],
)  # fmt: skip
def test_near_misses_are_left_alone(model: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    x = rows(*shape)
    gm = graph_of(model(), x)
    if "drawn" in str(gm.code) or "dropout" in str(gm.code):  # it draws anew in every run, so only the pass is run
        result = MergeAdapters().run(gm, RewriteBudget())
    else:
        result = run_pass(gm, MergeAdapters(), (x,), tolerance=0.0)
    assert result.rewrites == 0
    assert [reason in refusal.reason for refusal in result.refusals] == [True], result.refusals


def test_a_sum_that_is_no_adapter_is_passed_by() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Any:
            x = x + self.two(self.one(x).relu())
            return torch.add(self.one(x), self.two(x), alpha=2) + 1

    x = rows(4, 16)
    result = run_pass(graph_of(Residual(), x), MergeAdapters(), (x,), tolerance=0.0)
    assert (result.changes, result.refusals) == ((), ())


@settings(max_examples=10, deadline=None)
@given(
    rank=st.integers(1, 20), scale=st.floats(-3, 3), biases=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_adapter_is_the_same_in_float64(rank: int, scale: float, biases: tuple[bool, bool], seed: int) -> None:
    torch.manual_seed(seed)
    down, up = nn.Linear(12, rank, bias=biases[0]), nn.Linear(rank, 9, bias=biases[1])
    model, x = Adapted(nn.Linear(12, 9), down, up, scale).double(), rows(5, 12, seed=seed).double()
    # float64: other orders of summation of up to 20 * 12 products.
    assert run_pass(graph_of(model, x), MergeAdapters(), (x,), tolerance=1e-13).rewrites == 1
