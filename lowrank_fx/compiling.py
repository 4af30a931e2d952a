"""``torch.compile`` for many models in one process."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.convert_frame import compile_lock
from torch.fx import GraphModule

from lowrank_fx.rewrite import copy_graph_module


def compile_module(
    module: nn.Module, *, backend: str | Callable[..., Any] = "inductor", dynamic: bool | None = None, own: bool = False
) -> Callable[..., Any]:
    """``torch.compile`` with recompile limits of its own, where torch can do that.

    The recompile limit counts per code object, so many compiled instances of one class would fall back to eager.

    Args:
        module: what is compiled when it is first called.
        backend: compiles it.
        dynamic: as for ``torch.compile``.
        own: nobody else holds the module and nothing in it is ever exchanged, so calls need not look whether its
            parameters are what they were. Inputs are looked at in any case.
    """
    kwargs: dict[str, Any] = {"backend": backend, "dynamic": dynamic}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        kwargs["isolate_recompiles"] = True
    if own:
        kwargs["options"] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled: Callable[..., Any] = torch.compile(module, **kwargs)

    # A plain function: kept as an attribute, the compiled module itself would register as a child.
    def run(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    return run


class CompiledGraph:
    """A graph that a backend of ``torch.compile`` compiles when it is first called, with nothing between it and calls.

    Going through ``torch.compile`` would look at every call for what makes a graph invalid, which takes a tenth of a
    call of a few milliseconds. So this is for graphs that are called by something which Dynamo has compiled: it has
    looked at the call by then. All calls have to have the shapes, dtypes and strides of the first one.

    Args:
        graph: what is compiled; its parameters are in it, and nothing changes but their values.
        backend: a backend of ``torch.compile``, or its name.
    """

    def __init__(self, graph: GraphModule, backend: str | Callable[..., Any]) -> None:
        self._graph = graph
        self._backend = backend
        self._made: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Run the graph."""
        return self._run(*args) if self._made is None else self._made(*args)

    def _run(self, *args: Any) -> Any:
        with self._lock:
            if self._made is None:
                compiler = torch._dynamo.lookup_backend(self._backend)
                # Backends write to the graph that they are given, and compile one at a time under Dynamo.
                with compile_lock:
                    self._made = compiler(copy_graph_module(self._graph, clone=False), list(args))
        return self._made(*args)
