"""CALIBRATE: put an observer behind every tap."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.edit import free_name
from lowrank_fx.sites import Tap


class ObserveTaps(Pass):
    """Put an observer on every tap, right in front of its first reader; the graph computes what it computed before.

    Not right behind the tap's own node: an activation may be filled in place before a layer reads it.

    Before::

        %x      = <any operator>
        %linear = linear(%x, %weight)

    After::

        %x        = <any operator>
        %observer = observers.0(%x)        # no value; an inserted module costs less than an interpreter
        %linear   = linear(%x, %weight)

    A tap that feeds several sites is observed once. Left alone when the tap's node is not in the graph.

    Args:
        taps: the taps to observe, by name.
        observers: a module per tap name, called with the activation; it must say ``_is_impure = True``, which keeps
            dead-code elimination off it.
    """

    name = "observe-taps"

    def __init__(self, taps: Mapping[str, Tap], observers: Mapping[str, nn.Module]) -> None:
        self.taps = taps
        self.observers = observers

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Insert the observers under ``observers.<number>``, or another name where the model has ``observers``."""
        nodes = {node.name: node for node in gm.graph.nodes}
        changes, refusals = [], []
        holder = nn.ModuleList()
        name = free_name(gm, "observers")
        gm.add_submodule(name, holder)
        for tap in self.taps.values():
            node = nodes.get(tap.node)
            if node is None:
                refusals.append(Refusal(tap.node, "the graph has no such node"))
                continue
            if not budget.take():
                refusals.append(budget.refusal(node))
                continue
            holder.append(self.observers[tap.name])
            before = nodes.get(tap.reader, node.next)
            while before.op == "placeholder":
                before = before.next
            with gm.graph.inserting_before(before):
                gm.graph.call_module(f"{name}.{len(holder) - 1}", (node,))
            changes.append(f"{tap.name} observed")
        return PassResult(tuple(changes), tuple(refusals))
