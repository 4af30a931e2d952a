"""Effects corrected for what the other layers' factoring does to them, around a chosen plan.

Effects are measured one site at a time and added in squares. In a factored model errors meet: some amplify each other,
some go the same way, some drown. So, with every other site factored as the plan says, each site is tried at one
neighbour of its option: of the same variant the one whose squared effect is about half as large or, where the plan
leaves it dense, the cheapest to be considered. With E the measured joint errors and e the effects,

    s^2 = (E_plan^2 - E_neighbour^2) / (e_plan^2 - e_neighbour^2)

is how much a change of this site really counts there. All of the site's effects are multiplied by s, within
``LARGEST_SCALE``, and the budget is spent again. Where not all sites can be tried, those of the largest effects are,
and the others' effects are multiplied by the median s. The proposal has to win on held-out data like every other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace

from lowrank_fx.planners.budget import by_effect
from lowrank_fx.planners.problem import Allocator, Pick, Problem
from lowrank_fx.targets import CostKind

LARGEST_SCALE = 2.0
"""Effects are corrected by at most this factor, up or down: far from the plan the correction is a guess."""

NEIGHBOUR = 0.5
"""The squared effect of the neighbour, as a share of the plan's."""


def neighbours(problem: Problem, pick: Pick) -> dict[str, int]:
    """The option that each site is tried with instead, by site name; a site without another option has none."""
    found: dict[str, int] = {}
    for (name, options), taken in zip(problem.options.items(), pick, strict=True):
        now = options[taken]
        if now.rank is None:
            others = [index for index, option in enumerate(options) if option.effect > 0]
            if others:
                found[name] = min(others, key=lambda index: (options[index].effect, index))
            continue
        aim = NEIGHBOUR * now.effect**2
        others = [
            index
            for index, option in enumerate(options)
            if option.effect < now.effect and option.form in (now.form, options[0].form)
        ]
        if others:
            found[name] = min(others, key=lambda index: (abs(options[index].effect ** 2 - aim), index))
    return found


def largest(problem: Problem, pick: Pick, tried: Mapping[str, int], most: int) -> dict[str, int]:
    """At most ``most`` of the sites to be tried: those whose effect, taken or tried, is largest, in the given order."""
    if len(tried) <= most:
        return dict(tried)
    taken = problem.indices(pick)
    effects = {name: max(problem.options[name][index].effect for index in (taken[name], tried[name])) for name in tried}
    kept = set(sorted(effects, key=lambda name: (-effects[name], name))[:most])
    return {name: index for name, index in tried.items() if name in kept}


def around(
    problem: Problem, pick: Pick, tried: Mapping[str, int], error: float, errors: Mapping[str, float]
) -> Mapping[str, Allocator]:
    """The candidate ``"marginal"``: a budget spent by corrected effects; see :func:`corrected` for the arguments."""
    scaled = corrected(problem, pick, tried, error, errors)

    def marginal(_: Problem, quantity: CostKind, budget: int) -> Pick:
        return by_effect(scaled, quantity, budget)

    return {"marginal": marginal}


def corrected(
    problem: Problem, pick: Pick, tried: Mapping[str, int], error: float, errors: Mapping[str, float]
) -> Problem:
    """The problem with every site's effects scaled to what they are around a pick.

    Args:
        problem: with effects of one site at a time.
        pick: the plan.
        tried: from :func:`neighbours`, all or the :func:`largest`.
        error: the measured joint error of the pick.
        errors: by site name, that with the neighbour instead.
    """
    scales: dict[str, float] = {}
    for name, taken in problem.indices(pick).items():
        if name not in errors:
            continue
        options = problem.options[name]
        expected = options[taken].effect ** 2 - options[tried[name]].effect ** 2
        found = error**2 - errors[name] ** 2
        if not math.isfinite(found):  # an overflow says nothing about a share
            continue
        squared = min(max(found / expected, LARGEST_SCALE**-2), LARGEST_SCALE**2)
        scales[name] = squared**0.5
    usual = statistics.median_low(scales.values()) if scales else 1.0
    return Problem(
        {
            name: tuple(replace(option, effect=option.effect * scales.get(name, usual)) for option in options)
            for name, options in problem.options.items()
        }
    )
