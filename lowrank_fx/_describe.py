"""What the user gave, in a few words for a message: types, dtypes, shapes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch

_PREFIX: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def describe(value: Any) -> str:
    """A value as its type and shapes.

    >>> describe({"input_ids": torch.zeros(8, 16, dtype=torch.int64), "labels": [0] * 8})
    'dict(input_ids: int64[8, 16], labels: list of 8)'
    """
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    name = type(value).__name__
    if is_mapping(value) or is_dataclass(value):
        if is_mapping(value):
            items = {key: value[key] for key in value.keys()}  # noqa: SIM118 (not every mapping iterates over its keys)
        else:
            items = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        named = [f"{key}: {_describe_item(item)}" for key, item in items.items()]
        return f"{name}({', '.join(named[:8] + ['...'] * (len(named) > 8))})"
    if isinstance(value, tuple | list):
        shown = [_describe_item(item) for item in value[:8]] + ["..."] * (len(value) > 8)
        return f"{name}({', '.join(shown)})"
    return _describe_item(value)


def describe_call(call: Any) -> str:
    """The arguments of a :class:`~lowrank_fx.batches.Call`, such as ``(float32[8, 3], flag=a bool)``."""
    named = [f"{name}={_describe_item(value)}" for name, value in call.kwargs.items()]
    return f"({', '.join([*map(_describe_item, call.args), *named])})"


def describe_forward(signature: inspect.Signature) -> str:
    """A signature as its names, and which of them may be left out; annotations and defaults fill pages."""
    parts = []
    for parameter in signature.parameters.values():
        prefix = _PREFIX.get(parameter.kind, "")
        optional = "" if parameter.default is inspect.Parameter.empty else "=..."
        parts.append(f"{prefix}{parameter.name}{optional}")
    return f"forward({', '.join(parts)})"


def is_mapping(value: Any) -> bool:
    """Whether a value has keys and items, as ``dict``, ``UserDict`` and ``BatchEncoding`` do."""
    return isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__"))


def is_dataclass(value: Any) -> bool:
    """Whether a value is an instance of a dataclass that is no mapping."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and not is_mapping(value)


def _describe_tensor(value: torch.Tensor) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.is_nested:
        return f"nested {dtype}"
    layout = "" if value.layout is torch.strided else str(value.layout).removeprefix("torch.") + " "
    return f"{layout}{dtype}{list(value.shape)}"


def _describe_item(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if value is None:
        return "None"
    name = type(value).__name__
    if hasattr(value, "__array__") and hasattr(value, "shape"):
        return f"{name} of {value.dtype}{list(value.shape)}"
    if hasattr(value, "__len__") and not isinstance(value, str | bytes):
        return f"{name} of {len(value)}"
    return f"a {name}"
