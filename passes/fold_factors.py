"""FOLD: factored pairs become dense operators again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from lowrank_fx.forms import Factors
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import call_node, free_name, get_parameter, parameter_node, set_parameter, users_of_attr
from lowrank_fx.sites import Site

aten = torch.ops.aten


class FoldFactors(Pass):
    """Multiply a factored pair back into one dense operator, under the weight's own name.

    Where something else took that name in the meantime (the weight was tied to an embedding), under the next free one.

    Before::

        %inner  = linear(%x, %factor_in)                # or conv2d(%x, %factor_in, None, stride, padding, dilation, g)
        %linear = linear(%inner, %factor_out, %bias)    # or conv2d(%inner, %factor_out, %bias, groups=g); or bmm twice

    After::

        %linear = linear(%x, %weight, %bias)            # or addmm, matmul where the weight is stored [in, out],
                                                        # or conv2d(%x, %weight, %bias, stride, padding, dilation, g)

    Formula: ``weight = factor_out @ factor_in`` within each group, multiplied in float64 and rounded once to the
    factors' dtype.

    Left alone when the pair is not in the graph, its middle value has another user, or something happens to that value
    between the two.

    Args:
        sites: the sites whose pairs are folded, by name.
    """

    name = "fold-factors"

    def __init__(self, sites: Mapping[str, Site]) -> None:
        self.sites = sites

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Fold every pair of every site."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        readers = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
        for site in self.sites.values():
            names = site.attribute("factor_in"), site.attribute("factor_out")
            if not readers.issuperset(names):
                refusals.append(Refusal(site.name, "the graph has no pair of this name"))
                continue
            inner = users_of_attr(gm, names[0])
            shared = [node.name for node in inner if len(node.users) != 1]
            if shared:
                refusals.append(Refusal(site.name, f"the middle value {shared[0]!r} has another user"))
                continue
            if {next(iter(node.users)) for node in inner} != set(users_of_attr(gm, names[1])):
                refusals.append(Refusal(site.name, "its factors are not applied one right after the other"))
                continue
            if not budget.take():
                refusals.append(budget.refusal(site.name))
                continue
            self._fold(gm, site, names, inner)
            changes.append(f"{site.name} folded to {site.out_features} x {site.in_features}")
        return PassResult(tuple(changes), tuple(refusals))

    def _fold(self, gm: GraphModule, site: Site, names: tuple[str, str], inner: tuple[Node, ...]) -> None:
        first, second = (get_parameter(gm, name) for name in names)
        factors = Factors(first.detach(), second.detach(), None, site.groups, stacked=site.kind == "bmm")
        weight = free_name(gm, site.weight)
        set_parameter(gm, weight, site.unmatrix(factors.dense_matrix()).to(first.dtype), first.requires_grad)
        for node in inner:
            outer = next(iter(node.users))
            operator, arguments = _dense_call(gm, site, parameter_node(gm, weight, outer), node, outer)
            options = {key: value for key, value in node.kwargs.items() if key != "bias"}
            folded = call_node(gm, operator, arguments, options, like=outer, before=outer)
            name = outer.name
            outer.replace_all_uses_with(folded)
            gm.graph.erase_node(outer)
            gm.graph.erase_node(node)
            folded.name = name


def _dense_call(
    gm: GraphModule, site: Site, weight: Node, inner: Node, outer: Node
) -> tuple[OpOverload, tuple[Argument, ...]]:
    activation = inner.args[0]
    bias = outer.args[2] if len(outer.args) > 2 else None
    if site.kind == "linear" and site.transposed:
        # The weight keeps its own layout, [in, out], so that its values fit the model it came from.
        if bias is None:
            return aten.matmul.default, (activation, weight)
        assert isinstance(activation, Node)
        if activation.meta["val"].dim() == 2:
            return aten.addmm.default, (bias, activation, weight)
        turned = call_node(gm, aten.t.default, (weight,), like=outer, before=outer)
        return aten.linear.default, (activation, turned, bias)
    assert isinstance(inner.target, OpOverload)
    geometry = inner.args[3:]
    if bias is None and not geometry:
        return inner.target, (activation, weight)
    return inner.target, (activation, weight, bias, *geometry)
