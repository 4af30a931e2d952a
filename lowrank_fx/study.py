"""What is learnt of every site before a plan: gradients at its output, its own error at every rank, its effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lowrank_fx.calibration import Calibration
from lowrank_fx.curves import EffectCurve, SiteCurves, error_curves
from lowrank_fx.effects import measure_effects
from lowrank_fx.effort import Effort
from lowrank_fx.gradients import output_gradients
from lowrank_fx.program import Program
from lowrank_fx.sites import SiteTable


class Study(NamedTuple):
    """What planning rests on.

    Attributes:
        curves: error curves by site name, of the sites that calibration reached.
        effects: measured effects by (site name, variant).
        by_gradients: whether gradients took part.
    """

    curves: Mapping[str, SiteCurves]
    effects: Mapping[tuple[str, str], EffectCurve]
    by_gradients: bool


def studied(
    program: Program,
    table: SiteTable,
    calibration: Calibration,
    effort: Effort,
    *,
    forms: Sequence[str] | None = None,
    differentiable: bool = True,
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
        differentiable: False where it is known that no gradient can be taken.
        measured: False leaves the effects out, where nothing is searched.
        progress: show progress bars for work over two seconds.
    """
    gradients = output_gradients(program, table, calibration, effort, progress) if differentiable else {}
    curves = error_curves(program, table, calibration, forms, progress, gradients, twins=effort.twins)
    effects = measure_effects(program, curves, calibration, effort, progress) if measured else {}
    return Study(curves, effects, bool(gradients))
