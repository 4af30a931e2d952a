"""A user's call in the form that a captured graph takes, or why it cannot be one; no graph is needed for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_fx.batches import Call
from lowrank_fx.errors import CallError
from lowrank_fx.signature import CallSignature


def forward(ids: Any, mask: Any = None, *, scale: float = 1.0, names: Any = ("a",), **extra: Any) -> None: ...


def variadic(*parts: Any) -> None: ...


IDS, MASK = torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 4)


def captured(
    *args: Any,
    function: Callable[..., Any] = forward,
    guards: Any = None,
    ignored: frozenset[str] = frozenset(),
    **kw: Any,
) -> CallSignature:
    return CallSignature(inspect.signature(function), Call(args, kw), guards, ignored)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((IDS, MASK), {}), ((IDS,), {"mask": MASK}), ((), {"mask": MASK, "ids": IDS}), ((IDS, MASK), {"scale": 1.0})],
)
def test_every_way_to_write_a_call_becomes_the_captured_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bound, named = captured(IDS, mask=MASK).bind(args, kwargs)
    assert len(bound) == 1
    assert bound[0] is IDS
    assert list(named) == ["mask"]
    assert named["mask"] is MASK


def test_keywords_come_in_the_captured_order() -> None:
    _, named = captured(ids=IDS, mask=MASK).bind((), {"mask": MASK, "ids": IDS})
    assert list(named) == ["ids", "mask"]


def test_a_default_that_was_given_at_capture_may_be_left_out() -> None:
    _, named = captured(IDS, scale=1.0).bind((IDS,), {})
    assert named == {"scale": 1.0}


def test_positional_arguments_without_names() -> None:
    bound, _ = captured(IDS, MASK, function=variadic).bind((IDS, MASK), {})
    assert len(bound) == 2
    with pytest.raises(CallError, match=r"\*parts\[1\] is missing"):
        captured(IDS, MASK, function=variadic).bind((IDS,), {})


def test_names_that_the_model_does_not_read_may_come_or_not() -> None:
    calls = captured(IDS, ignored=frozenset({"labels"}))
    assert calls.bind((IDS,), {"labels": IDS}) == calls.bind((IDS,), {})


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {"mask": MASK}, "missing a required argument: 'ids'"),
        ((IDS,), {}, "argument mask is missing; the model was captured with ids, mask"),
        ((IDS, MASK), {"scale": 2.0}, r"argument scale=2.0 was not given when the model was captured"),
        ((IDS, MASK), {"labels": IDS}, r"argument labels=a tensor of shape \(3, 4\) was not given"),
        (([IDS], MASK), {}, "nested differently"),
        ((IDS, None), {}, "input 1 was a tensor when the model was captured, now it is None"),
        ((IDS, 3), {}, "input 1 was a tensor when the model was captured, now it is 3"),
        ((IDS[0], MASK), {}, r"input 0 has shape \(4,\), captured with 2 dimensions"),
        ((IDS.float(), MASK), {}, "input 0 is torch.float32, captured with torch.int64"),
        ((IDS, MASK.bool()), {}, "input 1 is torch.bool, captured with torch.float32"),
    ],
)
def test_a_call_that_does_not_fit_says_why(args: tuple[Any, ...], kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(CallError, match=said):
        captured(IDS, mask=MASK).bind(args, kwargs)


def test_another_precision_fits() -> None:
    bound, named = captured(IDS, mask=MASK).bind((IDS.int(),), {"mask": MASK.bfloat16()})
    assert bound[0].dtype == torch.int32
    assert named["mask"].dtype == torch.bfloat16


def test_a_constant_has_to_be_the_captured_one() -> None:
    with pytest.raises(CallError, match=r"input 1 is 3.0, but the model was captured with 2.0, .*forward_args="):
        captured(IDS, scale=2.0).bind((IDS,), {"scale": 3.0})
    with pytest.raises(CallError, match=r"input 1 is a tensor of shape \(\), but the model was captured with 2.0"):
        captured(IDS, scale=2.0).bind((IDS,), {"scale": torch.tensor(2.0)})


def test_a_broken_guard_is_told_with_the_shapes() -> None:
    def guards(*leaves: Tensor) -> None:
        assert leaves[0].shape[1] == 4, "ids.size()[1] == 4"

    calls = captured(IDS, guards=guards)
    assert calls.bind((IDS[:0],), {})[0][0].shape == (0, 4)
    with pytest.raises(CallError, match=r"inputs of shape \(3, 2\) break .*ids.size\(\)\[1\] == 4"):
        calls.bind((IDS[:, :2],), {})


def test_shapes_that_fit_are_checked_once_and_others_still_are() -> None:
    asked: list[tuple[int, ...]] = []
    calls = captured(IDS, MASK, scale=1.0, guards=lambda ids, mask, scale: asked.append(tuple(ids.shape)))
    for ids in (IDS, IDS + 1, IDS[:2], IDS):
        bound, named = calls.bind((ids, MASK), {"scale": 1.0})
        assert bound[0] is ids
        assert bound[1] is MASK
        assert named == {"scale": 1.0}
    assert asked == [(3, 4), (2, 4)]
    with pytest.raises(CallError, match="captured with 2 dimensions"):
        calls.bind((IDS[0], MASK), {"scale": 1.0})
    with pytest.raises(CallError, match=r"torch.float32, captured with torch.int64"):
        calls.bind((IDS.float(), MASK), {"scale": 1.0})
    with pytest.raises(CallError, match=r"input 2 is 2\.0"):
        calls.bind((IDS, MASK), {"scale": 2.0})
    with pytest.raises(CallError, match="now it is 3"):
        calls.bind((IDS, 3), {"scale": 1.0})
