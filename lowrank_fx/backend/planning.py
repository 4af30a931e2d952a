"""From the calibrated calls of a model's regions to one plan and its factors.

No graph sees the model's outputs, so effects and errors are measured on the outputs of each region, all regions
together: the outputs of all regions count as one vector. Between them nothing is known; a model of one region is
planned exactly as ``optimize`` plans it, corrections included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from torch.fx import GraphModule

from lowrank_fx._ambient import seeded, settled
from lowrank_fx._memory import distinct_numbers
from lowrank_fx.backend.options import BackendOptions
from lowrank_fx.backend.recording import PERIOD, Recording
from lowrank_fx.backend.regions import RegionCall, RegionGraph, RegionsProgram, local, merged_table
from lowrank_fx.cache import EFFECT_BATCHES, Cache, CachedBatch
from lowrank_fx.calibration import Calibration
from lowrank_fx.compare import check_outputs, floating_outputs
from lowrank_fx.corrections import Made, set_buffers
from lowrank_fx.curves import SiteCurves
from lowrank_fx.double_sided import variant
from lowrank_fx.effects import EFFECT_FLOPS, EXPECTED_FORKS
from lowrank_fx.effort import effort_of
from lowrank_fx.errors import CalibrationError, PlanError
from lowrank_fx.fingerprint import Source
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.measuring import share_of_run, site_times
from lowrank_fx.payoff import settle
from lowrank_fx.plan import Plan
from lowrank_fx.program import Program
from lowrank_fx.session import Session
from lowrank_fx.settle import Maker
from lowrank_fx.sites import SiteTable
from lowrank_fx.study import studied
from lowrank_fx.targets import Keep, obeys_speed

PLANNER = "budget"


class Rivals(Protocol):
    """The graphs that a plan is timed with, each on a call of its own."""

    def dense(self) -> object:
        """Run the dense graphs."""

    def factored(self, made: Made) -> Callable[[], object]:
        """What runs them with factors in them."""


@dataclass(frozen=True)
class Planned:
    """One plan for all regions of a model.

    Attributes:
        plan: what was decided.
        made: the factors.
        timing: of the factored graphs against the dense ones, where the target asked for it.
    """

    plan: Plan
    made: Made
    timing: PairedTiming | None = None

    def rewritten(self, graph: RegionGraph) -> GraphModule | None:
        """A region with the factors in it; None if none of its layers is factored."""
        return rewritten(graph, self.made)


def rewritten(graph: RegionGraph, made: Made) -> GraphModule | None:
    """A region with factors in it, which shares its other tensors; None if none of its layers is factored."""
    own = local({site.name: site for site in graph.find_sites().sites}, made.factored)
    if not own:
        return None
    module = graph.factorize(own, clone=False).module
    present = dict(module.named_buffers())
    set_buffers(module, {name: value for name, value in made.buffers.items() if name in present})
    return module


def make_plan(
    recordings: Sequence[Recording], parameters: Sequence[Tensor], options: BackendOptions, rivals: Rivals
) -> Planned:
    """Plan, with everything that was recorded.

    Args:
        recordings: of the regions; each with at least one call of the role ``"calibrate"``.
        parameters: those that the regions read, as the model holds them.
        options: the user's.
        rivals: timed for targets that promise speed.

    Raises:
        CalibrationError: no region can be planned; the message says why.
        TargetError: the target cannot be reached; the message names the smallest reachable value.
        PlanError: the plan that was given does not fit.
    """
    with settled(parameters[0].device):
        program, table, calibration, notes = assembled(recordings, options)
        effort, given = effort_of(options.effort), isinstance(options.plan, Plan)
        # A plan from elsewhere may name a variant that a low effort would leave out.
        effort = replace(effort, twins=effort.twins or given)
        study = studied(program, table, calibration, effort, measured=not given, progress=options.verbose)
        if not study.curves:
            reasons = "; ".join(f"{refused.name}: {refused.reason}" for refused in table.left_alone)
            raise CalibrationError(f"none of the layers that were called can be factored ({reasons or 'none is left'})")
        if isinstance(options.plan, Plan):
            maker = Maker(program, table, calibration, study.curves, effort.corrections, options.verbose)
            return Planned(options.plan, maker.settled(_choice(options.plan, study.curves), math.inf).made)
        session = Session(
            model=program.module,
            program=program,
            table=table,
            calibration=calibration,
            curves=study.curves,
            effects=study.effects,
            planner=PLANNER,
            effort=effort,
            notes=(*notes, *study.notes),
            params=distinct_numbers(parameters),
            progress=options.verbose,
        )
        return _planned(session, options, rivals)


def _planned(session: Session, options: BackendOptions, rivals: Rivals) -> Planned:
    """The plan for the target, in the way of ``module.build``.

    Single layers are timed for a share of the time alone; other targets that promise speed time the graphs as a whole,
    and fold layers back where they are slower: the caller is waiting.
    """
    target, device = options.target, session.program.device
    if not obeys_speed(target):
        plan, made = session.plan(target)
        return Planned(plan, made)
    times = None
    if isinstance(target, Keep):
        times = site_times(session, compiled=options.inner == "inductor")
        times.share_of_sites = share_of_run(rivals.dense, times, device)
        times.survey()

    def time_of(plan: Plan, made: Made) -> PairedTiming:
        return paired_speedup(rivals.dense, rivals.factored(made), device=device)

    found = settle(session.aimed(target, times), target, time_of)
    plan = found.planned.plan
    notes = () if times is None else times.notes
    return Planned(replace(plan, notes=(*plan.notes, *notes)), found.planned.made, found.timing)


def assembled(
    recordings: Sequence[Recording], options: BackendOptions
) -> tuple[Program, SiteTable, Calibration, tuple[str, ...]]:
    """One program, table and calibration of all regions that errors can be measured on.

    Args:
        recordings: of the regions.
        options: the user's.

    Returns:
        The three, and what the user should know.

    Raises:
        CalibrationError: there is no such region; the message says why.
    """
    caches: dict[int, dict[str, list[tuple[int, CachedBatch]]]] = {}
    refused: list[str] = []
    for recording in recordings:
        try:
            recording.finish()
            caches[recording.number] = _cached(recording)
        except CalibrationError as error:
            refused.append(f"a graph of the model takes no part: {error}")
    known = [recording for recording in recordings if recording.number in caches]
    if not known:
        raise CalibrationError("; ".join(refused) or "no call was calibrated")
    regions = {recording.number: recording.program for recording in known}
    table = merged_table({recording.number: recording.table for recording in known}, options.skip)
    program: Program = next(iter(regions.values())) if len(regions) == 1 else RegionsProgram(regions)
    firsts = {recording.number: recording.kept["calibrate"][0][1] for recording in known}
    flops = sum(region.count_flops(firsts[number]) for number, region in regions.items())
    # Rows cannot be cut from a call, so what is too dear is measured on fewer calls; one of each region at least.
    forks = EXPECTED_FORKS * len(table.sites)
    if forks * flops * EFFECT_BATCHES / 2 > EFFECT_FLOPS:
        for own in caches.values():
            own["effect"] = own["effect"][:1]
    source = Source({}, "export", {}, options.seed, 1 / PERIOD, "", 1)
    calibration = Calibration(
        source=source,
        example=next(iter(firsts.values())),
        sketches=_sketches(known, table),
        shards=frozenset({0}),
        first_rows={
            _name(recording, name, len(known)): (0, observer.first_rows, observer.first_space)
            for recording in known
            for name, observer in recording.observers.items()
            if observer.first_rows is not None
        },
        counted=(0, flops),
        effect=_merged(caches, "effect"),
        inputs=_merged(caches, "inputs"),
        select=_merged(caches, "select"),
        report=_merged(caches, "report"),
        complete=True,
    )
    notes = [*program.notes, *calibration.notes, *refused]
    if len(known) > 1:
        notes.append(f"planned over {len(known)} graphs of the model; errors are those of the outputs of each")
    short = [recording for recording in known if not (recording.kept["select"] and recording.kept["report"])]
    if short:
        notes.append(
            f"{len(short)} of {len(known)} graphs were called too rarely to hold calls out; errors there are measured "
            "on calls that were calibrated on"
        )
    return program, table, calibration, tuple(notes)


def _cached(recording: Recording) -> dict[str, list[tuple[int, CachedBatch]]]:
    """The kept calls of a region by their use, with what the region returns for them."""
    program = recording.program

    def run(calls: Sequence[tuple[int, RegionCall]]) -> list[tuple[int, CachedBatch]]:
        made = []
        for index, call in calls:
            with seeded(program.device):
                outputs = program.run(call)
            check_outputs(outputs, call.mask)
            made.append((index, CachedBatch(call, tuple(floating_outputs(outputs)))))
        return made

    effect = run(recording.effect_calls)
    if not effect:
        raise CalibrationError("it was not called while calls were calibrated")
    select = run(recording.kept["select"]) or effect
    return {
        "effect": effect,
        "inputs": [(index, CachedBatch(call, ())) for index, call in recording.kept["calibrate"]],
        "select": select,
        "report": run(recording.kept["report"]) or select,
    }


def _merged(caches: dict[int, dict[str, list[tuple[int, CachedBatch]]]], use: str) -> Cache:
    """The batches of all regions in the order of their calls."""
    numbers = sorted(caches)
    batches = {
        index * len(numbers) + place: batch
        for place, number in enumerate(numbers)
        for index, batch in caches[number][use]
    }
    return Cache(batches=batches, offered=len(batches), outputs=use != "inputs")


def _sketches(recordings: Sequence[Recording], table: SiteTable) -> dict[str, Sketch]:
    """The sketches by the names of the merged table.

    Sketches of one weight's inputs are merged later, for which they have to be of one size; where regions gave them
    different ones, that of the most rows stands for all.
    """
    found = {
        _name(recording, name, len(recordings)): observer.sketch
        for recording in recordings
        for name, observer in recording.observers.items()
    }
    for site in table.sites:
        own = [found[tap.name] for tap in table.taps_of(site)]
        if len({sketch.size for sketch in own}) > 1:
            most = max(own, key=lambda sketch: sketch.rows)
            for tap in table.taps_of(site):
                found[tap.name] = most
    return found


def _name(recording: Recording, tap: str, regions: int) -> str:
    return f"{recording.number}/{tap}" if regions > 1 else tap


def _choice(plan: Plan, curves: Mapping[str, SiteCurves]) -> dict[str, tuple[str, int]]:
    """The forms and ranks of a plan that was made elsewhere.

    Raises:
        PlanError: it factors a layer that was not called, or cannot be factored so.
    """
    chosen = {}
    for entry in plan.factored:
        assert entry.rank is not None
        form = variant(entry.form, entry.basis)
        own = curves.get(entry.name)
        if own is None or form not in own.forms:
            raise PlanError(
                f"the plan factors {entry.name!r} as {form}, and the model as it was called has no such layer"
            )
        chosen[entry.name] = form, entry.rank
    return chosen
