"""What layers cost: against counting the numbers of real layers, and torch's own flop counter."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_fx import cost

SIZES = st.integers(2, 5000)


def flops_of(model: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(shape))
    return int(counter.get_total_flops())


def params_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_linear_layers_count_as_torch_counts() -> None:
    dense = nn.Linear(6, 4, bias=False)
    pair = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False))
    assert cost.dense_params(4, 6) == params_of(dense)
    assert cost.pair_params(4, 6, 2) == params_of(pair)
    assert cost.dense_flops(4, 6, 15) == flops_of(dense, 3, 5, 6)
    assert cost.pair_flops(4, 6, 2, 15) == flops_of(pair, 3, 5, 6)


def test_convolutions_count_as_torch_counts() -> None:
    dense = nn.Conv2d(3, 8, (3, 5), stride=2, padding=1, bias=False)
    pair = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), stride=2, padding=1, bias=False), nn.Conv2d(4, 8, 1, bias=False)
    )  # fmt: skip
    height, width = dense(torch.zeros(1, 3, 9, 9)).shape[2:]
    rows = 2 * height * width
    assert cost.dense_params(8, 3 * 15) == params_of(dense)
    assert cost.pair_params(8, 3 * 15, 4) == params_of(pair)
    assert cost.dense_flops(8, 3 * 15, rows) == flops_of(dense, 2, 3, 9, 9)
    assert cost.pair_flops(8, 3 * 15, 4, rows) == flops_of(pair, 2, 3, 9, 9)


def test_grouped_layers_count_as_torch_counts() -> None:
    dense = nn.Conv2d(6, 12, 3, groups=3, bias=False)
    pair = nn.Sequential(
        nn.Conv2d(6, 3 * 2, 3, groups=3, bias=False), nn.Conv2d(3 * 2, 12, 1, groups=3, bias=False)
    )  # fmt: skip
    rows = 2 * 7 * 7
    assert cost.dense_params(12, 18) == params_of(dense)
    assert cost.pair_params(12, 18, 2, 3) == params_of(pair)
    assert cost.dense_flops(12, 18, rows) == flops_of(dense, 2, 6, 9, 9)
    assert cost.pair_flops(12, 18, 2, rows, 3) == flops_of(pair, 2, 6, 9, 9)


@given(block=SIZES, in_features=SIZES, groups=st.integers(1, 64), rank=st.integers(1, 100))
def test_groups_are_so_many_layers_side_by_side(block: int, in_features: int, groups: int, rank: int) -> None:
    out = groups * block
    assert cost.pair_params(out, in_features, rank, groups) == groups * cost.pair_params(block, in_features, rank)
    assert cost.dense_params(out, in_features) == groups * cost.dense_params(block, in_features)
    assert cost.break_even_rank(out, in_features, groups) == cost.break_even_rank(block, in_features)
    assert cost.candidate_ranks(out, in_features, 8, groups) == cost.candidate_ranks(block, in_features, 8)


def test_an_empty_weight_has_no_rank() -> None:
    assert cost.break_even_rank(0, 0) == cost.break_even_rank(0, 5) == cost.break_even_rank(5, 0) == 0
    assert cost.candidate_ranks(0, 0, 8) == ()


@given(out_features=SIZES, in_features=SIZES, rows=st.integers(1, 10_000))
def test_weights_and_flops_break_even_at_the_same_rank(out_features: int, in_features: int, rows: int) -> None:
    exact = Fraction(out_features * in_features, out_features + in_features)
    assert cost.break_even_rank(out_features, in_features) == pytest.approx(float(exact), rel=1e-15)
    for rank in (int(exact), int(exact) + 1):
        saves = rank < exact
        assert (
            cost.pair_params(out_features, in_features, rank) < cost.dense_params(out_features, in_features)
        ) is saves
        dense, pair = (cost.dense_flops(out_features, in_features, rows),
                       cost.pair_flops(out_features, in_features, rank, rows))  # fmt: skip
        assert (pair < dense) is saves


@given(out_features=SIZES, in_features=SIZES, multiple=st.sampled_from((8, 16)))
def test_every_rank_on_offer_saves_and_none_is_missing(out_features: int, in_features: int, multiple: int) -> None:
    exact = Fraction(out_features * in_features, out_features + in_features)
    step = multiple if exact >= 64 else 1
    expected = tuple(rank for rank in range(1, out_features + in_features) if rank < exact and rank % step == 0)
    assert cost.candidate_ranks(out_features, in_features, multiple) == expected


@pytest.mark.parametrize(
    ("shape", "multiple", "expected"),
    [
        ((2, 2), 8, ()),  # break-even at 1: a pair of rank 1 already costs as much
        ((2, 3), 8, (1,)),
        ((126, 126), 8, tuple(range(1, 63))),  # break-even 63: any rank
        ((128, 128), 8, tuple(range(8, 64, 8))),  # break-even 64: multiples only, and not 64 itself
        ((128, 128), 16, (16, 32, 48)),
        ((384, 1536), 16, tuple(range(16, 305, 16))),  # break-even 307.2
    ],
)
def test_ranks_on_offer(shape: tuple[int, int], multiple: int, expected: tuple[int, ...]) -> None:
    assert cost.candidate_ranks(*shape, multiple) == expected


@given(out_features=SIZES, in_features=SIZES, multiple=st.sampled_from((8, 16)))
def test_fast_ranks_are_those_on_offer_that_are_multiples(out_features: int, in_features: int, multiple: int) -> None:
    offered = cost.candidate_ranks(out_features, in_features, multiple)
    small = cost.break_even_rank(out_features, in_features) < 64
    assert cost.fast_ranks(offered) == tuple(rank for rank in offered if small or rank % 16 == 0)


def test_a_site_keeps_a_rank_where_none_is_fast() -> None:
    assert cost.fast_ranks((8,)) == (8,)
    assert cost.fast_ranks(()) == ()
