"""The backend of ``torch.compile`` where calls, weights and graphs are not as they should be."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx.backend import family as family_module
from lowrank_fx.backend import planning
from lowrank_fx.backend.family import PATIENCE, families, family_of
from lowrank_fx.backend.members import Rivals
from lowrank_fx.backend.options import BackendOptions
from lowrank_fx.backend.watch import Watch
from lowrank_fx.sites import Skip
from lowrank_fx.targets import Keep

WIDTH = 16


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def made(kind: Any, seed: int = 0) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return kind().eval()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, WIDTH))


def call(seed: int = 0, rows: int = 32) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, **options: Any) -> Any:
    given = {"calibration_steps": 2, "keep_params": 0.6, "inner": "eager", **options}
    return torch.compile(model, backend="lowrank_fx", options=given, dynamic=False)


def phase(model: Any) -> str:
    return lowrank_fx.status(model).phase


# ---- weights that change before a graph comes ------------------------------------------------------------------------


@torch.no_grad()
def test_a_graph_that_comes_after_a_weight_has_changed_gets_no_old_factors() -> None:
    model = made(mlp)
    fast = compiled(model)
    for seed in range(3):
        fast(call(seed))
    assert phase(fast) == "factored"
    model.load_state_dict(made(mlp, 1).state_dict())
    late = call(rows=7)  # another graph; no call of the first one has seen the change
    torch.testing.assert_close(fast(late), model(late))
    assert phase(fast) == "stale"


def test_a_graph_of_another_mode_gets_no_old_factors() -> None:
    model = made(mlp)
    fast = compiled(model)
    with torch.inference_mode():
        for seed in range(3):
            fast(call(seed))
    assert phase(fast) == "factored"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3)
        torch.testing.assert_close(fast(call()), model(call()))
    assert phase(fast) == "stale"


@torch.no_grad()
def test_a_saved_model_serves_no_graph_after_a_weight_has_changed(tmp_path: Path) -> None:
    model = made(mlp)
    loader = [call(seed) for seed in range(3)]
    lowrank_fx.optimize(model, loader, target=Keep(params=0.6), compile=False, progress=False).save(tmp_path)
    fast = compiled(model, plan=tmp_path)
    fast(call())
    assert phase(fast) == "factored"
    # Written around the counter of versions: only the numbers tell.
    for parameter in model.parameters():
        parameter.data.neg_()
    late = call(rows=7)
    torch.testing.assert_close(fast(late), model(late))
    assert phase(fast) == "stale"


def test_a_part_of_a_watch_compares_with_what_was_when_the_whole_began() -> None:
    weight, other, later = (torch.ones(3, 3) for _ in range(3))
    whole = Watch({"weight": weight, "other": other})
    assert whole.replaced(["weight"], [torch.ones(3, 3)]) == "weight"
    assert whole.replaced(["weight", "later"], [weight, later]) is None
    other.numpy()[:] = 2  # counted by nothing
    assert whole.part(["weight", "later"], [weight, later]).changed(every=True) is None
    assert whole.part(["weight", "other"], [weight, other]).changed(every=True) == "other"
    later.add_(1)
    assert whole.part(["later"], [later]).changed() == "later"


@pytest.mark.parametrize(
    "lay_out",
    [
        lambda tensor: tensor,
        lambda tensor: tensor.transpose(0, 1),
        lambda tensor: tensor.to(memory_format=torch.channels_last),
        lambda tensor: tensor[:, 1:3],
        lambda tensor: tensor[:1, :1, :1, :1],
        lambda tensor: tensor[0, 0, 0, 0],
        lambda tensor: tensor[:0],
    ],
)
def test_a_write_that_is_not_counted_is_seen_in_any_layout(lay_out: Callable[[Tensor], Tensor]) -> None:
    whole = torch.randn(4, 5, 6, 3)
    weight = lay_out(whole)
    own = Watch({"weight": weight})
    whole.data[-1, -1, -1, -1] = 0  # no place of a slice, and no probed place of any
    assert own.changed() is None
    weight.data.mul_(2)
    assert own.changed() == ("weight" if weight.numel() else None)
    weight.data.div_(2)
    assert own.changed() is None
    weight.data.fill_(math.nan)
    assert Watch({"weight": weight}).changed() is None


@torch.no_grad()
def test_refresh_forgets_graphs_of_a_parameter_that_was_replaced() -> None:
    model = made(mlp)
    fast = compiled(model)
    for seed in range(3):
        fast(call(seed))
    fast(call(rows=7))
    model[0].weight = nn.Parameter(call(5, 24))
    fast(call())
    assert phase(fast) == "stale"
    lowrank_fx.refresh(fast)
    for seed in range(3):
        fast(call(seed))
    found = lowrank_fx.status(fast)
    assert found.phase == "factored"
    assert found.plan is not None
    assert found.plan.totals.model_params[0] == sum(parameter.numel() for parameter in model.parameters())
    fast(call(rows=7))  # its old binding held the old weight
    assert phase(fast) == "factored"


# ---- saved plans and graph breaks ------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A batch norm that a graph break parts from its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 16, 3, padding=1)
        self.apart = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(x)
        if self.apart:
            torch._dynamo.graph_break()
        result: Tensor = self.last(torch.relu(self.norm(hidden)))
        return result


@torch.no_grad()
def test_what_a_saved_model_has_folded_is_not_applied_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made(Normed)
    model.norm.running_var.fill_(0.01)  # folded twice, outputs grow tenfold
    loader = [torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    small = lowrank_fx.optimize(model, loader, target=Keep(params=0.35), compile=False, progress=False)
    assert small.plan.cleanup == ("norm folded into conv",)
    assert {entry.name for entry in small.plan.factored} == {"conv", "last"}
    small.save(tmp_path)
    fast = compiled(model, plan=tmp_path)
    torch.testing.assert_close(fast(loader[0]), small(loader[0]))
    torch.compiler.reset()
    model.apart = True
    fast = compiled(model, plan=tmp_path)
    with caplog.at_level(logging.WARNING, "lowrank_fx"):
        found = fast(loader[0])
    assert "norm folded into conv in the stored model and not in this graph" in caplog.text
    # The first graph is dense, the second one has its factors; folded twice, the error would be far above 1.
    error = (found - model(loader[0])).norm() / model(loader[0]).norm()
    assert 0 < error < 1


# ---- graphs ----------------------------------------------------------------------------------------------------------


class Island(nn.Module):
    """Autocast off in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch.autocast("cpu", enabled=False):
            result: Tensor = self.second(hidden.float())
            return result


def test_an_island_without_autocast_keeps_its_dtype() -> None:
    model = made(Island)
    fast = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for seed in range(4):
            assert fast(call(seed)).dtype == torch.float32
            assert torch.is_autocast_enabled("cpu")
    assert phase(fast) == "factored"


class Counting(nn.Module):
    """Writes to a buffer through one of several views."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2, WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = self.state
        one, _ = state.unbind(0)
        one.add_(1)
        result: Tensor = self.layer(x) + one
        return result


@torch.no_grad()
def test_a_buffer_that_is_written_through_a_view_is_left_to_the_model() -> None:
    model = made(Counting)
    fast = compiled(model)
    for seed in range(4):
        fast(call(seed))
    assert phase(fast) == "waiting"  # the graph is not the backend's
    assert float(model.state[0, 0]) == 4


class Doubling(nn.Module):
    """Writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        result: Tensor = self.layer(x)
        return result


@torch.no_grad()
def test_timing_leaves_the_kept_calls_alone() -> None:
    fast = compiled(made(Doubling), calibration_steps=100)
    fast(call())
    ((member,),) = [family.members for family in families()]
    assert member.recording is not None
    rivals = Rivals([member])
    runs: list[Any] = [rivals.dense() for _ in range(3)]
    assert torch.equal(runs[0][0][0], runs[2][0][0])
    assert torch.equal(member.recording.effect_calls[0][1].args[0], call())


class Looking(nn.Module):
    """Has a matrix, and no layer that is factored."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layer: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.table(x))
        torch._dynamo.graph_break()
        result: Tensor = self.layer(found)
        return result


@torch.no_grad()
def test_a_model_without_layers_to_factor_is_given_up() -> None:
    fast = compiled(made(Looking))
    fast(torch.arange(9))
    found = lowrank_fx.status(fast)
    assert found.phase == "dense"
    assert "none of its layers can be factored" in found.reason
    assert all(member.recording is None for family in families() for member in family.members)


@torch.no_grad()
def test_a_graph_without_layers_does_not_hold_up_the_others() -> None:
    model = made(Looking)
    model.layer = made(mlp)
    fast = compiled(model)
    for _ in range(3):
        fast(torch.arange(9))
    found = lowrank_fx.status(fast)
    assert (found.phase, found.graphs, found.reason) == ("factored", 2, "")


# ---- calls that hold NaN ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_call_with_nan_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = made(Doubling)
    fast = compiled(model, calibration_steps=3, keep_params=0.8)
    bad = call()
    bad[0, 0] = torch.nan
    with caplog.at_level(logging.WARNING, "lowrank_fx"):
        for seed, given in enumerate((bad, call(1), bad, call(2), bad, call(3))):  # held out calls among them
            mine, theirs = given.clone(), given.clone()
            torch.testing.assert_close(fast(mine), model(theirs), equal_nan=True)
            torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=0, atol=0)  # written to once
            assert lowrank_fx.status(fast).steps == (seed + 1) // 2
    assert phase(fast) == "factored"
    assert caplog.text.count("NaN") == 1


@torch.no_grad()
def test_calls_that_always_hold_nan_are_given_up() -> None:
    fast = compiled(made(mlp))
    for _ in range(PATIENCE * 2):
        assert phase(fast) in ("waiting", "calibrating")
        fast(torch.full((4, WIDTH), torch.nan))
    found = lowrank_fx.status(fast)
    assert found.phase == "dense"
    assert "4 calls could not be calibrated" in found.reason
    assert "holds NaN" in found.reason


# ---- families and plans ----------------------------------------------------------------------------------------------


def test_two_threads_find_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Skip):
        def __init__(self, *args: Any) -> None:
            time.sleep(0.1)
            super().__init__(*args)

    monkeypatch.setattr(family_module, "Skip", Slow)
    model, options = made(mlp), BackendOptions()
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(family_of(model, [model[0].weight], options))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1]


@torch.no_grad()
def test_the_plan_says_what_the_timing_has_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    small = lowrank_fx.optimize(made(mlp), [call()], target=Keep(params=0.6), compile=False, progress=False)
    plan = replace(small.plan, notes=("planned",))
    times = SimpleNamespace(dense_runs=list, survey=lambda: None, notes=("timed",))
    monkeypatch.setattr(planning, "site_times", lambda *args, **kwargs: times)
    monkeypatch.setattr(planning, "share_of_run", lambda *args: 0.5)
    settled = SimpleNamespace(planned=SimpleNamespace(plan=plan, made=None), timing=None)
    monkeypatch.setattr(planning, "settle", lambda *args: settled)
    session: Any = SimpleNamespace(program=SimpleNamespace(device="cpu"), aimed=lambda *args: None)
    made_plan = planning._planned(session, BackendOptions(target=Keep(latency=0.9)), Rivals([]))
    assert made_plan.plan.notes == ("planned", "timed")
