"""Uniform allocation: every site keeps the same share of its cost. The baseline that others must beat."""

from __future__ import annotations

from lowrank_fx.planners.problem import Option, Pick, Problem, check_budget
from lowrank_fx.targets import CostKind


def uniform(problem: Problem, quantity: CostKind, budget: int) -> Pick:
    """The pick with the largest common share of cost per site that fits ``budget``.

    Raises:
        TargetError: nothing fits the budget.
    """
    check_budget(problem, quantity, budget)
    shares = sorted(
        {
            option.cost(quantity) / options[0].cost(quantity)
            for options in problem.options.values()
            if options[0].cost(quantity)
            for option in options
        }
    )
    low, high = 0, len(shares) - 1
    best = _at_share(problem, quantity, 0.0)
    while low <= high:
        middle = (low + high) // 2
        pick = _at_share(problem, quantity, shares[middle])
        if problem.cost(pick, quantity) <= budget:
            best, low = pick, middle + 1
        else:
            high = middle - 1
    return best


def _at_share(problem: Problem, quantity: CostKind, share: float) -> Pick:
    """Per site the most accurate option that costs at most ``share`` of dense, or else the cheapest."""
    pick = []
    for options in problem.options.values():
        limit = share * options[0].cost(quantity) * (1 + 1e-12)

        def preference(index: int, options: tuple[Option, ...] = options, limit: float = limit) -> tuple[bool, float]:
            cost = options[index].cost(quantity)
            return (cost > limit, options[index].error if cost <= limit else cost)

        pick.append(min(range(len(options)), key=preference))
    return tuple(pick)
