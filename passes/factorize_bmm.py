"""REWRITE: products with one matrix per group become pairs of such products."""

from __future__ import annotations

from collections.abc import Sequence

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowrank_fx.passes.edit import call_node, parameter_node
from lowrank_fx.passes.factorize_linear import FactorizeLinear, operands


class FactorizeBmm(FactorizeLinear):
    """Replace a product with a matrix per group by two of rank r.

    Before::

        %bmm = bmm(%x, %weight)             # [g, in, out]; or matmul, with or without groups in %x

    After::

        %inner = bmm(%x, %factor_in)        # [g, in, r]
        %bmm   = bmm(%inner, %factor_out)   # [g, r, out]

    Formula: ``factor_in[j] @ factor_out[j]`` stands for ``weight[j]``.

    Left alone when the site has no factors, or its nodes are not in the graph.
    """

    name = "factorize-bmm"
    kinds = ("bmm",)

    def chain(self, gm: GraphModule, node: Node, names: Sequence[str]) -> Node:
        """Build the factors' calls in front of ``node``; the last node of them."""
        activation, _ = operands(node)
        first, second = (parameter_node(gm, name, node) for name in names)
        assert isinstance(node.target, OpOverload)
        inner = call_node(gm, node.target, (activation, first), like=node, before=node)
        return call_node(gm, node.target, (inner, second), like=node, before=node)
