"""The leaves of what a model returns, whatever it returns."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils import _pytree as pytree

_PLAIN = (dict, list, tuple)


def tree_leaves(value: Any) -> list[Any]:
    """As ``torch.utils._pytree.tree_leaves``, but an object that its own flattener refuses is a leaf.

    transformers registers one for its key-value cache, say, which raises for a cache with the layers of a Mamba.
    """
    return pytree.tree_leaves(value, is_leaf=_is_closed)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """What a model returned with every leaf changed, in the same classes.

    Mappings and dataclasses that pytree does not know are entered too. The order is that in which
    :func:`~lowrank_fx.compare.floating_outputs` meets the leaves, also among those of :func:`tree_leaves`.
    """
    leaves, spec = pytree.tree_flatten(value, is_leaf=_is_closed)
    return pytree.tree_unflatten([_map_leaf(leaf, change) for leaf in leaves], spec)


def _map_leaf(leaf: Any, change: Callable[[Any], Any]) -> Any:
    made: Any
    if isinstance(leaf, Mapping):
        entries = {key: map_leaves(entry, change) for key, entry in leaf.items()}
        if not hasattr(leaf, "__setitem__"):
            return entries
        made = copy.copy(leaf)
        for key, entry in entries.items():
            made[key] = entry
        return made
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        made = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(made, field.name, map_leaves(getattr(leaf, field.name, None), change))
        return made
    return change(leaf)


def _is_closed(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN or kind not in pytree.SUPPORTED_NODES:
        return False
    try:
        pytree.SUPPORTED_NODES[kind].flatten_fn(value)
    except Exception:  # whatever a flattener that somebody registered may raise
        return True
    return False


def met(walk: Callable[[Any, Callable[[Any], Any]], Any], value: Any) -> list[Any]:
    """What a function such as :func:`map_leaves` would hand to its ``change``, in its order."""
    found: list[Any] = []

    def note(part: Any) -> Any:
        found.append(part)
        return part

    walk(value, note)
    return found
