"""Modules and graphs through the backends of ``torch.compile``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.nn import functional as F

from lowrank_fx.compiling import CompiledGraph, compile_module
from lowrank_fx.rewrite import copy_graph_module


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """Returns a tuple, as the graphs of Dynamo do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows(5, 6))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (F.linear(x, self.weight).relu(),)


class Counting:
    """A backend that runs a copy of what it is given, and spoils the graph itself."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.shapes.append(next(tuple(each.shape) for each in inputs if not isinstance(each, nn.Parameter)))
        copied = copy_graph_module(gm, clone=False)
        for node in gm.graph.nodes:
            if node.op == "call_function":
                node.args = ()
        return copied.forward


@torch.no_grad()
def test_a_graph_is_compiled_once_whoever_calls_first_and_stays_as_it_is() -> None:
    model, backend = Layer(), Counting()
    graph = symbolic_trace(model)
    text, x = str(graph.graph), rows(3, 6)
    compiled, found = CompiledGraph(graph, backend), list[Tensor]()

    def call() -> None:
        with torch.no_grad():
            found.append(compiled(x)[0])

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.shapes == [(3, 6)]
    assert str(graph.graph) == text
    assert len(found) == 8
    for value in found:
        torch.testing.assert_close(value, model(x)[0])


@torch.no_grad()
def test_a_graph_sees_values_that_change_in_place() -> None:
    model = Layer()
    compiled, x = CompiledGraph(symbolic_trace(model), "inductor"), rows(3, 6)
    torch.testing.assert_close(compiled(x)[0], model(x)[0])
    model.weight.mul_(2)
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_other_shapes_are_compiled_anew(own: bool) -> None:
    model, backend = Layer(), Counting()
    compiled = compile_module(model, backend=backend, dynamic=False, own=own)
    for count in (3, 7, 3):
        torch.testing.assert_close(compiled(rows(count, 6))[0], model(rows(count, 6))[0])
    assert backend.shapes == [(3, 6), (7, 6)]
