"""What one calibration makes possible: a plan, and the factors for it, for any target, in seconds.

A session owns the captured model, the sketches' error curves and the measured effects. It
shares the model's weights, which therefore have to stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from torch import nn

from lowrank_fx import cost
from lowrank_fx._ambient import settled
from lowrank_fx._progress import Progress
from lowrank_fx.calibration import Calibration
from lowrank_fx.compiling import compile_module
from lowrank_fx.corrections import Made, Settled
from lowrank_fx.curves import EffectCurve, SiteCurves
from lowrank_fx.double_sided import split_variant
from lowrank_fx.effects import MIN_EFFECT_ROWS, affordable, joint_error, measure_joint
from lowrank_fx.errors import TargetError
from lowrank_fx.forms import DENSE, FORMS, dense_flops, dense_params
from lowrank_fx.plan import MetricPoint, MetricSearch, Plan, SitePlan, Totals, TradeOff
from lowrank_fx.planners import planner
from lowrank_fx.planners.budget import Outcome, by_effect, within_budget, within_tolerance
from lowrank_fx.planners.marginal import around, neighbours
from lowrank_fx.planners.metric import within_drop
from lowrank_fx.planners.problem import Allocator, Option, Pick, Problem
from lowrank_fx.program import Program
from lowrank_fx.scored import score
from lowrank_fx.settle import Maker, gauge_notes
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.targets import Keep, Metric, Quantity, Target, Tolerance

CURVE_POINTS = 9
"""Points of the trade-off curve, dense included."""

MARGINAL_FLOPS = 5.0e11
"""Work allowed for measuring effects again around a plan; where the least rows cost more, it is left out."""


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
        progress: whether work over two seconds shows a progress bar.
        regauge: whether pairs are re-gauged where they can be, which the target says.
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
    progress: bool = False
    regauge: bool = False
    _problem: Problem | None = field(default=None, repr=False)
    _compiled: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def problem(self) -> Problem:
        """The options of every site."""
        if self._problem is None:
            self._problem = Problem({site.name: self._options(site) for site in self.table.sites})
        return self._problem

    @property
    def maker(self) -> Maker:
        """What makes factors of a choice."""
        return Maker(self.program, self.table, self.calibration, self.curves, self.progress)

    def plan(self, target: Target) -> tuple[Plan, Made]:
        """The plan for ``target``, and what it puts into the program.

        Raises:
            TargetError: the target cannot be reached; the message names the smallest reachable value.
        """
        regauge = isinstance(target, Keep) and target.regauge
        own = self if regauge == self.regauge else replace(self, regauge=regauge, _problem=None)
        with settled(self.program.device):
            return own._plan(target)

    def _plan(self, target: Target) -> tuple[Plan, Made]:
        batches = self.calibration.select_batches
        errors: dict[Pick, float] = {}

        def evaluate(pick: Pick) -> float:
            if pick not in errors:
                errors[pick] = joint_error(
                    self.program, self.maker.factors(self.problem.factored(pick), final=False), batches
                )
            return errors[pick]

        allocators = planner(self.planner)
        if isinstance(target, Metric):
            return self._plan_by_metric(target, allocators, evaluate)
        if isinstance(target, Tolerance):
            quantity: Quantity = "flops"
            outcome = within_tolerance(self.problem, quantity, target.error, allocators, evaluate)
            marginal = self._around(outcome.pick)
            if marginal is not None:
                smaller = within_tolerance(self.problem, quantity, target.error, marginal, evaluate)
                if self.problem.cost(smaller.pick, quantity) < self.problem.cost(outcome.pick, quantity):
                    outcome = smaller
        else:
            quantity = target.quantity
            budget = self.budget(target)
            outcome = within_budget(self.problem, quantity, budget, allocators, evaluate)
            marginal = self._around(outcome.pick)
            if marginal is not None:
                outcome = outcome.against(within_budget(self.problem, quantity, budget, marginal, evaluate))
        return self._finish(target, quantity, outcome)

    def _around(self, pick: Pick) -> Mapping[str, Allocator] | None:
        """The candidate by the effects that sites have around a pick; None where measuring them is too dear."""
        if "effect" not in planner(self.planner):
            return None
        tried = neighbours(self.problem, pick)
        chosen = self.problem.factored(pick)
        per_row = self.calibration.flops / max(self.calibration.effect_batches[0].call.batch_size, 1)
        if not chosen or len(tried) * per_row / 2 * MIN_EFFECT_ROWS > MARGINAL_FLOPS:
            return None
        batches = affordable(self.program, self.calibration, len(tried), MARGINAL_FLOPS)
        options = {name: self.problem.options[name][index] for name, index in tried.items()}
        instead = {name: [None if own.rank is None else (own.form, own.rank)] for name, own in options.items()}
        error, errors = measure_joint(self.program, self.curves, chosen, instead, batches)
        return around(self.problem, pick, tried, error, {name: own for name, (own,) in errors.items()})

    def _plan_by_metric(
        self, target: Metric, allocators: Mapping[str, Allocator], evaluate: Callable[[Pick], float]
    ) -> tuple[Plan, Made]:
        """The cheapest plan found that keeps the metric, scored with the very factors that come back."""
        values: dict[Pick, float] = {}
        errors: dict[Pick, float] = {}
        held: dict[Pick, Settled] = {}
        with Progress("metric", target.evaluations, self.progress) as bar:

            def value_of(pick: Pick) -> float:
                settled = self.maker.settled(self.problem.factored(pick), evaluate(pick))
                kept = self._totals(pick).kept(target.of, "model")
                plan = f"the plan that keeps {kept:.1%} of its {target.of}" if settled.made.factored else "the original"
                # A metric may cast, move or train what it is given, so that must not be the user's own tensors.
                value = score(target, settled.made.into(self.program, clone=True), plan)
                values[pick], errors[pick] = value, settled.error
                if target.holds(values[self.problem.dense], value):
                    held.clear()  # each that holds is cheaper than those before; factors of all would be many models
                    held[pick] = settled
                bar.advance(note=f"{value:g}")
                return value

            found = within_drop(self.problem, target, allocators, evaluate, value_of)
        points = tuple(
            MetricPoint(self._totals(each.pick).kept(target.of, "model"), errors[each.pick], each.value)
            for each in found.scored
        )
        plan, made = self._finish(target, target.of, found.outcome, held[found.outcome.pick])
        if not made.factored and points:
            word = f"none of the {len(points)} plans that were scored keeps {target}, so the original came back"
            plan = replace(plan, notes=(*plan.notes, word))
        return replace(plan, metric=MetricSearch(found.before, found.after, points)), made

    def compiled_original(self) -> Callable[..., Any]:
        """The user's model through ``torch.compile``, compiled once for all plans of this session."""
        if self._compiled is None:
            self._compiled = compile_module(self.model)
        return self._compiled

    def dense_plan(self, plan: Plan, reason: str) -> Plan:
        """``plan`` with every site dense for ``reason``: the original comes back."""
        sites = tuple(
            replace(
                site,
                form=DENSE,
                rank=None,
                params=(site.params[0],) * 2,
                flops=(site.flops[0],) * 2,
                error=0.0,
                bound=0.0,
                effect=0.0,
                pivots=None,
                gathered=False,
                reason=reason if site.factored else site.reason,
            )
            for site in plan.sites
        )
        return replace(
            plan,
            sites=sites,
            candidate=DENSE,
            totals=self._totals(self.problem.dense),
            predicted_error=0.0,
            select_error=0.0,
            error=0.0,
            notes=(*plan.notes, reason),
            refinement=None,
            metric=None if plan.metric is None else replace(plan.metric, after=plan.metric.before),
        )

    # ---- the problem ---------------------------------------------------------------------------------------------

    def _options(self, site: Site) -> tuple[Option, ...]:
        rows, calls = self.calibration.rows_of(site), self.calibration.calls_of(site)
        options = [Option(DENSE, None, dense_params(site), dense_flops(site, rows), 0.0, 0.0)]
        entry = self.curves.get(site.name)
        for form, curve in entry.forms.items() if entry is not None else ():
            effect = self.effects.get((site.name, form))
            if effect is None:  # it left the race
                continue
            plain = FORMS[split_variant(form)[0]]
            regauged = self.regauge and plain.regauges(site)
            for rank in (*curve.ranks, *curve.beyond) if regauged else curve.ranks:
                error = curve.error(rank)
                if regauged:
                    params = cost.regauged_params(site.out_features, site.in_features, rank)
                    flops = cost.regauged_flops(site.out_features, site.in_features, rank, rows)
                else:
                    params = plain.params(site, rank)
                    flops = sum(plain.flops(site, rank, *call) for call in calls)
                options.append(Option(form, rank, params, flops, error, effect.at(error)))
        return tuple(options)

    def _fixed(self, quantity: Quantity) -> int:
        """What the clean graph costs besides the sites' weights."""
        dense = self.problem.cost(self.problem.dense, quantity)
        if quantity == "flops":
            return self.calibration.flops - dense
        return self.program.params() - dense

    def _before(self, quantity: Quantity) -> int:
        return self.calibration.flops if quantity == "flops" else self.params

    def budget(self, target: Keep) -> int:
        """What the sites may cost so that ``target`` holds.

        Raises:
            TargetError: it cannot be reached; the message names the smallest reachable value.
        """
        quantity = target.quantity
        of_model = target.of == "model"
        before = self._before(quantity) if of_model else self.problem.cost(self.problem.dense, quantity)
        fixed = self._fixed(quantity) if of_model else 0
        budget = math.floor(target.share * before) - fixed
        smallest = self.problem.smallest(quantity)
        if smallest > budget:
            reachable = math.ceil((smallest + fixed) / max(before, 1) * 1e4) / 1e4
            raise TargetError(
                f"{target} cannot be reached: the smallest reachable is {quantity}={reachable:g} "
                f"({len(self.curves)} of {len(self.table.sites) + len(self.table.left_alone)} weights can be factored)"
            )
        return budget

    # ---- the plan ------------------------------------------------------------------------------------------------

    def _finish(
        self, target: Target, quantity: Quantity, outcome: Outcome, settled: Settled | None = None
    ) -> tuple[Plan, Made]:
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
        sites = []
        for name, option in self.problem.chosen(outcome.pick).items():
            site = next(site for site in self.table.sites if site.name == name)
            error, bound, gauge = 0.0, 0.0, None
            if option.rank is not None:
                error, bound = self.maker.site_error(*factored[name])
                gauge = factored[name][1].gauge
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
                    reason="" if option.rank is not None else self._why_dense(site, target, quantity, met=met),
                    pivots=None if gauge is None else gauge.start,
                    gathered=gauge is not None and gauge.order is not None,
                )
            )
        report_error = made.error(self.program, self.calibration.report_batches)
        plan = Plan(
            target=target,
            planner=self.planner,
            candidate=candidate,
            seed=self.calibration.seed,
            sites=tuple(sites),
            left_alone=self.table.left_alone,
            cleanup=self.program.cleanup,
            notes=(*self.notes, *(gauge_notes(factored) if self.regauge else ())),
            totals=self._totals(outcome.pick),
            predicted_error=self.problem.effect(outcome.pick),
            select_error=settled.error,
            error=report_error,
            candidates=tuple((name, error) for name, error in candidates if math.isfinite(error)),
            curve=self._trade_off(quantity),
        )
        return plan, made

    def _why_dense(self, site: Site, target: Target, quantity: Quantity, *, met: bool) -> str:
        if self.calibration.sketch_of(self.table, site) is None:
            return "calibration never reached it"
        options = self.problem.options[site.name][1:]
        if not options:
            break_even = cost.break_even_rank(site.out_features, site.in_features, site.groups)
            return f"no rank is on offer below its break-even rank {break_even:g}, or its form is not allowed"
        best = max(options, key=lambda option: option.cost(quantity))
        dense = self.problem.options[site.name][0].cost(quantity)
        if site.tied and quantity == "params":
            return "an embedding needs the same weight, so factoring it adds parameters"
        saved = 1 - best.cost(quantity) / dense if dense else 0.0
        cause = f"{target} is met without it" if met else f"no smaller plan was found within {target}"
        return (
            f"{cause}; rank {best.rank} would save {saved:.0%} of its {quantity} "
            f"for a predicted effect of {best.effect:.2g}"
        )

    def _totals(self, pick: Pick) -> Totals:
        quantities: dict[str, tuple[int, int]] = {}
        for quantity in get_args(Quantity):
            dense, chosen = (self.problem.cost(each, quantity) for each in (self.problem.dense, pick))
            fixed, before = self._fixed(quantity), self._before(quantity)
            quantities[f"model_{quantity}"] = (before, fixed + chosen)
            quantities[f"site_{quantity}"] = (dense, chosen)
        return Totals(**quantities)

    def _trade_off(self, quantity: Quantity) -> tuple[TradeOff, ...]:
        """The predicted curve from the smallest reachable cost to dense."""
        smallest, dense = self.problem.smallest(quantity), self.problem.cost(self.problem.dense, quantity)
        points = []
        for step in range(CURVE_POINTS):
            budget = smallest + (dense - smallest) * step // (CURVE_POINTS - 1)
            pick = by_effect(self.problem, quantity, budget)
            totals = self._totals(pick)
            points.append(
                TradeOff(totals.kept("params", "model"), totals.kept("flops", "model"), self.problem.effect(pick))
            )
        return tuple(points)
