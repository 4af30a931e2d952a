"""A walk computes what the graph computes; forks and exchanged parameters stay where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.walk import Run, Walk


class Residual(nn.Module):
    """Writes in place to a value that was computed before the second layer and is read after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        inner = self.second(torch.tanh(hidden))
        hidden.add_(inner)
        return torch.relu_(hidden)


class ThroughViews(Residual):
    """Writes through a view that was made before the second layer, and through one that was made after it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden[:, :3] += self.second(torch.tanh(hidden))[:, :3]
        hidden[:, 3:].mul_(2)
        return torch.relu(hidden)


class Pieces(Residual):
    """Writes to one of the pieces that a split gives back as a list."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        left, right = hidden.chunk(2, dim=1)
        inner = self.second(torch.tanh(hidden))
        left.add_(inner[:, :4])
        return torch.cat((right, left, hidden), 1)


class Normalizing(Residual):
    """Writes to its own input, and to a counter."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x[:, :2] = 0
        x.mul_(2)
        self.count.add_(1)
        return torch.mul(self.second(self.first(x)), self.count)


class Turned(nn.Module):
    """Weights stored [in, out], and a linear layer with a computed transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(6, 8))
        self.b = nn.Parameter(torch.randn(5, 8))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        turned = self.b.t()
        return torch.addmm(self.bias, torch.tanh(x @ self.a), turned)


class Tied(nn.Module):
    """One weight under two names, and called through both."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6, bias=False)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.two(torch.tanh(self.one(x))), "x": x}


def make(kind: type[nn.Module]) -> tuple[nn.Module, GraphModule]:
    torch.manual_seed(0)
    model = kind().eval()
    clean = capture(model, Call((inputs(),), {})).graph_module
    PassManager(order.cleanup()).run(clean)
    return model, clean


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def leaves(outputs: object) -> list[Any]:
    return pytree.tree_leaves(outputs)


def equal(one: object, other: object) -> bool:
    return all(torch.equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


def advance(run: Run, name: str) -> None:
    """Stop in front of the node ``name``."""
    while run.next.name != name:
        run.compute()
        run.move()


ALL = [Residual, ThroughViews, Pieces, Normalizing, Turned, Tied]


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_run_computes_what_the_graph_computes_and_changes_nothing(kind: type[nn.Module]) -> None:
    model, gm = make(kind)
    x = inputs(1)
    state = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    run = Walk(gm).run(Call((x,), {}))
    outputs = run.finish()
    assert torch.equal(x, inputs(1))
    assert all(torch.equal(tensor, state[name]) for name, tensor in gm.state_dict().items())
    assert not run.values or all(not node.users for node in run.values)  # nothing outlives its last use
    assert equal(outputs, gm(inputs(1)))
    assert equal(outputs, model(inputs(1)))


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_a_fork_at_any_node_computes_the_same_and_does_not_disturb_the_run(kind: type[nn.Module]) -> None:
    _, gm = make(kind)
    walk = Walk(gm)
    call = Call((inputs(2),), {})
    expected = walk.run(call).finish()
    run = walk.run(call)
    for node in walk.nodes[:-1]:
        # A fork that is changed, one that is not, and one of a fork: none may reach the others.
        changed = run.fork()
        changed.exchange({name: torch.full_like(tensor, 3) for name, tensor in gm.named_parameters()})
        changed.finish()
        half = run.fork()
        half.compute()
        half.move()
        second = half.fork()
        assert equal(half.finish(), expected), node.name
        assert equal(second.finish(), expected), node.name
        run.compute()
        run.move()
    assert torch.equal(call.args[0], inputs(2))
    last = walk.run(call)
    assert equal(last.finish(), expected)


@torch.no_grad()
def test_the_run_goes_on_undisturbed_behind_its_forks() -> None:
    for kind in ALL:
        _, gm = make(kind)
        walk = Walk(gm)
        run = walk.run(Call((inputs(3),), {}))
        result: Any = None
        while run.position < len(walk.nodes):
            run.fork().finish()
            result = run.compute()
            run.move()
        assert equal(result, gm(inputs(3))), kind.__name__


@torch.no_grad()
def test_values_are_shared_with_a_fork_where_nothing_is_written() -> None:
    _, gm = make(Turned)
    run = Walk(gm).run(Call((inputs(),), {}))
    advance(run, "tanh")
    fork = run.fork()
    assert fork.values.keys() == run.values.keys()
    assert all(fork.values[node] is value for node, value in run.values.items())


@torch.no_grad()
def test_parameters_are_never_copied_for_a_fork() -> None:
    _, gm = make(Residual)
    run = Walk(gm).run(Call((inputs(),), {}))
    advance(run, "linear_1")
    fork = run.fork()
    weights = [node for node in fork.values if node.op == "get_attr"]
    assert {str(node.target) for node in weights} == {"second.weight", "second.bias"}
    assert all(fork.values[node] is gm.get_parameter(str(node.target)) for node in weights)


@torch.no_grad()
def test_exchanged_parameters_are_used_from_there_on() -> None:
    model, gm = make(Residual)
    assert isinstance(model, Residual)
    run = Walk(gm).run(Call((inputs(4),), {}))
    advance(run, "linear_1")
    weight, bias = torch.randn(8, 8), torch.randn(8)
    fork = run.fork()
    fork.exchange({"second.weight": weight, "second.bias": bias})
    hidden = model.first(inputs(4))
    expected = (hidden + F.linear(torch.tanh(hidden), weight, bias)).relu()
    assert equal(fork.finish(), (expected,))
    assert equal(run.finish(), (model(inputs(4)),))


@torch.no_grad()
def test_an_exchange_reaches_a_transpose_that_is_already_computed() -> None:
    model, gm = make(Turned)
    assert isinstance(model, Turned)
    walk = Walk(gm)
    run = walk.run(Call((inputs(5),), {}))
    advance(run, "addmm")
    (turned,) = [node for node in run.values if node.target is torch.ops.aten.t.default]
    a, b = torch.randn(6, 8), torch.randn(5, 8)
    fork = run.fork()
    fork.exchange({"b": b, "a": a})  # a's own product is behind us already
    assert torch.equal(run.values[turned], model.b.t())
    expected = torch.addmm(model.bias, torch.tanh(inputs(5) @ model.a), b.t())
    assert equal(fork.finish(), (expected,))
    assert equal(run.finish(), (model(inputs(5)),))


@pytest.mark.parametrize("name", ["one.weight", "two.weight"])
@torch.no_grad()
def test_a_tied_weight_is_exchanged_under_all_of_its_names(name: str) -> None:
    model, gm = make(Tied)
    assert isinstance(model, Tied)
    new = torch.randn(6, 6)
    for position in range(len(gm.graph.nodes)):
        run = Walk(gm).run(Call((inputs(6),), {}))
        while run.position < position and run.next.name != "linear":
            run.compute()
            run.move()
        run.exchange({name: new})
        expected = F.linear(torch.tanh(F.linear(inputs(6), new)), new, model.two.bias)
        assert equal(run.finish(), (expected, inputs(6)))


@torch.no_grad()
def test_an_exchange_survives_a_fork_but_does_not_travel_back() -> None:
    _, gm = make(Residual)
    walk = Walk(gm)
    run = walk.run(Call((inputs(7),), {}))
    run.exchange({"first.weight": torch.zeros(8, 6)})
    fork = run.fork()
    fork.exchange({"second.weight": torch.zeros(8, 8)})
    biases = gm.get_parameter("first.bias"), gm.get_parameter("second.bias")
    assert torch.allclose(fork.finish()[0], (biases[0] + biases[1]).relu().expand(4, 8))
    expected = biases[0] + F.linear(torch.tanh(biases[0]), gm.get_parameter("second.weight"), biases[1])
    assert torch.allclose(run.finish()[0], expected.relu().expand(4, 8))
