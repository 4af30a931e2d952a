"""Pairs that a model came with are taken as one layer each, and put back."""

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
from lowrank_fx.passes.base import PassManager, RewriteBudget
from lowrank_fx.passes.merge_pairs import MergePairs
from lowrank_fx.passes.restore_pairs import MergedPair, RestorePairs
from lowrank_fx.testing import graph_text, run_pass

# float32: one product in place of two of depth <= 144, rounded once; measured 4e-7.
ROUNDING = 3e-6


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(model: nn.Module, x: Tensor) -> GraphModule:
    gm = capture(model.eval(), Call((x,), {})).graph_module
    gm.graph.eliminate_dead_code()
    return gm


class Model(nn.Module):
    """LED and CED of Greenformer, a spatial pair, and two layers that no module holds together."""

    def __init__(self) -> None:
        super().__init__()
        self.ced = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False), nn.Conv2d(2, 16, 1))
        self.spatial = nn.Sequential(
            nn.Conv2d(16, 4, (3, 1), padding=(1, 0)), nn.Conv2d(4, 16, (1, 3), stride=(1, 2), bias=False)
        )
        self.led = nn.Sequential(nn.Linear(16, 3, bias=False), nn.Dropout(0.1), nn.Linear(3, 20))
        self.down, self.up = nn.Linear(20, 4), nn.Linear(4, 20)

    def forward(self, x: Tensor) -> Any:
        return self.up(self.down(self.led(self.spatial(self.ced(x).relu()).mean((2, 3))).relu()))


GOLDEN = """\
%x = input
%ced_weight = get[ced.weight]
%ced_1_bias_1 = get[ced.1.bias]
%conv2d_1 = conv2d(%x, %ced_weight, %ced_1_bias_1, [2, 2], [1, 1], [1, 1])
%relu = relu(%conv2d_1)
%spatial_weight = get[spatial.weight]
%spatial_bias = get[spatial.bias]
%conv2d_3 = conv2d(%relu, %spatial_weight, %spatial_bias, [1, 2], [1, 0], [1, 1])
%mean = mean.dim(%conv2d_3, [2, 3])
%led_weight = get[led.weight]
%led_2_bias_1 = get[led.2.bias]
%linear_1 = linear(%mean, %led_weight, %led_2_bias_1)
%relu_1 = relu(%linear_1)
%up_weight_1 = get[up.weight]
%up_bias_1 = get[up.bias]
%linear_3 = linear(%relu_1, %up_weight_1, %up_bias_1)
return (%linear_3,)"""


def test_numbers_count_graph_and_names() -> None:
    x, model = rows(2, 3, 9, 9), Model()
    gm, found = graph_of(model, x), dict[str, MergedPair]()
    result = run_pass(gm, MergePairs(found), (x,), tolerance=ROUNDING)
    assert result.changes == (
        "ced.0 and ced.1, a pair of rank 2, taken as one layer ced, 16 x 27",
        "spatial.0 and spatial.1, a pair of rank 4, taken as one layer spatial, 16 x 144",
        "led.0 and led.2, a pair of rank 3, taken as one layer led, 20 x 16",
        "down and up, a pair of rank 4, taken as one layer up, 20 x 20",
    )
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    assert list(found) == ["ced.weight", "spatial.weight", "led.weight", "up.weight"]
    product = model.up.weight.double() @ model.down.weight.double()
    assert torch.equal(gm.get_parameter("up.weight"), product.float())
    moved = model.up.weight.double() @ model.down.bias.double() + model.up.bias.double()
    assert torch.equal(gm.get_parameter("up.bias"), moved.float())
    assert gm(rows(5, 3, 9, 9)).shape == (5, 20)


def test_put_back_it_is_the_model_again() -> None:
    x, model = rows(2, 3, 9, 9), Model()
    gm, found = graph_of(model, x), dict[str, MergedPair]()
    expected = gm(x)
    operators = [node.target for node in gm.graph.nodes if "dropout" not in node.name and node.op == "call_function"]
    PassManager([MergePairs(found)], verify=True).run(gm)
    result = run_pass(gm, RestorePairs(list(found.values())), (x,), tolerance=ROUNDING)
    assert result.rewrites == 4
    assert torch.equal(gm(x), expected)
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == operators
    own = dict(model.named_parameters())
    assert gm.state_dict().keys() == own.keys()
    for name, parameter in gm.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr()
    names = {node.name for node in gm.graph.nodes}
    assert {"conv2d_1", "conv2d_3", "linear_1", "linear_3"} <= names


def test_some_are_put_back_and_missing_nodes_are_said() -> None:
    x, model = rows(2, 3, 9, 9), Model()
    gm, found = graph_of(model, x), dict[str, MergedPair]()
    PassManager([MergePairs(found)], verify=True).run(gm)
    run_pass(gm, RestorePairs([found["led.weight"]]), (x,), tolerance=ROUNDING)
    assert {"led.0.weight", "led.2.weight", "up.weight"} <= set(gm.state_dict())
    assert "down.weight" not in gm.state_dict()
    again = run_pass(gm, RestorePairs([MergedPair("w", {}, (), {"gone": ()})]), (x,), tolerance=ROUNDING)
    assert [(each.node, each.reason) for each in again.refusals] == [("w", "the graph has no node 'gone'")]


class Two(nn.Module):
    """Two layers, and what happens to the value between them."""

    def __init__(self, first: nn.Module, second: nn.Module, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x: Tensor) -> Any:
        inner = self.first(x)
        return self.second(inner if self.between is None else self.between(inner))


class Leaking(Two):
    def forward(self, x: Tensor) -> Any:
        inner = self.first(x)
        return self.second(inner), inner


class Twice(Two):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x).sigmoid()) + self.first(x)[..., :1]


class Calls(Two):
    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(self.second(self.first(x)).tanh()))


def buffered() -> nn.Linear:
    layer = nn.Linear(16, 4)
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight)
    return layer


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **{"bias": False, **kwargs})


def linear_pair(**kwargs: Any) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(16, 4, **kwargs), nn.Linear(4, 16)


IMAGE = (2, 16, 6, 6)


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (lambda: Two(*linear_pair(), torch.relu), (3, 16), "relu is applied between the two"),
        (lambda: Two(*linear_pair(), lambda x: nn.functional.dropout(x, 0.3, True)), (3, 16), "dropout is applied"),
        (lambda: Two(nn.Linear(16, 4), nn.Linear(4, 16).double(), Tensor.double), (3, 16), "to is applied between"),
        (lambda: Leaking(*linear_pair()), (3, 16), "the middle value 'linear' is also used by output"),
        (lambda: Two(nn.Linear(16, 8), nn.Linear(8, 16)), (3, 16), "8 is at or above break-even: 256 weights, and 256"),
        (lambda: Two(nn.Linear(16, 40), nn.Linear(40, 16)), (3, 16), "40 is at or above break-even"),
        (lambda: Two(buffered(), nn.Linear(4, 16)), (3, 16), "its weight first.weight is a buffer, not a parameter"),
        (
            lambda: Two(conv(16, 4, 3, groups=2), conv(4, 16, 1)), IMAGE, "their groups differ (2 and 1)",
        ),
        (lambda: Two(conv(16, 2, 3), conv(2, 16, 3)), IMAGE, "two of their kernels span the same dimension"),
        (lambda: Two(conv(16, 2, 3), conv(2, 16, 1, stride=2)), IMAGE, "one of them strides, pads or dilates"),
        (lambda: Two(conv(16, 2, 1, padding=1), conv(2, 16, 3)), IMAGE, "one of them strides, pads or dilates"),
        (
            lambda: Two(conv(16, 2, 1, bias=True), conv(2, 16, 3, padding=1)), IMAGE,
            "a layer before the last has a bias, and one behind it pads with zeros",
        ),
        (lambda: Calls(*linear_pair()), (3, 16), "called several times, and a layer before the last has a bias"),
    ],
)  # fmt: skip
def test_near_misses_are_left_alone(model: Callable[[], nn.Module], shape: tuple[int, ...], reason: str) -> None:
    x = rows(*shape)
    gm = graph_of(model(), x)
    if "dropout" in reason:  # it draws anew in every run, so only the pass is run
        result = MergePairs().run(gm, RewriteBudget())
    else:
        result = run_pass(gm, MergePairs(), (x,), tolerance=0.0)
    assert result.rewrites == 0
    assert [reason in refusal.reason for refusal in result.refusals] == [True], result.refusals


def test_weights_that_something_else_reads_are_left_alone() -> None:
    class Tied(nn.Module):
        """OPT's way: a projection out, then a head over the embedding's table."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(40, 4)
            self.out = nn.Linear(16, 4, bias=False)
            self.side = nn.Linear(16, 4, bias=False)
            self.up = nn.Linear(4, 16)

        def forward(self, x: Tensor) -> Any:
            head = nn.functional.linear(self.out(x), self.table.weight)
            return (
                head,
                self.table(x.argmax(1)),
                self.up(self.side(x)),
                nn.functional.linear(x.tanh(), self.side.weight),
            )

    x = rows(3, 16)
    gm = graph_of(Tied(), x)
    result = run_pass(gm, MergePairs(), (x,), tolerance=0.0)
    assert [refusal.reason for refusal in result.refusals] == [
        "its weight table.weight is also used by embedding",
        "its weight side.weight is also used by linear_4",
    ]


def test_a_pair_that_is_called_twice_is_one_layer_with_two_calls() -> None:
    x = rows(3, 16)
    model = Calls(nn.Linear(16, 4, bias=False), nn.Linear(4, 16))
    gm, found = graph_of(model, x), dict[str, MergedPair]()
    result = run_pass(gm, MergePairs(found), (x,), tolerance=ROUNDING)
    assert result.changes == ("first and second, a pair of rank 4, taken as one layer second, 16 x 16",)
    assert [len(pair.calls) for pair in found.values()] == [2]
    run_pass(gm, RestorePairs(list(found.values())), (x,), tolerance=ROUNDING)
    assert torch.equal(gm(x), model(x))


def test_pairs_behind_each_other_and_three_factors() -> None:
    class Chains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lines = nn.Sequential(*(nn.Linear(*sizes) for sizes in ((16, 2), (2, 16), (16, 3), (3, 16))))
            self.tucker = nn.Sequential(conv(16, 4, 1), conv(4, 4, 3, padding="same"), conv(4, 16, 1))

        def forward(self, x: Tensor) -> Any:
            return self.lines(self.tucker(x).mean((2, 3)))

    x, model = rows(*IMAGE), Chains()
    gm, found = graph_of(model, x), dict[str, MergedPair]()
    expected = gm(x)
    result = run_pass(gm, MergePairs(found), (x,), tolerance=ROUNDING)
    assert [change.partition(", a pair")[0] for change in result.changes] == [
        "tucker.0 and tucker.1 and tucker.2", "lines.0 and lines.1", "lines.2 and lines.3",
    ]  # fmt: skip
    run_pass(gm, RestorePairs(list(found.values())), (x,), tolerance=ROUNDING)
    assert torch.equal(gm(x), expected)
    assert gm.state_dict().keys() == model.state_dict().keys()


def test_the_budget_stops_it() -> None:
    gm = graph_of(Model(), rows(2, 3, 9, 9))
    found: dict[str, MergedPair] = {}
    result = MergePairs(found).run(gm, RewriteBudget(1))
    assert (result.rewrites, len(result.refusals), list(found)) == (1, 3, ["ced.weight"])


@settings(max_examples=12, deadline=None)
@given(
    kernels=st.sampled_from([((3, 3), (1, 1)), ((1, 1), (3, 3)), ((3, 1), (1, 3)), ((1, 2), (3, 1)), ((1, 1), (1, 1))]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    biases=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_any_pair_of_convolutions_is_the_same_in_float64(
    kernels: tuple[tuple[int, int], tuple[int, int]],
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    biases: tuple[bool, bool],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    layers = []
    for place, kernel in enumerate(kernels):
        owns = [size > 1 for size in kernel]
        steps: dict[str, Any] = {
            "stride": tuple(stride if own else 1 for own in owns),
            "padding": tuple(padding * own for own in owns),
            "dilation": tuple(dilation if own else 1 for own in owns),
        }
        sizes = (16, 2 * groups) if place == 0 else (2 * groups, 16)
        layers.append(nn.Conv2d(*sizes, kernel, groups=groups, bias=biases[place], **steps))
    model, x = nn.Sequential(*layers).double().eval(), rows(2, 16, 9, 8, seed=seed).double()
    gm = graph_of(model, x)
    # float64: the two orders of summation of up to 288 products differ by rounding.
    result = run_pass(gm, MergePairs(), (x,), tolerance=1e-14)
    pads = biases[0] and padding and any(size > 1 for size in kernels[1])
    assert result.rewrites == (0 if pads else 1)
