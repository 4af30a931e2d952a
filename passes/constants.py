"""What of a graph is constant, and what the graph writes to: the analysis behind the clean-up passes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lowrank_fx.graph_operators import is_transpose
from lowrank_fx.passes.base import Refusal
from lowrank_fx.passes.verify import attr_tensor, resolve_attr

aten = torch.ops.aten

# Where an operator takes a weight and where a bias, by argument position.
_WEIGHTS: dict[object, tuple[int, ...]] = {
    aten.linear.default: (1,),
    aten.addmm.default: (1, 2),
    aten.mm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.conv1d.default: (1,),
    aten.conv2d.default: (1,),
    aten.conv3d.default: (1,),
    aten.conv1d.padding: (1,),
    aten.conv2d.padding: (1,),
    aten.conv3d.padding: (1,),
    aten.conv_transpose1d.default: (1,),
    aten.conv_transpose2d.input: (1,),
    aten.conv_transpose3d.input: (1,),
}
_BIASES: dict[object, int] = {target: 2 for target, places in _WEIGHTS.items() if places == (1,)} | {
    aten.addmm.default: 0
}
# In inference these return their input, which their schemas do not tell.
_HIDDEN_VIEWS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_UNDEFINED = ("empty", "new_empty")
_NOT_A_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


@dataclass(frozen=True, eq=False)
class Expression:
    """One value that is computed from parameters and buffers alone.

    Attributes:
        results: the nodes that hold it, in graph order; more than one where the graph computes it again.
        leaves: the name and the tensor of everything it is computed from, by ``id(tensor)``.
    """

    results: list[Node]
    leaves: dict[int, tuple[str, Tensor]]

    @property
    def size(self) -> int:
        """How many numbers the value has."""
        return int(self.results[0].meta["val"].numel())


class Constants:
    """The nodes of a graph that are computed from parameters and buffers alone.

    Args:
        gm: the captured graph.

    Attributes:
        nodes: the constant nodes, the reads of parameters and buffers among them.
        refusals: what would be constant if it were not random, or if the graph did not write to what it reads.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes: set[Node] = set()
        self.refusals: list[Refusal] = []
        written = written_nodes(gm)
        spoiled: dict[Node, str] = {}  # constant but for what the graph writes to, named here
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                if isinstance(resolve_attr(gm, str(node.target)), Tensor):
                    if node in written:
                        spoiled[node] = str(node.target)
                    else:
                        self.nodes.add(node)
                continue
            inputs = node.all_input_nodes
            if not all(source in self.nodes or source in spoiled for source in inputs):
                continue
            if _is_random(node):
                if inputs:
                    self.refusals.append(Refusal(node.name, f"{node.target} is random, so its result is no constant"))
                continue
            reasons = [spoiled[source] for source in inputs if source in spoiled]
            if reasons or node in written:
                if node.op == "call_function":
                    spoiled[node] = ", ".join(dict.fromkeys(reasons)) or node.name
            elif _has_value(node):
                self.nodes.add(node)
        self.refusals += [
            Refusal(node.name, f"the graph writes to {reason}")
            for node, reason in spoiled.items()
            if node.op == "call_function"
            and not (_is_view(node) and not _is_write(node))
            and any(user not in self.nodes and user not in spoiled for user in node.users)
        ]

    def leaves(self, node: Node) -> dict[int, tuple[str, Tensor]]:
        """The tensors that a constant node is computed from, by identity, in argument order."""
        return {
            id(tensor): (str(leaf.target), tensor)
            for leaf in self.walk([node])
            if leaf.op == "get_attr"
            for tensor in [attr_tensor(self.gm, leaf)]
        }

    def walk(self, starts: Sequence[Node], stop: frozenset[Node] = frozenset()) -> Iterator[Node]:
        """The constant nodes behind ``starts``, themselves included, not going into ``stop``."""
        seen: set[Node] = set()
        stack = list(reversed(starts))
        while stack:
            node = stack.pop()
            if node in seen or node in stop or node not in self.nodes:
                continue
            seen.add(node)
            yield node
            stack.extend(reversed(node.all_input_nodes))

    def expressions(self) -> list[Expression]:
        """The largest constant expressions that are worth a value of their own, in graph order."""
        numbers: dict[tuple[object, str], int] = {}
        number_of: dict[Node, int] = {}
        groups: dict[int, list[Node]] = {}
        for node in self.gm.graph.nodes:
            if node not in self.nodes:
                continue
            if node.op == "get_attr":
                key: tuple[object, str] = ("tensor", str(id(attr_tensor(self.gm, node))))
            else:
                named = map_arg((node.args, node.kwargs), lambda source: f"%{number_of[source]}")
                key = (node.target, repr(named))
            number_of[node] = numbers.setdefault(key, len(numbers))
            if node.op != "get_attr" and any(user not in self.nodes for user in node.users):
                groups.setdefault(number_of[node], []).append(node)
        found = []
        for results in groups.values():
            leaves = self.leaves(results[0])
            if leaves and isinstance(results[0].meta["val"], Tensor) and self._worthwhile(results):
                found.append(Expression(results, leaves))
        return found

    def _worthwhile(self, results: list[Node]) -> bool:
        if all(is_transpose(node) for node in results):
            return False
        dtype = results[0].meta["val"].dtype
        views = all(
            _is_view(node) or (node.op == "get_attr" and node.meta["val"].dtype == dtype) for node in self.walk(results)
        )
        return not views or any(role_of(node, user) for node in results for user in node.users)


def role_of(node: Node, user: Node) -> str | None:
    """``"weight"`` or ``"bias"`` if ``user`` reads ``node`` as such, else None."""
    if user.target is aten.einsum.default:
        return "weight"
    taken = [position for position, argument in enumerate(user.args) if argument is node]
    if any(position in _WEIGHTS.get(user.target, ()) for position in taken):
        return "weight"
    if _BIASES.get(user.target, -1) in taken or (user.target in _BIASES and user.kwargs.get("bias") is node):
        return "bias"
    return None


def _has_value(node: Node) -> bool:
    """Whether a node computes a fixed value from its inputs, or would but for being random."""
    if node.op != "call_function" or "val" not in node.meta or node.is_impure(impure_random=False):
        return False
    if any(isinstance(leaf, torch.SymInt) for leaf in _sizes(node.meta["val"])):
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in {"aten", "prims"}:
        return False
    if target._schema.is_mutable or target._schema.name.split("::")[1].startswith(_UNDEFINED):
        return False
    return not any(tag in target.tags for tag in _NOT_A_VALUE)


def _is_write(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _is_random(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    # Dropout in inference (its third argument, train, is False) hands on its input.
    return node.target not in _HIDDEN_VIEWS or node.args[2:] != (False,)


def _sizes(value: object) -> Iterator[object]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield from leaf.shape
        else:
            yield leaf


def _is_view(node: Node) -> bool:
    """Whether a node's result shares its input's memory (``getitem`` hands on what a splitting view made)."""
    if node.target is operator.getitem or node.target in _HIDDEN_VIEWS:
        return True
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else []
    return any(result.alias_info is not None for result in returns)


def written_nodes(gm: GraphModule) -> set[Node]:
    """The nodes whose memory the graph writes to, directly or through a view of the same tensor.

    The normalisation statistics that an operator updates without its schema telling so are among them.
    """
    parents: dict[object, object] = {}

    def find(item: object) -> object:
        while item in parents:
            item = parents[item]
        return item

    def join(a: object, b: object) -> None:
        if find(a) is not find(b):
            parents[find(a)] = find(b)

    written: list[Node] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            tensor = resolve_attr(gm, str(node.target))
            if isinstance(tensor, Tensor) and tensor.numel():
                join(node, ("memory", tensor.untyped_storage().data_ptr()))
        elif node.op == "call_function":
            written += _targets_of_writes(gm, node)
            if _is_view(node):
                for source in node.all_input_nodes:
                    join(node, source)
    roots = {find(node) for node in written}
    return {node for node in gm.graph.nodes if find(node) in roots}


def _targets_of_writes(gm: GraphModule, node: Node) -> list[Node]:
    """The arguments that a call writes to."""
    if isinstance(node.target, HigherOrderOperator):
        bodies = [resolve_attr(gm, str(source.target)) for source in node.all_input_nodes if source.op == "get_attr"]
        if any(isinstance(body, GraphModule) and _writes(body) for body in bodies):
            return list(node.all_input_nodes)
        return []
    if not isinstance(node.target, OpOverload):
        return []
    arguments = node.target._schema.arguments
    given = dict(zip([argument.name for argument in arguments], node.args, strict=False)) | dict(node.kwargs)
    names = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    if given.get("training") or given.get("use_input_stats"):
        names += ["running_mean", "running_var"]  # normalisation updates them, which its schema does not tell
    return [leaf for name in names for leaf in pytree.tree_leaves(given.get(name)) if isinstance(leaf, Node)]


def _writes(body: GraphModule) -> bool:
    return any(_targets_of_writes(body, node) for node in body.graph.nodes if node.op == "call_function")
