"""The main job, end to end, on small models: what ``optimize`` promises."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, Tolerance
from lowrank_fx.compare import relative_error
from lowrank_fx.module import LowRankModule


def small_cnn() -> nn.Sequential:
    """Convolutions with and without batch norm, a strided one, a grouped one, and two linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding="valid"),
        nn.ReLU(),
        nn.Conv2d(48, 48, 3, padding="same", groups=4),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 96),
        nn.ReLU(),
        nn.Linear(96, 10, bias=False),
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.running_mean = torch.linspace(-0.1, 0.1, 24)
        norm.running_var = torch.linspace(0.5, 2.0, 24)
    return model.eval()


def images(count: int = 6, size: int = 12, rows: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Labelled batches of smooth images, so that activations have structure."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, rows, 3, 4, 4, generator=generator)
    smooth = [nn.functional.interpolate(batch, size=(size, size), mode="bilinear") for batch in coarse]
    return [(batch, torch.zeros(rows, dtype=torch.long)) for batch in smooth]


def checksum(model: nn.Module) -> str:
    state = b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(state).hexdigest()


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return small_cnn()


@pytest.fixture(scope="module")
def fast(model: nn.Module) -> LowRankModule:
    return lowrank_fx.optimize(model, images(), target=Keep(params=0.6), compile=False, progress=False)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("share", [0.8, 0.5])
@pytest.mark.parametrize("quantity", ["params", "flops"])
@pytest.mark.parametrize("scope", ["model", "sites"])
def test_a_budget_is_met_and_never_exceeded(
    fast: LowRankModule, model: nn.Module, quantity: str, scope: Any, share: float
) -> None:
    asked: dict[str, Any] = {quantity: share}
    made = fast.replan(Keep(**asked, of=scope))
    totals = made.plan.totals
    kept = totals.kept(quantity, scope)
    assert kept <= share
    # This model has five weights, and eight ranks of the largest are 6.5 %; half a percent needs more sites (see the
    # tests of real models).
    assert kept >= share - 0.065
    assert totals.model_params == (parameters(model), parameters(made))
    call = fast.session.calibration.effect_batches[0].call  # type: ignore[union-attr]
    assert totals.model_flops[1] == made.artifact.program.count_flops(call)


def test_an_unreachable_budget_names_the_smallest_and_that_one_works(fast: LowRankModule) -> None:
    with pytest.raises(lowrank_fx.TargetError, match="smallest reachable is params") as caught:
        fast.replan(Keep(params=0.001))
    smallest = float(str(caught.value).split("params=")[2].split()[0])
    assert fast.replan(Keep(params=smallest)).plan.totals.kept("params", "model") <= smallest


def test_the_reported_error_is_that_of_the_held_out_rows(fast: LowRankModule, model: nn.Module) -> None:
    # Batch 4 is held out; its second half reports.
    rows = images()[4][0][8:]
    with torch.no_grad():
        measured = relative_error(fast(rows), model(rows))
    assert math.isclose(measured, fast.plan.error, rel_tol=1e-3)


def test_the_user_s_model_comes_back_as_it_was() -> None:
    model = small_cnn().train()
    model[0].eval()
    fired: list[str] = []
    hook = model[3].register_forward_hook(lambda *_: fired.append("hook"))
    before, modes = checksum(model), [module.training for module in model.modules()]
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    made = lowrank_fx.optimize(model, images(), target=Keep(params=0.7), compile=False, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert checksum(model) == before
    assert [module.training for module in model.modules()] == modes
    assert not fired
    assert any("hook" in note for note in made.plan.notes)
    model(images()[0][0])
    assert fired == ["hook"]
    hook.remove()


def test_same_seed_same_plan_byte_for_byte(fast: LowRankModule, model: nn.Module) -> None:
    again = lowrank_fx.optimize(model, images(), target=Keep(params=0.6), compile=False, progress=False)
    assert again.plan.to_json() == fast.plan.to_json()
    assert lowrank_fx.Plan.from_json(again.plan.to_json()) == again.plan
    for mine, theirs in zip(again.parameters(), fast.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_replanning_equals_planning_afresh(fast: LowRankModule, model: nn.Module) -> None:
    fresh = lowrank_fx.optimize(model, images(), target=Keep(flops=0.5), compile=False, progress=False)
    assert fast.replan(Keep(flops=0.5)).plan == fresh.plan


def test_every_weight_is_a_site_or_left_alone_with_a_reason(fast: LowRankModule) -> None:
    plan = fast.plan
    assert [site.name for site in plan.sites] == ["0", "3", "5", "8", "10"]
    assert plan.left_alone == ()
    assert all(site.factored or site.reason for site in plan.sites)
    assert plan.cleanup == ("1 folded into 0",)


def test_ranks_stay_below_break_even_and_bounds_above_errors(fast: LowRankModule) -> None:
    assert fast.plan.factored
    for site in fast.plan.factored:
        assert site.rank is not None
        assert site.rank * (site.out_features + site.in_features) < site.out_features * site.in_features
        assert site.params[1] < site.params[0]
        assert 0 < site.error <= site.bound


def test_tolerance_is_kept_and_the_original_returns_when_slower(
    fast: LowRankModule, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowrank_fx import module as module_file
    from lowrank_fx.latency import PairedTiming

    monkeypatch.setattr(module_file, "measure", lambda *_: PairedTiming(1.2, 1.0, 1 / 1.2, 0.0, 7))
    loose, tight = fast.replan(Tolerance(0.3)), fast.replan(Tolerance(0.05))
    assert loose.plan.select_error <= 0.3
    assert tight.plan.select_error <= 0.05
    assert loose.plan.totals.kept("flops", "model") < tight.plan.totals.kept("flops", "model") < 1

    monkeypatch.setattr(module_file, "measure", lambda *_: PairedTiming(0.9, 1.0, 1 / 0.9, 0.0, 7))
    slower = fast.replan(Tolerance(0.3))
    assert not slower.plan.factored
    assert any("measured slower" in note for note in slower.plan.notes)
    assert all("measured slower" in site.reason for site in slower.plan.sites if site.name == "3")
    rows = images()[0][0]
    assert relative_error(slower(rows), model(rows)) < 1e-5  # float32, batch norm folded


def test_a_tolerance_that_nothing_meets_gives_the_original(fast: LowRankModule) -> None:
    made = fast.replan(Tolerance(1e-9))
    assert not made.plan.factored
    assert made.plan.totals.kept("flops", "model") == 1


def test_skip_keeps_layers_dense(model: nn.Module) -> None:
    made = lowrank_fx.optimize(
        model, images(), target=Keep(params=0.9), skip=("3", "1*"), compile=False, progress=False
    )
    reasons = {entry.name: entry.reason for entry in made.plan.left_alone}
    assert reasons["3"] == "skipped by the pattern '3'"
    assert reasons["10"] == "skipped by the pattern '1*'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.5}, "target=0.5 is not a target"),
        ({"planner": "magic"}, "planner='magic' does not exist; there are 'budget', 'energy', 'uniform'"),
        ({"forms": ["cp"]}, "no form is called 'cp'; there are ['lowrank', 'channel', 'channel_in', "),
        ({"skip": "pooler"}, "skip='pooler': give a list or tuple"),
        ({"skip": ["pooler*"]}, "skip='pooler*' matches no weight"),
        ({"sketch_memory": "lots"}, "sketch_memory='lots' is not a size"),
        ({"holdout": 0.9}, "holdout=0.9 is not legal"),
    ],
)
def test_bad_options_are_repeated_with_what_to_do(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(lowrank_fx.LowRankError) as caught:
        lowrank_fx.optimize(model, images(), compile=False, progress=False, **options)
    assert message in str(caught.value)


def test_an_empty_loader_and_a_model_that_is_none(model: nn.Module) -> None:
    with pytest.raises(lowrank_fx.CalibrationError, match="gave no batch"):
        lowrank_fx.optimize(model, [], compile=False)
    with pytest.raises(lowrank_fx.CaptureError, match=r"not a torch\.nn\.Module"):
        lowrank_fx.optimize(lambda x: x, images(), compile=False)  # type: ignore[arg-type]


def test_a_loader_is_read_once(model: nn.Module) -> None:
    read = []

    def generator() -> Any:
        for index, batch in enumerate(images()):
            read.append(index)
            yield batch

    lowrank_fx.optimize(model, generator(), target=Keep(params=0.8), compile=False, progress=False)
    assert read == list(range(6))


def test_bfloat16_ranks_are_multiples_of_sixteen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).to(torch.bfloat16).eval()
    batches = [torch.randn(32, 256, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(5)]
    made = lowrank_fx.optimize(model, batches, target=Keep(params=0.7), compile=False, progress=False)
    assert made.plan.factored
    assert all(site.rank is not None and site.rank % 16 == 0 for site in made.plan.factored)
    assert made(batches[0]).dtype == torch.bfloat16


def test_max_rewrites_bisects_the_factored_sites(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWRANK_FX_MAX_REWRITES", "0")
    made = lowrank_fx.optimize(model, images(), target=Keep(params=0.9), compile=False, progress=False)
    assert not [name for name in made.state_dict() if "factor" in name]


def test_a_tied_module_is_one_weight_with_pooled_statistics() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.shared(x)
            out: Tensor = self.shared(hidden.relu() * 3)
            return out

    torch.manual_seed(0)
    model = Twice().eval()
    batches = [torch.randn(40, 32, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    made = lowrank_fx.optimize(model, batches, target=Keep(params=0.7), compile=False, progress=False)
    (site,) = made.plan.sites
    assert site.factored
    assert site.flops[0] == 2 * 2 * 40 * 32 * 32
    assert list(made.state_dict()) == ["shared.bias", "shared.factor_in", "shared.factor_out"]
    assert made.session is not None
    assert made.session.calibration.sketch_of(made.session.table, made.session.table.sites[0]).rows == 2 * 4 * 40  # type: ignore[union-attr]
