"""What a user gives, looked at before anything is done with it: names, a shard, the start of a loader."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from lowrank_fx.batches import Call
from lowrank_fx.errors import CalibrationError, OptionError


def opened(calls: Iterator[tuple[int, Call]]) -> tuple[tuple[int, Call], Iterator[tuple[int, Call]]]:
    """The first of a loader's calls, and all of them.

    Raises:
        CalibrationError: there is none.
    """
    first = next(calls, None)
    if first is None:
        raise CalibrationError(
            "the loader gave no batch; pass an iterable of batches that has not been read to its end"
        )
    return first, itertools.chain([first], calls)


def check_names(option: str, names: Iterable[str]) -> tuple[str, ...]:
    """``names`` as a tuple.

    Raises:
        OptionError: it is one string, no iterable, or holds something else than strings.
    """
    kept = tuple(names) if isinstance(names, Iterable) and not isinstance(names, str | bytes) else (names,)
    if isinstance(names, str) or not all(isinstance(name, str) for name in kept):
        raise OptionError(f"{option}={names!r}: give a list or tuple of names, such as {option}=('...',)")
    return kept


def check_shard(shard: tuple[int, int] | None) -> tuple[int, int]:
    """``shard`` as (i, n); the only one of one where it is None.

    Raises:
        OptionError: it is no such pair.
    """
    if shard is None:
        return 0, 1
    try:
        index, count = shard
        if type(index) is int and type(count) is int and 0 <= index < count:
            return index, count
    except (TypeError, ValueError):
        pass
    raise OptionError(f"shard={shard!r}: give (i, n) with 0 <= i < n, such as (0, 4) for the first of four")


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says it has; None if it does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
