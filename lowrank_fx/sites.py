"""Sites and taps: where a trained weight meets an activation, and which of these places can be factored.

:func:`find_sites` reads a captured graph of ATen operators through one table of operators. A *site* is one weight with
all the nodes that apply it (a module called twice is one site with two calls: one weight, pooled statistics); a *tap*
is an activation that feeds one or more sites, with its patch geometry, so that q, k and v share one sketch. Everything
else that holds a weight is listed with the reason why it is left alone.

:class:`Site` and :class:`Tap` hold names and numbers only, no graph, so sketches, forms and planners work the same
wherever a site was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeGuard

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter
from torch.nn import functional as F

from lowrank_fx.errors import OptionError

aten = torch.ops.aten


@dataclass(frozen=True)
class Patch:
    """The im2col geometry of a 2-D convolution.

    Attributes:
        kernel: kernel height and width.
        stride: step between output positions.
        padding: zeros before and after, per dimension: ((top, bottom), (left, right)).
        dilation: step between the kernel's own positions.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]

    def positions(self, height: int, width: int) -> tuple[int, int]:
        """Output height and width for an input of ``height`` x ``width``."""
        out = []
        for axis, size in enumerate((height, width)):
            padded = size + sum(self.padding[axis])
            out.append((padded - self.dilation[axis] * (self.kernel[axis] - 1) - 1) // self.stride[axis] + 1)
        return out[0], out[1]

    def extract(self, activation: Tensor, index: Tensor) -> Tensor:
        """The patches at the flat output positions ``index``, without building all of them.

        Args:
            activation: ``[batch, channels, height, width]``.
            index: int64 ``[n]``, positions in ``batch * out_height * out_width``, row-major.

        Returns:
            ``[n, channels * kernel_height * kernel_width]``, ordered as a convolution weight flattened from dim 1.
        """
        (top, bottom), (left, right) = self.padding
        padded = F.pad(activation, (left, right, top, bottom)) if top or bottom or left or right else activation
        out_height, out_width = self.positions(activation.shape[2], activation.shape[3])
        image = index // (out_height * out_width)
        row = index // out_width % out_height * self.stride[0]
        column = index % out_width * self.stride[1]
        device = activation.device
        kernel_rows = torch.arange(self.kernel[0], device=device) * self.dilation[0]
        kernel_columns = torch.arange(self.kernel[1], device=device) * self.dilation[1]
        picked = padded.permute(0, 2, 3, 1)[
            image[:, None, None],
            row[:, None, None] + kernel_rows[None, :, None],
            column[:, None, None] + kernel_columns[None, None, :],
        ]
        return picked.permute(0, 3, 1, 2).flatten(1)


@dataclass(frozen=True)
class Tap:
    """An activation that feeds sites.

    Attributes:
        name: unique; the graph node's name, followed by the geometry for a convolution.
        node: name of the graph node whose value is observed.
        width: length of a row (for a convolution channels x kernel height x kernel width).
        patch: im2col geometry, or None for rows along the last dimension.
        reader: name of the first graph node that applies a weight to it; in front of that the activation is final.
    """

    name: str
    node: str
    width: int
    patch: Patch | None = None
    reader: str = field(default="", compare=False)


@dataclass(frozen=True)
class SiteCall:
    """One graph node that applies a site's weight."""

    node: str
    tap: str
    bias: str | None


@dataclass(frozen=True)
class Site:
    """One weight that can be factored, with every call of it.

    Attributes:
        name: fully qualified name of the owning module (of the parameter, where it is not called ``weight``).
        kind: ``"linear"`` or ``"conv2d"``.
        weight: fully qualified name of the weight.
        transposed: the weight is stored ``[in, out]`` (Hugging Face ``Conv1D``, ``x @ w``).
        out_features: rows of the weight as a matrix, m.
        in_features: columns of the weight as a matrix, d (for a convolution in one patch).
        shape: the weight's own shape.
        dtype: the weight's dtype, as in ``str(tensor.dtype)``.
        patch: geometry of a convolution.
        calls: every node that applies the weight.
        centered: the bias may take up the mean's share of the error: every call has a bias that only this site uses.
    """

    name: str
    kind: str
    weight: str
    transposed: bool
    out_features: int
    in_features: int
    shape: tuple[int, ...]
    dtype: str
    patch: Patch | None
    calls: tuple[SiteCall, ...]
    centered: bool

    @property
    def biases(self) -> tuple[str, ...]:
        """Fully qualified names of the biases of all calls, each once."""
        return tuple(dict.fromkeys(call.bias for call in self.calls if call.bias is not None))

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix ``[out_features, in_features]`` (a view)."""
        return weight.t() if self.transposed else weight.flatten(1)

    def unmatrix(self, matrix: Tensor) -> Tensor:
        """A matrix ``[out_features, in_features]`` in the weight's own shape."""
        return matrix.t().contiguous() if self.transposed else matrix.reshape(self.shape)

    def attribute(self, leaf: str) -> str:
        """The fully qualified name of a new parameter of this site, such as ``layer.0.q.factor_in``."""
        owner, _, own = self.weight.rpartition(".")
        prefix = f"{owner}." if owner else ""
        return prefix + leaf if own == "weight" else f"{prefix}{own}_{leaf}"


@dataclass(frozen=True)
class LeftAlone:
    """A weight that stays as it is, and why."""

    name: str
    reason: str


@dataclass
class SiteTable:
    """Everything :func:`find_sites` found, in graph order.

    Attributes:
        sites: the sites that may be factored.
        taps: by name.
        left_alone: weights that stay as they are.
        graph: networkx graph; an edge from a tap to a site says that the tap feeds the site.
    """

    sites: tuple[Site, ...]
    taps: dict[str, Tap]
    left_alone: tuple[LeftAlone, ...]
    graph: nx.DiGraph = field(repr=False)

    def taps_of(self, site: Site) -> list[Tap]:
        """The taps that feed ``site``, in graph order, each once."""
        return [self.taps[name] for name in dict.fromkeys(call.tap for call in site.calls)]


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

    unmatched = set(skip)
    sites: list[Site] = []
    taps: dict[str, Tap] = {}
    left_alone: list[LeftAlone] = []
    # In graph order; what the graph never reads comes last.
    for key in sorted(tensors, key=lambda key: order[uses[key][0]] if key in uses else len(order)):
        fqn, tensor = tensors[key]
        name = _site_name(fqn)
        matched = [pattern for pattern in skip if _matches(pattern, name, fqn)]
        unmatched.difference_update(matched)
        if matched:
            left_alone.append(LeftAlone(name, f"skipped by the pattern {matched[0]!r}"))
            continue
        try:
            site, site_taps = _make_site(gm, name, fqn, tensor, uses.get(key, []))
        except _RefusedError as refusal:
            left_alone.append(LeftAlone(name, str(refusal)))
            continue
        sites.append(site)
        for tap in site_taps:
            taps.setdefault(tap.name, tap)
    if unmatched:
        names = [_site_name(fqn) for fqn, _ in tensors.values()]
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise OptionError(f"skip={sorted(unmatched)[0]!r} matches no weight of this model; its layers are {shown}")

    graph: nx.DiGraph = nx.DiGraph()
    for site in sites:
        graph.add_node(site.name, kind="site")
        for call in site.calls:
            graph.add_node(call.tap, kind="tap")
            graph.add_edge(call.tap, site.name)
    return SiteTable(tuple(sites), taps, tuple(left_alone), graph)


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
        tap_name = use.activation.name if use.patch is None else f"{use.activation.name}[{_geometry(use.patch)}]"
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


def _geometry(patch: Patch) -> str:
    kernel, stride, dilation = ("x".join(map(str, pair)) for pair in (patch.kernel, patch.stride, patch.dilation))
    sides = ",".join(str(amount) for side in patch.padding for amount in side)
    return f"k{kernel} s{stride} p{sides} d{dilation}"


def _site_name(fqn: str) -> str:
    owner, _, own = fqn.rpartition(".")
    return owner if own == "weight" and owner else fqn


def _matches(pattern: str, name: str, fqn: str) -> bool:
    return any(fnmatchcase(text, pattern) for text in (name, fqn, "." + name, "." + fqn))
