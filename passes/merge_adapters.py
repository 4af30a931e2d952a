"""CLEAN-UP: an adapter beside a layer becomes part of the layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowrank_fx.graph_operators import Use
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.composition import Composition, NotComposedError, Reading, erase_unread, source
from lowrank_fx.passes.edit import get_parameter, replace_parameter
from lowrank_fx.passes.factorize_conv import geometry_of
from lowrank_fx.passes.verify import attr_tensor
from lowrank_fx.site_graph import sole_user
from lowrank_fx.sites import site_name

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


class MergeAdapters(Pass):
    """Add a low-rank adapter (LoRA) that runs beside a layer to the layer's weight.

    Before::

        %linear   = linear(%x, %weight, %bias)          # or addmm between views, or a convolution
        %linear_1 = linear(%x, %lora_a)                 # [r, in]
        %linear_2 = linear(%linear_1, %lora_b)          # [out, r]
        %mul      = mul(%linear_2, s)
        %add      = add(%linear, %mul)

    After::

        %linear = linear(%x, %weight, %bias)            # new values under the weight's own name

    Formula (Hu et al., arXiv:2106.09685, section 4.1): ``weight' = weight + s lora_b lora_a``, computed in float64 and
    stored in the weight's dtype; biases of the adapter go into the layer's bias. For convolutions the kernels'
    composition. One operator of fewer FLOPs takes the place of three; nothing is approximated.

    Left alone when the two branches read different values (a dropout that is on), a value on the way has another user,
    a weight is read by anything else, dtypes or geometry differ, or the adapter has a bias and the layer has none.
    """

    name = "merge-adapters"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Merge every adapter; of several beside one layer, one after the other."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        reading = Reading(gm)
        for node in list(gm.graph.nodes):
            if node.target is not aten.add.Tensor:
                continue
            alpha = node.kwargs.get("alpha", 1)  # the factor of the second operand
            sides = [each for each in node.args if isinstance(each, Node)]
            reason = ""
            for layer, adapter in (sides, sides[::-1]) if len(sides) == 2 else ():
                if alpha != 1 and adapter is sides[0]:
                    continue
                found = _read(reading, node, layer, adapter, float(alpha))
                if isinstance(found, str):
                    reason = reason or found
                    continue
                if found is not None and not budget.take():
                    reason = budget.refusal(node).reason
                elif found is not None:
                    changes.append(_merge(gm, reading, node, layer, *found))
                    reading = Reading(gm)
                    reason = ""
                    break
            if reason:
                refusals.append(Refusal(node.name, reason))
        return PassResult(tuple(changes), tuple(refusals))


def _read(
    reading: Reading, add: Node, layer: Node, adapter: Node, scale: float
) -> tuple[Node, Composition, float] | str | None:
    """The layer's node, what the adapter computes, and its scale; why they do not merge; None if they are no such."""
    base, outer = source(layer), source(adapter)
    if outer.target in (aten.mul.Tensor, aten.div.Tensor):
        numbers = [each for each in outer.args if isinstance(each, int | float)]
        if len(numbers) != 1:
            return None
        divided = outer.target is aten.div.Tensor
        if divided and (numbers[0] == 0 or not isinstance(outer.args[0], Node)):
            return None
        scale *= 1 / float(numbers[0]) if divided else float(numbers[0])
        outer = source(outer.all_input_nodes[0])
    while base.target in _VIEWS:
        base = source(base.all_input_nodes[0])
    if base not in reading.uses or outer not in reading.uses:
        return None
    inner = source(reading.uses[outer].activation)
    if inner not in reading.uses or inner is base or reading.uses[outer].kind != reading.uses[base].kind:
        return None
    if _input(reading.uses[base]) is not _input(reading.uses[inner]):
        middle = attr_tensor(reading.gm, reading.uses[inner].weight).shape[0]
        narrow = middle < min(attr_tensor(reading.gm, reading.uses[base].weight).shape[:2])
        return f"{inner.name} and {base.name} are applied to different values" if narrow else None
    for start, end in ((inner, outer), (outer, add), (base, add)):
        step = start.name
        while step != end.name:
            user = sole_user(reading.graph, step)
            if user is None:
                return f"the value {step!r} has another user"
            step = user
    return _checked(reading, add, layer, base, (inner, outer), scale)


def _checked(
    reading: Reading, add: Node, layer: Node, base: Node, pair: tuple[Node, Node], scale: float
) -> tuple[Node, Composition, float] | str:
    use = reading.uses[base]
    try:
        made = reading.compose(pair)
        weight = reading.own(use.weight, "weight")
    except NotComposedError as reason:
        return str(reason)
    if weight.dtype != made.dtype or add.meta["val"].dtype != made.dtype:
        return f"the layer is {weight.dtype}, the adapter {made.dtype}"
    if use.groups != made.groups or _matrix(use, weight).shape != made.weight.shape:
        return "the layer and the adapter have other shapes"
    if made.geometry is not None and geometry_of(base, weight)[0] != made.geometry:
        return "the layer and the adapter step over their input in different ways"
    if [str(size) for size in layer.meta["val"].shape] != [str(size) for size in add.meta["val"].shape]:
        return "the sum broadcasts the layer's output"
    if made.bias is not None and use.bias is None:
        return "the adapter has a bias, and the layer has none to take it"
    read = [(use.weight, base), *zip(made.weights, pair, strict=True)]
    if made.bias is not None and use.bias is not None:
        read.append((use.bias, base))
    for node, reader in read:
        others = reading.readers(attr_tensor(reading.gm, node)) - {reader}
        if others:
            return f"{node.target} is also used by {', '.join(sorted(each.name for each in others))}"
    return base, made, scale


def _merge(
    gm: GraphModule, reading: Reading, add: Node, layer: Node, base: Node, made: Composition, scale: float
) -> str:
    use = reading.uses[base]
    name = str(use.weight.target)
    weight = get_parameter(gm, name)
    total = _matrix(use, weight.detach()).double() + scale * made.weight
    trainable = weight.requires_grad or any(attr_tensor(gm, node).requires_grad for node in made.weights)
    replace_parameter(gm, name, (total.t() if use.transposed else total).contiguous().to(weight.dtype), trainable)
    if made.bias is not None:
        assert use.bias is not None
        bias = get_parameter(gm, str(use.bias.target))
        value = (bias.detach().double() + scale * made.bias).to(bias.dtype)
        replace_parameter(gm, str(use.bias.target), value, bias.requires_grad)
    (adapted,) = [each for each in add.all_input_nodes if each is not layer]
    add.replace_all_uses_with(layer)
    gm.graph.erase_node(add)
    erase_unread(adapted)
    adapter = " and ".join(site_name(str(node.target)) for node in made.weights)
    return f"{adapter}, an adapter of rank {made.middle}, merged into {site_name(name)}"


def _matrix(use: Use, weight: Tensor) -> Tensor:
    return weight.t() if use.transposed else weight


def _input(use: Use) -> Node:
    """What a node is applied to, without the views that only divide or join its rows."""
    node = source(use.activation)
    if use.kind == "linear":
        while node.target in _VIEWS and _keeps_rows(node):
            node = source(node.all_input_nodes[0])
    return node


def _keeps_rows(view: Node) -> bool:
    before, after = (each.meta["val"].shape for each in (view.all_input_nodes[0], view))
    return len(before) > 0 and len(after) > 0 and str(before[-1]) == str(after[-1])
