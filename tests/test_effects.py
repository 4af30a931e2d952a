"""Effects are what really happens to the model's output; their curves read them off without inventing anything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from lowrank_fx import effects as room
from lowrank_fx.batches import Assigned, Call, Role
from lowrank_fx.calibration import Calibration, blank
from lowrank_fx.calibration_run import run_calibration
from lowrank_fx.capture import capture
from lowrank_fx.compare import ErrorSum
from lowrank_fx.curves import EffectCurve, SiteCurves, error_curves, monotone
from lowrank_fx.effects import joint_error, measure_effects, measure_joint
from lowrank_fx.effort import EFFORTS
from lowrank_fx.errors import PlanError
from lowrank_fx.forms import ErrorCurve, Factors
from lowrank_fx.gradients import output_gradients
from lowrank_fx.graph_program import GraphProgram, run_flat
from lowrank_fx.grouped_sketch import make_sketch
from lowrank_fx.rewrite import factorize
from lowrank_fx.sites import Site, SiteCall, SiteTable


class Mixed(nn.Module):
    """Convolution, in-place operators, a weight stored [in, out], a layer called twice, one without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.turned = nn.Parameter(torch.randn(12, 16) / 4)
        self.bias = nn.Parameter(torch.randn(16))
        self.twice = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu_(self.conv(image)).mean((2, 3))
        hidden = torch.addmm(self.bias, hidden, self.turned)
        hidden += self.twice(torch.tanh(hidden))
        hidden[:, :4] += torch.tanh(self.twice(hidden))[:, :4]
        return torch.mul(self.head(hidden), 2)


class Fixture:
    def __init__(self) -> None:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)
        batches = [torch.randn(24, 3, 5, 5, generator=generator) for _ in range(4)]
        self.model = Mixed().eval()
        example = Call((batches[0],), {})
        self.program = GraphProgram.from_capture(capture(self.model, example))
        self.gm: GraphModule = self.program.module
        self.table: SiteTable = self.program.find_sites()
        roles: tuple[Role, ...] = ("calibrate", "calibrate", "select", "report")
        pieces = [Assigned(index, role, Call((batches[index],), {})) for index, role in enumerate(roles)]
        start = blank(self.program, self.table, self.model, example)
        self.calibration: Calibration = run_calibration(self.program, self.table, pieces, start, progress=False)
        gradients = output_gradients(self.program, self.table, self.calibration, progress=False).sketches
        self.curves: dict[str, SiteCurves] = error_curves(
            self.program, self.table, self.calibration, progress=False, gradients=gradients
        )
        self.effects = measure_effects(self.program, self.curves, self.calibration, progress=False)

    def rewritten_error(self, factored: dict[str, tuple[Site, Factors]]) -> float:
        """The error of a model that was really rewritten, on the effect batches."""
        rewritten = factorize(self.gm, factored, clone=True)
        total = ErrorSum()
        with torch.no_grad():
            for batch in self.calibration.effect_batches:
                total.add(run_flat(rewritten, batch.call), batch.reference)
        return total.relative


@pytest.fixture(scope="module")
def mixed() -> Fixture:
    return Fixture()


def form_of(entry: SiteCurves) -> str:
    """The plain output form, which is always measured."""
    return next(iter(entry.forms))


def measured_ranks(entry: SiteCurves, form: str, effect: EffectCurve) -> list[int]:
    """The ranks at which a variant was measured, by their errors."""
    curve = entry.forms[form]
    places = {curve.error(rank): rank for rank in curve.ranks}
    return [places[error] for error, _ in effect.points]


@pytest.mark.parametrize("name", ["conv", "turned", "twice", "head"])
def test_an_effect_is_the_error_of_the_model_rewritten_at_that_site_alone(mixed: Fixture, name: str) -> None:
    entry = mixed.curves[name]
    variants = [form for site, form in mixed.effects if site == name]
    assert variants[0] == form_of(entry)
    for form in variants:
        effect = mixed.effects[name, form]
        largest = 0.0
        for rank in measured_ranks(entry, form, effect):
            actual = mixed.rewritten_error({name: (entry.site, entry.factors(form, rank, final=False))})
            # Float32: the product of the pair is rounded once more (measured: below 2e-7 of the output).
            largest = max(largest, actual)
            assert effect.at(entry.forms[form].error(rank)) == pytest.approx(largest, rel=1e-4, abs=1e-6), (form, rank)
        assert largest > 0.01  # far above rounding, so the agreement says something


def test_every_site_is_measured(mixed: Fixture) -> None:
    assert {site.name for site in mixed.table.sites} == {"conv", "turned", "twice", "head"} == set(mixed.curves)
    assert [site.name for site in mixed.table.sites if len(site.calls) > 1] == ["twice"]
    for name, entry in mixed.curves.items():
        assert (name, form_of(entry)) in mixed.effects
    for (name, form), effect in mixed.effects.items():
        ranks = mixed.curves[name].forms[form].ranks
        measured = measured_ranks(mixed.curves[name], form, effect)
        assert len(measured) >= min(3, len(ranks))
        assert {ranks[0], ranks[-1]} <= set(measured)


def run_race(effects: dict[str, Callable[[int], float]], errors: dict[str, Callable[[int], float]]) -> room._Race:
    """The race of variants of a linear layer 64 x 64 with given effects and site errors."""
    site = Site("s", "linear", "w", False, 64, 64, (64, 64), "torch.float32", None, (SiteCall("n", "t", None),), False)
    ranks = tuple(range(1, 32))
    curves = {
        form: ErrorCurve(ranks, tuple(error(rank) ** 2 for rank in range(32)), 1.0, torch.zeros(64, 31))
        for form, error in errors.items()
    }
    entry = SiteCurves(site, torch.zeros(64, 64), make_sketch(64), curves)

    def measure(form: str, rank: int, total: ErrorSum) -> None:
        total.add(torch.tensor([1 + effects[form](rank)]), torch.tensor([1.0]))

    race = room._Race(entry, measure, EFFORTS["high"])
    race.run()
    return race


def test_a_straight_curve_takes_three_ranks_and_a_bent_one_more() -> None:
    straight = run_race({"lowrank": lambda rank: 0.9**rank}, {"lowrank": lambda rank: 0.9**rank})
    assert len(straight.sums) == 3
    bent = run_race({"lowrank": lambda rank: 1.0 if rank < 8 else 1e-3}, {"lowrank": lambda rank: 0.9**rank})
    assert len(bent.sums) > 4
    assert {rank for _, rank in bent.sums} <= set(room._measured_ranks(tuple(range(1, 32)), EFFORTS["high"].shares))


def test_who_leaves_the_race() -> None:
    plain, other = "lowrank", "lowrank@gradient"
    same = {plain: lambda rank: 0.9**rank, other: lambda rank: 0.9**rank}
    far = {plain: lambda rank: 0.9**rank, other: lambda rank: 3.5 * 0.9**rank}
    # Its own error is too far behind: not measured at all.
    assert {form for form, _ in run_race(same, far).sums} == {plain}
    # Its effect is behind at both ranks: measured there, and not on offer.
    worse = {plain: lambda rank: 0.9**rank, other: lambda rank: 1.2 * 0.9**rank}
    race = run_race(worse, same)
    assert race.has(plain)
    assert not race.has(other)
    # Better at one of them: it stays.
    crossing = {plain: lambda rank: 0.9**rank, other: lambda rank: 0.85**rank}
    assert run_race(crossing, same).has(other)


def test_changes_around_a_plan_are_those_of_rewritten_models(mixed: Fixture) -> None:
    chosen = {name: (form_of(entry), entry.forms[form_of(entry)].ranks[0]) for name, entry in mixed.curves.items()}
    del chosen["head"]  # dense in the plan
    instead: dict[str, list[tuple[str, int] | None]] = {name: [None, (form, 2)] for name, (form, _) in chosen.items()}
    instead["head"] = [("lowrank", 2)]
    error, errors = measure_joint(mixed.program, mixed.curves, chosen, instead, mixed.calibration.effect_batches)

    def brute(taken: dict[str, tuple[str, int]]) -> float:
        made = {name: (mixed.curves[name].site, mixed.curves[name].factors(*own)) for name, own in taken.items()}
        return mixed.rewritten_error(made)

    assert error == pytest.approx(brute(chosen), rel=1e-4)
    assert set(errors) == set(mixed.curves)
    for name, found in errors.items():
        rest = {other: own for other, own in chosen.items() if other != name}
        for tried, value in zip(instead[name], found, strict=True):
            expected = brute(rest if tried is None else {**rest, name: tried})
            assert value == pytest.approx(expected, rel=1e-4), (name, tried)
            assert abs(value - error) > 1e-3 * error  # the site's change is seen


def test_the_joint_error_is_that_of_the_rewritten_model(mixed: Fixture) -> None:
    batches = mixed.calibration.effect_batches
    for rank in (1, 3):
        factored = {name: (entry.site, entry.factors(form_of(entry), rank)) for name, entry in mixed.curves.items()}
        expected = mixed.rewritten_error(factored)
        assert expected > 0.02
        assert joint_error(mixed.program, factored, batches) == pytest.approx(expected, rel=1e-4)
    assert joint_error(mixed.program, {}, batches) == 0.0


def test_measuring_changes_nothing(mixed: Fixture) -> None:
    state = {name: tensor.clone() for name, tensor in mixed.gm.state_dict().items()}
    inputs = [batch.call.args[0].clone() for batch in mixed.calibration.effect_batches]
    again = measure_effects(mixed.program, mixed.curves, mixed.calibration, progress=False)
    assert again == mixed.effects
    assert all(torch.equal(tensor, state[name]) for name, tensor in mixed.gm.state_dict().items())
    for batch, before in zip(mixed.calibration.effect_batches, inputs, strict=True):
        assert torch.equal(batch.call.args[0], before)
        assert torch.equal(run_flat(mixed.gm, batch.call)[0], batch.reference[0])


def test_expensive_models_are_measured_on_their_first_rows(mixed: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EFFECT_FLOPS", 1.0)
    batches, flops = mixed.calibration.effect_batches, mixed.calibration.flops
    cut = room.affordable(mixed.program, batches, flops, 100, room.EFFECT_FLOPS)
    # 16 rows of 48: a third of each of the two batches.
    assert [batch.call.batch_size for batch in cut] == [8, 8]
    for batch, whole in zip(cut, batches, strict=True):
        assert torch.equal(batch.call.args[0], whole.call.args[0][:8])
        assert torch.allclose(batch.reference[0], whole.reference[0][:8], atol=1e-5)
    monkeypatch.undo()
    assert room.affordable(mixed.program, batches, flops, 100, room.EFFECT_FLOPS) == batches


def test_a_rank_that_is_not_on_offer_is_refused(mixed: Fixture) -> None:
    entry = mixed.curves["head"]
    for form, rank in (("channel", 1), ("lowrank", 0), ("lowrank", 100)):
        with pytest.raises(PlanError, match=rf"head: form '{form}' at rank {rank} is not on offer"):
            entry.factors(form, rank)


# ---- the curve -------------------------------------------------------------------------------------------------------

positive = st.floats(1e-12, 1e6)
measured_points = st.lists(st.tuples(positive, st.floats(0, 1e9)), min_size=1, max_size=7)


@settings(deadline=None)
@given(measured_points, st.lists(st.floats(0, 2e6), min_size=2, max_size=12))
def test_a_curve_never_falls(points: list[tuple[float, float]], errors: list[float]) -> None:
    curve = monotone(points)
    read = [curve.at(error) for error in sorted([*errors, *(point[0] for point in points)])]
    # Powers are rounded, by up to 2^-53 times the logarithm of a ratio (at most 745): 1e-13.
    assert all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(read))
    assert all(0 <= value <= curve.points[-1][1] for value in read)
    assert curve.at(0.0) == 0.0


@settings(deadline=None)
@given(measured_points)
def test_a_curve_is_exact_at_its_points(points: list[tuple[float, float]]) -> None:
    curve = monotone(points)
    assert [curve.at(error) for error, _ in curve.points] == [effect for _, effect in curve.points]
    for error, effect in points:
        assert curve.at(error) >= effect
        # The running maximum: never more than the largest effect measured at this error or below.
        assert curve.at(error) == max(above for at, above in points if at <= error)


@settings(deadline=None)
@given(st.floats(0.5, 3), st.floats(1e-3, 10), st.floats(0, 1))
def test_a_power_law_is_read_exactly_between_two_points(slope: float, scale: float, share: float) -> None:
    low, high = 1e-4, 0.5
    curve = EffectCurve(((low, scale * low**slope), (high, scale * high**slope)))
    error = low * (high / low) ** share
    assert curve.at(error) == pytest.approx(scale * error**slope, rel=1e-11, abs=0)


def test_a_curve_outside_of_its_points_and_with_measured_zeros() -> None:
    curve = EffectCurve(((0.1, 0.02), (0.2, 0.08)))
    assert curve.at(0.05) == 0.01  # in proportion
    assert curve.at(0.9) == 0.08  # nothing is extrapolated upwards
    assert EffectCurve(()).at(0.3) == 0.0
    assert EffectCurve(((0.1, 0.0), (0.3, 0.1))).at(0.2) == pytest.approx(0.05)  # linear from a measured zero


def test_effects_far_below_rounding_are_kept() -> None:
    assert EffectCurve(((1e-20, 1e-20), (1e-18, 1e-18))).at(1e-19) == pytest.approx(1e-19, rel=1e-12, abs=0)


def test_an_overflow_counts_as_a_very_large_effect() -> None:
    curve = monotone([(0.2, math.nan), (0.1, 0.5), (0.3, math.inf)])
    assert curve.points == ((0.1, 0.5), (0.2, 1e9), (0.3, 1e9))
