"""Finding sites and taps in an ONNX graph, through one table of operators.

A site's calls are named by the value that their node gives, since nodes need not have names; so are taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import NodeProto, TensorProto

from lowrank_fx import cost
from lowrank_fx.onnx_frontend.model import DOMAINS, FLOATS, OnnxModel, attributes_of, describe_node, size_of
from lowrank_fx.patches import Patch
from lowrank_fx.sites import (
    LeftAlone,
    RefusedError,
    Site,
    SiteCall,
    SiteTable,
    Skip,
    Tap,
    site_name,
    site_table,
    tap_name,
)

_SMALL_TYPES = frozenset(
    getattr(TensorProto, name)
    for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "FLOAT8E4M3FN", "FLOAT8E5M2", "FLOAT4E2M1")
    if hasattr(TensorProto, name)
)
_INSIDE = "it is applied inside a branch or a loop of the graph, where its input cannot be observed"


@dataclass(frozen=True)
class _Use:
    """How one node applies a weight."""

    node: NodeProto
    activation: str
    bias: str | None
    bias_reader: NodeProto
    transposed: bool
    kind: str
    patch: Patch | None = None
    groups: int = 1

    @property
    def manner(self) -> tuple[object, ...]:
        """What all uses of one weight must have in common."""
        return self.kind, self.transposed, self.patch, self.groups

    @property
    def tap(self) -> str:
        """The name of the activation as it meets the weight."""
        return tap_name(self.activation, self.patch, self.groups)


def find_sites(model: OnnxModel, skip: Sequence[str] = ()) -> SiteTable:
    """Find every site and tap of a model's main graph; every other weight is listed with the reason.

    Args:
        model: the model.
        skip: patterns of names of initializers, or of the layers they make (``fnmatch``).

    Raises:
        OptionError: a pattern matches no weight.
    """
    order = {id(node): position for position, node in enumerate(model.nodes)}
    weights = [name for name, tensor in model.constants.items() if _is_weight(tensor)]
    # In graph order; what the main graph never reads comes last.
    weights.sort(key=lambda name: min((order[id(node)] for node in model.readers.get(name, [])), default=len(order)))
    skipped = Skip(skip)
    sites: list[Site] = []
    taps: list[Tap] = []
    left_alone: list[LeftAlone] = []
    taken = set(map(site_name, weights))
    for name in weights:
        called = _layer_name(model, name)
        called = called if called == site_name(name) or called not in taken else site_name(name)
        taken.add(called)
        reason = skipped.reason(name)
        if called != site_name(name):
            reason = skipped.reason(f"{called}.weight") or reason
        if reason is not None:
            left_alone.append(LeftAlone(called, reason))
            continue
        try:
            site, own = _make_site(model, name, called)
        except RefusedError as refusal:
            left_alone.append(LeftAlone(called, str(refusal)))
            continue
        sites.append(site)
        taps += own
    skipped.check()
    for body in model.inner_graphs:
        left_alone += [LeftAlone(site_name(each.name), _INSIDE) for each in body.initializer if _is_weight(each)]
    return site_table(sites, taps, left_alone)


def _is_weight(tensor: TensorProto) -> bool:
    """Whether a constant may be a weight, of whatever operator; a vector with more dimensions is none."""
    if tensor.data_type not in (*FLOATS, *_SMALL_TYPES, TensorProto.BFLOAT16):
        return False
    return len(tensor.dims) >= 2 and size_of(tensor) > max(tensor.dims)


def _layer_name(model: OnnxModel, weight: str) -> str:
    """The layer that a weight makes. Exporters transpose weights and lose their names; a bias still tells."""
    if weight.endswith(".weight"):
        return site_name(weight)
    for node in model.readers.get(weight, []):
        bias = (_added_bias(model, node) or (None,))[0] if node.op_type == "MatMul" else None
        if bias is not None and bias.endswith(".bias"):
            return bias.removesuffix(".bias")
    return site_name(weight)


def _make_site(model: OnnxModel, name: str, called: str) -> tuple[Site, list[Tap]]:
    tensor = model.constants[name]
    nodes = model.readers.get(name, [])
    if tensor.data_type in _SMALL_TYPES:
        raise RefusedError("its weight is quantised")
    if name in model.read_inside:
        raise RefusedError(_INSIDE)
    if not nodes:
        raise RefusedError("the graph never uses it")
    if name in model.outputs:
        raise RefusedError("its weight is an output of the model too")
    if name in model.replaceable:
        raise RefusedError("its weight is an input of the model too, so that a caller may replace it")
    unread = [node for node in nodes if node.op_type not in _OPERATORS or node.domain not in DOMAINS]
    if unread:
        raise RefusedError(_why_not(unread[0], len(nodes) - 1))
    if tensor.data_type not in FLOATS:
        raise RefusedError("its weight is bfloat16, which cannot be calibrated with onnxruntime")
    used = [_OPERATORS[node.op_type](model, node, name) for node in nodes]
    first = used[0]
    if any(use.manner != first.manner for use in used):
        raise RefusedError("its weight is shared by calls of different kinds or geometry")
    if any(use.activation in model.constants for use in used):
        raise RefusedError("it is applied to another constant, not to an activation")
    shape = tuple(int(size) for size in tensor.dims)
    groups = first.groups
    block = shape[-1] if first.transposed else shape[0] // groups
    out_features = groups * block
    in_features = math.prod(shape) // max(out_features, 1)
    if cost.break_even_rank(out_features, in_features, groups) <= 1:
        each = f" to each of its {groups} groups" if groups > 1 else ""
        raise RefusedError(f"a weight of {block} x {in_features}{each} has no rank below break-even")
    centered = all(_owns_bias(model, use, used) for use in used)
    taps = [Tap(use.tap, use.activation, groups * in_features, use.patch, use.node.output[0], groups) for use in used]
    site = Site(
        name=called,
        kind=first.kind,
        weight=name,
        transposed=first.transposed,
        out_features=out_features,
        in_features=in_features,
        shape=shape,
        dtype=str(FLOATS[tensor.data_type]),
        patch=first.patch,
        # A bias that others use too stays as it is, so the site does not speak of it.
        calls=tuple(SiteCall(use.node.output[0], use.tap, use.bias if centered else None) for use in used),
        centered=centered,
        groups=groups,
    )
    return site, taps


def _owns_bias(model: OnnxModel, use: _Use, used: Sequence[_Use]) -> bool:
    """Whether a use has a bias that nothing but its site reads, and that may change."""
    if use.bias is None or use.bias in model.replaceable | model.read_inside or use.bias in model.outputs:
        return False
    own = {id(each.bias_reader) for each in used}
    return all(id(node) in own for node in model.readers[use.bias])


# ---- the table of operators ------------------------------------------------------------------------------------------


def _read_matmul(model: OnnxModel, node: NodeProto, weight: str) -> _Use:
    activation = _activation(node, weight)
    shape = model.constants[weight].dims
    if len(shape) > 3:
        raise RefusedError(f"its weight has {len(shape)} dimensions where 2 or 3 are expected")
    found = _added_bias(model, node)
    bias, reader = (None, node) if found is None or len(shape) == 3 else found
    if len(shape) == 3:
        return _Use(node, activation, bias, reader, True, "bmm", groups=int(shape[0]))
    return _Use(node, activation, bias, reader, True, "linear")


def _read_gemm(model: OnnxModel, node: NodeProto, weight: str) -> _Use:
    activation = _activation(node, weight)
    given = attributes_of(node)
    if given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        raise RefusedError("its Gemm scales its operands (alpha or beta is not 1)")
    if given.get("transA", 0):
        raise RefusedError("its Gemm transposes the activation")
    bias = node.input[2] if len(node.input) > 2 else None
    kept = bias if bias and _is_vector(model, bias, _width(model, node)) else None
    return _Use(node, activation, kept, node, not given.get("transB", 0), "linear")


def _read_conv(model: OnnxModel, node: NodeProto, weight: str) -> _Use:
    activation = _activation(node, weight)
    shape = [int(size) for size in model.constants[weight].dims]
    kernel = tuple(shape[2:])
    if not 1 <= len(kernel) <= 3:
        raise RefusedError(f"a convolution over {len(kernel)} dimensions of space has no form")
    given = attributes_of(node)
    groups = int(given.get("group", 1))
    if groups > 1 and shape[1] == 1:
        raise RefusedError(f"a depthwise convolution ({groups} groups) applies one channel to each group")
    bias = node.input[2] if len(node.input) > 2 else None
    kept = bias if bias and _is_vector(model, bias, shape[0]) else None
    patch = patch_of(given, kernel)
    if patch is None:
        raise RefusedError("its padding (auto_pad) depends on the size of the input, because it has a stride")
    return _Use(node, activation, kept, node, False, f"conv{len(kernel)}d", patch, groups)


def patch_of(given: dict[str, Any], kernel: tuple[int, ...]) -> Patch | None:
    """The geometry of a Conv by its attributes; None where its padding is not known without the input.

    Operators of the ONNX standard: ``pads`` is every dimension's begin, then every dimension's end; SAME_UPPER puts the
    odd zero of an even kernel behind, SAME_LOWER in front.
    """
    dims = len(kernel)
    stride = tuple(given.get("strides", [1] * dims))
    dilation = tuple(given.get("dilations", [1] * dims))
    named = given.get("auto_pad", "NOTSET")
    if named in ("SAME_UPPER", "SAME_LOWER"):
        if max(stride) > 1:
            return None
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        less = [total // 2 for total in totals]
        more = [total - half for total, half in zip(totals, less, strict=True)]
        sides = tuple(zip(less, more, strict=True) if named == "SAME_UPPER" else zip(more, less, strict=True))
    else:
        pads = given.get("pads", [0] * 2 * dims) if named == "NOTSET" else [0] * 2 * dims
        sides = tuple(zip(pads[:dims], pads[dims:], strict=True))
    return Patch(kernel, stride, sides, dilation)


_OPERATORS: dict[str, Callable[[OnnxModel, NodeProto, str], _Use]] = {
    "MatMul": _read_matmul,
    "Gemm": _read_gemm,
    "Conv": _read_conv,
}

# Why other operators keep their weights.
_RECURRENT = "a recurrent layer keeps all of its weights inside one operator"
_QUANTISED = "its weight is quantised"
_REASONS = {
    "Gather": "an embedding is a table lookup, not a matrix product",
    "ConvTranspose": "a transposed convolution has no form",
    "LSTM": _RECURRENT,
    "GRU": _RECURRENT,
    "RNN": _RECURRENT,
    "LayerNormalization": "a normalisation scales its input entry by entry; it is no matrix product",
    "Einsum": "its Einsum is not a plain matrix product",
    "QuantizeLinear": _QUANTISED,
    "DequantizeLinear": _QUANTISED,
    "DynamicQuantizeLinear": _QUANTISED,
    "Transpose": "its weight is computed inside the graph (by Transpose); let an optimizer fold constants first",
    "Identity": "its weight is handed on by Identity; let an optimizer remove that first",
    "Cast": "its weight is computed inside the graph (by Cast); let an optimizer fold constants first",
}


def _why_not(node: NodeProto, others: int) -> str:
    reason = _REASONS.get(node.op_type) if node.domain in DOMAINS else None
    more = f"; {others} more use the same weight" if others else ""
    if reason is not None:
        return reason + more
    operator = ".".join(filter(None, (node.domain, node.op_type)))
    return f"its weight is used by {operator}, which is not a linear layer or convolution{more}"


# ---- small readers of nodes ------------------------------------------------------------------------------------------


def _activation(node: NodeProto, weight: str) -> str:
    """What a node applies its weight to."""
    places = [place for place, name in enumerate(node.input) if name == weight]
    if places != [1]:
        where = "the left operand of a matrix product" if node.op_type != "Conv" else "the input of a convolution"
        raise RefusedError(f"its weight is {where if places == [0] else f'read twice by the {describe_node(node)}'}")
    return str(node.input[0])


def _width(model: OnnxModel, node: NodeProto) -> int:
    """The number of outputs of a matrix product with a constant on its right."""
    shape = model.constants[node.input[1]].dims
    return int(shape[0] if attributes_of(node).get("transB", 0) else shape[-1])


def _is_vector(model: OnnxModel, name: str, width: int) -> bool:
    """Whether a value is a constant with one number for each output, along its last dimension."""
    tensor = model.constants.get(name)
    return tensor is not None and size_of(tensor) == width and list(tensor.dims[-1:]) == [width]


def _added_bias(model: OnnxModel, node: NodeProto) -> tuple[str, NodeProto] | None:
    """The bias that an Add adds to a matrix product that nothing else reads, and that Add."""
    value = node.output[0]
    readers = model.readers.get(value, [])
    if len(readers) != 1 or value in model.outputs or value in model.read_inside or len(node.input) < 2:
        return None
    (reader,) = readers
    if reader.op_type != "Add" or reader.domain not in DOMAINS or node.input[1] not in model.constants:
        return None
    other = next((name for name in reader.input if name != value), None)
    return (other, reader) if other is not None and _is_vector(model, other, _width(model, node)) else None
