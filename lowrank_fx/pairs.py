"""Factored pairs that others made become dense operators: models that come with low-rank layers or with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from lowrank_fx._ambient import settled
from lowrank_fx.batches import bind_batch
from lowrank_fx.capture import capture, device_of, unwrap
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.passes.fold_constants import FoldConstants
from lowrank_fx.program_module import ProgramModule
from lowrank_fx.rewrite import copy_graph_module


class FoldedModule(ProgramModule):
    """A captured model whose factored pairs are dense operators: same inputs, outputs and output classes.

    Its weights are its own. It was captured in eval mode: ``train()`` sets the flag, but dropout stays off.

    Attributes:
        changes: what was folded, a line each.
        left_alone: what looked like a pair and is not folded, a line with the reason each.
    """

    def __init__(self, program: GraphProgram, changes: tuple[str, ...], left_alone: tuple[str, ...]) -> None:
        super().__init__(program)
        self.changes = changes
        self.left_alone = left_alone


def fold_pairs(
    model: nn.Module, example_batch: Any, *, forward_args: Callable[[Any], Any] | None = None
) -> FoldedModule:
    """Multiply the factored pairs of a model out: one dense operator for each, of the same numbers.

    Recognised are two linear layers with nothing between them; two convolutions whose kernels do not span the same
    dimension (k x k, then 1 x 1; 1 x 1, then k x k; k x 1, then 1 x k), or three (Tucker-2); and adapters beside a
    layer, as peft's LoRA. A pair is folded where its middle is below break-even, so that the product is larger, and
    nothing else reads the value in between.

    Args:
        model: any module; left as it is. What ``optimize`` returned has a ``fold`` of its own, which needs no example.
        example_batch: one batch, as a loader of :func:`optimize` yields them.
        forward_args: a function from a batch to the arguments of ``forward``; see :func:`optimize`.

    Returns:
        The model with dense operators. It says what was folded (``changes``) and what was not and why
        (``left_alone``).

    Raises:
        CaptureError: the model cannot be captured as a graph; the message names the line.
        CalibrationError: the batch does not fit ``forward``.
    """
    inner = unwrap(model)
    with settled(device_of(inner)):
        call = bind_batch(example_batch, inspect.signature(inner.forward), forward_args).to(device_of(inner))
        captured = capture(inner, call)
        gm = captured.graph_module
        results = PassManager(order.pair_folding()).run(gm)
        done = [result for name, result in results if name != FoldConstants.name]
        changes = tuple(change for result in done for change in result.changes)
        left = tuple(f"{refusal.node}: {refusal.reason}" for result in done for refusal in result.refusals)
        program = GraphProgram(copy_graph_module(gm, clone=True), captured.calls, changes, captured.notes)
    return FoldedModule(program, changes, left)
