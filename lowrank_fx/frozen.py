"""A module through ``torch.compile`` with its weights as constants, which inductor lays out once for all calls.

Inductor calls that freezing. Frozen code never looks at the weights again, so :class:`Frozen` does before each call,
and compiles anew where they changed. Seen are: tensors that were written in place (their version), that got other
memory (``.to()``, ``param.data = ...``) or were replaced; other submodules; and the steps of optimizers, since fused
ones write without counting. What is written in place through ``param.data``, or by another operator that does not
count, cannot be seen.

A call with gradients enabled runs the ordinary compiled module. So does every call of a module that cannot be frozen as
a whole: one that ``torch.compile`` breaks into several graphs (one could write what is a constant of another), one that
writes to its own tensors while it runs, or one whose tensors do not tell when they change.

The frozen code of old weights is let go of. torch keeps it in three places: at the code object of the function that was
compiled, hence one of our own for each compilation; in the globals of that function; and in inductor's list of loaded
modules, of which it says that it only serves to delete their files.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowrank_fx.compiling import compile_module

logger = logging.getLogger("lowrank_fx.frozen")

_numbers = itertools.count()


class Frozen:
    """Runs a module with its weights frozen into compiled code, as long as they stay what they are.

    Args:
        module: what runs; it is not changed.
        warns: whether a warning says that the module cannot be frozen.

    Attributes:
        refused: why the module cannot be frozen and runs through ``torch.compile`` as it is; None while it can.
        compilations: how often its weights were frozen.
    """

    def __init__(self, module: nn.Module, *, warns: bool = True) -> None:
        self.refused: str | None = None
        self.compilations = 0
        self._module, self._warns = module, warns
        self._name = f"frozen_{next(_numbers)}"
        self._plain = compile_module(module)
        self._code: _Code | None = None
        _hear_of_steps()
        _ALL.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module; what it raises is raised."""
        if torch.is_grad_enabled() or self.refused is not None or torch.compiler.is_compiling():
            return self._plain(*args, **kwargs)
        code = self._code
        if code is None or code.weights.changed():
            code = self._renewed()
            if code is None:
                return self._plain(*args, **kwargs)
        try:
            made = code(*args, **kwargs)
        except _compiler_errors() as error:  # nothing of the module has run yet
            made = self._plain(*args, **kwargs)  # raises what is wrong with the call itself
            said = str(error).strip().splitlines()
            self._refuse(said[0] if said else type(error).__name__)
            return made
        if code.weights.written():
            self._refuse("it writes to its own tensors while it runs")
        return made

    def stepped(self, parameters: set[int]) -> None:
        """Let go of the frozen code if an optimizer wrote to some of its weights.

        Args:
            parameters: ids of the tensors that the optimizer steps.
        """
        code = self._code
        if code is not None and code.weights.holds(parameters):
            self._code = None

    def _renewed(self) -> _Code | None:
        if self._code is not None:
            logger.info("weights have changed, so they are frozen anew")
        self._code = None
        weights = _Weights(self._module)
        if weights.unseen is not None:
            self._refuse(weights.unseen)
            return None
        self._code = _Code(self._module, self._name, weights)
        self.compilations += 1
        return self._code

    def _refuse(self, reason: str) -> None:
        self.refused, self._code = reason, None
        line = f"the model runs compiled, but its weights cannot be frozen: {reason}"
        logger.info(line)
        if self._warns:
            warnings.warn(line, stacklevel=3)


class _Code:
    """A module compiled for the weights that it has now; what torch keeps of it goes with it.

    Args:
        module: what runs.
        name: of the function that is compiled; Dynamo goes by it to know which sizes varied in earlier calls.
        weights: those of the module.
    """

    def __init__(self, module: nn.Module, name: str, weights: _Weights) -> None:
        from torch._dynamo.eval_frame import remove_from_cache
        from torch._inductor import config

        def call(*args: Any, **kwargs: Any) -> Any:
            return module(*args, **kwargs)

        own = types.FunctionType(call.__code__.replace(co_name=name), globals(), name, None, call.__closure__)
        self.weights = weights
        self._run: Callable[..., Any] = torch.compile(own, fullgraph=True)
        # The setting holds in this thread alone. Any call may compile, for sizes that were not seen before.
        self._freezing = config.patch(freezing=True)
        weakref.finalize(self, remove_from_cache, own.__code__).atexit = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._freezing:
            made = self._run(*args, **kwargs)
        _keep_no_weights()
        return made


class _Weights:
    """The tensors of a module, and whether they are still what they were.

    Args:
        module: whose tensors: parameters, buffers, and tensors that are plain attributes.

    Attributes:
        unseen: why changes could not be seen; None if they can.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places: list[tuple[Any, Any, object]] = []
        tensors: dict[int, Tensor] = {}
        for holder, key, value in _places(module):
            self._places.append((holder, key, value))
            if isinstance(value, Tensor):
                tensors[id(value)] = value
        self._tensors = list(tensors.values())
        self._ids = set(tensors)
        self.unseen = next(filter(None, map(_unseen, self._tensors)), None)
        if self.unseen is None:
            # As long as the memory is held, no other tensor can have its address.
            self._memory = [tensor.untyped_storage() for tensor in self._tensors]
            self._pointers = [tensor.data_ptr() for tensor in self._tensors]
            self._versions = [tensor._version for tensor in self._tensors]

    def changed(self) -> bool:
        """Whether a tensor or a submodule was replaced, a tensor got other memory, or was written to."""
        if self.written() or [tensor.data_ptr() for tensor in self._tensors] != self._pointers:
            return True
        try:
            return any(holder[key] is not value for holder, key, value in self._places)
        except (KeyError, IndexError):
            return True

    def written(self) -> bool:
        """Whether a tensor was written to."""
        return [tensor._version for tensor in self._tensors] != self._versions

    def holds(self, ids: set[int]) -> bool:
        """Whether one of the tensors has one of these ids."""
        return not self._ids.isdisjoint(ids)


def _unseen(tensor: Tensor) -> str | None:
    """Why a change of a tensor could not be seen; None if it can."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return f"changes of a {type(tensor).__name__} of layout {tensor.layout} cannot be seen"
    if tensor.is_inference():
        return "changes of tensors that were made in inference mode cannot be seen"
    return None


def _places(module: nn.Module) -> Iterator[tuple[Any, Any, object]]:
    """Where a module's tensors and submodules are held: what holds them, at which key, and what is there."""
    seen: set[int] = set()

    def inside(holder: Any) -> Iterator[tuple[Any, Any, object]]:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if isinstance(value, Tensor):
                yield holder, key, value
            elif isinstance(value, nn.Module):
                yield holder, key, value
                yield from of(value)
            elif isinstance(value, dict | list | tuple):
                yield from inside(value)

    def of(own: nn.Module) -> Iterator[tuple[Any, Any, object]]:
        if not isinstance(own, fx.GraphModule):
            yield from inside(vars(own))
            return
        # A graph reads nothing but these; the other attributes are notes on it.
        for held in (own._parameters, own._buffers, own._modules):
            yield from inside(held)
        yield from ((vars(own), key, value) for key, value in vars(own).items() if isinstance(value, Tensor))

    return of(module)


# ---- what torch keeps, and what optimizers do ------------------------------------------------------------------------


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # a second, for who freezes nothing

    return TorchDynamoException, FailOnRecompileLimitHit


_ALL: weakref.WeakSet[Frozen] = weakref.WeakSet()


@functools.cache
def _hear_of_steps() -> None:
    def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        frozen = list(_ALL)
        if frozen:
            ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for each in frozen:
                each.stepped(ids)

    register_optimizer_step_post_hook(stepped)


_loaded = 0


def _keep_no_weights() -> None:
    """Take code with frozen weights out of inductor's list of what it loaded: its function alone keeps it then."""
    from torch._inductor.codecache import PyCodeCache

    global _loaded
    if len(PyCodeCache.modules) == _loaded:
        return
    for module in list(PyCodeCache.modules):
        if any(name.startswith("_frozen_param") for name in vars(module)):
            PyCodeCache.modules.remove(module)
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
    _loaded = len(PyCodeCache.modules)
