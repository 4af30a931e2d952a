"""What factoring a site does to the model's output, measured.

The *effect* of a site at a form and rank is the relative error of the model's outputs (L2, or what ``losses.py`` has in
its place) when that site alone is replaced. It is measured at a few ranks, and read off between them through the site's
own error: log effect against log error, monotone. One rank is not enough: behind a pooling layer the first error
directions average away and the last ones do not, so no single measurement extrapolates. Where the curve is straight
three ranks are enough, so the first batch decides: between two ranks more are measured only where the one in the middle
was not where it was expected.

A site has several *variants*: forms, and of the output forms also the basis that output gradients choose. A variant
stays in the race, and is measured at length, only while

- its site error at equal cost is at most ``WORST_ERROR`` times the least of those measured so far, and at most
  ``WORST_TWIN`` times that of a variant of the same basis, which measures error in the same way (else it is not
  measured at all), and
- at one of two ranks its effect is below ``WORST_EFFECT`` times the least at equal cost.

What leaves the race is not on offer. They run in the order of their own errors; the first one never leaves it.

Nothing is rewritten for it: a program gives its outputs with one site exchanged. A graph is walked once per batch and
forks at each site, so that only the part behind the site runs again; a module tree runs as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from lowrank_fx._ambient import seeded
from lowrank_fx._progress import Progress
from lowrank_fx.batches import Call
from lowrank_fx.cache import CachedBatch
from lowrank_fx.calibration import Calibration
from lowrank_fx.compare import ErrorSum
from lowrank_fx.curves import EffectCurve, SiteCurves, monotone
from lowrank_fx.double_sided import split_variant
from lowrank_fx.effort import EFFORTS, Effort
from lowrank_fx.forms import FORMS, ErrorCurve, Factors, dense_params
from lowrank_fx.program import Factored, Outputs, Program

EFFECT_FLOPS = 2.0e12
"""Work allowed for measuring effects; it sets how many rows of the cached batches are used."""

WORST_ERROR, WORST_TWIN, WORST_EFFECT = 3.0, 1.3, 1.1
"""How far behind the best at equal cost a variant may be before it leaves the race: in the site's own error, in that
among variants of one basis, and in its effect."""

EXPECTED_FORKS = 5
"""Measurements that a variant takes on average, for planning the work."""

MIN_EFFECT_ROWS = 16


def measure_effects(
    program: Program,
    curves: Mapping[str, SiteCurves],
    calibration: Calibration,
    effort: Effort = EFFORTS["high"],
    progress: bool = True,
) -> dict[tuple[str, str], EffectCurve]:
    """Measure the effect of every site and variant, at the ranks where its curve bends.

    Args:
        program: the captured model.
        curves: from :func:`error_curves`.
        calibration: its effect batches are used, or so many of their rows as ``EFFECT_FLOPS`` allows.
        effort: how many batches, and at which ranks.
        progress: show a progress bar for work over two seconds.

    Returns:
        An effect curve per (site name, variant); variants that left the race have none.
    """
    forks = EXPECTED_FORKS * sum(len(entry.forms) for entry in curves.values())
    batches = affordable(program, calibration.effect_batches[: effort.batches], calibration.flops, forks, EFFECT_FLOPS)
    sites = [entry.site for entry in curves.values()]
    races: dict[str, _Race] = {}
    with torch.no_grad(), Progress("effects", len(sites) * len(batches), progress) as bar:
        for batch in batches:
            # Every trial goes on with the random numbers that the run of the reference drew from there.
            with seeded(program.device):
                for site, trial in program.trials(batch.call, sites):
                    entry = curves[site.name]

                    def measure(
                        form: str,
                        rank: int,
                        total: ErrorSum,
                        entry: SiteCurves = entry,
                        trial: Callable[[Factors | None], Outputs] = trial,
                        batch: CachedBatch = batch,
                    ) -> None:
                        with seeded(program.device, None):
                            # An effect belongs to an error, so it is measured with factors of just that error.
                            outputs = trial(entry.factors(form, rank, final=False))
                        batch.measure(outputs, total)

                    if site.name in races:
                        for (form, rank), total in races[site.name].sums.items():
                            measure(form, rank, total)
                    else:
                        races[site.name] = _Race(entry, measure, effort)
                        races[site.name].run()
                    entry.rest()
                    bar.advance(note=site.name)
    return {
        (name, form): race.curve(form) for name, race in races.items() for form in race.entry.forms if race.has(form)
    }


class _Race:
    """The variants of one site on the first batch: which of them are measured, and at which ranks.

    Args:
        entry: the site.
        measure: adds the outputs' error at one variant and rank to a sum.
        effort: at which ranks.
    """

    def __init__(self, entry: SiteCurves, measure: Callable[[str, int, ErrorSum], None], effort: Effort) -> None:
        self.entry = entry
        self.measure = measure
        self.effort = effort
        self.sums: dict[tuple[str, int], ErrorSum] = {}

    def run(self) -> None:
        """Measure every variant for as long as it is in the race."""
        for form, curve in sorted(self.entry.forms.items(), key=self._likeness):
            ladder = _measured_ranks(curve.ranks, self.effort.shares)
            middle = len(ladder) // 2
            heats = [ladder[middle], ladder[middle // 2]]
            if not self.sums or (self._promises(form, heats) and any(self._holds(form, rank) for rank in heats)):
                self._explore(form, ladder)
            else:
                for rank in heats:
                    self.sums.pop((form, rank), None)

    def _likeness(self, item: tuple[str, ErrorCurve]) -> float:
        """Where a variant runs: those of least error at half the weights first, so that most others need not run."""
        error = self.entry.error_at(item[0], dense_params(self.entry.site) // 2)
        return math.inf if error is None else error

    def has(self, form: str) -> bool:
        """Whether a variant is still in the race."""
        return any(measured == form for measured, _ in self.sums)

    def curve(self, form: str) -> EffectCurve:
        """The effects that were measured of one variant."""
        errors = self.entry.forms[form]
        return monotone(
            [(errors.error(rank), total.relative) for (own, rank), total in self.sums.items() if own == form]
        )

    def _effect(self, form: str, rank: int) -> float:
        if (form, rank) not in self.sums:
            self.sums[form, rank] = ErrorSum()
            self.measure(form, rank, self.sums[form, rank])
        return self.sums[form, rank].relative

    def _rivals(self, form: str, rank: int) -> list[tuple[str, float, float]]:
        """The other measured variants with site error and effect for the cost of this one."""
        params = FORMS[split_variant(form)[0]].params(self.entry.site, rank)
        others = dict.fromkeys(own for own, _ in self.sums if own != form)
        errors = [(other, self.entry.error_at(other, params)) for other in others]
        return [(other, error, self.curve(other).at(error)) for other, error in errors if error is not None]

    def _promises(self, form: str, ranks: Sequence[int]) -> bool:
        return any(self._is_near(form, rank) for rank in ranks)

    def _is_near(self, form: str, rank: int) -> bool:
        error, basis = self.entry.forms[form].error(rank), split_variant(form)[1]
        return all(
            error <= rival * (WORST_TWIN if split_variant(other)[1] == basis else WORST_ERROR)
            for other, rival, _ in self._rivals(form, rank)
        )

    def _holds(self, form: str, rank: int) -> bool:
        least = min((effect for _, _, effect in self._rivals(form, rank)), default=math.inf)
        return self._effect(form, rank) <= WORST_EFFECT * least

    def _explore(self, form: str, ladder: Sequence[int]) -> None:
        self._effect(form, ladder[0])
        self._effect(form, ladder[-1])
        open_spans = [(0, len(ladder) - 1)]
        while open_spans:
            low, high = open_spans.pop()
            middle = (low + high) // 2
            if middle == low:
                continue
            errors = [self.entry.forms[form].error(ladder[place]) for place in (high, middle, low)]
            ends = monotone(
                [(errors[0], self._effect(form, ladder[high])), (errors[2], self._effect(form, ladder[low]))]
            )
            expected, found = ends.at(errors[1]), self._effect(form, ladder[middle])
            if not expected / self.effort.straight <= found <= expected * self.effort.straight:
                open_spans += [(low, middle), (middle, high)]


def measure_joint(
    program: Program,
    curves: Mapping[str, SiteCurves],
    chosen: Mapping[str, tuple[str, int]],
    instead: Mapping[str, Sequence[tuple[str, int] | None]],
    batches: Sequence[CachedBatch],
) -> tuple[float, dict[str, tuple[float, ...]]]:
    """The error of the model with every chosen site factored, and with one of them changed at a time.

    The factored model is walked once per batch and forks at each site.

    Args:
        program: the captured model.
        curves: from :func:`error_curves`.
        chosen: variant and rank of each site that is factored.
        instead: what each site is tried with instead, None for dense.
        batches: with reference outputs.

    Returns:
        The relative error of the model's outputs, and by site name that of each trial.
    """
    base = {}
    for name, own in chosen.items():
        base[name] = curves[name].site, curves[name].factors(*own, final=False)
        curves[name].rest()
    sums = {name: [ErrorSum() for _ in tried] for name, tried in instead.items()}
    sites = [curves[name].site for name in instead]
    with torch.no_grad():
        for batch in batches:
            with seeded(program.device):
                for site, trial in program.trials(batch.call, sites, base):
                    for taken, total in zip(instead[site.name], sums[site.name], strict=True):
                        factors = None if taken is None else curves[site.name].factors(*taken, final=False)
                        with seeded(program.device, None):
                            outputs = trial(factors)
                        batch.measure(outputs, total)
                    curves[site.name].rest()
    return joint_error(program, base, batches), {
        name: tuple(total.relative for total in totals) for name, totals in sums.items()
    }


def joint_error(program: Program, factored: Factored, batches: Sequence[CachedBatch]) -> float:
    """The relative error of the model's outputs with every given site factored at once.

    Args:
        program: the captured model.
        factored: a site and its factors, by site name.
        batches: with reference outputs.
    """
    if not factored:
        return 0.0
    return _error(program.device, program.exchanged(factored), batches)


def held_out_error(program: Program, batches: Sequence[CachedBatch]) -> float:
    """The relative error of a factored program's outputs; infinite where they are not finite.

    Args:
        program: a factored program.
        batches: with the original's outputs.
    """
    error = _error(program.device, program.run, batches)
    return error if math.isfinite(error) else math.inf


def _error(device: torch.device, run: Callable[[Call], Outputs], batches: Sequence[CachedBatch]) -> float:
    total = ErrorSum()
    with torch.no_grad():
        for batch in batches:
            with seeded(device):
                outputs = run(batch.call)
            batch.measure(outputs, total)
    return total.relative


def _measured_ranks(ranks: tuple[int, ...], shares: Sequence[float]) -> tuple[int, ...]:
    wanted = [share * ranks[-1] for share in shares]
    return tuple(sorted({min(ranks, key=lambda rank: (abs(rank - aim), rank)) for aim in wanted} | {ranks[0]}))


def affordable(
    program: Program, batches: Sequence[CachedBatch], flops: int, forks: int, work: float
) -> list[CachedBatch]:
    """The first rows of each batch, so many that all forks (half the graph each) fit ``work`` FLOPs.

    At least ``MIN_EFFECT_ROWS`` in all, or what there is.

    Args:
        program: the captured model.
        batches: with the original's outputs.
        flops: of the program on the first one.
        forks: how often what is behind a site runs again.
        work: FLOPs.
    """
    total = sum(batch.call.batch_size for batch in batches)
    per_row = flops / max(batches[0].call.batch_size, 1) if batches else 0
    rows = int(work / max(forks * per_row / 2, 1.0))
    rows = min(max(rows, MIN_EFFECT_ROWS), total)
    if rows == total:
        return list(batches)
    with torch.no_grad():
        return [batch.first(program, max(1, rows * batch.call.batch_size // total)) for batch in batches]
