"""The multiple-choice knapsack: one choice from every group, least total value within a budget. Numbers only.

Lagrangian relaxation (H. Everett, "Generalized Lagrange Multiplier Method", Operations Research 11, 1963) gives a lower
bound and a good start; dynamic programming over what the bound leaves finishes it (H. Kellerer, U. Pferschy,
D. Pisinger, "Knapsack Problems", Springer 2004, chapter 11).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowrank_fx.errors import PlanError, TargetError

# Work limits, chosen so that 150 groups of 40 choices take well under 0.3 s of one CPU core.
_DP_CANDIDATES = 1_000_000
_FEWEST_STATES, _MOST_STATES = 512, 32_768
_EXCHANGE_MOVES = 400
_EXCHANGE_ROUNDS = 200

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One way to settle a group.

    Attributes:
        cost: what it takes from the budget, in any unit.
        value: what is minimised. An infinite value is never chosen.
    """

    cost: int
    value: float


@dataclass(frozen=True)
class Allocation:
    """One choice per group.

    Attributes:
        chosen: the index of the choice of each group.
        cost: their total cost, at most the budget.
        value: their total value.
        bound: a lower bound on the value of every allocation within the budget.
    """

    chosen: tuple[int, ...]
    cost: int
    value: float
    bound: float


def smallest_cost(choices: Sequence[Sequence[Choice]]) -> int:
    """The least total cost of one choice of finite value per group.

    Raises:
        PlanError: a group has no choice of finite value, or a value is NaN.
    """
    return sum(int(group.cost[0]) for group in _frontiers(choices))


def allocate(choices: Sequence[Sequence[Choice]], budget: int) -> Allocation:
    """Pick one choice per group so that the total value is least and the total cost is at most ``budget``.

    The Lagrangian L(m) = sum_g min_j (value_gj + m cost_gj) - m budget is a lower bound for every m >= 0. It is
    greatest at the slope where a greedy walk down the groups' lower convex hulls, steepest step first, runs out of
    budget (Kellerer et al., section 11.2). A choice, or a partial allocation, that exceeds its groups' minima of
    value + m cost by more than (best value known - bound) cannot be part of a better allocation. What remains is solved
    by dynamic programming over (cost, value) pairs, with true costs. The result is the optimum (up to rounding in the
    sums) unless the pairs outgrow the limit on states; then they are thinned evenly along the cost, and exchanges of
    one and two picks improve the result. Equal inputs give equal results; among equal choices of a group the first
    wins.

    Args:
        choices: for every group at least one choice of finite value, in any order.
        budget: the largest allowed total cost, in the unit of the costs.

    Raises:
        TargetError: no allocation is within the budget; the message names the smallest reachable cost.
        PlanError: a group has no choice of finite value, or a value is NaN.
    """
    groups = _frontiers(choices)
    least = sum(int(group.cost[0]) for group in groups)
    if least > budget:
        raise TargetError(
            f"a total cost of at most {budget} cannot be reached; the smallest reachable total cost is {least}"
        )
    if sum(int(group.cost[-1]) for group in groups) <= budget:
        best = [len(group.cost) - 1 for group in groups]
        return _allocation(groups, best, bound=math.inf)

    picks, multiplier = _greedy(groups, budget)
    relaxed = [group.value + multiplier * group.cost for group in groups]
    excess = [weights - weights.min() for weights in relaxed]
    bound = math.fsum([float(weights.min()) for weights in relaxed] + [-multiplier * budget])
    rounding = _rounding(groups, relaxed, picks, multiplier, budget)

    picks = _exchange(groups, excess, picks, budget, bound, rounding)
    gap = _value(groups, picks) - bound
    if gap > rounding:
        found, exact = _dynamic_programming(groups, excess, multiplier, budget, gap + rounding)
        if found is not None and _value(groups, found) < _value(groups, picks):
            picks = found
        if not exact:
            picks = _exchange(groups, excess, picks, budget, bound, rounding)
    return _allocation(groups, picks, bound - rounding)


class _Group(NamedTuple):
    """The choices of a group that no other choice of it beats: costs rising, values falling, both strictly."""

    cost: _Ints
    value: _Floats
    original: list[int]


def _frontiers(choices: Sequence[Sequence[Choice]]) -> list[_Group]:
    groups = []
    for number, group in enumerate(choices):
        if any(math.isnan(choice.value) for choice in group):
            raise PlanError(f"group {number} has a choice whose value is NaN")
        kept: list[int] = []
        best = math.inf
        for index in sorted(range(len(group)), key=lambda i: (group[i].cost, group[i].value, i)):
            if group[index].value < best:
                kept.append(index)
                best = group[index].value
        if not kept:
            raise PlanError(f"group {number} of {len(choices)} has no choice of finite value among its {len(group)}")
        cost = np.array([group[index].cost for index in kept], dtype=np.int64)
        value = np.array([group[index].value for index in kept], dtype=np.float64)
        groups.append(_Group(cost, value, kept))
    return groups


def _greedy(groups: list[_Group], budget: int) -> tuple[list[int], float]:
    """The walk down the hulls: picks that keep the budget, and the multiplier that makes the bound greatest."""
    steps: list[tuple[float, int, int, int]] = []
    for number, group in enumerate(groups):
        hull = _lower_hull(group.cost, group.value)
        for start, end in itertools.pairwise(hull):
            slope = (group.value[end] - group.value[start]) / float(group.cost[end] - group.cost[start])
            steps.append((float(slope), number, start, end))
    steps.sort()
    picks = [0] * len(groups)
    left = budget - sum(int(group.cost[0]) for group in groups)
    multiplier = 0.0
    for slope, number, start, end in steps:
        price = int(groups[number].cost[end] - groups[number].cost[start])
        if price > left and multiplier == 0.0:
            multiplier = -slope
        if price <= left and picks[number] == start:
            picks[number] = end
            left -= price
    return picks, multiplier


def _rounding(groups: list[_Group], relaxed: list[_Floats], picks: list[int], multiplier: float, budget: int) -> float:
    """How far floating-point sums of the sizes at hand may be off; choices far from the minima do not enter."""
    sizes = [multiplier * abs(budget)]
    for group, weights, pick in zip(groups, relaxed, picks, strict=True):
        for position in (int(weights.argmin()), pick):
            sizes.append(abs(float(group.value[position])) + multiplier * abs(float(group.cost[position])))
    return float(16 * np.finfo(np.float64).eps * math.fsum(sizes))


def _lower_hull(cost: _Ints, value: _Floats) -> list[int]:
    hull: list[int] = []
    for point in range(len(cost)):
        while len(hull) >= 2:
            first, middle = hull[-2], hull[-1]
            rise = (value[middle] - value[first]) * float(cost[point] - cost[first])
            if rise < (value[point] - value[first]) * float(cost[middle] - cost[first]):
                break
            hull.pop()
        hull.append(point)
    return hull


def _exchange(
    groups: list[_Group], excess: list[_Floats], picks: list[int], budget: int, bound: float, rounding: float
) -> list[int]:
    """Take the best change of one or two groups' picks that keeps the budget, until there is none."""
    picks = list(picks)
    for _ in range(_EXCHANGE_ROUNDS):
        left = budget - sum(int(group.cost[pick]) for group, pick in zip(groups, picks, strict=True))
        gap = _value(groups, picks) - bound
        if gap <= rounding:
            break
        # The first move is to change nothing: paired with another it makes a change of one group.
        owner, target, cost, value, over = (
            [np.array([-1])],
            [np.array([-1])],
            [np.zeros(1, np.int64)],
            [np.zeros(1)],
            [np.zeros(1)],
        )
        for number, (group, pick) in enumerate(zip(groups, picks, strict=True)):
            others = np.flatnonzero(excess[number] <= gap + rounding)
            others = others[others != pick]
            owner.append(np.full(len(others), number))
            target.append(others)
            cost.append(group.cost[others] - group.cost[pick])
            value.append(group.value[others] - group.value[pick])
            over.append(excess[number][others])
        shown = np.argsort(np.concatenate(over), kind="stable")[:_EXCHANGE_MOVES]
        owners, targets = np.concatenate(owner)[shown], np.concatenate(target)[shown]
        costs, values = np.concatenate(cost)[shown], np.concatenate(value)[shown]
        gains = values[:, None] + values[None, :]
        gains[(costs[:, None] + costs[None, :] > left) | (owners[:, None] == owners[None, :])] = 0.0
        first, second = divmod(int(gains.argmin()), len(shown))
        if gains[first, second] >= -rounding:
            break
        for move in (first, second):
            if owners[move] >= 0:
                picks[owners[move]] = int(targets[move])
    return picks


def _dynamic_programming(
    groups: list[_Group], excess: list[_Floats], multiplier: float, budget: int, gap: float
) -> tuple[list[int] | None, bool]:
    """The best allocation within ``gap`` of the bound, or None, and whether it is the optimum for certain."""
    allowed = [np.flatnonzero(over <= gap) for over in excess]
    if any(len(kept) == 0 for kept in allowed):
        return None, True
    cost = sum(int(group.cost[kept[0]]) for group, kept in zip(groups, allowed, strict=True) if len(kept) == 1)
    open_groups = [number for number, kept in enumerate(allowed) if len(kept) > 1]
    limit = max(_FEWEST_STATES, min(_MOST_STATES, _DP_CANDIDATES // max(sum(len(allowed[n]) for n in open_groups), 1)))
    least_after = sum(int(groups[number].cost[allowed[number][0]]) for number in open_groups)
    most_after = sum(int(groups[number].cost[allowed[number][-1]]) for number in open_groups)

    costs: _Ints = np.array([cost], dtype=np.int64)
    values: _Floats = np.zeros(1)
    overs: _Floats = np.full(
        1, math.fsum(float(over[kept[0]]) for over, kept in zip(excess, allowed, strict=True) if len(kept) == 1)
    )
    exact = True
    history: list[tuple[NDArray[np.int32], NDArray[np.int32]]] = []
    for number in open_groups:
        kept, group = allowed[number], groups[number]
        least_after -= int(group.cost[kept[0]])
        most_after -= int(group.cost[kept[-1]])
        next_costs = (group.cost[kept][:, None] + costs[None, :]).ravel()
        next_overs = (excess[number][kept][:, None] + overs[None, :]).ravel()
        # Budget that nothing to come can use is lost at the multiplier's price.
        unused = np.maximum(budget - most_after - next_costs, 0)
        alive = np.flatnonzero((next_costs + least_after <= budget) & (next_overs + multiplier * unused <= gap))
        next_values = (group.value[kept][:, None] + values[None, :]).ravel()[alive]
        order = np.argsort(next_costs[alive], kind="stable")
        alive, next_values = alive[order], next_values[order]
        next_costs, next_overs = next_costs[alive], next_overs[alive]
        best_so_far = np.minimum.accumulate(next_values)
        better = np.flatnonzero(np.concatenate(([True], next_values[1:] < best_so_far[:-1]))[: len(alive)])
        # Of equal costs the last that improved is the best.
        better = better[np.concatenate((np.diff(next_costs[better]) > 0, [True]))[: len(better)]]
        if len(better) > limit:
            exact = False
            better = better[_spread(next_costs[better], next_overs[better], limit)]
        alive = alive[better]
        history.append(((alive // len(costs)).astype(np.int32), (alive % len(costs)).astype(np.int32)))
        costs, values, overs = next_costs[better], next_values[better], next_overs[better]
        if len(costs) == 0:
            return None, exact

    picks = [int(kept[0]) for kept in allowed]
    state = len(costs) - 1
    for number, (chosen, parent) in zip(reversed(open_groups), reversed(history), strict=True):
        picks[number] = int(allowed[number][chosen[state]])
        state = int(parent[state])
    return picks, exact


def _spread(costs: _Ints, overs: _Floats, limit: int) -> NDArray[np.int64]:
    """Of rising ``costs`` the positions of at most ``limit``: in every stretch of equal width the least excess."""
    width = (int(costs[-1]) - int(costs[0])) // limit + 1
    stretch = (costs - costs[0]) // width
    starts = np.flatnonzero(np.concatenate(([True], np.diff(stretch) > 0)))
    least = np.repeat(np.minimum.reduceat(overs, starts), np.diff(np.append(starts, len(costs))))
    hits = np.flatnonzero(overs == least)
    return hits[np.concatenate(([True], np.diff(stretch[hits]) > 0))]


def _value(groups: list[_Group], picks: list[int]) -> float:
    return math.fsum(float(group.value[pick]) for group, pick in zip(groups, picks, strict=True))


def _allocation(groups: list[_Group], picks: list[int], bound: float) -> Allocation:
    value = _value(groups, picks)
    return Allocation(
        chosen=tuple(group.original[pick] for group, pick in zip(groups, picks, strict=True)),
        cost=sum(int(group.cost[pick]) for group, pick in zip(groups, picks, strict=True)),
        value=value,
        bound=min(bound, value),
    )
