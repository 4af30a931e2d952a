"""REWRITE: convolutions become pairs of convolutions."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowrank_fx.passes.edit import call_node, parameter_node
from lowrank_fx.passes.factorize_linear import FactorizeLinear, operands


class FactorizeConv(FactorizeLinear):
    """Replace a k x k convolution by one to r channels and a 1 x 1 convolution; likewise in one and three dimensions.

    Before::

        %conv2d = conv2d(%x, %weight, %bias, stride, padding, dilation, g)      # [out, in / g, k, k]

    After::

        %inner  = conv2d(%x, %factor_in, None, stride, padding, dilation, g)    # [g r, in / g, k, k]
        %conv2d = conv2d(%inner, %factor_out, %bias, groups=g)                  # [out, r, 1, 1]

    Formula: over im2col patches a convolution is a linear layer, so this is the pair of ``FactorizeLinear``, form
    ``channel``, within each of its g groups. Stride, padding (also ``"same"``) and dilation stay with the first one.

    Left alone when the site has no factors, or its nodes are not in the graph.
    """

    name = "factorize-conv"
    kinds = ("conv1d", "conv2d", "conv3d")

    def pair(self, gm: GraphModule, node: Node, names: tuple[str, str]) -> Node:
        """Build the pair in front of ``node``; the last node of it."""
        activation, bias = operands(node)
        first, second = (parameter_node(gm, name, node) for name in names)
        options = {key: value for key, value in node.kwargs.items() if key != "bias"}
        groups = node.args[6] if len(node.args) > 6 else options.get("groups", 1)
        assert isinstance(node.target, OpOverload)
        inner = call_node(gm, node.target, (activation, first, None, *node.args[3:]), options, like=node, before=node)
        arguments = (inner, second) if bias is None else (inner, second, bias)
        apart = {"groups": groups} if groups != 1 else {}
        # A 1 x 1 kernel needs no padding, so the plain overload does where the first one pads by name.
        return call_node(gm, node.target.overloadpacket.default, arguments, apart, like=node, before=node)
