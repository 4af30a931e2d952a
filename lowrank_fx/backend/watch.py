"""Telling whether the tensors that factors were made of are still what they were.

Looked at on every call: the tensor's memory and its version, which nearly every in-place operator counts up. Two ways
around escape that. Fused optimizers write without counting: :func:`on_optimizer_step` hears of every optimizer's step.
And whatever is written through ``tensor.data`` is not counted either: so each call also compares a few numbers of one
tensor, the next one in turn, with what they were. A write that changes none of those is found by nothing but
:func:`lowrank_fx.refresh`, which the user calls.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

PROBED = 8
"""Numbers of a tensor that are compared."""

PROBE_EVERY = 64
"""Calls from one probe to the next on an accelerator, which each of them brings to a halt."""

_VERSION = operator.attrgetter("_version")


class Watched(NamedTuple):
    """A tensor as it was when the watch began.

    Attributes:
        name: for messages.
        tensor: what is watched.
        pointer: of its memory.
        version: counts its in-place operators; None where torch does not count (inference tensors).
        places: of a few of its numbers, looking into the memory that ``pointer`` names.
        sample: those numbers.
    """

    name: str
    tensor: Tensor
    pointer: int
    version: int | None
    places: Tensor
    sample: Tensor


class _Columns:
    """What is looked at on every call, so laid out that no line of Python runs per tensor.

    Args:
        entries: what is watched.
    """

    def __init__(self, entries: Sequence[Watched]) -> None:
        self._tensors = [entry.tensor for entry in entries]
        self._pointers = [entry.pointer for entry in entries]
        self._counted = [entry.tensor for entry in entries if entry.version is not None]
        self._versions = [entry.version for entry in entries if entry.version is not None]

    def hold(self) -> bool:
        """Whether all pointers and versions are what they were."""
        return (
            list(map(Tensor.data_ptr, self._tensors)) == self._pointers
            and list(map(_VERSION, self._counted)) == self._versions
        )


class Watch:
    """Watches parameters and buffers.

    Args:
        tensors: what is watched, by its name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._entries = [_watched(name, tensor) for name, tensor in tensors.items()]
        self._columns = _Columns(self._entries)
        self._next = 0
        self._calls = 0

    def part(self, names: Sequence[str], tensors: Sequence[Tensor]) -> Watch:
        """A watch over some of the tensors, since this one began; those that are new are watched by both from now on.

        Args:
            names: for messages.
            tensors: what the part watches.
        """
        known = {id(entry.tensor): entry for entry in self._entries}
        made = Watch({})
        for name, tensor in zip(names, tensors, strict=True):
            if id(tensor) not in known:
                known[id(tensor)] = _watched(name, tensor)
                self._entries.append(known[id(tensor)])
            made._entries.append(known[id(tensor)])
        self._columns, made._columns = _Columns(self._entries), _Columns(made._entries)
        return made

    def changed(self, *, every: bool = False) -> str | None:
        """The name of a tensor that is not what it was; None if none is found.

        Args:
            every: compare numbers of all tensors, not of the next one alone.
        """
        if not self._columns.hold():
            for name, tensor, pointer, version, _, _ in self._entries:
                if tensor.data_ptr() != pointer or (version is not None and tensor._version != version):
                    return name
        if every:
            return next((entry.name for entry in self._entries if not _same(entry)), None)
        return self._probe()

    def replaced(self, names: Sequence[str], tensors: Sequence[Tensor]) -> str | None:
        """The first name under which another tensor is watched than the one that is given with it."""
        known = {entry.name: entry.tensor for entry in self._entries}
        return next(
            (name for name, own in zip(names, tensors, strict=True) if known.get(name, own) is not own),
            None,
        )

    def _probe(self) -> str | None:
        if not self._entries:
            return None
        self._calls += 1
        position = self._next % len(self._entries)
        entry = self._entries[position]
        if entry.tensor.device.type != "cpu" and self._calls % PROBE_EVERY:
            return None
        self._next = position + 1
        return None if _same(entry) else entry.name


def on_optimizer_step(react: Callable[[Sequence[Tensor]], None]) -> Any:
    """Call ``react`` with an optimizer's parameters after each step of any optimizer."""

    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        react([parameter for group in optimizer.param_groups for parameter in group["params"]])

    return register_optimizer_step_post_hook(stepped)


def _watched(name: str, tensor: Tensor) -> Watched:
    with torch.no_grad():
        places = _places(tensor.detach())
        return Watched(name, tensor, tensor.data_ptr(), _version(tensor), places, places.clone())


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _places(tensor: Tensor) -> Tensor:
    """A view of a few numbers of a tensor, evenly spaced over its memory; over its first slice's if there are gaps."""
    while tensor.numel() != _span(tensor):
        tensor = tensor[0]
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat[:: max(flat.numel() // PROBED, 1)][:PROBED]


def _span(tensor: Tensor) -> int:
    """How many places of memory lie from the first number of a tensor to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _same(entry: Watched) -> bool:
    # NaN in a weight is no change.
    return torch.equal(entry.places, entry.sample) or bool(
        torch.allclose(entry.places, entry.sample, rtol=0, atol=0, equal_nan=True)
    )
