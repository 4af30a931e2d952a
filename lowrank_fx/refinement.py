"""From a plan to a refined model: the factored program learns, and what the plan says of it is measured anew."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank_fx.cache import CachedBatch
from lowrank_fx.corrections import Made
from lowrank_fx.effects import held_out_error
from lowrank_fx.forms import Factors
from lowrank_fx.losses import LossMeasure
from lowrank_fx.plan import MetricPoint, MetricSearch, Plan, Refinement
from lowrank_fx.program import Factored, Program
from lowrank_fx.refine import Refined, refine
from lowrank_fx.refine_options import Refine
from lowrank_fx.scored import score
from lowrank_fx.session import Session
from lowrank_fx.sites import Site
from lowrank_fx.targets import Metric

NOT_SCORED = "it was not refined, because no call of the metric was left for a refined plan; allow more evaluations"


def refined_plan(
    session: Session, plan: Plan, chosen: Made, options: Refine, checkpoint: str | os.PathLike[str] | None
) -> tuple[Plan, Program]:
    """Refine what a plan makes of a model.

    Args:
        session: the calibrated model.
        plan: how it is factored.
        chosen: what the plan puts into the program.
        options: of refinement.
        checkpoint: a folder; the state is kept inside of it, in a folder of its own for each plan. None keeps none.
            The plan of a target that obeys a clock may be another one the next time, whose refinement begins anew.

    Returns:
        The plan with the errors of the refined program, and that program, which owns its tensors. Under a ``Metric``
        that no longer holds after it, or that may not be asked again, the unrefined program with a note.

    Raises:
        CalibrationError: calibration kept no inputs.
        OptionError: ``augment`` returned something that is not a batch.
        StorageError: the checkpoint cannot be written, is damaged, or is of another run.
    """
    program = chosen.into(session.program, clone=True)
    target, seen = plan.target, plan.metric
    if isinstance(target, Metric) and seen is not None and seen.evaluations >= target.evaluations:
        return replace(plan, notes=(*plan.notes, NOT_SCORED)), program
    select = session.calibration.select_batches
    key = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
    folder = None if checkpoint is None else Path(checkpoint) / f"refine-{key}"
    done = refine(
        session.program,
        program,
        session.calibration.input_batches,
        select,
        options,
        checkpoint=folder,
        progress=session.progress,
    )
    said = Refinement(done.steps, done.best_step, done.start, done.best, json.dumps(options.to_json(), sort_keys=True))
    plan = replace(plan, notes=(*plan.notes, *_substituted(select), *done.notes), refinement=said)
    if not done.best_step:
        word = "refinement lowered no held-out error, so the factors are those that the plan started with"
        return replace(plan, notes=(*plan.notes, word)), program
    scored = seen
    if isinstance(target, Metric) and seen is not None:
        value = score(target, program.copy(), "the refined plan")
        point = MetricPoint(plan.totals.kept(target.recorded, "model"), done.best, value)
        seen = MetricSearch(seen.before, seen.after, (*seen.points, point))
        plan = replace(plan, metric=seen)
        if not target.holds(seen.before, value):
            word = f"refinement took the metric to {value:g}, further than allowed, so it was undone"
            return _undone(session, plan, chosen, word)
        scored = replace(seen, after=value)
    refined = _measured_again(session, plan, chosen.factored, program, done)
    if not math.isfinite(refined.error):
        word = "after refinement outputs were not finite on the held-out rows that report errors, so it was undone"
        return _undone(session, plan, chosen, word)
    return replace(refined, metric=scored), program


def _undone(session: Session, plan: Plan, chosen: Made, word: str) -> tuple[Plan, Program]:
    """The plan with its factors as they were, and why."""
    said = plan.refinement
    assert said is not None
    refinement = replace(said, best_step=0, after=said.before)
    unrefined = chosen.into(session.program, clone=True)
    return replace(plan, notes=(*plan.notes, word), refinement=refinement), unrefined


def _substituted(select: Sequence[CachedBatch]) -> tuple[str, ...]:
    """A line where what refinement minimises is not what errors are measured by."""
    judge = select[0].judge
    if judge is None or not isinstance(judge.measure, LossMeasure):
        return ()
    return (
        f"refinement minimised the L2 distance of outputs, not {judge.measure.name}, which only chose among its states",
    )


def _measured_again(session: Session, plan: Plan, factored: Factored, program: Program, done: Refined) -> Plan:
    """The plan with the errors of a program whose factors are no longer those that the plan was made with."""
    state = dict(program.module.named_parameters(remove_duplicate=False))
    before = dict(session.program.module.named_parameters(remove_duplicate=False))
    sites = []
    for entry in plan.sites:
        if entry.factored:
            site, factors = factored[entry.name]
            error, bound = session.maker.site_error(site, _stored(site, factors, state, before))
            entry = replace(entry, error=error, bound=bound)
        sites.append(entry)
    return replace(
        plan,
        sites=tuple(sites),
        candidate=f"{plan.candidate}, refined",
        candidates=(*plan.candidates, (f"{plan.candidate}, refined", done.best)),
        select_error=done.best,
        error=held_out_error(program, session.calibration.report_batches),
    )


def _stored(site: Site, factors: Factors, state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Factors:
    """A site's factors as they are in a program now; the shift is what its bias has gained."""
    tensors: dict[str, Any] = {leaf: state[name].detach() for leaf, name in factors.names(site).items()}
    shift = factors.shift
    if site.biases and shift is not None:
        name = site.biases[0]
        shift = state[name].detach().double() - before[name].detach().double()
    return replace(factors, **tensors, shift=shift)
