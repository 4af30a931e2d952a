"""Targets: what is legal, how they read, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank_fx.errors import TargetError
from lowrank_fx.targets import Keep, Target, Tolerance, check_target, target_from_json

SHARES = st.floats(0, 1, exclude_min=True)
TARGETS: st.SearchStrategy[Target] = st.one_of(
    st.builds(Tolerance, st.floats(0, 1e300, exclude_min=True)),
    st.builds(Keep, params=SHARES, of=st.sampled_from(["model", "sites"])),
    st.builds(Keep, flops=SHARES, of=st.sampled_from(["model", "sites"])),
)


@given(TARGETS)
def test_json_round_trip(target: Target) -> None:
    text = json.dumps(target.to_json(), allow_nan=False)
    assert target_from_json(json.loads(text)) == target
    assert json.dumps(target_from_json(json.loads(text)).to_json()) == text
    assert check_target(target) is target


def test_how_targets_read() -> None:
    assert str(Tolerance()) == "Tolerance(0.1)"
    assert str(Keep(flops=0.6)) == "Keep(flops=0.6)"
    assert str(Keep(params=0.5, of="sites")) == 'Keep(params=0.5, of="sites")'
    assert (Keep(params=0.5).quantity, Keep(params=0.5).share) == ("params", 0.5)
    assert (Keep(flops=1).quantity, Keep(flops=1).share) == ("flops", 1)


def test_targets_are_values() -> None:
    assert Keep(params=0.5) == Keep(params=0.5) != Keep(flops=0.5)
    assert hash(Tolerance(0.2)) == hash(Tolerance(0.2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tolerance().error = 0.2  # type: ignore[misc]


NONE_OF_BOTH = "give exactly one of params= and flops=, such as Keep(params=0.5)"
SHARE = "the share that may remain must be above 0 and at most 1"
ERROR = "the error must be a finite number above 0, such as 0.1"
MALFORMED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Tolerance(0), f"Tolerance(0): {ERROR}"),
    (lambda: Tolerance(-0.1), f"Tolerance(-0.1): {ERROR}"),
    (lambda: Tolerance(math.nan), f"Tolerance(nan): {ERROR}"),
    (lambda: Tolerance(math.inf), f"Tolerance(inf): {ERROR}"),
    (lambda: Tolerance("0.1"), f"Tolerance('0.1'): {ERROR}"),  # type: ignore[arg-type]
    (lambda: Tolerance(True), f"Tolerance(True): {ERROR}"),
    (lambda: Tolerance(None), f"Tolerance(None): {ERROR}"),  # type: ignore[arg-type]
    (lambda: Keep(), f"Keep(params=None, flops=None, of='model'): {NONE_OF_BOTH}"),
    (lambda: Keep(params=0.5, flops=0.5), f"Keep(params=0.5, flops=0.5, of='model'): {NONE_OF_BOTH}"),
    (lambda: Keep(params=0), f"Keep(params=0): {SHARE}"),
    (lambda: Keep(params=1.01), f"Keep(params=1.01): {SHARE}"),
    (lambda: Keep(flops=-0.5), f"Keep(flops=-0.5): {SHARE}"),
    (lambda: Keep(flops=60), f"Keep(flops=60): {SHARE}"),
    (lambda: Keep(flops=math.nan), f"Keep(flops=nan): {SHARE}"),
    (lambda: Keep(flops=True), f"Keep(flops=True): {SHARE}"),
    (lambda: Keep(params="half"), f"Keep(params='half'): {SHARE}"),  # type: ignore[arg-type]
    (lambda: Keep(params=0.5, of="layers"), "Keep(of='layers'): the legal values are 'model' and 'sites'"),  # type: ignore[arg-type]
    (lambda: check_target(0.5), "target=0.5 is not a target; use Tolerance(0.1), Keep(params=0.5) or Keep(flops=0.5)"),
    (lambda: check_target(None), "target=None is not a target"),
    (lambda: check_target(Keep), "is not a target"),
]


@pytest.mark.parametrize(("make", "message"), MALFORMED, ids=[message[:30] for _, message in MALFORMED])
def test_malformed_targets_say_what_was_given_and_what_is_legal(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "data",
    [
        None, 3, "tolerance", [], {}, {"type": "tolerance"}, {"type": "tolerance", "error": "x"},
        {"type": "tolerance", "error": -1}, {"type": "latency", "error": 1}, {"type": "keep"}, {"type": ["keep"]},
        {"type": "keep", "quantity": "of", "share": 0.5, "of": "model"},
        {"type": "keep", "quantity": ["params"], "share": 0.5, "of": "model"},
        {"type": "keep", "quantity": "params", "share": 2, "of": "model"},
        {"type": "keep", "quantity": "params", "share": None, "of": "model"},
        {"type": "keep", "quantity": "params", "share": 0.5, "of": ["model"]},
        {"type": "keep", "quantity": "params", "share": 0.5},
    ],
)  # fmt: skip
def test_malformed_json_is_a_target_error(data: Any) -> None:
    with pytest.raises(TargetError):
        target_from_json(data)
