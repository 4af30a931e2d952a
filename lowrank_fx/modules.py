"""The module tree: which modules apply a weight, and the classes that stand in for them when they are factored.

A stand-in is a subclass of the layer that it replaces, so ``isinstance`` still holds. It computes through its factors,
and its ``weight`` is their product, for code that reads a layer's weight.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lowrank_fx.forms import Factors, composed
from lowrank_fx.forms.geometry import Geometry, divided
from lowrank_fx.gauge import Gauge
from lowrank_fx.hooks import is_weight_hook
from lowrank_fx.patches import Patch
from lowrank_fx.sites import Site

Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

_CONVS: dict[type[nn.Module], str] = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}

_ATTENTION = (
    "an nn.MultiheadAttention applies its projections inside one call, "
    "which is opened only where the first batch reaches it"
)

_REASONS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Embedding, "an embedding is a table lookup, not a matrix product"),
    (nn.EmbeddingBag, "an embedding is a table lookup, not a matrix product"),
    (nn.RNNBase, "a recurrent layer keeps all of its weights inside one operator"),
    (nn.RNNCellBase, "a recurrent layer keeps all of its weights inside one operator"),
    (nn.MultiheadAttention, _ATTENTION),
    (nn.Bilinear, "a bilinear layer is not a matrix product with one input"),
    (nn.modules.conv._ConvTransposeNd, "a transposed convolution has no form"),
)


FACTORS = ("factor_in", "factor_mid", "factor_out")
"""The names of a stand-in's factors."""

_REPLACED = ("weight", "bias", *FACTORS, "gauge_order")

_OWN = ("plain", "transposed", "pivots")
"""Attributes that a stand-in has besides those of the layer."""


@dataclass(frozen=True)
class Layer:
    """How a module applies its weight.

    Attributes:
        kind: of site.
        transposed: the weight is stored ``[in, out]``.
        patch: geometry of a convolution.
        groups: of a convolution.
    """

    kind: str
    transposed: bool = False
    patch: Patch | None = None
    groups: int = 1


def read_layer(module: nn.Module) -> Layer | str | None:
    """What kind of layer a module is, why it cannot be factored, or None where it holds no weight of its own."""
    if _is_quantised(module):
        return "a quantised layer keeps its weight packed"
    plain = _plain_class(module)
    if "forward" in vars(module) and _base(plain) is not None:
        return "its forward was exchanged on the object, so what it computes is not known"
    if _is_transposed_linear(plain):
        return Layer("linear", transposed=True)
    base = _base(plain)
    if plain is NonDynamicallyQuantizableLinear:  # nothing but an attention's out_proj, which is read, never called
        return _ATTENTION
    if base is not None and hasattr(plain, "weight"):
        return f"its class {plain.__name__} computes its weight in a way of its own"
    if base is nn.Linear:
        return Layer("linear") if _same_methods(plain, base, "forward", "__call__") else _own_way(plain)
    if base is not None:
        assert isinstance(module, Conv)
        if not _same_methods(plain, base, "forward", "_conv_forward", "__call__"):
            return _own_way(plain)
        if module.padding_mode != "zeros":
            return f"its padding mode is {module.padding_mode!r}; only zeros have a patch geometry"
        return Layer(_CONVS[base], patch=_patch(module), groups=module.groups)
    if not any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
        return None
    for kind, reason in _REASONS:
        if isinstance(module, kind):
            return reason
    return f"it belongs to a {type(module).__name__}, which is not a linear layer or convolution"


def stand_in(module: nn.Module, site: Site, factors: Factors, bias: Tensor | None) -> nn.Module:
    """The module that computes what ``module`` does, through factors.

    Args:
        module: the layer; its class, flags, attributes and hooks carry over.
        site: its site.
        factors: parameters already, so that layers that share a weight share its factors.
        bias: ``[out]``, or None.
    """
    kind, plain = _STAND_INS[site.kind], _plain_class(module)
    # Code may ask for a class of the user's own, or call a method of it; without one, no class is made.
    own_class = kind if issubclass(kind, plain) else type(f"Factored{plain.__name__}", (kind, plain), {})
    made: StandIn = kind.__new__(own_class)
    made.__dict__.update(_plain_attributes(module))
    made.plain, made.transposed, made.pivots = plain, site.transposed, None
    parameters: dict[str, Any] = made._parameters
    parameters.update(factors.tensors, bias=bias)
    if factors.gauge is not None:
        made.pivots, made._buffers["gauge_order"] = factors.gauge.start, factors.gauge.order
    # torch's transformer layers hand their weights to one fused kernel, unless a module in them has a hook.
    made.register_forward_pre_hook(_no_fast_path)
    return made


def is_stand_in(module: nn.Module) -> TypeGuard[StandIn]:
    """Whether a module is a factored one."""
    return isinstance(module, StandIn)


def dense(module: StandIn) -> nn.Module:
    """The plain layer that a stand-in stands for: the product of its factors as the weight, its own bias."""
    return _plain_layer(module, module.plain, module.factor_in.requires_grad)


def is_computed(module: nn.Module) -> bool:
    """Whether the weight or the bias of a layer is computed (weight normalisation, pruning, a parametrisation)."""
    return parametrize.is_parametrized(module) or any(map(is_weight_hook, module._forward_pre_hooks.values()))


def settled(module: nn.Module) -> nn.Module:
    """The plain layer that a layer with a computed weight or bias is now; in eval mode the two compute the same."""
    with torch.no_grad():
        for hook in module._forward_pre_hooks.values():
            if is_weight_hook(hook):
                hook(module, None)  # what it computed last may be older than its parameters
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return _plain_layer(module, _plain_class(module), trained)


def _plain_layer(module: nn.Module, plain: type[nn.Module], trained: bool) -> nn.Module:
    made: nn.Module = plain.__new__(plain)
    made.__dict__.update(_plain_attributes(module))
    parameters: dict[str, Any] = made._parameters
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().clone(), requires_grad=trained)
        parameters[name] = value
    return made


class StandIn(nn.Module):
    """What all stand-ins share.

    Attributes:
        factor_in: applied first.
        factor_out: applied last; a form with three factors has ``factor_mid`` in between.
        bias: ``[out]``, or None.
        plain: the class of the layer that it stands for.
        transposed: that layer stores its weight ``[in, out]``.
        pivots: the first of the pivots of a re-gauged pair, which may have an order of its inputs as the buffer
            ``gauge_order``; None for any other.
    """

    factor_in: Tensor
    factor_out: Tensor
    bias: Any
    plain: type[nn.Module]
    transposed: bool
    pivots: int | None

    @property
    def gauge(self) -> Gauge | None:
        """That of a re-gauged pair."""
        return None if self.pivots is None else Gauge(self.pivots, self._buffers["gauge_order"])

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors in the order of their application."""
        mid = self._parameters.get("factor_mid")
        return (self.factor_in, self.factor_out) if mid is None else (self.factor_in, mid, self.factor_out)

    @property
    def weight(self) -> Tensor:
        """The product of the factors in the shape of the weight that they replace, multiplied in float64."""
        groups, gauge = getattr(self, "groups", 1), self.gauge
        if gauge is not None:
            product = self.factor_out.double() @ gauge.spread(self.factor_in.double())
            return (product.t() if self.transposed else product).to(self.factor_in.dtype)
        shaped = composed([factor.double() for factor in self.factors], groups).to(self.factor_in.dtype)
        return shaped.t() if self.transposed else shaped


class FactoredLinear(StandIn, nn.Linear):  # type: ignore[override]
    """Stands in for a linear layer: in -> rank -> out."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        gauge = self.gauge
        if gauge is not None:
            return gauge.apply(input, self.factor_in, self.factor_out, self.bias)
        return F.linear(F.linear(input, self.factor_in), self.factor_out, self.bias)

    def extra_repr(self) -> str:
        """Sizes and rank."""
        rank, features = self.factor_in.shape
        if self.pivots is not None:
            return f"{features + rank} -> {rank} -> {self.factor_out.shape[0]}, re-gauged"
        return f"{features} -> {rank} -> {self.factor_out.shape[0]}"


class _FactoredConv(StandIn):
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    def _through(self, convolve: Any, input: Tensor) -> Tensor:
        factors = self.factors
        for factor, own in zip(
            factors, divided(Geometry(self.stride, self.padding, self.dilation), factors), strict=True
        ):
            bias = self.bias if factor is factors[-1] else None
            input = convolve(input, factor, bias, own.stride, own.padding, own.dilation, self.groups)
        return input


class FactoredConv1d(_FactoredConv, nn.Conv1d):  # type: ignore[override]
    """Stands in for a 1-D convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, channels, length]``."""
        return self._through(F.conv1d, input)


class FactoredConv2d(_FactoredConv, nn.Conv2d):  # type: ignore[override]
    """Stands in for a 2-D convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, channels, height, width]``."""
        return self._through(F.conv2d, input)


class FactoredConv3d(_FactoredConv, nn.Conv3d):  # type: ignore[override]
    """Stands in for a 3-D convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, channels, depth, height, width]``."""
        return self._through(F.conv3d, input)


_STAND_INS: dict[str, type[StandIn]] = {
    "linear": FactoredLinear,
    "conv1d": FactoredConv1d,
    "conv2d": FactoredConv2d,
    "conv3d": FactoredConv3d,
}


def swap(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put ``module`` under the fully qualified name ``name``; the root, which is ``module`` where the name is empty."""
    if not name:
        return module
    owner, _, leaf = name.rpartition(".")
    root.get_submodule(owner)._modules[leaf] = module
    return root


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes without its weight and bias, and without what computes them (parametrisations, hooks)."""
    kept = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
    hooks = module._forward_pre_hooks.items()
    kept["_modules"] = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    kept["_forward_pre_hooks"] = OrderedDict(
        (key, hook) for key, hook in hooks if hook is not _no_fast_path and not is_weight_hook(hook)
    )
    computed = any(is_weight_hook(hook) for _, hook in hooks)
    for kind in ("_parameters", "_buffers"):
        for name in list(kept[kind]):
            # What a hook computes a weight from: weight_g and weight_v, weight_orig and weight_mask, ...
            if name in _REPLACED or (computed and name.startswith(("weight_", "bias_"))):
                del kept[kind][name]
    return {key: value for key, value in kept.items() if key not in (*_REPLACED, *_OWN)}


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """A module's class; of a parametrised one, the class that it had before."""
    if not parametrize.is_parametrized(module):
        return type(module)
    plain: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return plain


def _base(plain: type[nn.Module]) -> type[nn.Module] | None:
    bases: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVS)
    return next((base for base in bases if issubclass(plain, base)), None)


def _same_methods(plain: type[nn.Module], base: type[nn.Module], *names: str) -> bool:
    return all(getattr(plain, name) is getattr(base, name) for name in names)


def _own_way(plain: type[nn.Module]) -> str:
    return f"its class {plain.__name__} computes its output in a way of its own"


def _is_transposed_linear(plain: type[nn.Module]) -> bool:
    """Whether it is Hugging Face's ``Conv1D``: a linear layer whose weight is stored ``[in, out]``."""
    return plain.__name__ == "Conv1D" and plain.__module__ == "transformers.pytorch_utils"


def _is_quantised(module: nn.Module) -> bool:
    packed = callable(getattr(module, "weight", None)) or hasattr(module, "_all_weight_values")
    return packed and type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def _patch(module: Conv) -> Patch:
    dims = len(module.kernel_size)
    if isinstance(module.padding, str):
        totals = [module.dilation[axis] * (module.kernel_size[axis] - 1) for axis in range(dims)]
        same = module.padding == "same"
        sides = tuple((total // 2, total - total // 2) if same else (0, 0) for total in totals)
    else:
        sides = tuple((int(amount), int(amount)) for amount in module.padding)
    return Patch(tuple(module.kernel_size), tuple(module.stride), sides, tuple(module.dilation))
