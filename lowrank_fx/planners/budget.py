"""The default planner: spend a budget by measured effects, and let held-out data choose among candidates.

For a budget, each allocator proposes a pick; the proposals meet the held-out selection batches and the best one wins
(``uniform`` is always among them, so a proxy that misleads loses its place by itself; ``Session`` adds one that owes
nothing to the race of variants either). For a tolerance, the smallest
budget whose best proposal stays within it is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from lowrank_fx.planners.problem import Allocator, Pick, Problem, spend
from lowrank_fx.targets import CostKind

BISECTIONS = 8


@dataclass(frozen=True)
class Outcome:
    """What a search decided.

    Attributes:
        pick: one option per site.
        candidate: the allocator that proposed it (``"dense"`` if nothing is factored).
        error: its measured error on the selection batches.
        candidates: every allocator's error at the same budget.
        apart: where layers got one first factor, what it was before, in the problem that was searched.
    """

    pick: Pick
    candidate: str
    error: float
    candidates: tuple[tuple[str, float], ...] = ()
    apart: Outcome | None = None

    def against(self, other: Outcome) -> Outcome:
        """The better of two outcomes at one budget, with the candidates of both; this one where they are equal."""
        best = other if other.error < self.error else self
        return replace(best, candidates=self.candidates + other.candidates)


def by_effect(problem: Problem, quantity: CostKind, budget: int) -> Pick:
    """The pick of least total squared effect within ``budget``.

    Raises:
        TargetError: nothing fits the budget.
    """
    return spend(problem, quantity, budget, lambda option: option.effect**2)


def within_budget(
    problem: Problem,
    quantity: CostKind,
    budget: int,
    allocators: Mapping[str, Allocator],
    evaluate: Callable[[Pick], float],
) -> Outcome:
    """The best proposal within ``budget``, by its measured error; ties go to the first allocator.

    Raises:
        TargetError: nothing fits the budget.
    """
    if problem.cost(problem.dense, quantity) <= budget:
        return Outcome(problem.dense, "dense", 0.0)
    picks = {name: allocator(problem, quantity, budget) for name, allocator in allocators.items()}
    errors = {name: evaluate(pick) for name, pick in picks.items()}
    best = min(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    return Outcome(picks[best], best, errors[best], tuple(errors.items()))


def within_tolerance(
    problem: Problem,
    quantity: CostKind,
    tolerance: float,
    allocators: Mapping[str, Allocator],
    evaluate: Callable[[Pick], float],
) -> Outcome:
    """The cheapest outcome found whose measured error is at most ``tolerance``; dense if there is none."""
    low, high = problem.smallest(quantity), problem.cost(problem.dense, quantity)
    best = Outcome(problem.dense, "dense", 0.0)
    cheapest = within_budget(problem, quantity, low, allocators, evaluate)
    if cheapest.error <= tolerance:
        return cheapest
    for _ in range(BISECTIONS):
        middle = (low + high) // 2
        outcome = within_budget(problem, quantity, middle, allocators, evaluate)
        if outcome.error <= tolerance:
            best, high = outcome, middle
        else:
            low = middle
    return best
