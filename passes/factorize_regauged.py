"""REWRITE: linear layers become re-gauged pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from lowrank_fx.forms import Factors
from lowrank_fx.gauge import Gauge
from lowrank_fx.passes.edit import call_node, get_parameter, parameter_node, set_buffer
from lowrank_fx.passes.factorize_linear import FactorizeLinear, operands, register_factors
from lowrank_fx.sites import Site

aten = torch.ops.aten

ORDER = "gauge_order"
"""The leaf name of the buffer that holds the order in which an input is gathered."""


class FactorizeRegauged(FactorizeLinear):
    """Replace a linear layer by a re-gauged pair of rank r, its pivots being the inputs s ... s + r.

    Before::

        %linear = linear(%x, %weight, %bias)                # or addmm, mm, matmul with a parameter

    After::

        %rows   = reshape(%x, [-1, in])                     # not where %x is a matrix
        %pivots = slice(%rows, 1, s, s + r)
        %t      = t(%factor_in)                             # of [r, in - r]
        %rest   = slice(%rows, 1, 0, s)                     # and once more with what lies behind the pivots
        %upper  = slice(%t, 0, 0, s)                        # only if there are inputs on both sides of the pivots
        %addmm  = addmm(%pivots, %rest, %upper)
        %last   = linear(%addmm, %factor_out, %bias)        # [out, r]
        %linear = view(%last, [..., out])                   # not where %x is a matrix; its sizes are read off %x

    Where no window of pivots is conditioned well enough, %x goes through ``index_select(%x, -1, %gauge_order)`` first.

    Formula: ``factor_out @ [I, factor_in]``, its columns in the order of the gauge, stands for the weight; the bias
    moves as for a plain pair. Every call of a shared weight is replaced by the same pair.

    Left alone when the site has no re-gauged factors, or its nodes are not in the graph.

    Args:
        factored: the site and its factors, by site name.
    """

    name = "factorize-regauged"
    regauged = True

    def __init__(self, factored: Mapping[str, tuple[Site, Factors]]) -> None:
        super().__init__(factored)
        own = [(site, factors.gauge) for site, factors in factored.values() if factors.gauge is not None]
        self.gauges: dict[str, Gauge] = {site.attribute("factor_in"): gauge for site, gauge in own}
        self.orders = {site.attribute("factor_in"): site.attribute(ORDER) for site, _ in own}

    def register(self, gm: GraphModule, site: Site, factors: Factors) -> tuple[str, ...]:
        """Register the factors, and the order in which the input is gathered."""
        if factors.gauge is not None and factors.gauge.order is not None:
            set_buffer(gm, site.attribute(ORDER), factors.gauge.order)
        return register_factors(gm, site, factors)

    def chain(self, gm: GraphModule, node: Node, names: Sequence[str]) -> Node:
        """Build the pair's calls in front of ``node``; the last node of them."""
        activation, bias = operands(node)
        first, second = (parameter_node(gm, name, node) for name in names)
        gauge = self.gauges[names[0]]

        def call(op: OpOverload, *args: object) -> Node:
            return call_node(gm, op, args, like=node, before=node)

        # The width is read off the factors: where export fixed a size, the activation may still hold its symbol.
        rank = second.meta["val"].shape[1]
        width = first.meta["val"].shape[1] + rank
        rows, shape = activation, activation.meta["val"].shape
        if gauge.order is not None:
            order = parameter_node(gm, self.orders[names[0]], node)
            rows = call(aten.index_select.default, rows, -1, order)
        if len(shape) != 2:
            rows = call(aten.reshape.default, rows, [-1, width])
        start, end = gauge.start, gauge.start + rank
        inner, turned = call(aten.slice.Tensor, rows, 1, start, end), call(aten.t.default, first)
        for low, high, place in ((0, start, 0), (end, width, start)):
            if low < high:
                part = call(aten.slice.Tensor, rows, 1, low, high)
                one = high - low == width - rank
                own = turned if one else call(aten.slice.Tensor, turned, 0, place, place + high - low)
                inner = call(aten.addmm.default, inner, part, own)
        last = call(aten.linear.default, inner, second, *(() if bias is None else (bias,)))
        if len(shape) == 2:
            return last
        leading = [
            size if isinstance(size, int) else call(aten.sym_size.int, activation, place)
            for place, size in enumerate(shape[:-1])
        ]
        return call(aten.view.default, last, [*leading, second.meta["val"].shape[0]])


@dataclass(frozen=True)
class RegaugedCall:
    """One call of a re-gauged pair, as :class:`FactorizeRegauged` wrote it.

    Attributes:
        operands: the activation and the bias.
        gauge: its pivots.
        last: the node of its result.
    """

    operands: tuple[Node, Argument]
    gauge: Gauge
    last: Node


def read_calls(gm: GraphModule, site: Site) -> list[RegaugedCall] | None:
    """All calls of a site's re-gauged pair; None where the nodes are not just those that the rewrite leaves."""
    nodes = {node.name: node for node in gm.graph.nodes}
    try:
        return [_read_call(gm, site, _node(nodes.get(call.node))) for call in site.calls]
    except _OtherNodesError:
        return None


class _OtherNodesError(Exception):
    """A node is not what the rewrite leaves there."""


def _read_call(gm: GraphModule, site: Site, last: Node) -> RegaugedCall:
    flat = last.target is aten.view.default
    outer = _node(last.args[0]) if flat else last
    rank = get_parameter(gm, site.attribute("factor_out")).shape[1]
    inner, second, *bias = _arguments(outer, aten.linear.default, users=1 if flat else len(outer.users))
    _expect(_reads(second, site, "factor_out"))
    parts: list[tuple[Argument, ...]] = []
    while _node(inner).target is aten.addmm.default:
        inner, *part = _arguments(inner, aten.addmm.default)
        parts.insert(0, tuple(part))
    rows, axis, start, end = _arguments(inner, aten.slice.Tensor)
    _expect(isinstance(start, int) and (axis, end) == (1, start + rank))
    assert isinstance(start, int)
    spans = [(low, high) for low, high in ((0, start), (start + rank, site.in_features)) if low < high]
    _expect(len(parts) == len(spans))
    for (taken, own), span in zip(parts, spans, strict=True):
        _expect(_arguments(taken, aten.slice.Tensor) == (rows, 1, *span))
        turned = _node(own).args[0] if _node(own).target is aten.slice.Tensor else own
        _expect(_reads(_arguments(turned, aten.t.default, users=len(parts))[0], site, "factor_in"))
    if flat:
        (rows, _) = _arguments(rows, aten.reshape.default, users=1 + len(parts))
    order: Tensor | None = None
    if _node(rows).target is aten.index_select.default and _reads(_node(rows).args[2], site, ORDER):
        order = get_parameter(gm, site.attribute(ORDER))
        rows = _node(rows).args[0]
    return RegaugedCall((_node(rows), bias[0] if bias else None), Gauge(start, order), last)


def _node(argument: Argument) -> Node:
    _expect(isinstance(argument, Node))
    assert isinstance(argument, Node)
    return argument


def _arguments(node: Argument, op: OpOverload, users: int = 1) -> tuple[Argument, ...]:
    """The arguments of a node that calls ``op`` and has so many users."""
    _expect(_node(node).target is op and len(_node(node).users) == users)
    return _node(node).args


def _reads(node: Argument, site: Site, leaf: str) -> bool:
    return _node(node).op == "get_attr" and _node(node).target == site.attribute(leaf)


def _expect(true: bool) -> None:
    if not true:
        raise _OtherNodesError
