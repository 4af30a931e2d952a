"""Factors that candidates were compared with, kept while a plan is searched: candidates have most of theirs in common.

A search by ``Tolerance`` or ``Metric`` compares dozens of picks, many of which give a site the same variant and rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from lowrank_fx.forms import Factors

MOST_BYTES = 2**29
"""How much is kept at most. What comes first stays: candidates ask for their sites in one order, so what was asked for
longest ago is what is asked for next."""

Key: TypeAlias = tuple[str, str, int]
"""Site name, variant and rank."""


class FactorCache:
    """Factors by site, variant and rank. They are only to be read.

    Args:
        most: bytes that may be kept; what does not fit beside what is kept is made each time.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._kept: dict[Key, Factors] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def factors(self, key: Key, make: Callable[[], Factors]) -> Factors:
        """The factors of a key, made where they are not kept.

        Args:
            key: what they are of.
            make: makes them.
        """
        found = self._kept.get(key)
        if found is not None:
            return found
        made = make()
        size = _bytes_of(made)
        if self._bytes + size <= self._most:
            self._kept[key] = made
            self._bytes += size
        return made

    def clear(self) -> None:
        """Let go of all."""
        self._kept.clear()
        self._bytes = 0


def _bytes_of(factors: Factors) -> int:
    tensors = [*factors.tensors.values(), *([] if factors.shift is None else [factors.shift])]
    return sum(tensor.nbytes for tensor in tensors)
