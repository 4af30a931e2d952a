"""``optimize(..., refine=)``: the plan says what the refined model does, and the user's model stays as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, Metric, Refine, optimize
from lowrank_fx import module as module_room
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


def named(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters())


def test_what_cannot_be_refined_is_refused_before_any_work(model: Net, batches: list[Tensor]) -> None:
    with pytest.raises(OptionError, match=r"copy=False shares with the model; pass copy=True"):
        optimize(model, batches, refine=FEW, copy=False, **QUICK)
    with pytest.raises(OptionError, match=r"refine=True: give Refine\(\), such as Refine\(steps=500\), or None"):
        optimize(model, batches, refine=True, **QUICK)  # type: ignore[arg-type]
