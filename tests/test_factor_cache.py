"""Factors that are kept while a plan is searched: each made once, within a number of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, Metric, Tolerance
from lowrank_fx.factor_cache import FactorCache, Key
from lowrank_fx.forms import Factors


def factors(numbers: int) -> Factors:
    """A pair with a shift that holds so many float32 numbers and one float64."""
    return Factors(torch.zeros(1, numbers - 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.float64))


def test_what_comes_first_stays() -> None:
    size = 4 * 10 + 8
    cache, made = FactorCache(most=2 * size), []

    def ask(rank: int) -> Factors:
        def make() -> Factors:
            made.append(rank)
            return factors(10)

        return cache.factors(("layer", "lowrank", rank), make)

    first, second = ask(1), ask(2)
    ask(3)
    assert ask(1) is first
    assert ask(2) is second
    ask(3)
    assert made == [1, 2, 3, 3]
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0
    assert ask(1) is not first


def test_what_is_larger_than_all_that_may_be_kept_is_made_each_time() -> None:
    cache = FactorCache(most=8)
    key = "layer", "lowrank", 4
    assert cache.factors(key, lambda: factors(10)) is not cache.factors(key, lambda: factors(10))
    assert len(cache) == 0


@pytest.mark.parametrize("target", [Tolerance(0.2), Metric(lambda model: 1.0, max_drop=0.0)])
def test_a_search_makes_no_pair_twice_for_comparing(target: Tolerance | Metric) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 16)).eval()
    batches: list[Tensor] = [torch.randn(32, 24) @ torch.diag(0.9 ** torch.arange(24)) for _ in range(8)]
    fast = lowrank_fx.optimize(model, batches, target=Keep(params=0.5), compile=False, progress=False)
    session = fast.session
    assert session is not None
    made: list[Key] = []
    asked: list[Key] = []
    kept = FactorCache.factors

    def counted(self: FactorCache, key: Key, make: Callable[[], Factors]) -> Factors:
        def makes() -> Factors:
            made.append(key)
            return make()

        asked.append(key)
        return kept(self, key, makes)

    with patch.object(FactorCache, "factors", counted):
        plan, _ = session.plan(target)
    assert len(made) == len(set(made)) == len(set(asked)) < len(asked)
    assert len(session._kept) == 0
    with patch.object(FactorCache, "factors", lambda self, key, make: make()):
        fresh, _ = session.plan(target)
    assert fresh.to_json() == plan.to_json()
    assert math.isfinite(plan.error)
