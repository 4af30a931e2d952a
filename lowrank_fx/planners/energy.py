"""Allocation by energy: minimise the sum of the sites' own squared relative errors.

A proxy that knows nothing of the model behind a site; it is a candidate that measured effects must beat.
"""

from __future__ import annotations

from lowrank_fx.allocate import Choice, allocate
from lowrank_fx.planners.problem import Pick, Problem, check_budget
from lowrank_fx.targets import Quantity


def by_energy(problem: Problem, quantity: Quantity, budget: int) -> Pick:
    """The pick of least total squared site error within ``budget``.

    Raises:
        TargetError: nothing fits the budget.
    """
    check_budget(problem, quantity, budget)
    groups = [[Choice(o.cost(quantity), o.error**2) for o in options] for options in problem.options.values()]
    return allocate(groups, budget).chosen
