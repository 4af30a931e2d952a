"""``torch.compile`` for many models in one process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def compile_module(module: nn.Module) -> Callable[..., Any]:
    """``torch.compile`` with recompile limits of its own, where torch can do that.

    The recompile limit counts per code object, so many compiled instances of one class would fall back to eager.
    """
    isolate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if isolate else {}
    compiled: Callable[..., Any] = torch.compile(module, **options)

    # A plain function: kept as an attribute, the compiled module itself would register as a child.
    def run(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    return run
