"""What is learnt of every site before a plan: gradients at its output, its own error at every rank, its effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lowrank_fx.calibration import Calibration
from lowrank_fx.curves import EffectCurve, SiteCurves, error_curves
from lowrank_fx.effects import measure_effects
from lowrank_fx.effort import Effort
from lowrank_fx.gradients import OutputGradients, output_gradients
from lowrank_fx.program import Program
from lowrank_fx.sites import SiteTable


class Study(NamedTuple):
    """What planning rests on.

    Attributes:
        curves: error curves by site name, of the sites that calibration reached.
        effects: measured effects by (site name, variant).
        notes: what the user should know: why no gradients took part, where they might have.
    """

    curves: Mapping[str, SiteCurves]
    effects: Mapping[tuple[str, str], EffectCurve]
    notes: tuple[str, ...]


def studied(
    program: Program,
    table: SiteTable,
    calibration: Calibration,
    effort: Effort,
    *,
    forms: Sequence[str] | None = None,
    underivable: str = "",
    measured: bool = True,
    progress: bool = True,
) -> Study:
    """Study the sites of a calibrated program.

    Args:
        program: the captured model.
        table: its sites and taps.
        calibration: of it.
        effort: how much work it may be.
        forms: those that may be used (default: all).
        underivable: why no gradient can be taken, where that is known; else empty.
        measured: False leaves the effects out, where nothing is searched.
        progress: show progress bars for work over two seconds.
    """
    gradients = OutputGradients({}, underivable)
    if not underivable:
        gradients = output_gradients(program, table, calibration, effort, progress)
    curves = error_curves(program, table, calibration, forms, progress, gradients.sketches, twins=effort.twins)
    effects = measure_effects(program, curves, calibration, effort, progress) if measured else {}
    notes = (f"directions are chosen by activations alone: {gradients.refused}",) if gradients.refused else ()
    return Study(curves, effects, notes)
