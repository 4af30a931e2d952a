"""Which tensors are the same numbers in memory: ties survive when their objects differ."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def memory_of(tensor: Tensor) -> object:
    """A key that tensors have in common which read the same numbers in the same arrangement.

    A tensor without memory (no numbers, or the meta device) has a key of its own.
    """
    if tensor.device.type == "meta" or not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def distinct_numbers(tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors hold, what shares its memory counted once.

    >>> import torch
    >>> shared = torch.ones(3)
    >>> distinct_numbers([shared, shared.detach(), torch.ones(2)])
    5
    """
    return sum(tensor.numel() for tensor in {memory_of(tensor): tensor for tensor in tensors}.values())
