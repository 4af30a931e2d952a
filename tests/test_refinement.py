"""``optimize(..., refine=)``: the plan says what the refined model does, and the user's model stays as it is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, Metric, Refine, calibrate, optimize
from lowrank_fx import module as module_room
from lowrank_fx import refinement as refinement_room
from lowrank_fx.cache import CachedBatch
from lowrank_fx.compare import relative_error
from lowrank_fx.errors import OptionError
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan

QUICK: dict[str, Any] = {"compile": False, "progress": False}
FEW = Refine(steps=30, lr=0.01)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(24, 40), nn.LayerNorm(40)
        self.second, self.last = nn.Linear(40, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        result: Tensor = self.last(h + torch.tanh(2 * self.second(h)))
        return result


@pytest.fixture(scope="module")
def model() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 2:
                parameter.mul_(2)  # far from linear, so least squares leaves something to learn
    return net


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 24, generator=generator) for _ in range(15)]


@pytest.mark.parametrize("capture", ["export", "modules"])
def test_a_refined_model_is_better_and_its_plan_says_by_how_much(
    model: Net, batches: list[Tensor], capture: Literal["export", "modules"], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = optimize(model, batches, target=Keep(params=0.45), capture=capture, **QUICK)
    made = plain.replan(Keep(params=0.45), refine=FEW)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    plan, done = made.plan, made.plan.refinement
    assert done is not None
    assert 0 < done.best_step <= done.steps <= 30
    # Plans are compared with the dense product of the factors, refinement runs the factors: float32 rounding apart.
    assert done.before == pytest.approx(plain.plan.select_error, rel=1e-6)
    assert done.after == plan.select_error < plain.plan.select_error
    assert plan.candidate == f"{plain.plan.candidate}, refined"
    assert json.loads(done.options)["steps"] == 30
    assert made.session is not None
    reports = made.session.calibration.report_batches
    assert measured(made, reports) == pytest.approx(plan.error, rel=1e-5)
    # A site's error is that of the factors as they are now: against the sketch that it was planned on.
    moved = [site for site, old in zip(plan.sites, plain.plan.sites, strict=True) if site.error != old.error]
    assert {site.name for site in moved} == {site.name for site in plan.factored}
    assert all(site.error <= site.bound * (1 + 1e-9) for site in plan.sites)
    assert Plan.from_json(plan.to_json()) == plan
    assert "refined" in str(made.report())

    made.save(tmp_path)
    again = lowrank_fx.load(model, tmp_path, compile=False)
    assert torch.equal(again(batches[0]), made(batches[0]))
    assert again.plan.refinement == done


def measured(made: LowRankModule, reports: list[CachedBatch]) -> float:
    """Relative error over batches, dense float64."""
    wanted = torch.cat([batch.reference[0] for batch in reports])
    with torch.no_grad():
        given = torch.cat([made(*batch.call.args, **batch.call.kwargs) for batch in reports])
    return float((given.double() - wanted.double()).norm() / wanted.double().norm())


def test_the_same_seed_gives_the_same_plan_and_weights(model: Net, batches: list[Tensor]) -> None:
    first, second = (optimize(model, batches, target=Keep(params=0.45), refine=FEW, **QUICK) for _ in range(2))
    assert first.plan.to_json() == second.plan.to_json()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_checkpoint_keeps_a_refinement_per_plan(model: Net, batches: list[Tensor], tmp_path: Path) -> None:
    first = optimize(model, batches, target=Keep(params=0.45), refine=FEW, checkpoint=tmp_path, **QUICK)
    other = optimize(model, batches, target=Keep(params=0.55), refine=FEW, checkpoint=tmp_path, **QUICK)
    again = optimize(model, batches, target=Keep(params=0.45), refine=FEW, checkpoint=tmp_path, **QUICK)
    assert len(list(tmp_path.glob("refine-*"))) == 2
    assert again.plan.to_json() == first.plan.to_json() != other.plan.to_json()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_a_metric_that_refinement_breaks_undoes_it(
    model: Net, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So small a model is slower in two pieces, and the original would come back.
    monkeypatch.setattr(module_room, "measure", lambda *args: PairedTiming(2.0, 2e-3, 1e-3, 0.0, 7))
    data = batches[0]
    with torch.no_grad():
        wanted = model(data)
    refined_already: list[float] = []

    def agreement(candidate: nn.Module) -> float:
        given = candidate(data)
        # The refined model is the only one whose norm has other parameters.
        if any("norm" in name and not torch.equal(p, model.get_parameter(name)) for name, p in named(candidate)):
            refined_already.append(1.0)
            return -10.0
        return -relative_error([given], [wanted], None)

    target = Metric(agreement, max_drop=0.7, of="params", evaluations=4)
    made = optimize(model, batches, target=target, refine=FEW, **QUICK)
    assert refined_already
    assert made.plan.refinement is not None
    assert made.plan.refinement.best_step == 0
    assert made.plan.refinement.after == made.plan.refinement.before == pytest.approx(made.plan.select_error, rel=1e-6)
    assert any("further than allowed, so it was undone" in note for note in made.plan.notes)
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in named(made) if "norm" in name)


def test_refinement_after_which_reported_outputs_overflow_is_undone(
    model: Net, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = optimize(model, batches, target=Keep(params=0.45), **QUICK)
    monkeypatch.setattr(refinement_room, "held_out_error", lambda *args: math.inf)
    made = plain.replan(Keep(params=0.45), refine=FEW)
    assert made.plan.refinement is not None
    assert made.plan.refinement.best_step == 0
    assert made.plan.error == plain.plan.error
    assert any(note.startswith("after refinement outputs were not finite") for note in made.plan.notes)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), plain.parameters(), strict=True))
    assert Plan.from_json(made.plan.to_json()) == made.plan


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


def test_what_cannot_be_refined_is_refused_before_any_work(model: Net, batches: list[Tensor]) -> None:
    with pytest.raises(OptionError, match=r"copy=False shares with the model; pass copy=True"):
        optimize(model, batches, refine=FEW, copy=False, **QUICK)
    with pytest.raises(OptionError, match=r"refine=True: give Refine\(\), such as Refine\(steps=500\), or None"):
        optimize(model, batches, refine=True, **QUICK)  # type: ignore[arg-type]


# ---- models without a derivative -------------------------------------------------------------------------------------


class Mutated(nn.Module):
    """It writes to what a derivative needs."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.q, self.k, self.o = nn.Linear(24, 40), nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.i(x))
        a = self.q(h)
        h.mul_(2.0)
        result: Tensor = self.o(torch.tanh(a) * torch.tanh(self.k(h)))
        return result


@pytest.mark.parametrize("capture", ["export", "modules"])
def test_a_model_without_a_derivative_comes_back_unrefined(
    batches: list[Tensor], capture: Literal["export", "modules"]
) -> None:
    plain = optimize(Mutated().eval(), batches, target=Keep(params=0.45), capture=capture, **QUICK)
    made = plain.replan(Keep(params=0.45), refine=FEW)
    assert made.plan.refinement is not None
    assert (made.plan.refinement.steps, made.plan.refinement.best_step) == (0, 0)
    assert any("the factored model cannot be differentiated: one of the variables" in note for note in made.plan.notes)
    assert torch.equal(made(batches[0]), plain(batches[0]))


# ---- a bounded metric ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("evaluations", "refined"), [(4, True), (3, True), (2, False)])
def test_a_metric_is_not_asked_more_often_than_it_may_be(
    model: Net, batches: list[Tensor], evaluations: int, refined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_room, "measure", lambda *args: PairedTiming(2.0, 2e-3, 1e-3, 0.0, 7))
    data = batches[0]
    with torch.no_grad():
        wanted = model(data)
    values: list[float] = []

    def error(candidate: nn.Module) -> float:
        values.append(relative_error([candidate(data)], [wanted], None))
        return values[-1]

    start = optimize(model, batches, target=Keep(params=0.9), **QUICK)
    target = Metric(error, 0.6, evaluations=evaluations, of="params", higher_is_better=False)
    plan = start.replan(target, refine=Refine(steps=20)).plan
    assert plan.metric is not None
    assert plan.metric.evaluations == len(values) <= evaluations
    assert [plan.metric.before, *(point.value for point in plan.metric.points)] == values
    assert (plan.refinement is not None) == refined
    assert any("no call of the metric was left for a refined plan" in note for note in plan.notes) != refined
    if refined:
        assert plan.metric.after == values[-1]
        assert plan.metric.points[-1].error == plan.select_error


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_refinement_goes_with_a_finished_calibration(
    model: Net, batches: list[Tensor], tmp_path: Path
) -> None:
    done = calibrate(model, batches, progress=False)
    with pytest.raises(OptionError, match="has no effect on a calibration that is done"):
        optimize(model, done, target=Keep(params=0.45), checkpoint=tmp_path, **QUICK)
    first = optimize(model, done, target=Keep(params=0.45), refine=FEW, checkpoint=tmp_path, **QUICK)
    (folder,) = tmp_path.glob("refine-*")
    written = (folder / "refine.json").stat().st_mtime_ns
    again = first.replan(Keep(params=0.45), refine=FEW, checkpoint=tmp_path)
    assert [folder] == list(tmp_path.glob("refine-*"))
    assert (folder / "refine.json").stat().st_mtime_ns == written  # read back, not made anew
    assert again.plan.to_json() == first.plan.to_json()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(OptionError, match="keeps the state of refinement; pass refine= with it"):
        first.replan(Keep(params=0.45), checkpoint=tmp_path)


# ---- a loss ----------------------------------------------------------------------------------------------------------


def test_a_loss_of_the_users_only_chooses_and_the_plan_says_so(model: Net, batches: list[Tensor]) -> None:
    def loss(outputs: Tensor, batch: Tensor) -> Tensor:
        return torch.logsumexp(outputs, -1).mean()

    made = optimize(model, batches, target=Keep(params=0.45), refine=FEW, loss_fn=loss, **QUICK)
    word = "refinement minimised the L2 distance of outputs, not the loss 'loss', which only chose among its states"
    assert word in made.plan.notes
    made = optimize(model, batches, target=Keep(params=0.45), refine=FEW, loss_fn="kl", **QUICK)
    assert made.plan.refinement is not None
    assert made.plan.refinement.after < made.plan.refinement.before
    assert not any("refinement minimised" in note for note in made.plan.notes)
