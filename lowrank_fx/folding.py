"""Which layers of an optimized model are folded, and what its plan says of them afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from lowrank_fx.cost import dense_params
from lowrank_fx.errors import OptionError
from lowrank_fx.forms import SHARED
from lowrank_fx.plan import Plan, SitePlan
from lowrank_fx.sites import Site, matches

FoldedSites: TypeAlias = Sequence[str] | Plan | None
"""Patterns of fully qualified names, or a plan whose dense layers are meant, or None for every layer."""

FOLDED = "folded back to dense operators"


def choose_sites(sites: Mapping[str, Site], wanted: FoldedSites) -> dict[str, Site]:
    """The factored layers that are meant.

    Args:
        sites: the factored layers, by name.
        wanted: patterns, each of which must match one (``fnmatch``, as ``skip``); a plan, for the layers that it leaves
            dense or does not hold; None for all.

    Raises:
        OptionError: ``wanted`` is none of these, or a pattern matches no factored layer.
    """
    if wanted is None:
        return dict(sites)
    if isinstance(wanted, Plan):
        kept = {entry.name for entry in wanted.factored}
        return {name: site for name, site in sites.items() if name not in kept}
    if isinstance(wanted, str) or not isinstance(wanted, Iterable) or not all(isinstance(each, str) for each in wanted):
        raise OptionError(f"sites={wanted!r}: give a list of patterns, such as ['*.q'], or a Plan, or None for all")
    chosen: set[str] = set()
    for pattern in wanted:
        found = {name for name, site in sites.items() if matches(pattern, site.weight)}
        if not found:
            raise OptionError(
                f"sites={pattern!r} matches no factored layer; those are {', '.join(sites) or 'none in this model'}"
            )
        chosen |= found
    return {name: site for name, site in sites.items() if name in chosen}


def folded_plan(plan: Plan, folded: Collection[str], refused: Mapping[str, str], already: Collection[str] = ()) -> Plan:
    """A plan that tells the costs of a model some of whose pairs were multiplied out.

    Form, rank and errors stay, since the weight is still the product of these factors.

    Args:
        plan: what the model was made by.
        folded: names of the layers that were folded now.
        refused: layers that could not be folded, with the reasons.
        already: names of those that were folded before.
    """
    totals, sites = plan.totals, []
    left = {site.name for site in plan.sites if site.basis == SHARED} - {*folded, *already}
    for site in plan.sites:
        after = _after(site, plan, left) if site.basis == SHARED else {}
        if site.name in folded:
            params, (before, flops) = dense_params(site.out_features, site.in_features), (site.params[0], site.flops[0])
            # A layer that came as a pair costs more as one operator; both its factors see the same rows.
            after = {"params": params, "flops": flops * params // before if 0 < before < params else flops}
        if after:
            changed = {}
            for quantity, cost in after.items():
                for of in ("model", "site"):
                    before, now = getattr(totals, f"{of}_{quantity}")
                    changed[f"{of}_{quantity}"] = (before, now + cost - getattr(site, quantity)[1])
            totals = replace(totals, **changed)
            site = replace(site, params=(site.params[0], after["params"]), flops=(site.flops[0], after["flops"]))
        sites.append(site)
    names = [site.name for site in plan.sites if site.name in folded]
    notes = [f"{FOLDED}: {', '.join(names)}"] if names else []
    notes += [f"{name} stays factored: {reason}" for name, reason in refused.items()]
    return replace(plan, sites=tuple(sites), totals=totals, notes=(*plan.notes, *notes))


def _after(site: SitePlan, plan: Plan, left: Collection[str]) -> dict[str, int]:
    """What a layer costs that shares its first factor with those of its family that are ``left``; none where dense.

    The first one of them pays for it.
    """
    if site.name not in left or site.rank is None:
        return {}
    owner = site.shares or site.name
    family = (each.name for each in plan.sites if owner in (each.name, each.shares) and each.name in left)
    own = site.out_features + (site.in_features if site.name == next(family) else 0)
    return {
        quantity: site.rank * own * before // dense_params(site.out_features, site.in_features)
        for quantity, (before, _) in (("params", site.params), ("flops", site.flops))
    }
