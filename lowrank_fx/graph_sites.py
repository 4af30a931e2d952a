"""Finding sites and taps in a captured graph of ATen operators, through one table of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from lowrank_fx.patches import Patch
from lowrank_fx.sites import LeftAlone, Site, SiteCall, SiteTable, Skip, Tap, site_name, site_table

aten = torch.ops.aten


@dataclass(frozen=True)
class _Use:
    """How one node applies a weight: what the table of operators tells."""

    activation: Node
    weight: Node
    bias: Node | None
    transposed: bool
    kind: str
    patch: Patch | None = None


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
            if not _is_weight(tensor):
                continue
            known = tensors.setdefault(id(tensor), (str(source.target), tensor))
            group = uses.setdefault(id(known[1]), [])
            if node not in group:
                group.append(node)

    for fqn, parameter in gm.named_parameters():
        if _is_weight(parameter):
            tensors.setdefault(id(parameter), (fqn, parameter))

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
            site, site_taps = _make_site(gm, name, fqn, tensor, uses.get(key, []))
        except _RefusedError as refusal:
            left_alone.append(LeftAlone(name, str(refusal)))
            continue
        sites.append(site)
        taps += site_taps
    skipped.check()
    return site_table(sites, taps, left_alone)


def _make_site(gm: GraphModule, name: str, fqn: str, weight: Tensor, nodes: list[Node]) -> tuple[Site, list[Tap]]:
    if not nodes:
        raise _RefusedError("the captured graph never uses it")
    used = []
    for node in nodes:
        reader = _OPERATORS.get(node.target)
        if reader is None:
            others = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
            raise _RefusedError(
                f"its weight is used by {_op_name(node)}{others}, which is not a linear layer or convolution"
            )
        used.append(reader(node))
    first = used[0]
    if any((use.kind, use.transposed, use.patch) != (first.kind, first.transposed, first.patch) for use in used):
        raise _RefusedError("its weight is shared by calls of different kinds or geometry")
    if any(use.bias is not None and not isinstance(_fetch(gm, str(use.bias.target)), Parameter) for use in used):
        raise _RefusedError("its bias is a buffer, not a parameter")
    if any(_attribute_behind(use.activation) is not None for use in used):
        raise _RefusedError("it is applied to another parameter, not to an activation")
    out_features = weight.shape[1] if first.transposed else weight.shape[0]
    in_features = weight.numel() // max(out_features, 1)
    if min(out_features, in_features) < 2:
        raise _RefusedError(f"a weight of {out_features} x {in_features} has no rank below break-even")

    taps, calls = [], []
    for node, use in zip(nodes, used, strict=True):
        tap_name = use.activation.name if use.patch is None else f"{use.activation.name}[{use.patch}]"
        taps.append(Tap(tap_name, use.activation.name, in_features, use.patch, node.name))
        calls.append(SiteCall(node.name, tap_name, None if use.bias is None else str(use.bias.target)))
    centered = all(use.bias is not None and set(use.bias.users) <= set(nodes) for use in used) and not _is_shared(
        gm, [str(use.bias.target) for use in used if use.bias is not None]
    )
    site = Site(
        name=name,
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
    )
    return site, taps


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
    if _rank(activation) < 2:
        raise _RefusedError("it is applied to a vector, not to rows")
    return _matrix_use(activation, weight, None, flipped=True)


def _matrix_use(activation: Node, weight: Node, bias: Node | None, *, flipped: bool) -> _Use:
    if _rank(weight) != 2:
        raise _RefusedError(f"its weight has {_rank(weight)} dimensions where 2 are expected")
    source = _attribute_behind(weight)
    if source is None:
        raise _RefusedError("its weight is computed from activations")
    if bias is not None and bias.op != "get_attr":
        raise _RefusedError("its bias is computed from activations")
    return _Use(activation, source, bias, flipped != (source is not weight), "linear")


def _read_conv2d(node: Node) -> _Use:
    activation, weight = _nodes(node, 0, 1)
    bias = _optional(node, 2)
    if weight.op != "get_attr":
        raise _RefusedError("its weight is computed inside the graph")
    if bias is not None and bias.op != "get_attr":
        raise _RefusedError("its bias is computed inside the graph")
    if _rank(activation) != 4:
        raise _RefusedError("it is applied to an image without a batch dimension")
    groups = _argument(node, 6, "groups", 1)
    shape = weight.meta["val"].shape
    if groups != 1:
        kind = "depthwise" if shape[1] == 1 else "grouped"
        raise _RefusedError(f"a {kind} convolution ({groups} groups) has no form yet")
    kernel = (int(shape[2]), int(shape[3]))
    dilation = _pair(_argument(node, 5, "dilation", 1))
    padding = _argument(node, 4, "padding", 0)
    if padding == "same":
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in range(2)]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        amounts = (0, 0) if padding == "valid" else _pair(padding)
        sides = tuple((amount, amount) for amount in amounts)
    patch = Patch(kernel, _pair(_argument(node, 3, "stride", 1)), (sides[0], sides[1]), dilation)
    return _Use(activation, weight, bias, False, "conv2d", patch)


_OPERATORS: dict[object, Callable[[Node], _Use]] = {
    aten.linear.default: _read_linear,
    aten.addmm.default: _read_addmm,
    aten.mm.default: _read_matmul,
    aten.matmul.default: _read_matmul,
    aten.conv2d.default: _read_conv2d,
    aten.conv2d.padding: _read_conv2d,
}

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


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    numbers = [int(item) for item in value]  # type: ignore[attr-defined]
    return (numbers[0], numbers[-1])


def _rank(node: Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _op_name(node: Node) -> str:
    return str(node.target)
