"""Running a graph node by node: stopping, forking, and exchanging parameters on the way.

torch's ``Interpreter`` runs a graph once, from end to end. Measuring what one layer does wants to run the part behind
it many times, and comparing two versions of a model wants to run both in step. Values are dropped after their last use.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowrank_fx.batches import Call


class Walk:
    """What is known of a graph before it runs.

    Args:
        gm: a graph of ATen operators; its parameters and buffers are read, never changed.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.position = {node.name: position for position, node in enumerate(self.nodes)}
        last = {used: position for position, node in enumerate(self.nodes) for used in node.all_input_nodes}
        self.dying: list[list[Node]] = [[] for _ in self.nodes]
        for node, position in last.items():
            self.dying[position].append(node)
        self.last_write = max((self.position[node.name] for node in self.nodes if _writes(node)), default=-1)
        self.parameters = {
            node for node in self.nodes if node.op == "get_attr" and isinstance(self._attribute(node), nn.Parameter)
        }
        self.readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                self.readers.setdefault(id(self._attribute(node)), []).append(node)

    def run(self, call: Call) -> Run:
        """A run that has not computed anything yet."""
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        # What the graph writes to reaches the caller's tensors through any view of them, so all are copied then.
        owned = _copies(leaves) if self.last_write >= 0 else leaves
        return Run(self, dict(zip(placeholders, owned, strict=True)), {}, 0)

    def compute(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """The value of one node, from the values of its arguments."""
        if node.op == "get_attr":
            value = self._attribute(node)
            return _copies([value])[0] if self.last_write >= 0 and node not in self.parameters else value
        args = torch.fx.node.map_arg(node.args, values.__getitem__)
        if node.op == "output":
            return args[0]
        kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
        target = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        assert callable(target)
        return target(*args, **kwargs)

    def _attribute(self, node: Node) -> Any:
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value


class Run:
    """One run of a graph, somewhere between its first and its last node.

    Attributes:
        values: of the nodes computed so far that are still needed; graph inputs stand in it from the start.
        exchanged: stand-ins for the graph's own parameters, by the node that reads them.
        position: of the node that is computed next.
    """

    def __init__(self, walk: Walk, values: dict[Node, Any], exchanged: dict[Node, Tensor], position: int) -> None:
        self.walk = walk
        self.values = values
        self.exchanged = exchanged
        self.position = position

    @property
    def next(self) -> Node:
        """The node that is computed next."""
        node: Node = self.walk.nodes[self.position]
        return node

    def exchange(self, parameters: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of parameters, by fully qualified name, from here on."""
        changed = set()
        for name, tensor in parameters.items():
            for reader in self.walk.readers[id(self.walk.gm.get_parameter(name))]:
                self.exchanged[reader] = tensor
                changed.add(reader)
                if reader in self.values:
                    self.values[reader] = tensor
        # A transpose of a parameter may have been computed already. Outputs of layers behind us stay as they are.
        for node in [node for reader in changed for node in reader.users if node in self.values]:
            if self.walk.parameters.issuperset(node.all_input_nodes):
                self.values[node] = self.walk.compute(node, {**self.values, **self.exchanged})

    def compute(self) -> Any:
        """Compute the next node without moving on, and return its value."""
        node = self.next
        if node.op != "placeholder":
            value = self.exchanged[node] if node in self.exchanged else self.walk.compute(node, self.values)
            self.values[node] = value
        return self.values[node]

    def move(self) -> None:
        """Move on to the node after the one just computed, and drop what is not needed any more."""
        for dead in self.walk.dying[self.position]:
            self.values.pop(dead, None)
        self.position += 1

    def fork(self) -> Run:
        """A second run from here on; if anything is still written to, the values so far are copied."""
        values = dict(self.values)
        if self.position <= self.walk.last_write:
            owned = [node for node in values if node not in self.walk.parameters]
            values.update(zip(owned, _copies([values[node] for node in owned]), strict=True))
        return Run(self.walk, values, dict(self.exchanged), self.position)

    def finish(self, wanted: Collection[str] = (), kept: dict[str, Any] | None = None) -> tuple[Any, ...]:
        """Run to the end; the outputs as flat leaves.

        Args:
            wanted: names of nodes whose values are put into ``kept``, as they are before anything is written to them.
            kept: by name.
        """
        result: Any = None
        while self.position < len(self.walk.nodes):
            name = self.next.name
            result = self.compute()
            if kept is not None and name in wanted:
                kept[name] = result
                if self.position < self.walk.last_write:
                    self.values[self.next] = result.clone()
            self.move()
        return tuple(pytree.tree_leaves(result))


def _writes(node: Node) -> bool:
    """Whether an operator writes to one of its arguments (``relu_``, ``add_``)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    return any(argument.alias_info is not None and argument.alias_info.is_write for argument in arguments)


def _copies(values: Sequence[Any]) -> list[Any]:
    """Copies that share memory with each other where the values do, so that a write reaches the same views."""
    return copy.deepcopy(list(values))
