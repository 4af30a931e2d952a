"""Targets: what is legal, how they read, and their JSON form."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lowrank_fx.errors import CallError, TargetError
from lowrank_fx.targets import Keep, Metric, Target, Tolerance, check_target, obeys_speed, target_from_json


def accuracy(model: nn.Module) -> float:
    return 0.75


SHARES = st.floats(0, 1, exclude_min=True)
TARGETS: st.SearchStrategy[Target] = st.one_of(
    st.builds(Tolerance, st.floats(0, 1e300, exclude_min=True)),
    st.builds(Keep, params=SHARES, of=st.sampled_from(["model", "sites"]), regauge=st.booleans()),
    st.builds(Keep, flops=SHARES, of=st.sampled_from(["model", "sites"])),
    st.builds(Keep, latency=SHARES, of=st.sampled_from(["model", "sites"])),
    st.builds(Metric, st.just(accuracy), st.floats(0, 1e300), of=st.sampled_from(["flops", "params"]),
              evaluations=st.integers(2, 99), higher_is_better=st.booleans()),
)  # fmt: skip


@given(TARGETS)
def test_json_round_trip(target: Target) -> None:
    text = json.dumps(target.to_json(), allow_nan=False)
    assert target_from_json(json.loads(text)) == target
    assert str(target_from_json(json.loads(text))) == str(target)
    assert repr(target_from_json(json.loads(text))) == repr(target)
    assert json.dumps(target_from_json(json.loads(text)).to_json()) == text
    assert check_target(target) is target


def test_how_targets_read() -> None:
    assert str(Tolerance()) == "Tolerance(0.1)"
    assert str(Keep(flops=0.6)) == "Keep(flops=0.6)"
    assert str(Keep(params=0.5, of="sites")) == 'Keep(params=0.5, of="sites")'
    assert str(Keep(params=0.5, regauge=True)) == "Keep(params=0.5, regauge=True)"
    assert (Keep(params=0.5).quantity, Keep(params=0.5).share) == ("params", 0.5)
    assert (Keep(flops=1).quantity, Keep(flops=1).share) == ("flops", 1)
    assert (Keep(latency=0.7).quantity, Keep(latency=0.7).share) == ("latency", 0.7)
    assert str(Keep(latency=0.7, of="sites")) == 'Keep(latency=0.7, of="sites")'
    assert str(Metric(accuracy, 0.01)) == "Metric(accuracy, max_drop=0.01)"
    assert str(Metric(accuracy, 2, of="params", evaluations=5, higher_is_better=False)) == (
        'Metric(accuracy, max_drop=2, of="params", evaluations=5, higher_is_better=False)'
    )
    assert (Metric(accuracy, 0.1).quantity, Metric(accuracy, 0.1, of="params").quantity) == ("flops", "params")


def test_who_obeys_speed() -> None:
    clocked: tuple[Target, ...] = (Tolerance(), Metric(accuracy, 0.1), Keep(latency=0.7))
    assert all(obeys_speed(target) for target in clocked)
    assert not obeys_speed(Keep(params=0.5))
    assert not obeys_speed(Keep(flops=0.5))


def test_targets_are_values() -> None:
    assert Keep(params=0.5) == Keep(params=0.5) != Keep(flops=0.5)
    assert hash(Tolerance(0.2)) == hash(Tolerance(0.2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tolerance().error = 0.2  # type: ignore[misc]
    assert Metric(accuracy, 0.1) == Metric(accuracy, 0.1) != Metric(accuracy, 0.2)
    assert Metric(accuracy, 0.1) != Metric(lambda model: 0.75, 0.1)
    assert hash(Metric(accuracy, 0.1)) == hash(Metric(accuracy, 0.1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Metric(accuracy, 0.1).max_drop = 0.2  # type: ignore[misc]


class Judge:
    def __call__(self, model: nn.Module) -> float:
        return 1.0

    def judge(self, model: nn.Module) -> float:
        return 1.0


def test_functions_are_called_by_their_names() -> None:
    for fn, name in (
        (accuracy, "accuracy"),
        (functools.partial(functools.partial(accuracy)), "accuracy"),
        (Judge(), "Judge"),
        (Judge().judge, "Judge.judge"),
        (lambda model: 1.0, "test_functions_are_called_by_their_names.<locals>.<lambda>"),
    ):
        assert Metric(fn, 0.1).name == f"{__name__}.{name}"


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (0.5, 0.5), (3, 3.0), (True, 1.0), (np.float32(0.5), 0.5), (np.bool_(True), 1.0), (np.array([0.25]), 0.25),
        (np.array(2), 2.0), (torch.tensor(0.5), 0.5), (torch.tensor([[7]]), 7.0), (torch.tensor(True), 1.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
    ],
)  # fmt: skip
def test_what_a_metric_may_return(value: object, number: float) -> None:
    scored = Metric(lambda model: value, 0.1).score(nn.Identity(), "the original")
    assert scored == number
    assert type(scored) is float


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"), ("0.5", "'0.5'"), (math.nan, "nan"), (-math.inf, "-inf"), ((0.5,), "(0.5,)"), (1j, "1j"),
        (torch.tensor([0.5, 0.6]), "tensor([0.5000, 0.6000])"), (torch.tensor([]), "tensor([])"),
        (torch.tensor(math.nan), "tensor(nan)"), (torch.tensor(1j), "tensor(0.+1.j)"),
        (np.array([1.0, 2.0]), "array([1., 2.])"), (np.array("x"), "array('x'"), ([0] * 99, "[0, 0, 0, 0"),
    ],
)  # fmt: skip
def test_what_a_metric_may_not_return(value: object, shown: str) -> None:
    def broken(model: nn.Module) -> object:
        return value

    target = Metric(broken, 0.1)
    with pytest.raises(TargetError) as caught:
        target.score(nn.Identity(), "the original", original=True)
    message = str(caught.value)
    assert message.startswith(f"the metric {target.name} returned {shown}")
    assert message.endswith("for the original; it must return a finite number")
    assert len(message) < 300


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float32("inf"), 10**400, OverflowError("exp"),
     ZeroDivisionError("no rows"), FloatingPointError()],
)  # fmt: skip
def test_of_a_plan_a_metric_that_is_not_finite_is_as_bad_as_can_be(value: object, higher_is_better: bool) -> None:
    def broken(model: nn.Module) -> object:
        if isinstance(value, Exception):
            raise value
        return value

    target = Metric(broken, 1e300, higher_is_better=higher_is_better)
    scored = target.score(nn.Identity(), "the plan that keeps 50.0% of its flops")
    assert scored == (-math.inf if higher_is_better else math.inf)
    assert not target.holds(0.0, scored)
    with pytest.raises(TargetError, match=f"the metric {re.escape(target.name)} (returned|failed for the original)"):
        target.score(nn.Identity(), "the original", original=True)


@pytest.mark.parametrize("error", [ZeroDivisionError("no rows"), CallError("2 arguments were captured")])
def test_a_metric_that_raises_is_named_with_the_plan(error: Exception) -> None:
    def broken(model: nn.Module) -> float:
        raise error

    target = Metric(broken, 0.1)
    cause = f"the metric {target.name} failed for the original: {type(error).__name__}: {error}"
    with pytest.raises(TargetError, match=re.escape(cause)) as caught:
        target.score(nn.Identity(), "the original", original=True)
    assert caught.value.__cause__ is error


def test_what_is_no_number_is_refused_for_a_plan_too() -> None:
    for fn in (lambda model: None, lambda model: model.weight):
        with pytest.raises(TargetError, match="for the plan"):
            Metric(fn, 0.1).score(nn.Identity(), "the plan")


def test_a_metric_from_json_says_that_it_has_no_function() -> None:
    read = target_from_json(Metric(accuracy, 0.1).to_json())
    assert isinstance(read, Metric)
    message = f"the metric {__name__}.accuracy was read from JSON, which keeps its name alone; give the function again"
    with pytest.raises(TargetError, match=re.escape(message)):
        read.fn(nn.Identity())
    with pytest.raises(TargetError, match=f"^{re.escape(message)}"):
        read.score(nn.Identity(), "the original")


def test_drops_and_what_rounding_takes_from_them() -> None:
    up, down = Metric(accuracy, 0.1), Metric(accuracy, 0.1, higher_is_better=False)
    assert up.drop(0.9, 0.5) == down.drop(0.5, 0.9) == 0.4
    assert up.drop(0.5, 0.9) == -0.4
    assert up.holds(0.9, 0.8)
    assert up.holds(0.4, 0.3)
    assert 0.4 - 0.3 > 0.1
    assert not up.holds(0.9, 0.7999)
    assert down.holds(0.3, 0.4)
    assert not down.holds(0.3, 0.41)
    assert up.holds(0.5, 0.9)
    assert Metric(accuracy, 0).holds(0.5, 0.5)
    assert not Metric(accuracy, 0).holds(0.5, 0.4999)


NONE_OF_BOTH = "give exactly one of params=, flops= and latency=, such as Keep(params=0.5)"
SHARE = "the share that may remain must be above 0 and at most 1"
ERROR = "the error must be a finite number above 0, such as 0.1"
DROP = "the drop must be a finite number, 0 or more, in the metric's own unit, such as 0.01"
FUNCTION = "give a function from a model to a number, as in Metric(accuracy, max_drop=0.01)"
MALFORMED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Tolerance(0), f"Tolerance(0): {ERROR}"),
    (lambda: Tolerance(-0.1), f"Tolerance(-0.1): {ERROR}"),
    (lambda: Tolerance(math.nan), f"Tolerance(nan): {ERROR}"),
    (lambda: Tolerance(math.inf), f"Tolerance(inf): {ERROR}"),
    (lambda: Tolerance("0.1"), f"Tolerance('0.1'): {ERROR}"),  # type: ignore[arg-type]
    (lambda: Tolerance(True), f"Tolerance(True): {ERROR}"),
    (lambda: Tolerance(None), f"Tolerance(None): {ERROR}"),  # type: ignore[arg-type]
    (lambda: Keep(), f"Keep(params=None, flops=None, of='model', regauge=False, latency=None): {NONE_OF_BOTH}"),
    (
        lambda: Keep(params=0.5, flops=0.5),
        f"Keep(params=0.5, flops=0.5, of='model', regauge=False, latency=None): {NONE_OF_BOTH}",
    ),
    (lambda: Keep(params=0), f"Keep(params=0): {SHARE}"),
    (lambda: Keep(params=1.01), f"Keep(params=1.01): {SHARE}"),
    (lambda: Keep(flops=-0.5), f"Keep(flops=-0.5): {SHARE}"),
    (lambda: Keep(flops=60), f"Keep(flops=60): {SHARE}"),
    (lambda: Keep(flops=math.nan), f"Keep(flops=nan): {SHARE}"),
    (lambda: Keep(flops=True), f"Keep(flops=True): {SHARE}"),
    (lambda: Keep(params="half"), f"Keep(params='half'): {SHARE}"),  # type: ignore[arg-type]
    (lambda: Keep(params=0.5, of="layers"), "Keep(of='layers'): the legal values are 'model' and 'sites'"),  # type: ignore[arg-type]
    (lambda: Metric(0.9, 0.01), f"Metric(0.9): {FUNCTION}"),  # type: ignore[arg-type]
    (lambda: Metric(nn.Identity(), 0.01), f"Metric(Identity()): {FUNCTION}"),
    (lambda: Metric(accuracy, -0.01), f"Metric(accuracy, max_drop=-0.01): {DROP}"),
    (lambda: Metric(accuracy, math.inf), f"Metric(accuracy, max_drop=inf): {DROP}"),
    (lambda: Metric(accuracy, "1 %"), f"Metric(accuracy, max_drop='1 %'): {DROP}"),  # type: ignore[arg-type]
    (lambda: Metric(accuracy, True), f"Metric(accuracy, max_drop=True): {DROP}"),
    (
        lambda: Metric(accuracy, 0.1, of="model"),  # type: ignore[arg-type]
        "Metric(of='model'): the legal values are 'flops', 'params' and 'latency'",
    ),
    (lambda: Metric(accuracy, 0.1, evaluations=1), "Metric(evaluations=1): give a whole number of at least 2"),
    (lambda: Metric(accuracy, 0.1, evaluations=9.0), "Metric(evaluations=9.0): give a whole number"),  # type: ignore[arg-type]
    (lambda: Metric(accuracy, 0.1, higher_is_better=1), "Metric(higher_is_better=1): give True or False"),  # type: ignore[arg-type]
    (
        lambda: check_target(0.5),
        "target=0.5 is not a target; use Tolerance(0.1), Keep(params=0.5), Keep(flops=0.5), Keep(latency=0.7) or "
        "Metric(accuracy, max_drop=0.01)",
    ),
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
        {"type": "keep", "quantity": "of", "share": 0.5, "of": "model", "regauge": False},
        {"type": "keep", "quantity": ["params"], "share": 0.5, "of": "model", "regauge": False},
        {"type": "keep", "quantity": "params", "share": 2, "of": "model", "regauge": False},
        {"type": "keep", "quantity": "params", "share": None, "of": "model", "regauge": False},
        {"type": "keep", "quantity": "params", "share": 0.5, "of": ["model"], "regauge": False},
        {"type": "keep", "quantity": "params", "share": 0.5},
        {"type": "keep", "quantity": "params", "share": 0.5, "of": "model"},
        {"type": "keep", "quantity": "params", "share": 0.5, "of": "model", "regauge": 1},
        {"type": "keep", "quantity": "flops", "share": 0.5, "of": "model", "regauge": True},
        {"type": "metric"}, {"type": "metric", "fn": "a.b", "max_drop": 0.1, "of": "flops", "evaluations": 12},
        *({**Metric(accuracy, 0.1).to_json(), **wrong} for wrong in
          ({"fn": None}, {"fn": 3}, {"max_drop": "x"}, {"of": ["flops"]}, {"evaluations": None})),
    ],
)  # fmt: skip
def test_malformed_json_is_a_target_error(data: Any) -> None:
    with pytest.raises(TargetError):
        target_from_json(data)
