"""What factoring a site does to the model's output, measured.

The *effect* of a site at a form and rank is the relative L2 error of the model's outputs when that site alone is
replaced. It is measured at a few ranks, and read off between them through the site's own error: log effect against log
error, monotone. One rank is not enough: behind a pooling layer the first error directions average away and the last
ones do not, so no single measurement extrapolates.

Nothing is rewritten for it: a program gives its outputs with one site exchanged. A graph is walked once per batch and
forks at each site, so that only the part behind the site runs again; a module tree runs as a whole.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_fx._ambient import seeded
from lowrank_fx._progress import Progress
from lowrank_fx.cache import CachedBatch
from lowrank_fx.calibration import Calibration
from lowrank_fx.compare import ErrorSum
from lowrank_fx.errors import PlanError
from lowrank_fx.forms import FORMS, ErrorCurve, Factors, forms_for
from lowrank_fx.program import Factored, Program
from lowrank_fx.sites import Site, SiteTable

EFFECT_FLOPS = 2.0e12
"""Work allowed for measuring effects; it sets how many rows of the cached batches are used."""

MEASURED_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Where on a site's range of ranks its effect is measured."""

MIN_EFFECT_ROWS = 16


@dataclass(frozen=True)
class SiteCurves:
    """A site with its weight, its input's mean, and an error curve per form."""

    site: Site
    weight: Tensor
    mean: Tensor
    forms: Mapping[str, ErrorCurve]

    def factors(self, form: str, rank: int) -> Factors:
        """The factors at one rank of one form.

        Raises:
            PlanError: the form or the rank is not on offer.
        """
        curve = self.forms.get(form)
        if curve is None or not 1 <= rank <= curve.basis.shape[1]:
            raise PlanError(f"{self.site.name}: form {form!r} at rank {rank} is not on offer")
        return FORMS[form].factor(self.site, self.weight, curve, rank, self.mean)


@dataclass(frozen=True)
class EffectCurve:
    """Measured effects of one site and form, as (site error, model error) with errors ascending."""

    points: tuple[tuple[float, float], ...]

    def at(self, error: float) -> float:
        """The effect where the site's own relative error is ``error``: log-log between points, never falling.

        >>> round(EffectCurve(((0.1, 0.01), (0.4, 0.16))).at(0.2), 6)  # slope 2 in log-log
        0.04
        """
        if error <= 0 or not self.points:
            return self.points[0][1] if self.points and self.points[0][0] == 0 else 0.0
        errors = [point[0] for point in self.points]
        position = bisect.bisect_left(errors, error)
        if position == len(errors):
            return self.points[-1][1]
        above = self.points[position]
        if above[0] == error:
            return above[1]
        if position == 0:  # below the least measured error the effect shrinks in proportion
            return above[1] * error / above[0]
        below = self.points[position - 1]
        if below[1] <= 0 or below[0] <= 0:
            return float(above[1] * (error - below[0]) / (above[0] - below[0]))
        share = math.log(error / below[0]) / math.log(above[0] / below[0])
        return min(max(float(below[1] * (above[1] / below[1]) ** share), below[1]), above[1])


def error_curves(
    program: Program,
    table: SiteTable,
    calibration: Calibration,
    forms: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, SiteCurves]:
    """The error curves of every site that calibration reached, by site name."""
    found: dict[str, SiteCurves] = {}
    with Progress("spectra", len(table.sites), progress) as bar:
        for site in table.sites:
            sketch = calibration.sketch_of(table, site)
            weight = program.weight(site)
            if sketch is not None:
                curves = {
                    form.name: form.curve(site, weight, sketch) for form in forms_for(site, forms) if form.ranks(site)
                }
                if curves:
                    found[site.name] = SiteCurves(site, weight, sketch.mean, curves)
            bar.advance(note=site.name)
    return found


def measure_effects(
    program: Program, curves: Mapping[str, SiteCurves], calibration: Calibration, progress: bool = True
) -> dict[tuple[str, str], EffectCurve]:
    """Measure the effect of every site and form at the ranks of ``MEASURED_SHARES``.

    Args:
        program: the captured model.
        curves: from :func:`error_curves`.
        calibration: its effect batches are used, or so many of their rows as ``EFFECT_FLOPS`` allows.
        progress: show a progress bar for work over two seconds.

    Returns:
        An effect curve per (site name, form name).
    """
    ranks = {
        (name, form): _measured_ranks(curve.ranks)
        for name, entry in curves.items()
        for form, curve in entry.forms.items()
    }
    sums: dict[tuple[str, str, int], ErrorSum] = {
        (name, form, rank): ErrorSum() for (name, form), chosen in ranks.items() for rank in chosen
    }
    batches = _affordable(program, calibration, len(sums))
    sites = [entry.site for entry in curves.values()]
    with torch.no_grad(), Progress("effects", len(sums) * len(batches), progress) as bar:
        for batch in batches:
            # Every trial goes on with the random numbers that the run of the reference drew from there.
            with seeded(program.device):
                for site, trial in program.trials(batch.call, sites):
                    for form in curves[site.name].forms:
                        for rank in ranks[site.name, form]:
                            factors = curves[site.name].factors(form, rank)
                            with seeded(program.device, None):
                                outputs = trial(factors)
                            sums[site.name, form, rank].add_trial(outputs, batch.reference, batch.call.mask)
                            bar.advance(note=site.name)
    found = {}
    for (name, form), chosen in ranks.items():
        curve = curves[name].forms[form]
        found[name, form] = _monotone([(curve.error(rank), sums[name, form, rank].relative) for rank in chosen])
    return found


def joint_error(program: Program, factored: Factored, batches: Sequence[CachedBatch]) -> float:
    """The relative error of the model's outputs with every given site factored at once.

    Args:
        program: the captured model.
        factored: a site and its factors, by site name.
        batches: with reference outputs.
    """
    if not factored:
        return 0.0
    run = program.exchanged(factored)
    total = ErrorSum()
    with torch.no_grad():
        for batch in batches:
            with seeded(program.device):
                outputs = run(batch.call)
            total.add_trial(outputs, batch.reference, batch.call.mask)
    return total.relative


def _measured_ranks(ranks: tuple[int, ...]) -> tuple[int, ...]:
    wanted = [share * ranks[-1] for share in MEASURED_SHARES]
    return tuple(sorted({min(ranks, key=lambda rank: (abs(rank - aim), rank)) for aim in wanted} | {ranks[0]}))


def _affordable(program: Program, calibration: Calibration, forks: int) -> list[CachedBatch]:
    """The first rows of each effect batch, so many that all forks (half the graph each) fit the work allowed."""
    batches = calibration.effect_batches
    total = sum(batch.call.batch_size for batch in batches)
    per_row = calibration.flops / max(batches[0].call.batch_size, 1) if batches else 0
    rows = int(EFFECT_FLOPS / max(forks * per_row / 2, 1.0))
    rows = min(max(rows, MIN_EFFECT_ROWS), total)
    if rows == total:
        return list(batches)
    cut = []
    with torch.no_grad():
        for batch in batches:
            call = batch.call.rows(0, max(1, rows * batch.call.batch_size // total))
            with seeded(program.device):
                cut.append(CachedBatch(call, program.run(call)))
    return cut


def _monotone(points: list[tuple[float, float]]) -> EffectCurve:
    """Points with ascending error, and effects that never fall; non-finite effects (an overflow) count as 1e9."""
    made: list[tuple[float, float]] = []
    largest = 0.0
    for error, effect in sorted(points):
        largest = max(largest, effect if math.isfinite(effect) else 1e9)
        if made and made[-1][0] == error:
            made[-1] = (error, largest)
        else:
            made.append((error, largest))
    return EffectCurve(tuple(made))
