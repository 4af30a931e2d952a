"""REWRITE: convolutions become two or three convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from lowrank_fx.forms.geometry import Geometry, divided, owners
from lowrank_fx.passes.edit import call_node, get_parameter, parameter_node
from lowrank_fx.passes.factorize_linear import FactorizeLinear, operands

_OPTIONS = ("stride", "padding", "dilation", "groups")


class FactorizeConv(FactorizeLinear):
    """Replace a k x k convolution by two or three with the factors of one of its forms; likewise in 1 and 3 dimensions.

    Before::

        %conv2d = conv2d(%x, %weight, %bias, stride, padding, dilation, g)      # [out, in / g, k, k]

    After, form ``channel``::

        %inner  = conv2d(%x, %factor_in, None, stride, padding, dilation, g)    # [g r, in / g, k, k]
        %conv2d = conv2d(%inner, %factor_out, %bias, groups=g)                  # [out, r, 1, 1]

    After, form ``spatial`` (``spatial_t`` the other way round; ``channel_in`` 1 x 1, then k x k)::

        %inner  = conv2d(%x, %factor_in, None, [s, 1], [p, 0], [d, 1], g)       # [g r, in / g, k, 1]
        %conv2d = conv2d(%inner, %factor_out, %bias, [1, s], [0, p], [1, d], g) # [out, r, 1, k]

    After, form ``tucker2``::

        %first  = conv2d(%x, %factor_in, None, groups=g)                        # [g r1, in / g, 1, 1]
        %inner  = conv2d(%first, %factor_mid, None, stride, padding, dilation, g)   # [g r, r1, k, k]
        %conv2d = conv2d(%inner, %factor_out, %bias, groups=g)                  # [out, r, 1, 1]

    Formula: the kernels' composition within each of the g groups stands for the weight. Stride, padding (also
    ``"same"``) and dilation of a dimension go to the factor whose kernel spans it, else to the first. No factor but the
    last has a bias, so the zeros of the padding stay zeros behind it.

    Left alone when the site has no factors, or its nodes are not in the graph.
    """

    name = "factorize-conv"
    kinds = ("conv1d", "conv2d", "conv3d")

    def chain(self, gm: GraphModule, node: Node, names: Sequence[str]) -> Node:
        """Build the factors' calls in front of ``node``; the last node of them."""
        activation, bias = operands(node)
        factors = [get_parameter(gm, name) for name in names]
        if not any(owners(factors)):
            return _channel(gm, node, names, activation, bias)
        geometry, groups = geometry_of(node, factors[0])
        made = activation
        for name, own in zip(names, divided(geometry, factors), strict=True):
            weight = parameter_node(gm, name, node)
            operator, options = geometry_call(node, own, groups)
            last = bias if name == names[-1] else None
            arguments = (made, weight, last, *options) if options or last is not None else (made, weight)
            made = call_node(gm, operator, arguments, like=node, before=node)
        return made


def _channel(gm: GraphModule, node: Node, names: Sequence[str], activation: Node, bias: Node | None) -> Node:
    first, second = (parameter_node(gm, name, node) for name in names)
    options = {key: value for key, value in node.kwargs.items() if key != "bias"}
    groups = node.args[6] if len(node.args) > 6 else options.get("groups", 1)
    assert isinstance(node.target, OpOverload)
    inner = call_node(gm, node.target, (activation, first, None, *node.args[3:]), options, like=node, before=node)
    arguments = (inner, second) if bias is None else (inner, second, bias)
    apart = {"groups": groups} if groups != 1 else {}
    # A 1 x 1 kernel needs no padding, so the plain overload does where the first one pads by name.
    return call_node(gm, node.target.overloadpacket.default, arguments, apart, like=node, before=node)


def geometry_of(node: Node, weight: Tensor) -> tuple[Geometry, int]:
    """How a convolution's node steps over its input, and its groups; ``weight`` tells the number of dimensions."""
    dims = weight.dim() - 2
    given = dict(zip(_OPTIONS, node.args[3:], strict=False)) | dict(node.kwargs)

    def numbers(name: str, default: int) -> tuple[int, ...]:
        value: Any = given.get(name, default)
        listed = [value] if isinstance(value, int) else list(value)
        return tuple(int(each) for each in (listed * dims if len(listed) == 1 else listed))

    padding = given.get("padding", 0)
    sides = padding if isinstance(padding, str) else numbers("padding", 0)
    groups = given.get("groups", 1)
    assert isinstance(groups, int)
    return Geometry(numbers("stride", 1), sides, numbers("dilation", 1)), groups


def geometry_call(node: Node, geometry: Geometry, groups: int) -> tuple[OpOverload, tuple[Argument, ...]]:
    """The overload of ``node``'s operator for a geometry, and what its call takes behind the bias."""
    assert isinstance(node.target, OpOverload)
    packet = node.target.overloadpacket
    named = isinstance(geometry.padding, str)
    options: list[Argument] = [] if geometry.trivial and groups == 1 else [list(geometry.stride)]
    if options:
        sides = geometry.padding if isinstance(geometry.padding, str) else list(geometry.padding)
        options += [sides, list(geometry.dilation)]
        options += [groups] if groups != 1 else []
    return packet.padding if named and options else packet.default, tuple(options)
