"""Targets that obey speed, under a table of times that the tests write: no clock decides anything here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowrank_fx
from lowrank_fx import Keep, Metric, TargetError, Tolerance, cost, storage, timed_operators
from lowrank_fx import module as module_file
from lowrank_fx.latency import PairedTiming
from lowrank_fx.measuring import site_times
from lowrank_fx.module import LowRankModule
from lowrank_fx.payoff import NONE_PAYS, NONE_TIMED_FASTER, SLOWER
from lowrank_fx.plan import Plan
from lowrank_fx.site_times import SiteTimes
from lowrank_fx.timed_operators import Operator, Pair
from lowrank_fx.timings import USUAL_SECONDS, Timings, survey_ranks

SHARE = 0.75
"""How much of the original's time its sites take."""

SECONDS_PER_FLOP = 1e-9

Speed = Callable[[Operator, Pair], float]


def flop_ratio(operator: Operator, pair: Pair) -> float:
    return operator.flops(None) / operator.flops(pair)


def size_of(operator: Operator) -> tuple[int, int]:
    return operator.site.out_features, operator.site.in_features


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Linear(64, 160), nn.Tanh(), nn.Linear(160, 96), nn.Tanh(), nn.Linear(96, 96), nn.Linear(96, 8)
    )
    with torch.no_grad():  # what has a spectrum that falls can be factored
        for layer in made:
            if isinstance(layer, nn.Linear):
                left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_(left @ torch.diag(values * 0.93 ** torch.arange(len(values))) @ right)
    return made.eval()


def data() -> list[Tensor]:
    return [torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


class Table:
    """The times of layers and models, as a test has them.

    Attributes:
        speed: of a pair against its dense operator.
        model: of a whole model, by its plan's factored layers as they are timed.
    """

    def __init__(self) -> None:
        self.speed: Speed = flop_ratio
        self.model: Callable[[Plan, set[str]], float] = lambda plan, names: 2.0
        self.asked: list[tuple[tuple[int, int], int]] = []
        self.timed: list[set[str]] = []

    def measure(self, operator: Operator, pair: Pair, *_: object, **__: object) -> PairedTiming:
        self.asked.append((size_of(operator), pair.rank))
        dense, speedup = operator.flops(None) * SECONDS_PER_FLOP, self.speed(operator, pair)
        return PairedTiming(speedup, dense, dense / speedup, 0.0, 9)

    def measure_model(self, session: object, candidate: LowRankModule) -> PairedTiming:
        names = {name for name, _ in candidate.named_parameters()}
        own = {site.name for site in candidate.plan.factored if f"{site.name}.factor_in" in names}
        self.timed.append(own)
        speedup = self.model(candidate.plan, own)
        return PairedTiming(speedup, 1.0, 1 / speedup, 0.0, 9)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Table:
    made = Table()
    monkeypatch.setattr(timed_operators, "measure", made.measure)
    monkeypatch.setattr(module_file, "measure", made.measure_model)
    monkeypatch.setattr(module_file, "share_of_sites", lambda session, times: SHARE)
    monkeypatch.setenv("LOWRANK_FX_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture(scope="module")
def calibrated(model: nn.Module) -> lowrank_fx.Calibration:
    return lowrank_fx.calibrate(model, data(), progress=False)


@pytest.fixture(scope="module")
def fast(model: nn.Module, calibrated: lowrank_fx.Calibration) -> LowRankModule:
    """Compiled in name only: the first call would compile, and no test calls it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_file, "measure", lambda *_: PairedTiming(2.0, 1.0, 0.5, 0.0, 9))
        return lowrank_fx.optimize(model, calibrated, target=Keep(params=0.6), progress=False)


def time_left(made: LowRankModule, speed: Speed = flop_ratio) -> float:
    """The share of the model's time that a plan leaves, by a table."""
    before = after = 0.0
    session = made.session
    assert session is not None
    sites = {site.name: site for site in session.table.sites}
    for entry in made.plan.sites:
        ((rows, space),) = session.calibration.calls_of(sites[entry.name])
        operator = Operator.of(sites[entry.name], 0, rows, space, compiled=True)
        dense = operator.flops(None) * SECONDS_PER_FLOP
        before += dense
        after += dense if entry.rank is None else dense / speed(operator, Pair(entry.form, entry.rank))
    return (1 - SHARE) + SHARE * after / before


# ---- layer by layer ------------------------------------------------------------------------------------------------


def test_layers_that_measured_slower_stay_dense_and_say_so(fast: LowRankModule, table: Table) -> None:
    table.speed = lambda operator, pair: 0.93 if size_of(operator) == (96, 160) else flop_ratio(operator, pair)
    made = fast.replan(Tolerance(0.3))
    sites = {site.name: site for site in made.plan.sites}
    assert not sites["2"].factored
    assert re.fullmatch(r"measured slower: 0\.93x at lowrank\S* of rank \d+, the fastest of all", sites["2"].reason)
    assert sites["0"].factored
    assert made.plan.select_error <= 0.3
    assert set(made.artifact.speeds) == {site.name for site in made.plan.factored}
    assert all(speed.faster for speed in made.artifact.speeds.values())


def test_a_rank_between_those_that_were_timed_is_timed_before_it_is_kept(fast: LowRankModule, table: Table) -> None:
    assert fast.session is not None
    surveyed = {
        (96, 160): survey_ranks(fast.session.curves["2"].forms["lowrank"].ranks, 4),
        (160, 64): survey_ranks(fast.session.curves["0"].forms["lowrank"].ranks, 4),
    }

    def speed(operator: Operator, pair: Pair) -> float:
        hidden = pair.rank not in surveyed.get(size_of(operator), (pair.rank,))
        return 0.93 if hidden else flop_ratio(operator, pair)

    table.speed = speed
    made = fast.replan(Tolerance(0.01))
    reasons = {site.name: site.reason for site in made.plan.sites if not site.factored}
    told = [name for name in ("0", "2") if re.fullmatch(r"measured slower: 0\.93x at rank \d+", reasons.get(name, ""))]
    assert told, [(site.name, site.rank, site.reason) for site in made.plan.sites]
    assert made.plan.select_error <= 0.01
    for site in made.plan.factored:
        assert site.name in made.artifact.speeds
        assert made.artifact.speeds[site.name].faster


def test_where_no_layer_pays_the_original_comes_back(fast: LowRankModule, table: Table) -> None:
    table.speed = lambda operator, pair: 0.8
    made = fast.replan(Tolerance(0.3))
    assert not made.plan.factored
    assert made.timing is None
    assert table.timed == []
    assert all("measured slower: 0.80x" in site.reason for site in made.plan.sites if site.name in ("0", "2", "4"))
    assert made.plan.notes[-1] == NONE_TIMED_FASTER
    assert NONE_TIMED_FASTER[3:] in " ".join(str(made.report()).split())


def test_where_every_layer_fails_its_second_timing_the_original_comes_back_with_a_word(
    fast: LowRankModule, table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(operator: Operator, pair: Pair, *_: object, max_seconds: float, **__: object) -> PairedTiming:
        # 1.5 times, give or take .15 (.929 of the spread over the root of the rounds), and less once looked at closely.
        return PairedTiming(0.9, 1.0, 1 / 0.9, 0.0, 9) if max_seconds > USUAL_SECONDS else noisy

    noisy = PairedTiming(1.5, 1.0, 1 / 1.5, 0.48, 9)
    monkeypatch.setattr(timed_operators, "measure", measure)
    made = fast.replan(Tolerance(0.1))
    assert not made.plan.factored
    assert made.plan.notes[-1] == NONE_PAYS
    assert sum("measured slower: 0.90x at rank" in site.reason for site in made.plan.sites) > 1
    assert table.timed == []


def test_the_reason_is_the_last_word_whatever_else_there_is_to_say(
    fast: LowRankModule, table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LOWRANK_FX_CACHE", str(tmp_path / "file"))
    table.speed = lambda operator, pair: 0.8
    made = fast.replan(Tolerance(0.3))
    assert any("cannot be written" in note for note in made.plan.notes)
    assert made.plan.notes[-1] == NONE_TIMED_FASTER
    assert any("cannot be written" in note for note in fast.replan(Keep(flops=0.6)).plan.notes)


def test_without_compiling_no_layer_is_timed(
    model: nn.Module, calibrated: lowrank_fx.Calibration, table: Table
) -> None:
    made = lowrank_fx.optimize(model, calibrated, target=Tolerance(0.3), compile=False, progress=False)
    assert made.plan.factored
    assert table.asked == []
    assert made.artifact.speeds == {}


def test_one_survey_serves_every_target(fast: LowRankModule, table: Table) -> None:
    fast.replan(Tolerance(0.3))
    first = len(table.asked)
    assert first > 0
    assert len(set(table.asked)) == first
    fast.replan(Tolerance(0.3))
    assert len(table.asked) == first


# ---- the model as a whole ------------------------------------------------------------------------------------------


def test_a_model_that_is_not_faster_loses_the_layers_that_gain_least(fast: LowRankModule, table: Table) -> None:
    whole = fast.replan(Tolerance(0.3))
    table.model = lambda plan, names: 1.1 if len(names) < 2 else 0.98
    table.timed.clear()
    made = fast.replan(Tolerance(0.3))
    (kept,) = made.plan.factored
    assert [len(names) for names in table.timed] == [4, 2, 1]
    assert table.timed[0] > table.timed[1] > table.timed[2] == {kept.name}
    gains = {name: speed.dense_seconds - speed.seconds for name, speed in whole.artifact.speeds.items()}
    assert kept.name == max(gains, key=gains.__getitem__)
    assert set(made.artifact.speeds) == {kept.name}
    dense = [site for site in made.plan.sites if "the model measured 0.98x with it" in site.reason]
    assert len(dense) == 3
    assert "1.10x with the layers that gain more" in dense[0].reason
    assert made.timing is not None
    assert made.timing.speedup == 1.1
    assert made.plan.select_error <= 0.3
    assert made.plan.totals.model_flops[1] == made.plan.totals.model_flops[0] - kept.flops[0] + kept.flops[1]


def test_if_nothing_is_faster_the_original_comes_back_with_a_word(
    fast: LowRankModule, model: nn.Module, table: Table
) -> None:
    table.model = lambda plan, names: 0.97
    for target in (Tolerance(0.3), Keep(latency=0.9)):
        made = fast.replan(target)
        assert not made.plan.factored
        assert SLOWER in made.plan.notes
        assert made.timing is None
        assert made.artifact.speeds == {}
        assert (made.plan.error, made.plan.totals.kept("flops", "model")) == (0.0, 1.0)
        assert {site.reason for site in made.plan.sites if site.reason == SLOWER}
    assert [len(names) for names in table.timed[:3]] == [4, 2, 1]


def test_a_metric_is_asked_again_for_what_is_left(fast: LowRankModule, table: Table) -> None:
    calls: list[int] = []

    def score(candidate: nn.Module) -> float:
        calls.append(sum("factor_in" in name for name, _ in candidate.named_parameters()))
        return 1.0 - 0.01 * calls[-1]

    table.model = lambda plan, names: 1.1 if len(names) < 2 else 0.98
    made = fast.replan(Metric(score, 0.05, evaluations=5))
    assert len(made.plan.factored) == 1
    assert made.plan.metric is not None
    assert len(calls) == made.plan.metric.evaluations <= 5
    assert calls[-1] == 1
    assert made.plan.metric.after == 0.99
    # Where no call is left for a smaller plan, none is taken.
    calls.clear()
    made = fast.replan(Metric(score, 0.05, evaluations=2))
    assert len(calls) == 2
    assert not made.plan.factored


def test_a_metric_may_make_the_time_small(fast: LowRankModule, table: Table, model: nn.Module) -> None:
    """A layer that hardly gains time is left dense, whatever FLOPs it would save."""
    x = torch.cat(data())
    expected = model(x)

    def likeness(candidate: nn.Module) -> float:
        return 1 - float((candidate(x) - expected).norm() / expected.norm())

    def speed(operator: Operator, pair: Pair) -> float:
        return 1.01 if size_of(operator) == (160, 64) else flop_ratio(operator, pair)

    table.speed = speed
    by_time, by_flops = (fast.replan(Metric(likeness, 0.005, of=of)) for of in ("latency", "flops"))
    assert time_left(by_time, speed) < time_left(by_flops, speed)
    for made in (by_time, by_flops):
        seen = made.plan.metric
        assert seen is not None
        assert made.plan.factored
        assert 1 - seen.after <= 0.005
        assert made.plan.totals.kept("flops", "model") in [point.kept for point in seen.points]
    assert "FLOPs kept" in str(by_time.report())
    assert by_time.plan.to_json() == Plan.from_json(by_time.plan.to_json()).to_json()


# ---- a share of the time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.8, 0.65, 0.5])
def test_a_share_of_the_time_is_obeyed_by_the_table(fast: LowRankModule, table: Table, share: float) -> None:
    table.model = lambda plan, names: 1 / share
    made = fast.replan(Keep(latency=share))
    # Nanoseconds are whole: one for each of four sites, of 2 million in all.
    assert time_left(made) <= share + 1e-5
    assert time_left(made) > share - 0.15  # and what may be used is used
    assert made.plan.target == Keep(latency=share)
    assert f"{100 * share:.1f} % of the time remains, asked {100 * share:.1f} %" in " ".join(str(made.report()).split())


def test_less_time_costs_more_error(fast: LowRankModule, table: Table) -> None:
    table.model = lambda plan, names: 3.0
    errors = [fast.replan(Keep(latency=share)).plan.predicted_error for share in (0.8, 0.6, 0.45)]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_a_share_of_the_sites_time_leaves_the_rest_out(fast: LowRankModule, table: Table) -> None:
    made = fast.replan(Keep(latency=0.6, of="sites"))
    left = (time_left(made) - (1 - SHARE)) / SHARE
    assert left <= 0.6 + 1e-5
    told = re.match(r"the layers that can be factored take ([\d.]+)% of the time they took", made.plan.notes[-1])
    assert told is not None
    assert abs(float(told[1]) / 100 - left) < 0.0006  # a digit behind the point
    assert made.plan.notes[-1].endswith("asked 60.0%")


def test_layers_that_are_slower_by_the_clock_take_no_part(fast: LowRankModule, table: Table) -> None:
    def speed(operator: Operator, pair: Pair) -> float:
        return 0.7 if size_of(operator) == (160, 64) else flop_ratio(operator, pair)

    table.speed = speed
    made = fast.replan(Keep(latency=0.75))
    assert "0" not in {site.name for site in made.plan.factored}
    assert time_left(made, speed) <= 0.75 + 1e-5


def test_a_share_that_cannot_be_reached_names_the_smallest_that_can(fast: LowRankModule, table: Table) -> None:
    with pytest.raises(TargetError) as caught:
        fast.replan(Keep(latency=0.2))
    found = re.fullmatch(
        r"Keep\(latency=0\.2\) cannot be reached: the smallest reachable is latency=(0\.\d+) "
        r"\(\d of 4 weights can be factored and measured faster so\)",
        str(caught.value),
    )
    assert found is not None
    smallest = float(found[1])
    table.model = lambda plan, names: 1 / smallest
    assert time_left(fast.replan(Keep(latency=smallest))) <= smallest + 1e-5
    with pytest.raises(TargetError, match="cannot be reached"):
        fast.replan(Keep(latency=smallest - 0.01))


def test_a_model_that_misses_its_share_is_planned_tighter(fast: LowRankModule, table: Table) -> None:
    # The model as a whole takes a tenth more than its parts say.
    table.model = lambda plan, names: 1 / (1.1 * left[-1])
    left: list[float] = []
    remember = table.measure_model

    def measured(session: object, candidate: LowRankModule) -> PairedTiming:
        left.append(time_left(candidate))
        return remember(session, candidate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module_file, "measure", measured)
        made = fast.replan(Keep(latency=0.7))
    assert len(left) > 1
    assert left[-1] < left[0] <= 0.7 + 1e-5
    assert made.timing is not None
    assert 1 / made.timing.speedup <= 0.7 + 1e-9
    assert not any("of the original's time" in note for note in made.plan.notes)


def test_a_model_that_misses_its_share_for_good_says_so(fast: LowRankModule, table: Table) -> None:
    table.model = lambda plan, names: 1.25
    made = fast.replan(Keep(latency=0.7))
    assert made.plan.factored
    assert "the model measured at 80.0% of the original's time, asked 70.0%" in made.plan.notes


# ---- budgets that obey no clock ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [Keep(params=0.5), Keep(flops=0.6), Keep(params=0.5, regauge=True)], ids=str)
def test_a_budget_gives_the_same_plan_whatever_the_times(
    model: nn.Module, calibrated: lowrank_fx.Calibration, fast: LowRankModule, table: Table, target: Keep
) -> None:
    plain = lowrank_fx.optimize(model, calibrated, target=target, compile=False, progress=False)
    assert plain.artifact.speeds == {}
    timed = fast.replan(target)
    table.speed, table.model = lambda operator, pair: 0.5, lambda plan, names: 0.5
    slow = fast.replan(target)
    assert plain.plan.to_json() == timed.plan.to_json() == slow.plan.to_json()
    names = {site.name for site in plain.plan.factored}
    assert set(timed.artifact.speeds) == set(slow.artifact.speeds) == names
    assert slow.timing is not None
    assert slow.timing.speedup == 0.5


class Shared(nn.Module):
    """Two layers that look at the same few directions of one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        seen = torch.randn(6, 32, generator=generator)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 48)
        for layer in (self.query, self.key):
            layer.weight.data = 0.3 * torch.randn(layer.out_features, 6, generator=generator) @ seen
        self.out = nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(F.pad(self.query(x), (0, 16)) * self.key(x))
        return made


def test_layers_that_share_a_first_factor_are_timed_together(table: Table) -> None:
    target = Keep(params=0.3, of="sites")
    made = lowrank_fx.optimize(Shared().eval(), shared_batches(), target=target, progress=False)
    shared = {site.name: site for site in made.plan.factored if site.basis == "shared"}
    assert set(shared) == {"query", "key"}
    rank = shared["query"].rank
    assert rank is not None
    assert ((80, 32), rank) in table.asked
    assert made.artifact.speeds["query"] == made.artifact.speeds["key"]
    assert made.artifact.speeds["query"].flop_ratio == pytest.approx(32 * 80 / (rank * (32 + 80)))


def shared_batches() -> list[Tensor]:
    return [torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


@pytest.mark.parametrize("target", [Keep(latency=0.35, of="sites"), Tolerance(0.5)])
@pytest.mark.parametrize("slowdown", [1.0, 0.6])
def test_under_a_clock_layers_share_a_first_factor_where_that_takes_no_longer(
    table: Table, target: Keep | Tolerance, slowdown: float
) -> None:
    def speed(operator: Operator, pair: Pair) -> float:
        return flop_ratio(operator, pair) * (slowdown if size_of(operator) == (80, 32) else 1.0)

    table.speed = speed
    made = lowrank_fx.optimize(Shared().eval(), shared_batches(), target=target, progress=False)
    shared = {site.name: site for site in made.plan.factored if site.basis == "shared"}
    assert set(shared) == ({"query", "key"} if slowdown == 1 else set())
    names = dict(made.named_parameters())
    assert ("key.factor_in" in names) == (slowdown != 1)
    if shared:
        rank = shared["query"].rank
        assert rank is not None
        assert ((80, 32), rank) in table.asked
        assert made.artifact.speeds["query"] == made.artifact.speeds["key"]
    if isinstance(target, Keep):
        (said,) = (note for note in made.plan.notes if "of the time they took" in note)
        (taken,) = re.findall(r"take ([\d.]+)%", said)
        assert 20 < float(taken) <= 35


def test_layers_that_share_and_do_not_pay_together_may_pay_apart(table: Table) -> None:
    """The pair of all outputs is fast when it is planned, and slow at the second look."""
    asked = 0

    def speed(operator: Operator, pair: Pair) -> float:
        nonlocal asked
        if size_of(operator) == (80, 32):
            asked += 1
            return 0.9 if asked > 1 else 2.0 * flop_ratio(operator, pair)
        return flop_ratio(operator, pair)

    table.speed = speed
    model = Shared().eval()
    with pytest.MonkeyPatch.context() as patch:  # nothing is remembered of the first look
        patch.setattr(Timings, "_known", lambda self, operator, pair: None)
        made = lowrank_fx.optimize(model, shared_batches(), target=Tolerance(0.5), progress=False)
    assert asked > 1
    assert {site.name for site in made.plan.factored} >= {"query", "key"}
    assert all(site.shares is None for site in made.plan.factored)
    assert made.plan.select_error <= 0.5


def test_a_plan_that_is_no_faster_with_a_shared_first_factor_may_be_without(table: Table) -> None:
    table.model = lambda plan, names: 0.9 if any(site.shares for site in plan.sites) else 1.5
    made = lowrank_fx.optimize(Shared().eval(), shared_batches(), target=Tolerance(0.5), progress=False)
    assert len(table.timed) == 2
    assert {site.name for site in made.plan.factored} == {"query", "key", "out"}
    assert all(site.basis != "shared" for site in made.plan.sites)
    assert made.timing is not None
    assert made.timing.speedup == 1.5
    assert made.plan.select_error <= 0.5
    for site in made.plan.factored:  # of each layer's own pair
        assert site.rank is not None
        size = site.out_features * site.in_features, site.rank * (site.out_features + site.in_features)
        assert made.artifact.speeds[site.name].flop_ratio == pytest.approx(size[0] / size[1])


def test_what_a_clock_rules_out_while_layers_are_joined_moves_no_pick(table: Table) -> None:
    target = Keep(latency=0.35, of="sites")
    made = lowrank_fx.optimize(Shared().eval(), shared_batches(), target=target, progress=False)
    session = made.session
    assert session is not None
    times = site_times(session, compiled=True)
    times.survey()
    session = session.aimed(target, times)
    outcome = session.planned(target).outcome
    assert outcome.apart is not None
    before = session.problem.chosen(outcome.apart.pick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteTimes, "pays", lambda *_: False)
        found = session.sharing(outcome.apart.pick)
    assert found is not None
    sharing, pick = found
    after = sharing.problem.chosen(pick)
    assert {name: after[name] for name in ("out",)} == {"out": before["out"]}
    assert {after[name].form for name in ("query", "key")} == {"lowrank@shared"}
    assert all(sharing.problem.options[name][: len(own)] == own for name, own in session.problem.options.items())


@pytest.mark.parametrize("tile", [8, 16, 32])
def test_a_clock_reads_the_step_of_fast_ranks_off_the_table(table: Table, tile: int) -> None:
    """A kernel of tiles takes as long for a part of one as for all of it."""

    def speed(operator: Operator, pair: Pair) -> float:
        return flop_ratio(operator, replace(pair, rank=-(-pair.rank // tile) * tile))

    table.speed = speed
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    batches = [torch.randn(64, 256) @ torch.diag(0.97 ** torch.arange(256)) for _ in range(5)]
    made = lowrank_fx.optimize(model.eval(), batches, target=Keep(latency=0.75), progress=False)
    ranks = [site.rank for site in made.plan.factored]
    assert ranks
    assert all(rank is not None and rank % tile == 0 for rank in ranks)
    session = made.session
    assert session is not None
    times = site_times(session, compiled=True)
    assert {times.step(site) for site in session.table.sites} == {cost.FAST_STEP}  # as long as nothing was timed
    times.survey()
    assert {times.step(site) for site in session.table.sites} == {tile}
    offers = session.aimed(Tolerance(0.1), times).offers
    offered = {option.rank for site in session.table.sites for option in offers.options(site)} - {None}
    assert offered == set(range(tile, 128, tile)) | ({16} if tile > 16 else set())
    plain = session.plan(Keep(flops=0.75))[0]  # which obeys no clock
    assert all(site.rank is not None and site.rank % cost.FAST_STEP == 0 for site in plain.factored)


def test_the_report_puts_speed_beside_flops_and_names_what_does_not_pay(
    fast: LowRankModule, table: Table, tmp_path: Path
) -> None:
    table.speed = lambda operator, pair: 0.9 if size_of(operator) == (96, 160) else 1 + 0.5 * flop_ratio(operator, pair)
    made = fast.replan(Keep(flops=0.5))
    text = str(made.report())
    sites = {site.name: site for site in made.plan.factored}
    rows = {line.split()[0]: line.split() for line in text.splitlines() if " -> " in line}
    header = next(line.split() for line in text.splitlines() if line.split()[:2] == ["layer", "shape"])
    assert header[-4:] == ["speed", "FLOPs", "of", "it"]
    for name, site in sites.items():
        ratio = site.flops[0] / site.flops[1]
        expected = 0.9 if name == "2" else 1 + 0.5 * ratio
        assert rows[name][-3:] == [f"{expected:.2f}x", f"{ratio:.2f}x", f"{expected / ratio:.0%}"]
    told = " ".join(text.split())
    assert f"1 of {len(sites)} factored layers measured slower than dense, as the target obeys its budget" in told
    assert "and not the clock: 2 (0.90x)" in told
    ideal = made.report().flop_ratio
    assert f"{ideal:.2f}x if time followed FLOPs, of which it reaches {2.0 / ideal:.0%}" in told
    assert f'<td class="num">{sites["2"].flops[0] / sites["2"].flops[1]:.2f}x</td>' in made.report().to_html()
    made.save(tmp_path / "saved")
    assert fast.session is not None
    loaded = lowrank_fx.load(fast.session.model, tmp_path / "saved", compile=False)
    assert loaded.artifact.speeds == made.artifact.speeds == storage.read_speeds(tmp_path / "saved")
    assert str(loaded.report()) == text
