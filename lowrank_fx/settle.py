"""From a choice of forms and ranks to the factors that a plan puts into a program.

A choice is a variant and a rank per factored site. Its factors come from the sketches; alternation and corrections are
to improve them, and held-out rows say which of them did: what comes back is never worse on these than what a choice was
compared by. Pairs are re-gauged last, where that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from lowrank_fx._ambient import seeded
from lowrank_fx.calibration import Calibration
from lowrank_fx.closed_loop import MAX_WIDTH, Remake, too_wide
from lowrank_fx.corrections import CORRECTIONS, Chosen, Made, Settled, with_norms
from lowrank_fx.curves import SiteCurves
from lowrank_fx.double_sided import ObliqueCurve, split_variant
from lowrank_fx.factor_cache import FactorCache
from lowrank_fx.forms import FORMS, Factors, apply_blocks, relative
from lowrank_fx.forms.split import AlternatingForm
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.program import Program
from lowrank_fx.shared_inputs import Joint
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.unfactored import listed

Choice: TypeAlias = Mapping[str, tuple[str, int]]
"""Variant and rank of every factored site, by site name."""

ALTERNATED = "alternated"
"""What is said of a plan whose forms were improved by alternation (``forms/alternating.py``)."""


@dataclass(frozen=True)
class Maker:
    """Makes factors.

    Attributes:
        program: the captured model, clean.
        table: its sites and taps.
        calibration: sketches and cached batches.
        curves: error curves by site name.
        corrections: those of ``CORRECTIONS`` that are tried, by name.
        progress: whether work over two seconds shows a progress bar.
        joints: the layers that a choice gives one first factor; it has to choose all of each.
    """

    program: Program
    table: SiteTable
    calibration: Calibration
    curves: Mapping[str, SiteCurves]
    corrections: tuple[str, ...]
    progress: bool
    joints: tuple[Joint, ...] = ()

    def factors(self, choice: Choice, *, final: bool = True) -> Chosen:
        """The factors of every chosen site.

        Args:
            choice: variant and rank by site name.
            final: as good as their forms make them; False for those whose errors are what the curves say, which is
                what candidates are compared with.
        """
        return self._made(choice, lambda name, form, rank: self._factors(name, form, rank, final=final))

    def compared(self, choice: Choice, kept: FactorCache) -> Chosen:
        """The factors that candidates are compared with, only to be read.

        Args:
            choice: variant and rank by site name.
            kept: those of candidates before, and from now on those of this one.
        """

        def make(name: str, form: str, rank: int) -> Factors:
            return kept.factors((name, form, rank), lambda: self._factors(name, form, rank, final=False))

        return self._made(choice, make)

    def _made(self, choice: Choice, make: Callable[[str, str, int], Factors]) -> Chosen:
        made: Chosen = {}
        for joint in self.joints:
            made.update(joint.factors(self.curves))
        for name, (form, rank) in choice.items():
            if name not in made:
                made[name] = self.curves[name].site, make(name, form, rank)
        return {name: made[name] for name in choice}

    def _factors(self, name: str, form: str, rank: int, *, final: bool) -> Factors:
        curves = self.curves[name]
        made = curves.factors(form, rank, final=final)
        curves.rest()
        return made

    def corrected(self, choice: Choice, how: str, factored: Chosen | None = None) -> Chosen:
        """The factors of a choice, corrected in one way.

        Args:
            choice: variant and rank by site name.
            how: one of ``CORRECTIONS``, or empty for none.
            factored: the factors of the choice as they are without, where they are at hand.
        """
        factored = self.factors(choice) if factored is None else factored
        if not how or not factored or not isinstance(self.program, GraphProgram):
            return factored
        with seeded(self.program.device):
            remake = self._remake(choice)
            return CORRECTIONS[how](self.program, self.table, self.calibration, factored, remake, self.progress)

    def settled(self, choice: Choice, error: float) -> Settled:
        """The factors that a plan is made of: those of least error on the select half.

        In the running are the factors as candidates are compared, alternated ones where there are any, and corrected
        ones.

        Args:
            choice: variant and rank by site name.
            error: its error on the select half as candidates are compared; infinite where that is not known.
        """
        if not choice:
            return Settled(Made({}), error)
        tried: list[tuple[str, float]] = []
        plain = best = self._uncorrected(choice, error, tried)
        # A module tree runs as a whole, so nothing can be fitted between its layers.
        if not isinstance(self.program, GraphProgram):
            return replace(best, tried=tuple(tried))
        for how in self.corrections:
            best = self._better(best, Made(self.corrected(choice, how, plain.made.factored)), how, tried)
        made = with_norms(self.program, self.calibration, best.made)
        if made.buffers:
            best = self._better(best, made, f"{best.how}, norms".removeprefix(", "), tried)
        return replace(best, tried=tuple(tried))

    def regauged(self, choice: Choice, settled: Settled) -> Settled:
        """The same with every pair re-gauged that can be, and its error then."""
        if not settled.made.factored:
            return settled
        forms = {name: FORMS[split_variant(form)[0]] for name, (form, _) in choice.items()}
        factored = {
            name: (site, factors.regauged() if forms[name].regauges(site) else factors)
            for name, (site, factors) in settled.made.factored.items()
        }
        made = replace(settled.made, factored=factored)
        return replace(settled, made=made, error=self._error(made))

    def site_error(self, site: Site, factors: Factors) -> tuple[float, float]:
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
        energy = self.curves[site.name].energy
        return relative(least + offset, energy), relative(most + offset, energy)

    def _uncorrected(self, choice: Choice, error: float, tried: list[tuple[str, float]]) -> Settled:
        """The better of the factors as candidates are compared and as their forms make them at best."""
        made = Made(self.factors(choice))
        if not any(isinstance(FORMS[split_variant(form)[0]], AlternatingForm) for form, _ in choice.values()):
            return Settled(made, error if math.isfinite(error) else self._error(made))
        alternated = Settled(made, self._error(made), ALTERNATED)
        tried.append((ALTERNATED, alternated.error))
        if alternated.error < error:
            return alternated
        return Settled(Made(self.factors(choice, final=False)), error)

    def _error(self, made: Made) -> float:
        return made.error(self.program, self.calibration.select_batches)

    def _better(self, best: Settled, made: Made, how: str, tried: list[tuple[str, float]]) -> Settled:
        error = self._error(made)
        tried.append((how, error))
        return Settled(made, error, how) if error < best.error else best

    def _remake(self, choice: Choice) -> Remake:
        """Factors of other weights in the forms and ranks of a choice; a basis that gradients chose stays.

        Of layers with one first factor, the one that is asked for first decides it, for the others' weights as they
        are.
        """
        joints = {site.name: joint for joint in self.joints for site in joint.sites}
        firsts: dict[str, Tensor] = {}

        def remake(site: Site, weight: Tensor, sketch: Sketch) -> Factors:
            joint = joints.get(site.name)
            if joint is not None:
                if joint.name not in firsts:
                    weights = {other.name: self.curves[other.name].weight for other in joint.sites}
                    firsts[joint.name] = joint.first(weights | {site.name: weight}, sketch)
                return joint.second(site, weight, firsts[joint.name], sketch)
            form, rank = choice[site.name]
            curve = self.curves[site.name].forms[form]
            if isinstance(curve, ObliqueCurve) or isinstance(FORMS[form], AlternatingForm):
                curve = replace(curve, made={}, work={})  # an alternation finds its way from the planned start
            else:
                curve = FORMS[form].curve(site, weight, sketch)
            return SiteCurves(site, weight, sketch, {form: curve}).factors(form, rank)

        return remake


def loop_notes(table: SiteTable, factored: Chosen) -> tuple[str, ...]:
    """What a user should know of a plan whose factors the closed loop fitted."""
    wide = too_wide(table, (site for site, _ in factored.values()))
    if not wide:
        return ()
    return (f"the closed loop left factors as they were whose inputs are wider than {MAX_WIDTH:,}: {listed(wide)}",)


def gauge_notes(factored: Chosen) -> tuple[str, ...]:
    """What a user who asked for the re-gauge should know."""
    gauges = [factors.gauge for _, factors in factored.values()]
    plain, gathered = gauges.count(None), sum(each is not None and each.order is not None for each in gauges)
    notes = []
    if plain:
        said = "only linear layers in float32 or float64 can be re-gauged"
        notes.append(f"{plain} of {len(gauges)} factored layers stayed plain pairs: {said}")
    if gathered:
        said = "no r inputs next to each other serve as pivots without loss of precision, which costs some speed"
        notes.append(f"{gathered} of {len(gauges)} re-gauged layers gather their inputs: {said}")
    return tuple(notes)
