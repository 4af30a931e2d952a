"""Telling whether the tensors that factors were made of are still what they were.

Looked at on every call: the tensor's memory and its version, which nearly every in-place operator counts up. Two ways
around escape that. Fused optimizers write without counting: :func:`on_optimizer_step` hears of every optimizer's step.
And whatever is written through ``tensor.data`` is not counted either: so each call also compares a few numbers of one
tensor, the next one in turn, with what they were. A write that changes none of those is found by nothing but
:func:`lowrank_fx.refresh`, which the user calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

PROBED = 8
"""Numbers of a tensor that are compared."""

PROBE_EVERY = 64
"""Calls from one probe to the next on an accelerator, which each of them brings to a halt."""


class Watch:
    """Watches the parameters and buffers of one graph.

    Args:
        names: for messages.
        tensors: what is watched.
    """

    def __init__(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._names = tuple(names)
        self._tensors = tuple(tensors)
        self._entries = [(tensor, tensor.data_ptr(), _version(tensor)) for tensor in tensors]
        self._samples = [_sample(tensor) for tensor in tensors]
        self._next = 0
        self._calls = 0

    def changed(self) -> str | None:
        """The name of a tensor that is not what it was; None if none is found."""
        for position, (tensor, pointer, version) in enumerate(self._entries):
            if tensor.data_ptr() != pointer or (version is not None and tensor._version != version):
                return self._names[position]
        return self._probe()

    def _probe(self) -> str | None:
        if not self._tensors:
            return None
        self._calls += 1
        position = self._next % len(self._tensors)
        tensor = self._tensors[position]
        if tensor.device.type != "cpu" and self._calls % PROBE_EVERY:
            return None
        self._next = position + 1
        return None if _same(_sample(tensor), self._samples[position]) else self._names[position]


def on_optimizer_step(react: Callable[[Sequence[Tensor]], None]) -> Any:
    """Call ``react`` with an optimizer's parameters after each step of any optimizer."""

    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        react([parameter for group in optimizer.param_groups for parameter in group["params"]])

    return register_optimizer_step_post_hook(stepped)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> Tensor:
    """A few numbers, evenly spaced over the tensor's memory."""
    with torch.no_grad():
        flat = tensor.detach().as_strided((tensor.numel(),), (1,)) if _dense(tensor) else tensor.detach().reshape(-1)
        return flat[:: max(flat.numel() // PROBED, 1)][:PROBED].clone()


def _dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.storage_offset() == 0


def _same(one: Tensor, other: Tensor) -> bool:
    # NaN in a weight is no change.
    return torch.equal(one, other) or bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True))
