"""The leaves of what a model returns, whatever it returns."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

_PLAIN = (dict, list, tuple)


def tree_leaves(value: Any) -> list[Any]:
    """As ``torch.utils._pytree.tree_leaves``, but an object that its own flattener refuses is a leaf.

    transformers registers one for its key-value cache, say, which raises for a cache with the layers of a Mamba.
    """
    return pytree.tree_leaves(value, is_leaf=_is_closed)


def _is_closed(value: Any) -> bool:
    kind = type(value)
    if kind in _PLAIN or kind not in pytree.SUPPORTED_NODES:
        return False
    try:
        pytree.SUPPORTED_NODES[kind].flatten_fn(value)
    except Exception:  # whatever a flattener that somebody registered may raise
        return True
    return False
