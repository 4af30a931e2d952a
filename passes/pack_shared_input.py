"""REWRITE: pairs that have one first factor compute its product once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from lowrank_fx.forms import Factors
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import get_parameter, users_of_attr
from lowrank_fx.sites import Site

aten = torch.ops.aten


class PackSharedInput(Pass):
    """Let pairs whose first factor is another layer's read that layer's product.

    Before::

        %inner_q = linear(%x, %q_factor_in)             # [r, in]
        %q       = linear(%inner_q, %q_factor_out, %q_bias)
        %inner_k = linear(%x, %k_factor_in)             # the same values
        %k       = linear(%inner_k, %k_factor_out, %k_bias)

    After::

        %inner_q = linear(%x, %q_factor_in)
        %q       = linear(%inner_q, %q_factor_out, %q_bias)
        %k       = linear(%inner_q, %k_factor_out, %k_bias)

    Formula: none; equal products are computed once.

    Left alone when the layer that has the first factor is not in the graph, when it applies it to something else or
    later, or when the values differ: the pair then keeps a first factor of its own.

    Args:
        factored: the site and its factors, by site name.
    """

    name = "pack-shared-input"

    def __init__(self, factored: Mapping[str, tuple[Site, Factors]]) -> None:
        self.factored = factored

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Pack every pair whose factors say that they share the first one."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        readers = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
        for site, factors in self.factored.values():
            own = site.attribute("factor_in")
            if factors.first is None or own not in readers:
                continue
            products = _products(gm, factors.first) if factors.first in readers else {}
            if factors.first not in readers:
                refusals.append(Refusal(site.name, f"{factors.first!r}, which it shares, is not in the graph"))
            elif not torch.equal(get_parameter(gm, own), get_parameter(gm, factors.first)):
                refusals.append(Refusal(site.name, f"its first factor is not equal to {factors.first!r}"))
            elif not all(_before(products.get(node.args[0]), node) for node in users_of_attr(gm, own)):
                refusals.append(Refusal(site.name, f"{factors.first!r} is not applied to its input before"))
            elif not budget.take():
                refusals.append(budget.refusal(site.name))
            else:
                for node in users_of_attr(gm, own):
                    node.replace_all_uses_with(products[node.args[0]])
                    gm.graph.erase_node(node)
                changes.append(f"{site.name} reads the product with {factors.first}")
        return PassResult(tuple(changes), tuple(refusals))


def _products(gm: GraphModule, first: str) -> dict[object, Node]:
    """The products with a first factor, by the activation that it is applied to."""
    return {node.args[0]: node for node in users_of_attr(gm, first) if node.target is aten.linear.default}


def _before(product: Node | None, node: Node) -> bool:
    return product is not None and product < node
