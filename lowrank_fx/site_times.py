"""Measured times of a model's sites: the table of operators (``timings.py``) applied to what calibration saw.

Rows and image sizes are those of the first calibration batch that reached a site; a site that is called several times
takes the time of all its calls. A site that came as a pair is compared with that pair.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lowrank_fx import cost
from lowrank_fx.calibration import Calibration
from lowrank_fx.double_sided import split_variant
from lowrank_fx.fast_steps import fast_step, probe_ranks
from lowrank_fx.forms import SHARED
from lowrank_fx.forms.base import rank_step
from lowrank_fx.plan import Plan, SitePlan
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.targets import obeys_speed
from lowrank_fx.timed_operators import Operator, Pair, Run, dense_run
from lowrank_fx.timed_operators import runs as runs_of
from lowrank_fx.timings import LEAST_GAIN, SiteSpeed, Timings, survey_ranks

SURVEYED, SURVEYED_OF_MANY = 4, 3
"""Ranks of each form that are timed; the second where a site has more than two forms."""


@dataclass
class SiteTimes:
    """The times of one model.

    Attributes:
        timings: the table.
        table: the model's sites.
        calibration: knows their rows.
        offered: by site name and variant, the ranks on offer, fast or not.
        compiled: whether the model is going to be compiled.
        progress: whether work over two seconds shows a progress bar.
        share_of_sites: how much of the original's time the dense sites take; only of a target that asks for time.
    """

    timings: Timings
    table: SiteTable
    calibration: Calibration
    offered: Mapping[str, Mapping[str, Sequence[int]]]
    compiled: bool
    progress: bool
    share_of_sites: float = 1.0
    _calls: dict[str, list[Operator]] = field(default_factory=dict, repr=False)
    _steps: dict[tuple[str, str], int] = field(default_factory=dict, repr=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return self.timings.notes

    def survey(self) -> None:
        """Time some ranks in a row of the largest sites, then a few fast ones of every form of every site."""
        by_worth = sorted(self.table.sites, key=lambda site: -sum(each.flops(None) for each in self._operators(site)))
        probed: dict[tuple[str, str], list[tuple[Operator, Pair]]] = {}
        for site in by_worth:
            probes = self._probes(site)
            if probes:
                probed.setdefault((site.kind, site.dtype), probes)
        left = self.timings.survey(itertools.chain(*probed.values()), self.progress)
        for kind, probes in probed.items():
            if all(self.timings.is_measured(*probe) for probe in probes):
                times = {pair.rank: 1 / self.timings.estimate(operator, pair) for operator, pair in probes}
                self._steps[kind] = fast_step(times, rank_step(kind[1]))
        self.timings.survey((each for site in by_worth for each in self._wanted(site)), self.progress, left)

    def step(self, site: Site) -> int:
        """The step of the ranks that are fast for what they cost, as measured on the largest site of kind and dtype.

        That of ``cost.FAST_STEP`` where none was surveyed, or none has enough ranks on offer.
        """
        return self._steps.get((site.kind, site.dtype), cost.FAST_STEP)

    def nanoseconds(self, site: Site, variant: str | None = None, rank: int = 0) -> int:
        """The time of a site's calls, by a variant at a rank or as it came; estimated where it was not measured."""
        pair = came_as(site) if variant is None else pair_of(variant, rank)
        total = 0.0
        for operator in self._operators(site):
            seconds = self.timings.dense_seconds(operator)
            total += seconds if pair is None else seconds / self.timings.estimate(operator, pair)
        return round(1e9 * total)

    @property
    def model_nanoseconds(self) -> int:
        """The original's time on the first calibration batch."""
        return round(sum(self.nanoseconds(site) for site in self.table.sites) / self.share_of_sites)

    def dense_runs(self) -> list[Run]:
        """Every call of every site as it came, in graph order; equal ones share their numbers."""
        made: dict[tuple[Operator, Pair | None], Run] = {}
        runs = []
        for site in self.table.sites:
            for operator in self._operators(site):
                pair = came_as(site)
                if (operator, pair) not in made:
                    device = self.timings.device
                    made[operator, pair] = (
                        dense_run(operator, device) if pair is None else runs_of(operator, pair, device)[1]
                    )
                runs.append(made[operator, pair])
        return runs

    def speedup(self, site: Site, variant: str, rank: int) -> float:
        """The estimated speed-up of a site; 1 where no row reached it."""
        dense, factored = self.nanoseconds(site), self.nanoseconds(site, variant, rank)
        return dense / factored if factored else 1.0

    def pays(self, site: Site, variant: str, rank: int) -> bool:
        """Whether a variant at a rank counts as faster than dense: as measured, or as interpolated with a margin."""
        operators, pair = self._operators(site), pair_of(variant, rank)
        if operators and all(self.timings.is_measured(operator, pair) for operator in operators):
            found = self.measured(site, pair, sure=False)  # what a plan chooses is looked at more closely
            return found is not None and found.faster
        return self.speedup(site, variant, rank) > 1 + LEAST_GAIN

    def measured(self, site: Site, pair: Pair, *, sure: bool = True) -> SiteSpeed | None:
        """The measured speed of a site at this very rank; None where no row reached it, or it cannot be timed.

        Args:
            site: the site.
            pair: what it becomes.
            sure: measure it again where it is in doubt which is faster.
        """
        return self._measured(self._operators(site), came_as(site), pair, sure)

    def _measured(self, operators: Sequence[Operator], before: Pair | None, pair: Pair, sure: bool) -> SiteSpeed | None:
        dense = seconds = variance = 0.0
        flops = [0, 0]
        for operator in operators:
            timing, base = self.timings.timing(operator, pair, sure=sure), None
            if before is not None:
                base = self.timings.timing(operator, before, sure=sure)
            if timing is None or (before is not None and base is None):
                return None
            # The ratio is paired, the two times are not: what drifted between measurements is not in the ratio.
            own = self.timings.dense_seconds(operator)
            came, taken = own / (1.0 if base is None else base.speedup), own / timing.speedup
            dense, seconds = dense + came, seconds + taken
            relative = timing.error / timing.speedup
            if base is not None:
                relative = math.hypot(relative, base.error / base.speedup)
            variance += (taken * relative) ** 2
            flops = [flops[0] + operator.flops(before), flops[1] + operator.flops(pair)]
        if not seconds:
            return None
        speedup = dense / seconds
        return SiteSpeed(speedup, speedup * variance**0.5 / seconds, dense, seconds, flops[0] / max(flops[1], 1))

    def speeds(self, plan: Plan) -> dict[str, SiteSpeed]:
        """The measured speed of every site that a plan factors, at the rank that it has there.

        Where nothing hangs on which is faster, what is in doubt is not measured again. Layers with one first factor
        each have the speed of all of them together.
        """
        found, sure = {}, obeys_speed(plan.target)
        sites = {site.name: site for site in self.table.sites}
        families: dict[str, list[SitePlan]] = {}
        for entry in plan.factored:
            assert entry.rank is not None
            if entry.basis == SHARED:
                families.setdefault(entry.shares or entry.name, []).append(entry)
                continue
            speed = self.measured(sites[entry.name], Pair(entry.form, entry.rank, entry.pivots is not None), sure=sure)
            if speed is not None:
                found[entry.name] = speed
        for family in families.values():
            assert family[0].rank is not None
            pair = Pair(family[0].form, family[0].rank)
            speed = self.together([sites[entry.name] for entry in family], pair, sure=sure)
            if speed is not None:
                found |= {entry.name: speed for entry in family}
        self.timings.flush()
        return found

    def together(self, sites: Sequence[Site], pair: Pair, *, sure: bool = False) -> SiteSpeed | None:
        """The measured speed of layers with one first factor: that of one layer with the outputs of all.

        Args:
            sites: the layers.
            pair: what they become.
            sure: measure it again where it is in doubt which is faster.
        """
        return self._measured(self._together(sites), None, pair, sure)

    def left(self, plan: Plan) -> int:
        """Nanoseconds that all sites take under a plan, as they were timed one by one."""
        kept = {site.name: site for site in plan.factored}
        families: dict[str, list[Site]] = {}
        total = 0
        for site in self.table.sites:
            own = kept.get(site.name)
            if own is None:
                total += self.nanoseconds(site)
            elif own.basis == SHARED:
                families.setdefault(own.shares or own.name, []).append(site)
            else:
                total += self.nanoseconds(site, own.form, own.rank or 0)
        for name, family in families.items():
            speed = self.together(family, Pair(kept[name].form, kept[name].rank or 0))
            total += sum(map(self.nanoseconds, family)) if speed is None else round(1e9 * speed.seconds)
        return total

    def best(self, site: Site) -> tuple[float, str, int] | None:
        """The largest estimated speed-up of a site with its variant and rank; None where nothing is on offer."""
        step, offered = self.step(site), self.offered.get(site.name, {})
        tried = [(form, rank) for form, ranks in offered.items() for rank in cost.fast_ranks(ranks, step)]
        return max(((self.speedup(site, form, rank), form, rank) for form, rank in tried), default=None)

    def _wanted(self, site: Site) -> Iterator[tuple[Operator, Pair]]:
        ranks: dict[str, Sequence[int]] = {}
        for variant, own in self.offered.get(site.name, {}).items():  # the bases of a form are one operator
            form = split_variant(variant)[0]
            ranks[form] = max(ranks.get(form, ()), own, key=len)
        count = SURVEYED if len(ranks) < 3 else SURVEYED_OF_MANY
        for operator in self._operators(site):
            if site.pair is not None and ranks:
                yield operator, Pair(*site.pair)
            for form, own in ranks.items():
                for rank in survey_ranks(cost.fast_ranks(own, self.step(site)), count):
                    yield operator, Pair(form, rank)

    def _probes(self, site: Site) -> list[tuple[Operator, Pair]]:
        """Ranks in a row of a site's first call and first form, by which to tell which are fast; maybe none."""
        for variant, own in self.offered.get(site.name, {}).items():
            for operator in self._operators(site)[:1]:
                return [(operator, pair_of(variant, rank)) for rank in probe_ranks(own)]
        return []

    def _together(self, sites: Sequence[Site]) -> list[Operator]:
        """Layers with one input as one layer."""
        outputs = sum(site.out_features for site in sites)
        shape = (outputs, sites[0].in_features)
        return [
            replace(own, site=replace(own.site, out_features=outputs, shape=shape, transposed=False))
            for own in self._operators(sites[0])
        ]

    def _operators(self, site: Site) -> list[Operator]:
        if site.name not in self._calls:
            calls = enumerate(self.calibration.calls_of(site))
            self._calls[site.name] = [
                Operator.of(site, place, rows, space, compiled=self.compiled) for place, (rows, space) in calls if rows
            ]
        return self._calls[site.name]


def came_as(site: Site) -> Pair | None:
    """What a site is where it stays as it is: dense, or the pair that it came as."""
    return None if site.pair is None else Pair(*site.pair)


def pair_of(variant: str, rank: int) -> Pair:
    """The pair that a variant stands for; its basis changes the numbers in it alone."""
    return Pair(split_variant(variant)[0], rank)


def slower(speedup: float, where: str) -> str:
    """Why a site stays dense that could be factored.

    >>> slower(0.934, "rank 32"), slower(1.01, "rank 32")
    ('measured slower: 0.93x at rank 32', 'measured no faster beyond its noise: 1.01x at rank 32')
    """
    return f"measured {'slower' if speedup < 1 else 'no faster beyond its noise'}: {speedup:.2f}x at {where}"
