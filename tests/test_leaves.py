"""Leaves come out of anything, also out of what its own flattener refuses."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from lowrank_fx._leaves import tree_leaves
from lowrank_fx.compare import floating_outputs
from lowrank_fx.program import flat


class Stubborn:
    """A registered class that cannot always be taken apart."""

    def __init__(self, tensor: torch.Tensor, *, opens: bool) -> None:
        self.tensor = tensor
        self.opens = opens


def take_apart(value: Stubborn) -> tuple[list[torch.Tensor], None]:
    if not value.opens:
        raise RuntimeError("only caches of another kind")
    return [value.tensor], None


pytree.register_pytree_node(Stubborn, take_apart, lambda children, context: Stubborn(next(iter(children)), opens=True))


def test_what_cannot_be_taken_apart_is_a_leaf() -> None:
    shut, opened = Stubborn(torch.ones(1), opens=False), Stubborn(torch.ones(2), opens=True)
    output = {"logits": torch.ones(3), "cache": [shut, opened]}
    leaves = tree_leaves(output)
    assert leaves[1] is shut
    assert [leaf.shape[0] for leaf in leaves if isinstance(leaf, torch.Tensor)] == [3, 2]
    assert flat(output)[1] is shut
    assert [tensor.shape[0] for tensor in floating_outputs(output)] == [3, 2]
