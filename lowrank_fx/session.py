"""What one calibration makes possible: a plan, and the factors for it, for any target, without reading data again.

A session owns the captured model, the sketches' error curves and the measured effects. It
shares the model's weights, which therefore have to stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, get_args

from torch import nn

from lowrank_fx._ambient import settled
from lowrank_fx._progress import Progress
from lowrank_fx.account import Account
from lowrank_fx.baseline import BASELINE, baseline, plain_beyond, plain_effects
from lowrank_fx.calibration import Calibration
from lowrank_fx.compiling import compile_module
from lowrank_fx.corrections import Made, Settled
from lowrank_fx.curves import EffectCurve, SiteCurves
from lowrank_fx.double_sided import split_variant, variant
from lowrank_fx.effects import MIN_EFFECT_ROWS, affordable, joint_error, measure_effects, measure_joint
from lowrank_fx.effort import EFFORTS, Effort
from lowrank_fx.errors import TargetError
from lowrank_fx.factor_cache import FactorCache
from lowrank_fx.frozen import Frozen
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.offers import Offers
from lowrank_fx.plan import MetricPoint, MetricSearch, Plan, SitePlan
from lowrank_fx.planners import planner
from lowrank_fx.planners.budget import Outcome, within_budget, within_tolerance
from lowrank_fx.planners.marginal import around, largest, neighbours
from lowrank_fx.planners.metric import within_drop
from lowrank_fx.planners.problem import Allocator, Pick, Problem
from lowrank_fx.program import Program
from lowrank_fx.scored import score
from lowrank_fx.settle import Choice, Maker, gauge_notes, loop_notes
from lowrank_fx.shared_groups import joined
from lowrank_fx.shared_inputs import Joint, sharing_notes
from lowrank_fx.site_times import SiteTimes
from lowrank_fx.sites import SiteTable
from lowrank_fx.targets import CostKind, Keep, Metric, Target, Tolerance, obeys_speed
from lowrank_fx.unfactored import unfactored

MARGINAL_FLOPS = 5.0e11
"""Work allowed for measuring effects again around a plan: as many layers, at the least rows, as it pays for."""

Taken: TypeAlias = tuple[tuple[str, tuple[str, int]], ...]
"""A choice that can be looked up."""


class Planned(NamedTuple):
    """A plan, what it puts into the program, and the search that found it."""

    plan: Plan
    made: Made
    outcome: Outcome


@dataclass
class Session:
    """A calibrated model, ready to be planned.

    Attributes:
        model: the user's model, for measuring against it.
        program: the captured model, clean.
        table: its sites and taps.
        calibration: sketches, rows, FLOPs, cached batches.
        curves: error curves by site name.
        effects: measured effects by (site name, form name).
        planner: the planner's name.
        notes: what the user should know.
        params: number of parameters of the user's model.
        effort: how much work a plan may be.
        progress: whether work over two seconds shows a progress bar.
        regauge: whether pairs are re-gauged where they can be, which the target says.
        fast: whether only ranks are on offer that run fast for what they cost: for all targets but ``Keep(params=)``.
        times: measured times of the sites, of a target that obeys them: options that are not faster are not on offer.
        joints: layers that may have one first factor; their options are for plans that take all of each.
        forms: names of the forms that the user allows; None for all.
        refines: whether plans are refined, which under a ``Metric`` takes a call of its own.
    """

    model: nn.Module
    program: Program
    table: SiteTable
    calibration: Calibration
    curves: Mapping[str, SiteCurves]
    effects: Mapping[tuple[str, str], EffectCurve]
    planner: str
    notes: tuple[str, ...]
    params: int
    effort: Effort = EFFORTS["high"]
    progress: bool = False
    regauge: bool = False
    fast: bool = False
    times: SiteTimes | None = None
    joints: tuple[Joint, ...] = ()
    forms: tuple[str, ...] | None = None
    refines: bool = False
    _compiled: dict[bool, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _late: dict[tuple[str, str], EffectCurve] = field(default_factory=dict, repr=False)
    _kept: FactorCache = field(default_factory=FactorCache, repr=False)

    @cached_property
    def problem(self) -> Problem:
        """The options of every site, as they are when it is first asked for; :meth:`again` poses it anew."""
        return Problem({site.name: self.offers.options(site) for site in self.table.sites})

    @property
    def offers(self) -> Offers:
        """What makes the options of a site."""
        asked = self.regauge, self.fast, self.times, self.joints
        return Offers(self.table, self.calibration, self.curves, self.effects, *asked)

    @property
    def maker(self) -> Maker:
        """What makes factors of a choice."""
        tried = self.effort.corrections
        return Maker(self.program, self.table, self.calibration, self.curves, tried, self.progress, self.joints)

    def plan(self, target: Target) -> tuple[Plan, Made]:
        """The plan for ``target``, and what it puts into the program; no time is measured.

        Raises:
            TargetError: the target cannot be reached; the message names the smallest reachable value.
        """
        return self.aimed(target, None).planned(target)[:2]

    def aimed(self, target: Target, times: SiteTimes | None) -> Session:
        """The session with the problem that a target poses.

        Args:
            target: what is asked for.
            times: of the sites, or None where none were measured.
        """
        regauge = isinstance(target, Keep) and target.regauge
        fast = not (isinstance(target, Keep) and target.quantity == "params")
        times = times if obeys_speed(target) else None
        if (regauge, fast) == (self.regauge, self.fast) and times is None and self.times is None:
            return self
        return replace(self, regauge=regauge, fast=fast, times=times)

    def again(self) -> Session:
        """The session with its problem posed anew, after more was measured."""
        return replace(self)

    def planned(self, target: Target, share: float | None = None) -> Planned:
        """The plan for the target that this session was aimed at.

        Args:
            target: what is asked for.
            share: of a ``Keep``, the share to plan with in the place of its own.

        Raises:
            TargetError: the target cannot be reached; the message names the smallest reachable value.
        """
        with settled(self.program.device):
            try:
                return self._plan(target, share)
            finally:
                self._kept.clear()

    def _plan(self, target: Target, share: float | None) -> Planned:
        errors: dict[Taken, float] = {}

        def evaluate(pick: Pick) -> float:
            choice = self.problem.factored(pick)
            taken = tuple(choice.items())
            if taken not in errors:
                errors[taken] = self._select_error(choice)
            return errors[taken]

        allocators = planner(self.planner)
        if isinstance(target, Metric):
            return self._plan_by_metric(target, allocators, evaluate)
        if isinstance(target, Tolerance):
            quantity: CostKind = "flops"
            outcome = within_tolerance(self.problem, quantity, target.error, allocators, evaluate)
            marginal = self.marginal(outcome.pick)
            if marginal is not None:
                smaller = within_tolerance(self.problem, quantity, target.error, marginal, evaluate)
                if self.problem.cost(smaller.pick, quantity) < self.problem.cost(outcome.pick, quantity):
                    outcome = smaller
            budget = self.problem.cost(outcome.pick, quantity)
        else:
            quantity = target.quantity
            budget = self.budget(target, share)
            outcome = within_budget(self.problem, quantity, budget, allocators, evaluate)
            marginal = self.marginal(outcome.pick)
            if marginal is not None:
                outcome = outcome.against(within_budget(self.problem, quantity, budget, marginal, evaluate))
        return self._challenged(target, quantity, outcome, budget, errors)

    def sharing(self, pick: Pick) -> tuple[Session, Pick] | None:
        """A pick with one first factor for the layers that are predicted to do better with it; None where none are.

        A re-gauged pair has no first factor to share, and its layers stay apart.

        Returns:
            The session in whose problem those layers have that option, and the pick there.
        """
        if self.regauge or type(self.program) is not GraphProgram:
            return None
        joints = joined(self.table, self.curves, self.problem.chosen(pick), fast=self.fast, times=self.times)
        if not joints:
            return None
        session = replace(self, joints=joints)
        options = dict(self.problem.options)
        shared = {name: own for joint in joints for name, own in joint.options(self.calibration).items()}
        for name, own in shared.items():
            options[name] = (*options[name], own)
        session.problem = Problem(options)  # not posed anew: a clock may have ruled out what stands before a pick
        indices = self.problem.indices(pick)
        return session, tuple(len(options[name]) - 1 if name in shared else index for name, index in indices.items())

    def _challenged(
        self, target: Target, quantity: CostKind, outcome: Outcome, budget: int, known: Mapping[Taken, float]
    ) -> Planned:
        """The plan of an outcome, or of what held-out rows like better and costs no more than ``budget``.

        In the running are one first factor for several layers, and the baseline.

        Args:
            target: what was asked for.
            quantity: what is saved.
            outcome: of the search.
            budget: what the sites may cost.
            known: errors on the select half that were measured.
        """
        if "effect" not in planner(self.planner) or not self.problem.factored(outcome.pick):
            return self._finish(target, quantity, outcome)
        owner, best, candidates = self, outcome, outcome.candidates
        choice = self._baseline(quantity, budget)  # before sharing times more layers, which may put more on offer
        shared = self.sharing(outcome.pick)
        if shared is not None:
            session, pick = shared
            error = session._select_error(session.problem.factored(pick))
            candidate = f"{outcome.candidate}, shared inputs"
            candidates = (*candidates, (candidate, error))
            if error < best.error:
                owner, best = session, Outcome(pick, candidate, error, apart=outcome)
        if choice is not None and tuple(choice.items()) not in known:
            error = self._select_error(choice)
            candidates = (*candidates, (BASELINE, error))
            if error < best.error:
                owner, pick = self._offering(choice)
                best = Outcome(pick, BASELINE, error)
        return owner._finish(target, quantity, replace(best, candidates=candidates))

    def _baseline(self, quantity: CostKind, budget: int) -> Choice | None:
        """The choice that every proxy has to beat; none under a share of the time, for which nothing of it is timed."""
        effects = plain_effects(self.curves)
        if quantity == "latency" or effects is None:
            return None
        return baseline(replace(self, effects=effects).problem, quantity, budget)

    def _offering(self, choice: Choice) -> tuple[Session, Pick]:
        """The session that has all of a choice on offer, and the choice as a pick there."""
        raced = all((name, form) in self.effects for name, (form, _) in choice.items())
        session = self if raced else self._with_plain
        pick = []
        for name, options in session.problem.options.items():
            taken = [(option.form, option.rank) for option in options]
            pick.append(taken.index(choice[name]) if name in choice else 0)
        return session, tuple(pick)

    @cached_property
    def _with_plain(self) -> Session:
        """The session with the plain variants on offer that left the race, their effects measured now."""
        if not self._late:
            left = plain_beyond(self.curves, self.effects)
            self._late.update(measure_effects(self.program, left, self.calibration, self.effort, self.progress))
        return replace(self, effects={**self.effects, **self._late})

    def _select_error(self, choice: Choice) -> float:
        """The error of a choice on the select half, with factors as candidates are compared."""
        factored = self.maker.compared(choice, self._kept)
        return joint_error(self.program, factored, self.calibration.select_batches)

    def marginal(self, pick: Pick) -> Mapping[str, Allocator] | None:
        """The candidate by the effects that sites have around a pick; None where measuring one alone is too dear.

        Where measuring all is, those of the largest effects are measured.
        """
        if not self.effort.around or "effect" not in planner(self.planner):
            return None
        tried = neighbours(self.problem, pick)
        chosen = self.problem.factored(pick)
        per_row = self.calibration.flops / max(self.calibration.effect_batches[0].call.batch_size, 1)
        most = int(MARGINAL_FLOPS / max(per_row / 2 * MIN_EFFECT_ROWS, 1.0))
        if not chosen or most < 1:
            return None
        tried = largest(self.problem, pick, tried, most)
        known = self.calibration.effect_batches[: self.effort.batches]
        batches = affordable(self.program, known, self.calibration.flops, len(tried), MARGINAL_FLOPS)
        options = {name: self.problem.options[name][index] for name, index in tried.items()}
        instead = {name: [None if own.rank is None else (own.form, own.rank)] for name, own in options.items()}
        error, errors = measure_joint(self.program, self.curves, chosen, instead, batches)
        return around(self.problem, pick, tried, error, {name: own for name, (own,) in errors.items()})

    def _plan_by_metric(
        self, target: Metric, allocators: Mapping[str, Allocator], evaluate: Callable[[Pick], float]
    ) -> Planned:
        """The cheapest plan found that keeps the metric, scored with the very factors that come back."""
        # One call of the metric is left for a plan that loses layers which turn out not to pay, one for a refined plan.
        spared = (self.times is not None) + self.refines
        asked = replace(target, evaluations=max(target.evaluations - spared, 2))
        values: dict[Pick, float] = {}
        errors: dict[Pick, float] = {}
        held: dict[Pick, Settled] = {}
        with Progress("metric", asked.evaluations, self.progress) as bar:

            def value_of(pick: Pick) -> float:
                settled = self.maker.settled(self.problem.factored(pick), evaluate(pick))
                kept = f"{self.account.totals(pick).kept(target.recorded, 'model'):.1%} of its {target.recorded}"
                plan = f"the plan that keeps {kept}" if settled.made.factored else "the original"
                # A metric may cast, move or train what it is given, so that must not be the user's own tensors.
                program, original = settled.made.into(self.program, clone=True), not settled.made.factored
                value = score(target, program, plan, original=original)
                values[pick], errors[pick] = value, settled.error
                if target.holds(values[self.problem.dense], value):
                    held.clear()  # each that holds is cheaper than those before; factors of all would be many models
                    held[pick] = settled
                bar.advance(note=f"{value:g}")
                return value

            found = within_drop(self.problem, asked, allocators, evaluate, value_of)
        points = tuple(
            MetricPoint(self.account.totals(each.pick).kept(target.recorded, "model"), errors[each.pick], each.value)
            for each in found.scored
        )
        plan, made, outcome = self._finish(target, target.of, found.outcome, held[found.outcome.pick])
        if outcome is found.outcome and not made.factored and points:
            word = f"none of the {len(points)} plans that were scored keeps {target}, so the original came back"
            plan = replace(plan, notes=(*plan.notes, word))
        after = found.after if made.factored else found.before
        return Planned(replace(plan, metric=MetricSearch(found.before, after, points)), made, outcome)

    def compiled_original(self, *, frozen: bool = False) -> Callable[..., Any]:
        """The user's model through ``torch.compile``, compiled once for all plans of this session.

        Args:
            frozen: with its weights as constants; see :mod:`lowrank_fx.frozen`.
        """
        if frozen not in self._compiled:
            model = self.model
            self._compiled[frozen] = Frozen(model, warns=False) if frozen else compile_module(model)
        return self._compiled[frozen]

    def forget_frozen(self) -> None:
        """Let go of the original that is compiled with its weights as constants, and of their copy."""
        self._compiled.pop(True, None)

    def without(self, planned: Planned, reasons: Mapping[str, str]) -> Planned:
        """A plan with some of its sites dense, the factors of the others settled anew, and all of it measured anew.

        Args:
            planned: the plan.
            reasons: why, by site name.
        """
        target, outcome = planned.plan.target, planned.outcome
        quantity = "flops" if isinstance(target, Tolerance) else target.quantity
        reasons = {site.name: site.reason for site in planned.plan.sites if not site.factored} | dict(reasons)
        if outcome.apart is not None:  # a first factor is for all layers that were to share it
            outcome = replace(outcome.apart, candidates=outcome.candidates)
            choice = self.problem.factored(outcome.pick)
        else:
            choice = {
                site.name: (variant(site.form, site.basis), site.rank)
                for site in planned.plan.sites
                if site.rank is not None
            }
        choice = {name: taken for name, taken in choice.items() if name not in reasons}
        with settled(self.program.device):
            session, pick = self._offering(choice)
            error = session._select_error(choice)
            plan, made, outcome = session._finish(target, quantity, replace(outcome, pick=pick, error=error))
            plan = replace(plan, sites=tuple(_reasoned(site, reasons) for site in plan.sites))
            if planned.plan.metric is not None and isinstance(target, Metric):
                plan = self._scored_again(replace(plan, metric=planned.plan.metric), target, made)
        return Planned(plan, made, outcome)

    def _scored_again(self, plan: Plan, target: Metric, made: Made) -> Plan:
        """A plan that lost sites, with the metric that it has now."""
        seen = plan.metric
        assert seen is not None
        if not made.factored:
            return replace(plan, metric=replace(seen, after=seen.before))
        value = score(target, made.into(self.program, clone=True), "the plan without the layers that do not pay")
        point = MetricPoint(plan.totals.kept(target.recorded, "model"), plan.select_error, value)
        return replace(plan, metric=replace(seen, after=value, points=(*seen.points, point)))

    # ---- the problem ---------------------------------------------------------------------------------------------

    @cached_property
    def account(self) -> Account:
        """What picks cost in all, in :attr:`problem`."""
        dense = {kind: self.problem.cost(self.problem.dense, kind) for kind in get_args(CostKind)}
        model = self.times.model_nanoseconds if self.times is not None else 0
        fixed: dict[CostKind, int] = {
            "params": self.program.params() - dense["params"],
            "flops": self.calibration.flops - dense["flops"],
            # Sites that are timed by themselves may take longer than the model that they are in.
            "latency": max(model - dense["latency"], 0),
        }
        before: dict[CostKind, int] = {
            "params": self.params,
            "flops": self.calibration.flops,
            "latency": fixed["latency"] + dense["latency"],
        }
        return Account(self.problem, before, fixed)

    def budget(self, target: Keep, share: float | None = None) -> int:
        """What the sites may cost so that ``target`` holds, or ``share`` in the place of its own share.

        Raises:
            TargetError: it cannot be reached; the message names the smallest reachable value.
        """
        weights = len(self.table.sites) + len(self.table.left_alone)
        counts = f"{len(self.curves)} of {weights} weights can be factored"
        if self.times is not None:
            paying = sum(len(options) > 1 for options in self.problem.options.values())
            counts = f"{paying} of {weights} weights can be factored and measured faster so"
        reasons = unfactored(self.table, self.calibration, self.curves, self.forms)
        counts = "; ".join((counts, *reasons))
        return self.account.budget(target, target.share if share is None else share, counts)

    # ---- the plan ------------------------------------------------------------------------------------------------

    def _finish(self, target: Target, quantity: CostKind, outcome: Outcome, settled: Settled | None = None) -> Planned:
        self._kept.clear()
        if not math.isfinite(outcome.error):
            raise TargetError(f"{target}: every candidate plan gives outputs that are not finite on held-out rows")
        choice = self.problem.factored(outcome.pick)
        settled = settled or self.maker.settled(choice, outcome.error)
        if self.regauge:
            settled = self.maker.regauged(choice, settled)
        made, factored = settled.made, settled.made.factored
        candidate, candidates = outcome.candidate, outcome.candidates
        candidates = (*candidates, *((f"{candidate}, {how}", error) for how, error in settled.tried))
        candidate = f"{candidate}, {settled.how}" if settled.how else candidate
        met = bool(factored) or isinstance(target, Keep)
        apart = replace(self, joints=()) if self.joints else self
        owners = {joint.name: joint.sites[0].name for joint in self.joints}
        sites = []
        for name, option in self.problem.chosen(outcome.pick).items():
            site = next(site for site in self.table.sites if site.name == name)
            error, bound, gauge, first = 0.0, 0.0, None, None
            if option.rank is not None:
                error, bound = self.maker.site_error(*factored[name])
                gauge, first = factored[name][1].gauge, factored[name][1].first
            dense = self.problem.options[name][0]
            sites.append(
                SitePlan(
                    name=name,
                    weight=site.weight,
                    form=split_variant(option.form)[0],
                    basis=split_variant(option.form)[1],
                    rank=option.rank,
                    out_features=site.out_features,
                    in_features=site.in_features,
                    params=(dense.params, option.params),
                    flops=(dense.flops, option.flops),
                    error=error,
                    bound=bound,
                    effect=option.effect,
                    reason=""
                    if option.rank is not None
                    else self.offers.why_dense(site, self.problem.options[site.name], target, quantity, met=met),
                    pivots=None if gauge is None else gauge.start,
                    gathered=gauge is not None and gauge.order is not None,
                    shares=None if first is None else owners[first],
                )
            )
        report_error = made.error(self.program, self.calibration.report_batches)
        if not math.isfinite(report_error):
            word = "the plan's outputs are not finite on the held-out rows that report its error"
            if isinstance(target, Keep) or not factored:
                raise TargetError(f"{target}: {word}")
            original = Outcome(apart.problem.dense, "dense", 0.0, outcome.candidates)
            apart = replace(apart, notes=(*self.notes, f"{word}, so the original came back"))
            return apart._finish(target, quantity, original)
        notes = (*self.notes, *(gauge_notes(factored) if self.regauge else ()), *sharing_notes(self.joints))
        if "closed loop" in settled.how:
            notes += loop_notes(self.table, factored)
        plan = Plan(
            target=target,
            planner=self.planner,
            candidate=candidate,
            seed=self.calibration.seed,
            sites=tuple(sites),
            left_alone=self.table.left_alone,
            cleanup=self.program.cleanup,
            notes=notes,
            totals=self.account.totals(outcome.pick),
            predicted_error=self.problem.effect(outcome.pick),
            select_error=settled.error,
            error=report_error,
            candidates=tuple((name, error) for name, error in candidates if math.isfinite(error)),
            curve=apart.account.trade_off(quantity),
        )
        return Planned(plan, made, outcome)


def _reasoned(site: SitePlan, reasons: Mapping[str, str]) -> SitePlan:
    return replace(site, reason=reasons[site.name]) if site.name in reasons and not site.factored else site
