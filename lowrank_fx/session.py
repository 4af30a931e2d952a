"""What one calibration makes possible: a plan, and the factors for it, for any target, in seconds.

A session owns the captured model, the sketches' error curves and the measured effects. It
shares the model's weights, which therefore have to stay as they are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lowrank_fx import cost
from lowrank_fx._ambient import seeded, settled
from lowrank_fx.calibration import Calibration
from lowrank_fx.effects import EffectCurve, SiteCurves, joint_error
from lowrank_fx.errors import TargetError
from lowrank_fx.forms import DENSE, FORMS, Factors, apply_blocks, dense_flops, dense_params, relative
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.plan import Plan, SitePlan, Totals, TradeOff
from lowrank_fx.planners import planner
from lowrank_fx.planners.budget import Outcome, by_effect, within_budget, within_tolerance
from lowrank_fx.planners.problem import Option, Pick, Problem
from lowrank_fx.program import Program
from lowrank_fx.refit import refit
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.targets import Keep, Quantity, Target, Tolerance

CURVE_POINTS = 9
"""Points of the trade-off curve, dense included."""

Chosen = dict[str, tuple[Site, Factors]]


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
    _problem: Problem | None = field(default=None, repr=False)
    _compiled: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def problem(self) -> Problem:
        """The options of every site."""
        if self._problem is None:
            self._problem = Problem({site.name: self._options(site) for site in self.table.sites})
        return self._problem

    def plan(self, target: Target) -> tuple[Plan, Chosen]:
        """The plan for ``target``, and the factors of every site it factors.

        Raises:
            TargetError: the target cannot be reached; the message names the smallest reachable value.
        """
        with settled(self.program.device):
            return self._plan(target)

    def _plan(self, target: Target) -> tuple[Plan, Chosen]:
        batches = self.calibration.select_batches
        errors: dict[Pick, float] = {}

        def evaluate(pick: Pick) -> float:
            if pick not in errors:
                errors[pick] = joint_error(self.program, self._factor(pick), batches)
            return errors[pick]

        allocators = planner(self.planner)
        if isinstance(target, Tolerance):
            quantity: Quantity = "flops"
            outcome = within_tolerance(self.problem, quantity, target.error, allocators, evaluate)
        else:
            quantity = target.quantity
            outcome = within_budget(self.problem, quantity, self._budget(target), allocators, evaluate)
        return self._finish(target, quantity, outcome)

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
        )

    # ---- the problem ---------------------------------------------------------------------------------------------

    def _options(self, site: Site) -> tuple[Option, ...]:
        rows = self.calibration.rows_of(site)
        options = [Option(DENSE, None, dense_params(site), dense_flops(site, rows), 0.0, 0.0)]
        entry = self.curves.get(site.name)
        for form, curve in entry.forms.items() if entry is not None else ():
            effect = self.effects[site.name, form]
            for rank in curve.ranks:
                error = curve.error(rank)
                params, flops = FORMS[form].params(site, rank), FORMS[form].flops(site, rank, rows)
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

    def _budget(self, target: Keep) -> int:
        """What the sites may cost so that ``target`` holds."""
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

    def _finish(self, target: Target, quantity: Quantity, outcome: Outcome) -> tuple[Plan, Chosen]:
        if not math.isfinite(outcome.error):
            raise TargetError(f"{target}: every candidate plan gives outputs that are not finite on held-out rows")
        factored = self._factor(outcome.pick)
        candidate, select_error, candidates = outcome.candidate, outcome.error, outcome.candidates
        if factored and isinstance(self.program, GraphProgram):  # a module tree cannot be stopped between its layers
            with seeded(self.program.device):
                refitted = refit(self.program.module, factored, self.calibration.effect_batches)
            refit_error = joint_error(self.program, refitted, self.calibration.select_batches)
            candidates = (*candidates, (f"{candidate}, refitted", refit_error))
            if refit_error < select_error:
                factored, candidate, select_error = refitted, f"{candidate}, refitted", refit_error
        sites = []
        for name, option in self.problem.chosen(outcome.pick).items():
            site = next(site for site in self.table.sites if site.name == name)
            error, bound = 0.0, 0.0
            if option.rank is not None:
                error, bound = self._site_error(*factored[name])
            dense = self.problem.options[name][0]
            sites.append(
                SitePlan(
                    name=name,
                    weight=site.weight,
                    form=option.form,
                    rank=option.rank,
                    out_features=site.out_features,
                    in_features=site.in_features,
                    params=(dense.params, option.params),
                    flops=(dense.flops, option.flops),
                    error=error,
                    bound=bound,
                    effect=option.effect,
                    reason="" if option.rank is not None else self._why_dense(site, target, quantity),
                )
            )
        report_error = joint_error(self.program, factored, self.calibration.report_batches)
        plan = Plan(
            target=target,
            planner=self.planner,
            candidate=candidate,
            seed=self.calibration.seed,
            sites=tuple(sites),
            left_alone=self.table.left_alone,
            cleanup=self.program.cleanup,
            notes=self.notes,
            totals=self._totals(outcome.pick),
            predicted_error=self.problem.effect(outcome.pick),
            select_error=select_error,
            error=report_error,
            candidates=tuple((name, error) for name, error in candidates if math.isfinite(error)),
            curve=self._trade_off(quantity),
        )
        return plan, factored

    def _factor(self, pick: Pick) -> Chosen:
        """The factors of every site that a pick factors."""
        return {
            name: (self.curves[name].site, self.curves[name].factors(form, rank))
            for name, (form, rank) in self.problem.factored(pick).items()
        }

    def _site_error(self, site: Site, factors: Factors) -> tuple[float, float]:
        """Relative error of the site's own output on the sketched rows, for the factors as stored, and its bound.

        With Z = W - factor_out factor_in and the bias moved by s, the squared error is |Z (X - mean)^T|^2, which the
        sketch certifies from below and above, plus n |Z mean - s|^2 (zero unless the factors were refitted).
        """
        sketch = self.calibration.sketch_of(self.table, site)
        assert sketch is not None
        matrix = site.matrix(self.curves[site.name].weight.detach()).double()
        residual: Tensor = matrix - factors.dense_matrix()
        least, most = sketch.certificate(residual, centered=site.centered)
        offset = 0.0
        if factors.shift is not None:
            moved = apply_blocks(residual, sketch.mean, site.groups) - factors.shift
            offset = sketch.rows * float(moved.square().sum())
        energy = sketch.certificate(matrix, centered=site.centered)[0]
        return relative(least + offset, energy), relative(most + offset, energy)

    def _why_dense(self, site: Site, target: Target, quantity: Quantity) -> str:
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
        return (
            f"{target} is met without it; rank {best.rank} would save {saved:.0%} of its {quantity} "
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


def compile_module(module: nn.Module) -> Callable[..., Any]:
    """``torch.compile`` with recompile limits of its own, where torch can do that.

    The recompile limit counts per code object, so many compiled instances of one class would fall back to eager.
    """
    isolate = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if isolate else {}
    compiled: Callable[..., Any] = torch.compile(module, **options)

    # A plain function: kept as an attribute, the compiled module itself would register as a child.
    def run(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    return run
