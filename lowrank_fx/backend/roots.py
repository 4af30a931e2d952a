"""Which model a graph belongs to.

Dynamo tells a backend what a graph reads, not whose it is; and it gives the graph that it made for one model to every
model that runs the same code. But a graph runs while its model is being called, so the model stands on the stack: it is
what the nearest call of something compiled was a call of.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch import Tensor, nn

_STEP = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)|^[LG]\['([^']+)'\]")


def find_root(tensors: Sequence[Tensor]) -> nn.Module | None:
    """The model that is being called; None where a function was compiled that is no model's.

    Args:
        tensors: parameters and buffers of the graph; the model holds at least one of them.
    """
    wanted = {id(tensor) for tensor in tensors}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = _compiled_in(frame)
        if module is not None and any(id(tensor) in wanted for tensor in _held(module)):
            return module
        frame = frame.f_back
    return None


def names_of(root: nn.Module | None, tensors: Sequence[Tensor], sources: Sequence[str]) -> list[str]:
    """The fully qualified name of each tensor in its model, all different.

    A tied one has the last of its names, as ``torch.export`` has it. What the model does not hold is named for how
    Dynamo came to it.
    """
    known = {} if root is None else _names(root)
    made: list[str] = []
    for position, (tensor, source) in enumerate(zip(tensors, sources, strict=True)):
        name = known.get(id(tensor)) or _readable(source) or f"tensor_{position}"
        taken = any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in made)
        made.append(f"tensor_{position}" if taken else name)
    return made


def parameters_of(root: nn.Module | None) -> dict[str, Tensor]:
    """The parameters of a model by the names that :func:`names_of` gives them."""
    if root is None:
        return {}
    names = _names(root)
    return {names[id(parameter)]: parameter for parameter in root.parameters()}


def modules_of(compiled: Any) -> list[nn.Module]:
    """The models that something compiled calls: itself, or those that a function refers to."""
    if isinstance(compiled, nn.Module):
        return [_unwrapped(compiled)]
    function = inspect.unwrap(getattr(compiled, "_torchdynamo_orig_callable", compiled))
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        return [_unwrapped(owner)]
    if not inspect.isfunction(function):
        return []
    variables = inspect.getclosurevars(function)
    values = (*variables.nonlocals.values(), *variables.globals.values())
    return [_unwrapped(value) for value in values if isinstance(value, nn.Module)]


def holds(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether a module has one of these parameters and buffers."""
    own = {id(tensor) for tensor in _held(module)}
    return any(id(tensor) in own for tensor in tensors)


def _compiled_in(frame: FrameType) -> nn.Module | None:
    """The model whose compiled call a frame is a part of."""
    values = frame.f_locals
    own = values.get("self")
    if isinstance(own, nn.Module):
        if hasattr(own, "_orig_mod"):
            return _unwrapped(own)
        if own._compiled_call_impl is not None:
            return own
    # model.forward = torch.compile(model.forward)
    called: Any = values.get("fn") if frame.f_globals.get("__name__") in _DYNAMO else None
    owner = getattr(inspect.unwrap(called) if callable(called) else None, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


_DYNAMO = ("torch._dynamo.eval_frame", "torch._dynamo.external_utils")


def _unwrapped(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_buffers(remove_duplicate=False)
    yield from module.named_parameters(remove_duplicate=False)


def _names(module: nn.Module) -> dict[int, str]:
    return {id(tensor): name for name, tensor in _named(module)}


def _readable(source: str) -> str:
    """A name such as ``model.fc.weight`` for ``L['model']._modules['fc']._parameters['weight']``."""
    steps = [next(part for part in match if part) for match in _STEP.findall(source)]
    return ".".join(step for step in steps if (step.isidentifier() or step.isdigit()) and not hasattr(nn.Module, step))
