"""Convolutions replaced by pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.forms import Channel, Factors, LowRank
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes.base import PassManager, Refusal
from lowrank_fx.passes.factorize_conv import FactorizeConv
from lowrank_fx.passes.factorize_linear import FactorizeLinear
from lowrank_fx.sites import Site
from lowrank_fx.testing import assert_equivalent, graph_text, run_pass

# A pair of full rank is the layer itself, but for two roundings to float32 and sums of at most 3 * 49 products: 5e-7
# measured.
ROUNDING = 3e-6

Factored = dict[str, tuple[Site, Factors]]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(model: nn.Module, *args: Tensor) -> GraphModule:
    return capture(model, Call(args, {})).graph_module


def factors_of(site: Site, weight: Tensor, rank: int | None = None, shift: Tensor | None = None) -> Factors:
    """A pair by plain SVD of each group's matrix; of full rank it is the weight itself."""
    first, second = [], []
    for block in site.matrix(weight.detach()).double().chunk(site.groups):
        left, values, right = torch.linalg.svd(block, full_matrices=False)
        first.append((values[:, None] * right)[:rank])
        second.append(left[:, :rank])
    form = Channel() if site.patch is not None else LowRank()
    return form.assemble(site, torch.cat(first).to(weight.dtype), torch.cat(second).to(weight.dtype), shift)


def full(gm: GraphModule) -> Factored:
    return {site.name: (site, factors_of(site, gm.get_parameter(site.weight))) for site in find_sites(gm).sites}


class Two(nn.Module):
    """One convolution with everything, one with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, (3, 5), stride=2, padding=(1, 2), dilation=(1, 2))
        self.conv2 = nn.Conv2d(4, 6, 1, bias=False)

    def forward(self, x: Tensor) -> Any:
        return self.conv2(self.conv1(x).relu())


GOLDEN = """\
%conv1_bias = get[conv1.bias]
%x = input
%conv1_factor_in = get[conv1.factor_in]
%conv1_factor_out = get[conv1.factor_out]
%conv2d_2 = conv2d(%x, %conv1_factor_in, None, [2, 2], [1, 2], [1, 2])
%conv2d = conv2d(%conv2d_2, %conv1_factor_out, %conv1_bias)
%relu = relu(%conv2d)
%conv2_factor_in = get[conv2.factor_in]
%conv2_factor_out = get[conv2.factor_out]
%conv2d_4 = conv2d(%relu, %conv2_factor_in, None)
%conv2d_1 = conv2d(%conv2d_4, %conv2_factor_out)
return (%conv2d_1,)"""


def test_numbers_count_graph_and_names() -> None:
    model, x = Two(), rows(2, 3, 9, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gm = graph_of(model, x)
    result = run_pass(gm, FactorizeConv(full(gm)), (x,), tolerance=ROUNDING)
    assert result.changes == ("conv1 4 x 45 factored at rank 4", "conv2 6 x 4 factored at rank 4")
    assert result.refusals == ()
    assert graph_text(gm) == GOLDEN
    assert {name: tuple(tensor.shape) for name, tensor in gm.state_dict().items()} == {
        "conv1.bias": (4,), "conv1.factor_in": (4, 3, 3, 5), "conv1.factor_out": (4, 4, 1, 1),
        "conv2.factor_in": (4, 4, 1, 1), "conv2.factor_out": (6, 4, 1, 1),
    }  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert_equivalent(gm, model, (rows(5, 3, 9, 9),), rtol=ROUNDING)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "1 x 1, strided": {"kernel_size": 1, "stride": 2},
    "7 x 7": {"kernel_size": 7, "stride": (2, 1), "padding": 3},
    "dilated": {"dilation": (2, 3), "padding": (2, 3)},
    "same": {"padding": "same"},
    "same, even and dilated": {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid", "stride": 2},
    "reflect": {"padding": 2, "padding_mode": "reflect", "stride": 2},
    "circular, same": {"padding": "same", "padding_mode": "circular"},
    "replicate": {"padding": (1, 0), "padding_mode": "replicate"},
    "no bias": {"bias": False, "padding": "same"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_geometry_stays_with_the_first_convolution(name: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 5, **{"kernel_size": 3, **OPTIONS[name]})), rows(2, 3, 9, 8)
    gm = graph_of(model, x)
    before = next(line for line in graph_text(gm).splitlines() if line.startswith("%conv2d = "))
    result = run_pass(gm, FactorizeConv(full(gm)), (x,), tolerance=ROUNDING)
    assert result.rewrites == 1
    inner, outer = (line for line in graph_text(gm).splitlines() if " = conv2d" in line)
    operator, arguments = before.split(" = ")[1].split("(", 1)
    geometry = arguments.split(", ", 3)[3] if arguments.count(", ") >= 3 else ""
    assert inner.split(" = ")[1].startswith(f"{operator}(")
    assert inner.endswith(geometry or ")")
    bias = "" if OPTIONS[name].get("bias") is False else ", %_0_bias"
    assert outer == f"%conv2d = conv2d(%conv2d_1, %_0_factor_out{bias})"
    assert_equivalent(gm, model, (rows(3, 3, 9, 8, seed=1),), rtol=ROUNDING)


def test_channels_last_and_float64() -> None:
    model = Two().double()
    x = rows(2, 3, 9, 9).double().to(memory_format=torch.channels_last)
    gm = graph_of(model, x)
    result = run_pass(gm, FactorizeConv(full(gm)), (x,), tolerance=1e-14)
    assert result.rewrites == 2


def test_the_bias_takes_up_the_shift_at_every_position() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 5, 3)), rows(2, 3, 6, 6)
    gm = graph_of(model, x)
    (site,) = find_sites(gm).sites
    shift = torch.linspace(-1, 1, 5, dtype=torch.float64)
    factors = factors_of(site, gm.get_parameter("0.weight"), shift=shift)
    PassManager([FactorizeConv({"0": (site, factors)})], verify=True).run(gm)
    torch.testing.assert_close(gm(x), model(x) + shift.float()[:, None, None], rtol=1e-5, atol=1e-5)


def test_every_call_of_a_shared_convolution_is_replaced() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Any:
            return self.conv(self.conv(x).relu())

    model, x = Shared(), rows(2, 3, 6, 6)
    gm = graph_of(model, x)
    result = run_pass(gm, FactorizeConv(full(gm)), (x,), tolerance=ROUNDING)
    assert result.changes == ("conv 3 x 27 factored at rank 3",)
    assert set(gm.state_dict()) == {"conv.bias", "conv.factor_in", "conv.factor_out"}
    assert sum(" = conv2d(" in line for line in graph_text(gm).splitlines()) == 4


class Volumes(nn.Module):
    """Grouped and plain convolutions in one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 0), groups=2)
        self.wave = nn.Conv1d(6, 6, 3, padding="same", groups=3, bias=False)
        self.last = nn.Conv1d(6, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.wave(self.volume(x).mean((2, 3))))


GOLDEN_GROUPS = """\
%volume_bias = get[volume.bias]
%last_bias = get[last.bias]
%x = input
%volume_factor_in = get[volume.factor_in]
%volume_factor_out = get[volume.factor_out]
%conv3d_1 = conv3d(%x, %volume_factor_in, None, [1, 1, 1], [1, 0, 0], [1, 1, 1], 2)
%conv3d = conv3d(%conv3d_1, %volume_factor_out, %volume_bias, groups=2)
%mean = mean.dim(%conv3d, [2, 3])
%wave_factor_in = get[wave.factor_in]
%wave_factor_out = get[wave.factor_out]
%conv1d_2 = conv1d.padding(%mean, %wave_factor_in, None, [1], 'same', [1], 3)
%conv1d = conv1d(%conv1d_2, %wave_factor_out, groups=3)
%last_factor_in = get[last.factor_in]
%last_factor_out = get[last.factor_out]
%conv1d_4 = conv1d(%conv1d, %last_factor_in, None, [2])
%conv1d_1 = conv1d(%conv1d_4, %last_factor_out, %last_bias)
return (%conv1d_1,)"""


def test_groups_and_other_dimensions() -> None:
    model, x = Volumes(), rows(2, 4, 3, 5, 8)
    gm = graph_of(model, x)
    result = run_pass(gm, FactorizeConv(full(gm)), (x,), tolerance=ROUNDING)
    assert result.changes == (
        "volume 6 x 12 factored at rank 3 in each of 2 groups",
        "wave 6 x 6 factored at rank 2 in each of 3 groups",
        "last 4 x 12 factored at rank 4",
    )
    assert graph_text(gm) == GOLDEN_GROUPS
    assert {name: tuple(tensor.shape) for name, tensor in gm.state_dict().items()} == {
        "volume.bias": (6,), "volume.factor_in": (6, 2, 2, 3, 1), "volume.factor_out": (6, 3, 1, 1, 1),
        "wave.factor_in": (6, 2, 3), "wave.factor_out": (6, 2, 1),
        "last.bias": (4,), "last.factor_in": (4, 6, 2), "last.factor_out": (4, 4, 1),
    }  # fmt: skip
    assert_equivalent(gm, model, (rows(5, 4, 3, 5, 8),), rtol=ROUNDING)
    assert gm(rows(0, 4, 3, 5, 8)).shape == (0, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_dtype(dtype: torch.dtype) -> None:
    model, x = Volumes().to(dtype), rows(2, 4, 3, 5, 8).to(dtype)
    gm = graph_of(model, x)
    # Each of three layers rounds two factors, a middle value and an output to the dtype.
    result = run_pass(gm, FactorizeConv(full(gm)), (x,), tolerance=6 * torch.finfo(dtype).eps)
    assert result.rewrites == 3
    assert {parameter.dtype for parameter in gm.parameters()} == {dtype}


class Mixed(nn.Module):
    """A convolution, a linear layer, and a grouped convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.grouped(self.conv(x)).mean((2, 3)))


def test_each_pass_takes_its_own_kind() -> None:
    x = rows(2, 3, 7, 7)
    gm = graph_of(Mixed(), x)
    factored = full(gm)
    assert set(factored) == {"conv", "grouped", "head"}
    assert run_pass(gm, FactorizeLinear(factored), (x,), tolerance=ROUNDING).changes == (
        "head 5 x 4 factored at rank 4",
    )
    assert run_pass(gm, FactorizeConv(factored), (x,), tolerance=ROUNDING).changes == (
        "conv 4 x 27 factored at rank 4",
        "grouped 4 x 18 factored at rank 2 in each of 2 groups",
    )


def test_a_convolution_that_is_gone_is_left_alone() -> None:
    x = rows(2, 3, 7, 7)
    factored = full(graph_of(Mixed(), x))
    gm = graph_of(nn.Sequential(nn.ReLU()), x)
    text = graph_text(gm)
    result = run_pass(gm, FactorizeConv(factored), (x,), tolerance=0.0)
    assert result.changes == ()
    assert result.refusals == (
        Refusal("conv", "the graph has no node 'conv2d'"), Refusal("grouped", "the graph has no node 'conv2d_1'"),
    )  # fmt: skip
    assert graph_text(gm) == text


@pytest.mark.parametrize("limit", [0, 1])
def test_max_rewrites_bisects(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", str(limit))
    x = rows(2, 3, 9, 9)
    gm = graph_of(Two(), x)
    result = run_pass(gm, FactorizeConv(full(gm)), (x,), tolerance=ROUNDING)
    assert [change.split()[0] for change in result.changes] == ["conv1", "conv2"][:limit]
    assert result.refusals == tuple(
        Refusal(name, f"LOWRANK_FX_MAX_REWRITES={limit} is used up") for name in ["conv1", "conv2"][limit:]
    )
