"""A captured program as an ``nn.Module`` that is called like the user's model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import nn

from lowrank_fx.capture import device_of
from lowrank_fx.compiling import compile_module
from lowrank_fx.frozen import Frozen
from lowrank_fx.program import Program


class ProgramModule(nn.Module):
    """A program behind the user's own way of calling it.

    It holds the program's own parameters and modules under their names, the same objects, so that whatever moves,
    loads or trains this module does it to the program. ``train()`` sets the flag; what a captured graph computes stays
    that of eval mode, a module tree obeys.

    Args:
        program: what runs.
        compile: whether it goes through ``torch.compile``.
        frozen: whether it does so with its weights as constants; see :mod:`lowrank_fx.frozen`.

    Attributes:
        compiled: whether it goes through ``torch.compile``.
        frozen: whether it does so with its weights as constants.
    """

    def __init__(self, program: Program, *, compile: bool = False, frozen: bool = False) -> None:
        super().__init__()
        self.compiled, self.frozen = compile, compile and frozen
        self._program = program
        self._parameters = program.module._parameters
        self._buffers = program.module._buffers
        self._non_persistent_buffers_set = program.module._non_persistent_buffers_set
        self._modules = program.module._modules
        self._prepare()
        self.eval()

    def _prepare(self) -> None:
        # A plain function: kept as an attribute, the program's module would register as a child.
        module = self._program.module
        self._run: Callable[..., Any] = module.__call__
        if self.compiled:
            self._run = Frozen(module) if self.frozen else compile_module(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; any call that ``forward`` of the original binds to the captured inputs.

        Raises:
            CallError: the call passes other arguments, constants or static sizes than were captured.
        """
        args, kwargs = self._program.bind(args, kwargs)
        return self._run(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the training flag; what a captured graph computes stays that of eval mode, a module tree obeys."""
        self._program.train(mode)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Self:
        before = device_of(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = device_of(self)
        if before != after:
            self._program.moved(before, after)
            self._prepare()
        return self
