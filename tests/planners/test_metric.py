"""The search by a metric: what it returns was scored and held, scores are few, and little is left to gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_fx.forms import DENSE
from lowrank_fx.planners.budget import by_effect
from lowrank_fx.planners.energy import by_energy
from lowrank_fx.planners.metric import RESOLUTION, Searched, within_drop
from lowrank_fx.planners.problem import Allocator, Option, Pick, Problem
from lowrank_fx.planners.uniform import uniform
from lowrank_fx.targets import Metric, Quantity

ALLOCATORS: dict[str, Allocator] = {"effect": by_effect, "energy": by_energy, "uniform": uniform}
QUANTITIES: tuple[Quantity, ...] = ("flops", "params")


def site(size: int, rows: int, sensitivity: float) -> tuple[Option, ...]:
    """Options of a size x size layer whose error falls with rank; its effect is the error times a sensitivity."""
    options = [Option(DENSE, None, size * size, 2 * rows * size * size, 0.0, 0.0)]
    for rank in range(1, size // 2):
        error = 2.0 ** (-rank / 4)
        options.append(Option("lowrank", rank, 2 * rank * size, 4 * rows * rank * size, error, error * sensitivity))
    return tuple(options)


PROBLEM = Problem({str(i): site(40 + 2 * i, 1 + i, 0.1 * (i + 1)) for i in range(4)})


class Scores:
    """A metric of the joint effect that keeps account of what it was asked; the original has 0.9."""

    def __init__(self, drop: Callable[[float, int], float], *, higher_is_better: bool = True) -> None:
        self.drop, self.sign = drop, 1 if higher_is_better else -1
        self.values: dict[Pick, float] = {}

    def __call__(self, pick: Pick) -> float:
        assert pick not in self.values, "a plan was scored twice"
        lost = 0.0 if pick == PROBLEM.dense else self.drop(PROBLEM.effect(pick), len(self.values))
        self.values[pick] = 0.9 - self.sign * lost
        return self.values[pick]


def never(_: object) -> float:
    raise AssertionError("the search calls score, not the target's function")


def metric(max_drop: float, *, of: Quantity = "flops", evaluations: int = 12, higher_is_better: bool = True) -> Metric:
    return Metric(never, max_drop, of=of, evaluations=evaluations, higher_is_better=higher_is_better)


def search(target: Metric, scores: Scores, allocators: Mapping[str, Allocator] = ALLOCATORS) -> Searched:
    """Search, and check what holds whatever the metric does."""
    found = within_drop(PROBLEM, target, allocators, PROBLEM.effect, scores)
    assert next(iter(scores.values)) == PROBLEM.dense
    assert found.evaluations == len(scores.values) <= target.evaluations
    assert [(each.pick, each.value) for each in found.scored] == list(scores.values.items())[1:]
    assert all(each.error == PROBLEM.effect(each.pick) for each in found.scored)
    assert (found.before, found.after) == (0.9, scores.values[found.outcome.pick])
    held = [pick for pick, value in scores.values.items() if target.holds(found.before, value)]
    assert found.outcome.pick == min(held, key=lambda pick: PROBLEM.cost(pick, target.of))
    assert (found.outcome.candidate == "dense") == (found.outcome.pick == PROBLEM.dense)
    return found


def cheapest(target: Metric, drop: Callable[[float], float]) -> int:
    """The least budget whose proposal by effects holds."""
    smallest, dense = PROBLEM.smallest(target.of), PROBLEM.cost(PROBLEM.dense, target.of)
    low, high = smallest, dense
    # The proposals' effect falls as the budget grows, so a bisection down to one unit sees what all budgets would.
    while low < high:
        middle = (low + high) // 2
        if drop(PROBLEM.effect(by_effect(PROBLEM, target.of, middle))) <= target.max_drop:
            high = middle
        else:
            low = middle + 1
    return low


SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda effect: effect,
    "square": lambda effect: 3 * effect**2,
    "steep": lambda effect: 100 * effect**6,
    "steps of a thousandth": lambda effect: math.floor(1000 * effect**2) / 1000,
    "a cliff": lambda effect: 0.5 if effect > 0.12 else 0.0,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("of", QUANTITIES)
@pytest.mark.parametrize("max_drop", [0.0, 0.001, 0.01, 0.1])
def test_what_is_found_is_near_the_cheapest_of_all_budgets(shape: str, of: Quantity, max_drop: float) -> None:
    target = metric(max_drop, of=of)
    found = search(target, Scores(lambda effect, _: SHAPES[shape](effect)), {"effect": by_effect})
    smallest, dense = PROBLEM.smallest(of), PROBLEM.cost(PROBLEM.dense, of)
    best = cheapest(target, SHAPES[shape])
    # The search ends within 1/256 of the range or when 11 plans were scored; measured here: .0023 of the range.
    assert best <= PROBLEM.cost(found.outcome.pick, of) <= best + (dense - smallest) / RESOLUTION


def test_a_metric_that_falls_with_the_square_of_the_error_takes_few_scores() -> None:
    """Bisection alone takes eight scores for one part in 256; measured here: four or five."""
    for drop in (0.003, 0.01, 0.03):
        found = search(metric(drop), Scores(lambda e, _: 3 * e**2), {"effect": by_effect})
        assert len(found.scored) <= 6


def test_few_evaluations_are_well_spent() -> None:
    full, few = (
        PROBLEM.cost(search(metric(0.01, evaluations=n), Scores(lambda e, _: 3 * e**2)).outcome.pick, "flops")
        for n in (12, 4)
    )
    span = PROBLEM.cost(PROBLEM.dense, "flops") - PROBLEM.smallest("flops")
    assert few - full <= span / 8  # three steps of a bisection leave an eighth


@pytest.mark.parametrize("evaluations", [2, 3, 5, 12, 40])
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32), noise=st.floats(0, 0.2), max_drop=st.floats(0, 0.2))
def test_a_noisy_metric_breaks_nothing(evaluations: int, seed: int, noise: float, max_drop: float) -> None:
    def drop(effect: float, asked: int) -> float:
        return effect**2 + noise * math.sin(seed + 12.9898 * asked)  # may rise above the original's

    search(metric(max_drop, evaluations=evaluations), Scores(drop))


@pytest.mark.parametrize("of", QUANTITIES)
def test_a_metric_that_never_drops_gives_the_smallest_plan_in_two_scores_of_plans(of: Quantity) -> None:
    for rise in (0.0, -0.05):
        scores = Scores(lambda effect, asked, rise=rise: rise)  # type: ignore[misc]
        found = search(metric(0.0, of=of), scores)
        assert PROBLEM.cost(found.outcome.pick, of) == PROBLEM.smallest(of)
        assert found.evaluations <= 3


def test_a_metric_that_any_plan_breaks_gives_the_original() -> None:
    found = search(metric(0.01), Scores(lambda effect, _: 0.5))
    assert (found.outcome.pick, found.outcome.candidate, found.outcome.error) == (PROBLEM.dense, "dense", 0.0)
    assert found.after == found.before == 0.9
    costs = [PROBLEM.cost(each.pick, "flops") for each in found.scored]
    dense = PROBLEM.cost(PROBLEM.dense, "flops")
    # It went as near to the original as the resolution asks for.
    assert dense - max(costs) <= 2 * max((dense - PROBLEM.smallest("flops")) / RESOLUTION, 80)


def test_a_metric_that_is_infinite_behind_a_cliff() -> None:
    """How far off such a plan is says nothing of where the drop is reached, so what is left is halved."""
    for limit in (0.05, 0.12, 0.2):
        target = metric(0.01)

        def drop(effect: float, _: int, limit: float = limit) -> float:
            return math.inf if effect > limit else 0.0

        found = search(target, Scores(drop), {"effect": by_effect})
        smallest, dense = PROBLEM.smallest("flops"), PROBLEM.cost(PROBLEM.dense, "flops")
        best = cheapest(target, lambda effect, limit=limit: drop(effect, 0, limit))  # type: ignore[misc]
        # Measured: within .004 of the range.
        assert best <= PROBLEM.cost(found.outcome.pick, "flops") <= best + (dense - smallest) / 100


def test_a_metric_where_less_is_better() -> None:
    up = search(metric(0.01), Scores(lambda e, _: 3 * e**2))
    down = search(metric(0.01, higher_is_better=False), Scores(lambda e, _: 3 * e**2, higher_is_better=False))
    assert down.outcome.pick == up.outcome.pick
    assert down.after > down.before


def test_plans_whose_outputs_are_not_finite_take_no_score() -> None:
    """Here half of all budgets overflow; those are passed over, and the rest is searched as ever."""
    half = (PROBLEM.smallest("flops") + PROBLEM.cost(PROBLEM.dense, "flops")) // 2

    def evaluate(pick: Pick) -> float:
        return math.nan if PROBLEM.cost(pick, "flops") < half else PROBLEM.effect(pick)

    scores = Scores(lambda effect, _: 0.0)
    found = within_drop(PROBLEM, metric(0.0), {"effect": by_effect}, evaluate, scores)
    assert all(math.isfinite(each.error) for each in found.scored)
    span = PROBLEM.cost(PROBLEM.dense, "flops") - PROBLEM.smallest("flops")
    assert half <= PROBLEM.cost(found.outcome.pick, "flops") <= half + span / 50


def test_a_model_without_options_is_scored_once() -> None:
    scores: list[Pick] = []

    def score(pick: Pick) -> float:
        scores.append(pick)
        return 1.0

    problem = Problem({"a": (Option(DENSE, None, 4, 4, 0.0, 0.0),)})
    found = within_drop(problem, metric(0.1), ALLOCATORS, problem.effect, score)
    assert (found.outcome.pick, found.evaluations, scores) == ((0,), 1, [(0,)])


def test_options_without_any_effect_are_no_trouble() -> None:
    """Errors of exactly zero have no logarithm."""
    ranks = [Option("lowrank", rank, 10 * rank, 10 * rank, 0.5 / rank, 0.0) for rank in (1, 2, 3, 4)]
    problem = Problem({"a": (Option(DENSE, None, 60, 60, 0.0, 0.0), *ranks)})
    for limit in (5, 25, 45):  # what costs less does not hold
        found = within_drop(
            problem,
            metric(0.01),
            {"effect": by_effect},
            problem.effect,
            lambda pick, limit=limit: 0.9 if problem.cost(pick, "flops") > limit else 0.5,  # type: ignore[misc]
        )
        assert problem.cost(found.outcome.pick, "flops") == {5: 10, 25: 30, 45: 60}[limit]
