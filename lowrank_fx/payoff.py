"""What pays: a plan for a target that obeys speed keeps a site factored only where that measured faster.

First site by site: each is timed at the very rank that the plan chose, and one that did not measure faster stays dense.
Then as a whole: if the model did not measure faster than the original, the half of its sites that gain least are folded
back, then the half of those that are left, at most ``FOLD_BACKS`` times; and if none of these measured faster, the
original comes back. A share of the time that the model as a whole misses is planned for again, a little tighter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from lowrank_fx.corrections import Made
from lowrank_fx.errors import TargetError
from lowrank_fx.forms import DENSE, SHARED
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan, SitePlan
from lowrank_fx.session import Planned, Session
from lowrank_fx.site_times import SiteTimes, slower
from lowrank_fx.targets import Keep, Metric, Target, Tolerance
from lowrank_fx.timings import CONFIDENCE, SiteSpeed

SLOWER = "the factored model measured slower than the original, so the original came back"
NONE_PAYS = "no layer that the plan chose measured faster factored, so the original came back"
NONE_TIMED_FASTER = "no layer measured faster factored, at any rank that was timed, so the original came back"
NOT_WITHIN = "without the layers that measured slower the plan no longer holds, so the original came back"
NOT_SCORED = "some layers measured slower, and no call of the metric was left for a plan without them"

FOLD_BACKS = 3
"""How many smaller plans are compiled and timed where the whole one is not faster."""

REPLANS = 2
"""How often a share of the time is planned for again, with the times of what the last plan chose."""

TIGHTER = 0.995
"""What is planned for again is tighter by this than the miss says: a plan may leave some of its budget unused."""

TimeOf: TypeAlias = Callable[[Plan, Made], PairedTiming]
"""Times what a plan makes of the model against the original."""


class Timed(NamedTuple):
    """A plan whose sites all pay.

    Attributes:
        session: aimed at the target, with the problem that the plan answers.
        planned: the plan.
        speeds: measured, by site name.
        timing: of the model; None where it is the original, or was not timed.
    """

    session: Session
    planned: Planned
    speeds: Mapping[str, SiteSpeed]
    timing: PairedTiming | None = None


def settle(session: Session, target: Target, time_of: TimeOf) -> Timed:
    """The plan for a target that obeys speed.

    Args:
        session: aimed at the target, with the sites' times where they are to be obeyed.
        target: what is asked for.
        time_of: times a model.

    Raises:
        TargetError: the target cannot be reached.
    """
    found = _timed(_chosen(session, target, None), time_of)
    if isinstance(target, Keep) and target.of == "model":
        share = target.share
        for _ in range(REPLANS):
            if not found.timing or _within(target, found.timing):
                break
            share *= TIGHTER * target.share * found.timing.speedup
            try:
                tighter = _timed(_chosen(session, target, share), time_of)
            except TargetError:
                break
            if tighter.timing is None or tighter.timing.speedup <= found.timing.speedup:
                break
            found = tighter
    if found.timing and not found.timing.faster:
        found = _folded_back(found, time_of)
    if isinstance(target, Keep) and target.of == "model" and found.timing and not _within(target, found.timing):
        word = f"the model measured at {1 / found.timing.speedup:.1%} of the original's time, asked {target.share:.1%}"
        found = found._replace(planned=_noted(found.planned, word))
    if isinstance(target, Keep) and target.of == "sites" and session.times is not None:
        word = f"the layers that can be factored take {_share_of_sites(session.times, session, found.planned.plan):.1%}"
        word += f" of the time they took, by the times of the layers one by one; asked {target.share:.1%}"
        found = found._replace(planned=_noted(found.planned, word))
    return found


def _share_of_sites(times: SiteTimes, session: Session, plan: Plan) -> float:
    """What is left of the sites' time, as they were timed one by one."""
    return times.left(plan) / max(sum(map(times.nanoseconds, session.table.sites)), 1)


def _within(target: Keep, timing: PairedTiming) -> bool:
    """Whether a model takes the share of the time that was asked for, within the noise of the measurement."""
    return 1 / (timing.speedup + timing.error) <= target.share


def _timed(found: Timed, time_of: TimeOf) -> Timed:
    made = found.planned.made
    return found._replace(timing=time_of(found.planned.plan, made)) if made.factored else found


def _chosen(session: Session, target: Target, share: float | None) -> Timed:
    """The plan without the sites that do not pay at the ranks that it chose.

    Under a share of the time, sites that turn out slower than they were interpolated take more of it, so it is planned
    for again with what was measured.
    """
    planned, times = session.planned(target, share), session.times
    if times is None:
        return Timed(session, planned, {})
    if not planned.made.factored and not any(len(own) > 1 for own in session.problem.options.values()):
        return Timed(session, _noted(planned, NONE_TIMED_FASTER) if any(times.offered.values()) else planned, {})
    planned, speeds = _standing(session, planned, times)
    for _ in range(REPLANS):
        if not isinstance(target, Keep) or _affordable(session, target, share, planned):
            break
        session = session.again()
        planned, speeds = _standing(session, session.planned(target, share), times)
    reasons = _failing(planned.plan, speeds)
    if reasons and _scored_out(planned.plan):
        planned = original(session, planned, NOT_SCORED)
    elif reasons:
        fewer = session.without(planned, reasons)
        planned = fewer if _holds(fewer.plan) else original(session, planned, NOT_WITHIN)
        if not fewer.made.factored:
            planned = _noted(planned, NONE_PAYS)
    return Timed(session, planned, {site.name: speeds[site.name] for site in planned.plan.factored})


def _standing(session: Session, planned: Planned, times: SiteTimes) -> tuple[Planned, dict[str, SiteSpeed]]:
    """A plan and its layers' speeds; without shared first factors, where not all of its layers pay with them."""
    speeds = times.speeds(planned.plan)
    if planned.outcome.apart is None or not _failing(planned.plan, speeds):
        return planned, speeds
    planned = session.without(planned, {})
    return planned, times.speeds(planned.plan)


def _scored_out(plan: Plan) -> bool:
    """Whether a metric chose a plan and may not be asked again; without some of its layers, a plan is scored anew."""
    return (
        isinstance(plan.target, Metric)
        and plan.metric is not None
        and (plan.metric.evaluations >= plan.target.evaluations)
    )


def _affordable(session: Session, target: Keep, share: float | None, planned: Planned) -> bool:
    """Whether a plan still costs what it may, and pays, now that its own ranks were timed."""
    times, now = session.times, session.again()
    assert times is not None
    chosen = session.problem.factored((planned.outcome.apart or planned.outcome).pick)
    shared = {site.name for site in planned.plan.factored if site.basis == SHARED}
    sites = (site for site in session.table.sites if site.name in chosen and site.name not in shared)
    paying = all(times.pays(site, *chosen[site.name]) for site in sites)
    return paying and times.left(planned.plan) <= now.budget(target, share)


def _failing(plan: Plan, speeds: Mapping[str, SiteSpeed]) -> dict[str, str]:
    """Why the layers do not pay that do not, by name."""
    return {site.name: _why(site, speeds) for site in plan.factored if not _pays(site, speeds)}


def _pays(site: SitePlan, speeds: Mapping[str, SiteSpeed]) -> bool:
    return site.name in speeds and speeds[site.name].faster


def _why(site: SitePlan, speeds: Mapping[str, SiteSpeed]) -> str:
    if site.name not in speeds:
        return f"rank {site.rank} could not be timed, so it is not known to be faster"
    return slower(speeds[site.name].speedup, f"rank {site.rank}")


def _folded_back(found: Timed, time_of: TimeOf) -> Timed:
    """The largest part of a plan, by halves, with which the model measured faster; else the original."""
    session, planned, speeds, whole = found
    if planned.outcome.apart is not None:  # no part of a plan shares, so neither does what is timed
        planned = session.without(planned, {})
        speeds = {} if session.times is None else session.times.speeds(planned.plan)
        whole = time_of(planned.plan, planned.made)
        if whole.faster and _holds(planned.plan):
            return Timed(session, planned, speeds, whole)
    plan = planned.plan
    order = sorted(plan.factored, key=lambda site: (-_gain(site, speeds), site.effect))
    kept = len(order)
    for _ in range(0 if _scored_out(plan) else FOLD_BACKS):
        kept //= 2
        if not kept:
            break
        names = {site.name for site in order[:kept]}
        part = {name: own for name, own in planned.made.factored.items() if name in names}
        smaller = replace(plan, sites=tuple(site for site in plan.sites if site.name in names or not site.factored))
        timing = time_of(smaller, replace(planned.made, factored=part))
        if timing.speedup - CONFIDENCE * timing.error < 1:  # several tries: noise must not pass one of them
            continue
        assert whole is not None
        reason = (
            f"the model measured {whole.speedup:.2f}x with it, and {timing.speedup:.2f}x with the layers that gain more"
        )
        reduced = session.without(planned, {site.name: reason for site in order[kept:]})
        if _holds(reduced.plan):
            left = {name: speed for name, speed in speeds.items() if name in names}
            return Timed(session, reduced, left, timing)
        break
    return Timed(session, original(session, planned, SLOWER), {}, None)


def _gain(site: SitePlan, speeds: Mapping[str, SiteSpeed]) -> float:
    """The seconds that factoring a site saves; where none was timed, the FLOPs, which order them about alike."""
    speed = speeds.get(site.name)
    return float(site.flops[0] - site.flops[1]) if speed is None else speed.dense_seconds - speed.seconds


def _holds(plan: Plan) -> bool:
    """Whether a plan that lost sites still holds what was asked for."""
    if isinstance(plan.target, Tolerance):
        return plan.select_error <= plan.target.error
    if isinstance(plan.target, Metric) and plan.metric is not None:
        return plan.target.holds(plan.metric.before, plan.metric.after)
    return True


def original(session: Session, planned: Planned, reason: str) -> Planned:
    """A plan with every site dense for a reason: the original comes back."""
    everything = {site.name: reason for site in planned.plan.factored}
    dense = session.without(planned, everything)
    return _noted(
        dense._replace(plan=replace(dense.plan, candidate=DENSE, select_error=0.0, error=0.0)),
        *(note for note in planned.plan.notes if note not in dense.plan.notes),
        reason,
    )


def _noted(planned: Planned, *notes: str) -> Planned:
    return planned._replace(plan=replace(planned.plan, notes=(*planned.plan.notes, *notes)))
