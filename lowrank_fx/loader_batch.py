"""A loader's batch as it came: rows cut, tensors changed, whatever holds them.

A batch is bound to ``forward`` once and then known by its arguments alone. A loss of the user's wants all of it, the
labels too, and of the rows that a model has seen just those.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lowrank_fx._describe import is_dataclass, is_mapping
from lowrank_fx._leaves import met

Change: TypeAlias = Callable[[Tensor], Tensor]


def map_tensors(batch: Any, change: Change, done: Mapping[int, Tensor] | None = None) -> Any:
    """The batch with every tensor changed, in new containers of the same classes.

    Lists, tuples, named tuples, mappings and dataclasses are entered; any other object stays as it is.

    Args:
        batch: the batch.
        change: of one tensor.
        done: by ``id`` the tensors that are changed already.
    """
    known = done or {}

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else change(value)

    return _rebuilt(batch, changed)


def tensors_in(batch: Any) -> list[Tensor]:
    """The tensors that :func:`map_tensors` would change, in its order."""
    return met(map_tensors, batch)


def cut_batch(batch: Any, size: int, start: int, stop: int, done: Mapping[int, Tensor]) -> Any:
    """The rows ``start`` to ``stop`` (exclusive) of a batch.

    Args:
        batch: with ``size`` rows. What has that first dimension is cut: tensors, arrays, and lists and tuples of
            that length, unless they hold tensors that are all cut themselves (a pair of two images and two labels).
        size: number of rows.
        start: first row.
        stop: first row that is left out.
        done: by ``id`` the tensors that are cut already.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return done[id(value)] if id(value) in done else cut_tensor(value, size, start, stop)
        shape = getattr(value, "shape", None) if hasattr(value, "__array__") else None
        if (shape and shape[0] == size) or _is_rows(value, size):
            return value[start:stop]
        return value

    return _rebuilt(batch, cut)


def cut_tensor(tensor: Tensor, size: int, start: int, stop: int) -> Tensor:
    """The rows of a tensor as a view, if it has ``size`` of them; else the tensor itself."""
    if tensor.dim() == 0 or tensor.is_nested or tensor.shape[0] != size:
        return tensor
    if tensor.layout is torch.strided:
        return tensor[start:stop]
    coordinates = tensor.to_sparse(layout=torch.sparse_coo)  # no other layout can be indexed by rows
    return coordinates.index_select(0, torch.arange(start, stop, device=tensor.device)).to_sparse(layout=tensor.layout)


def plain_batch(batch: Any) -> Any:
    """The batch with a dictionary in the place of every mapping of another class."""
    if is_mapping(batch):
        return {key: plain_batch(batch[key]) for key in batch.keys()}  # noqa: SIM118 (not every mapping iterates)
    if type(batch) in (list, tuple):
        return type(batch)(plain_batch(item) for item in batch)
    return batch


def _is_rows(value: Any, size: int) -> bool:
    """Whether a list or tuple has an entry per row."""
    if not isinstance(value, list | tuple) or hasattr(value, "_fields") or len(value) != size:
        return False
    tensors = tensors_in(value)
    return not tensors or any(tensor.dim() == 0 or tensor.shape[0] != size for tensor in tensors)


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value with every part changed; what ``change`` gives back as it was is entered."""
    made = change(value)
    if made is not value or isinstance(value, Tensor):
        return made
    if is_mapping(value):
        entries = {key: _rebuilt(value[key], change) for key in value.keys()}  # noqa: SIM118
        if type(value) is dict or not hasattr(value, "__setitem__"):
            return entries
        made = copy.copy(value)
        for key, entry in entries.items():
            made[key] = entry
        return made
    if is_dataclass(value):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                object.__setattr__(made, field.name, _rebuilt(getattr(value, field.name), change))
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rebuilt(item, change) for item in value))
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(item, change) for item in value)
    return value
