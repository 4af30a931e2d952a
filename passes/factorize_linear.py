"""REWRITE: linear layers become pairs of linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import GraphModule, Node

from lowrank_fx.forms import Factors
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import call_node, get_parameter, parameter_node, replace_parameter, set_parameter
from lowrank_fx.passes.verify import fake_mode_of
from lowrank_fx.sites import Site

aten = torch.ops.aten


class FactorizeLinear(Pass):
    """Replace a linear layer by two of rank r.

    Before::

        %linear = linear(%x, %weight, %bias)            # or addmm, mm, matmul with a parameter

    After::

        %inner  = linear(%x, %factor_in)                # [r, in]
        %linear = linear(%inner, %factor_out, %bias)    # [out, r]

    Formula: ``factor_out @ factor_in`` stands for the weight; the bias moves by ``(W - factor_out @ factor_in) mean``.
    Every call of a shared weight is replaced by the same pair.

    Left alone when the site has no factors, its pair is re-gauged (:class:`FactorizeRegauged`), or its nodes are not in
    the graph.

    Args:
        factored: the site and its factors, by site name.
    """

    name = "factorize-linear"
    kinds: tuple[str, ...] = ("linear",)
    regauged = False

    def __init__(self, factored: Mapping[str, tuple[Site, Factors]]) -> None:
        self.factored = factored

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Replace every call of every factored site of this pass's kind."""
        nodes = {node.name: node for node in gm.graph.nodes}
        changes: list[str] = []
        refusals: list[Refusal] = []
        for site, factors in self.factored.values():
            if site.kind not in self.kinds or (factors.gauge is not None) != self.regauged:
                continue
            missing = [call.node for call in site.calls if call.node not in nodes]
            if missing:
                refusals.append(Refusal(site.name, f"the graph has no node {missing[0]!r}"))
                continue
            if not budget.take():
                refusals.append(budget.refusal(site.name))
                continue
            names = self.register(gm, site, factors)
            for call in site.calls:
                node = nodes[call.node]
                last = self.chain(gm, node, names)
                node.replace_all_uses_with(last)
                gm.graph.erase_node(node)
                last.name = call.node
            shape = f"{site.out_features} x {site.in_features}"
            each = f" in each of {site.groups} groups" if site.groups > 1 else ""
            how = ", re-gauged" if self.regauged else ""
            changes.append(f"{site.name} {shape} factored at rank {factors.rank}{each}{how}")
        return PassResult(tuple(changes), tuple(refusals))

    def register(self, gm: GraphModule, site: Site, factors: Factors) -> tuple[str, ...]:
        """Register what a site's new calls read; the factors' names in the order of application."""
        return register_factors(gm, site, factors)

    def chain(self, gm: GraphModule, node: Node, names: Sequence[str]) -> Node:
        """Build the factors' calls in front of ``node``; the last node of them."""
        activation, bias = operands(node)
        first, second = (parameter_node(gm, name, node) for name in names)
        # The pair gives what the layer gave; in the value between, the rank is in the place of the last size.
        whole = node.meta["val"]
        with fake_mode_of(gm):
            between = whole.new_empty((*whole.shape[:-1], first.meta["val"].shape[0]))
        inner = call_node(gm, aten.linear.default, (activation, first), like=node, before=node, value=between)
        arguments = (inner, second) if bias is None else (inner, second, bias)
        return call_node(gm, aten.linear.default, arguments, like=node, before=node, value=whole)


def register_factors(gm: GraphModule, site: Site, factors: Factors) -> tuple[str, ...]:
    """Register a site's factors under its name and move its bias; the factors' names in the order of application."""
    trainable = get_parameter(gm, site.weight).requires_grad
    names = tuple(map(site.attribute, factors.tensors))
    for name, tensor in zip(names, factors.tensors.values(), strict=True):
        set_parameter(gm, name, tensor, trainable)
    if factors.shift is not None:
        for name in site.biases:
            bias = get_parameter(gm, name)
            moved = (bias.detach().double() + factors.shift.to(bias.device)).to(bias.dtype)
            replace_parameter(gm, name, moved, bias.requires_grad)
    return names


def operands(node: Node) -> tuple[Node, Node | None]:
    """The activation and the bias of a node that applies a weight."""
    if node.target is aten.addmm.default:
        bias, activation = node.args[0], node.args[1]
    else:
        activation = node.args[0]
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if node.target in (aten.mm.default, aten.matmul.default, aten.bmm.default):
            bias = None
    assert isinstance(activation, Node)
    return activation, bias if isinstance(bias, Node) else None
