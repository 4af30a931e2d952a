"""Allocation by energy: minimise the sum of the sites' own squared relative errors.

A proxy that knows nothing of the model behind a site; it is a candidate that measured effects must beat.
"""

from __future__ import annotations

from lowrank_fx.planners.problem import Pick, Problem, spend
from lowrank_fx.targets import CostKind


def by_energy(problem: Problem, quantity: CostKind, budget: int) -> Pick:
    """The pick of least total squared site error within ``budget``.

    Raises:
        TargetError: nothing fits the budget.
    """
    return spend(problem, quantity, budget, lambda option: option.error**2)
