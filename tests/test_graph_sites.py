"""Sites and taps: what can be factored, what is left alone, and the patches of a convolution."""

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
from lowrank_fx.errors import OptionError
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.patches import Patch
from lowrank_fx.sites import LeftAlone, Site, SiteTable, Tap


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def graph_of(model: nn.Module, *args: Any, **kwargs: Any) -> GraphModule:
    return capture(model, Call(args, kwargs)).graph_module


def table_of(model: nn.Module, *args: Any) -> SiteTable:
    """The table, after what holds for every model was checked."""
    gm = graph_of(model, *args)
    table = find_sites(gm)
    check(gm, table)
    return table


def check(gm: GraphModule, table: SiteTable) -> None:
    """No floating weight of two or more dimensions is missing, none is there twice, and taps and sites agree."""
    used = {id(gm.get_parameter(str(node.target))) for node in gm.graph.nodes if node.users and is_parameter(gm, node)}
    weights = {id(p): name for name, p in gm.named_parameters() if p.dim() >= 2 and p.is_floating_point()}
    listed = [site.name for site in table.sites] + [left.name for left in table.left_alone]
    assert len(listed) == len(set(listed)) == len(weights)
    unused = {left.name for left in table.left_alone if left.reason == "the captured graph never uses it"}
    assert len(set(weights) - used) == len(unused)
    nodes = {node.name for node in gm.graph.nodes}
    fed: set[str] = set()
    for site in table.sites:
        weight = gm.get_parameter(site.weight)
        assert weights.pop(id(weight))
        assert site.shape == tuple(weight.shape)
        assert site.matrix(weight).shape == (site.out_features, site.in_features)
        assert torch.equal(site.unmatrix(site.matrix(weight)), weight)
        assert site.unmatrix(site.matrix(weight)).is_contiguous()
        for call in site.calls:
            assert call.node in nodes
            assert table.taps[call.tap].width == site.groups * site.in_features
            assert table.taps[call.tap].groups == site.groups
            assert table.graph.has_edge(call.tap, site.name)
            fed.add(call.tap)
    assert all(left.reason for left in table.left_alone)
    assert set(table.taps) == fed
    assert all(tap.node in nodes for tap in table.taps.values())


def is_parameter(gm: GraphModule, node: torch.fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target) in dict(gm.named_parameters(remove_duplicate=False))


class Apply(nn.Module):
    """A parameter (or two) applied by a function of ``(module, input)``."""

    def __init__(self, function: Callable[..., Any], shape: tuple[int, ...] = (6, 4), bias: int = 6) -> None:
        super().__init__()
        self.w = nn.Parameter(rows(*shape))
        self.b = nn.Parameter(rows(bias))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


# Linear layers --------------------------------------------------------------------------------------------------------

OUT_IN, IN_OUT = (6, 4), (4, 6)
LINEAR: dict[str, tuple[Callable[[Apply, Tensor], Any], tuple[int, ...], tuple[int, ...], bool]] = {
    # name: (function, the input's shape, the weight's shape, whether a bias centres it)
    "linear 2-D": (lambda m, x: F.linear(x, m.w, m.b), (3, 4), OUT_IN, True),
    "linear 3-D": (lambda m, x: F.linear(x, m.w, m.b), (3, 5, 4), OUT_IN, True),
    "linear 4-D": (lambda m, x: F.linear(x, m.w, m.b), (3, 5, 2, 4), OUT_IN, True),
    "linear 5-D": (lambda m, x: F.linear(x, m.w, m.b), (3, 5, 2, 2, 4), OUT_IN, True),
    "linear without bias": (lambda m, x: F.linear(x, m.w) + m.b, (3, 5, 4), OUT_IN, False),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (3, 4), IN_OUT, True),
    "addmm of the transpose": (lambda m, x: torch.addmm(m.b, x, m.w.t()), (3, 4), OUT_IN, True),
    "mm": (lambda m, x: torch.mm(x, m.w) + m.b, (3, 4), IN_OUT, False),
    "x @ w, 2-D": (lambda m, x: x @ m.w + m.b, (3, 4), IN_OUT, False),
    "x @ w, 3-D": (lambda m, x: x @ m.w + m.b, (3, 5, 4), IN_OUT, False),
    "x @ w, 4-D": (lambda m, x: x @ m.w + m.b, (3, 5, 2, 4), IN_OUT, False),
    "x @ w.t()": (lambda m, x: x @ m.w.t() + m.b, (3, 5, 4), OUT_IN, False),
    "x @ w.T": (lambda m, x: x @ m.w.T + m.b, (3, 4), OUT_IN, False),
    "x @ w.mT": (lambda m, x: x @ m.w.mT + m.b, (3, 4), OUT_IN, False),
    "x @ w.adjoint()": (lambda m, x: x @ m.w.adjoint() + m.b, (3, 4), OUT_IN, False),
    "x @ w.H": (lambda m, x: x @ m.w.H + m.b, (3, 4), OUT_IN, False),
    "x @ w.swapaxes(0, 1)": (lambda m, x: x @ m.w.swapaxes(0, 1) + m.b, (3, 4), OUT_IN, False),
    "x @ w.transpose(-1, 0)": (lambda m, x: x @ m.w.transpose(-1, 0) + m.b, (3, 4), OUT_IN, False),
    "x @ w.permute(1, 0)": (lambda m, x: x @ m.w.permute(1, 0) + m.b, (3, 4), OUT_IN, False),
    "linear of the transpose": (lambda m, x: F.linear(x, m.w.t(), m.b), (3, 5, 4), IN_OUT, True),
}


@pytest.mark.parametrize("name", LINEAR)
def test_every_way_to_write_a_linear_layer(name: str) -> None:
    function, shape, weight, centered = LINEAR[name]
    model = Apply(function, weight)
    table = table_of(model, rows(*shape))
    (site,) = table.sites
    assert (site.name, site.kind, site.weight, site.shape) == ("w", "linear", "w", weight)
    assert (site.out_features, site.in_features, site.transposed) == (6, 4, weight == IN_OUT)
    assert (site.patch, site.dtype, site.centered) == (None, "torch.float32", centered)
    assert [call.bias for call in site.calls] == ["b" if centered else None]
    assert table.left_alone == ()
    (tap,) = table.taps.values()
    assert tap == Tap("x", "x", 4)
    # What the site says it computes is what the model computes.
    x = rows(*shape)
    torch.testing.assert_close(model(x), x @ site.matrix(model.w).t() + model.b, rtol=1e-5, atol=1e-6)


def test_conv1d_of_transformers() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4), nn.ReLU(), Conv1D(4, 6))  # type: ignore[no-untyped-call]
    table = table_of(model, rows(3, 5, 4))
    assert [(site.name, site.transposed, site.shape, site.centered) for site in table.sites] == [
        ("0", True, (4, 6), True), ("2", True, (6, 4), True),
    ]  # fmt: skip
    assert [site.attribute("factor_in") for site in table.sites] == ["0.factor_in", "2.factor_in"]


NEAR_LINEAR: dict[str, tuple[Callable[[Apply, Tensor], Any], tuple[int, ...], tuple[int, ...], str]] = {
    "embedding": (lambda m, x: F.embedding(x.long(), m.w), (3, 4), (6, 4), "an embedding is a table lookup"),
    "scaled": (lambda m, x: x @ (m.w * 2), (3, 4), (4, 6), "used by aten.mul.Tensor"),
    "left operand": (lambda m, x: m.w @ x, (4, 5), (6, 4), "the left operand of a matrix product"),
    "a vector for each group": (lambda m, x: x[0] @ m.w, (3, 4), (2, 4, 6), "applied to a vector"),
    "groups, left": (lambda m, x: m.w @ x, (2, 4, 3), (2, 6, 4), "the left operand of a matrix product"),
    "groups of groups": (lambda m, x: x @ m.w, (2, 2, 3, 4), (2, 2, 4, 6), "4 dimensions where 2 or 3 are expected"),
    "groups of one row": (lambda m, x: x @ m.w, (2, 3, 4), (2, 4, 1), "1 x 4 to each of its 2 groups has no rank"),
    "einsum": (lambda m, x: torch.einsum("bi,oi->bo", x, m.w), (3, 4), (6, 4), "not a plain matrix product"),
    "layer norm": (lambda m, x: F.layer_norm(x, (6, 4), m.w), (3, 6, 4), (6, 4), "a normalisation scales"),
    "two by two": (lambda m, x: x @ m.w, (3, 2), (2, 2), "2 x 2 has no rank below break-even"),
    "alpha": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), (3, 4), (4, 6), "beta or alpha is not 1"),
    "beta": (lambda m, x: torch.addmm(m.b, x, m.w, beta=2), (3, 4), (4, 6), "beta or alpha is not 1"),
    "no bias vector": (lambda m, x: torch.addmm(x[:, :1], x, m.w), (3, 4), (4, 6), "not a bias vector"),
    "bias of activations": (lambda m, x: F.linear(x, m.w, x.sum(0)[0] * m.b), (3, 4), (6, 4), "its bias is computed"),
    "a parameter's image": (lambda m, x: F.linear(m.w, m.w, m.b)[:, 0] + x, (3, 6), (6, 6), "another parameter"),
    "also read": (lambda m, x: F.linear(x, m.w) + m.w.sum(), (3, 4), (6, 4), "used by aten.sum.default and 1 more,"),
    "two ways": (lambda m, x: F.linear(x @ m.w, m.w), (3, 4), (4, 4), "shared by calls of different kinds"),
    "returned": (lambda m, x: (x, m.w), (3, 4), (6, 4), "used by output"),
    "transposed twice": (lambda m, x: F.linear(x, m.w.t().t()), (3, 4), (6, 4), "used by aten.t.default"),
    "one row": (lambda m, x: F.linear(x, m.w), (3, 4), (1, 4), "1 x 4 has no rank below break-even"),
    "one column": (lambda m, x: F.linear(x, m.w), (3, 1), (6, 1), "6 x 1 has no rank below break-even"),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.w), (3, 4), (6, 4, 4), "used by aten.bilinear.default"),
}


@pytest.mark.parametrize("name", NEAR_LINEAR)
def test_what_is_nearly_a_linear_layer_is_left_alone(name: str) -> None:
    function, shape, weight, reason = NEAR_LINEAR[name]
    table = table_of(Apply(function, weight), rows(*shape))
    assert table.sites == ()
    assert table.taps == {}
    (left,) = table.left_alone
    assert left.name == "w"
    assert reason in left.reason


# Convolutions ---------------------------------------------------------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[dict[str, Any], Patch]] = {
    "3 x 3": ({"kernel_size": 3}, Patch((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))),
    "1 x 1": ({"kernel_size": 1}, Patch((1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1))),
    "strided 1 x 1": ({"kernel_size": 1, "stride": 2}, Patch((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1))),
    "padded 1 x 1": ({"kernel_size": 1, "padding": 1}, Patch((1, 1), (1, 1), ((1, 1), (1, 1)), (1, 1))),
    "7 x 7 strided": (
        {"kernel_size": 7, "stride": 2, "padding": 3}, Patch((7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1))
    ),
    "asymmetric": (
        {"kernel_size": (1, 5), "stride": (2, 1), "padding": (0, 2)},
        Patch((1, 5), (2, 1), ((0, 0), (2, 2)), (1, 1)),
    ),
    "dilated": (
        {"kernel_size": 3, "dilation": (2, 3), "padding": (2, 1)}, Patch((3, 3), (1, 1), ((2, 2), (1, 1)), (2, 3))
    ),
    "same": ({"kernel_size": 3, "padding": "same"}, Patch((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))),
    "same, even": ({"kernel_size": (4, 2), "padding": "same"}, Patch((4, 2), (1, 1), ((1, 2), (0, 1)), (1, 1))),
    "same, dilated": (
        {"kernel_size": (2, 3), "padding": "same", "dilation": 3}, Patch((2, 3), (1, 1), ((1, 2), (3, 3)), (3, 3))
    ),
    "valid": ({"kernel_size": 3, "padding": "valid", "stride": 2}, Patch((3, 3), (2, 2), ((0, 0), (0, 0)), (1, 1))),
    "reflect": (
        {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
        Patch((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ),
    "circular, same": (
        {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"},
        Patch((3, 2), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ),
    "replicate, strided": (
        {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
        Patch((3, 3), (2, 2), ((0, 0), (0, 0)), (1, 1)),
    ),
    "no bias": ({"kernel_size": 3, "bias": False}, Patch((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1))),
}  # fmt: skip

# Products of at most 3 * 49 numbers of size one, summed in float32 in two orders: 1e-6 measured.
CONV_ROUNDING = 1e-5


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_convolution_is_a_linear_layer_over_patches(name: str) -> None:
    options, patch = CONVOLUTIONS[name]
    model = nn.Sequential(nn.Conv2d(3, 5, **options))
    x = rows(2, 3, 9, 8)
    gm = graph_of(model, x)
    table = find_sites(gm)
    check(gm, table)
    (site,) = table.sites
    kernel = patch.kernel[0] * patch.kernel[1]
    assert (site.name, site.kind, site.weight, site.patch) == ("0", "conv2d", "0.weight", patch)
    assert (site.out_features, site.in_features, site.transposed) == (5, 3 * kernel, False)
    assert site.centered == options.get("bias", True)
    (tap,) = table.taps.values()
    seen = value_of(gm, tap.node, x)
    height, width = patch.positions(seen.shape[2], seen.shape[3])
    patches = patch.extract(seen, torch.arange(2 * height * width))
    bias = gm.get_parameter("0.bias") if options.get("bias", True) else torch.zeros(5)
    output = patches @ site.matrix(gm.get_parameter("0.weight")).t() + bias
    expected = model(x)
    torch.testing.assert_close(
        output.reshape(2, height, width, 5).permute(0, 3, 1, 2), expected, rtol=0, atol=CONV_ROUNDING
    )  # fmt: skip


def value_of(gm: GraphModule, name: str, x: Tensor) -> Tensor:
    """What a node computes."""
    values: dict[str, Tensor] = {}

    class Keeping(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            values[node.name] = super().run_node(node)
            return values[node.name]

    with torch.no_grad():
        Keeping(gm).run(x, enable_io_processing=False)
    return values[name]


LEFT_MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, str]]] = {
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5), {"0": "a depthwise convolution (4 groups)"}),
    "depthwise same": (
        lambda: nn.Conv1d(4, 4, 3, groups=4, padding="same"), (2, 4, 5), {"0": "a depthwise convolution (4 groups)"}
    ),
    "one channel per group": (
        lambda: nn.Conv2d(4, 2, 3, groups=2), (2, 4, 5, 5), {"0": "1 x 18 to each of its 2 groups has no rank"}
    ),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), {"0": "a transposed convolution has no form"}),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), {"0": "a transposed convolution has no form"}
    ),
    "one output channel": (lambda: nn.Conv2d(4, 1, 3), (2, 4, 5, 5), {"0": "1 x 36 has no rank below break-even"}),
    "lstm": (
        lambda: nn.LSTM(4, 5, batch_first=True), (2, 3, 4),
        {"0.weight_ih_l0": "a recurrent layer keeps all", "0.weight_hh_l0": "a recurrent layer keeps all"},
    ),
    "gru": (
        lambda: nn.GRU(4, 5, batch_first=True), (2, 3, 4),
        {"0.weight_ih_l0": "a recurrent layer keeps all", "0.weight_hh_l0": "a recurrent layer keeps all"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_MODULES)
def test_other_layers_with_weights_are_left_alone(name: str) -> None:
    make, shape, reasons = LEFT_MODULES[name]
    table = table_of(nn.Sequential(make()), rows(*shape))
    assert table.sites == ()
    found = {left.name: left.reason for left in table.left_alone}
    assert set(found) == set(reasons)
    for site, reason in reasons.items():
        assert reason in found[site]


def test_an_image_without_a_batch_is_left_alone() -> None:
    model = Apply(lambda m, x: F.conv2d(x[0], m.w), (5, 3, 3, 3))
    (left,) = table_of(model, rows(2, 3, 6, 6)).left_alone
    assert left == LeftAlone("w", "it is applied to an input without a batch dimension")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: F.conv2d(x, m.w * 2), "used by aten.mul.Tensor"),
        (lambda m, x: F.conv2d(x, m.w.transpose(2, 3)), "used by aten.transpose.int"),
        (lambda m, x: F.conv2d(x, m.w, m.b * 2), "its bias is computed inside the graph"),
        (lambda m, x: F.conv2d(x, m.w) + F.conv2d(x, m.w, padding=1)[..., 1:-1, 1:-1], "different kinds or geometry"),
    ],
)
def test_what_is_nearly_a_convolution_is_left_alone(function: Callable[..., Any], reason: str) -> None:
    (left,) = table_of(Apply(function, (5, 3, 3, 3), bias=5), rows(2, 3, 6, 6)).left_alone
    assert reason in left.reason


# Groups and other dimensions ------------------------------------------------------------------------------------------

GROUPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, int, int, int]] = {
    # name: (convolution, the input's shape, kind, groups, out_features, in_features)
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9), "conv1d", 1, 6, 12),
    "conv1d, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (2, 4, 9), "conv1d", 1, 6, 16),
    "conv1d, grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (2, 4, 9), "conv1d", 2, 6, 6),
    "conv2d, grouped": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=(1, 0)), (2, 6, 5, 5), "conv2d", 3, 9, 18),
    "conv2d, grouped, same": (
        lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 5, 5), "conv2d", 2, 6, 18
    ),
    "conv2d, grouped 1 x 1": (lambda: nn.Conv2d(6, 6, 1, groups=2), (2, 6, 5, 5), "conv2d", 2, 6, 3),
    "conv3d": (lambda: nn.Conv3d(3, 6, (2, 3, 1), stride=(1, 2, 1)), (2, 3, 4, 5, 3), "conv3d", 1, 6, 18),
    "conv3d, grouped, same": (
        lambda: nn.Conv3d(4, 6, 2, groups=2, padding="same"), (2, 4, 3, 4, 5), "conv3d", 2, 6, 16
    ),
}  # fmt: skip


def applied(matrix: Tensor, own: Tensor, groups: int) -> Tensor:
    """Each block of rows of a matrix applied to its own part of every row: the definition of groups."""
    blocks, parts = matrix.chunk(groups), own.chunk(groups, -1)
    return torch.cat([part @ block.t() for block, part in zip(blocks, parts, strict=True)], -1)


@pytest.mark.parametrize("name", GROUPED)
def test_every_convolution_is_one_matrix_per_group(name: str) -> None:
    make, shape, kind, groups, out, width = GROUPED[name]
    model, x = nn.Sequential(make()).double(), rows(*shape).double()
    table = table_of(model, x)
    (site,), (tap,) = table.sites, table.taps.values()
    assert (site.kind, site.groups, site.out_features, site.in_features) == (kind, groups, out, width)
    assert (tap.groups, tap.width, tap.name.endswith(f" g{groups}]")) == (groups, groups * width, groups > 1)
    assert table.left_alone == ()
    assert tap.patch is not None
    patches = tap.patch.extract(x, torch.arange(tap.patch.rows(x)))
    parameters = dict(model.named_parameters())
    output = applied(site.matrix(parameters["0.weight"]), patches, groups) + parameters.get("0.bias", torch.zeros(out))
    wanted = model(x)
    places = tap.patch.positions(*x.shape[2:])
    # Sums of at most 18 products in float64, in two orders.
    torch.testing.assert_close(output.reshape(2, *places, out).movedim(-1, 1), wanted, rtol=0, atol=1e-13)


BATCHES: dict[str, tuple[Callable[[Apply, Tensor], Any], tuple[int, ...], tuple[int, ...], int]] = {
    # name: (function, the input's shape, the weight's shape, groups)
    "bmm": (lambda m, x: torch.bmm(x, m.w), (2, 3, 4), (2, 4, 6), 2),
    "matmul in 3-D": (lambda m, x: x @ m.w, (2, 3, 4), (2, 4, 6), 2),
    "matmul in 4-D": (lambda m, x: x @ m.w, (5, 2, 3, 4), (2, 4, 6), 2),
    "matmul in 5-D": (lambda m, x: x @ m.w, (2, 5, 2, 3, 4), (2, 4, 6), 2),
    "rows for all groups": (lambda m, x: x @ m.w, (3, 4), (2, 4, 6), 2),
    "rows for all groups, in 4-D": (lambda m, x: x @ m.w, (5, 1, 3, 4), (2, 4, 6), 2),
    "one matrix": (lambda m, x: x @ m.w, (5, 3, 4), (1, 4, 6), 1),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_product_with_a_matrix_per_group_is_a_site(name: str) -> None:
    function, shape, weight, groups = BATCHES[name]
    model, x = Apply(function, weight), rows(*shape)
    table = table_of(model, x)
    (site,), (tap,) = table.sites, table.taps.values()
    assert (site.kind, site.groups, site.out_features, site.in_features) == ("bmm", groups, groups * 6, 4)
    assert (site.centered, tap.groups, tap.width) == (False, groups, groups * 4)
    for group, block in enumerate(site.matrix(model.w).chunk(groups)):
        assert torch.equal(block, model.w[group].t())


def test_an_activation_has_a_tap_for_each_grouping() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Conv2d(4, 6, 3)
            self.grouped = nn.Conv2d(4, 6, 3, groups=2)

        def forward(self, x: Tensor) -> Any:
            return self.plain(x) + self.grouped(x)

    table = table_of(Two(), rows(2, 4, 6, 6))
    assert list(table.taps) == ["x[k3x3 s1x1 p0,0,0,0 d1x1]", "x[k3x3 s1x1 p0,0,0,0 d1x1 g2]"]


def test_a_vector_and_no_rows_at_all_are_activations_too() -> None:
    (site,) = table_of(Apply(lambda m, x: x[0] @ m.w, (4, 6)), rows(3, 4)).sites
    assert (site.kind, site.transposed) == ("linear", True)
    (site,) = table_of(Apply(lambda m, x: F.linear(x[0:0], m.w)), rows(3, 4)).sites
    assert site.name == "w"


# Weights that are no floating parameters, and weights in places of their own ------------------------------------------


class Held(nn.Module):
    """Buffers and an integer parameter at work as weights, beside buffers that are none."""

    mel: Tensor
    kernel: Tensor
    mask: Tensor
    ids: Tensor
    column: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mel", rows(4, 6))
        self.register_buffer("kernel", rows(5, 1, 3))
        self.register_buffer("mask", torch.ones(3, 6))
        self.register_buffer("ids", torch.zeros(1, 3, dtype=torch.long))
        self.register_buffer("column", rows(4, 1))
        self.small = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Any:
        y = (x @ self.mel) * self.mask
        z = F.conv1d(x[:, None], self.kernel).sum((1, 2)) + (x @ self.column)[:, 0]
        return y + z[:, None] + F.linear(x, self.small.float() * 0.5), self.ids + 1


@pytest.mark.parametrize("clean", [False, True])
def test_weights_that_are_no_floating_parameters_are_listed(clean: bool) -> None:
    gm = graph_of(Held(), rows(3, 4))
    if clean:
        PassManager(order.cleanup()).run(gm)
    table = find_sites(gm)
    left = {entry.name: entry.reason for entry in table.left_alone}
    assert left.pop("mel") == left.pop("kernel") == "its weight is a buffer, not a parameter"
    if not clean:
        assert left.pop("small") == "its weight is quantised or complex (torch.int8)"
        assert not left
    assert not table.taps or clean


def test_weights_inside_a_branch_are_listed() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Any:
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,))

    table = table_of(Branch(), rows(3, 4))
    reason = "it is applied inside a branch or a loop of the graph, where its input cannot be observed"
    assert table.left_alone == (LeftAlone("a", reason), LeftAlone("b", reason))


def test_a_weight_that_an_embedding_reads_under_another_name_is_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(12, 6)
            self.head = nn.Linear(6, 12, bias=False)
            self.copy = nn.Linear(6, 12, bias=False)
            self.head.weight = nn.Parameter(self.embedding.weight.detach())
            self.copy.weight = nn.Parameter(self.embedding.weight.detach().clone())

        def forward(self, ids: Tensor) -> Any:
            x = self.embedding(ids)
            return self.head(x) + self.copy(x)

    table = table_of(Tied(), torch.arange(6).reshape(2, 3))
    assert {site.name: site.tied for site in table.sites} == {"head": True, "copy": False}
    assert [left.name for left in table.left_alone] == ["embedding"]


# Sharing --------------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Weights, biases and inputs that several layers share."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.way = forward

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def test_layers_that_share_an_input_share_a_tap() -> None:
    table = table_of(Shared(lambda m, x: m.a(x.relu()) + m.b(x.relu().sin()).cos()), rows(3, 4))
    assert len(table.taps) == 2
    table = table_of(Shared(lambda m, x: (lambda y: m.a(y) + m.b(y))(x.relu())), rows(3, 4))
    assert list(table.taps) == ["relu"]
    assert [[tap.name for tap in table.taps_of(site)] for site in table.sites] == [["relu"], ["relu"]]
    assert sorted(table.graph.successors("relu")) == ["a", "b"]
    assert table.graph.nodes["a"]["kind"] == "site"
    assert table.graph.nodes["relu"]["kind"] == "tap"


def test_convolutions_of_another_geometry_have_taps_of_their_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 3, padding=1)
            self.b = nn.Conv2d(3, 5, 3, padding=1)
            self.c = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.a(x), self.b(x), self.c(x)

    table = table_of(Two(), rows(2, 3, 6, 6))
    taps = [table.taps_of(site)[0] for site in table.sites]
    assert taps[0] == taps[1] != taps[2]
    assert {tap.node for tap in taps} == {"x"}
    assert taps[0].name == "x[k3x3 s1x1 p1,1,1,1 d1x1]"
    assert (taps[0].width, taps[2].width) == (27, 3)


def test_a_module_called_twice_is_one_site_with_two_calls() -> None:
    table = table_of(Shared(lambda m, x: m.b(m.a(m.a(x)).relu())), rows(3, 4))
    assert [site.name for site in table.sites] == ["a", "b"]
    shared = table.sites[0]
    assert [(call.node, call.tap) for call in shared.calls] == [("linear", "x"), ("linear_1", "linear")]
    assert [tap.name for tap in table.taps_of(shared)] == ["x", "linear"]
    assert shared.centered
    table = table_of(Shared(lambda m, x: m.a(x) + m.a(x) + m.b(x)), rows(3, 4))
    assert [len(table.taps_of(site)) for site in table.sites] == [1, 1]


def test_a_weight_tied_between_two_layers_is_one_site() -> None:
    model = Shared(lambda m, x: m.b(m.a(x).relu()))
    model.b.weight = model.a.weight
    table = table_of(model, rows(3, 4))
    (site,) = table.sites
    assert site.name in ("a", "b")
    assert len(site.calls) == 2
    # Each call has a bias of its own, and each takes up the mean's share.
    assert sorted(str(call.bias) for call in site.calls) == ["a.bias", "b.bias"]
    assert site.centered


def test_an_embedding_tied_to_the_head_is_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(12, 6)
            self.middle = nn.Linear(6, 6)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Any:
            return self.head(self.middle(self.embedding(ids)))

    table = table_of(Tied(), torch.arange(6).reshape(2, 3))
    assert [site.name for site in table.sites] == ["middle"]
    (left,) = table.left_alone
    assert left.name in ("embedding", "head")
    assert left.reason == "an embedding is a table lookup, not a matrix product; 1 more use the same weight"


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: m.a(x) + m.a.bias,
        lambda m, x: m.a(x) + F.linear(x, m.b.weight, m.a.bias),
        lambda m, x: m.a(x) + F.linear(x.relu(), m.a.weight),
    ],
)
def test_a_bias_with_another_reader_does_not_take_up_the_mean(way: Callable[[Any, Tensor], Any]) -> None:
    table = table_of(Shared(way), rows(3, 4))
    assert not any(site.centered for site in table.sites)


def test_a_bias_tied_under_another_name_does_not_take_up_the_mean() -> None:
    model = Shared(lambda m, x: m.b(m.a(x).relu()))
    model.b.bias = model.a.bias
    assert not any(site.centered for site in table_of(model, rows(3, 4)).sites)


# Names and patterns ---------------------------------------------------------------------------------------------------


def test_names_of_the_root_and_of_packed_attention_weights() -> None:
    (site,) = table_of(nn.Linear(4, 6), rows(3, 4)).sites
    assert (site.name, site.weight) == ("weight", "weight")
    assert (site.attribute("factor_in"), site.attribute("factor_out")) == ("factor_in", "factor_out")

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            return self.mixer(x, x, x, need_weights=False)[0]

    gm = graph_of(Attention(), rows(3, 5, 8))
    PassManager(order.cleanup()).run(gm)
    table = find_sites(gm)
    check(gm, table)
    names = {site.name: site for site in table.sites}
    assert set(names) >= {"mixer.out_proj"}
    packed = next(site for name, site in names.items() if "in_proj_weight" in name)
    assert packed.name == "mixer.in_proj_weight"
    assert packed.attribute("factor_in") == "mixer.in_proj_weight_factor_in"
    assert (packed.out_features, packed.in_features) == (24, 8)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.pooler = nn.ModuleDict({"dense": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x).relu()
        return self.pooler["dense"](x)


@pytest.fixture(scope="module")
def encoder() -> GraphModule:
    return graph_of(Encoder(), rows(3, 4))


@pytest.mark.parametrize(
    ("skip", "skipped"),
    [
        ((), {}),
        (("*.pooler.*",), {"pooler.dense": "*.pooler.*"}),
        (("pooler.*",), {"pooler.dense": "pooler.*"}),
        (("pooler.dense",), {"pooler.dense": "pooler.dense"}),
        (("pooler.dense.weight",), {"pooler.dense": "pooler.dense.weight"}),
        (("layers.[01]", "*.2"), {"layers.0": "layers.[01]", "layers.1": "layers.[01]", "layers.2": "*.2"}),
        (("layers.0", "layers.*"), {"layers.0": "layers.0", "layers.1": "layers.*", "layers.2": "layers.*"}),
    ],
)
def test_skip_patterns(encoder: GraphModule, skip: tuple[str, ...], skipped: dict[str, str]) -> None:
    table = find_sites(encoder, skip)
    check(encoder, table)
    assert {left.name: left.reason for left in table.left_alone} == {
        name: f"skipped by the pattern {pattern!r}" for name, pattern in skipped.items()
    }
    assert [site.name for site in table.sites] == [
        name for name in ("layers.0", "layers.1", "layers.2", "pooler.dense") if name not in skipped
    ]
    assert set(table.taps) == {call.tap for site in table.sites for call in site.calls}


def test_a_pattern_that_matches_nothing_is_a_mistake(encoder: GraphModule) -> None:
    with pytest.raises(
        OptionError, match=r"skip='\*\.poler\.\*' matches no weight of this model.*layers\.0, layers\.1.*pooler\.dense"
    ):
        find_sites(encoder, ("*.poler.*", "layers.0"))
    with pytest.raises(OptionError, match="matches no weight"):
        find_sites(encoder, ("Pooler.dense",))


def test_a_pattern_that_matches_nothing_names_skipped_layers_too(encoder: GraphModule) -> None:
    with pytest.raises(OptionError, match=r"its layers are layers\.0.*pooler\.dense"):
        find_sites(encoder, ("*", "nothing"))


# Whole models ---------------------------------------------------------------------------------------------------------


class Zoo(nn.Module):
    """Many kinds of weight in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.position = nn.Parameter(rows(1, 16, 8))
        self.table = nn.Parameter(rows(5, 8))
        self.mixer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.frozen = nn.Linear(8, 4).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
        self.linears = nn.ModuleList([nn.Bilinear(8, 8, 4), nn.Linear(8, 4, bias=False)])

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.grouped(self.stem(x))).flatten(2).transpose(1, 2) + self.position
        x = self.mixer(x, x, x)[0] + self.table.mean(0)
        return self.head(x) + self.frozen(x) + self.normed(x) + self.linears[0](x, x) + self.linears[1](x)


@pytest.mark.parametrize("clean", [False, True])
def test_no_weight_is_silently_missing(clean: bool) -> None:
    gm = graph_of(Zoo().eval(), rows(2, 3, 6, 6))
    if clean:
        PassManager(order.cleanup()).run(gm)
    table = find_sites(gm)
    check(gm, table)
    sites, left = {site.name for site in table.sites}, {entry.name for entry in table.left_alone}
    assert {"stem", "grouped", "head", "frozen", "linears.1", "mixer.out_proj"} <= sites
    assert {"position", "linears.0"} <= left
    assert any("normed" in name for name in (sites if clean else left))


def test_a_weight_that_forward_never_uses_is_listed() -> None:
    table = table_of(Shared(lambda m, x: m.b(x)), rows(3, 4))
    assert [site.name for site in table.sites] == ["b"]
    assert table.left_alone == (LeftAlone("a", "the captured graph never uses it"),)
    table = find_sites(graph_of(Shared(lambda m, x: m.b(x)), rows(3, 4)), ("a",))
    assert table.left_alone == (LeftAlone("a", "skipped by the pattern 'a'"),)


def test_a_model_without_weights_has_no_sites() -> None:
    table = table_of(nn.ReLU(), rows(3, 4))
    assert (table.sites, table.taps, table.left_alone) == ((), {}, ())


def test_a_site_knows_nothing_of_the_graph() -> None:
    (site,) = table_of(nn.Linear(4, 6), rows(3, 4)).sites
    assert isinstance(site, Site)
    assert hash(site) == hash(site)
    assert not any(isinstance(value, torch.fx.Node | Tensor) for value in vars(site).values())
