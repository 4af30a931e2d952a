"""What measures the outputs of a factored model against the original's, where that is not their L2 distance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lowrank_fx._ambient import seeded
from lowrank_fx._leaves import map_leaves, met
from lowrank_fx.batches import Call
from lowrank_fx.program import Outputs, Program


class Judge(ABC):
    """Measures outputs against the original's on one batch.

    Attributes:
        measure: what it measures by.
        what: the batch, in words.
        size: the divergence of outputs of zero, times the rows.
        reference: the original's floating outputs.
    """

    measure: Measure
    what: str
    size: float
    reference: tuple[Tensor, ...]

    @abstractmethod
    def error(self, outputs: Outputs) -> float:
        """The divergence of outputs, times the rows; infinite where they are not finite and the original's are.

        Raises:
            CalibrationError: the loss fails on them; the message names the batch.
        """

    def loss(self, given: Outputs, wanted: Outputs, mask: Tensor | None) -> Tensor | None:
        """The square of the relative error on another batch of the same model, as a scalar to be differentiated.

        Args:
            given: outputs that may require gradients.
            wanted: the original's.
            mask: bool ``[B, T]``, false at padding.

        Returns:
            None where this cannot be measured without more than the outputs.

        Raises:
            CalibrationError: the shapes of the outputs differ.
        """
        return None


class Measure(ABC):
    """What errors are measured by.

    Attributes:
        name: in words.
        needs_batch: whether the loader's batch has to be kept with its arguments.
    """

    name: str
    needs_batch: bool

    @abstractmethod
    def judge(self, program: Program, call: Call, what: str) -> Judge:
        """Run the original on a batch, to measure by.

        Args:
            program: the captured model.
            call: the batch, on the program's device, as the program takes it.
            what: the batch in words, for messages.

        Raises:
            CalibrationError: no error can be measured on it; the message names the batch.
        """


def answer_of(program: Program, call: Call) -> Any:
    """What the original returns for a call, in its own classes and in memory of its own."""
    with torch.no_grad(), seeded(program.device):
        answer = program.returned(call)
    return map_leaves(answer, lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf)


def open_leaves(value: Any) -> list[Any]:
    """The leaves that :func:`~lowrank_fx._leaves.map_leaves` would change, in its order."""
    return met(map_leaves, value)
