"""Frozen compilation: the same numbers, and never those of weights that are no longer the model's."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import lowrank_fx
from lowrank_fx import Keep, OptionError, frozen, measuring
from lowrank_fx.comparison import compare_models
from lowrank_fx.frozen import Frozen
from lowrank_fx.latency import PairedTiming
from lowrank_fx.module import LowRankModule


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Net(nn.Module):
    """Linear layers, a buffer, and tensors that are no parameters: all of them constants of frozen code."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 24), nn.Linear(24, 8)
        self.register_buffer("shift", torch.randn(8))
        self.plain, self.listed = torch.randn(8), [torch.randn(8)]

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.first(x).relu()) * self.plain + self.shift + self.listed[0]
        return made


def rows(count: int = 4, width: int = 16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count))


def close(got: Tensor, expected: Tensor) -> None:
    """Equal to rounding: products of depth <= 48 in float32, summed in another order; measured 1e-6."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=4e-6)


def agrees(run: Frozen, model: nn.Module, x: Tensor) -> None:
    close(run(x), model(x))


# ---- weights that change ---------------------------------------------------------------------------------------------


def in_place(model: Net) -> None:
    model.first.weight.mul_(2)


def a_buffer(model: Net) -> None:
    model.shift.add_(1)


def an_attribute(model: Net) -> None:
    model.plain.add_(1)


def in_a_list(model: Net) -> None:
    model.listed[0].add_(1)


def another_in_a_list(model: Net) -> None:
    model.listed[0] = torch.ones(8)


def replaced(model: Net) -> None:
    model.second.bias = nn.Parameter(torch.ones(8))


def another_layer(model: Net) -> None:
    model.second = nn.Linear(24, 8)


def other_memory(model: Net) -> None:
    model.first.weight.data = model.first.weight.data + 1


def a_state_dict(model: Net) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()})


def an_assigned_state_dict(model: Net) -> None:
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)


def a_fused_optimizer(model: Net) -> None:
    # torch's fused steps do not count up a tensor's version: what the hook on optimizers is for.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = model.first.weight._version
    optimizer.step()
    assert model.first.weight._version == before


@pytest.fixture(scope="module")
def changing() -> Frozen:
    """One model that is changed again and again: compiling takes seconds."""
    return Frozen(Net())


@pytest.mark.parametrize(
    "change",
    [
        in_place,
        a_buffer,
        an_attribute,
        in_a_list,
        another_in_a_list,
        replaced,
        another_layer,
        other_memory,
        a_state_dict,
        an_assigned_state_dict,
        a_fused_optimizer,
    ],
)
def test_changed_weights_are_seen_by_the_next_call(changing: Frozen, change: Callable[[Net], None]) -> None:
    model, x = changing._module, rows()
    assert isinstance(model, Net)
    agrees(changing, model, x)
    before, compilations = model(x), changing.compilations
    agrees(changing, model, x)
    assert changing.compilations == compilations
    change(model)
    assert not torch.allclose(model(x), before, rtol=1e-3)
    agrees(changing, model, x)
    assert changing.compilations == compilations + 1
    assert changing.refused is None


def test_what_is_written_through_data_in_place_is_not_seen() -> None:
    """The one way around, as the documentation says; it is also the proof that weights are constants."""
    model, x = Net(), rows()
    run = Frozen(model)
    before = run(x)
    model.first.weight.data.mul_(2)
    assert torch.equal(run(x), before)
    model.first.weight.mul_(1)
    agrees(run, model, x)


def test_a_cast_is_seen() -> None:
    model, x = Net(), rows()
    run = Frozen(model)
    agrees(run, model, x)
    model.to(torch.float64)
    model.plain, model.listed = model.plain.double(), [model.listed[0].double()]
    made = run(x.double())
    assert made.dtype is torch.float64
    torch.testing.assert_close(made, model(x.double()), rtol=1e-12, atol=1e-12)


def test_old_memory_is_not_mistaken_for_new() -> None:
    """While nothing calls, two changes could end where the first tensor was, had its memory been given back."""
    model, x = Net(), rows()
    run = Frozen(model)
    run(x)
    for step in range(20):
        model.first.weight.data = torch.full((24, 16), 1.0 + step)
    agrees(run, model, x)


# ---- calls -----------------------------------------------------------------------------------------------------------


def test_rows_of_any_number_and_inference_mode() -> None:
    model = Net()
    run = Frozen(model)
    for count in (1, 4, 7, 4, 32):
        agrees(run, model, rows(count))
    with torch.inference_mode():
        agrees(run, model, rows(5))
    assert (run.compilations, run.refused) == (1, None)


def test_gradients_flow() -> None:
    model, x = Net(), rows()
    run = Frozen(model)
    agrees(run, model, x)
    with torch.enable_grad():
        run(x).square().sum().backward()
        got = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        model(x).square().sum().backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-5, atol=1e-5)
    agrees(run, model, x)
    assert run.compilations == 1


def test_a_graph_is_frozen_like_a_module() -> None:
    layer = nn.Linear(16, 8)
    model = nn.Sequential(layer, nn.Tanh())
    graph = fx.symbolic_trace(model)
    run = Frozen(graph)
    agrees(run, model, rows())
    layer.bias.add_(1)  # the graph shares it
    agrees(run, model, rows())
    assert run.compilations == 2


def test_convolutions_are_laid_out_and_right() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, (3, 1)), nn.Conv2d(4, 16, (1, 3)), nn.BatchNorm2d(16), nn.ReLU()).eval()
    run = Frozen(model)
    x = torch.randn(2, 8, 9, 9)
    close(run(x), model(x))
    model[2].running_mean.add_(1)  # type: ignore[operator]
    close(run(x), model(x))
    assert (run.compilations, run.refused) == (2, None)


def test_a_wrong_call_is_the_callers_affair() -> None:
    run = Frozen(Net())
    with pytest.raises(Exception, match=r"mat1 and mat2|size|shape"):
        run(rows(4, 15))
    agrees(run, run._module, rows())
    assert run.refused is None


# ---- what cannot be frozen -------------------------------------------------------------------------------------------


class Counting(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.shift.add_(1)
        return super().forward(x)


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        made = self.first(x)
        torch._dynamo.graph_break()
        part: Tensor = self.second(made)
        return part


class Subclass(Tensor):
    pass


def of_inference() -> Net:
    with torch.inference_mode():
        return Net()


def of_subclass() -> Net:
    model = Net()
    model.shift = torch.randn(8).as_subclass(Subclass)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Counting, "it writes to its own tensors while it runs"),
        (Broken, "graph_break"),
        (of_inference, "tensors that were made in inference mode"),
        (of_subclass, "changes of a Subclass"),
    ],
)
def test_what_cannot_be_frozen_runs_compiled_with_a_word(make: Callable[[], Net], reason: str) -> None:
    model, twin, x = make(), make(), rows()
    run = Frozen(model)
    with pytest.warns(UserWarning, match=f"its weights cannot be frozen: .*{reason}"):
        first = run(x)
    close(first, twin(x))
    close(run(x), twin(x))
    assert run.refused is not None


# ---- memory ----------------------------------------------------------------------------------------------------------


def packed() -> list[Tensor]:
    """Every tensor that only frozen code has: weights in a layout of oneDNN's own."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Tensor and found.is_mkldnn]


@pytest.mark.skipif(not torch._C._has_mkldnn, reason="frozen weights are packed by oneDNN")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the collector's objects include what torch deprecates
def test_frozen_code_goes_with_its_weights() -> None:
    others = packed()  # held, so that none of other tests goes in the meantime
    layer = nn.Linear(64, 199)
    run, x = Frozen(nn.Sequential(layer, nn.Linear(199, 64))), rows(4, 64)
    counts = []
    for _ in range(3):
        layer.weight.mul_(2)
        run(x)
        counts.append(len(packed()) - len(others))
    assert counts[0] > 0
    assert counts == [counts[0]] * 3
    code = weakref.ref(run._code)
    del run
    assert len(packed()) == len(others)
    assert code() is None


def test_what_hears_of_optimizers_holds_no_module() -> None:
    run = Frozen(Net())
    assert run in frozen._ALL
    gone = weakref.ref(run)
    del run
    gc.collect()
    assert gone() is None


# ---- the product -----------------------------------------------------------------------------------------------------


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48), nn.Tanh(), nn.Linear(48, 5)).eval()


def batches() -> list[Tensor]:
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(99)) / 7
    return [rows(32 + seed, 48)[:32] @ mixing for seed in range(6)]


@pytest.fixture(scope="module")
def fast() -> LowRankModule:
    return lowrank_fx.optimize(perceptron(), batches(), target=Keep(params=0.6), frozen=True, progress=False)


def eager(made: LowRankModule, x: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        got: Tensor = made(x)
    return got


def runner(made: LowRankModule) -> Frozen:
    assert isinstance(made._run, Frozen)
    return made._run


def test_optimize_freezes_both_models(fast: LowRankModule) -> None:
    assert fast.compiled
    assert fast.frozen
    close(fast(batches()[0]), eager(fast, batches()[0]))
    assert runner(fast).compilations > 0
    assert fast.timing is not None
    assert fast.session is not None
    original = fast.session.compiled_original(frozen=True)
    assert isinstance(original, Frozen)
    assert original.compilations > 0
    assert not [note for note in fast.plan.notes if "frozen" in note]


def test_what_is_made_of_a_frozen_model_is_frozen_and_right(fast: LowRankModule, tmp_path: Path) -> None:
    x = batches()[0]
    fast.save(tmp_path)
    loaded = lowrank_fx.load(perceptron(), tmp_path, frozen=True)
    for made in (copy.deepcopy(fast), fast.fold(), loaded):
        assert made.frozen
        close(made(x), fast(x))
        assert runner(made).compilations == 1
    with pytest.raises(lowrank_fx.LowRankError, match="not pickled"):
        fast.__reduce__()


def test_a_frozen_model_is_never_stale(fast: LowRankModule) -> None:
    made, x = copy.deepcopy(fast), batches()[0]
    before = made(x)
    made.load_state_dict({name: 2 * tensor for name, tensor in made.state_dict().items()})
    close(made(x), eager(made, x))
    assert not torch.allclose(made(x), before, rtol=1e-3)
    made.to(torch.float64)
    torch.testing.assert_close(made(x.double()), eager(made, x.double()), rtol=1e-12, atol=1e-12)
    with torch.enable_grad():
        made(x.double()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert runner(made).compilations == 3


def test_an_original_that_cannot_be_frozen_is_said() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = perceptron()

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_exporting():
                torch._dynamo.graph_break()
            made: Tensor = self.layers(x)
            return made

    options = {"target": Keep(params=0.6), "frozen": True, "capture": "export", "progress": False}
    made = lowrank_fx.optimize(Breaks().eval(), batches(), **options)  # type: ignore[arg-type]
    assert made.plan.notes[-1].startswith("it was measured against the original compiled without frozen weights, ")
    assert runner(made).refused is None


@pytest.mark.parametrize("speedup", [1.2, 0.9])
def test_weights_are_frozen_where_the_original_measured_faster_so(
    speedup: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timing(plain: Callable[[], Tensor], frozen: Callable[[], Tensor], **_: object) -> PairedTiming:
        close(plain(), frozen())
        return PairedTiming(speedup, 1.0, 1 / speedup, 0.0, 9)

    monkeypatch.setattr(measuring, "paired_speedup", timing)
    made = lowrank_fx.optimize(perceptron(), batches(), target=Keep(params=0.6), frozen="auto", progress=False)
    assert made.frozen == (speedup > 1)
    word = "frozen" if made.frozen else "not frozen"
    assert f"weights are {word}: the original so measured {speedup:.2f}x as fast" in made.plan.notes
    close(made(batches()[0]), eager(made, batches()[0]))
    assert made.replan(Keep(params=0.7)).frozen == made.frozen
    assert made.session is not None
    assert (True in made.session._compiled) == made.frozen  # what is laid out for nothing is let go of


def test_an_original_that_cannot_be_frozen_is_not_by_itself() -> None:
    class Counts(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layers = perceptron()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            made: Tensor = self.layers(x)
            return made

    options = {"target": Keep(params=0.6), "frozen": "auto", "capture": "modules", "progress": False}
    made = lowrank_fx.optimize(Counts().eval(), batches(), **options)  # type: ignore[arg-type]
    assert not made.frozen
    assert any(note.startswith("weights are not frozen, because it writes to its own") for note in made.plan.notes)


def test_a_comparison_compiles_both_alike(fast: LowRankModule) -> None:
    made = compare_models(perceptron(), fast, batches()[:1])
    assert made.frozen
    assert "both compiled with frozen weights" in made.speed_line


@pytest.mark.parametrize(
    ("options", "message", "loading"),
    [
        ({"frozen": True, "compile": False}, *["pass compile=True, or leave frozen out"] * 2),
        (
            {"frozen": "auto", "compile": False},
            "frozen='auto' says how to compile, but compile=False; pass compile=True, or leave frozen out",
            "frozen='auto': give True or False$",
        ),
        ({"frozen": 1}, "frozen=1: give True, False or 'auto'$", "frozen=1: give True or False$"),
    ],
)
def test_an_option_that_is_not_legal(options: dict[str, object], message: str, loading: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        lowrank_fx.optimize(perceptron(), [], **options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=loading):
        lowrank_fx.load(perceptron(), tmp_path, **options)  # type: ignore[arg-type]
