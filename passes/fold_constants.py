"""CLEAN-UP: what is computed from parameters alone is computed once, here."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from lowrank_fx.errors import PassError
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.constants import Constants, Expression, role_of
from lowrank_fx.passes.edit import (
    delete_attr,
    free_name,
    module_of,
    names_of_tensor,
    parameter_node,
    set_buffer,
    set_parameter,
)
from lowrank_fx.passes.verify import attr_tensor, resolve_attr


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
        constants = Constants(gm)
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


def _too_large(constants: Constants, active: list[Expression]) -> tuple[Expression, str] | None:
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


def _sharing_leaves(expressions: list[Expression]) -> list[list[Expression]]:
    """Group expressions that have a tensor in common, directly or through others, in order."""
    groups: list[tuple[set[int], list[Expression]]] = []
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


def _fold(gm: GraphModule, constants: Constants, expression: Expression) -> str:
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


def _make_room(gm: GraphModule, constants: Constants, expression: Expression) -> str:
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


def _names(expression: Expression) -> tuple[str, str]:
    """The name that a value should have, and the one it gets when that is taken."""
    result = expression.results[0]
    first = next(iter(expression.leaves.values()))[0]
    if len(expression.leaves) == 1 and (part := _part(result)) is not None:
        name = f"{first}_{part}"
        return name, f"{name}_folded"
    for node in expression.results:
        for user in node.users:
            role = role_of(node, user)
            if role is not None:
                owner = module_of(user)
                name = f"{owner}.{role}" if owner else role
                return name, f"{name}_folded"
    name = f"{first}_folded"
    return name, name


def _part(node: Node) -> int | None:
    """Which part of a packed parameter a node is, if it is one as it stands."""
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None
    split = node.args[0]
    source = split.args[0] if isinstance(split, Node) and split.args else None
    return node.args[1] if isinstance(source, Node) and source.op == "get_attr" else None


def _dead_without(constants: Constants, results: Sequence[Node]) -> list[Node]:
    """The constant nodes that have no user left once nobody reads ``results``, users before what they use."""
    dead: dict[Node, None] = dict.fromkeys(results)
    candidates = sorted(constants.walk(results), reverse=True)
    for node in candidates:
        if all(user in dead for user in node.users):
            dead[node] = None
    return list(dead)


def _erase_dead(gm: GraphModule, constants: Constants, result: Node) -> None:
    for node in sorted(constants.walk([result]), reverse=True):
        if not node.users:
            constants.nodes.discard(node)
            gm.graph.erase_node(node)
