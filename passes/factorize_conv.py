"""REWRITE: convolutions become pairs of convolutions."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lowrank_fx.passes.edit import call_node, parameter_node
from lowrank_fx.passes.factorize_linear import FactorizeLinear, operands

aten = torch.ops.aten


class FactorizeConv(FactorizeLinear):
    """Replace a k x k convolution by one to r channels and a 1 x 1 convolution.

    Before::

        %conv2d = conv2d(%x, %weight, %bias, stride, padding, dilation)      # [out, in, k, k]

    After::

        %inner  = conv2d(%x, %factor_in, None, stride, padding, dilation)    # [r, in, k, k]
        %conv2d = conv2d(%inner, %factor_out, %bias)                         # [out, r, 1, 1]

    Formula: over im2col patches a convolution is a linear layer, so this is the pair of ``FactorizeLinear``, form
    ``channel``. Stride, padding (also ``"same"``) and dilation stay with the first convolution.

    Left alone when the site has no factors, or its nodes are not in the graph.
    """

    name = "factorize-conv"
    kind = "conv2d"

    def pair(self, gm: GraphModule, node: Node, names: tuple[str, str]) -> Node:
        """Build the pair in front of ``node``; the last node of it."""
        activation, bias = operands(node)
        first, second = (parameter_node(gm, name, node) for name in names)
        geometry = tuple(node.args[3:6])
        options = {key: value for key, value in node.kwargs.items() if key in ("stride", "padding", "dilation")}
        assert isinstance(node.target, torch._ops.OpOverload)
        inner = call_node(gm, node.target, (activation, first, None, *geometry), options, like=node, before=node)
        arguments = (inner, second) if bias is None else (inner, second, bias)
        return call_node(gm, aten.conv2d.default, arguments, like=node, before=node)
