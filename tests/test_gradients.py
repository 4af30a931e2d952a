"""Output gradients against a dense float64 Jacobian, in both ways of capture."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import gradients as room
from lowrank_fx.batches import Assigned, Call, Role
from lowrank_fx.calibration import Calibration, blank
from lowrank_fx.calibration_run import run_calibration
from lowrank_fx.curves import error_curves
from lowrank_fx.effort import EFFORTS
from lowrank_fx.gradients import output_gradients, output_rows, random_projection
from lowrank_fx.pipeline import Capture, take
from lowrank_fx.program import Program
from lowrank_fx.sites import SiteTable

WAYS: tuple[Capture, ...] = ("export", "modules")


class Net(nn.Module):
    """A convolution, in-place operators behind sites, and two outputs, one of which holds an infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu_(self.conv(image)).mean((2, 3))
        hidden = torch.tanh_(self.hidden(hidden))
        scores = self.head(hidden)
        return scores.mul(2), torch.cat((hidden.square(), torch.full_like(hidden[:, :1], -torch.inf)), 1)


def prepared(way: Capture, frozen: bool = False) -> tuple[nn.Module, Program, SiteTable, Calibration]:
    torch.manual_seed(0)
    model = Net().double().eval().requires_grad_(not frozen)
    generator = torch.Generator().manual_seed(1)
    calls = [Call((torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64),), {}) for _ in range(4)]
    program = take(model, calls[0], way)
    table = program.find_sites()
    roles: tuple[Role, ...] = ("calibrate", "calibrate", "select", "report")
    pieces = [Assigned(index, role, call) for index, (role, call) in enumerate(zip(roles, calls, strict=True))]
    start = blank(program, table, model, calls[0])
    return model, program, table, run_calibration(program, table, pieces, start, progress=False)


def from_hidden(model: Net, value: Tensor) -> Tensor:
    """The finite outputs of one sample as a function of the second site's output ``[10]``."""
    hidden = torch.tanh(value)
    return torch.cat((2 * model.head(hidden), hidden.square()))


def from_conv(model: Net, value: Tensor) -> Tensor:
    """The same of the convolution's output ``[6, 4, 4]``."""
    return from_hidden(model, model.hidden(torch.relu(value).mean((1, 2))))


def jacobians(model: Net, image: Tensor) -> tuple[Tensor, Tensor]:
    """J^T J summed over samples and positions, for ``hidden`` and ``conv``."""
    moments = (torch.zeros(10, 10, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64))
    with torch.no_grad():
        outputs = model.conv(image)
        inner = model.hidden(torch.relu(outputs).mean((2, 3)))
    for convolved, value in zip(outputs, inner, strict=True):
        of_hidden = torch.func.jacrev(lambda each: from_hidden(model, each))(value)
        moments[0].add_((of_hidden.T @ of_hidden).detach())
        of_conv = torch.func.jacrev(lambda each: from_conv(model, each))(convolved)
        for place in of_conv.flatten(2).unbind(2):
            moments[1].add_((place.T @ place).detach())
    return moments


@pytest.mark.parametrize("way", WAYS)
def test_the_moments_are_those_of_the_dense_jacobian(way: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    model, program, table, calibration = prepared(way)
    assert isinstance(model, Net)
    monkeypatch.setattr(room, "GRADIENT_ROWS", 10**9)
    effort = replace(EFFORTS["high"], samples=10**6, probes=1500)
    sketches = output_gradients(program, table, calibration, effort, progress=False).sketches
    assert set(sketches) == {"conv", "hidden", "head"}
    image = torch.cat([call.args[0] for call in calibration.input_batches])
    for name, expected in zip(("hidden", "conv"), jacobians(model, image), strict=True):
        (part,) = sketches[name].parts
        found = part.gram(centered=False) / 1500
        # 1,500 probes: for one sample that dominates, the standard error is about sqrt(2 / 1500) = .037 of the norm.
        assert float((found - expected).norm()) < 0.1 * float(expected.norm()), name
        assert float((torch.eye(len(found)) * found.trace() / len(found) - expected).norm()) > 0.3 * float(
            expected.norm()
        )


@pytest.mark.parametrize("way", WAYS)
def test_one_projection_has_the_gradients_of_autograd(way: Capture) -> None:
    model, program, table, calibration = prepared(way, frozen=True)
    assert isinstance(model, Net)
    (call,) = calibration.input_batches[:1]
    run = program.probed([site.calls[0].node for site in table.sites])
    (found,) = room._gradients_of(program, run, call, torch.Generator().manual_seed(3), 1)
    by_name = {site.name: output_rows(site, found[site.calls[0].node]) for site in table.sites}
    with torch.no_grad():
        convolved = model.conv(call.args[0])
    convolved.requires_grad_()
    inner = model.hidden(torch.relu(convolved).mean((2, 3)))
    hidden = torch.tanh(inner)
    scores = 2 * model.head(hidden)
    lost = torch.full((8, 1), -torch.inf, dtype=torch.float64)
    outputs = (scores, torch.cat((hidden.square(), lost), 1))
    scalar = random_projection(outputs, None, torch.Generator().manual_seed(3))
    of_conv, of_inner = torch.autograd.grad(scalar, (convolved, inner))
    # Float64; the scalar is summed in the same order, the gradients differ by rounding only.
    assert torch.allclose(by_name["hidden"], of_inner, rtol=1e-10, atol=1e-14)
    assert torch.allclose(by_name["conv"], of_conv.movedim(1, -1).reshape(-1, 6), rtol=1e-10, atol=1e-14)
    assert float(of_conv.norm()) > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_is_left_behind_and_the_same_comes_again(way: Capture, frozen: bool) -> None:
    model, program, table, calibration = prepared(way, frozen)
    before = {name: (id(each), each.requires_grad, each.clone()) for name, each in model.named_parameters()}
    state = torch.random.get_rng_state()
    first, second = (output_gradients(program, table, calibration, progress=False).sketches for _ in range(2))
    for name, sketch in first.items():
        mine, theirs = (each.parts[0].gram(centered=False) for each in (sketch, second[name]))
        assert torch.equal(mine, theirs)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in model.named_parameters():
        assert before[name][:2] == (id(parameter), parameter.requires_grad)
        assert torch.equal(before[name][2], parameter)
        assert parameter.grad is None


def test_padding_takes_no_part_and_work_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    output = torch.ones(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    (gradient,) = torch.autograd.grad(random_projection((output,), mask, torch.Generator().manual_seed(0)), output)
    assert torch.equal(gradient.abs().sum(2) > 0, mask)
    *_, calibration = prepared("export")
    high = EFFORTS["high"]
    assert [call.batch_size for call in room._affordable(calibration, high)[0]] == [8, 8]
    assert room._affordable(calibration, high)[1] == high.probes == 4
    monkeypatch.setattr(room, "GRADIENT_FLOPS", calibration.flops * 2.0)
    assert [call.batch_size for call in room._affordable(calibration, high)[0]] == [8]
    monkeypatch.setattr(room, "GRADIENT_FLOPS", calibration.flops * 0.5)
    assert [call.batch_size for call in room._affordable(calibration, high)[0]] == [2]


def test_a_small_first_batch_is_enough_where_little_work_is_allowed() -> None:
    calls = [Call((torch.zeros(count, 3),), {}) for count in (4, 32, 32, 32)]
    calibration: Any = SimpleNamespace(input_batches=calls, flops=4.0)
    found = room._affordable(calibration, replace(EFFORTS["high"], samples=7))
    assert ([call.batch_size for call in found[0]], found[1]) == ([4], 1)


def test_wide_outputs_are_sketched_by_frequent_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EXACT_BYTES", 0)
    monkeypatch.setattr(room, "SKETCH_SIZE", 4)
    _, program, table, calibration = prepared("export")
    sketches = output_gradients(program, table, calibration, progress=False).sketches
    sizes = {site.name: site.out_features for site in table.sites}
    assert {name: sketch.exact for name, sketch in sketches.items()} == {
        name: size <= 8 for name, size in sizes.items()
    }
    curves = error_curves(program, table, calibration, None, progress=False, gradients=sketches)
    curve = curves["hidden"].forms["lowrank@gradient"]
    errors = [curve.error(rank) for rank in curve.ranks]
    assert errors == sorted(errors, reverse=True)
    assert curves["hidden"].factors("lowrank@gradient", curve.ranks[0]).factor_in.shape == (curve.ranks[0], 6)


def test_code_that_reads_numbers_out_of_tensors_is_not_warned() -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, value: Tensor) -> Tensor:
            value = self.inner(value)
            return value if float(value.mean()) > -1e3 else -value

    torch.manual_seed(0)
    fast = lowrank_fx.optimize(
        Asking(), [torch.randn(8, 16) for _ in range(4)], target=lowrank_fx.Keep(params=0.7), compile=False
    )
    assert fast.artifact.program.way == "modules"
    assert len(fast.plan.factored) == 1


def test_a_model_that_cannot_be_differentiated_has_none() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, value: Tensor) -> Tensor:
            return torch.round(self.inner(value)).detach() + value

    torch.manual_seed(0)
    model = Rounded().eval()
    calls = [Call((torch.randn(8, 16),), {}) for _ in range(3)]
    program = take(model, calls[0], "modules")
    table = program.find_sites()
    roles: tuple[Role, ...] = ("calibrate", "select", "report")
    pieces = [Assigned(index, role, call) for index, (role, call) in enumerate(zip(roles, calls, strict=True))]
    calibration = run_calibration(program, table, pieces, blank(program, table, model, calls[0]), progress=False)
    sketches, refused = output_gradients(program, table, calibration, progress=False)
    assert sketches == {}
    assert refused == "no gradient that is finite and not zero reaches a layer"


class Written(torch.autograd.Function):
    """An operator whose derivative fails."""

    fault: Exception = RuntimeError()

    @staticmethod
    def forward(context: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: object, *gradients: Tensor) -> Tensor:
        raise Written.fault


class Faulty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, value: Tensor) -> Tensor:
        made: Tensor = Written.apply(self.inner(value))  # type: ignore[no-untyped-call]
        return made


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (NotImplementedError("no derivative of\n  this " + "very " * 40), "no derivative of this very very"),
        (RuntimeError(), "RuntimeError"),
        (torch.OutOfMemoryError("Tried to allocate 3 GiB, 17 MiB free"), "memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "memory ran out"),
    ],
)
def test_a_plan_says_why_gradients_took_no_part(fault: Exception, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Written, "fault", fault)
    torch.manual_seed(0)
    batches = [torch.randn(8, 16) for _ in range(4)]
    made = lowrank_fx.optimize(
        Faulty(), batches, target=lowrank_fx.Keep(params=0.7), capture="modules", compile=False, progress=False
    )
    (note,) = (note for note in made.plan.notes if "directions are chosen by activations alone" in note)
    assert note.startswith(f"directions are chosen by activations alone: {cause}")
    assert len(note) < 220
    assert [site.basis for site in made.plan.factored] == ["activation"]


def test_a_model_with_gradients_has_no_note() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    batches = [torch.randn(8, 16) for _ in range(4)]
    made = lowrank_fx.optimize(model, batches, target=lowrank_fx.Keep(params=0.7), compile=False, progress=False)
    assert not any("directions" in note for note in made.plan.notes)


class Rooted(nn.Module):
    """The slope of a square root at zero is infinite, and zero times that is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = nn.Linear(6, 8)
        self.kept = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.kept(x) + torch.sqrt(0 * self.lost(x))
        return value


def test_a_site_whose_gradients_are_not_finite_is_left_out() -> None:
    torch.manual_seed(0)
    model = Rooted().eval()
    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    calibration = lowrank_fx.calibrate(model, batches, progress=False)
    program = take(model, calibration.example)
    sketches = output_gradients(program, program.find_sites(), calibration, progress=False).sketches
    assert list(sketches) == ["kept"]
