"""The module tree: which modules are layers, and what stands in for them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from transformers.pytorch_utils import Conv1D

from lowrank_fx.forms import Channel, Factors, LowRank
from lowrank_fx.modules import (
    FactoredConv2d,
    FactoredLinear,
    Layer,
    StandIn,
    dense,
    is_computed,
    is_stand_in,
    read_layer,
    settled,
    stand_in,
    swap,
)
from lowrank_fx.sites import Site
from lowrank_fx.tree_sites import find_sites

RANK = 3


class Named(nn.Linear):
    """A linear layer of the user's own class."""

    def doubled(self) -> Tensor:
        return 2 * self.weight


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnWeight(nn.Linear):
    raw: Tensor

    @property
    def weight(self) -> Tensor:
        return self.raw * 2

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.raw = value


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = super()._conv_forward(input, weight, bias)
        return result + 1


class Scaled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


def transposed_linear() -> nn.Module:
    made: nn.Module = Conv1D(10, 12)  # type: ignore[no-untyped-call]
    return made


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(12, 10), (5, 12)),
    "linear, no bias, 4-D input": (nn.Linear(12, 10, bias=False), (2, 3, 4, 12)),
    "linear, one row without a batch": (nn.Linear(12, 10), (12,)),
    "linear of the user's own class": (Named(12, 10), (5, 12)),
    "Hugging Face Conv1D": (transposed_linear(), (2, 5, 12)),
    "conv1d": (nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2), (2, 6, 17)),
    "conv1d without a batch": (nn.Conv1d(6, 8, 3), (6, 17)),
    "conv2d": (nn.Conv2d(6, 8, (3, 1), padding=(1, 0)), (2, 6, 7, 5)),
    "conv2d, padding same": (nn.Conv2d(6, 8, (2, 3), padding="same", dilation=(1, 2)), (2, 6, 7, 9)),
    "conv2d, padding valid, no bias": (nn.Conv2d(6, 8, 3, padding="valid", bias=False), (2, 6, 7, 9)),
    "grouped conv2d": (nn.Conv2d(6, 9, 3, groups=3, stride=2), (2, 6, 7, 9)),
    "conv3d": (nn.Conv3d(4, 8, (1, 3, 2), padding=1), (2, 4, 3, 5, 4)),
}


def site_of(module: nn.Module) -> Site:
    (site,) = find_sites(nn.ModuleDict({"layer": module})).sites
    return site


def factors_of(site: Site, like: Tensor, seed: int = 0) -> Factors:
    """Random factors of rank ``RANK``, of a size that keeps sums near one."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(site.groups * RANK, site.in_features, generator=generator, dtype=torch.float64)
    second = torch.randn(site.out_features, RANK, generator=generator, dtype=torch.float64)
    form = Channel() if site.patch is not None else LowRank()
    made = form.assemble(site, first.to(like.dtype) / site.in_features**0.5, second.to(like.dtype) / RANK**0.5, None)
    return Factors(nn.Parameter(made.factor_in), nn.Parameter(made.factor_out), None, made.groups)


def factored(module: nn.Module) -> tuple[StandIn, Site, Factors]:
    site = site_of(module)
    weight = module.weight
    assert isinstance(weight, Tensor)
    factors = factors_of(site, weight)
    made = stand_in(module, site, factors, module._parameters["bias"])
    assert is_stand_in(made)
    return made, site, factors


def reference(module: nn.Module, site: Site, factors: Factors, x: Tensor) -> Tensor:
    """The original's own forward in float64, with the product of the factors as its weight."""
    plain = copy.deepcopy(module).double()
    plain._parameters["weight"] = nn.Parameter(site.unmatrix(factors.dense_matrix()))
    result: Tensor = plain(x.double())
    return result


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_stand_in_computes_with_the_product_of_its_factors(name: str, dtype: torch.dtype) -> None:
    layer, shape = LAYERS[name]
    module = copy.deepcopy(layer).to(dtype)
    made, site, factors = factored(module)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    # Two products, the value between them rounded once: each is off by a few units in the last place.
    assert relative(made(x), reference(module, site, factors, x)) < 4 * torch.finfo(dtype).eps
    assert made(x).dtype == dtype
    product = site.unmatrix(factors.dense_matrix())
    # Both are multiplied in float64, in another order where there are groups.
    torch.testing.assert_close(made.weight.detach(), product.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)
    assert made.weight.shape == module._parameters["weight"].shape  # type: ignore[union-attr]
    assert made.weight.dtype == dtype
    assert made.weight.device == product.device
    assert set(made.state_dict()) == {"factor_in", "factor_out"} | ({"bias"} if made.bias is not None else set())


@pytest.mark.parametrize("name", LAYERS)
def test_dense_is_the_way_back(name: str) -> None:
    module, shape = LAYERS[name]
    made, site, factors = factored(module)
    back = dense(made)
    assert type(back) is type(module)
    assert list(back.state_dict()) == list(module.state_dict())
    assert set(vars(back)) <= set(vars(module)) | {"_forward_pre_hooks"}
    assert not back._forward_pre_hooks
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert relative(back(x), reference(module, site, factors, x)) < 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", LAYERS)
def test_a_stand_in_is_of_the_class_that_it_stands_for(name: str) -> None:
    module, _ = LAYERS[name]
    made, _, _ = factored(module)
    assert isinstance(made, type(module))
    assert isinstance(made, StandIn)
    assert type(made).__name__ == f"Factored{type(module).__name__}"


def test_a_method_of_the_user_s_own_class_reads_the_product() -> None:
    made, _, _ = factored(Named(12, 10))
    assert isinstance(made, Named)
    assert torch.equal(made.doubled(), 2 * made.weight)


def test_plain_classes_are_not_made_anew() -> None:
    assert type(factored(nn.Linear(12, 10))[0]) is FactoredLinear
    assert type(factored(nn.Conv2d(6, 8, 3))[0]) is FactoredConv2d
    assert "12 -> 3 -> 10" in repr(factored(nn.Linear(12, 10))[0])


def test_attributes_flags_hooks_and_other_parameters_carry_over_both_ways() -> None:
    fired: list[str] = []
    module = nn.Linear(12, 10).train()
    module.note = "mine"  # type: ignore[assignment]
    module.register_parameter("extra", nn.Parameter(torch.ones(2)))
    module.register_buffer("seen", torch.zeros(1))
    module.register_forward_hook(lambda *_: fired.append("after"))
    module.register_forward_pre_hook(lambda *_: fired.append("before"))
    made, _, _ = factored(module)
    made.register_forward_hook(lambda *_: fired.append("later"))
    for each, expected in ((made, ["before", "after", "later"]), (dense(made), ["before", "after", "later"])):
        fired.clear()
        each(torch.zeros(1, 12))
        assert fired == expected
        assert each.training
        assert each.note == "mine"
        assert {"extra", "seen"} <= set(each.state_dict())
    fired.clear()
    module(torch.zeros(1, 12))
    assert fired == ["before", "after"]


def test_gradients_reach_the_factors_and_flags_are_kept() -> None:
    made, _, factors = factored(nn.Linear(12, 10))
    made(torch.ones(2, 12)).sum().backward()
    assert made.factor_in is factors.factor_in
    assert factors.factor_in.grad is not None
    assert factors.factor_out.grad is not None
    assert made.weight.requires_grad
    assert dense(made).weight.requires_grad
    made.requires_grad_(False)
    assert not dense(made).weight.requires_grad
    assert not made.weight.requires_grad


def test_a_stand_in_is_copied_moved_and_cast_like_any_module() -> None:
    made, _, _ = factored(transposed_linear())
    other = copy.deepcopy(made).double()
    assert torch.equal(other.weight.float(), made.weight)
    assert other.factor_in.data_ptr() != made.factor_in.data_ptr()
    assert made.to("meta").weight.device.type == "meta"


def test_setting_the_weight_is_refused_and_not_lost() -> None:
    made, _, _ = factored(nn.Linear(12, 10))
    with pytest.raises((AttributeError, KeyError)):
        made.weight = nn.Parameter(torch.zeros(10, 12))  # type: ignore[misc]


# Computed weights -----------------------------------------------------------------------------------------------------


def computed(kind: str) -> nn.Module:
    torch.manual_seed(0)
    linear, conv = nn.Linear(12, 10), nn.Conv2d(6, 8, 3)
    prune_half: Any = prune.random_unstructured
    made: dict[str, Any] = {
        "weight_norm": lambda: weight_norm(conv),
        "old weight_norm": lambda: old_weight_norm(linear),
        "old spectral_norm": lambda: spectral_norm(linear),
        "orthogonal": lambda: orthogonal(linear),
        "pruned": lambda: prune_half(linear, "weight", amount=0.5),
        "pruned bias": lambda: prune_half(linear, "bias", amount=0.5),
        "bias alone": lambda: parametrize.register_parametrization(linear, "bias", Scaled()),
        "both": lambda: parametrize.register_parametrization(
            parametrize.register_parametrization(linear, "bias", Scaled()), "weight", Scaled()
        ),
    }
    with torch.random.fork_rng():
        module: nn.Module = made[kind]()
    return module.eval()


COMPUTED = (
    "weight_norm", "old weight_norm", "old spectral_norm", "orthogonal", "pruned", "pruned bias", "bias alone", "both",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_settles_to_what_it_is_now(kind: str) -> None:
    module = computed(kind)
    assert isinstance(read_layer(module), Layer)
    assert is_computed(module)
    with torch.no_grad():  # what a hook computed last is stale now
        for parameter in module.parameters():
            parameter.mul_(1.25)
    plain = settled(module)
    assert type(plain) is (nn.Conv2d if kind == "weight_norm" else nn.Linear)
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert not list(plain.children())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    x = torch.randn(2, 6, 5, 5) if kind == "weight_norm" else torch.randn(3, 12)
    assert torch.equal(plain(x), module(x))
    assert is_computed(module), "the layer itself stays as it was"
    assert not is_computed(plain)
    assert type(factored(plain)[0]) in (FactoredLinear, FactoredConv2d)


def test_a_frozen_computed_weight_settles_frozen() -> None:
    module = weight_norm(nn.Linear(12, 10)).requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in settled(module).parameters())


# What is left alone ---------------------------------------------------------------------------------------------------


def exchanged_forward() -> nn.Module:
    module = nn.Linear(12, 10)
    module.forward = lambda input: F.relu(input)  # type: ignore[method-assign]
    return module


LEFT_ALONE: dict[str, tuple[nn.Module, str]] = {
    "embedding": (nn.Embedding(9, 8), "table lookup"),
    "embedding bag": (nn.EmbeddingBag(9, 8), "table lookup"),
    "lstm": (nn.LSTM(8, 8), "inside one operator"),
    "gru cell": (nn.GRUCell(8, 8), "inside one operator"),
    "attention": (nn.MultiheadAttention(8, 2), "inside one call"),
    "bilinear": (nn.Bilinear(8, 8, 8), "bilinear"),
    "transposed": (nn.ConvTranspose2d(8, 8, 3), "transposed convolution"),
    "reflect": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "padding mode is 'reflect'"),
    "circular": (nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"), "padding mode is 'circular'"),
    "own forward": (OwnForward(8, 8), "class OwnForward computes its output in a way of its own"),
    "own convolution": (OwnConvolution(8, 8, 3), "class OwnConvolution computes its output"),
    "own weight": (OwnWeight(8, 8), "class OwnWeight computes its weight"),
    "exchanged forward": (exchanged_forward(), "forward was exchanged"),
    "depthwise": (nn.Conv2d(8, 8, 3, groups=8), "depthwise"),
    "thin": (nn.Linear(8, 1), "1 x 8 has no rank below break-even"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_everything_else_is_left_alone_with_its_reason(name: str) -> None:
    module, reason = LEFT_ALONE[name]
    table = find_sites(nn.ModuleDict({"layer": module}))
    assert table.sites == ()
    assert table.left_alone
    assert all(reason in entry.reason and entry.name.startswith("layer") for entry in table.left_alone)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls quantised tensors deprecated
def test_a_quantised_layer_is_left_alone() -> None:
    module = torch.ao.nn.quantized.dynamic.Linear(8, 8)  # type: ignore[no-untyped-call]
    assert read_layer(module) == "a quantised layer keeps its weight packed"
    assert [entry.name for entry in find_sites(nn.ModuleDict({"layer": module})).left_alone] == ["layer"]


def test_a_weight_of_the_user_s_own_is_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(8, 8))
            self.scale = nn.Parameter(torch.zeros(8))

    (entry,) = find_sites(nn.ModuleDict({"own": Own()})).left_alone
    assert entry.name == "own.table"
    assert entry.reason == "it belongs to a Own, which is not a linear layer or convolution"


def test_modules_without_weights_are_nothing() -> None:
    for module in (nn.ReLU(), nn.LayerNorm(8), nn.BatchNorm2d(8), nn.Sequential(nn.Linear(4, 4)), nn.Flatten()):
        assert read_layer(module) is None


def test_swap_replaces_by_name_and_at_the_root() -> None:
    inner, root = nn.Linear(4, 4), nn.Sequential(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    assert swap(root, "0.1", inner) is root
    assert root.get_submodule("0.1") is inner
    assert swap(root, "", inner) is inner
