"""A captured program as an ``nn.Module`` that is called like the user's model: what a metric is given to score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from lowrank_fx._ambient import seeded
from lowrank_fx.capture import device_of
from lowrank_fx.program import Program
from lowrank_fx.targets import Metric


class ScoredModule(nn.Module):
    """A program behind the user's own way of calling it, eager.

    Args:
        program: owns its tensors: a metric may cast, move or train what it is given.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        # The program's own objects under the same names, so that what moves this module moves the program.
        self._parameters = program.module._parameters
        self._buffers = program.module._buffers
        self._non_persistent_buffers_set = program.module._non_persistent_buffers_set
        self._modules = program.module._modules
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program.

        Raises:
            CallError: the call passes other arguments, constants or static sizes than were captured.
        """
        args, kwargs = self.program.bind(args, kwargs)
        return self.program.module(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the training flag; what a captured graph computes stays that of eval mode, a module tree obeys."""
        self.program.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        before = device_of(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = device_of(self)
        if before != after:
            self.program.moved(before, after)
        return self


def score(target: Metric, program: Program, plan: str) -> float:
    """The metric of a program; every program meets the same random numbers.

    Args:
        target: the metric.
        program: owns its tensors.
        plan: what the program is, in words, for messages.

    Raises:
        TargetError: the metric raised an error, or returned something other than a finite number.
    """
    with seeded(program.device), torch.no_grad():
        return target.score(ScoredModule(program), plan)
