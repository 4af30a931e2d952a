"""A captured model, whichever way it was captured: what the stages behind capture need of it.

There are three kinds: a graph (``graph_program.py``); for models that ``torch.export`` refuses, the model's own module
tree (``tree_program.py``); and an ONNX model that onnxruntime runs (``onnx_frontend/program.py``). The first two share
parameters with the user's model. All know their sites, can be observed, can be run with some of their layers exchanged,
and can be rewritten. A rewritten program is a program again.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lowrank_fx._leaves import tree_leaves
from lowrank_fx.batches import Call
from lowrank_fx.capture import device_of
from lowrank_fx.forms import Factors
from lowrank_fx.sites import Site, SiteTable

Way: TypeAlias = Literal["export", "modules", "onnx"]

Factored: TypeAlias = Mapping[str, tuple[Site, Factors]]
"""Sites with their factors, by site name."""

Outputs: TypeAlias = tuple[Any, ...]
"""A model's outputs as flat leaves."""

Trials: TypeAlias = Iterator[tuple[Site, Callable[[Factors | None], Outputs]]]
"""Sites, each with a way to run the model with that site changed."""


class Program(ABC):
    """A captured model.

    Attributes:
        way: how it was captured.
        module: what runs; its parameters carry the names of the user's model, and are the same objects until the
            program is rewritten with ``clone=True``.
        cleanup: what was folded before sites were found, a line each.
        notes: what the user should know.
    """

    way: ClassVar[Way]
    module: nn.Module
    cleanup: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return device_of(self.module)

    @abstractmethod
    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A user's call in the form that ``module`` takes.

        Raises:
            CallError: it does not fit.
        """

    @abstractmethod
    def run(self, call: Call) -> Outputs:
        """Run the program; ``call`` stays as it is, even if the model writes to its inputs."""

    @abstractmethod
    def returned(self, call: Call) -> Any:
        """What the model itself returns, in its own classes; :meth:`run` gives the leaves of that."""

    @abstractmethod
    def find_sites(self, skip: Sequence[str] = ()) -> SiteTable:
        """Every site and tap, and the weights that are left alone.

        Args:
            skip: patterns of fully qualified names.

        Raises:
            OptionError: a pattern matches no weight.
        """

    @abstractmethod
    def weight(self, site: Site) -> Tensor:
        """The weight of a site, as stored."""

    @abstractmethod
    def params(self) -> int:
        """How many numbers the parameters hold that the program reads; a tied one counts once."""

    @abstractmethod
    def observed(self, table: SiteTable, observers: Mapping[str, nn.Module]) -> Callable[[Call], Outputs]:
        """A way to run the program in which every tap's activation also goes through its observer."""

    @abstractmethod
    def count_flops(self, call: Call) -> int:
        """FLOPs of one run (2 x MACs, attention included), by torch's flop counter."""

    @abstractmethod
    def trials(self, call: Call, sites: Sequence[Site], base: Factored | None = None) -> Trials:
        """For each site that ``call`` reaches: a function that gives the outputs with that site alone changed.

        The function takes the site's factors, or None for its dense weight. It holds until the next one is asked for.
        Sites come in the order in which they run, where that is known.

        Args:
            call: the inputs.
            sites: those to be tried.
            base: what is factored besides, and what the site itself is where it is not tried; None for nothing.
        """

    @abstractmethod
    def exchanged(self, factored: Factored) -> Callable[[Call], Outputs]:
        """A way to run the program with every given site factored at once; the program itself stays as it is."""

    @abstractmethod
    def probed(self, nodes: Sequence[str]) -> Callable[[Call], tuple[Outputs, dict[str, Tensor]]]:
        """A way to run the program that also gives the values of some of its calls.

        Args:
            nodes: names of :attr:`SiteCall.node`; a factored program keeps them, so it can be compared with the
                original.

        Returns:
            A function that gives the outputs and, by name, the value of each call that was reached (of a module that
            is called several times, that of the last call). It keeps gradients unless the caller turns them off.
        """

    @abstractmethod
    def factorize(self, factored: Factored, *, clone: bool) -> Program:
        """The program with the given sites factored.

        Args:
            factored: a site and its factors, by site name.
            clone: whether tensors that are not factored are cloned, so that nothing is shared with the user's model.
        """

    @abstractmethod
    def unfoldable(self, sites: Mapping[str, Site]) -> dict[str, str]:
        """Of a factored program, the sites whose pairs cannot be multiplied out, with the reasons."""

    @abstractmethod
    def fold(self, sites: Mapping[str, Site]) -> Program:
        """A factored program with one dense operator for each given site again; shares no tensor with this one."""

    @abstractmethod
    def copy(self) -> Program:
        """The same program with tensors of its own."""

    @abstractmethod
    def train(self, mode: bool) -> None:
        """Set the training flag of every module."""

    @abstractmethod
    def moved(self, before: torch.device, after: torch.device) -> None:
        """Follow the parameters, which went from one device to another."""


def flat(output: Any) -> Outputs:
    """The leaves of a model's output, dataclasses opened field by field."""
    leaves: list[Any] = []
    for leaf in tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for entry in dataclasses.fields(leaf):
                leaves += flat(getattr(leaf, entry.name, None))
        else:
            leaves.append(leaf)
    return tuple(leaves)
