"""Ten architectures of the zoo, each with every check of ``benchmarks/bench_zoo.py``, which takes all of them. Slow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zoo
import zoo_checks
from torch import nn
from zoo_checks import Findings

GOOD = Findings(sites=2, factored=1, kept=0.8, moved=0.1, same_class=True, unchanged=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.SAMPLE)
def test_sample(name: str, tmp_path: Path) -> None:
    model, batches = zoo.make(name)
    assert zoo_checks.check(model, batches, tmp_path).failures() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 1e-5) for name in ("rewrite", "folded", "dense", "other_batch", "loaded", "loaded_folded")),
        *((name, float("nan")) for name in ("rewrite", "folded", "dense", "other_batch", "loaded", "loaded_folded")),
        *(("same_class", False), ("unchanged", False), ("unaccounted", ["layer.0.weight"])),
        *(("kept", 0.81), ("kept", 0.76), ("factored", 0), ("moved", 1e-5)),
    ],
)
def test_every_finding_counts(field: str, value: Any) -> None:
    assert GOOD.failures() == []
    assert len(replace(GOOD, **{field: value}).failures()) == 1


def test_an_error_is_judged_by_the_models_own_rounding() -> None:
    assert replace(GOOD, rewrite=1e-5, rounding=3e-6).failures() == []
    assert replace(GOOD, dense=1e-5, own_rounding=3e-6).failures() == []


def test_a_weight_that_no_one_mentions_is_found() -> None:
    class Plan:
        sites = ()
        left_alone = ()
        cleanup = ("1.weight computed from 1.parametrizations.weight.original0",)

    class Fast:
        plan = Plan

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert zoo_checks.unaccounted(model, Fast) == ["0.weight"]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[0].weight = tied[1].weight
    assert zoo_checks.unaccounted(tied, Fast) == []


def test_every_model_is_made_the_same_twice() -> None:
    first, second = (zoo.make("unet") for _ in range(2))
    assert all(bool((a == b).all()) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
    assert bool((first[1][0] == second[1][0]).all())


def test_the_sample_is_of_the_zoo() -> None:
    assert len(set(zoo.SAMPLE)) == 10
    assert set(zoo.SAMPLE) <= set(zoo.ZOO)
    assert len(zoo.ZOO) >= 30
