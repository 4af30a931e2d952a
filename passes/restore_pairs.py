"""REWRITE: pairs that the model came with come back where nothing takes their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import call_node, parameter_node, replace_parameter, set_parameter
from lowrank_fx.sites import site_name


@dataclass(frozen=True)
class Operand:
    """What a step of a merged pair took: the tensor of a name; None for what the step before gave, or the input."""

    name: str | None


@dataclass(frozen=True)
class Step:
    """A node as it was: what it called, and the arguments, with an :class:`Operand` for every node."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class MergedPair:
    """A pair that was merged, and all that it takes to put it back.

    Attributes:
        weight: fully qualified name of the product.
        tensors: the weights, and the biases that were merged too, by their names.
        shapes: of the weights, in the order of their application.
        calls: for every node that applies the product, by its name, the nodes that were there.
    """

    weight: str
    tensors: dict[str, Tensor]
    shapes: tuple[tuple[int, ...], ...]
    calls: dict[str, tuple[Step, ...]]


class RestorePairs(Pass):
    """Put back the pairs that ``MergePairs`` took as one layer each: the same operators, parameters and names of these.

    Before::

        %linear_1 = linear(%x, %weight, %bias)

    After::

        %linear   = linear(%x, %first)
        %linear_1 = linear(%linear, %second, %bias)

    Formula: none; the very parameters come back.

    Left alone when a node that applies the product is not in the graph.

    Args:
        pairs: those to be put back.
    """

    name = "restore-pairs"

    def __init__(self, pairs: Sequence[MergedPair]) -> None:
        self.pairs = pairs

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Put every pair back."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        nodes = {node.name: node for node in gm.graph.nodes}
        for pair in self.pairs:
            missing = [name for name in pair.calls if name not in nodes]
            if missing:
                refusals.append(Refusal(site_name(pair.weight), f"the graph has no node {missing[0]!r}"))
                continue
            if not budget.take():
                refusals.append(budget.refusal(site_name(pair.weight)))
                continue
            _restore(gm, pair, nodes)
            changes.append(f"{site_name(pair.weight)} is the pair again that it came as")
        return PassResult(tuple(changes), tuple(refusals))


def _restore(gm: GraphModule, pair: MergedPair, nodes: dict[str, Node]) -> None:
    for name, tensor in pair.tensors.items():
        taken = {target for target, _ in gm.named_parameters(remove_duplicate=False)}
        put = replace_parameter if name in taken else set_parameter
        put(gm, name, tensor, tensor.requires_grad)
    for name, steps in pair.calls.items():
        node = nodes[name]
        value = node.args[0]
        assert isinstance(value, Node)
        for step in steps:

            def fill(each: Any, value: Node = value, node: Node = node) -> Any:
                if isinstance(each, Operand):
                    return value if each.name is None else parameter_node(gm, each.name, node)
                return type(each)(map(fill, each)) if isinstance(each, tuple | list) else each

            kwargs = {key: fill(each) for key, each in step.kwargs.items()}
            value = call_node(gm, step.target, fill(step.args), kwargs, like=node, before=node)
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
        value.name = name
