"""Finding sites and taps in a captured graph of ATen operators, through one table of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeGuard

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from lowrank_fx import cost
from lowrank_fx._memory import memory_of
from lowrank_fx.patches import Patch
from lowrank_fx.sites import LeftAlone, Site, SiteCall, SiteTable, Skip, Tap, site_name, site_table

aten = torch.ops.aten

MASK = "attention_mask"
"""The argument that tells padding, ``[B, T]``."""

_VIEWS = frozenset(
    (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.contiguous.default,
        aten.clone.default,
    )
)
"""Operators that change how rows are laid out, not their order."""


@dataclass(frozen=True)
class _Use:
    """How one node applies a weight: what the table of operators tells."""

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
        marks = [str(self.patch)] * (self.patch is not None) + [f"g{self.groups}"] * (self.groups > 1)
        return self.activation.name + (f"[{' '.join(marks)}]" if marks else "")


class _RefusedError(Exception):
    """A node applies a weight in a way that no form covers; the message is the reason."""


def find_sites(gm: GraphModule, skip: Sequence[str] = ()) -> SiteTable:
    """Find every site and tap of a captured graph.

    Args:
        gm: graph of ATen operators with ``meta["val"]``.
        skip: patterns of fully qualified names (``fnmatch``; ``"*.pooler.*"`` also matches ``pooler.dense``).

    Raises:
        OptionError: a pattern matches no weight.
    """
    order = {node: position for position, node in enumerate(gm.graph.nodes)}
    uses: dict[int, list[Node]] = {}
    tensors: dict[int, tuple[str, Tensor]] = {}
    for node in gm.graph.nodes:
        for leaf in node.all_input_nodes if node.op != "get_attr" else ():
            source = _attribute_behind(leaf)
            if source is None or is_transpose(node):
                continue
            tensor = _fetch(gm, str(source.target))
            if not _is_weight(tensor) and not _is_held_weight(tensor, node, leaf):
                continue
            assert isinstance(tensor, Tensor)
            known = tensors.setdefault(id(tensor), (str(source.target), tensor))
            group = uses.setdefault(id(known[1]), [])
            if node not in group:
                group.append(node)

    for fqn, parameter in gm.named_parameters():
        if parameter.dim() >= 2 and parameter.dtype != torch.bool:
            tensors.setdefault(id(parameter), (fqn, parameter))

    tables = _lookup_tables(gm)
    skipped = Skip(skip)
    sites: list[Site] = []
    taps: list[Tap] = []
    left_alone: list[LeftAlone] = []
    # In graph order; what the graph never reads comes last.
    for key in sorted(tensors, key=lambda key: order[uses[key][0]] if key in uses else len(order)):
        fqn, tensor = tensors[key]
        name = site_name(fqn)
        reason = skipped.reason(fqn)
        if reason is not None:
            left_alone.append(LeftAlone(name, reason))
            continue
        try:
            site, site_taps = _make_site(gm, fqn, tensor, uses.get(key, []), tied=memory_of(tensor) in tables)
        except _RefusedError as refusal:
            left_alone.append(LeftAlone(name, str(refusal)))
            continue
        sites.append(site)
        taps += site_taps
    skipped.check()
    return site_table(sites, taps, left_alone)


def _make_site(gm: GraphModule, fqn: str, weight: Tensor, nodes: list[Node], *, tied: bool) -> tuple[Site, list[Tap]]:
    if not nodes:
        raise _RefusedError("the captured graph never uses it")
    if not weight.is_floating_point():
        raise _RefusedError(f"its weight is quantised or complex ({weight.dtype})")
    unread = [node for node in nodes if node.target not in _OPERATORS]
    if unread:
        raise _RefusedError(_why_not(unread[0], len(nodes) - 1))
    if not isinstance(weight, Parameter):
        raise _RefusedError("its weight is a buffer, not a parameter")
    used = [_OPERATORS[node.target](node) for node in nodes]
    first = used[0]
    if any(use.manner != first.manner for use in used):
        raise _RefusedError("its weight is shared by calls of different kinds or geometry")
    if any(use.bias is not None and not isinstance(_fetch(gm, str(use.bias.target)), Parameter) for use in used):
        raise _RefusedError("its bias is a buffer, not a parameter")
    if any(_attribute_behind(use.activation) is not None for use in used):
        raise _RefusedError("it is applied to another parameter, not to an activation")
    groups = first.groups
    block = weight.shape[-1] if first.transposed else weight.shape[0] // groups
    out_features = groups * block
    in_features = weight.numel() // max(out_features, 1)
    if cost.break_even_rank(out_features, in_features, groups) <= 1:
        each = f" to each of its {groups} groups" if groups > 1 else ""
        raise _RefusedError(f"a weight of {block} x {in_features}{each} has no rank below break-even")

    taps, calls = [], []
    for node, use in zip(nodes, used, strict=True):
        turned = _is_sequence_first(use.activation)
        taps.append(Tap(use.tap, use.activation.name, groups * in_features, use.patch, node.name, groups, turned))
        calls.append(SiteCall(node.name, use.tap, None if use.bias is None else str(use.bias.target), turned))
    centered = all(use.bias is not None and set(use.bias.users) <= set(nodes) for use in used) and not _is_shared(
        gm, [str(use.bias.target) for use in used if use.bias is not None]
    )
    site = Site(
        name=site_name(fqn),
        kind=first.kind,
        weight=fqn,
        transposed=first.transposed,
        out_features=out_features,
        in_features=in_features,
        shape=tuple(weight.shape),
        dtype=str(weight.dtype),
        patch=first.patch,
        calls=tuple(calls),
        centered=centered,
        groups=groups,
        tied=tied,
    )
    return site, taps


def _is_sequence_first(activation: Node) -> bool:
    """Whether rows come position by position, for a model that takes a padding mask ``[B, T]``."""
    mask = next((node for node in activation.graph.nodes if node.op == "placeholder" and node.name == MASK), None)
    while activation.target in _VIEWS and activation.meta["val"].dim() < 3:
        (activation,) = activation.all_input_nodes[:1]
    shapes = [node.meta["val"].shape for node in (mask, activation) if node is not None]
    if len(shapes) < 2 or len(shapes[0]) != 2 or len(shapes[1]) < 3:
        return False
    # Symbols are compared as such: asking whether two sizes are equal would put a guard on the graph.
    (batch, positions), (first, second) = ([str(size) for size in shape[:2]] for shape in shapes)
    return (first, second) == (positions, batch) != (batch, positions)


# ---- the table of operators ------------------------------------------------------------------------------------------


def _read_linear(node: Node) -> _Use:
    activation, weight = _nodes(node, 0, 1)
    bias = _optional(node, 2)
    return _matrix_use(activation, weight, bias, flipped=False)


def _read_addmm(node: Node) -> _Use:
    bias, activation, weight = _nodes(node, 0, 1, 2)
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        raise _RefusedError("addmm scales its operands (beta or alpha is not 1)")
    if bias.op != "get_attr" or _rank(bias) != 1:
        raise _RefusedError("addmm adds something that is not a bias vector")
    return _matrix_use(activation, weight, bias, flipped=True)


def _read_matmul(node: Node) -> _Use:
    activation, weight = _nodes(node, 0, 1)
    if _attribute_behind(weight) is None:
        raise _RefusedError("its weight is the left operand of a matrix product")
    if _rank(weight) == 3:
        return _read_batch(activation, weight)
    return _matrix_use(activation, weight, None, flipped=True)


def _read_batch(activation: Node, weight: Node) -> _Use:
    """A matrix per group, ``[groups, in, out]``; an activation without groups of its own meets each of them."""
    if _rank(activation) < 2:
        raise _RefusedError("it is applied to a vector, not to rows")
    return _Use(activation, weight, None, True, "bmm", groups=int(weight.meta["val"].shape[0]))


def _matrix_use(activation: Node, weight: Node, bias: Node | None, *, flipped: bool) -> _Use:
    if _rank(weight) != 2:
        raise _RefusedError(f"its weight has {_rank(weight)} dimensions where 2 or 3 are expected")
    source = _attribute_behind(weight)
    if source is None:
        raise _RefusedError("its weight is computed from activations")
    if bias is not None and bias.op != "get_attr":
        raise _RefusedError("its bias is computed from activations")
    return _Use(activation, source, bias, flipped != (source is not weight), "linear")


def _read_conv(node: Node) -> _Use:
    activation, weight = _nodes(node, 0, 1)
    bias = _optional(node, 2)
    if weight.op != "get_attr":
        raise _RefusedError("its weight is computed inside the graph")
    if bias is not None and bias.op != "get_attr":
        raise _RefusedError("its bias is computed inside the graph")
    if _rank(activation) != _rank(weight):
        raise _RefusedError("it is applied to an input without a batch dimension")
    groups = int(str(_argument(node, 6, "groups", 1)))
    shape = [int(size) for size in weight.meta["val"].shape]
    if groups > 1 and shape[1] == 1:
        raise _RefusedError(f"a depthwise convolution ({groups} groups) applies one channel to each group")
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
    return _Use(activation, weight, bias, False, f"conv{len(kernel)}d", Patch(kernel, stride, sides, dilation), groups)


_OPERATORS: dict[object, Callable[[Node], _Use]] = {
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


def _why_not(node: Node, others: int) -> str:
    """Why the operator of ``node`` keeps its weight, which ``others`` more nodes use."""
    name = _schema_name(node)
    for pattern, reason in _REASONS.items():
        if fnmatchcase(name, pattern):
            return reason + (f"; {others} more use the same weight" if others else "")
    more = f" and {others} more" if others else ""
    return f"its weight is used by {_op_name(node)}{more}, which is not a linear layer or convolution"


def _is_held_weight(value: object, node: Node, leaf: Node) -> bool:
    """Whether a tensor that is no floating parameter does the work of a weight: it meets an activation in a product."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.numel() <= max(value.shape):
        return False
    if isinstance(value, Parameter):
        return value.dtype != torch.bool
    name = _schema_name(node)
    if any(fnmatchcase(name, pattern) for pattern, reason in _REASONS.items() if reason is _QUANTISED):
        return True
    if node.target not in _OPERATORS and not name.startswith("aten::conv"):
        return False
    factors = node.args[1:3] if node.target is aten.addmm.default else node.args[:2]
    others = [other for other in factors if isinstance(other, Node) and other is not leaf]
    return leaf in factors and any(_attribute_behind(other) is None for other in others)


def _lookup_tables(gm: GraphModule) -> set[object]:
    """The memory of every weight that an embedding reads."""
    nodes = (node for node in gm.graph.nodes if fnmatchcase(_schema_name(node), "aten::*embedding*"))
    leaves = (leaf for node in nodes for leaf in node.all_input_nodes if leaf.op == "get_attr")
    values = (_fetch(gm, str(leaf.target)) for leaf in leaves)
    return {memory_of(value) for value in values if isinstance(value, Tensor)}


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


def _attribute_behind(node: Node) -> Node | None:
    """The get_attr node that ``node`` is, or is the transpose of."""
    if node.op == "get_attr":
        return node
    if is_transpose(node):
        source = node.args[0]
        assert isinstance(source, Node)
        return source
    return None


def _is_weight(value: object) -> TypeGuard[Parameter]:
    return isinstance(value, Parameter) and value.is_floating_point() and value.dim() >= 2


def _fetch(gm: GraphModule, target: str) -> object:
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _is_shared(gm: GraphModule, targets: Sequence[str]) -> bool:
    """Whether any of these attributes is the same tensor as an attribute of another name."""
    wanted = {id(_fetch(gm, target)): target for target in targets}
    return any(wanted.get(id(tensor), name) != name for name, tensor in gm.named_parameters(remove_duplicate=False))


def _nodes(node: Node, *positions: int) -> list[Node]:
    found = []
    for position in positions:
        argument = node.args[position] if position < len(node.args) else None
        if not isinstance(argument, Node):
            raise _RefusedError(f"{_op_name(node)} is called in an unusual way (argument {position} is {argument!r})")
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


def _schema_name(node: Node) -> str:
    """The operator's name without its overload: ``aten::linear``, ``cond``."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.name
    return str(node.target._name) if isinstance(node.target, HigherOrderOperator) else ""
