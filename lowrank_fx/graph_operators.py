"""The table of operators: how a node of a captured graph applies a weight, and why other nodes keep theirs.

Wherever a model comes from (``torch.export``, a region of ``torch.compile``), it is a graph of ATen operators by the
time that it is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from lowrank_fx.patches import Patch
from lowrank_fx.sites import RefusedError, tap_name

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """How one node applies a weight: what the table of operators tells.

    Attributes:
        activation: what it is applied to.
        weight: the parameter's node, also where the operator reads its transpose.
        bias: the bias's node.
        transposed: the weight is stored ``[in, out]``.
        kind: of site.
        patch: geometry of a convolution.
        groups: of a convolution, or of a batch of matrices.
    """

    activation: Node
    weight: Node
    bias: Node | None
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
        return tap_name(self.activation.name, self.patch, self.groups)


def use_of(node: Node) -> Use | None:
    """How a node applies a weight; None where it applies none, or in a way that no form covers."""
    try:
        return OPERATORS[node.target](node) if node.target in OPERATORS else None
    except RefusedError:
        return None


# ---- the table ------------------------------------------------------------------------------------------------------


def _read_linear(node: Node) -> Use:
    activation, weight = _nodes(node, 0, 1)
    bias = _optional(node, 2)
    return _matrix_use(activation, weight, bias, flipped=False)


def _read_addmm(node: Node) -> Use:
    bias, activation, weight = _nodes(node, 0, 1, 2)
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        raise RefusedError("addmm scales its operands (beta or alpha is not 1)")
    if bias.op != "get_attr" or _rank(bias) != 1:
        raise RefusedError("addmm adds something that is not a bias vector")
    return _matrix_use(activation, weight, bias, flipped=True)


def _read_matmul(node: Node) -> Use:
    activation, weight = _nodes(node, 0, 1)
    if attribute_behind(weight) is None:
        raise RefusedError("its weight is the left operand of a matrix product")
    if _rank(weight) == 3:
        return _read_batch(activation, weight)
    return _matrix_use(activation, weight, None, flipped=True)


def _read_batch(activation: Node, weight: Node) -> Use:
    """A matrix per group, ``[groups, in, out]``; an activation without groups of its own meets each of them."""
    if _rank(activation) < 2:
        raise RefusedError("it is applied to a vector, not to rows")
    return Use(activation, weight, None, True, "bmm", groups=int(weight.meta["val"].shape[0]))


def _matrix_use(activation: Node, weight: Node, bias: Node | None, *, flipped: bool) -> Use:
    if _rank(weight) != 2:
        raise RefusedError(f"its weight has {_rank(weight)} dimensions where 2 or 3 are expected")
    source = attribute_behind(weight)
    if source is None:
        raise RefusedError("its weight is computed from activations")
    if bias is not None and bias.op != "get_attr":
        raise RefusedError("its bias is computed from activations")
    return Use(activation, source, bias, flipped != (source is not weight), "linear")


def _read_conv(node: Node) -> Use:
    activation, weight = _nodes(node, 0, 1)
    bias = _optional(node, 2)
    if weight.op != "get_attr":
        raise RefusedError("its weight is computed inside the graph")
    if bias is not None and bias.op != "get_attr":
        raise RefusedError("its bias is computed inside the graph")
    if _rank(activation) != _rank(weight):
        raise RefusedError("it is applied to an input without a batch dimension")
    groups = int(str(_argument(node, 6, "groups", 1)))
    shape = [int(size) for size in weight.meta["val"].shape]
    if groups > 1 and shape[1] == 1:
        raise RefusedError(f"a depthwise convolution ({groups} groups) applies one channel to each group")
    kernel = tuple(shape[2:])
    stride, dilation = (
        _sizes(_argument(node, position, name, 1), len(kernel)) for position, name in ((3, "stride"), (5, "dilation"))
    )
    padding = _argument(node, 4, "padding", 0)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        amounts = _sizes(0 if padding == "valid" else padding, len(kernel))
        sides = tuple((amount, amount) for amount in amounts)
    return Use(activation, weight, bias, False, f"conv{len(kernel)}d", Patch(kernel, stride, sides, dilation), groups)


OPERATORS: dict[object, Callable[[Node], Use]] = {
    aten.linear.default: _read_linear,
    aten.addmm.default: _read_addmm,
    aten.mm.default: _read_matmul,
    aten.matmul.default: _read_matmul,
    aten.bmm.default: _read_matmul,
    aten.conv1d.default: _read_conv,
    aten.conv1d.padding: _read_conv,
    aten.conv2d.default: _read_conv,
    aten.conv2d.padding: _read_conv,
    aten.conv3d.default: _read_conv,
    aten.conv3d.padding: _read_conv,
}

# Why other operators keep their weights, by patterns of their names.
_RECURRENT = "a recurrent layer keeps all of its weights inside one operator"
_QUANTISED = "its weight is quantised"
_INSIDE = "it is applied inside a branch or a loop of the graph, where its input cannot be observed"
_SCALES = "a normalisation scales its input entry by entry; it is no matrix product"
_REASONS = {
    "aten::*embedding*": "an embedding is a table lookup, not a matrix product",
    "aten::conv_transpose?d": "a transposed convolution has no form",
    "aten::lstm*": _RECURRENT,
    "aten::gru*": _RECURRENT,
    "aten::rnn_*": _RECURRENT,
    "aten::*layer_norm": _SCALES,
    "aten::*rms_norm": _SCALES,
    "aten::einsum": "its einsum is not a plain matrix product",
    "aten::_scaled_mm*": _QUANTISED,
    "aten::_weight_int*": _QUANTISED,
    "quantized*::*": _QUANTISED,
    "torchao::*": _QUANTISED,
    "cond": _INSIDE,
    "while_loop": _INSIDE,
    "scan": _INSIDE,
    "map_impl": _INSIDE,
}


def why_not(node: Node, others: int) -> str:
    """Why the operator of ``node`` keeps its weight, which ``others`` more nodes use."""
    name = schema_name(node)
    for pattern, reason in _REASONS.items():
        if fnmatchcase(name, pattern):
            return reason + (f"; {others} more use the same weight" if others else "")
    more = f" and {others} more" if others else ""
    return f"its weight is used by {_op_name(node)}{more}, which is not a linear layer or convolution"


def is_quantised(node: Node) -> bool:
    """Whether an operator applies a quantised weight."""
    name = schema_name(node)
    return any(fnmatchcase(name, pattern) for pattern, reason in _REASONS.items() if reason is _QUANTISED)


_SWAPS = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
# The last two also conjugate, which changes nothing about a real weight.
_WHOLE = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.adjoint.default, aten.matrix_H.default)


# ---- small readers of graph nodes ------------------------------------------------------------------------------------


def is_transpose(node: Node) -> bool:
    """Whether the node swaps the two dimensions of a matrix that is an attribute."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source.op != "get_attr" or _rank(source) != 2:
        return False
    if node.target in _SWAPS:
        return {int(str(dim)) % 2 for dim in node.args[1:3]} == {0, 1}
    if node.target is aten.permute.default:
        return [int(dim) % 2 for dim in node.args[1]] == [1, 0]  # type: ignore[union-attr,arg-type]
    return node.target in _WHOLE


def attribute_behind(node: Node) -> Node | None:
    """The get_attr node that ``node`` is, or is the transpose of."""
    if node.op == "get_attr":
        return node
    if is_transpose(node):
        source = node.args[0]
        assert isinstance(source, Node)
        return source
    return None


def _nodes(node: Node, *positions: int) -> list[Node]:
    found = []
    for position in positions:
        argument = node.args[position] if position < len(node.args) else None
        if not isinstance(argument, Node):
            raise RefusedError(f"{_op_name(node)} is called in an unusual way (argument {position} is {argument!r})")
        found.append(argument)
    return found


def _optional(node: Node, position: int) -> Node | None:
    argument = node.args[position] if len(node.args) > position else node.kwargs.get("bias")
    return argument if isinstance(argument, Node) else None


def _argument(node: Node, position: int, name: str, default: object) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _sizes(value: object, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    numbers = tuple(int(item) for item in value)  # type: ignore[attr-defined]
    return numbers * dims if len(numbers) == 1 else numbers


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _op_name(node: Node) -> str:
    return str(node.target)


def schema_name(node: Node) -> str:
    """The operator's name without its overload: ``aten::linear``, ``cond``."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name
    return str(node.target._name) if isinstance(node.target, HigherOrderOperator) else ""
