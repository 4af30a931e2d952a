"""The graphs of a family as it sees them, and how they are timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from lowrank_fx.backend.planning import rewritten
from lowrank_fx.backend.recording import Recording
from lowrank_fx.backend.regions import RegionGraph
from lowrank_fx.corrections import Made


class Member(Protocol):
    """A graph with one model's parameters, as its family knows it."""

    number: int
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    recording: Recording | None

    @property
    def graph(self) -> RegionGraph:
        """The graph, clean."""

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of its sites, once a call was calibrated."""

    @property
    def writes(self) -> bool:
        """Whether a call writes to its inputs."""

    @property
    def waits(self) -> bool:
        """Whether it is still to be told what to run."""

    def calibrate(self) -> None:
        """Calibrate from now on."""

    def leave(self) -> None:
        """The model has other tensors by now: be forgotten."""

    def run_dense(self) -> None:
        """Run the dense graph from now on."""

    def run_factored(self, module: GraphModule | None) -> None:
        """Run a rewritten graph from now on; the dense one if there is none."""

    def compiled(self, module: GraphModule) -> Callable[..., Any]:
        """A rewritten graph, compiled."""

    def dense_on(self, inputs: Sequence[Any]) -> Any:
        """What the dense graph returns for inputs."""


class Rivals:
    """The graphs of a family to be timed, each on the first call that was calibrated.

    Args:
        members: the graphs.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        # Errors are measured on the inputs that were kept; what is timed may write to its own.
        self._calls = [
            (member, member.recording.effect_calls[0][1].map(torch.clone).args)
            for member in members
            if member.recording is not None and member.recording.effect_calls
        ]

    def dense(self) -> object:
        """Run the dense graphs."""
        return [member.dense_on(_given(member, inputs)) for member, inputs in self._calls]

    def factored(self, made: Made) -> Callable[[], object]:
        """What runs the graphs with factors in them.

        Args:
            made: the factors.
        """
        modules = [rewritten(member.graph, made) for member, _ in self._calls]
        runs = [
            None if module is None else member.compiled(module)
            for (member, _), module in zip(self._calls, modules, strict=True)
        ]

        def run() -> object:
            return [
                member.dense_on(_given(member, inputs)) if own is None else own(*_given(member, inputs))
                for (member, inputs), own in zip(self._calls, runs, strict=True)
            ]

        return run


def _given(member: Member, inputs: Sequence[Any]) -> Sequence[Any]:
    """Inputs for one run; thousands of runs that double what they are given would end in infinities."""
    return pytree.tree_map_only(Tensor, torch.clone, inputs) if member.writes else inputs
