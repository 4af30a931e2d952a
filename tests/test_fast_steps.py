"""Steps of fast ranks, read off times that kernels of known tiles would take."""

from __future__ import annotations

import random

import pytest

from lowrank_fx.fast_steps import PROBES, fast_step, probe_ranks


@pytest.mark.parametrize("finest", [8, 16])
@pytest.mark.parametrize("offered", [12, 13, 23, 40])
@pytest.mark.parametrize("times", [1, 2, 4])
def test_the_tile_of_a_kernel_is_found(finest: int, offered: int, times: int) -> None:
    ranks = probe_ranks(range(finest, finest * (offered + 1), finest))
    assert len(ranks) == PROBES
    assert set(ranks) <= set(range(finest, finest * (offered + 1), finest))
    tile = finest * times
    # Part of the time is of no rank, and each measurement is off by up to half a percent.
    noise = random.Random(offered)
    taken = {rank: (1.0 - (-rank // tile)) * noise.uniform(0.995, 1.005) for rank in ranks}
    assert fast_step(taken, finest) == tile


def test_time_that_grows_with_the_rank_keeps_all_ranks() -> None:
    assert fast_step({rank: 5.0 + 0.3 * rank for rank in range(64, 136, 8)}, 8) == 8


def test_one_odd_measurement_decides_nothing() -> None:
    taken = {rank: float(rank) for rank in range(64, 136, 8)}
    taken[72] *= 2
    assert fast_step(taken, 8) == 8


@pytest.mark.parametrize("ranks", [range(1, 60), range(8, 96, 8), range(0)])
def test_too_few_ranks_or_all_of_them_are_not_probed(ranks: range) -> None:
    assert probe_ranks(ranks) == ()
