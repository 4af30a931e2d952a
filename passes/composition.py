"""What layers applied one right after another compute together, read from a graph; nothing is changed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lowrank_fx._memory import memory_of
from lowrank_fx.forms import apply_blocks, composed
from lowrank_fx.forms.geometry import Geometry, divided, joined
from lowrank_fx.graph_operators import Use, use_of
from lowrank_fx.passes.edit import users_by_tensor
from lowrank_fx.passes.factorize_conv import geometry_of
from lowrank_fx.passes.verify import attr_tensor, registered_tensors
from lowrank_fx.site_graph import site_graph

aten = torch.ops.aten

_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)


class NotComposedError(Exception):
    """Why layers do not make one together."""


@dataclass(frozen=True)
class Composition:
    """One layer that computes what several do, one after another.

    Attributes:
        nodes: the nodes that apply their weights, in order.
        weights: their weights' nodes.
        weight: the product: float64 ``[out, in]``, for a convolution ``[out, in / groups, *kernel]``.
        bias: float64 ``[out]``, or None where none of them has one.
        inner_bias: another layer than the last has a bias.
        geometry: how a convolution steps over its input; None of a linear layer.
        groups: of each.
        dtype: of all weights and biases.
        middle: how many numbers stand between the last two.
    """

    nodes: tuple[Node, ...]
    weights: tuple[Node, ...]
    weight: Tensor
    bias: Tensor | None
    inner_bias: bool
    geometry: Geometry | None
    groups: int
    dtype: torch.dtype
    middle: int


class Reading:
    """A graph as one of values that apply weights to each other.

    Nodes that change nothing (a dropout that is off, an alias) stand for what they are applied to.

    Attributes:
        nodes: by name.
        uses: how nodes apply their weights.
        graph: what reads what, by name; see :mod:`~lowrank_fx.site_graph`.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes = {node.name: node for node in gm.graph.nodes}
        found = {node: use_of(node) for node in gm.graph.nodes}
        self.uses: dict[Node, Use] = {
            node: use for node, use in found.items() if use is not None and use.activation.op != "get_attr"
        }
        self._users = users_by_tensor(gm)
        self._places: dict[object, set[int]] = {}
        for _, tensor in registered_tensors(gm):
            self._places.setdefault(memory_of(tensor), set()).add(id(tensor))
        values = [
            (node.name, [source(each).name for each in node.all_input_nodes if each.op != "get_attr"])
            for node in gm.graph.nodes
            if node.op != "get_attr" and source(node) is node
        ]
        taps = {node.name: source(use.activation).name for node, use in self.uses.items()}
        self.graph: nx.DiGraph = site_graph(values, taps)

    def readers(self, tensor: Tensor) -> set[Node]:
        """The nodes that take a tensor as an argument, under any of its names."""
        return set(self._users.get(id(tensor), ()))

    def own(self, node: Node, role: str) -> Tensor:
        """The parameter that a ``get_attr`` node reads, which may not share its memory with another tensor.

        Raises:
            NotComposedError: it is no such parameter.
        """
        tensor = attr_tensor(self.gm, node)
        if not isinstance(tensor, nn.Parameter):
            raise NotComposedError(f"its {role} {node.target} is a buffer, not a parameter")
        if len(self._places[memory_of(tensor)]) > 1:
            raise NotComposedError(f"its {role} {node.target} shares its memory with another weight")
        return tensor

    def compose(self, nodes: Sequence[Node]) -> Composition:
        """What nodes that each apply a weight to the one before compute together.

        Raises:
            NotComposedError: there is no one linear layer or convolution that does.
        """
        uses = [self.uses[node] for node in nodes]
        if len({use.kind for use in uses}) > 1 or uses[0].kind == "bmm":
            raise NotComposedError(f"a {' and a '.join(use.kind for use in uses)} make no one layer")
        if len({use.groups for use in uses}) > 1:
            raise NotComposedError(f"their groups differ ({' and '.join(str(use.groups) for use in uses)})")
        for node, use in zip(nodes, uses, strict=True):
            if use.weight not in node.all_input_nodes:
                raise NotComposedError(f"its weight {use.weight.target} is turned inside the graph")
        weights = [self.own(use.weight, "weight").detach() for use in uses]
        biases = [None if use.bias is None else self.own(use.bias, "bias").detach() for use in uses]
        dtypes = {each.dtype for each in (*weights, *biases) if each is not None} | {nodes[-1].meta["val"].dtype}
        if len(dtypes) > 1:
            names = " and ".join(sorted(str(each).removeprefix("torch.") for each in dtypes))
            raise NotComposedError(f"its tensors are not of one dtype ({names})")
        groups = uses[0].groups
        geometry = None
        if uses[0].patch is not None:
            geometry = _joint_geometry(nodes, weights)
            kernels = [each.double() for each in weights]
            weight = composed(kernels, groups)
        else:
            kernels = [(each.t() if use.transposed else each).double() for each, use in zip(weights, uses, strict=True)]
            weight = kernels[0]
            for kernel in kernels[1:]:
                weight = kernel @ weight
        inner_bias = any(bias is not None for bias in biases[:-1])
        if inner_bias and any(_pads(node, each) for node, each in zip(nodes[1:], weights[1:], strict=True)):
            raise NotComposedError("a layer before the last has a bias, and one behind it pads with zeros")
        bias = None
        for kernel, own in zip(kernels, biases, strict=True):
            if bias is not None:  # without padding every position of a kernel meets the same constant
                bias = apply_blocks(kernel.flatten(2).sum(2) if kernel.dim() > 2 else kernel, bias, groups)
            if own is not None:
                bias = own.double() if bias is None else bias + own.double()
        return Composition(
            nodes=tuple(nodes),
            weights=tuple(use.weight for use in uses),
            weight=weight,
            bias=bias,
            inner_bias=inner_bias,
            geometry=geometry,
            groups=groups,
            dtype=weights[0].dtype,
            middle=kernels[-1].shape[1],
        )


def source(node: Node) -> Node:
    """The value that a node passes on unchanged, or the node itself."""
    while _passes_on(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _passes_on(node: Node) -> bool:
    if node.target in _DROPOUTS:
        return node.args[2] is False or bool(node.args[1] == 0)
    if node.target is aten.alias.default:
        return True
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        (given,) = node.all_input_nodes
        return bool(given.meta["val"].dtype == node.args[1])
    return False


def erase_unread(node: Node) -> None:
    """Erase a node that nothing reads, and the chain of those that then have no reader either.

    Cleaning the graph would leave a dropout there, which may draw random numbers.
    """
    while node.op == "call_function" and not node.users:
        sources = [each for each in node.all_input_nodes if each.op != "get_attr"]
        node.graph.erase_node(node)
        if len(sources) != 1:
            return
        (node,) = sources


def _joint_geometry(nodes: Sequence[Node], weights: Sequence[Tensor]) -> Geometry:
    spans = zip(*(weight.shape[2:] for weight in weights), strict=True)
    if any(sum(size > 1 for size in sizes) > 1 for sizes in spans):
        raise NotComposedError("two of their kernels span the same dimension")
    each = [geometry_of(node, weight)[0] for node, weight in zip(nodes, weights, strict=True)]
    geometry = joined(each, weights)
    if divided(geometry, weights) != each:
        raise NotComposedError("one of them strides, pads or dilates a dimension that its kernel does not span")
    return geometry


def _pads(node: Node, weight: Tensor) -> bool:
    if weight.dim() < 3:
        return False
    padding = geometry_of(node, weight)[0].padding
    return padding == "same" if isinstance(padding, str) else any(padding)
