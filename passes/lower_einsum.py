"""CLEAN-UP: a contraction with a weight is a linear layer, or one per group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowrank_fx.passes.base import Pass, PassResult, Refusal, RewriteBudget
from lowrank_fx.passes.constants import written_nodes
from lowrank_fx.passes.contraction import Labels, NotLinearError, Product, read_product
from lowrank_fx.passes.edit import call_node, parameter_node, replace_parameter, users_by_tensor
from lowrank_fx.passes.verify import attr_tensor

aten = torch.ops.aten


class LowerEinsum(Pass):
    """Replace an ``einsum`` of an activation and a parameter by a product with a matrix.

    Before::

        %einsum   = einsum('bnd,de->bne', [%x, %w])         # w [d, e]
        %einsum_1 = einsum('bnd,hdk->bnhk', [%x, %wq])      # wq [h, d, k]
        %einsum_2 = einsum('bnhd,hdk->bnhk', [%y, %we])     # we [h, d, k], a matrix per head

    After::

        %matmul    = matmul(%x, %w)                         # linear(%x, %w) where w is stored [e, d]
        %linear    = linear(%x, %wq)                        # wq [h*k, d], new under its old name
        %unflatten = unflatten(%linear, 2, [h, k])
        %permute   = permute(%y, [2, 0, 1, 3])
        %flatten   = flatten(%permute, 1, 2)                # [h, b*n, d]
        %matmul_1  = matmul(%flatten, %we)
        ...                                                 # unflatten and permute back to [b, n, h, k]

    Formula: ``out[g.., r.., o..] = sum over c.. of x[g.., r.., c..] w[g.., c.., o..]``. A label of the weight and the
    output is a feature ``o``, one of both operands alone is contracted (``c``), one of the activation and the output
    counts rows ``r``, one of all three counts groups ``g``. Without groups that is a linear layer; with groups it is a
    batched product with a weight ``[g, in, out]``.

    Where the weight is that matrix as it stands, it stays the very parameter, and its ties hold. Otherwise its values
    are permuted and reshaped once, into a new parameter under its name; every einsum that applies the weight in the
    same way reads that one. Sizes that are symbols stay symbols.

    Left alone with its reason: one operand or more than two; a parameter or buffer in place of the activation; a label
    twice in one operand (a diagonal); a label summed away in one operand alone; a product that sums over nothing or has
    no feature of its own; a size of 1 that is spread over a label; a weight that needs a new matrix and is read in
    another way too (its numbers would be stored twice); a weight that the graph writes to. An einsum of activations
    alone is not looked at.
    """

    name = "lower-einsum"

    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Lower every einsum that applies a weight, weight by weight."""
        changes: list[str] = []
        refusals: list[Refusal] = []
        order = {node.name: position for position, node in enumerate(gm.graph.nodes)}
        groups: dict[object, list[Product]] = {}
        written = written_nodes(gm)
        for node in gm.graph.find_nodes(op="call_function", target=aten.einsum.default):
            try:
                product = read_product(gm, node)
                if product is not None and product.weight in written:
                    raise NotLinearError(f"the graph writes to {product.weight.target}")
            except NotLinearError as error:
                refusals.append(Refusal(node.name, str(error)))
                continue
            if product is not None:
                key = (id(attr_tensor(gm, product.weight)), product.order, product.shape)
                groups.setdefault(key, []).append(product)
        users = users_by_tensor(gm)
        for group in groups.values():
            first = group[0]
            ours = {product.node for product in group}
            others = [user.name for user in users[id(attr_tensor(gm, first.weight))] if user not in ours]
            if others and not first.as_it_stands:
                reason = f"{first.weight.target} is also read by {', '.join(others)}, and its matrix would be a copy"
                refusals += [Refusal(product.node.name, reason) for product in group]
            elif budget.take():
                changes.append(_lower(gm, group))
            else:
                refusals += [budget.refusal(product.node) for product in group]
        return PassResult(tuple(changes), tuple(sorted(refusals, key=lambda refusal: order[refusal.node])))


def _lower(gm: GraphModule, group: list[Product]) -> str:
    """Rewrite every einsum that applies one weight in one way; the line that says what was done."""
    first = group[0]
    target = str(first.weight.target)
    old = attr_tensor(gm, first.weight)
    shapes = f"[{', '.join(map(str, first.shape))}]"
    if first.as_it_stands:
        said = shapes
    else:
        said = f"{shapes} (was [{', '.join(map(str, old.shape))}])"
        matrix = old.detach().permute(first.order).reshape(first.shape).contiguous()
        replace_parameter(gm, target, matrix, old.requires_grad)
    for product in group:
        _rewrite(gm, product, target)
    names = ", ".join(product.node.name for product in group)
    return f"{target} {said} applied by a matrix product in place of {names}"


def _rewrite(gm: GraphModule, product: Product, target: str) -> None:
    node = product.node

    def call(op: OpOverload, *args: object) -> Node:
        return call_node(gm, op, args, like=node, before=node)

    def sizes(labels: Labels) -> list[int | Node]:
        """The sizes of rows, groups or features; a symbol is read off the activation when the graph runs."""
        known: dict[str, int | torch.SymInt] = dict(zip(product.x, _value(product.activation).shape, strict=True))
        known |= zip(product.w, product.sizes, strict=True)
        return [
            size
            if isinstance(size := known[label], int)
            else call(aten.sym_size.int, product.activation, product.x.index(label))
            for label in labels
        ]

    # Each part becomes one dimension: a grouped product needs exactly [groups, rows, in], a linear layer any rows.
    parts = [product.groups, product.rows] if product.groups else [(label,) for label in product.rows]
    activation = product.activation
    wanted = product.groups + product.rows + product.contracted
    if wanted != product.x:
        activation = call(aten.permute.default, activation, [product.x.index(label) for label in wanted])
    inner = [*parts, product.contracted]
    for place in range(len(inner) - 1, -1, -1):
        at = sum(map(len, inner[:place]))
        if not inner[place]:
            activation = call(aten.unsqueeze.default, activation, at)
        elif len(inner[place]) > 1:
            activation = call(aten.flatten.using_ints, activation, at, at + len(inner[place]) - 1)

    op = aten.matmul.default if product.stored_in_out else aten.linear.default
    weight = product.weight if product.weight.target == target else parameter_node(gm, target, node)
    result = call(op, activation, weight)

    outer = [*parts, product.features]
    for place in range(len(outer) - 1, -1, -1):
        if not outer[place]:
            result = call(aten.squeeze.dim, result, place)
        elif len(outer[place]) > 1:
            result = call(aten.unflatten.int, result, place, sizes(outer[place]))
    have = tuple(label for part in outer for label in part)
    if have != product.out:
        result = call(aten.permute.default, result, [have.index(label) for label in product.out])
    if str(_value(result).stride()) != str(_value(node).stride()):
        _loosen_views(node)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _value(node: Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _loosen_views(node: Node) -> None:
    """Make views of a value that is about to lie differently in memory fall back on a copy."""
    stack = [node]
    while stack:
        for user in stack.pop().users:
            returns = user.target._schema.returns if isinstance(user.target, OpOverload) else []
            if any(result.alias_info is not None for result in returns):
                stack.append(user)
                if user.target is aten.view.default:
                    user.target = aten.reshape.default
