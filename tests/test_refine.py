"""Refinement: what learns and what stays, the loss, never worse than the start, resumed bit by bit, both ways."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lowrank_fx import refine as refining
from lowrank_fx.batches import Call
from lowrank_fx.cache import CachedBatch
from lowrank_fx.capture import capture
from lowrank_fx.compare import ErrorSum, floating_outputs
from lowrank_fx.errors import CalibrationError, OptionError, StorageError
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.program import Program
from lowrank_fx.refine import Refined, refine, trained
from lowrank_fx.refine_loss import outputs_loss, sites_loss
from lowrank_fx.refine_options import Refine, refine_from_json
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
    assert changed == set(trained(program.module))
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
