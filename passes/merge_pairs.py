"""CLEAN-UP: factored pairs that the model came with are one layer each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.composition import Composition, NotComposedError, Reading, erase_unread
from lowrank_fx.passes.edit import call_node, free_name, get_parameter, parameter_node, replace_parameter, set_parameter
from lowrank_fx.passes.factorize_conv import geometry_call
from lowrank_fx.passes.restore_pairs import MergedPair, Operand, Step
from lowrank_fx.passes.verify import attr_tensor
from lowrank_fx.site_graph import applied, chains, users
from lowrank_fx.sites import site_name

aten = torch.ops.aten

_NO_OPTIONS: tuple[Argument, ...] = ()


class MergePairs(Pass):
    """Take two layers of a small middle width, one right after the other, as the one layer that they compute.

    Likewise two or three convolutions whose kernels do not span the same dimension.

    Before::

        %linear   = linear(%x, %first)                              # [r, in], r below break-even
        %linear_1 = linear(%linear, %second, %bias)                 # [out, r]

    After::

        %linear_1 = linear(%x, %weight, %bias)                      # [out, in]

    Formula: ``weight = second @ first`` within each group, ``bias' = second @ first_bias + bias``, computed in float64
    and rounded once to the weights' dtype; of convolutions the kernels' composition.

    The product is called like the module that holds nothing but the pair, else like the last weight.

    Left alone when the middle value has another user, or something happens to it; when the product would not be larger
    than the pair; when a weight or a bias is read by anything else; when dtypes, groups or kinds differ, a weight is a
    buffer or turned inside the graph; when kernels span the same dimension, or one strides or pads a dimension that it
    does not span; when the first has a bias and the second pads with zeros.

    Args:
        found: takes up what was merged, by the name of the product.
    """

    name = "merge-pairs"

    def __init__(self, found: dict[str, MergedPair] | None = None) -> None:
        self.found = {} if found is None else found

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Merge every pair."""
        changes: list[str] = []
        reading = Reading(gm)
        refusals = _apart(reading)
        for windows in _windows(reading, refusals):
            first = windows[0]
            try:
                _check_owned(reading, windows)
            except NotComposedError as reason:
                refusals.append(Refusal(first.nodes[-1].name, str(reason)))
                continue
            if not budget.take():
                refusals.append(budget.refusal(first.nodes[-1]))
                continue
            pair = _merge(gm, reading, windows)
            self.found[pair.weight] = pair
            names = " and ".join(site_name(str(node.target)) for node in first.weights)
            rows, columns = first.weight.shape[0], first.weight[0].numel()
            changes.append(
                f"{names}, a pair of rank {first.middle}, taken as one layer {site_name(pair.weight)}, "
                f"{rows} x {columns}"
            )
        return PassResult(tuple(changes), tuple(refusals))


def _apart(reading: Reading) -> list[Refusal]:
    """Pairs whose middle value something else reads, or happens to."""
    found = []
    for name in applied(reading.graph):
        tap = reading.graph.nodes[name]["tap"]
        between = tap if reading.nodes[tap] not in reading.uses else None
        sources = [tap] if between is None else list(reading.graph.predecessors(tap))
        if len(sources) != 1 or reading.nodes[sources[0]] not in reading.uses:
            continue
        inner, outer = (reading.uses[reading.nodes[each]] for each in (sources[0], name))
        if not _is_narrow(reading, inner.weight, outer.weight):
            continue
        others = [user for user in users(reading.graph, sources[0]) if user != (between or name)]
        if others:
            found.append(Refusal(name, f"the middle value {sources[0]!r} is also used by {', '.join(others)}"))
        elif between is not None:
            target = getattr(reading.nodes[between].target, "_schema", None)
            operator = between if target is None else target.name.split("::")[1]
            found.append(Refusal(name, f"{operator} is applied between the two"))
    return found


def _is_narrow(reading: Reading, first: Node, second: Node) -> bool:
    """Whether a middle is narrower than both ends, as that of a pair is."""
    one, other = (attr_tensor(reading.gm, node) for node in (first, second))
    return one.shape[0] < min(one[0].numel(), other.shape[0])


def _windows(reading: Reading, refusals: list[Refusal]) -> list[list[Composition]]:
    """What can be merged: compositions, those of the same weights together."""
    found: dict[tuple[int, ...], list[Composition]] = {}
    for chain in chains(reading.graph):
        nodes = [reading.nodes[name] for name in chain]
        while len(nodes) > 1:
            made, said = None, ""
            for length in (3, 2) if reading.uses[nodes[0]].patch is not None else (2,):
                if length > len(nodes):
                    continue
                try:
                    made = _pair(reading, nodes[:length])
                    break
                except NotComposedError as reason:
                    said = str(reason)
            if made is None:
                refusals.append(Refusal(nodes[1].name, said))
                nodes = nodes[1:]
                continue
            key = tuple(id(attr_tensor(reading.gm, node)) for node in made.weights)
            found.setdefault(key, []).append(made)
            nodes = nodes[len(made.nodes) :]
    return list(found.values())


def _pair(reading: Reading, nodes: Sequence[Node]) -> Composition:
    made = reading.compose(nodes)
    numbers = sum(attr_tensor(reading.gm, node).numel() for node in made.weights)
    if numbers >= made.weight.numel():
        raise NotComposedError(
            f"its middle width {made.middle} is at or above break-even: "
            f"{numbers} weights, and {made.weight.numel()} in the product"
        )
    return made


def _check_owned(reading: Reading, windows: Sequence[Composition]) -> None:
    """Nothing but these windows may read what is merged away."""
    for position, weight in enumerate(windows[0].weights):
        others = reading.readers(attr_tensor(reading.gm, weight)) - {window.nodes[position] for window in windows}
        if others:
            names = ", ".join(sorted(node.name for node in others))
            raise NotComposedError(f"its weight {weight.target} is also used by {names}")
    if not any(window.inner_bias for window in windows):
        return
    if len(windows) > 1:
        raise NotComposedError("it is called several times, and a layer before the last has a bias")
    (window,) = windows
    for node in window.nodes:
        bias = reading.uses[node].bias
        if bias is not None and reading.readers(attr_tensor(reading.gm, bias)) != {node}:
            raise NotComposedError(f"its bias {bias.target} is also used elsewhere")


def _merge(gm: GraphModule, reading: Reading, windows: Sequence[Composition]) -> MergedPair:
    first = windows[0]
    names = [str(node.target) for node in first.weights]
    tensors = {name: get_parameter(gm, name) for name in names}
    shapes = tuple(tuple(tensor.shape) for tensor in tensors.values())
    trainable = any(tensor.requires_grad for tensor in tensors.values())
    last_bias = reading.uses[first.nodes[-1]].bias
    biases = [bias for node in first.nodes if (bias := reading.uses[node].bias) is not None]
    if first.inner_bias:
        tensors |= {str(bias.target): attr_tensor(gm, bias) for bias in biases}
    steps = {window.nodes[-1].name: _steps(window) for window in windows}

    owner = _common_owner(gm, names, [str(bias.target) for bias in biases])
    product = first.weight.to(first.dtype)
    if owner is None:
        name = names[-1]
        replace_parameter(gm, name, product, trainable)
    else:
        name = free_name(gm, f"{owner}.weight")
        set_parameter(gm, name, product, trainable)
    bias_name = None if last_bias is None else str(last_bias.target)
    if first.inner_bias:
        assert first.bias is not None
        value = first.bias.to(first.dtype)
        if bias_name is not None:
            replace_parameter(gm, bias_name, value, trainable)
        else:
            bias_name = free_name(gm, f"{name.rpartition('.')[0]}.bias".removeprefix("."))
            set_parameter(gm, bias_name, value, trainable)
    for window in windows:
        outer = window.nodes[-1]
        own = reading.uses[outer].bias
        read = bias_name if first.inner_bias else None if own is None else str(own.target)
        activation = reading.nodes[reading.graph.nodes[window.nodes[0].name]["tap"]]
        weight = parameter_node(gm, name, outer)
        bias = None if read is None else parameter_node(gm, read, outer)
        if window.geometry is None:
            operator, options = aten.linear.default, _NO_OPTIONS
        else:
            operator, options = geometry_call(outer, window.geometry, window.groups)
        arguments = (activation, weight, bias, *options) if options or bias is not None else (activation, weight)
        made = call_node(gm, operator, arguments, like=outer, before=outer)
        outer.replace_all_uses_with(made)
        erase_unread(outer)
        made.name = outer.name
        reading.nodes[outer.name] = made  # what a pair behind this one is applied to
    return MergedPair(name, tensors, shapes, steps)


def _steps(window: Composition) -> tuple[Step, ...]:
    made = []
    for node in window.nodes:
        args: Any = map_arg(node.args, _operand)
        kwargs: Any = map_arg(node.kwargs, _operand)
        made.append(Step(node.target, args, kwargs))
    return tuple(made)


def _operand(node: Node) -> Any:
    return Operand(str(node.target) if node.op == "get_attr" else None)


def _common_owner(gm: GraphModule, weights: Sequence[str], biases: Sequence[str]) -> str | None:
    """The name of the module that holds these parameters and no other; None if there is none."""
    shared: list[str] = []
    for level in zip(*(name.split(".")[:-1] for name in weights), strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    owner = ".".join(shared)
    held = {name for name, _ in gm.named_parameters(remove_duplicate=False) if name.startswith(f"{owner}.")}
    return owner if owner and held <= {*weights, *biases} else None
