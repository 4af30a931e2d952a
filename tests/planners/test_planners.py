"""Planners: budgets are obeyed, the best proposal wins, and a tolerance is met by the cheapest outcome found."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_fx.errors import OptionError, TargetError
from lowrank_fx.forms import DENSE
from lowrank_fx.planners import PLANNERS, planner
from lowrank_fx.planners.budget import BISECTIONS, by_effect, within_budget, within_tolerance
from lowrank_fx.planners.energy import by_energy
from lowrank_fx.planners.problem import Allocator, Option, Pick, Problem, check_budget
from lowrank_fx.planners.uniform import uniform
from lowrank_fx.targets import Quantity

QUANTITIES = st.sampled_from(["params", "flops"])
ALLOCATORS: dict[str, Allocator] = {"effect": by_effect, "energy": by_energy, "uniform": uniform}


def site(size: int, rows: int, ranks: int, sensitivity: float) -> tuple[Option, ...]:
    """Options of a size x size layer whose error falls with rank; its effect is the error times a sensitivity."""
    options = [Option(DENSE, None, size * size, 2 * rows * size * size, 0.0, 0.0)]
    for rank in range(1, min(ranks, size // 2 - 1) + 1):
        error = 2.0 ** (-rank / 2)
        options.append(
            Option("lowrank", rank, 2 * rank * size, 4 * rows * rank * size, error, error * sensitivity)
        )  # fmt: skip
    return tuple(options)


SITES = st.builds(
    site, st.integers(4, 40), st.integers(1, 9), st.integers(0, 12), st.floats(0.001, 10, allow_subnormal=False)
)
PROBLEMS = st.lists(SITES, min_size=1, max_size=5).map(lambda found: Problem({str(i): o for i, o in enumerate(found)}))


def cost_range(problem: Problem, quantity: Quantity) -> tuple[int, int]:
    return problem.smallest(quantity), problem.cost(problem.dense, quantity)


@settings(deadline=None)
@given(problem=PROBLEMS, quantity=QUANTITIES, share=st.floats(0, 1))
@pytest.mark.parametrize("name", ALLOCATORS)
def test_budgets_are_obeyed(name: str, problem: Problem, quantity: Quantity, share: float) -> None:
    smallest, dense = cost_range(problem, quantity)
    budget = int(smallest + share * (dense - smallest))
    pick = ALLOCATORS[name](problem, quantity, budget)
    assert problem.cost(pick, quantity) <= budget
    assert pick == ALLOCATORS[name](problem, quantity, budget)
    assert all(0 <= index < len(options) for index, options in zip(pick, problem.options.values(), strict=True))
    for reachable in (smallest, dense):
        assert problem.cost(ALLOCATORS[name](problem, quantity, reachable), quantity) <= reachable
    with pytest.raises(TargetError, match=f"{smallest - 1} {quantity} is below the smallest reachable, {smallest}"):
        ALLOCATORS[name](problem, quantity, smallest - 1)


@settings(deadline=None, max_examples=50)
@given(problem=st.lists(SITES, min_size=1, max_size=3).map(lambda f: Problem({str(i): o for i, o in enumerate(f)})),
       quantity=QUANTITIES, share=st.floats(0, 1))  # fmt: skip
@pytest.mark.parametrize("measure", ["effect", "error"])
def test_effect_and_energy_are_optimal(measure: str, problem: Problem, quantity: Quantity, share: float) -> None:
    smallest, dense = cost_range(problem, quantity)
    budget = int(smallest + share * (dense - smallest))

    def harm(pick: Pick) -> float:
        return float(sum(getattr(option, measure) ** 2 for option in problem.chosen(pick).values()))

    best = min(
        harm(pick)
        for pick in itertools.product(*(range(len(options)) for options in problem.options.values()))
        if problem.cost(pick, quantity) <= budget
    )
    found = harm((by_effect if measure == "effect" else by_energy)(problem, quantity, budget))
    assert found == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_uniform_keeps_the_same_share_everywhere() -> None:
    problem = Problem({"a": site(100, 1, 49, 1.0), "b": site(40, 3, 19, 1.0), "c": site(20, 7, 9, 1.0)})
    quantities: tuple[Quantity, Quantity] = ("params", "flops")
    for quantity in quantities:
        pick = uniform(problem, quantity, problem.cost(problem.dense, quantity) // 2)
        shares = [
            option.cost(quantity) / problem.options[name][0].cost(quantity)
            for name, option in problem.chosen(pick).items()
        ]
        # One rank of the smallest layer is a tenth of it, which is how far from a common share a site can be.
        assert max(shares) <= 0.5
        assert min(shares) > 0.5 - 0.1 - 1e-9


def test_what_a_problem_says() -> None:
    problem = Problem({"a": site(10, 2, 4, 3.0), "b": site(8, 1, 2, 4.0)})
    assert problem.dense == (0, 0)
    assert problem.factored((0, 2)) == {"b": ("lowrank", 2)}
    assert problem.cost((2, 0), "params") == 40 + 64
    assert problem.cost((2, 0), "flops") == 160 + 128
    assert problem.effect((2, 2)) == pytest.approx((1.5**2 + 2.0**2) ** 0.5)
    assert problem.smallest("params") == 20 + 16
    check_budget(problem, "params", 36)
    with pytest.raises(AssertionError, match="a"):
        Problem({"a": site(10, 2, 4, 3.0)[1:]})


# Choosing by measurement ----------------------------------------------------------------------------------------------

PROBLEM = Problem({str(i): site(30 + i, 1 + i, 14, 0.1 * (i + 1)) for i in range(4)})
SMALLEST, DENSE_COST = cost_range(PROBLEM, "flops")


def test_the_best_measured_proposal_wins_and_ties_go_to_the_first() -> None:
    asked: list[Pick] = []

    def measured(pick: Pick) -> float:
        asked.append(pick)
        return 0.1 if pick == uniform(PROBLEM, "flops", budget) else 0.2

    budget = (SMALLEST + DENSE_COST) // 2
    outcome = within_budget(PROBLEM, "flops", budget, ALLOCATORS, measured)
    assert (outcome.candidate, outcome.error) == ("uniform", 0.1)
    assert outcome.pick == uniform(PROBLEM, "flops", budget)
    assert [name for name, _ in outcome.candidates] == ["effect", "energy", "uniform"]
    assert len(asked) == 3
    assert within_budget(PROBLEM, "flops", budget, ALLOCATORS, lambda _: 0.3).candidate == "effect"
    with pytest.raises(TargetError, match="below the smallest reachable"):
        within_budget(PROBLEM, "flops", SMALLEST - 1, ALLOCATORS, lambda _: 0.3)


def test_a_proposal_that_breaks_the_model_never_wins() -> None:
    errors = iter([float("nan"), 0.3, 0.2])
    outcome = within_budget(PROBLEM, "flops", SMALLEST, ALLOCATORS, lambda _: next(errors))
    assert (outcome.candidate, outcome.error) == ("uniform", 0.2)


def test_a_budget_that_dense_fits_measures_nothing() -> None:
    def never(_: Pick) -> float:
        raise AssertionError("measured")

    for budget in (DENSE_COST, DENSE_COST + 5):
        outcome = within_budget(PROBLEM, "flops", budget, ALLOCATORS, never)
        assert (outcome.pick, outcome.candidate, outcome.error) == (PROBLEM.dense, "dense", 0.0)


@settings(deadline=None, max_examples=50)
@given(tolerance=st.floats(1e-6, 1))
def test_a_tolerance_is_met_and_close_to_the_cheapest(tolerance: float) -> None:
    calls: list[Pick] = []

    def measured(pick: Pick) -> float:
        calls.append(pick)
        return PROBLEM.effect(pick)  # monotone in the budget where effects are what is allocated

    outcome = within_tolerance(PROBLEM, "flops", tolerance, {"effect": by_effect}, measured)
    assert outcome.error <= tolerance
    assert outcome.error == PROBLEM.effect(outcome.pick)
    assert len(calls) <= BISECTIONS + 1
    # What a bisection step below the budget found would have broken the tolerance.
    step = (DENSE_COST - SMALLEST) / 2**BISECTIONS
    below = int(PROBLEM.cost(outcome.pick, "flops") - step - 1)
    if below >= SMALLEST and below < DENSE_COST:
        assert PROBLEM.effect(by_effect(PROBLEM, "flops", below)) > tolerance


def test_extreme_tolerances() -> None:
    everything = within_tolerance(PROBLEM, "flops", 100.0, ALLOCATORS, PROBLEM.effect)
    assert PROBLEM.cost(everything.pick, "flops") == SMALLEST
    nothing = within_tolerance(PROBLEM, "flops", 1e-12, ALLOCATORS, PROBLEM.effect)
    assert (nothing.pick, nothing.candidate) == (PROBLEM.dense, "dense")
    broken = within_tolerance(PROBLEM, "flops", 100.0, ALLOCATORS, lambda _: float("nan"))
    assert broken.pick == PROBLEM.dense


def test_planners_by_name() -> None:
    assert list(PLANNERS) == ["budget", "energy", "uniform"]
    assert list(planner("budget")) == ["effect", "energy", "uniform"]
    message = "planner='best' does not exist; there are 'budget', 'energy', 'uniform'"
    with pytest.raises(OptionError, match=re.escape(message)):
        planner("best")


def test_a_budget_that_effects_do_not_use_goes_to_lower_errors() -> None:
    """Options whose effects are all zero: the cheapest would do for the effects, but the budget allows more."""
    ranks = [Option("lowrank", rank, 10 * rank, 10 * rank, 0.5 / rank, 0.0) for rank in (1, 2, 3, 4)]
    problem = Problem({"a": (Option("dense", None, 60, 60, 0.0, 0.0), *ranks)})
    pick = by_effect(problem, "params", 35)
    assert problem.chosen(pick)["a"].rank == 3
