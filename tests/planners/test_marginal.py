"""Effects corrected around a plan: the neighbours, the scale, and when nothing changes."""

from __future__ import annotations

import pytest

from lowrank_fx.planners.marginal import LARGEST_SCALE, around, corrected, largest, neighbours
from lowrank_fx.planners.problem import Option, Problem


def options(*effects: float, form: str = "lowrank") -> tuple[Option, ...]:
    """Dense, then ranks 1, 2, ... of falling effect; a rank costs 10."""
    found = [Option("dense", None, 100, 100, 0.0, 0.0)]
    found += [Option(form, rank, 10 * rank, 10 * rank, effect, effect) for rank, effect in enumerate(effects, start=1)]
    return tuple(found)


PROBLEM = Problem({"a": options(0.4, 0.3, 0.2, 0.1), "b": options(0.4, 0.3, 0.2, 0.1), "c": options(0.4, 0.1)})


def test_neighbours_have_about_half_the_squared_effect() -> None:
    # a: .4^2 / 2 = .08 lies nearest to .3^2; b: .1^2 / 2 lies between .1^2 (the same) and 0 (dense);
    # c is dense, so its gentlest rank is tried.
    assert neighbours(PROBLEM, (1, 4, 0)) == {"a": 2, "b": 0, "c": 2}


def test_neighbours_stay_with_their_variant() -> None:
    mixed = (*options(0.4, 0.1), Option("lowrank@gradient", 1, 10, 10, 0.5, 0.28))
    assert neighbours(Problem({"a": mixed}), (1,)) == {"a": 2}
    assert neighbours(Problem({"a": options()}), (0,)) == {}


def test_effects_are_scaled_by_what_a_step_really_does() -> None:
    pick, tried = (1, 1, 0), {"a": 2, "b": 2, "c": 2}
    # The plan's squared error is .5; alone, the step of a or b is .16 - .09 = .07, that of c is -.01.
    errors = {"a": (0.5 - 0.07 * 2.25) ** 0.5, "b": 0.5**0.5, "c": (0.5 + 0.01) ** 0.5}
    found = corrected(PROBLEM, pick, tried, 0.5**0.5, errors)
    scales = {name: found.options[name][1].effect / PROBLEM.options[name][1].effect for name in PROBLEM.options}
    assert scales == pytest.approx({"a": 1.5, "b": 1 / LARGEST_SCALE, "c": 1.0})
    for name, group in found.options.items():
        assert [(each.form, each.rank, each.params, each.error) for each in group] == [
            (each.form, each.rank, each.params, each.error) for each in PROBLEM.options[name]
        ]
        assert group[0].effect == 0.0


def test_where_not_all_are_tried_the_largest_effects_are() -> None:
    pick, tried = (1, 4, 0), {"a": 2, "b": 0, "c": 2}
    assert largest(PROBLEM, pick, tried, 3) == tried
    assert largest(PROBLEM, pick, tried, 1) == {"a": 2}
    assert largest(PROBLEM, pick, tried, 2) == {"a": 2, "b": 0}  # b and c at .1: the first of equal ones


def test_what_was_not_tried_counts_as_much_more_as_what_was_does_in_the_median() -> None:
    # The step of a counts 2.25 times as much in squares.
    found = corrected(PROBLEM, (1, 1, 0), {"a": 2}, 0.5**0.5, {"a": (0.5 - 0.07 * 2.25) ** 0.5})
    scales = [found.options[name][1].effect / PROBLEM.options[name][1].effect for name in PROBLEM.options]
    assert scales == pytest.approx([1.5, 1.5, 1.5])


def test_the_budget_moves_to_where_it_counts() -> None:
    pick = around(PROBLEM, (1, 1, 1), {}, 1.0, {})["marginal"](PROBLEM, "params", 60)
    # Alone, the step of a or b is .16 - .09 = .07: that of b is what it was, that of a counts for more.
    errors = {"a": 0.5, "b": (1 - 0.07) ** 0.5}
    moved = around(PROBLEM, (1, 1, 1), {"a": 2, "b": 2}, 1.0, errors)["marginal"](PROBLEM, "params", 60)
    assert moved[0] > pick[0]
    assert PROBLEM.cost(moved, "params") <= 60
