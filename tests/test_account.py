"""Costs in all, and what a share of them leaves."""

from __future__ import annotations

import pytest

from lowrank_fx.account import Account
from lowrank_fx.errors import TargetError
from lowrank_fx.forms import DENSE
from lowrank_fx.planners.problem import Option, Problem
from lowrank_fx.targets import Keep


def account(count: int, smaller: int) -> Account:
    options = (Option(DENSE, None, count, count, 0.0, 0.0), Option("lowrank", 1, smaller, smaller, 0.5, 0.1))
    whole = {"params": count, "flops": count, "latency": count}
    return Account(Problem({"layer": options}), whole, dict.fromkeys(whole, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.57, 0.07, 0.29, 0.1])
def test_a_share_is_worth_every_count_of_it(share: float) -> None:
    """.57 of 10,000 is 5,699.99... as a float."""
    exact = round(share * 10_000)
    assert account(10_000, exact).budget(Keep(params=share), share, "") == exact
    with pytest.raises(TargetError, match="the smallest reachable is params="):
        account(10_000, exact + 1).budget(Keep(params=share), share, "")
