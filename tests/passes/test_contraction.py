"""What the equation of an einsum with a weight says: its groups, rows and features, or why it is no layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.passes.contraction import NotLinearError, Product, read_product


class Apply(nn.Module):
    """A few tensors, put together by ``way``."""

    mask: Tensor

    def __init__(self, way: Callable[[Apply, Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.a = nn.Parameter(torch.zeros(4, 4))
        self.heads = nn.Parameter(torch.zeros(2, 4, 3))
        self.deep = nn.Parameter(torch.zeros(2, 3, 4, 5))
        self.row = nn.Parameter(torch.zeros(1, 4))
        self.vector = nn.Parameter(torch.zeros(4))
        self.register_buffer("mask", torch.zeros(4, 4))
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def read(way: Callable[[Apply, Tensor], Any], *shape: int) -> list[Product | str | None]:
    """What each einsum of ``way`` is read as, or the reason why it is no layer."""
    gm = torch.export.export(Apply(way), (torch.zeros(shape),), strict=False).module(check_guards=False)
    assert isinstance(gm, GraphModule)
    found: list[Product | str | None] = []
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default):
        try:
            found.append(read_product(gm, node))
        except NotLinearError as reason:
            found.append(str(reason))
    return found


# Equation, attribute, shape of the activation; then groups, rows, contracted labels, features, and the weight's order.
READINGS: list[tuple[str, str, tuple[int, ...], tuple[str, str, str, str], tuple[int, ...]]] = [
    ("bnd,de->bne", "a", (2, 3, 4), ("", "bn", "d", "e"), (0, 1)),
    ("bnd,ed->ebn", "a", (2, 3, 4), ("", "bn", "d", "e"), (0, 1)),
    (" d e , n b d", "a", (2, 3, 4), ("", "bn", "d", "e"), (0, 1)),
    ("bnd,hdk->bkhn", "heads", (2, 3, 4), ("", "bn", "d", "kh"), (2, 0, 1)),
    ("bhnd,hdk->bhnk", "heads", (2, 2, 3, 4), ("h", "bn", "d", "k"), (0, 1, 2)),
    ("bkgd,hgkd->bdh", "deep", (2, 4, 3, 5), ("d", "b", "kg", "h"), (3, 2, 1, 0)),
]


@pytest.mark.parametrize(("equation", "name", "shape", "labels", "order"), READINGS)
def test_readings(
    equation: str, name: str, shape: tuple[int, ...], labels: tuple[str, str, str, str], order: tuple[int, ...]
) -> None:
    def way(m: Apply, x: Tensor) -> Any:
        operands = (x, m.get_parameter(name))
        return torch.einsum(equation, *(operands[::-1] if equation.startswith(" d e") else operands))

    (product,) = read(way, *shape)
    assert isinstance(product, Product)
    parts = (product.groups, product.rows, product.contracted, product.features)
    assert tuple("".join(part) for part in parts) == labels
    assert product.order == order


def test_the_dimensions_of_an_ellipsis_are_counted_from_its_right() -> None:
    (product,) = read(lambda m, x: torch.einsum("...d,...dk->...k", x, m.heads), 5, 2, 4)
    assert isinstance(product, Product)
    assert (product.x, product.w, product.out) == (("...2", "...1", "d"), ("...1", "d", "k"), ("...2", "...1", "k"))
    assert (product.groups, product.rows, product.shape) == (("...1",), ("...2",), (2, 4, 3))


def test_an_ellipsis_that_the_output_leaves_out_is_summed() -> None:
    assert read(lambda m, x: torch.einsum("...d,de->e", x, m.a), 2, 3, 4) == [
        "the label '...2' of its activation is summed away by itself"
    ]


def three_operands(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,de,ef->bnf", x, m.a, m.fc.weight)


def one_operand(m: Apply, x: Tensor) -> Any:
    return x + torch.einsum("de->ed", m.a)[0]


def diagonal(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,ddk->bnk", x, x.new_ones(4, 4, 4)) + torch.einsum("bnd,dd->bnd", x, m.a)


def summed_alone(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,de->be", x, m.a)


def weight_summed_alone(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,hdk->bnk", x, m.heads)


def both_parameters(m: Apply, x: Tensor) -> Any:
    return torch.einsum("de,hek->hdk", m.a, m.heads)[0, :, :1].t() + x


def with_a_buffer(m: Apply, x: Tensor) -> Any:
    return torch.einsum("de,ef->df", m.mask, m.a) + x[:, :1]


def by_element(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,d->bnd", x, m.vector)


def outer(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bn,d->bnd", x.mean(-1), m.vector)


def no_feature(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,d->bn", x, m.vector)


def spread(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,ed->bne", x.mean(-1, keepdim=True), m.a)


def spread_weight(m: Apply, x: Tensor) -> Any:
    return torch.einsum("bnd,nd->bn", x[:, :1], m.row), torch.einsum("bnd,dk->bnk", x, m.row)


REASONS: dict[Callable[[Apply, Tensor], Any], list[str | None]] = {
    three_operands: ["it has 3 operands; a linear layer has 2"],
    one_operand: ["it has 1 operand; a linear layer has 2"],
    diagonal: [None, "a label stands twice in its weight (a diagonal)"],
    summed_alone: ["the label 'n' of its activation is summed away by itself"],
    weight_summed_alone: ["the label 'h' of its weight is summed away by itself"],
    both_parameters: ["both its operands are parameters or buffers"],
    with_a_buffer: ["both its operands are parameters or buffers"],
    by_element: ["it sums over no label of its weight"],
    outer: ["it sums over no label of its weight"],
    no_feature: ["its weight brings no label of its own to the output"],
    spread: ["its label 'd' is 1 long in the activation and 4 in the weight"],
    spread_weight: [
        "its weight brings no label of its own to the output",
        "its label 'd' is 4 long in the activation and 1 in the weight",
    ],
}


@pytest.mark.parametrize("way", REASONS, ids=lambda way: way.__name__)
def test_reasons(way: Callable[[Apply, Tensor], Any]) -> None:
    assert read(way, 3, 2, 4) == REASONS[way]


def test_einsums_of_activations_are_not_looked_at() -> None:
    assert read(lambda m, x: torch.einsum("bnd,bmd->bnm", m.fc(x), x), 3, 2, 4) == [None]
