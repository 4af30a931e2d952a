"""Plans of a session: what comes back is never worse than what was compared; the baseline that proxies must beat."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_fx
from lowrank_fx import Keep, LowRankModule, TargetError, Tolerance, effects
from lowrank_fx import session as session_file
from lowrank_fx.baseline import BASELINE
from lowrank_fx.cache import CachedBatch
from lowrank_fx.corrections import Made
from lowrank_fx.program import Program
from lowrank_fx.session import Session
from lowrank_fx.settle import ALTERNATED, Choice
from lowrank_fx.targets import Target


class Convolved(nn.Module):
    """A convolution that alternation fits to other rows than those that choose, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.up = nn.Linear(24, 48)
        self.conv = nn.Conv1d(48, 48, 3, padding=1)
        self.norm = nn.BatchNorm1d(48)
        self.head = nn.Linear(48, 10)

    def forward(self, words: Tensor) -> Tensor:
        x = self.up(self.words(words)).mT
        logits: Tensor = self.head(torch.relu(self.norm(x + self.conv(x))).mT)
        return logits


@pytest.fixture(scope="module")
def convolved() -> LowRankModule:
    torch.manual_seed(2)
    model = Convolved().eval()
    batches = [torch.randint(0, 50, (8, 12)) for _ in range(10)]
    return lowrank_fx.optimize(model, batches, target=Keep(flops=0.9), compile=False, progress=False)


@pytest.fixture(scope="module")
def linear() -> LowRankModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 16))
    batches = [torch.randn(32, 24) @ torch.diag(0.9 ** torch.arange(24)) for _ in range(8)]
    return lowrank_fx.optimize(model, batches, target=Keep(params=0.6), compile=False, progress=False)


def session_of(made: LowRankModule) -> Session:
    assert made.session is not None
    return made.session


# ---- what is settled on ----------------------------------------------------------------------------------------------


def test_a_tolerance_holds_on_the_rows_that_chose(convolved: LowRankModule) -> None:
    session, worse = session_of(convolved), 0
    for asked in (0.1, 0.12, 0.15):
        first = dict(session.plan(Tolerance(asked))[0].candidates)
        # No room is left: whatever gives more than the plan as it was compared breaks this one.
        target = Tolerance(min(first["effect"], asked))
        plan, made = session.plan(target)
        errors = dict(plan.candidates)
        assert plan.factored
        assert plan.select_error <= target.error
        assert plan.select_error == errors[plan.candidate] == min(errors.values())
        assert made.error(session.program, session.calibration.select_batches) == plan.select_error
        worse += errors[f"effect, {ALTERNATED}"] > target.error
    assert worse


@pytest.mark.parametrize(
    ("target", "step"), [(Keep(params=0.5), 8), (Keep(flops=0.5), 16), (Tolerance(0.1), 16)], ids=str
)
def test_ranks_are_fast_where_flops_or_time_count(target: Target, step: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 4))
    made = lowrank_fx.optimize(
        model, [torch.randn(64, 256) for _ in range(5)], target=Keep(params=0.6), compile=False, progress=False
    )
    offered = session_of(made).aimed(target, None).problem.options
    assert {option.rank for option in offered["0"]} == {None, *range(step, 128, step)}
    assert {option.rank for option in offered["2"]} == {None, 1, 2, 3}


def test_a_budget_is_never_spent_worse_than_it_was_compared(convolved: LowRankModule) -> None:
    for share in (0.5, 0.7):
        plan, _ = session_of(convolved).plan(Keep(flops=share))
        assert plan.select_error == min(error for _, error in plan.candidates)


def test_an_error_that_is_known_is_not_measured_again(linear: LowRankModule, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = session_of(linear).maker
    plan = linear.plan
    choice = {site.name: ("lowrank", 4) for site in plan.sites}
    measured: list[Made] = []

    def error(self: Made, *_: object) -> float:
        measured.append(self)
        return 1.0

    monkeypatch.setattr(Made, "error", error)
    maker = replace(maker, corrections=())
    assert maker.settled(choice, 0.25).error == 0.25
    assert not measured
    assert maker.settled(choice, float("inf")).error == 1.0
    assert len(measured) == 1


# ---- the baseline ----------------------------------------------------------------------------------------------------


def by_hand(session: Session, target: Keep) -> Choice:
    """Per layer the largest rank in the basis of activations whose share of the weights fits for all.

    What is left of the budget goes, step by step, to where it lowers a layer's squared error most for its weights.
    """
    budget = session.budget(target)
    sizes = {site.name: (site.out_features, site.in_features) for site in session.table.sites}
    ranks = {name: session.curves[name].forms["lowrank"].ranks for name in sizes}
    shares = {r * (m + d) / (m * d) for name, (m, d) in sizes.items() for r in ranks[name]} | {1.0}
    for share in sorted(shares, reverse=True):
        cost, choice = 0, dict[str, int]()
        for name, (m, d) in sizes.items():
            fitting = [r for r in ranks[name] if r * (m + d) <= share * m * d * (1 + 1e-12)]
            rank = None if share >= 1 else max(fitting, default=ranks[name][0])
            cost += m * d if rank is None else rank * (m + d)
            choice[name] = d * m if rank is None else rank * (m + d)
        if cost <= budget:
            break
    left = budget - cost
    while True:
        steps = []
        for name, (m, d) in sizes.items():
            curve = session.curves[name].forms["lowrank"]
            error = {rank * (m + d): curve.error(rank) for rank in curve.ranks} | {m * d: 0.0}
            now = choice[name]
            steps += [
                ((error[now] ** 2 - error[more] ** 2) / (more - now), name, more)
                for more in error
                if 0 < more - now <= left and error[more] < error[now]
            ]
        if not steps:
            break
        _, name, more = max(steps)
        left -= more - choice[name]
        choice[name] = more
    factored = {name: weights for name, weights in choice.items() if weights < math.prod(sizes[name])}
    return {name: ("lowrank", weights // sum(sizes[name])) for name, weights in factored.items()}


def gradients_only(session: Session) -> Session:
    """As it is where every plain variant left the race."""
    left = {key: effect for key, effect in session.effects.items() if key[1].endswith("@gradient")}
    assert len(left) == 3
    return replace(session, effects=left, _late={})


def test_the_baseline_is_uniform_over_plain_forms(linear: LowRankModule) -> None:
    session, target = gradients_only(session_of(linear)), Keep(params=0.6)
    plan, _ = session.plan(target)
    choice = by_hand(session, target)
    factored = {name: (session.curves[name].site, session.curves[name].factors(*own)) for name, own in choice.items()}
    expected = Made(factored).error(session.program, session.calibration.select_batches)
    assert dict(plan.candidates)[BASELINE] == pytest.approx(expected, rel=1e-6)
    assert plan.select_error < expected
    names = [name for name, _ in session.plan(Tolerance(0.2))[0].candidates]
    assert names.count(BASELINE) == 1


def test_a_baseline_that_wins_is_the_plan(linear: LowRankModule, monkeypatch: pytest.MonkeyPatch) -> None:
    session = gradients_only(session_of(linear))
    measured = Session._select_error

    def misled(self: Session, choice: Choice) -> float:
        return measured(self, choice) + any("@" in form for form, _ in choice.values())

    monkeypatch.setattr(Session, "_select_error", misled)
    planned = session.planned(Keep(params=0.6))
    plan = planned.plan
    assert plan.candidate.split(", ")[:2] == BASELINE.split(", ")
    assert {site.basis for site in plan.factored} == {"activation"}
    assert plan.totals.kept("params", "model") <= 0.6
    assert plan.select_error == planned.made.error(session.program, session.calibration.select_batches)
    # The effects of what had left the race were measured for it.
    assert all(0 < site.effect < 1 for site in plan.factored)
    assert plan.predicted_error == pytest.approx(sum(site.effect**2 for site in plan.factored) ** 0.5)
    assert session.plan(Keep(params=0.6))[0].to_json() == plan.to_json()
    assert lowrank_fx.plan.Plan.from_json(plan.to_json()) == plan
    # Layers may leave it again.
    dropped = plan.factored[0].name
    fewer = session.without(planned, {dropped: "slower"})
    kept = {site.name: (site.form, site.basis, site.rank) for site in plan.factored if site.name != dropped}
    assert {site.name: (site.form, site.basis, site.rank) for site in fewer.plan.factored} == kept
    assert "slower" in {site.reason for site in fewer.plan.sites}


def test_a_baseline_that_was_compared_already_is_not_again(linear: LowRankModule) -> None:
    session = session_of(linear)
    plain = {(name, "lowrank"): next(iter(session.effects.values())) for name in session.curves}
    plan, _ = replace(session, effects=plain).plan(Keep(params=0.6))
    assert BASELINE not in dict(plan.candidates)
    assert "uniform" in dict(plan.candidates)


@pytest.mark.parametrize("options", [{"effort": "low"}, {"planner": "energy"}, {"planner": "uniform"}])
def test_where_there_is_no_baseline(linear: LowRankModule, options: dict[str, Any]) -> None:
    batches = [torch.randn(32, 24) for _ in range(5)]
    made = lowrank_fx.optimize(
        session_of(linear).model, batches, target=Keep(params=0.6), compile=False, progress=False, **options
    )
    assert BASELINE not in dict(made.plan.candidates)


def test_a_plan_whose_reported_outputs_overflow_is_refused(
    linear: LowRankModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, measured = session_of(linear), Made.error

    def overflowing(self: Made, program: Program, batches: Sequence[CachedBatch]) -> float:
        return math.inf if batches[0] is session.calibration.report_batches[0] else measured(self, program, batches)

    monkeypatch.setattr(Made, "error", overflowing)
    with pytest.raises(
        TargetError, match=r"Keep\(params=0.5\): the plan's outputs are not finite on the held-out rows"
    ):
        session.plan(Keep(params=0.5))


@pytest.mark.parametrize("target", [Tolerance(0.3), lowrank_fx.Metric(lambda model: 1.0, max_drop=0.1)])
def test_a_target_that_the_original_meets_gets_it_back_where_reported_outputs_overflow(
    linear: LowRankModule, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, measured = session_of(linear), Made.error

    def overflowing(self: Made, program: Program, batches: Sequence[CachedBatch]) -> float:
        reported = bool(self.factored) and batches[0] is session.calibration.report_batches[0]
        return math.inf if reported else measured(self, program, batches)

    assert session.plan(target)[0].factored
    monkeypatch.setattr(Made, "error", overflowing)
    plan, made = session.plan(target)
    assert not plan.factored
    assert not made.factored
    assert (plan.error, plan.select_error) == (0.0, 0.0)
    assert plan.totals.model_params[0] == plan.totals.model_params[1]
    (note,) = [note for note in plan.notes if "original came back" in note]
    assert note.startswith("the plan's outputs are not finite on the held-out rows that report its error")
    if plan.metric is not None:
        assert plan.metric.after == plan.metric.before
    lowrank_fx.Plan.from_json(plan.to_json())


# ---- effects around a plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "measured"), [(0.5, 0), (1.5, 1), (2.5, 2), (100, 3)])
def test_as_many_layers_are_measured_again_around_a_plan_as_the_work_allows(
    linear: LowRankModule, layers: float, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, tried = session_of(linear), []
    batch = session.calibration.effect_batches[0]
    work = session.calibration.flops / batch.call.batch_size / 2 * effects.MIN_EFFECT_ROWS
    monkeypatch.setattr(session_file, "MARGINAL_FLOPS", layers * work)

    def counted(*args: Any) -> Any:
        tried.append(len(args[3]))
        return effects.measure_joint(*args)

    monkeypatch.setattr(session_file, "measure_joint", counted)
    plan, _ = session.plan(Keep(params=0.6))
    assert tried == ([measured] if measured else [])
    assert ("marginal" in dict(plan.candidates)) == (measured > 0)


# ---- what cannot be reached ------------------------------------------------------------------------------------------


def reached(model: nn.Module, batches: list[Tensor], **options: Any) -> str:
    with pytest.raises(TargetError) as caught:
        lowrank_fx.optimize(model, batches, target=Keep(params=0.01), compile=False, progress=False, **options)
    found = re.search(r"\(\d of \d weights can be factored(; .*)?\)$", str(caught.value))
    assert found is not None, str(caught.value)
    return found[0]


def test_forms_that_fit_nothing_are_named_with_what_they_are_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv1d(32, 32, 3, padding=1) for _ in range(4)))
    found = reached(model, [torch.randn(4, 32, 10) for _ in range(4)], forms=("spatial",))
    assert found == (
        "(0 of 4 weights can be factored; 0, 1, 2 and 1 more: no form that is allowed can stand for it (spatial is for "
        "convolutions whose kernel is larger than one in two dimensions))"
    )


def test_weights_that_are_no_layers_are_named_with_the_reason() -> None:
    torch.manual_seed(0)
    model = Convolved().eval()
    found = reached(model, [torch.randint(0, 50, (8, 12)) for _ in range(4)], skip=("[uh]*",))
    assert found == (
        "(1 of 4 weights can be factored; up, head: skipped by the pattern '[uh]*'; words: an embedding is a table "
        "lookup, not a matrix product)"
    )


def test_where_all_can_be_factored_no_reason_is_told(linear: LowRankModule) -> None:
    with pytest.raises(TargetError, match=r"\(3 of 3 weights can be factored\)$"):
        linear.replan(Keep(params=0.01))
