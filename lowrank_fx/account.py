"""What a pick costs in all, before and after: the sites' options, and what the rest of the model costs besides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from lowrank_fx.errors import TargetError
from lowrank_fx.plan import Totals, TradeOff
from lowrank_fx.planners.budget import by_effect
from lowrank_fx.planners.problem import Pick, Problem
from lowrank_fx.targets import CostKind, Keep, Quantity

CURVE_POINTS = 9
"""Points of the trade-off curve, dense included."""

ROUNDING = 1e-12
"""Relative; what a share loses as a float must not cost a count: .57 of 10,000 is 5,700."""


@dataclass(frozen=True)
class Account:
    """The costs of a model.

    Attributes:
        problem: every site's options.
        before: what the user's model costs, by kind of cost.
        fixed: what the clean graph costs besides the sites' weights.
    """

    problem: Problem
    before: Mapping[CostKind, int]
    fixed: Mapping[CostKind, int]

    def totals(self, pick: Pick) -> Totals:
        """Parameters and FLOPs of a pick."""
        quantities: dict[str, tuple[int, int]] = {}
        for quantity in get_args(Quantity):
            dense, chosen = (self.problem.cost(each, quantity) for each in (self.problem.dense, pick))
            quantities[f"model_{quantity}"] = (self.before[quantity], self.fixed[quantity] + chosen)
            quantities[f"site_{quantity}"] = (dense, chosen)
        return Totals(**quantities)

    def budget(self, target: Keep, share: float, counts: str) -> int:
        """What the sites may cost so that a target holds.

        Args:
            target: what was asked for.
            share: the share of it that may remain.
            counts: how many weights can be factored, for the message.

        Raises:
            TargetError: it cannot be reached; the message names the smallest reachable value.
        """
        quantity = target.quantity
        of_model = target.of == "model"
        before = self.before[quantity] if of_model else self.problem.cost(self.problem.dense, quantity)
        fixed = self.fixed[quantity] if of_model else 0
        budget = math.floor(share * before * (1 + ROUNDING)) - fixed
        smallest = self.problem.smallest(quantity)
        if smallest > budget:
            reachable = math.ceil((smallest + fixed) / max(before, 1) * 1e4) / 1e4
            raise TargetError(
                f"{target} cannot be reached: the smallest reachable is {quantity}={reachable:g} ({counts})"
            )
        return budget

    def trade_off(self, quantity: CostKind) -> tuple[TradeOff, ...]:
        """The predicted curve from the smallest reachable cost to dense."""
        smallest, dense = self.problem.smallest(quantity), self.problem.cost(self.problem.dense, quantity)
        points = []
        for step in range(CURVE_POINTS):
            budget = smallest + (dense - smallest) * step // (CURVE_POINTS - 1)
            pick = by_effect(self.problem, quantity, budget)
            totals = self.totals(pick)
            points.append(
                TradeOff(totals.kept("params", "model"), totals.kept("flops", "model"), self.problem.effect(pick))
            )
        return tuple(points)
