"""``torch.compile(model, backend="lowrank_fx")``: calibrate while calling, switch, and stay correct."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import lowrank_fx
from lowrank_fx.backend import lowrank_fx as backend
from lowrank_fx.backend.family import families
from lowrank_fx.backend.planning import Planned
from lowrank_fx.backend.regions import local
from lowrank_fx.batches import Call
from lowrank_fx.capture import capture
from lowrank_fx.errors import LowRankError
from lowrank_fx.graph_program import GraphProgram

WIDTH = 32


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mlp(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 24)).eval()


def batches(count: int, rows: int = 16, width: int = WIDTH) -> list[Tensor]:
    return [torch.randn(rows, width, generator=torch.Generator().manual_seed(number)) for number in range(count)]


def compiled(model: nn.Module, **options: Any) -> Any:
    given = {"calibration_steps": 5, "keep_params": 0.5, "inner": "eager", **options}
    if {"tolerance", "keep_flops", "keep_latency"} & given.keys():
        del given["keep_params"]
    return torch.compile(model, backend="lowrank_fx", options=given)


def recompiles() -> int:
    return int(sum(counters["recompiles"].values()))


@torch.no_grad()
def calibrated(model: Any, calls: list[Tensor]) -> None:
    for call in calls:
        model(call)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().norm() / other.double().norm())


# ---- the way through -------------------------------------------------------------------------------------------------


def test_calls_are_calibrated_and_then_run_what_optimize_would_have_made() -> None:
    model, calls = mlp(), batches(12)
    fast = compiled(model, calibration_steps=10)
    assert lowrank_fx.status(fast).phase == "waiting"
    with torch.no_grad():
        for number, call in enumerate(calls[:10]):
            assert lowrank_fx.status(fast).steps == number
            torch.testing.assert_close(fast(call), model(call))
        found = lowrank_fx.status(fast)
        assert (found.phase, found.steps, found.graphs) == ("factored", 10, 1)
        # The same factors in the graph that optimize captures.
        (family,) = families()
        assert isinstance(family.planned, Planned)
        program = GraphProgram.from_capture(capture(model, Call((calls[0],), {})))
        sites = {site.name: site for site in program.find_sites().sites}
        same = program.factorize(local(sites, family.planned.made.factored), clone=True)
        assert found.plan is not None
        assert len(found.plan.factored) == 2
        assert found.plan.totals.kept("params", "model") <= 0.5
        for call in calls:
            torch.testing.assert_close(fast(call), same.module(call))
    assert "layers are factored" in str(found.report)


def test_dynamo_compiles_nothing_again_at_the_switch() -> None:
    seen: list[int] = []

    def counted(gm: Any, example_inputs: Any, *, options: Any = None) -> Any:
        seen.append(1)
        return backend(gm, example_inputs, options=options)

    inner = CompileCounterWithBackend("eager")
    model = mlp()
    options: dict[str, Any] = {"calibration_steps": 3, "keep_params": 0.5, "inner": inner}
    fast = torch.compile(model, backend=counted, options=options)
    counters.clear()
    calibrated(fast, batches(8))
    assert lowrank_fx.status(fast).phase == "factored"
    assert len(seen) == 1  # Dynamo came once, with the only graph
    assert inner.frame_count == 2  # and the inner backend compiled it dense, and then factored
    assert recompiles() == 0


def test_a_function_is_compiled_too() -> None:
    model = mlp()

    options: dict[str, Any] = {"calibration_steps": 3, "keep_params": 0.5, "inner": "eager"}

    @torch.compile(backend="lowrank_fx", options=options)
    def run(value: Tensor) -> Tensor:
        result: Tensor = model(value).tanh()
        return result

    calibrated(run, batches(4))
    found = lowrank_fx.status(run)
    assert found.phase == "factored"
    assert found.plan is not None
    assert [site.name for site in found.plan.sites] == ["model.0", "model.2"]


def test_module_compile_in_place() -> None:
    model = made(Broken)  # torch compiles no bare nn.Sequential in place
    model.compile(backend="lowrank_fx", options={"calibration_steps": 3, "keep_params": 0.5, "inner": "eager"})
    calibrated(model, batches(4))
    assert lowrank_fx.status(model).phase == "factored"


def test_forward_compiled_in_place() -> None:
    model = mlp()
    options: dict[str, Any] = {"calibration_steps": 3, "keep_params": 0.5, "inner": "eager"}
    model.forward = torch.compile(model.forward, backend="lowrank_fx", options=options)  # type: ignore[method-assign]
    calibrated(model, batches(4))
    found = lowrank_fx.status(model)
    assert found.phase == "factored"
    assert found.plan is not None
    assert [site.name for site in found.plan.sites] == ["0", "2"]


def test_calibration_ends_when_it_is_told_to() -> None:
    model, calls = mlp(), batches(3)
    fast = compiled(model, calibration_steps=1000)
    with pytest.raises(LowRankError, match="call it first"):
        lowrank_fx.finish_calibration(fast)
    calibrated(fast, calls)
    found = lowrank_fx.finish_calibration(fast)
    assert (found.phase, found.steps) == ("factored", 3)
    with torch.no_grad():
        assert 0 < apart(fast(calls[0]), model(calls[0])) < 1


def test_a_target_out_of_reach_leaves_the_model_dense_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, calls = mlp(), batches(4)
    fast = compiled(model, calibration_steps=3, keep_params=0.001)
    with caplog.at_level(logging.WARNING, "lowrank_fx"):
        calibrated(fast, calls)
    found = lowrank_fx.status(fast)
    assert found.phase == "dense"
    assert "smallest reachable" in found.reason
    assert "smallest reachable" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(fast(calls[0]), model(calls[0]))
    again = compiled(mlp(1), calibration_steps=100, keep_params=0.001)
    calibrated(again, calls)
    with pytest.raises(lowrank_fx.TargetError, match="smallest reachable"):
        lowrank_fx.finish_calibration(again)


@pytest.mark.parametrize("target", ["tolerance", "keep_latency"])
def test_a_target_that_promises_speed_is_timed(target: str) -> None:
    model, calls = mlp(), batches(4)
    fast = compiled(model, calibration_steps=3, **{target: 0.9})
    calibrated(fast, calls)
    found = lowrank_fx.status(fast)
    # Which of the two depends on the clock; so small a model may have nothing to gain.
    assert found.phase in ("factored", "dense")
    if found.phase == "factored":
        assert found.timing is not None
        assert found.timing.faster
    else:
        assert found.reason
        with torch.no_grad():
            torch.testing.assert_close(fast(calls[0]), model(calls[0]))


def test_skipped_layers_stay() -> None:
    fast = compiled(mlp(), calibration_steps=3, keep_params=0.7, skip=["2"])
    calibrated(fast, batches(4))
    plan = lowrank_fx.status(fast).plan
    assert plan is not None
    assert [entry.name for entry in plan.left_alone] == ["2"]
    assert {site.name for site in plan.factored} <= {"0"}


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    fast = compiled(mlp(), skip=["head"])
    with pytest.raises(lowrank_fx.OptionError, match="matches no weight"), torch.no_grad():
        fast(batches(1)[0])


def test_modes_are_those_of_inductor() -> None:
    with pytest.raises(Exception, match="has no modes"), torch.no_grad():
        torch.compile(mlp(), backend="lowrank_fx", mode="max-autotune")(batches(1)[0])


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranks": 3}, "no such option; the legal ones are calibration_steps, effort, inner, keep_flops"),
        ({"keep_params": 0.5, "tolerance": 0.1}, "several targets"),
        ({"calibration_steps": 0}, "a whole number of at least 1"),
        ({"calibration_steps": True}, "a whole number of at least 1"),
        ({"keep_params": 1.5}, "above 0 and at most 1"),
        ({"tolerance": -1}, "must be a finite number above 0"),
        ({"skip": "2"}, "give a list or tuple of names"),
        ({"inner": "lowrank_fx"}, "another backend"),
        ({"inner": 3}, "another backend"),
        ({"plan": 3}, "the folder of a saved model"),
        ({"verbose": 1}, "give True or False"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(Exception, match=told) as caught:
        torch.compile(mlp(), backend="lowrank_fx", options=options)(batches(1)[0])
    assert "lowrank_fx" in str(caught.value)


def test_a_saved_model_needs_no_calibration(tmp_path: Path) -> None:
    model, calls = mlp(), batches(6)
    small = lowrank_fx.optimize(model, calls, target=lowrank_fx.Keep(params=0.5), compile=False, progress=False)
    small.save(tmp_path)
    for where in (str(tmp_path), tmp_path / "plan.json"):
        torch.compiler.reset()
        fast = compiled(model, plan=where)
        with torch.no_grad():
            for call in calls:
                torch.testing.assert_close(fast(call), small(call))
        found = lowrank_fx.status(fast)
        assert (found.phase, found.steps, found.plan) == ("factored", 0, small.plan)


def test_a_saved_model_of_other_weights_is_not_used(tmp_path: Path) -> None:
    model, calls = mlp(), batches(6)
    lowrank_fx.optimize(model, calls, target=lowrank_fx.Keep(params=0.5), compile=False, progress=False).save(tmp_path)
    other = mlp(1)
    fast = compiled(other, plan=str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(fast(calls[0]), other(calls[0]))
    found = lowrank_fx.status(fast)
    assert found.phase == "dense"
    assert "other values" in found.reason


def test_a_plan_without_factors_is_followed() -> None:
    model, calls = mlp(), batches(10)
    small = lowrank_fx.optimize(model, calls, target=lowrank_fx.Keep(params=0.6), compile=False, progress=False)
    fast = compiled(model, plan=small.plan, calibration_steps=10)
    calibrated(fast, calls)
    assert lowrank_fx.status(fast).plan == small.plan
    with torch.no_grad():
        torch.testing.assert_close(fast(calls[0]), small(calls[0]))


# ---- other calls -----------------------------------------------------------------------------------------------------


def test_sizes_that_change() -> None:
    model = mlp()
    fast = compiled(model, calibration_steps=6)
    calls = [call for rows in (4, 9, 16, 5) for call in batches(3, rows)]
    torch._dynamo.mark_dynamic(calls[0], 0)
    calibrated(fast, calls)
    found = lowrank_fx.status(fast)
    assert (found.phase, found.graphs) == ("factored", 1)
    with torch.no_grad():
        errors = [apart(fast(call), model(call)) for call in (*calls, *batches(2, 33))]
    assert 0 < max(errors) < 0.8


def test_a_graph_that_comes_after_the_switch_has_the_same_factors() -> None:
    model = mlp()
    fast = compiled(model, calibration_steps=4)
    calibrated(fast, batches(5))
    call = batches(1)[0]
    with torch.no_grad():
        whole = fast(call)
        parts = torch.cat([fast(call[:7]), fast(call[7:])])  # another size, another graph
    found = lowrank_fx.status(fast)
    assert (found.phase, found.graphs) == ("factored", 2)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_inference(mode: Any) -> None:
    model, calls = mlp(), batches(6)
    fast = compiled(model, calibration_steps=4)
    with mode():
        for call in calls[:4]:
            torch.testing.assert_close(fast(call), model(call))
        assert 0 < apart(fast(calls[0]), model(calls[0])) < 0.8
    with torch.inference_mode(mode is not torch.inference_mode), torch.no_grad():
        assert 0 < apart(fast(calls[0]), model(calls[0])) < 0.8


def test_bfloat16() -> None:
    model = mlp().bfloat16()
    calls = [call.bfloat16() for call in batches(6)]
    fast = compiled(model, calibration_steps=4)
    calibrated(fast, calls)
    assert lowrank_fx.status(fast).phase == "factored"
    with torch.no_grad():
        assert fast(calls[0]).dtype == torch.bfloat16
        assert 0 < apart(fast(calls[0]), model(calls[0])) < 0.8


def test_autocast() -> None:
    model, calls = mlp(), batches(6)
    fast = compiled(model, calibration_steps=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for call in calls[:4]:
            # bfloat16 has 8 bits; the two differ where a sum is rounded at another place.
            torch.testing.assert_close(fast(call), model(call), rtol=2**-6, atol=2**-6)
        small = fast(calls[0])
        assert small.dtype == torch.bfloat16
        assert 0 < apart(small, model(calls[0])) < 0.8
    found = lowrank_fx.status(fast)
    assert found.phase == "factored"
    assert found.plan is not None
    assert [site.name for site in found.plan.sites] == ["0", "2"]
    with torch.no_grad():  # without autocast it is another graph, with the same plan
        assert fast(calls[0]).dtype == torch.float32
        assert apart(fast(calls[0]), small) < 2**-5


def test_parameters_that_dynamo_does_not_pass() -> None:
    """As it is where inductor is to freeze weights: a region then holds its parameters itself."""
    model, calls = mlp(), batches(6)
    with torch._inductor.config.patch(freezing=True):
        fast = compiled(model, calibration_steps=4)
        with torch.no_grad():
            for call in calls[:4]:
                torch.testing.assert_close(fast(call), model(call))
            assert 0 < apart(fast(calls[0]), model(calls[0])) < 0.8
        found = lowrank_fx.status(fast)
        assert found.phase == "factored"
        assert found.plan is not None
        assert [site.name for site in found.plan.sites] == ["0", "2"]
        scale_in_place(model)
        with torch.no_grad():
            torch.testing.assert_close(fast(calls[0]), model(calls[0]))
        assert lowrank_fx.status(fast).phase == "stale"


def test_an_input_that_is_written_to() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            result: Tensor = self.layer(x)
            return result

    model = made(Writing)
    fast = compiled(model, calibration_steps=5)
    with torch.no_grad():
        for number, call in enumerate(batches(7)):
            mine, theirs = call.clone(), call.clone()
            found, wanted = fast(mine), model(theirs)
            assert torch.equal(mine, theirs)
            if number < 5:
                torch.testing.assert_close(found, wanted)
            else:
                assert 0 < apart(found, wanted) < 0.8
    assert lowrank_fx.status(fast).phase == "factored"


def test_padding_is_kept_out_of_the_sketch() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            result: Tensor = self.layer(x) * attention_mask[..., None]
            return result

    model = Masked().eval()
    generator = torch.Generator().manual_seed(0)
    fast = compiled(model, calibration_steps=2)
    clean = torch.randn(4, 6, WIDTH, generator=generator)
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    dirty = torch.where(mask[..., None] == 1, clean, 1e4)
    with torch.no_grad():
        fast(dirty, attention_mask=mask)
        lowrank_fx.finish_calibration(fast)
    plan = lowrank_fx.status(fast).plan
    assert plan is not None
    # With padding, nearly all energy would lie in one direction, and half of the weights would lose nothing.
    assert plan.sites[0].error > 0.1


# ---- several graphs --------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """A graph break in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 48)
        self.second = nn.Linear(48, 48)
        self.third = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        torch._dynamo.graph_break()
        result: Tensor = self.third(x)
        return result


class Branching(nn.Module):
    """A branch that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 48)
        self.often = nn.Linear(48, 48)
        self.rarely = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        result: Tensor = self.often(hidden) if x.sum() > 0 else self.rarely(hidden)
        return result


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return kind().eval()


def test_a_graph_break_leaves_one_plan() -> None:
    model, calls = made(Broken), batches(7)
    fast = compiled(model, calibration_steps=5, keep_params=0.6)
    counters.clear()
    with torch.no_grad():
        for call in calls[:5]:
            torch.testing.assert_close(fast(call), model(call))
        found = lowrank_fx.status(fast)
        assert (found.phase, found.graphs, found.steps) == ("factored", 2, 5)
        assert 0 < apart(fast(calls[5]), model(calls[5])) < 0.9
    assert recompiles() == 0
    plan = found.plan
    assert plan is not None
    assert sorted(site.name for site in plan.sites) == ["first", "second", "third"]
    kept, whole = plan.totals.model_params[1], sum(parameter.numel() for parameter in model.parameters())
    assert plan.totals.model_params[0] == whole
    assert kept <= 0.6 * whole
    assert any("2 graphs" in note for note in plan.notes)


def test_fullgraph_is_passed_on() -> None:
    options: dict[str, Any] = {"calibration_steps": 3, "keep_params": 0.5, "inner": "eager"}
    fast = torch.compile(mlp(), backend="lowrank_fx", options=options, fullgraph=True)
    calibrated(fast, batches(4))
    assert lowrank_fx.status(fast).phase == "factored"
    with pytest.raises(Exception, match="graph_break"), torch.no_grad():
        torch.compile(made(Broken), backend="lowrank_fx", options=options, fullgraph=True)(batches(1)[0])


def test_a_branch_that_is_rarely_taken_does_not_hold_up_the_plan(caplog: pytest.LogCaptureFixture) -> None:
    model = made(Branching)
    fast = compiled(model, calibration_steps=4, keep_params=0.7)
    calls = [call.abs() for call in batches(12)]
    calls[0] = -calls[0]
    with caplog.at_level(logging.INFO, "lowrank_fx"), torch.no_grad():
        for number, call in enumerate(calls[:7]):
            torch.testing.assert_close(fast(call), model(call))
            assert lowrank_fx.status(fast).steps == number + 1
        fast(calls[7])  # the plan is made in its first graph
        found = lowrank_fx.status(fast)
        assert (found.phase, found.graphs) == ("factored", 3)
        assert "1 of 3 layers were called fewer than 4 times in 8 calls" in caplog.text
        for call in (calls[0], calls[9]):
            assert 0 < apart(fast(call), model(call)) < 0.9


def test_two_models_of_one_class_have_plans_of_their_own() -> None:
    one, other, calls = mlp(0), mlp(1), batches(6)
    options: dict[str, Any] = {"calibration_steps": 4, "keep_params": 0.5, "inner": "eager"}
    fast, second = (torch.compile(model, backend="lowrank_fx", options=options) for model in (one, other))
    with torch.no_grad():
        for call in calls[:4]:
            fast(call)
        assert lowrank_fx.status(fast).phase == "factored"
        assert lowrank_fx.status(second).phase == "waiting"
        torch.testing.assert_close(second(calls[0]), other(calls[0]))
        assert lowrank_fx.status(second).steps == 1
        for call in calls[:4]:
            second(call)
        assert lowrank_fx.status(second).phase == "factored"
        assert apart(fast(calls[5]), one(calls[5])) < 0.8
        assert apart(second(calls[5]), other(calls[5])) < 0.8


def test_the_same_model_with_other_options() -> None:
    model, calls = mlp(), batches(5)
    small, smaller = compiled(model, calibration_steps=4), compiled(model, calibration_steps=4, keep_params=0.3)
    calibrated(small, calls)
    calibrated(smaller, calls)
    found = [family.plan.totals.kept("params", "model") for family in families() if family.plan]
    assert len(found) == 2
    assert min(found) <= 0.3 < max(found) <= 0.5


def test_reset_starts_again() -> None:
    model, calls = mlp(), batches(5)
    fast = compiled(model, calibration_steps=4)
    calibrated(fast, calls)
    torch.compiler.reset()
    assert lowrank_fx.status(fast).phase == "waiting"
    with torch.no_grad():
        torch.testing.assert_close(fast(calls[0]), model(calls[0]))
    assert lowrank_fx.status(fast).steps == 1


def test_threads_that_call_during_the_switch() -> None:
    model, calls = mlp(), batches(8)
    fast = compiled(model, calibration_steps=6)
    with torch.no_grad():
        fast(calls[0])
    wrong: list[float] = []

    def work(start: int) -> None:
        with torch.no_grad():
            for turn in range(25):
                call = calls[(start + turn) % len(calls)]
                error = apart(fast(call), model(call))
                if not error < 0.8:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert lowrank_fx.status(fast).phase == "factored"
    with torch.no_grad():
        assert apart(fast(calls[0]), model(calls[0])) > 0


# ---- gradients and weights that change -------------------------------------------------------------------------------


@pytest.mark.slow
def test_torch_logs_tells_what_happens() -> None:
    code = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 24)).eval()
options = {"calibration_steps": 3, "keep_params": 0.5, "inner": "eager"}
fast = torch.compile(model, backend="lowrank_fx", options=options)
with torch.no_grad():
    for _ in range(4):
        fast(torch.randn(8, 32))
"""
    environment = {**os.environ, "TORCH_LOGS": "+lowrank_fx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "planning for Keep(params=0.5) after 3 calls" in done.stderr
    assert "layers are factored from now on" in done.stderr


def test_gradients_are_those_of_the_dense_model() -> None:
    model, calls = mlp(), batches(6)
    fast = compiled(model, calibration_steps=4)
    calibrated(fast, calls)
    assert lowrank_fx.status(fast).phase == "factored"
    for trained in (True, False):
        model.train(trained)
        model.zero_grad()
        fast(calls[0]).square().mean().backward()
        found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        model(calls[0]).square().mean().backward()
        assert len(found) == 4
        for grad, parameter in zip(found, model.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad)
    assert lowrank_fx.status(fast).phase == "factored"  # nothing was changed


def test_gradients_of_an_input_alone() -> None:
    model, calls = mlp().requires_grad_(False), batches(6)
    fast = compiled(model, calibration_steps=4)
    for call in calls:  # gradient mode is on, and nothing needs gradients
        fast(call)
    assert lowrank_fx.status(fast).phase == "factored"
    leaves = [calls[0].clone().requires_grad_(), calls[0].clone().requires_grad_()]
    for run, leaf in zip((fast, model), leaves, strict=True):
        run(leaf).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_calls_with_gradients_are_not_calibrated(caplog: pytest.LogCaptureFixture) -> None:
    fast = compiled(mlp(), calibration_steps=2)
    with caplog.at_level(logging.INFO, "lowrank_fx"):
        for call in batches(5):
            fast(call)
    assert lowrank_fx.status(fast).steps == 0
    assert caplog.text.count("call the model under torch.no_grad()") == 1


def first(model: nn.Sequential) -> nn.Linear:
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    return layer


def scale_in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        first(model).weight.mul_(2)


def scale_data(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(2)


def load_others(model: nn.Sequential) -> None:
    model.load_state_dict(mlp(5).state_dict())


def assign_others(model: nn.Sequential) -> None:
    model.load_state_dict(mlp(5).state_dict(), assign=True)


def exchange_one(model: nn.Sequential) -> None:
    first(model).weight = nn.Parameter(2 * first(model).weight.detach())


def exchange_data(model: nn.Sequential) -> None:
    first(model).weight.data = 2 * first(model).weight.data


def step(model: nn.Sequential, **options: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.05, **options).step()


def fused_step(model: nn.Sequential) -> None:
    step(model, fused=True)


@pytest.mark.parametrize(
    "change",
    [scale_in_place, scale_data, load_others, assign_others, exchange_one, exchange_data, step, fused_step],
)
def test_changed_weights_are_noticed(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, calls = mlp(), batches(6)
    fast = compiled(model, calibration_steps=4)
    calibrated(fast, calls)
    assert lowrank_fx.status(fast).phase == "factored"
    change(model)
    with caplog.at_level(logging.WARNING, "lowrank_fx"), torch.no_grad():
        torch.testing.assert_close(fast(calls[0]), model(calls[0]))
    found = lowrank_fx.status(fast)
    assert found.phase == "stale"
    assert "has changed" in found.reason
    assert "refresh" in caplog.text
    if change in (scale_data, assign_others):
        assert lowrank_fx.refresh(fast).phase == "calibrating"
        calibrated(fast, calls)
        assert lowrank_fx.status(fast).phase == "factored"
        with torch.no_grad():
            assert 0 < apart(fast(calls[0]), model(calls[0])) < 0.8


def test_weights_that_change_during_calibration_start_it_again() -> None:
    model, calls = mlp(), batches(8)
    fast = compiled(model, calibration_steps=4)
    calibrated(fast, calls[:3])
    step(model)
    calibrated(fast, calls[3:4])
    assert lowrank_fx.status(fast).steps == 1
    calibrated(fast, calls[4:])
    assert lowrank_fx.status(fast).phase == "factored"


def test_a_training_loop_that_validates_in_between() -> None:
    """As Lightning does: epochs of training and validation in turn, then the trained model is used."""
    model, twin, calls = mlp(), mlp(), batches(5)
    fast = compiled(model, calibration_steps=4)
    pairs = [(run, torch.optim.SGD(own.parameters(), lr=0.1)) for run, own in ((fast, model), (twin, twin))]
    for _ in range(3):
        for (run, optimizer), own in zip(pairs, (model, twin), strict=True):
            own.train()
            for call in calls[:2]:
                optimizer.zero_grad()
                run(call).square().mean().backward()
                optimizer.step()
            own.eval()
        with torch.no_grad():
            for call in calls[:3]:
                torch.testing.assert_close(fast(call), twin(call))
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    calibrated(fast, calls)
    assert lowrank_fx.status(fast).phase == "factored"
