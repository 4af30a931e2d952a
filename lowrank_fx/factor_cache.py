"""Factors that candidates were compared with, kept while a plan is searched: candidates have most of theirs in common.

A search by ``Tolerance`` or ``Metric`` compares dozens of picks, many of which give a site the same variant and rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

from lowrank_fx.forms import Factors

MOST_BYTES = 2**29
"""How much is kept at most; what was asked for longest ago goes first."""

Key: TypeAlias = tuple[str, str, int]
"""Site name, variant and rank."""


class FactorCache:
    """Factors by site, variant and rank. They are only to be read.

    Args:
        most: bytes that may be kept; factors larger than that alone are made each time.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._kept: OrderedDict[Key, Factors] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def factors(self, key: Key, make: Callable[[], Factors]) -> Factors:
        """The factors of a key, made where they are not kept.

        Args:
            key: what they are of.
            make: makes them.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._kept[key] = make()
        self._bytes += _bytes_of(made)
        while self._bytes > self._most:
            self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        return made

    def clear(self) -> None:
        """Let go of all."""
        self._kept.clear()
        self._bytes = 0


def _bytes_of(factors: Factors) -> int:
    tensors = [*factors.tensors.values(), *([] if factors.shift is None else [factors.shift])]
    return sum(tensor.nbytes for tensor in tensors)
