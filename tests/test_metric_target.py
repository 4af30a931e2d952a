"""``Metric`` end to end: what comes back was scored and held, whatever the metric does with what it is given."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, Metric
from lowrank_fx import module as module_file
from lowrank_fx.latency import PairedTiming
from lowrank_fx.module import LowRankModule
from lowrank_fx.session import Session
from lowrank_fx.targets import Target

FASTER = PairedTiming(1.2, 1.0, 1 / 1.2, 0.0, 7)
SLOWER = PairedTiming(0.9, 1.0, 1 / 0.9, 0.0, 7)


def rows(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Points near a 12-dimensional subspace of 48, labelled by the largest of their first five coordinates in it."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(count, 12, generator=generator)
    basis = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(count, 48, generator=generator)
    return inner @ basis + 0.3 * noise, inner[:, :5].argmax(1)


TEST = rows(1, 800)


def batches() -> list[Tensor]:
    x, _ = rows(3, 640)
    return [x[start : start + 64] for start in range(0, 640, 64)]


def accuracy(model: nn.Module) -> Tensor:
    model.eval()
    right: Tensor = model(TEST[0]).argmax(1) == TEST[1]
    return right.float().mean()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A classifier that was trained until most of it is right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = rows(2, 1024)
    for step in range(60):
        part = slice(step % 4 * 256, (step % 4 + 1) * 256)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert accuracy(model) > 0.8
    return model


@pytest.fixture(scope="module", params=["export", "modules"])
def fast(request: pytest.FixtureRequest, model: nn.Module) -> LowRankModule:
    return lowrank_fx.optimize(
        model, batches(), target=Keep(params=0.8), capture=request.param, compile=False, progress=False
    )


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the original comes back must not hang on the clock of the machine."""
    monkeypatch.setattr(module_file, "measure", lambda *_: FASTER)


class Counted:
    """A metric that counts how often it is asked for, and keeps what it answered."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def __call__(self, model: nn.Module) -> float:
        self.values.append(float(accuracy(model)))
        return self.values[-1]


@pytest.fixture(scope="module")
def made(fast: LowRankModule) -> LowRankModule:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_file, "measure", lambda *_: FASTER)
        return fast.replan(Metric(accuracy, 0.02, evaluations=6))


@pytest.mark.parametrize(("of", "max_drop"), [("flops", 0.01), ("params", 0.05)])
def test_the_metric_of_what_comes_back_holds(fast: LowRankModule, model: nn.Module, of: str, max_drop: float) -> None:
    counted = Counted()
    target = Metric(counted, max_drop, of=of, evaluations=9)  # type: ignore[arg-type]
    made = fast.replan(target)
    plan, seen = made.plan, made.plan.metric
    assert seen is not None
    assert seen.evaluations == len(counted.values) <= 9
    assert [seen.before, *(point.value for point in seen.points)] == counted.values
    with torch.no_grad():
        # The same factors score the same; of the original the captured program counts, so a row may fall otherwise.
        assert float(accuracy(made)) == seen.after >= seen.before - max_drop
        assert float(accuracy(model)) == pytest.approx(seen.before, abs=1 / 800 + 1e-9)
    # It is the cheapest of all that held.
    kept = plan.totals.kept(of, "model")
    assert kept == min(point.kept for point in seen.points if target.holds(seen.before, point.value or 0.0))
    assert kept < 0.9
    (chosen,) = (point for point in seen.points if point.kept == kept)
    assert (chosen.value, chosen.error) == (seen.after, plan.select_error)
    assert made.timing == FASTER


def test_more_may_be_saved_where_more_may_be_lost(fast: LowRankModule) -> None:
    # Behind a seventh of the FLOPs this model falls off a cliff: its accuracy goes from .92 to .67 at once.
    less, more = (fast.replan(Metric(accuracy, drop)).plan.totals for drop in (0.005, 0.5))
    assert less.kept("flops", "model") > more.kept("flops", "model")


def test_the_same_search_gives_the_same_plan_which_survives_its_file(
    fast: LowRankModule, made: LowRankModule, tmp_path: Path
) -> None:
    first, second = made, fast.replan(Metric(accuracy, 0.02, evaluations=6))
    assert first.plan.to_json() == second.plan.to_json()
    first.save(tmp_path)
    assert fast.session is not None
    loaded = lowrank_fx.load(fast.session.model, tmp_path, compile=False)
    assert loaded.plan == first.plan
    assert str(loaded.report()) == str(first.report())
    with pytest.raises(lowrank_fx.TargetError, match=re.escape(f"{__name__}.accuracy was read from JSON")):
        fast.replan(loaded.plan.target)


def test_a_model_that_measured_slower_comes_back_as_it_was(
    fast: LowRankModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_file, "measure", lambda *_: SLOWER)
    made = fast.replan(Metric(accuracy, 0.02, evaluations=4))
    assert not made.plan.factored
    assert made.plan.metric is not None
    assert made.plan.metric.after == made.plan.metric.before
    assert made.plan.metric.points
    assert "measured slower" in str(made.report())


def test_where_no_plan_holds_the_original_comes_back_with_a_word(fast: LowRankModule) -> None:
    answers = iter([1.0])
    made = fast.replan(Metric(lambda model: next(answers, 0.0), 0.5, evaluations=4))
    assert not made.plan.factored
    assert made.plan.notes[-1] == (
        "none of the 3 plans that were scored keeps Metric(<lambda>, max_drop=0.5, evaluations=4), so the original "
        "came back"
    )
    assert made.plan.metric is not None
    assert (made.plan.metric.before, made.plan.metric.after) == (1.0, 1.0)
    assert all("no smaller plan was found within Metric(" in site.reason for site in made.plan.sites)


def checksum(model: nn.Module) -> str:
    state = b"".join(tensor.detach().numpy().tobytes() for tensor in model.state_dict().values())
    return hashlib.sha256(state).hexdigest()


def test_a_metric_may_do_what_it_likes_with_the_model_and_harms_nothing(
    fast: LowRankModule, made: LowRankModule
) -> None:
    assert fast.session is not None
    names = set(made.state_dict())
    before = checksum(fast.session.model), checksum(fast)

    def rough(model: nn.Module) -> float:
        value = float(accuracy(model))
        assert not model.training
        assert not torch.is_grad_enabled()
        assert {name.partition(".")[0] for name in model.state_dict()} == {name.partition(".")[0] for name in names}
        assert model(input=TEST[0][:3]).shape == (3, 5)  # by name, as the user's model allows
        model.train()
        assert model.training
        model.double()
        assert model(TEST[0][:3].double()).dtype == torch.float64
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return value

    assert fast.replan(Metric(rough, 0.02, evaluations=6)).plan.metric == made.plan.metric
    assert (checksum(fast.session.model), checksum(fast)) == before


def test_every_model_meets_the_same_random_numbers(fast: LowRankModule) -> None:
    drawn: list[float] = []

    def sampled(model: nn.Module) -> float:
        drawn.append(torch.rand(()).item())
        return 1.0

    state = torch.random.get_rng_state()
    fast.replan(Metric(sampled, 0.0, evaluations=3))
    assert len(drawn) > 1
    assert len(set(drawn)) == 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_metric_that_fails_is_named_with_the_plan(fast: LowRankModule) -> None:
    def failing(answers: Iterator[float]) -> Metric:
        return Metric(lambda model: next(answers), 0.1)

    with pytest.raises(lowrank_fx.TargetError, match=r"<lambda> failed for the original: StopIteration"):
        fast.replan(failing(iter([])))
    with pytest.raises(
        lowrank_fx.TargetError, match=r"<lambda> returned nan for the original; it must return a finite"
    ):
        fast.replan(failing(iter([float("nan")])))
    with pytest.raises(lowrank_fx.TargetError, match=r"<lambda> failed for the original: ZeroDivisionError"):
        fast.replan(Metric(lambda model: 1 / 0, 0.1))
    share = r"the plan that keeps \d+\.\d% of its flops"
    with pytest.raises(lowrank_fx.TargetError, match=rf"<lambda> failed for {share}: StopIteration"):
        fast.replan(failing(iter([1.0])))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), OverflowError("math range error")])
@pytest.mark.parametrize("higher_is_better", [False, True])
def test_a_plan_whose_metric_is_not_finite_drops_too_far(
    fast: LowRankModule, bad: float | Exception, higher_is_better: bool, tmp_path: Path
) -> None:
    """A perplexity overflows where a plan is bad; the search goes on with dearer ones."""
    lost: list[bool] = []

    def perplexity(model: nn.Module) -> float:
        lost.append(float(accuracy(model)) < 0.85)
        if lost[-1] and isinstance(bad, Exception):
            raise bad
        return bad if lost[-1] else 1.0  # type: ignore[return-value]

    made = fast.replan(Metric(perplexity, 0.1, higher_is_better=higher_is_better, evaluations=9))
    seen = made.plan.metric
    assert seen is not None
    assert made.plan.factored
    assert [point.value is None for point in seen.points] == lost[1:]
    assert 0 < sum(lost) < len(lost) - 1
    assert (seen.before, seen.after) == (1.0, 1.0)
    with torch.no_grad():
        assert float(accuracy(made)) >= 0.85
    made.save(tmp_path)
    assert fast.session is not None
    loaded = lowrank_fx.load(fast.session.model, tmp_path, compile=False)
    assert loaded.plan == made.plan
    assert loaded.plan.to_json() == made.plan.to_json()
    rows = [row[2:] for row in made.report().scores if row[2] == "not finite"]
    assert rows == [("not finite", "", "drops too far")] * sum(lost)
    assert str(made.report()).count("not finite") == sum(lost)
    assert "not finite" in made.report().to_html()


def test_optimize_takes_a_metric_at_once(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []
    planned = Session.planned

    def watched(self: Session, target: Target, share: float | None = None) -> object:
        shown.append(self.progress)
        return planned(self, target, share)

    monkeypatch.setattr(Session, "planned", watched)
    target = Metric(accuracy, 0.02, evaluations=3)
    made = lowrank_fx.optimize(model, batches(), target=target, compile=False, progress=False)
    assert made.plan.factored
    assert shown == [False]
