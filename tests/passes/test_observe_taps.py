"""Observers behind every tap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.passes.base import PassManager, Refusal
from lowrank_fx.passes.observe_taps import ObserveTaps
from lowrank_fx.sites import Tap
from lowrank_fx.testing import graph_text, run_pass


class Recorder(nn.Module):
    """Keeps what passes through it."""

    _is_impure = True

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, activation: Tensor) -> None:
        self.seen.append(activation.clone())


class Layers(nn.Module):
    def __init__(self, way: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shared(m: Layers, x: Tensor) -> Any:
    y = x.relu()
    return m.q(y) + m.k(y) + m.k(x)


def graph_of(way: Callable[[Any, Tensor], Any], x: Tensor) -> GraphModule:
    return capture(Layers(way), Call((x,), {})).graph_module


GOLDEN = """\
%q_weight = get[q.weight]
%q_bias = get[q.bias]
%k_weight = get[k.weight]
%k_bias = get[k.bias]
%x = input
%relu = relu(%x)
%observers_0 = module[observers.0](%relu)
%linear = linear(%relu, %q_weight, %q_bias)
%linear_1 = linear(%relu, %k_weight, %k_bias)
%add = add.Tensor(%linear, %linear_1)
%observers_1 = module[observers.1](%x)
%linear_2 = linear(%x, %k_weight, %k_bias)
%add_1 = add.Tensor(%add, %linear_2)
return (%add_1,)"""


def observed(gm: GraphModule, x: Tensor, taps: dict[str, Tap]) -> tuple[dict[str, Recorder], tuple[Any, ...]]:
    recorders = {name: Recorder() for name in taps}
    result = run_pass(gm, ObserveTaps(taps, recorders), (x,), tolerance=0.0)
    for recorder in recorders.values():
        recorder.seen.clear()
    return recorders, (result.changes, result.refusals)


def test_numbers_count_graph_and_what_is_seen() -> None:
    x = rows(3, 4)
    gm = graph_of(shared, x)
    taps = find_sites(gm).taps
    assert list(taps) == ["relu", "x"]
    recorders, (changes, refusals) = observed(gm, x, taps)
    assert changes == ("relu observed", "x observed")
    assert refusals == ()
    assert graph_text(gm) == GOLDEN
    batch = rows(5, 4)
    gm(batch)
    # One tap feeds two layers and is seen once.
    assert [len(recorder.seen) for recorder in recorders.values()] == [1, 1]
    assert torch.equal(recorders["relu"].seen[0], batch.relu())
    assert torch.equal(recorders["x"].seen[0], batch)


def test_taps_of_one_node_with_different_patches_have_an_observer_each() -> None:
    x = rows(2, 4, 5, 5)
    gm = graph_of(lambda m, x: (m.conv(x), nn.functional.conv2d(x, m.q.weight[:, :, None, None])), x)
    node = find_sites(gm).sites[0].calls[0].tap
    taps = {name: Tap(name, "x", 4) for name in (node, "x[other]")}
    recorders, (changes, _) = observed(gm, x, taps)
    assert changes == (f"{node} observed", "x[other] observed")
    gm(x)
    assert all(torch.equal(recorder.seen[0], x) for recorder in recorders.values())


def test_an_input_is_observed_after_all_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.layer(x) + y

    x = rows(3, 4)
    gm = capture(Two(), Call((x, x), {})).graph_module
    result = run_pass(gm, ObserveTaps(find_sites(gm).taps, {"x": Recorder()}), (x, x), tolerance=0.0)
    assert result.changes == ("x observed",)
    assert graph_text(gm).splitlines()[2:5] == ["%x = input", "%y = input", "%observers_0 = module[observers.0](%x)"]


def test_a_model_with_observers_of_its_own_keeps_them() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Any:
            return self.observers[1](self.observers[0](x))

    x = rows(3, 4)
    gm = capture(Own(), Call((x,), {})).graph_module
    recorders, (changes, _) = observed(gm, x, find_sites(gm).taps)
    assert changes == ("x observed", "linear observed")
    gm(x)
    assert all(len(recorder.seen) == 1 for recorder in recorders.values())


def test_a_tap_whose_node_is_gone_is_left_alone() -> None:
    x = rows(3, 4)
    gm = graph_of(shared, x)
    gm.graph.eliminate_dead_code()
    text = graph_text(gm)
    _, (changes, refusals) = observed(gm, x, {"gone": Tap("gone", "gelu", 4)})
    assert changes == ()
    assert refusals == (Refusal("gelu", "the graph has no such node"),)
    assert graph_text(gm) == text


def test_max_rewrites_observes_the_first_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", "1")
    x = rows(3, 4)
    gm = graph_of(shared, x)
    _, (changes, refusals) = observed(gm, x, find_sites(gm).taps)
    assert changes == ("relu observed",)
    assert refusals == (Refusal("x", "LOWRANK_FX_MAX_REWRITES=1 is used up"),)


def test_nothing_to_observe_changes_nothing() -> None:
    gm = graph_of(lambda m, x: x.relu(), rows(3, 4))
    ((_, result),) = PassManager([ObserveTaps({}, {})], verify=True).run(gm)
    assert (result.changes, result.refusals) == ((), ())
    assert graph_text(gm).splitlines()[-3:] == ["%x = input", "%relu = relu(%x)", "return (%relu,)"]
