"""CLEAN-UP: a head that shares its weight with an embedding becomes a weight of its own, over the same memory."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from lowrank_fx._memory import memory_of
from lowrank_fx.graph_operators import is_transpose
from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.constants import written_nodes
from lowrank_fx.passes.edit import (
    free_name,
    module_of,
    names_of_tensor,
    parameter_node,
    replace_parameter,
    set_parameter,
)
from lowrank_fx.passes.verify import attr_tensor, resolve_attr

aten = torch.ops.aten

# Where a linear layer reads its weight, by argument position.
_HEADS: dict[object, int] = {
    aten.linear.default: 1,
    aten.addmm.default: 2,
    aten.mm.default: 1,
    aten.matmul.default: 1,
}


class UntieEmbeddings(Pass):
    """Give the linear layers that read an embedding's table a parameter of their own, over the same memory.

    Before::

        %lm_head_weight = get[lm_head.weight]               # one tensor, under two names
        %embedding = embedding(%lm_head_weight, %ids)
        %linear = linear(%x, %lm_head_weight)

    After::

        %wte_weight = get[wte.weight]
        %lm_head_weight = get[lm_head.weight]               # another parameter, the same storage
        %embedding = embedding(%wte_weight, %ids)
        %linear = linear(%x, %lm_head_weight)

    Formula: none; not a number is copied.

    The head can then be factored, and the embedding, which cannot, keeps its table. Each side reads the name that its
    own module has for the tensor (``torch.export`` puts both under the last one). A head without such a name
    (``linear(x, self.wte.weight)``) gets ``wte_head.weight``. :func:`retie` makes one parameter again of what stayed
    dense.

    Left alone with its reason: a table that is read by anything else than embeddings and linear layers; one that the
    graph writes to.
    """

    name = "untie-embeddings"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Untie every embedding whose table linear layers read."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        written = written_nodes(gm)
        for reads in _reads_of_tables(gm):
            heads, embeddings, others = _readers(reads)
            if not heads:
                continue
            first = embeddings[0]
            name = str(reads[0].target)
            if any(read in written for read in reads):
                refusals.append(Refusal(first.name, f"the graph writes to its table {name}"))
            elif others:
                seen = ", ".join(node.name for node in others)
                refusals.append(Refusal(first.name, f"its table {name} is read by {heads[0].name}, but also by {seen}"))
            elif budget.take():
                changes.append(_untie(gm, reads, embeddings, heads))
            else:
                refusals.append(budget.refusal(first))
        return PassResult(tuple(changes), tuple(refusals))


def retie(gm: GraphModule) -> None:
    """Make parameters over the same memory one parameter again, under all their names.

    Two parameters are tied when their storage, place in it, shape, strides and dtype are the same; the first in the
    order of ``named_parameters`` stays. Call it before the graph is moved or cast, which gives each its own memory.

    Args:
        gm: a graph module whose heads were untied; changed in place, its numbers are not.
    """
    kept: dict[object, nn.Parameter] = {}
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = kept.setdefault(memory_of(parameter), parameter)


def _reads_of_tables(gm: GraphModule) -> list[list[Node]]:
    """For each parameter that an embedding looks rows up in: its ``get_attr`` nodes, in graph order."""
    reads: dict[int, list[Node]] = {}
    tables: set[int] = set()
    for node in gm.graph.find_nodes(op="get_attr"):
        tensor = resolve_attr(gm, str(node.target))
        if isinstance(tensor, nn.Parameter):
            reads.setdefault(id(tensor), []).append(node)
            if any(_is_lookup(user, node) for user in node.users):
                tables.add(id(tensor))
    return [nodes for key, nodes in reads.items() if key in tables]


def _is_lookup(user: Node, table: Node) -> bool:
    return user.target is aten.embedding.default and user.args[0] is table


def _readers(reads: list[Node]) -> tuple[list[Node], list[Node], list[Node]]:
    """What reads a tensor, in graph order: linear layers, embeddings, anything else."""
    heads: set[Node] = set()
    embeddings: set[Node] = set()
    others: set[Node] = set()
    for read in reads:
        for user in read.users:
            through = list(user.users) if is_transpose(user) else [user]
            source = user if is_transpose(user) else read
            for reader in through:
                if _is_lookup(reader, source):
                    (embeddings if source is read else others).add(reader)
                elif [place for place, argument in enumerate(reader.args) if argument is source] == [
                    _HEADS.get(reader.target)
                ]:
                    heads.add(reader)
                else:
                    others.add(reader)
    return sorted(heads), sorted(embeddings), sorted(others)


def _untie(gm: GraphModule, reads: list[Node], embeddings: list[Node], heads: list[Node]) -> str:
    """Give each side its name and its parameter; the line that says what was done."""
    table = attr_tensor(gm, reads[0])
    names = names_of_tensor(gm, table)
    head = _head_name(gm, names, heads[0])
    left = tuple(name for name in names if name != head)
    for embedding in embeddings:
        read = embedding.args[0]
        name = _name_in(left, module_of(embedding)) or left[0]
        if isinstance(read, Node) and read.target != name:
            embedding.replace_input_with(read, parameter_node(gm, name, reads[0]))
    (replace_parameter if head in names else set_parameter)(gm, head, table, table.requires_grad)
    for read in reads:
        if read.target != head:
            own = parameter_node(gm, head, read)
            read.replace_all_uses_with(own, delete_user_cb=lambda user: user not in embeddings)
    return f"{head} untied from {left[0]}"


def _name_in(names: tuple[str, ...], module: str) -> str | None:
    """The name that a module itself has for a tensor."""
    return next((name for name in names if name.rpartition(".")[0] == module), None)


def _head_name(gm: GraphModule, names: tuple[str, ...], head: Node) -> str:
    """The name of a head's own parameter, which leaves the table at least one of its names."""
    module = module_of(head)
    own = _name_in(names, module)
    if own is not None and len(names) > 1:
        return own
    # A call from around the table (linear(x, self.wte.weight)) has no module of its own to name it by.
    if module and not any(name.startswith(f"{module}.") for name in names):
        return free_name(gm, f"{module}.weight")
    path, _, leaf = names[0].rpartition(".")
    return free_name(gm, f"{path}_head.weight" if path and leaf == "weight" else f"{names[0]}_head")
