"""What an einsum with a weight computes: its equation read as a linear layer, or as one per group."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from lowrank_fx.graph_operators import is_transpose
from lowrank_fx.passes.verify import attr_tensor

Labels = tuple[str, ...]


class NotLinearError(Exception):
    """The reason why an einsum that reads a parameter is no linear layer."""


@dataclass(frozen=True)
class Product:
    """An einsum of an activation and a weight.

    Features, rows and groups are taken in the order of the output. So does einsum, whose result then lies in memory as
    that of the product does, and views of it stay possible.

    Attributes:
        node: the einsum.
        place: which of its two operands is the activation.
        weight: the ``get_attr`` of its other operand, which may read it through a transpose.
        x: the labels of the activation's dimensions.
        w: the labels of the weight's own dimensions.
        sizes: the lengths of the weight's own dimensions.
        out: the labels of the result's dimensions.
    """

    node: Node
    place: int
    weight: Node
    x: Labels
    w: Labels
    sizes: tuple[int, ...]
    out: Labels

    @property
    def activation(self) -> Node:
        """The operand that is computed: read off the node, since it may have been rewritten itself."""
        operands = self.node.args[1]
        assert isinstance(operands, list | tuple)
        activation = operands[self.place]
        assert isinstance(activation, Node)
        return activation

    @property
    def groups(self) -> Labels:
        """Labels of both operands and the output: one product each."""
        return tuple(label for label in self.out if label in self.x and label in self.w)

    @property
    def rows(self) -> Labels:
        """Labels of the activation and the output."""
        return tuple(label for label in self.out if label not in self.w)

    @property
    def features(self) -> Labels:
        """Labels of the weight and the output."""
        return tuple(label for label in self.out if label not in self.x)

    @property
    def contracted(self) -> Labels:
        """Labels of both operands alone, in the order of the activation."""
        return tuple(label for label in self.x if label in self.w and label not in self.out)

    @property
    def stored_in_out(self) -> bool:
        """Whether the matrix is ``[.., in, out]``, as matmul reads it, and not ``[out, in]``, as linear does."""
        return bool(self.groups) or self.w == self.contracted + self.features

    @property
    def matrix(self) -> Labels:
        """The weight's labels in the order that the product needs."""
        return self.groups + (
            self.contracted + self.features if self.stored_in_out else self.features + self.contracted
        )

    @property
    def order(self) -> tuple[int, ...]:
        """The weight's dimensions in the order that the product needs, as permute takes them."""
        return tuple(self.w.index(label) for label in self.matrix)

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight as the product reads it: ``[in, out]``, ``[out, in]`` or ``[groups, in, out]``."""
        sizes = dict(zip(self.w, self.sizes, strict=True))
        inner, outer = (math.prod(sizes[label] for label in labels) for labels in (self.contracted, self.features))
        if self.groups:
            return math.prod(sizes[label] for label in self.groups), inner, outer
        return (inner, outer) if self.stored_in_out else (outer, inner)

    @property
    def as_it_stands(self) -> bool:
        """Whether the weight is the matrix already (a matrix always is: matmul and linear read both layouts)."""
        return self.w == self.matrix and len(self.w) == len(self.shape)

    def check(self) -> None:
        """Hold the labels and sizes to what a linear layer, or one per group, can do.

        Raises:
            NotLinearError: they are something else; the message is the reason.
        """
        for labels, role in ((self.x, "activation"), (self.w, "weight")):
            if len(set(labels)) < len(labels):
                raise NotLinearError(f"a label stands twice in its {role} (a diagonal)")
        for labels, others, role in ((self.x, self.w, "activation"), (self.w, self.x, "weight")):
            alone = [label for label in labels if label not in others and label not in self.out]
            if alone:
                raise NotLinearError(f"the label {alone[0]!r} of its {role} is summed away by itself")
        if not self.contracted:
            raise NotLinearError("it sums over no label of its weight")
        if not self.features:
            raise NotLinearError("its weight brings no label of its own to the output")
        sizes = dict(zip(self.x, self.activation.meta["val"].shape, strict=True))
        for label, size in zip(self.w, self.sizes, strict=True):
            # Where export fixed a size, the meta may still hold its symbol.
            if label in sizes and not statically_known_true(sizes[label] == size):
                raise NotLinearError(
                    f"its label {label!r} is {sizes[label]} long in the activation and {size} in the weight"
                )


def read_product(gm: GraphModule, node: Node) -> Product | None:
    """What an einsum does with a parameter; None if none of its operands is one.

    Raises:
        NotLinearError: it is no linear layer; the message is the reason.
    """
    equation, operands = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(operands, list | tuple)
    nodes = [operand for operand in operands if isinstance(operand, Node)]
    fixed = [_source(operand) for operand in nodes]
    if not any(source is not None and isinstance(attr_tensor(gm, source), nn.Parameter) for source in fixed):
        return None
    if len(nodes) != 2:
        raise NotLinearError(f"it has {len(nodes)} operand{'s' * (len(nodes) != 1)}; a linear layer has 2")
    if None not in fixed:
        raise NotLinearError("both its operands are parameters or buffers")
    terms, out = _parse(equation, [operand.meta["val"].dim() for operand in nodes])
    at = 0 if fixed[0] is not None else 1
    weight = fixed[at]
    assert weight is not None
    w = terms[at] if weight is nodes[at] else terms[at][::-1]
    product = Product(node, 1 - at, weight, terms[1 - at], w, tuple(attr_tensor(gm, weight).shape), out)
    product.check()
    return product


def _source(operand: Node) -> Node | None:
    """The ``get_attr`` that an operand is, or is the transpose of."""
    source = operand.args[0] if is_transpose(operand) else operand
    return source if isinstance(source, Node) and source.op == "get_attr" else None


def _parse(equation: str, ranks: list[int]) -> tuple[list[Labels], Labels]:
    """The labels of every operand and of the output; the dimensions of an ellipsis are counted from its right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spans = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]

    def expand(term: str, span: int) -> Labels:
        before, dots, after = term.partition("...")
        return (*before, *(f"...{place}" for place in range(span if dots else 0, 0, -1)), *after)

    operands = [expand(term, span) for term, span in zip(terms, spans, strict=True)]
    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = "..." + "".join(sorted(letter for letter in letters if letters.count(letter) == 1))
    return operands, expand(right, max(spans))
