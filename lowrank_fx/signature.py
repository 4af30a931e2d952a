"""How a captured graph wants to be called, and how a user's call becomes that."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowrank_fx.batches import Call
from lowrank_fx.errors import CallError

_Shapes: TypeAlias = tuple[int, tuple[str, ...], tuple[object, ...]]

_MOST_SHAPES = 256
"""How many calls of different shapes are remembered to fit: looking takes a tenth of the time of checking."""


@dataclass
class CallSignature:
    """How the captured graph wants to be called, and how the user's calls become that.

    Attributes:
        signature: of the model's own ``forward``.
        example: the captured call; tensors are kept as shapes only, on the meta device.
        guards: raises AssertionError if the flat inputs break what the trace assumed.
        ignored: names that only ``**kwargs`` takes and the model does not read; calls may pass them or not.
    """

    signature: inspect.Signature
    example: Call
    guards: Callable[..., object] | None
    ignored: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self._given = self._by_name(self.example.args, self.example.kwargs)
        self._leaves, self._spec = pytree.tree_flatten((self.example.args, self.example.kwargs))
        self._fits: set[_Shapes] = set()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call in the captured form: positional arguments positional, keywords in order, defaults dropped.

        Raises:
            CallError: an argument is missing, was not there at capture, or has another structure, constant or shape.
        """
        shapes = None if torch.compiler.is_compiling() else _shapes_of(args, kwargs)
        if shapes in self._fits:
            return args, kwargs
        bound = self._bound(args, kwargs)
        if shapes is not None and bound[1] is kwargs and len(self._fits) < _MOST_SHAPES:
            self._fits.add(shapes)
        return bound

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same for a call of shapes that no call had before."""
        if len(args) != len(self.example.args) or list(kwargs) != list(self.example.kwargs):
            args, kwargs = self._rearrange(args, kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec:
            raise CallError(f"the inputs are nested differently from the captured call: {spec} instead of {self._spec}")
        for position, (leaf, known) in enumerate(zip(leaves, self._leaves, strict=True)):
            if isinstance(known, Tensor):
                if not isinstance(leaf, Tensor):
                    raise CallError(f"input {position} was a tensor when the model was captured, now it is {leaf!r}")
                if leaf.dim() != known.dim():
                    raise CallError(
                        f"input {position} has shape {tuple(leaf.shape)}, captured with {known.dim()} dimensions"
                    )
                if _kind_of(leaf.dtype) != _kind_of(known.dtype):
                    raise CallError(
                        f"input {position} is {leaf.dtype}, captured with {known.dtype}; Python branches on such a "
                        "difference became part of the graph"
                    )
            elif isinstance(leaf, Tensor) or leaf != known:
                raise CallError(
                    f"input {position} is {_brief(leaf)}, but the model was captured with {known!r}, which became "
                    "part of the graph; optimize again with a batch (or forward_args=) that passes the value you need"
                )
        if self.guards is not None:
            try:
                self.guards(*leaves)
            except AssertionError as error:
                shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor))
                raise CallError(
                    f"inputs of shape {shapes} break what the captured graph assumes ({error}); optimize the model "
                    "again with a calibration batch of that shape"
                ) from None
        return args, kwargs

    def _rearrange(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = self._by_name(args, kwargs)
        given = {name: value for name, value in given.items() if name not in self.ignored}
        for name in [name for name in given if name not in self._given]:
            default = self.signature.parameters[name].default if name in self.signature.parameters else inspect._empty
            if not _is_default(given[name], default):
                raise CallError(
                    f"argument {name}={_brief(given[name])} was not given when the model was captured (then: "
                    f"{', '.join(self._given)}); optimize again with a batch or forward_args= that passes it"
                )
            del given[name]
        for name, example in self._given.items():
            if name not in given:
                default = (
                    self.signature.parameters[name].default if name in self.signature.parameters else inspect._empty
                )
                if isinstance(example, Tensor) or default is inspect._empty:
                    raise CallError(
                        f"argument {name} is missing; the model was captured with {', '.join(self._given)} "
                        "(forward_args= of optimize chooses what a batch passes)"
                    )
                given[name] = default
        names = list(self._given)
        positional = names[: len(self.example.args)]
        return tuple(given[name] for name in positional), {name: given[name] for name in self.example.kwargs}

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CallError(f"the call does not fit forward{self.signature}: {error}") from None
        given: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                given.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                given.update((f"*{name}[{position}]", item) for position, item in enumerate(value))
            else:
                given[name] = value
        return given


def _shapes_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Shapes | None:
    """All that decides whether a call fits, where its arguments are plain tensors and constants; else None."""
    parts: list[object] = []
    for value in (*args, *kwargs.values()):
        if type(value) is Tensor:
            parts.append((value.shape, value.dtype))
        elif value is None or type(value) in (bool, int, float, str):
            parts.append((type(value), value))
        else:
            return None
    return len(args), tuple(kwargs), tuple(parts)


def _kind_of(dtype: torch.dtype) -> tuple[bool, bool, bool]:
    """What models branch on; precision may change, with ``.to()`` on the optimized model."""
    return dtype.is_floating_point, dtype.is_complex, dtype == torch.bool


def _is_default(value: object, default: object) -> bool:
    if value is default:
        return True
    # Only plain values can be compared; an array or a tensor has no single answer.
    return isinstance(value, bool | int | float | str | tuple) and type(value) is type(default) and value == default


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
