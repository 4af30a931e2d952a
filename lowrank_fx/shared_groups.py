"""Which layers with one input are given one first factor: by predicted effect and, where one is obeyed, by the clock.

The layers that a plan factors at one tap may all be joined, or some of them; :mod:`lowrank_fx.shared_inputs` has what a
group is predicted to do. Of few layers every group is tried.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_fx import cost
from lowrank_fx.curves import SiteCurves
from lowrank_fx.double_sided import split_variant
from lowrank_fx.forms.base import rank_step
from lowrank_fx.linalg import psd_root
from lowrank_fx.planners.problem import Option
from lowrank_fx.shared_inputs import FORM, Joint, gram_of, join, left_of, shared_rank
from lowrank_fx.site_times import SiteTimes, pair_of
from lowrank_fx.sites import Site, SiteTable
from lowrank_fx.timed_operators import Pair
from lowrank_fx.timings import LEAST_GAIN

MOST_DIVIDED, WIDEST_DIVIDED = 4, 1024
"""Of up to so many layers with one input of at most such a width, every group is tried; else all of them together."""

TIMED = 3
"""Ranks of a group that are timed, where a clock is obeyed and larger ones take too long."""


def joined(
    table: SiteTable,
    curves: Mapping[str, SiteCurves],
    chosen: Mapping[str, Option],
    *,
    fast: bool,
    times: SiteTimes | None = None,
) -> tuple[Joint, ...]:
    """The groups of layers that are better off with one first factor than apart, at no higher cost.

    Args:
        table: the sites and taps.
        curves: error curves by site name.
        chosen: the options of a pick, by site name.
        fast: whether ranks are those that run fast for what they cost.
        times: measured times of the sites, where a clock is obeyed: a group then has to take no longer either.

    Returns:
        At most one group per tap.
    """
    found = []
    for sites in _families(table, curves, chosen):
        step = rank_step(sites[0].dtype)
        if fast:
            step = cost.FAST_STEP if times is None else times.step(sites[0])
        group = _most_promising(_groups(sites), curves, chosen, step)
        best = None if group is None else join(group, curves, chosen, step)
        for again in range(TIMED):
            if best is not None and again:
                best = join(best.sites, curves, chosen, step, below=best.rank)
            if best is None or _gain(best, chosen) <= 0:
                break
            timed = best if times is None else _timed(best, chosen, times)
            if timed is not None:
                found.append(timed)
                break
    return tuple(found)


def _families(table: SiteTable, curves: Mapping[str, SiteCurves], chosen: Mapping[str, Option]) -> Iterator[list[Site]]:
    """The factored linear layers of each tap that only differ in their weights; two at least."""
    families: dict[tuple[str, bool, str], list[Site]] = {}
    for site in table.sites:
        option = chosen.get(site.name)
        if option is None or option.rank is None or split_variant(option.form)[0] != FORM or site.name not in curves:
            continue
        if site.kind == "linear" and len(site.calls) == 1 and not site.tied and site.pair is None:
            families.setdefault((site.calls[0].tap, site.centered, site.dtype), []).append(site)
    return (family for family in families.values() if len(family) > 1)


def _groups(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    if len(sites) > MOST_DIVIDED or sites[0].in_features > WIDEST_DIVIDED:
        return [tuple(sites)]
    return [group for size in range(2, len(sites) + 1) for group in itertools.combinations(sites, size)]


def _most_promising(
    groups: Sequence[tuple[Site, ...]], curves: Mapping[str, SiteCurves], chosen: Mapping[str, Option], step: int
) -> tuple[Site, ...] | None:
    """The group that would lower the squared effects most, the last of ``groups`` being all layers; None if none may.

    The energies of K X^T tell, which are the eigenvalues of L^T (sum of K_i^T K_i) L with G = L L^T: what each layer
    adds to that is the same in every group.
    """
    if len(groups) == 1:
        return groups[0]
    sites = groups[-1]
    lefts = {site.name: left_of(curves[site.name], chosen[site.name]) for site in sites}
    weighed = [(site, left) for site in sites if (left := lefts[site.name]) is not None]
    if len(weighed) < 2:
        return None
    gram = gram_of(curves[sites[0].name].sketch.parts[0], sites[0].centered)
    lower, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):  # rows that hardly vary
        lower = psd_root(gram).T
    seen: dict[str, Tensor] = {}
    for site, left in weighed:
        seen[site.name] = left.T @ site.matrix(curves[site.name].weight.detach()).double() @ lower
    parts = {name: own.T @ own for name, own in seen.items()}
    most: tuple[float, tuple[Site, ...] | None] = 0.0, None
    for group in groups:
        rank, names = shared_rank(group, chosen, step), [site.name for site in group]
        if rank < 1 or any(name not in parts for name in names) or rank > sum(len(seen[name]) for name in names):
            continue
        energies = torch.linalg.eigvalsh(torch.stack([parts[name] for name in names]).sum(0))
        lost = float(energies.clamp(min=0)[: max(len(energies) - rank, 0)].sum())
        gain = math.fsum(chosen[name].effect ** 2 for name in names) - lost
        most = max(most, (gain, group), key=lambda each: each[0])
    return most[1]


def _gain(joint: Joint, chosen: Mapping[str, Option]) -> float:
    """How much less the squared effects come to."""
    apart = math.fsum(chosen[site.name].effect ** 2 for site in joint.sites)
    return apart - math.fsum(effect**2 for effect in joint.effects)


def _timed(joint: Joint, chosen: Mapping[str, Option], times: SiteTimes) -> Joint | None:
    """A group with the time that it takes; None where it pays less than its layers apart, or cannot be timed."""
    speed = times.together(joint.sites, Pair(FORM, joint.rank), sure=True)
    apart = 0.0
    for site in joint.sites:
        own = times.measured(site, pair_of(chosen[site.name].form, chosen[site.name].rank or 0), sure=False)
        apart += math.inf if own is None else own.seconds
    # Layers with one first factor still have second ones of their own, which were timed as one.
    if speed is None or not speed.faster or speed.seconds * (1 + LEAST_GAIN) > apart:
        return None
    return replace(joint, nanoseconds=round(1e9 * speed.seconds))
