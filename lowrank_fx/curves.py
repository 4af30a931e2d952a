"""What is known of a site before it is planned: its own error at every rank, and its effect where that was measured."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lowrank_fx._progress import Progress
from lowrank_fx.calibration import Calibration
from lowrank_fx.double_sided import ObliqueCurve, double_sided, oblique_factors, split_variant, variant
from lowrank_fx.errors import PlanError
from lowrank_fx.forms import FORMS, GRADIENT, ErrorCurve, Factors, forms_for
from lowrank_fx.forms.output import OutputForm
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.program import Program
from lowrank_fx.sites import Site, SiteTable


@dataclass(frozen=True)
class SiteCurves:
    """A site with its weight, the sketch of its input, and an error curve per variant (a form, or form@basis)."""

    site: Site
    weight: Tensor
    sketch: Sketch
    forms: Mapping[str, ErrorCurve]

    @cached_property
    def energy(self) -> float:
        """The least that |W (X - mean)^T|^2 can be over the sketched rows, or |W X^T|^2 for a layer without a bias."""
        matrix = self.site.matrix(self.weight.detach()).double()
        return self.sketch.certificate(matrix, centered=self.site.centered)[0]

    def factors(self, form: str, rank: int, *, final: bool = True) -> Factors:
        """The factors at one rank of one variant.

        Args:
            form: the variant.
            rank: the rank.
            final: as good as the form makes them; False for those whose error is what the curve says.

        Raises:
            PlanError: the form or the rank is not on offer.
        """
        curve = self.forms.get(form)
        if curve is None or not 1 <= rank <= curve.largest:
            raise PlanError(f"{self.site.name}: form {form!r} at rank {rank} is not on offer")
        plain = FORMS[split_variant(form)[0]]
        if isinstance(curve, ObliqueCurve):
            assert isinstance(plain, OutputForm)
            return oblique_factors(plain, self.site, self.weight, curve, rank, self.sketch)
        found = plain.factor if final else plain.start
        return found(self.site, self.weight, curve, rank, self.sketch)

    def rest(self) -> None:
        """Let go of what was kept between ranks."""
        for curve in self.forms.values():
            curve.rest()

    def error_at(self, form: str, params: int) -> float | None:
        """The site's error at the largest rank of a variant that has at most ``params`` weights; None if none has."""
        plain, curve = FORMS[split_variant(form)[0]], self.forms[form]
        ranks = [rank for rank in curve.ranks if plain.params(self.site, rank) <= params]
        return curve.error(ranks[-1]) if ranks else None


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


def monotone(points: list[tuple[float, float]]) -> EffectCurve:
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


def error_curves(
    program: Program,
    table: SiteTable,
    calibration: Calibration,
    forms: Sequence[str] | None = None,
    progress: bool = True,
    gradients: Mapping[str, Sketch] | None = None,
    *,
    twins: bool = True,
) -> dict[str, SiteCurves]:
    """The error curves of every site that calibration reached, by site name.

    Args:
        program: the captured model.
        table: its sites and taps.
        calibration: its sketches are used.
        forms: those that may be used (default: all).
        progress: show a progress bar.
        gradients: at the sites' outputs, from :func:`~lowrank_fx.gradients.output_gradients`; where there are some, the
            output forms come in their basis too.
        twins: False where the basis of gradients, if there are any, takes the place of that of activations.
    """
    found: dict[str, SiteCurves] = {}
    with Progress("spectra", len(table.sites), progress) as bar:
        for site in table.sites:
            sketch = calibration.sketch_of(table, site)
            weight = program.weight(site)
            if sketch is not None:
                own = (gradients or {}).get(site.name)
                curves: dict[str, ErrorCurve] = {}
                for form in forms_for(site, forms):
                    if not form.ranks(site):
                        continue
                    if twins or own is None or not isinstance(form, OutputForm):
                        curves[form.name] = form.curve(site, weight, sketch)
                    if own is not None and isinstance(form, OutputForm):
                        curves[variant(form.name, GRADIENT)] = double_sided(form, site, weight, sketch, own)
                if curves:
                    found[site.name] = SiteCurves(site, weight, sketch, curves)
            bar.advance(note=site.name)
    return found
