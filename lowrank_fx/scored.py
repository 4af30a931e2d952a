"""The metric of a captured program."""

from __future__ import annotations

import torch

from lowrank_fx._ambient import seeded
from lowrank_fx.program import Program
from lowrank_fx.program_module import ProgramModule
from lowrank_fx.targets import Metric


def score(target: Metric, program: Program, plan: str, *, original: bool = False) -> float:
    """The metric of a program; every program meets the same random numbers.

    Args:
        target: the metric.
        program: owns its tensors: a metric may cast, move or train what it is given.
        plan: what the program is, in words, for messages.
        original: it is the original, whose metric has to be finite; of a plan one that is not is infinitely bad.

    Raises:
        TargetError: the metric raised an error, or returned something other than a number; see :meth:`Metric.score`.
    """
    with seeded(program.device), torch.no_grad():
        return target.score(ProgramModule(program), plan, original=original)
