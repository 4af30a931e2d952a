"""Why weights cannot be factored, in few words, for a message that says how far a target is out of reach."""

from __future__ import annotations

from collections.abc import Container, Sequence

from lowrank_fx.calibration import Calibration
from lowrank_fx.forms import why_none
from lowrank_fx.sites import SiteTable

MOST_REASONS, MOST_NAMES = 3, 3
"""Reasons that a message tells, and weights that it names for each."""


def unfactored(
    table: SiteTable, calibration: Calibration, curves: Container[str], forms: tuple[str, ...] | None
) -> list[str]:
    """The reasons that most weights have, with their names.

    Args:
        table: the sites and the weights left alone.
        calibration: knows which sites were reached.
        curves: names of the sites that can be factored.
        forms: those that were asked for; None for all.
    """
    reasons: dict[str, list[str]] = {}
    for site in table.sites:
        if site.name not in curves:
            reached = calibration.sketch_of(table, site) is not None
            reason = why_none(site, forms) if reached else "calibration never reached it"
            reasons.setdefault(reason, []).append(site.name)
    for entry in table.left_alone:
        reasons.setdefault(entry.reason, []).append(entry.name)
    told = sorted(reasons.items(), key=lambda item: -len(item[1]))[:MOST_REASONS]
    return [f"{listed(names)}: {reason}" for reason, names in told]


def listed(names: Sequence[str]) -> str:
    """Names in words; of many the first."""
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")
