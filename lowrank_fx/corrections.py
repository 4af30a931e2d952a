"""Corrections: what a plan's factors become once the layers before them are factored too.

A site's factors are made for the original's activations. Each correction here walks the graph with the plan's factors
in place and fits what it can; held-out rows decide which of them, if any, comes back. To add one, write a function of
the type :data:`Correction` and list it in ``CORRECTIONS`` and in the efforts (``effort.py``) that try it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor, nn

from lowrank_fx._ambient import seeded
from lowrank_fx.cache import CachedBatch
from lowrank_fx.calibration import Calibration
from lowrank_fx.closed_loop import Remake, closed_loop
from lowrank_fx.effects import held_out_error, joint_error
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.norms import reestimate
from lowrank_fx.program import Program
from lowrank_fx.refit import refit
from lowrank_fx.sites import Site, SiteTable

Chosen: TypeAlias = dict[str, tuple[Site, Factors]]
"""Sites with their factors, by site name."""


@dataclass(frozen=True)
class Made:
    """What a plan puts into a program.

    Attributes:
        factored: every factored site with its factors.
        buffers: new values of buffers, by fully qualified name.
    """

    factored: Chosen
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

    def into(self, program: Program, *, clone: bool) -> Program:
        """The factored program; see :meth:`Program.factorize`."""
        made = program.factorize(self.factored, clone=clone)
        set_buffers(made.module, self.buffers)
        return made

    def error(self, program: Program, batches: Sequence[CachedBatch]) -> float:
        """The relative error of the program's outputs with all of it in place."""
        if not self.buffers:
            return joint_error(program, self.factored, batches)
        return held_out_error(self.into(program, clone=False), batches)


def set_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a rewritten module other buffers, by fully qualified name; those of the captured model stay."""
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = value.clone()


@dataclass(frozen=True)
class Settled:
    """What a pick becomes.

    Attributes:
        made: its factors.
        error: on the select half.
        how: what gave them; empty for factors as candidates are compared.
        tried: the error of everything that was tried.
    """

    made: Made
    error: float
    how: str = ""
    tried: tuple[tuple[str, float], ...] = ()


Correction: TypeAlias = Callable[[GraphProgram, SiteTable, Calibration, Chosen, Remake, bool], Chosen]
"""Corrects the factors of a plan; ``Remake`` makes factors of the planned form and rank for another weight, the last
argument shows a progress bar."""


def _refitted(
    program: GraphProgram,
    table: SiteTable,
    calibration: Calibration,
    factored: Chosen,
    remake: Remake,
    progress: bool,
) -> Chosen:
    return refit(program.module, factored, calibration.effect_batches)


def _closed_loop(
    program: GraphProgram,
    table: SiteTable,
    calibration: Calibration,
    factored: Chosen,
    remake: Remake,
    progress: bool,
) -> Chosen:
    calls, seed = calibration.input_batches, calibration.seed
    return closed_loop(program.module, table, factored, remake, calls, seed, progress)


CORRECTIONS: dict[str, Correction] = {"refitted": _refitted, "closed loop": _closed_loop}


def with_norms(program: GraphProgram, calibration: Calibration, made: Made) -> Made:
    """The same factors with the statistics of batch norms that are left in the graph estimated again."""
    with seeded(program.device):
        return Made(made.factored, reestimate(program.module, made.factored, calibration.input_batches))
