"""Example calls as JSON: nested containers, scalars, and tensors as dtype and shape. Their values are not kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lowrank_fx.batches import Call

LARGEST = 2 * 2**30
"""Bytes that all tensors of a call may have together."""

_DEEPEST = 40

_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
    )
}


def encode_call(call: Call) -> Any:
    """A call as JSON data; None where something occurs in it that JSON does not know, or it is too large to make."""
    try:
        data = _encode((list(call.args), call.kwargs), 0)
        _Decoder(torch.device("meta")).decode(data)
    except (TypeError, ValueError, UnicodeError):
        return None
    return data


def decode_call(data: Any, device: torch.device | str = "cpu") -> Call:
    """A call whose tensors hold zeros.

    Args:
        data: what :func:`encode_call` made.
        device: where the tensors are made; ``"meta"`` only checks the data.

    Raises:
        ValueError: the data is not of that form, or names tensors of more than 2 GiB.
    """
    made = _Decoder(torch.device(device)).decode(data)
    if type(made) is not tuple or [type(each) for each in made] != [list, dict]:
        raise ValueError("call is no list of arguments and dictionary of keyword arguments")
    return Call(tuple(made[0]), made[1])


def _encode(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError("too deep")
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(item, depth + 1) for item in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(item, depth + 1) for key, item in value.items()}}
    raise TypeError(type(value).__name__)


class _Decoder:
    """Reads one call; counts the bytes of its tensors before they are made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.left = LARGEST

    def decode(self, data: Any, depth: int = 0) -> Any:
        if not isinstance(data, dict) or len(data) != 1 or depth > _DEEPEST:
            raise ValueError(f"an example call holds {data!r:.60}")
        ((kind, value),) = data.items()
        if kind == "tensor":
            return self._tensor(value)
        if kind == "value" and (value is None or isinstance(value, bool | int | float | str)):
            return value
        if kind == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if kind == "dict" and isinstance(value, dict):
            return {key: self.decode(item, depth + 1) for key, item in value.items()}
        if kind in ("list", "tuple") and isinstance(value, list):
            items = [self.decode(item, depth + 1) for item in value]
            return items if kind == "list" else tuple(items)
        raise ValueError(f"an example call holds {data!r:.60}")

    def _tensor(self, value: Any) -> Tensor:
        if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str) or value[0] not in _DTYPES:
            raise ValueError(f"{value!r:.60} is no dtype and shape")
        dtype, shape = _DTYPES[value[0]], value[1]
        if not isinstance(shape, list) or len(shape) > 64:
            raise ValueError(f"{value!r:.60} is no dtype and shape")
        # A size of zero does not excuse the others.
        size = dtype.itemsize
        for count in shape:
            if type(count) is not int or not 0 <= count <= LARGEST:
                raise ValueError(f"{value!r:.60} is no dtype and shape")
            size *= max(count, 1)
            if size > self.left:
                raise ValueError(f"the tensors of the example call have more than {LARGEST >> 30} GiB")
        self.left -= size
        return torch.zeros(shape, dtype=dtype, device=self.device)
