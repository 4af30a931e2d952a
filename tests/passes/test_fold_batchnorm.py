"""Batch normalisation folded into convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.passes.base import Refusal
from lowrank_fx.passes.fold_batchnorm import FoldBatchNorm
from lowrank_fx.testing import graph_text, run_pass

# The formula is exact; what is left is one rounding of weight and bias to float32 and two orders of summation over at
# most 3 * 27 products: 2e-7 measured.
ROUNDING = 1e-6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic values that a fold could get wrong (no ones, no zeros)."""
    source = generator(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                spread = torch.rand(tensor.shape, generator=source, dtype=torch.float64)
                tensor.copy_(spread + 0.3 if name.endswith("running_var") else 2 * spread - 1)
    return model.eval()


def capture(model: nn.Module, *args: Tensor) -> GraphModule:
    batch = tuple({0: torch.export.Dim.DYNAMIC} for _ in args)
    gm = torch.export.export(model, args, dynamic_shapes=batch, strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


class Two(nn.Module):
    """One convolution without a bias and one with, strided and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(6, eps=1e-3)

    def forward(self, x: Tensor) -> Any:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


GOLDEN = """\
%conv1_weight = get[conv1.weight]
%conv2_weight = get[conv2.weight]
%conv2_bias = get[conv2.bias]
%x = input
%conv1_bias = get[conv1.bias]
%conv2d = conv2d(%x, %conv1_weight, %conv1_bias)
%relu = relu(%conv2d)
%conv2d_1 = conv2d(%relu, %conv2_weight, %conv2_bias, [2, 2], [1, 1])
return (%conv2d_1,)"""


def test_numbers_count_graph_and_names() -> None:
    model = randomised(Two())
    x = torch.randn(2, 3, 9, 9, generator=generator())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gm = capture(model, x)
    result = run_pass(gm, FoldBatchNorm(), (x,), tolerance=ROUNDING)
    assert result.changes == ("bn1 folded into conv1", "bn2 folded into conv2")
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    # num_batches_tracked never had a user, so it is not this pass's to delete.
    counters = {"bn1.num_batches_tracked", "bn2.num_batches_tracked"}
    assert set(gm.state_dict()) == counters | {"conv1.bias", "conv1.weight", "conv2.bias", "conv2.weight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert gm(torch.zeros(5, 3, 9, 9)).shape == (5, 6, 4, 4)


def test_the_formula_in_float64() -> None:
    model = randomised(Two())
    expected = model.double()
    bn = expected.get_submodule("bn2")
    conv = expected.get_submodule("conv2")
    assert isinstance(bn, nn.BatchNorm2d)
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    gm = capture(expected, torch.ones(2, 3, 9, 9, dtype=torch.float64))
    x = torch.randn(2, 3, 9, 9, generator=generator(), dtype=torch.float64)
    run_pass(gm, FoldBatchNorm(), (x,), tolerance=1e-14)
    torch.testing.assert_close(
        gm.get_parameter("conv2.weight"), conv.weight * scale[:, None, None, None], rtol=1e-14, atol=0
    )
    bias = (conv.bias - bn.running_mean) * scale + bn.bias
    torch.testing.assert_close(gm.get_parameter("conv2.bias"), bias, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(dtype)
    gm = capture(model, torch.ones(2, 3, 5, 5, dtype=dtype))
    wide = capture(copy.deepcopy(model).double(), torch.ones(2, 3, 5, 5, dtype=torch.float64))
    x = torch.ones(2, 3, 5, 5, dtype=torch.float64)
    run_pass(wide, FoldBatchNorm(), (x,), tolerance=1e-14)
    # The unfolded model rounds twice more than the folded one: a few units in the last place of either result.
    run_pass(gm, FoldBatchNorm(), (x.to(dtype),), tolerance=8 * torch.finfo(dtype).eps)
    weight = gm.get_parameter("0.weight")
    assert weight.dtype == dtype
    assert torch.equal(weight, wide.get_parameter("0.weight").to(dtype))


CONVOLUTIONS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], tuple[int, ...]]] = {
    "1d": (lambda: (nn.Conv1d(3, 4, 3, padding="same"), nn.BatchNorm1d(4)), (2, 3, 9)),
    "2d same": (lambda: (nn.Conv2d(3, 4, (3, 5), padding="same"), nn.BatchNorm2d(4)), (2, 3, 9, 9)),
    "reflected": (lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)), (2, 3, 9, 9)),
    "depthwise": (lambda: (nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)), (2, 4, 9, 9)),
    "grouped, dilated": (lambda: (nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6)), (2, 4, 9, 9)),
    "3d": (lambda: (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (2, 3, 5, 5, 5)),
    "not affine": (lambda: (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (2, 3, 9, 9)),
    "no bias at all": (lambda: (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)), (2, 3, 9, 9)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_every_kind_of_convolution(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=generator(1))
    gm = capture(randomised(nn.Sequential(*make()), seed=2), x)
    result = run_pass(gm, FoldBatchNorm(), (x,), tolerance=ROUNDING)
    assert result.changes == ("1 folded into 0",)
    assert "batch_norm" not in graph_text(gm)
    assert {key for key in gm.state_dict() if key[0] == "0"} == {"0.weight", "0.bias"}


@pytest.mark.parametrize("saved_used", [False, True])
def test_the_native_operator(saved_used: bool) -> None:
    class Native(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            bn = self.bn
            out = torch.ops.aten._native_batch_norm_legit_no_training(
                self.conv(x), bn.weight, bn.bias, bn.running_mean, bn.running_var, 0.1, bn.eps
            )
            return (out[0].relu(), out[1]) if saved_used else (out[0].relu(),)

    x = torch.randn(2, 3, 6, 6, generator=generator())
    gm = capture(randomised(Native()), x)
    result = run_pass(gm, FoldBatchNorm(), (x,), tolerance=ROUNDING)
    if saved_used:
        assert result.refusals == (Refusal("_native_batch_norm_legit_no_training", "its saved statistics are used"),)
    else:
        assert result.changes == ("bn folded into conv",)
        assert graph_text(gm).splitlines()[-3:] == [
            "%conv2d = conv2d(%x, %conv_weight, %conv_bias)", "%relu = relu(%conv2d)", "return (%relu,)",
        ]  # fmt: skip


def test_what_is_normalised_twice_is_folded_twice() -> None:
    x = torch.randn(2, 3, 6, 6, generator=generator())
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    gm = capture(randomised(model), x)
    result = run_pass(gm, FoldBatchNorm(), (x,), tolerance=ROUNDING)
    assert result.changes == ("1 folded into 0", "2 folded into 0")
    assert "batch_norm" not in graph_text(gm)


def test_gradients_are_asked_for_where_they_were() -> None:
    frozen = randomised(Two()).requires_grad_(False)
    frozen.get_submodule("bn2").requires_grad_(True)
    x = torch.randn(2, 3, 9, 9, generator=generator())
    gm = capture(frozen, x)
    run_pass(gm, FoldBatchNorm(), (x,), tolerance=ROUNDING)
    assert {name: parameter.requires_grad for name, parameter in gm.named_parameters()} == {
        "conv1.weight": False, "conv1.bias": False, "conv2.weight": True, "conv2.bias": True,
    }  # fmt: skip


def test_max_rewrites_stops_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", "1")
    x = torch.randn(2, 3, 9, 9, generator=generator())
    gm = capture(randomised(Two()), x)
    result = run_pass(gm, FoldBatchNorm(), (x,), tolerance=ROUNDING)
    assert result.changes == ("bn1 folded into conv1",)
    assert result.refusals == (Refusal("batch_norm_1", "LOWRANK_FX_MAX_REWRITES=1 is used up"),)


# Near misses ----------------------------------------------------------------------------------------------------------


class Near(nn.Module):
    """A convolution and its normalisation, applied by ``way``."""

    def __init__(self, way: Callable[[Near, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.other = nn.Conv2d(3, 3, 3, padding=1)
        self.up = nn.ConvTranspose2d(3, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.own = nn.BatchNorm2d(3, track_running_stats=False)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)

    def norm(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight if scale is None else scale, bn.bias)


def second_user(m: Near, x: Tensor) -> Any:
    y = m.conv(x)
    return m.bn(y) + y.relu()


def batch_statistics(m: Near, x: Tensor) -> Any:
    return m.own(m.conv(x))


def no_statistics(m: Near, x: Tensor) -> Any:
    return F.batch_norm(m.conv(x), None, None, m.bn.weight, m.bn.bias, training=True)


def weight_shared(m: Near, x: Tensor) -> Any:
    return m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight, m.other.bias, padding=1)


def bias_shared(m: Near, x: Tensor) -> Any:
    return m.bn(m.conv(x)) + F.conv2d(x, m.other.weight, m.conv.bias, padding=1)


def same_layer_twice(m: Near, x: Tensor) -> Any:
    return m.bn(m.conv(m.conv(x).relu()))


def transposed(m: Near, x: Tensor) -> Any:
    return m.bn(m.up(x))


def activation_between(m: Near, x: Tensor) -> Any:
    return m.bn(m.conv(x).relu())


def computed_weight(m: Near, x: Tensor) -> Any:
    return m.bn(F.conv2d(x, m.conv.weight * 2, m.conv.bias, padding=1))


def computed_bias(m: Near, x: Tensor) -> Any:
    return m.bn(F.conv2d(x, m.conv.weight, m.conv.bias * 2 if m.conv.bias is not None else None, padding=1))


def computed_scale(m: Near, x: Tensor) -> Any:
    return m.norm(m.conv(x), m.bn.weight * 2)


def written_statistics(m: Near, x: Tensor) -> Any:
    y = m.bn(m.conv(x))
    assert m.bn.running_mean is not None
    m.bn.running_mean.mul_(1.0)
    return y


NEAR_MISSES: dict[Callable[[Near, Tensor], Any], str] = {
    second_user: "the output of conv2d is also used by relu",
    batch_statistics: "it normalises by the statistics of the batch (training=True)",
    no_statistics: "it normalises by the statistics of the batch (training=True)",
    weight_shared: "the weight conv.weight is shared with conv2d_1",
    bias_shared: "the bias conv.bias is shared with conv2d_1",
    same_layer_twice: "the weight conv.weight is shared with conv2d",
    transposed: "its input conv_transpose2d is a transposed convolution",
    activation_between: "its input relu is not a convolution's output",
    computed_weight: "the weight of conv2d is computed inside the graph",
    computed_bias: "the bias of conv2d is computed inside the graph",
    computed_scale: "its weight is computed inside the graph",
    written_statistics: "its running mean bn.running_mean is written to by the graph",
}


@pytest.mark.parametrize("way", NEAR_MISSES, ids=lambda way: way.__name__)
def test_near_misses_are_left_alone(way: Callable[[Near, Tensor], Any]) -> None:
    x = torch.randn(2, 3, 6, 6, generator=generator())
    gm = capture(randomised(Near(way)), x)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    result = run_pass(gm, FoldBatchNorm(), (x,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == (Refusal("batch_norm", NEAR_MISSES[way]),)
    assert graph_text(gm) == text


def test_a_weight_tied_under_another_name_is_shared() -> None:
    model = Near(lambda m, x: m.bn(m.conv(x)) + m.other(x))
    model.other.weight = model.conv.weight
    x = torch.randn(2, 3, 6, 6, generator=generator())
    gm = capture(randomised(model), x)
    result = run_pass(gm, FoldBatchNorm(), (x,), tolerance=0.0)
    (refusal,) = result.refusals
    assert refusal.reason.endswith("is shared with conv2d_1")


def test_mixed_dtypes_are_left_alone() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].to(torch.bfloat16)  # type: ignore[index]
    x = torch.ones(2, 3, 5, 5, dtype=torch.bfloat16)
    result = run_pass(capture(model, x), FoldBatchNorm(), (x,), tolerance=0.0)
    assert result.changes == ()
    (refusal,) = result.refusals
    assert refusal.reason == (
        "its tensors are not of one floating dtype (weight bfloat16, bias bfloat16, scale float32, shift float32, "
        "mean float32, variance float32, output bfloat16)"
    )
