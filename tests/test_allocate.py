from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_fx import allocate as module
from lowrank_fx.allocate import Choice, allocate, smallest_cost
from lowrank_fx.errors import PlanError, TargetError

SMALL_GROUPS = st.lists(
    st.lists(st.builds(Choice, st.integers(0, 30), st.integers(-20, 20).map(float)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


def brute_force(choices: list[list[Choice]], budget: int) -> float | None:
    fitting = (
        math.fsum(choice.value for choice in picks)
        for picks in itertools.product(*choices)
        if sum(choice.cost for choice in picks) <= budget
    )
    return min(fitting, default=None)


def curves(groups: int, choices: int, seed: int, shape: str = "decay") -> list[list[Choice]]:
    """Error curves like those of layers: convex with noise, or concave (where the bound is far from the optimum)."""
    source = random.Random(seed)
    result = []
    for _ in range(groups):
        unit, size = source.randint(1000, 300_000), 10 ** source.gauss(0, 1)
        ranks = sorted(source.sample(range(1, 4000), choices))
        decay = [math.exp(-rank / 1000) * source.uniform(0.8, 1) for rank in ranks]
        values = decay if shape == "decay" else [1 - (rank / 4000) ** 4 for rank in ranks]
        result.append([Choice(rank * unit, size * value) for rank, value in zip(ranks, values, strict=True)])
    return result


def check(choices: list[list[Choice]], budget: int) -> module.Allocation:
    """The promises that hold for every instance."""
    result = allocate(choices, budget)
    picked = [group[index] for group, index in zip(choices, result.chosen, strict=True)]
    assert result.cost == sum(choice.cost for choice in picked) <= budget
    assert result.value == math.fsum(choice.value for choice in picked)
    assert result.bound <= result.value
    return result


@settings(max_examples=300)
@given(choices=SMALL_GROUPS, budget=st.integers(-5, 160))
def test_small_integers_equal_brute_force(choices: list[list[Choice]], budget: int) -> None:
    best = brute_force(choices, budget)
    if best is None:
        with pytest.raises(TargetError, match=f"smallest reachable total cost is {smallest_cost(choices)}"):
            allocate(choices, budget)
        return
    result = check(choices, budget)
    assert result.value == best
    assert result.bound <= best


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 0.99), shape=st.sampled_from(["decay", "concave"]))
def test_real_costs_equal_brute_force(seed: int, share: float, shape: str) -> None:
    choices = curves(groups=4, choices=6, seed=seed, shape=shape)
    least, most = smallest_cost(choices), sum(group[-1].cost for group in choices)
    budget = least + int(share * (most - least))
    best = brute_force(choices, budget)
    assert best is not None
    result = check(choices, budget)
    # Nothing is thinned at this size; what is left is the rounding of the sums that prune.
    assert result.value == pytest.approx(best, rel=1e-12)
    assert result.bound <= best


def test_small_integers_equal_brute_force_when_the_bound_does_not_prune() -> None:
    # All choices lie on one line, so no choice is ever ruled out and only the search over states decides.
    choices = [[Choice(unit * k, -float(unit * k)) for k in range(5)] for unit in (7, 11, 13, 17, 19)]
    for budget in range(0, 270, 3):
        assert check(choices, budget).value == brute_force(choices, budget)


@pytest.mark.parametrize("shape", ["decay", "concave"])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_many_groups_use_the_budget_and_come_near_the_bound(shape: str, share: float) -> None:
    choices = curves(groups=60, choices=20, seed=3, shape=shape)
    least, most = smallest_cost(choices), sum(group[-1].cost for group in choices)
    budget = least + int(share * (most - least))
    result = check(choices, budget)
    assert result.cost >= 0.995 * budget
    # The duality gap is at most one step of one group; measured: 2e-5 (decay), 1.6e-2 (concave).
    assert result.value - result.bound <= (1e-3 if shape == "decay" else 3e-2) * result.value


def test_thinned_states_stay_near_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    choices = curves(groups=40, choices=20, seed=5, shape="concave")
    budget = sum(group[-1].cost for group in choices) // 3
    optimum = check(choices, budget)
    monkeypatch.setattr(module, "_DP_CANDIDATES", 0)
    monkeypatch.setattr(module, "_FEWEST_STATES", 16)
    thinned = check(choices, budget)
    assert optimum.value <= thinned.value <= 1.02 * optimum.value
    assert thinned.cost >= 0.995 * budget
    assert thinned.bound <= optimum.value


def test_bound_is_the_value_of_the_relaxed_problem() -> None:
    # Half-way on the line from (0, 10) to (10, 0), plus the other group's steeper step taken whole.
    choices = [[Choice(0, 10.0), Choice(10, 0.0)], [Choice(0, 8.0), Choice(4, 0.0)]]
    result = check(choices, 9)
    assert result.value == 10.0
    assert result.bound == pytest.approx(5.0, rel=1e-12)


def test_ample_budget_takes_the_best_of_every_group() -> None:
    choices = [[Choice(5, 0.0), Choice(1, 2.0)], [Choice(9, 1.0), Choice(3, 1.0), Choice(3, 1.0)]]
    result = check(choices, 10**12)
    # Of equal values the cheaper one, of equal choices the first.
    assert result.chosen == (0, 1)
    assert result.bound == result.value == 1.0


def test_exact_budget_is_met() -> None:
    choices = [[Choice(1, 1.0), Choice(2, 0.0)], [Choice(1, 1.0), Choice(2, 0.0)]]
    assert check(choices, 2).chosen == (0, 0)
    assert check(choices, 4).chosen == (1, 1)
    assert check(choices, 3).value == 1.0


def test_an_exchange_of_two_beats_the_greedy_walk() -> None:
    # The steepest step (group 0) blocks the two that together are better.
    choices = [[Choice(0, 10.0), Choice(6, 0.0)], [Choice(0, 8.0), Choice(5, 0.0)], [Choice(0, 8.0), Choice(5, 0.0)]]
    assert check(choices, 10).chosen == (0, 1, 1)


def test_no_groups() -> None:
    assert allocate([], 0) == module.Allocation((), 0, 0.0, 0.0)
    assert smallest_cost([]) == 0


def test_infinite_values_are_never_chosen() -> None:
    choices = [[Choice(0, math.inf), Choice(4, 1.0)], [Choice(0, 3.0), Choice(2, 0.0)]]
    assert smallest_cost(choices) == 4
    assert check(choices, 5).chosen == (1, 0)
    with pytest.raises(TargetError, match="at most 3 cannot be reached; the smallest reachable total cost is 4"):
        allocate(choices, 3)


def test_one_enormous_value_does_not_blur_the_others() -> None:
    choices = curves(groups=6, choices=5, seed=2)
    budget = sum(group[-1].cost for group in choices) // 2
    plain = allocate(choices, budget)
    spoiled = [[*group, Choice(group[0].cost, 1e30)] for group in choices]
    assert allocate(spoiled, budget).chosen == plain.chosen


@pytest.mark.parametrize("group", [[], [Choice(1, math.inf)]])
def test_group_without_a_usable_choice_is_named(group: list[Choice]) -> None:
    with pytest.raises(PlanError, match="group 1 of 2 has no choice of finite value"):
        allocate([[Choice(1, 1.0)], group], 10)


def test_nan_is_named() -> None:
    with pytest.raises(PlanError, match="group 0 has a choice whose value is NaN"):
        allocate([[Choice(1, math.nan), Choice(2, 0.0)]], 10)


def test_same_input_same_result() -> None:
    choices = curves(groups=50, choices=20, seed=9, shape="concave")
    budget = sum(group[-1].cost for group in choices) // 2
    assert allocate(choices, budget) == allocate([list(group) for group in choices], budget)
