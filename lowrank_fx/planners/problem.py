"""The planning problem: for every site the options with what each costs and does. Numbers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lowrank_fx.allocate import Choice, allocate
from lowrank_fx.errors import TargetError
from lowrank_fx.forms import DENSE
from lowrank_fx.targets import CostKind


@dataclass(frozen=True)
class Option:
    """One way to leave a site.

    Attributes:
        form: a form's name, or ``"dense"``.
        rank: the rank, None where dense.
        params: weights.
        flops: FLOPs at the shape of the first calibration batch.
        error: relative error of the site's output, 0 where dense.
        effect: relative error of the model's output, 0 where dense.
        nanoseconds: measured time at that shape; 0 where no target asked for it.
    """

    form: str
    rank: int | None
    params: int
    flops: int
    error: float
    effect: float
    nanoseconds: int = 0

    def cost(self, quantity: CostKind) -> int:
        """What the option costs in ``quantity``."""
        return {"params": self.params, "flops": self.flops, "latency": self.nanoseconds}[quantity]


Pick: TypeAlias = tuple[int, ...]
"""One option's index per site, in the order of the problem."""


@dataclass(frozen=True)
class Problem:
    """Every site's options; the first of each is dense."""

    options: Mapping[str, tuple[Option, ...]]

    def __post_init__(self) -> None:
        for name, options in self.options.items():
            assert options[0].form == DENSE, name

    @property
    def dense(self) -> Pick:
        """The pick that factors nothing."""
        return (0,) * len(self.options)

    def chosen(self, pick: Pick) -> dict[str, Option]:
        """The options of a pick, by site name."""
        return {name: options[index] for (name, options), index in zip(self.options.items(), pick, strict=True)}

    def indices(self, pick: Pick) -> dict[str, int]:
        """The chosen option's place, by site name."""
        return dict(zip(self.options, pick, strict=True))

    def factored(self, pick: Pick) -> dict[str, tuple[str, int]]:
        """Form and rank of each site that a pick factors."""
        chosen = self.chosen(pick)
        return {name: (option.form, option.rank) for name, option in chosen.items() if option.rank is not None}

    def cost(self, pick: Pick, quantity: CostKind) -> int:
        """Total cost of a pick."""
        return sum(option.cost(quantity) for option in self.chosen(pick).values())

    def smallest(self, quantity: CostKind) -> int:
        """The least total cost of any pick."""
        return sum(min(option.cost(quantity) for option in options) for options in self.options.values())

    def effect(self, pick: Pick) -> float:
        """Joint effect predicted for a pick: the sites' effects added in squares."""
        return float(sum(option.effect**2 for option in self.chosen(pick).values()) ** 0.5)


Allocator: TypeAlias = Callable[[Problem, CostKind, int], Pick]
"""Spends a budget of sites' costs: the pick of one candidate allocation. Raises TargetError if nothing fits."""


def spend(problem: Problem, quantity: CostKind, budget: int, harm: Callable[[Option], float]) -> Pick:
    """The pick of least total ``harm`` within ``budget``.

    Raises:
        TargetError: nothing fits the budget.
    """
    check_budget(problem, quantity, budget)
    groups = [[Choice(option.cost(quantity), harm(option)) for option in group] for group in problem.options.values()]
    return filled(problem, quantity, budget, allocate(groups, budget).chosen)


def filled(problem: Problem, quantity: CostKind, budget: int, pick: Pick) -> Pick:
    """A pick that spends what is left of ``budget`` on lower site errors, where effects are no worse for it.

    Calibration may see no effect at all of a range of ranks (few rows, a flat curve); the budget allows more, so more
    is kept.
    """
    groups = list(problem.options.values())
    places = list(pick)
    left = budget - problem.cost(pick, quantity)
    while True:
        best: tuple[float, int, int] | None = None
        for site, group in enumerate(groups):
            now = group[places[site]]
            for index, option in enumerate(group):
                step = option.cost(quantity) - now.cost(quantity)
                if 0 < step <= left and option.error < now.error and option.effect <= now.effect:
                    gain = (now.error**2 - option.error**2) / step
                    if best is None or gain > best[0]:
                        best = (gain, site, index)
        if best is None:
            return tuple(places)
        _, site, index = best
        left -= groups[site][index].cost(quantity) - groups[site][places[site]].cost(quantity)
        places[site] = index


def check_budget(problem: Problem, quantity: CostKind, budget: int) -> None:
    """Raise :class:`TargetError` if no pick fits ``budget``."""
    smallest = problem.smallest(quantity)
    if smallest > budget:
        raise TargetError(f"a budget of {budget} {quantity} is below the smallest reachable, {smallest}")
