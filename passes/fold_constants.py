"""CLEAN-UP: what is computed from parameters alone is computed once, here."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lowrank_fx.errors import PassError
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import delete_attr, free_name, names_of_tensor, parameter_node, set_buffer, set_parameter
from lowrank_fx.passes.verify import attr_tensor, resolve_attr
from lowrank_fx.sites import is_transpose

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
# A module's second call appears in the module stack as "layer@1".
_CALL_NUMBER = re.compile(r"@\d+")
_NOT_A_VALUE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class FoldConstants(Pass):
    """Replace every expression of parameters and buffers alone by its value.

    Before::

        %weight = _weight_norm(%original1, %original0)      # parametrizations, weight norm
        %conv2d = conv2d(%x, %weight)
        %split = split_with_sizes(%in_proj_weight, [8, 16])
        %getitem = getitem(%split, 0)                       # the chunks of a packed projection
        %linear = linear(%y, %getitem)

    After::

        %conv2d = conv2d(%x, get[conv.weight])
        %linear = linear(%y, get[attn.in_proj_weight_0])

    Formula: none; the operators run once, without gradients, in the dtypes of the graph.

    An expression is as large as it can be: deterministic ATen operators without effects, whose only inputs are
    parameters, buffers and literal numbers, up to the first operator that needs an input of the model. Equal
    expressions (a parametrisation evaluated twice) become one value, so what was tied stays tied.

    The value is named for its reader, ``conv.weight``, when that is a layer's weight or bias; ``conv.weight_folded``
    when the name stays in use; the n-th part of a packed parameter is ``in_proj_weight_n``; anything else is named
    after the first parameter it was made of, with ``_folded`` behind. A floating value made of at least one parameter
    is a parameter, which requires gradients if one of those did; every other value (masks, position numbers) is a
    persistent buffer, since it must come back when the model is loaded.

    Left alone when the value has more numbers than the parameters that it makes unnecessary (folding never makes a
    model larger, so an expression of a parameter that stays in use elsewhere is computed as before); when an operator
    in it is random; when the graph writes to one of its tensors. Not an expression at all: a parameter by itself; the
    plain transpose of a matrix (the search for sites reads through it, and a copy would break ties); other views that
    nobody reads as a weight or bias, since they cost nothing.
    """

    name = "fold-constants"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Fold every constant expression."""
        constants = _Constants(gm)
        refusals = list(constants.refusals)
        active = constants.expressions()
        while (refused := _too_large(constants, active)) is not None:
            expression, reason = refused
            active.remove(expression)
            refusals.append(Refusal(expression.results[0].name, reason))
        changes: list[str] = []
        for expression in active:
            if not budget.take():
                refusals.append(budget.refusal(expression.results[0]))
                continue
            changes.append(_fold(gm, constants, expression))
        order = {node.name: position for position, node in enumerate(gm.graph.nodes)}
        refusals.sort(key=lambda refusal: order[refusal.node])
        return PassResult(tuple(changes), tuple(refusals))


@dataclass(frozen=True, eq=False)
class _Expression:
    """One value: the equal nodes that hold it, and the distinct tensors it is computed from, by identity."""

    results: list[Node]
    leaves: dict[int, tuple[str, Tensor]]

    @property
    def size(self) -> int:
        return int(self.results[0].meta["val"].numel())


class _Constants:
    """The nodes of a graph that are computed from parameters and buffers alone."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes: set[Node] = set()
        self.refusals: list[Refusal] = []
        written = _written_nodes(gm)
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

    def expressions(self) -> list[_Expression]:
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
                found.append(_Expression(results, leaves))
        return found

    def _worthwhile(self, results: list[Node]) -> bool:
        if all(is_transpose(node) for node in results):
            return False
        dtype = results[0].meta["val"].dtype
        views = all(
            _is_view(node) or (node.op == "get_attr" and node.meta["val"].dtype == dtype) for node in self.walk(results)
        )
        return not views or any(_role(node, user) for node in results for user in node.users)


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


def _written_nodes(gm: GraphModule) -> set[Node]:
    """The nodes whose memory the graph writes to, directly or through a view of the same tensor."""
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


def _too_large(constants: _Constants, active: list[_Expression]) -> tuple[_Expression, str] | None:
    """The first expression to give up so that folding the rest does not add numbers, and why."""
    folded = frozenset(node for expression in active for node in expression.results)
    readers = [node for node in constants.gm.graph.nodes if node not in constants.nodes]
    kept = {
        id(attr_tensor(constants.gm, node))
        for node in constants.walk([source for reader in readers for source in reader.all_input_nodes], stop=folded)
        if node.op == "get_attr"
    }
    for group in _sharing_leaves(active):
        leaves = {key: leaf for expression in group for key, leaf in expression.leaves.items()}
        freed = sum(tensor.numel() for key, (_, tensor) in leaves.items() if key not in kept)
        size = sum(expression.size for expression in group)
        if size > freed:
            largest = max(reversed(group), key=lambda expression: expression.size)
            names = ", ".join(name for name, _ in leaves.values())
            staying = ", ".join(name for key, (name, _) in leaves.items() if key in kept)
            reason = f"the value of an expression of {names} would bring {size} numbers and free {freed}"
            return largest, f"{reason} ({staying} stays in use)" if staying else reason
    return None


def _sharing_leaves(expressions: list[_Expression]) -> list[list[_Expression]]:
    """Group expressions that have a tensor in common, directly or through others, in order."""
    groups: list[tuple[set[int], list[_Expression]]] = []
    for expression in expressions:
        keys, members = set(expression.leaves), [expression]
        apart = []
        for other_keys, others in groups:
            if keys & other_keys:
                keys |= other_keys
                members = others + members
            else:
                apart.append((other_keys, others))
        groups = [*apart, (keys, members)]
    return [members for _, members in groups]


def _fold(gm: GraphModule, constants: _Constants, expression: _Expression) -> str:
    """Put the value of one expression in its place; the line that says what was done."""
    result = expression.results[0]
    value = _evaluate(gm, result)
    names = [name for name, _ in expression.leaves.values()]
    target = _make_room(gm, constants, expression)
    parameters = [tensor for _, tensor in expression.leaves.values() if isinstance(tensor, nn.Parameter)]
    if parameters and value.is_floating_point():
        set_parameter(gm, target, value, any(tensor.requires_grad for tensor in parameters))
    else:
        set_buffer(gm, target, value)
    constant = parameter_node(gm, target, result)
    for node in expression.results:
        node.replace_all_uses_with(constant)
        _erase_dead(gm, constants, node)
    return f"{target} computed from {', '.join(names)}"


@torch.no_grad()
def _evaluate(gm: GraphModule, result: Node) -> Tensor:
    """The value of a constant node, in memory of its own."""
    values: dict[Node, Any] = {}

    def value_of(node: Node) -> Any:
        if node not in values:
            if node.op == "get_attr":
                values[node] = attr_tensor(gm, node).detach()
            else:
                args, kwargs = map_arg((node.args, node.kwargs), value_of)
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
        return values[node]

    value = value_of(result)
    meta = result.meta["val"]
    if not isinstance(value, Tensor) or value.dtype != meta.dtype or value.shape != meta.shape:
        raise PassError(f"{result.name!r} evaluates to another dtype or shape than its meta, {meta.dtype} {meta.shape}")
    return value.clone(memory_format=torch.contiguous_format)


def _make_room(gm: GraphModule, constants: _Constants, expression: _Expression) -> str:
    """The name for a value; what has that name and goes away with the expression is deleted here."""
    wanted, otherwise = _names(expression)
    if free_name(gm, wanted) == wanted:
        return wanted
    replaced = next((tensor for _, tensor in expression.leaves.values() if wanted in names_of_tensor(gm, tensor)), None)
    if replaced is None:
        return free_name(gm, otherwise)
    dying = set(_dead_without(constants, expression.results))
    readers = [
        node for node in gm.graph.nodes if node.op == "get_attr" and resolve_attr(gm, str(node.target)) is replaced
    ]
    if not all(node in dying for node in readers):
        return free_name(gm, otherwise)
    delete_attr(gm, wanted)
    return wanted


def _names(expression: _Expression) -> tuple[str, str]:
    """The name that a value should have, and the one it gets when that is taken."""
    result = expression.results[0]
    first = next(iter(expression.leaves.values()))[0]
    if len(expression.leaves) == 1 and (part := _part(result)) is not None:
        name = f"{first}_{part}"
        return name, f"{name}_folded"
    for node in expression.results:
        for user in node.users:
            role = _role(node, user)
            if role is not None:
                paths = [path for path, _ in (user.meta.get("nn_module_stack") or {}).values()]
                owner = _CALL_NUMBER.sub("", paths[-1]) if paths else ""
                name = f"{owner}.{role}" if owner else role
                return name, f"{name}_folded"
    name = f"{first}_folded"
    return name, name


def _role(node: Node, user: Node) -> str | None:
    """``"weight"`` or ``"bias"`` if ``user`` reads ``node`` as such."""
    taken = [position for position, argument in enumerate(user.args) if argument is node]
    if any(position in _WEIGHTS.get(user.target, ()) for position in taken):
        return "weight"
    if _BIASES.get(user.target, -1) in taken or (user.target in _BIASES and user.kwargs.get("bias") is node):
        return "bias"
    return None


def _part(node: Node) -> int | None:
    """Which part of a packed parameter a node is, if it is one as it stands."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None
    split = node.args[0]
    source = split.args[0] if isinstance(split, Node) and split.args else None
    return node.args[1] if isinstance(source, Node) and source.op == "get_attr" else None


def _dead_without(constants: _Constants, results: Sequence[Node]) -> list[Node]:
    """The constant nodes that have no user left once nobody reads ``results``, users before what they use."""
    dead: dict[Node, None] = dict.fromkeys(results)
    candidates = sorted(constants.walk(results), reverse=True)
    for node in candidates:
        if all(user in dead for user in node.users):
            dead[node] = None
    return list(dead)


def _erase_dead(gm: GraphModule, constants: _Constants, result: Node) -> None:
    for node in sorted(constants.walk([result]), reverse=True):
        if not node.users:
            constants.nodes.discard(node)
            gm.graph.erase_node(node)
