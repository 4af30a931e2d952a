"""Refinement: what learns and what stays, the loss, never worse than the start, resumed bit by bit, both ways."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lowrank_fx import refine as refining
from lowrank_fx._progress import Progress
from lowrank_fx.batches import Call
from lowrank_fx.cache import CachedBatch
from lowrank_fx.capture import capture
from lowrank_fx.compare import ErrorSum, floating_outputs
from lowrank_fx.errors import CalibrationError, OptionError, StorageError
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.judges import Measure
from lowrank_fx.kl import KLMeasure
from lowrank_fx.kl import _KLJudge as KLJudge
from lowrank_fx.program import Program
from lowrank_fx.refine import Refined, refine
from lowrank_fx.refine_loss import outputs_loss, sites_loss
from lowrank_fx.refine_options import Augment, Refine, callable_name, refine_from_json
from lowrank_fx.refine_roles import trained
from lowrank_fx.sites import Site
from lowrank_fx.training_batches import ShuffledBatches, flip_and_shift, step_generator
from lowrank_fx.tree_program import TreeProgram

Way = Literal["graph", "tree"]

OPTIONS = Refine(steps=24, lr=0.02, batch=8, every=4)


class Net(nn.Module):
    """Convolution, batch norm, an in-place relu, layer norm, two outputs in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.first = nn.Linear(12, 16)
        self.layers = nn.LayerNorm(16)
        self.second = nn.Linear(16, 10)
        with torch.no_grad():  # large enough that the output says something about the input
            for parameter in self.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
            self.norm.weight.fill_(0.5)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu_(self.norm(self.conv(image))).mean((2, 3))
        hidden = self.layers(self.first(hidden))
        return {"scores": self.second(torch.tanh(hidden)), "hidden": hidden}


def images(count: int, rows: int = 8, seed: int = 0) -> list[Call]:
    generator = torch.Generator().manual_seed(seed)
    return [Call((torch.randn(rows, 3, 6, 6, generator=generator) * 2,), {}) for _ in range(count)]


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval().to(dtype)


def program_of(model: nn.Module, call: Call, way: Way) -> Program:
    if way == "tree":
        return TreeProgram.from_model(model)
    return GraphProgram.from_capture(capture(model, call))


def factors_of(program: Program, site: Site, rank: int) -> Factors:
    """The truncated SVD of a site's weight."""
    weight = program.weight(site)
    u, s, vh = torch.linalg.svd(site.matrix(weight.detach()).double(), full_matrices=False)
    first, second = (s[:rank, None] * vh[:rank]).to(weight.dtype), u[:, :rank].to(weight.dtype)
    if site.patch is not None:
        first, second = first.reshape(rank, *site.shape[1:]), second[:, :, None, None]
    return Factors(first.contiguous(), second.contiguous(), None)


@cache
def captured(way: Way, dtype: torch.dtype) -> tuple[nn.Module, Program]:
    """A model and its program, which nothing here changes."""
    model = net(dtype)
    return model, program_of(model, images(1)[0].map(lambda tensor: tensor.to(dtype)), way)


class Setup:
    """A model, captured and factored, with inputs and held-out batches."""

    def __init__(self, way: Way = "graph", dtype: torch.dtype = torch.float32, rank: int = 4) -> None:
        self.model, self.original = captured(way, dtype)
        self.inputs = [call.map(lambda tensor: tensor.to(dtype)) for call in images(4)]
        held_out = [call.map(lambda tensor: tensor.to(dtype)) for call in images(2, seed=1)]
        with torch.no_grad():
            self.select = [CachedBatch(call, tuple(floating_outputs(self.original.run(call)))) for call in held_out]
        sites = self.original.find_sites().sites
        self.factors = {site.name: (site, factors_of(self.original, site, rank)) for site in sites}

    def factored(self) -> Program:
        return self.original.factorize(self.factors, clone=True)

    def refine(self, program: Program, options: Refine = OPTIONS, checkpoint: Path | None = None) -> Refined:
        return refine(self.original, program, self.inputs, self.select, options, checkpoint=checkpoint, progress=False)

    def held_out(self, program: Program) -> float:
        total = ErrorSum()
        with torch.no_grad():
            for batch in self.select:
                total.add(program.run(batch.call), batch.reference)
        return total.relative


def state(program: Program) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in program.module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["graph", "tree"])
@pytest.mark.parametrize("blocks", [0.0, 1.0])
def test_it_learns_and_says_so(way: Way, blocks: float) -> None:
    setup = Setup(way)
    program = setup.factored()
    start = setup.held_out(program)
    done = setup.refine(program, replace(OPTIONS, blocks=blocks))
    assert done.start == start
    assert done.best == setup.held_out(program)
    assert done.best < 0.9 * start  # measured: 0.67
    assert done.best == min(error for _, _, error in done.history)
    assert [step for step, _, _ in done.history] == [4, 8, 12, 16, 20, 24]
    assert done.best_step in range(4, 25, 4)
    assert done.steps == 24
    assert done.notes == ()


def test_the_progress_bar_tells_the_loss_and_the_held_out_error(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []

    class Bar(Progress):
        def advance(self, steps: int = 1, note: str = "") -> None:
            notes.append(note)

    monkeypatch.setattr(refining, "Progress", Bar)
    setup = Setup()
    program = setup.factored()
    start = setup.held_out(program)
    setup.refine(program)
    said = [note for note in notes if note]
    assert len(said) == OPTIONS.steps
    told = [
        re.fullmatch(r"loss ([\d.e-]+), held-out error ([\d.e-]+) \(at the start ([\d.e-]+)\)", note) for note in said
    ]
    assert all(match is not None and float(match[3]) == pytest.approx(start, rel=1e-3) for match in told)


@pytest.mark.parametrize("way", ["graph", "tree"])
def test_only_factors_biases_and_norms_change(way: Way) -> None:
    setup = Setup(way)
    del setup.factors["second"]  # stays dense
    program = setup.factored()
    original_before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    before, places = state(program), {name: id(value) for name, value in program.module.named_parameters()}
    setup.refine(program)
    after = state(program)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(trained(program))
    assert {"first.factor_in", "first.factor_out", "first.bias", "layers.weight", "second.bias"} <= changed
    assert "second.weight" not in changed
    assert ("norm.weight" in changed) == (way == "tree")  # folded into the convolution in a graph
    assert places == {name: id(value) for name, value in program.module.named_parameters()}
    assert same(original_before, dict(setup.model.state_dict()))


@pytest.mark.parametrize("way", ["graph", "tree"])
def test_flags_gradients_and_random_state_are_left_as_they_were(way: Way) -> None:
    setup = Setup(way)
    program = setup.factored()
    for number, parameter in enumerate(program.module.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    flags = [parameter.requires_grad for parameter in program.module.parameters()]
    training = [module.training for module in program.module.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():  # as the pipeline calls it
        setup.refine(program, replace(OPTIONS, steps=4, every=None))
        assert not torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in program.module.parameters()] == flags
    assert all(parameter.grad is None for parameter in program.module.parameters())
    assert [module.training for module in program.module.modules()] == training
    assert torch.equal(torch.get_rng_state(), random)


def test_never_worse_than_its_start() -> None:
    setup = Setup()
    program = setup.factored()
    before = state(program)
    done = setup.refine(program, replace(OPTIONS, lr=50.0, patience=3))
    assert (done.best, done.best_step) == (done.start, 0)
    assert same(state(program), before)
    assert done.steps == 12  # three looks without a new best
    assert done.notes == ("refinement ended at step 12 of 24: the held-out error had not fallen since step 0",)


@pytest.mark.parametrize(("schedule", "steps"), [("one_cycle", 12), ("cosine", 8)])
def test_one_cycle_goes_on_to_its_end(
    schedule: Literal["one_cycle", "cosine"], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup()
    program = setup.factored()
    errors = iter([1.0, *[1.5] * 11, 0.9])  # the start, and a look at every step: the best one is the twelfth
    monkeypatch.setattr("lowrank_fx.refine.held_out_error", lambda *_: next(errors))
    done = setup.refine(program, replace(OPTIONS, steps=12, every=1, schedule=schedule))
    assert done.steps == steps
    assert done.best_step == (12 if schedule == "one_cycle" else 0)


def test_the_best_state_is_kept_not_the_last() -> None:
    setup = Setup()
    errors = iter([1.0, 0.5, 0.8, 0.9, 0.9, 0.9, 0.9])
    states: list[dict[str, Tensor]] = []
    program = setup.factored()

    def told(program: Program, batches: Sequence[CachedBatch]) -> float:
        states.append(state(program))
        return next(errors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refining, "held_out_error", told)
        done = setup.refine(program)
    assert (done.start, done.best, done.best_step) == (1.0, 0.5, 4)
    assert same(state(program), states[1])
    assert not same(state(program), states[2])


def test_a_loss_that_is_not_finite_ends_it_with_the_best_so_far() -> None:
    setup = Setup()
    program = setup.factored()
    before = state(program)

    def spoiled(call: Call, generator: torch.Generator) -> Call:
        return call.map(lambda tensor: tensor * float("nan"))

    done = setup.refine(program, replace(OPTIONS, augment=spoiled))
    assert done.steps == 0
    assert done.notes == (f"refinement stopped at step 1: {refining.NOT_FINITE}",)
    assert same(state(program), before)


class Ungraded(nn.Module):
    """A model that switches gradients off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def test_a_model_without_gradients_is_left_as_it_is() -> None:
    program = TreeProgram.from_model(Ungraded().eval())
    call = Call((torch.ones(4, 8),), {})
    batch = CachedBatch(call, tuple(program.run(call)))
    (site,) = program.find_sites().sites
    factored = program.factorize({site.name: (site, factors_of(program, site, 1))}, clone=True)
    done = refine(program, factored, [call], [batch], replace(OPTIONS, blocks=0.0), progress=False)
    assert done.best == done.start > 0
    assert done.notes == (
        "refinement stopped at step 1: no gradient reaches what was factored; the model's forward may switch gradients "
        "off",
    )


class Mutated(nn.Module):
    """A model that writes to what a derivative needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(x))
        other = self.other(hidden)
        hidden.mul_(2.0)
        result: Tensor = self.last(torch.tanh(other) * hidden)
        return result


@torch.library.custom_op("lowrank_refine_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An operator without a derivative."""
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(doubled(self.first(x)))
        return result


def refined_from(model: nn.Module, way: Way) -> tuple[Refined, bool]:
    """What refinement did for a model of eight features, and whether its parameters stayed."""
    call = Call((torch.randn(16, 8, generator=torch.Generator().manual_seed(0)),), {})
    program = program_of(model.eval(), call, way)
    batch = CachedBatch(call, tuple(value.detach() for value in program.run(call)))
    sites = program.find_sites().sites
    factored = program.factorize({site.name: (site, factors_of(program, site, 2)) for site in sites}, clone=True)
    before = state(factored)
    done = refine(program, factored, [call], [batch], OPTIONS, progress=False)
    return done, same(state(factored), before)


@pytest.mark.parametrize("way", ["graph", "tree"])
@pytest.mark.parametrize(
    ("model", "told"), [(Mutated, "modified by an inplace operation"), (Opaque, "no autograd formula was registered")]
)
def test_a_model_without_a_derivative_is_left_as_it_is(model: type[nn.Module], told: str, way: Way) -> None:
    done, stayed = refined_from(model(), way)
    assert stayed
    assert (done.steps, done.best_step) == (0, 0)
    assert done.best == done.start > 0
    (note,) = done.notes
    assert note.startswith("refinement stopped at step 1: the factored model cannot be differentiated: ")
    assert told in note


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_runs_out_ends_it_and_may_be_tried_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup()
    whole, again = setup.factored(), setup.factored()
    expected = setup.refine(whole)
    learn, steps = refining._Run._learn, iter(range(100))

    def short(self: Any, *given: Any) -> float | str:
        if next(steps) == 9:
            raise error
        return learn(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(refining._Run, "_learn", short)
        done = setup.refine(setup.factored(), checkpoint=tmp_path)
    assert done.notes == (f"refinement stopped at step 10: {refining.NO_MEMORY}",)
    assert done.best_step in (4, 8)
    assert replace(setup.refine(again, checkpoint=tmp_path), seconds=0.0) == replace(expected, seconds=0.0)
    assert same(state(again), state(whole))


def test_interrupts_and_errors_of_an_augmentation_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()

    def wrong(call: Call, generator: torch.Generator) -> Call:
        return Call((torch.ones(2, 5),), {})  # the original refuses it

    with pytest.raises(RuntimeError):
        setup.refine(setup.factored(), replace(OPTIONS, augment=wrong))

    def interrupted(self: Any, *given: Any) -> float | str:
        raise KeyboardInterrupt

    monkeypatch.setattr(refining._Run, "_learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        setup.refine(setup.factored())


def test_hooks_of_the_user_see_nothing_of_it() -> None:
    model = net()
    seen: list[int] = []
    model.get_submodule("first").register_forward_hook(lambda *_: seen.append(1))
    program = TreeProgram.from_model(model)
    setup = Setup("tree")
    factored = program.factorize(setup.factors, clone=True)
    setup.refine(factored)
    assert seen == []
    factored.module(*setup.inputs[0].args)
    assert seen == [1]


def test_a_program_that_is_exact_is_left_alone() -> None:
    setup = Setup()
    program = setup.original.copy()
    before = state(program)
    done = setup.refine(program)
    assert (done.start, done.best, done.steps, done.history) == (0.0, 0.0, 0, ())
    assert same(state(program), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("way", ["graph", "tree"])
def test_every_dtype_stays_what_it_is(dtype: torch.dtype, way: Way) -> None:
    setup = Setup(way, dtype, rank=2)
    program = setup.factored()
    done = setup.refine(program)
    assert {value.dtype for value in program.module.parameters()} == {dtype}
    assert done.best < 0.9 * done.start  # measured: 0.67
    assert done.best == setup.held_out(program)  # of the rounded parameters


def test_gradients_that_overflow_float16_are_scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(dtype=torch.float16, rank=2)
    results = []
    for scale in (refining.LARGEST_SCALE, 2.0**40):
        monkeypatch.setattr(refining, "LARGEST_SCALE", scale)
        program = setup.factored()
        done = setup.refine(program)
        assert done.notes == ()
        results.append(done.best / done.start)
    # The scale is a power of two, so all that differs is which gradients are subnormal.
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_steps_below_the_resolution_of_narrow_parameters_add_up() -> None:
    # A step of a thousandth of the size moves a bfloat16 number of that size by a quarter to a half of its last place,
    # and rounds back; only numbers well below the size would ever move.
    setup = Setup(dtype=torch.bfloat16, rank=2)
    program = setup.factored()
    before = state(program)
    setup.refine(program, replace(OPTIONS, lr=1e-3, schedule="cosine"))
    after = state(program)
    changed = [(before[name] != after[name]).float().mean() for name in before if "factor" in name]
    assert min(changed) > 0.5  # measured: 0.83; without the float32 copies: 0.17


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps(schedule: Literal["one_cycle", "cosine"], steps: int) -> None:
    setup = Setup()
    program = setup.factored()
    done = setup.refine(program, Refine(steps=steps, schedule=schedule, lr=1e-3))
    assert done.steps == steps
    assert [step for step, _, _ in done.history] == list(range(1, steps + 1))
    assert done.best <= done.start


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not() -> None:
    setup = Setup()
    results = []
    for seed in (0, 0, 1):
        program = setup.factored()
        setup.refine(program, replace(OPTIONS, seed=seed, augment=flip_and_shift))
        results.append(state(program))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_a_program_with_nothing_to_learn_is_left_alone() -> None:
    program = TreeProgram.from_model(nn.Linear(4, 4, bias=False).eval())
    call = Call((torch.ones(2, 4),), {})
    batch = CachedBatch(call, tuple(2 * value.detach() for value in program.run(call)))
    done = refine(program, program.copy(), [call], [batch], OPTIONS, progress=False)
    assert (done.start, done.best, done.steps) == (0.5, 0.5, 0)
    assert done.notes == ("nothing was refined: there is no factor, bias or norm to learn",)


def test_no_inputs() -> None:
    setup = Setup()
    setup.inputs = []
    with pytest.raises(CalibrationError, match="no calibration inputs were kept"):
        setup.refine(setup.factored())


# ---- what learns -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """As transformers spells it out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        result: Tensor = self.weight * wide.to(x.dtype)
        return result


class ChannelNorm(nn.Module):
    """As ConvNeXt spells it out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, correction=0) + 1e-6)
        result: Tensor = self.weight[:, None, None] * x + self.bias[:, None, None]
        return result


class Roles(nn.Module):
    """A parameter of every role."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.turned = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2)
        self.channels, self.groups = ChannelNorm(), nn.GroupNorm(2, 8)
        self.act, self.batch = nn.PReLU(8), nn.BatchNorm2d(8)
        self.plane, self.rms, self.own = nn.LayerNorm((8, 8)), nn.RMSNorm(8), RMSNorm()
        self.linear, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.matrix, self.added_bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))
        self.scale, self.place = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.groups(self.channels(self.conv(x))))
        x = self.plane(self.batch(self.turned(x) * 2).mean(2))
        x = self.rms(self.own(x) + self.place)
        x = torch.tanh(x @ self.matrix + self.added_bias) * self.scale
        x = self.recurrent(self.linear(x))[0]
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


@pytest.mark.parametrize("way", ["graph", "tree"])
def test_roles_decide_what_learns(way: Way) -> None:
    program = program_of(Roles().eval(), Call((torch.randn(2, 3, 9, 9),), {}), way)
    names = {name for name, _ in program.module.named_parameters()}
    stays = {"act.weight", "scale", "place", "matrix"}
    stays |= {name for name in names if name.startswith("recurrent.weight")}
    stays |= {f"{name}.weight" for name in ("conv", "turned", "linear", "attention.out_proj")}
    stays |= {name for name in names if name.startswith("attention.") and name.endswith("proj_weight")}
    assert names - set(trained(program)) == stays
    assert {"plane.weight", "own.weight", "rms.weight", "channels.bias", "added_bias"} <= set(trained(program))


class Normed(nn.Module):
    """Something normalised in ``spelling``, times ``vector``, or times one plus it."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.layer = spelling, nn.Linear(8, 8, bias=False)
        self.vector = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        size = x.pow(2).mean(-1, keepdim=True) + 1e-6
        if self.spelling == "rsqrt first":
            return x * (torch.rsqrt(size) * self.vector)
        if self.spelling == "power":
            return x * torch.pow(size, -0.5) * self.vector
        if self.spelling == "reciprocal":
            return x * size.sqrt().reciprocal() * self.vector
        if self.spelling == "normalize":
            x = nn.functional.normalize(x, dim=-1)
            return x * 8**0.5 * self.vector
        if self.spelling == "behind a layer":
            x = self.layer(x * torch.rsqrt(size))
            return x * self.vector
        if self.spelling == "beside a gate":
            return x * torch.rsqrt(size) * torch.tanh(x) * self.vector
        assert self.spelling == "residual"
        return (x + x * torch.rsqrt(size)) * self.vector


@pytest.mark.parametrize("spelling", ["rsqrt first", "power", "reciprocal", "normalize"])
def test_vectors_on_something_normalised_learn(spelling: str) -> None:
    program = program_of(Normed(spelling).eval(), Call((torch.randn(2, 8),), {}), "graph")
    assert set(trained(program)) == {"vector"}


@pytest.mark.parametrize("spelling", ["behind a layer", "beside a gate", "residual"])
def test_vectors_on_anything_else_stay(spelling: str) -> None:
    program = program_of(Normed(spelling).eval(), Call((torch.randn(2, 8),), {}), "graph")
    assert trained(program) == {}


# ---- resuming --------------------------------------------------------------------------------------------------------


class StopError(Exception):
    """Raised in the middle of a run."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Step ``after`` is written, no other one, and then the run ends."""
    write = refining._Run._write

    def stopping(self: Any) -> None:
        if self.step == after:
            write(self)
            raise StopError

    monkeypatch.setattr(refining._Run, "_write", stopping)


@pytest.mark.parametrize(("dtype", "schedule"), [(torch.float32, "one_cycle"), (torch.bfloat16, "cosine")])
@pytest.mark.parametrize("after", [1, 8, 13, 24])
def test_resumed_bit_by_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    schedule: Literal["one_cycle", "cosine"],
    after: int,
) -> None:
    setup = Setup(dtype=dtype)
    options = replace(OPTIONS, schedule=schedule, augment=flip_and_shift)
    whole = setup.factored()
    expected = setup.refine(whole, options)
    with monkeypatch.context() as patch:
        interrupt(patch, after)
        with pytest.raises(StopError):
            setup.refine(setup.factored(), options, tmp_path)
    again = setup.factored()
    done = setup.refine(again, options, tmp_path)
    assert same(state(again), state(whole))
    assert replace(done, seconds=0.0) == replace(expected, seconds=0.0)


def test_a_finished_checkpoint_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()
    first = setup.factored()
    done = setup.refine(first, checkpoint=tmp_path)

    def never(self: Any) -> float:
        raise AssertionError("a step was run")

    monkeypatch.setattr(refining._Run, "_advance", never)
    second = setup.factored()
    assert setup.refine(second, checkpoint=tmp_path) == done
    assert same(state(first), state(second))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    setup, folder = Setup(), tmp_path / "ckpt"
    setup.refine(setup.factored(), replace(OPTIONS, steps=1), folder)
    with pytest.raises(StorageError, match="ckpt: the checkpoint is of another run: its options differ"):
        setup.refine(setup.factored(), OPTIONS, folder)
    setup.inputs = setup.inputs[1:]
    with pytest.raises(StorageError, match="ckpt: the checkpoint is of another run: its inputs differ"):
        setup.refine(setup.factored(), replace(OPTIONS, steps=1), folder)
    setup = Setup(rank=3)
    with pytest.raises(StorageError, match="ckpt: the checkpoint is of another run: its parameters differ"):
        setup.refine(setup.factored(), replace(OPTIONS, steps=1), folder)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads({threads})
from pathlib import Path
from lowrank_fx import refine as refining
from test_refine import Setup
write = refining._Run._write

def killed(self):
    write(self)
    self.due = 0.0
    if self.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)

refining._Run._write = killed
setup = Setup()
setup.refine(setup.factored(), checkpoint=Path(sys.argv[1]))
"""


def test_a_killed_process_is_resumed_bit_by_bit(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    setup = Setup()
    whole, again = setup.factored(), setup.factored()
    setup.refine(whole)
    setup.refine(again, checkpoint=tmp_path)
    assert same(state(again), state(whole))


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_of_outputs_is_the_square_of_the_error_of_plans() -> None:
    generator = torch.Generator().manual_seed(0)
    given = tuple(torch.randn(shape, generator=generator) for shape in ((3, 5, 4), (3, 2), (3, 5)))
    wanted = tuple(torch.randn(value.shape, generator=generator) for value in given)
    wanted[1][0, 0] = given[1][0, 0] = float("-inf")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    for masked in (None, mask):
        total = ErrorSum()
        total.add(given, wanted, masked)
        # float32 sums of 60 squares: 60 units in the last place at most.
        assert float(outputs_loss(given, wanted, masked)) == pytest.approx(total.relative**2, rel=60 * 2.0**-24)


def test_the_divergence_of_logits_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    given, wanted = (2 * torch.randn(3, 4, 6, generator=generator) for _ in range(2))
    hidden = torch.randn(3, 4, 2, generator=generator)
    given[..., 5] = wanted[..., 5] = float("-inf")  # ruled out
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    program = TreeProgram.from_model(Answering(wanted, hidden))
    judge = KLMeasure().judge(program, Call((torch.ones(3),), {}, mask), "batch 0")
    leaf = given.clone().requires_grad_()
    loss = judge.loss((hidden + 1, leaf), (hidden, wanted), mask)  # the hidden values are no logits
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss, leaf)

    z, y = given[mask][:, :5].double(), wanted[mask][:, :5].double()
    p, q = y.softmax(-1), z.softmax(-1)
    size = (p * (p.log() + torch.tensor(5.0).double().log())).sum()
    # float32 sums of 40 numbers of about one: 40 units in the last place at most.
    assert loss.item() == pytest.approx(((p * (p / q).log()).sum() / size).item(), rel=40 * 2.0**-24)
    assert torch.allclose(gradient[mask][:, :5].double(), (q - p) / size, rtol=0, atol=40 * 2.0**-24)
    assert not gradient[~mask].any()
    assert not gradient[..., 5].any()
    assert loss.item() == pytest.approx(judge.error((hidden, given)) / judge.size, rel=40 * 2.0**-24)


class Answering(nn.Module):
    """Returns the same logits, whatever it is given."""

    def __init__(self, logits: Tensor, hidden: Tensor) -> None:
        super().__init__()
        self.logits, self.hidden = logits, hidden

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": self.hidden * x[0], "logits": self.logits * x[0]}


class Shifted(nn.Module):
    """Most of what its logits are is common to all classes, which no softmax sees."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.level = nn.Linear(8, 12), nn.Linear(8, 12)
        self.head, self.offset = nn.Linear(12, 6), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = 2 * self.head(torch.tanh(2 * self.classes(x)))
        offset: Tensor = self.offset(torch.tanh(2 * self.level(x)))
        return logits + 20 * offset


def shifted_run(checkpoint: Path | None = None, measure: Measure | None = None) -> Refined:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        program = TreeProgram.from_model(Shifted().eval())
    generator = torch.Generator().manual_seed(1)
    calls = [Call((torch.randn(256, 8, generator=generator),), {}) for _ in range(5)]
    select = [CachedBatch(call, tuple(program.run(call))) for call in calls[3:]]
    if measure is not None:
        select = [batch.judged(program, measure, "a batch") for batch in select]
    sites = {site.name: (site, factors_of(program, site, 3)) for site in program.find_sites().sites[:2]}
    options = Refine(steps=60, lr=0.02, batch=32, every=10, blocks=0.0)
    factored = program.factorize(sites, clone=True)
    return refine(program, factored, calls[:3], select, options, checkpoint=checkpoint, progress=False)


def test_the_divergence_is_what_learns_where_it_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    own = shifted_run(measure=KLMeasure())
    again = shifted_run(measure=KLMeasure())
    assert replace(own, seconds=0.0) == replace(again, seconds=0.0)
    monkeypatch.setattr(KLJudge, "loss", lambda *_: None)
    by_distance = shifted_run(measure=KLMeasure())
    assert own.start == by_distance.start
    assert by_distance.best_step == 0  # towards the outputs' distance it only rises, by a tenth in ten steps
    assert own.best < 0.95 * own.start  # measured: 0.89


def test_a_checkpoint_of_another_loss_is_refused(tmp_path: Path) -> None:
    first = shifted_run(tmp_path, KLMeasure())
    assert shifted_run(tmp_path, KLMeasure()) == first
    with pytest.raises(StorageError, match="the checkpoint is of another run: its loss differ"):
        shifted_run(tmp_path)


def test_other_shapes_cannot_be_learnt_from() -> None:
    with pytest.raises(CalibrationError, match="returns other shapes than the original"):
        outputs_loss((torch.ones(2, 3),), (torch.ones(2, 4),), None)


@pytest.mark.parametrize("flattened", [False, True])
def test_padding_counts_for_nothing_in_the_loss_of_sites(flattened: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    given, wanted = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    real = ((given - wanted)[mask].square().sum() / wanted[mask].square().sum()).item()
    given[~mask] = float("nan")  # whatever stands in padding

    def shaped(value: Tensor) -> dict[str, Tensor]:
        return {"layer": (value.flatten(0, 1) if flattened else value).requires_grad_(), "scaled": 1e3 * value}

    inner = {name: value.detach() for name, value in shaped(wanted).items()}
    inside = {"layer": shaped(given)["layer"], "scaled": inner["scaled"]}
    loss = sites_loss(inside, inner, mask)
    assert loss.item() == pytest.approx(real / 2, rel=1e-12)  # float64; the second site is exact
    (gradient,) = torch.autograd.grad(loss, inside["layer"])
    assert gradient.isfinite().all()


def test_sites_count_alike_whatever_their_scale() -> None:
    wanted = {"small": torch.ones(2, 3), "large": torch.full((2, 3), 1e4)}
    given = {name: 1.5 * value for name, value in wanted.items()}
    assert float(sites_loss(given, wanted, None)) == pytest.approx(0.25, rel=1e-6)  # float32
    assert float(sites_loss({}, wanted, None)) == 0


# ---- the batches -----------------------------------------------------------------------------------------------------


def rows_seen(batches: ShuffledBatches, steps: Sequence[int]) -> list[float]:
    return sorted(float(value) for step in steps for value in batches.at(step).args[0].flatten())


def test_rows_are_cut_anew_in_every_epoch() -> None:
    calls = [Call((torch.arange(8.0).reshape(8, 1) + 8 * number,), {}) for number in range(3)]
    batches = ShuffledBatches(calls, 6, 0)
    assert len(batches) == 4
    first, second = ([batches.at(4 * epoch + step).args[0] for step in range(4)] for epoch in range(2))
    assert [len(batch) for batch in first] == [6, 6, 6, 6]
    assert rows_seen(batches, range(4)) == rows_seen(batches, range(4, 8)) == [float(row) for row in range(24)]
    assert any(not torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(batches.at(step).args[0], first[step]) for step in range(4))
    assert any(len({int(row) // 8 for row in batch.flatten()}) > 1 for batch in first)


def test_every_tensor_and_the_mask_are_cut_together() -> None:
    rows = torch.arange(12)
    mask = (rows[:, None] + torch.arange(2)) % 3 > 0
    calls = [
        Call((rows[part],), {"twice": 2 * rows[part], "flag": True}, mask[part]) for part in (slice(0, 5), slice(5, 12))
    ]
    batches = ShuffledBatches(calls, 4, 3)
    for step in range(len(batches)):
        call = batches.at(step)
        assert torch.equal(call.kwargs["twice"], 2 * call.args[0])
        assert call.kwargs["flag"] is True
        assert call.mask is not None
        assert torch.equal(call.mask, mask[call.args[0]])


def test_what_cannot_be_cut_stays_whole() -> None:
    table = torch.ones(3)
    calls = [Call((torch.full((4, 2), float(number)), table), {}) for number in range(3)]
    calls += [Call((torch.zeros(4, number + 1),), {}) for number in range(2)]
    batches = ShuffledBatches(calls, None, 0)
    assert len(batches) == 5
    seen = [batches.at(step) for step in range(5)]
    assert sum(any(found is call for call in calls) for found in seen) == 3
    assert sorted(call.args[0].shape[1] for call in seen if len(call.args) == 1) == [1, 2]


def test_what_else_the_loader_gave_is_left_out() -> None:
    rows = torch.arange(8.0).reshape(8, 1)
    batches = ShuffledBatches([Call((rows,), {}, batch={"x": rows, "temperature": torch.tensor(2.0)})], 4, 0)
    assert rows_seen(batches, range(2)) == list(range(8))
    assert batches.at(0).batch is None


def test_images_are_moved_by_whole_pixels_or_mirrored() -> None:
    image = torch.arange(1.0, 31.0).reshape(1, 1, 5, 6)
    call = Call((image.expand(40, 1, 5, 6).clone(), torch.arange(40)), {})
    moved = flip_and_shift(call, step_generator(0, 0), 1)
    assert torch.equal(moved.args[1], torch.arange(40))
    padded = nn.functional.pad(image, (1, 1, 1, 1))
    possible = [
        turned[:, :, row : row + 5, column : column + 6]
        for turned in (padded, padded.flip(-1))
        for row in range(3)
        for column in range(3)
    ]
    found = [[torch.equal(picture[None], each) for each in possible] for picture in moved.args[0]]
    assert all(any(row) for row in found)
    assert len({row.index(True) for row in found}) > 9  # mirrored ones among them
    again = flip_and_shift(call, step_generator(0, 0), 1)
    assert torch.equal(again.args[0], moved.args[0])


def test_an_augmentation_must_return_a_batch() -> None:
    setup = Setup()

    def wrong(call: Call, generator: torch.Generator) -> Any:
        return call.args

    with pytest.raises(OptionError, match="returned a tuple; it must return a Call"):
        setup.refine(setup.factored(), replace(OPTIONS, augment=wrong))


# ---- the options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"steps": 0}, r"Refine\(steps=0\): give a whole number of at least 1"),
        ({"steps": 2.5}, r"Refine\(steps=2.5\): give a whole number"),
        ({"steps": True}, r"Refine\(steps=True\)"),
        ({"steps": None}, r"Refine\(steps=None\)"),
        ({"batch": 0}, r"Refine\(batch=0\)"),
        ({"every": -1}, r"Refine\(every=-1\)"),
        ({"patience": 0}, r"Refine\(patience=0\)"),
        ({"seed": 0.5}, r"Refine\(seed=0.5\): give a whole number"),
        ({"lr": 0}, r"Refine\(lr=0\): give a finite number above 0"),
        ({"lr": float("nan")}, r"Refine\(lr=nan\)"),
        ({"blocks": -1}, r"Refine\(blocks=-1\): give a finite number of at least 0"),
        ({"weight_decay": "much"}, r"Refine\(weight_decay='much'\)"),
        ({"schedule": "linear"}, r"Refine\(schedule='linear'\): the legal values are 'one_cycle', 'cosine'"),
        ({"augment": 3}, r"Refine\(augment=3\): give a function of a batch and a torch.Generator"),
    ],
)
def test_options_are_checked(values: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        Refine(**values)


def test_options_as_json() -> None:
    options = Refine(steps=7, lr=0.5, batch=3, schedule="cosine", augment=flip_and_shift)
    data = options.to_json()
    assert data["augment"] == "lowrank_fx.training_batches:flip_and_shift"
    assert refine_from_json(data, flip_and_shift) == options
    with pytest.raises(OptionError, match=r"made with augment=lowrank_fx\.training_batches:flip_and_shift, not None"):
        refine_from_json(data)
    for broken in (None, {}, {**data, "type": "keep"}, {**data, "more": 1}):
        with pytest.raises(OptionError, match="not options of refinement"):
            refine_from_json(broken, flip_and_shift)


@dataclass(frozen=True)
class Shift:
    """An augmentation that is an object."""

    pixels: int

    def __call__(self, call: Call, generator: torch.Generator) -> Call:
        return flip_and_shift(call, generator, self.pixels)


def shift_by(pixels: int) -> Augment:
    def shift(call: Call, generator: torch.Generator) -> Call:
        return flip_and_shift(call, generator, pixels)

    return shift


def shifts(pixels: int) -> tuple[Augment, ...]:
    """Ways to say the same."""
    return (
        functools.partial(flip_and_shift, pixels=pixels),
        functools.partial(functools.partial(flip_and_shift), pixels=pixels),
        Shift(pixels),
        shift_by(pixels),
        lambda call, generator: flip_and_shift(call, generator, pixels),
        lambda call, generator, by=pixels: flip_and_shift(call, generator, by),
    )


def test_augmentations_have_names_of_their_own() -> None:
    names = [callable_name(augment) for pixels in (1, 5) for augment in shifts(pixels)]
    assert names == [callable_name(augment) for pixels in (1, 5) for augment in shifts(pixels)]
    assert len({*names[:1], *names[2:7], *names[8:]}) == 10
    assert names[0] == "functools.partial(lowrank_fx.training_batches:flip_and_shift, pixels=1)"
    doubled: Augment = lambda call, generator: call.map(lambda tensor: 2 * tensor)  # noqa: E731
    tripled: Augment = lambda call, generator: call.map(lambda tensor: 3 * tensor)  # noqa: E731
    assert callable_name(doubled) != callable_name(tripled)


def test_names_of_augmentations_that_hold_anything() -> None:
    held: dict[str, Any] = {"list": [1, (2.5, "x")], "set": {"b", "a"}, "tensor": torch.ones(2), "object": object()}
    held["itself"] = held
    anything: Any = flip_and_shift
    name = callable_name(functools.partial(anything, torch.float16, **held))
    assert name is not None
    assert "list=[1, [2.5, 'x']], object=object, set={'a', 'b'}, tensor=Tensor#" in name
    assert " at 0x" not in name

    def again(call: Call, generator: torch.Generator) -> Call:
        return again(call, generator)

    assert str(callable_name(again)).startswith(f"{__name__}:test_names_of_augmentations_that_hold_anything.<locals>.")


def test_names_are_the_same_in_every_process() -> None:
    script = (
        "from lowrank_fx.refine_options import callable_name\n"
        "print(callable_name(lambda call, generator: call if call in {'a', 'b', 'c'} else (lambda: 'd')))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_a_checkpoint_of_another_augmentation_is_refused(tmp_path: Path) -> None:
    setup = Setup()
    few = replace(OPTIONS, steps=1)
    setup.refine(setup.factored(), replace(few, augment=functools.partial(flip_and_shift, pixels=1)), tmp_path)
    with pytest.raises(StorageError, match="its options differ"):
        setup.refine(setup.factored(), replace(few, augment=functools.partial(flip_and_shift, pixels=2)), tmp_path)
