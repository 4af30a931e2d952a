"""What is on offer for a site: every form and rank with what it costs and does, or why there is nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_fx import cost
from lowrank_fx.calibration import Calibration
from lowrank_fx.curves import EffectCurve, SiteCurves
from lowrank_fx.double_sided import split_variant
from lowrank_fx.forms import DENSE, FORMS, dense_flops, dense_params
from lowrank_fx.planners.problem import Option
from lowrank_fx.shared_inputs import Joint
from lowrank_fx.site_times import SiteTimes, slower
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.targets import CostKind, Target


@dataclass(frozen=True)
class Offers:
    """Makes the options of sites.

    Attributes:
        table: the sites and taps.
        calibration: rows and sketches.
        curves: error curves by site name.
        effects: measured effects by (site name, variant); a variant without any left the race and is not on offer.
        regauge: whether pairs are re-gauged where they can be.
        fast: whether ranks are those that run fast for what they cost, since FLOPs or time are what counts.
        times: measured times of the sites; None where no clock is obeyed. What does not pay by them is not on offer.
        joints: layers that may have one first factor, all of each together; theirs is the last option of a site.
    """

    table: SiteTable
    calibration: Calibration
    curves: Mapping[str, SiteCurves]
    effects: Mapping[tuple[str, str], EffectCurve]
    regauge: bool
    fast: bool
    times: SiteTimes | None
    joints: tuple[Joint, ...] = ()

    def options(self, site: Site) -> tuple[Option, ...]:
        """Every option of a site; the first is dense."""
        rows, calls, times = self.calibration.rows_of(site), self.calibration.calls_of(site), self.times
        taken = 0 if times is None else times.nanoseconds(site)
        options = [Option(DENSE, None, dense_params(site), dense_flops(site, rows), 0.0, 0.0, taken)]
        if site.pair is not None:  # what it came as, which no other option may cost more than
            form, rank = site.pair
            params, flops = FORMS[form].params(site, rank), sum(FORMS[form].flops(site, rank, *call) for call in calls)
            taken = 0 if times is None else times.nanoseconds(site, form, rank)
            options = [Option(DENSE, None, params, flops, 0.0, 0.0, taken)]
        entry = self.curves.get(site.name)
        for form, curve in entry.forms.items() if entry is not None else ():
            effect = self.effects.get((site.name, form))
            if effect is None:  # it left the race
                continue
            plain = FORMS[split_variant(form)[0]]
            regauged = self.regauge and plain.regauges(site)
            ranks = (*curve.ranks, *curve.beyond) if regauged else curve.ranks
            step = cost.FAST_STEP if times is None else times.step(site)
            for rank in cost.fast_ranks(ranks, step) if self.fast else ranks:
                error = curve.error(rank)
                if regauged:
                    params = cost.regauged_params(site.out_features, site.in_features, rank)
                    flops = cost.regauged_flops(site.out_features, site.in_features, rank, rows)
                else:
                    params = plain.params(site, rank)
                    flops = sum(plain.flops(site, rank, *call) for call in calls)
                if times is not None and not times.pays(site, form, rank):
                    continue
                taken = 0 if times is None else times.nanoseconds(site, form, rank)
                option = Option(form, rank, params, flops, error, effect.at(error), taken)
                if site.pair is None or _is_cheaper(option, options[0]):
                    options.append(option)
        together = [joint.options(self.calibration) for joint in self.joints]
        options += [shared[site.name] for shared in together if site.name in shared]
        return tuple(options)

    def why_dense(self, site: Site, options: Sequence[Option], target: Target, quantity: CostKind, *, met: bool) -> str:
        """Why a plan leaves a site dense.

        Args:
            site: the site.
            options: of it.
            target: what was asked for.
            quantity: what the plan saves.
            met: the target is met.
        """
        if self.calibration.sketch_of(self.table, site) is None:
            return "calibration never reached it"
        offered = options[1:]
        if not offered:
            break_even = cost.break_even_rank(site.out_features, site.in_features, site.groups)
            best = None if self.times is None else self.times.best(site)
            if self.times is not None and best is not None and not self.times.pays(site, *best[1:]):
                return slower(best[0], f"{best[1]} of rank {best[2]}, the fastest of all")
            if site.pair is not None:
                return f"it came as a pair of rank {site.pair[1]}, and no rank below that is on offer"
            return f"no rank is on offer below its break-even rank {break_even:g}, or its form is not allowed"
        cheap = max(offered, key=lambda option: option.cost(quantity))
        dense = options[0].cost(quantity)
        if site.tied and quantity == "params":
            return "an embedding needs the same weight, so factoring it adds parameters"
        saved = 1 - cheap.cost(quantity) / dense if dense else 0.0
        cause = f"{target} is met without it" if met else f"no smaller plan was found within {target}"
        return (
            f"{cause}; rank {cheap.rank} would save {saved:.0%} of its {quantity} "
            f"for a predicted effect of {cheap.effect:.2g}"
        )


def _is_cheaper(option: Option, than: Option) -> bool:
    """Whether an option costs less weights than another, and not more of anything else."""
    pairs = [(option.flops, than.flops), (option.nanoseconds, than.nanoseconds)]
    return option.params < than.params and all(own <= other for own, other in pairs)
