"""Planners: a name, and the candidate allocations it lets held-out data choose from.

To add one, write a function of the type :data:`~lowrank_fx.planners.problem.Allocator` and list it here.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_fx.errors import OptionError
from lowrank_fx.planners.budget import by_effect
from lowrank_fx.planners.energy import by_energy
from lowrank_fx.planners.problem import Allocator
from lowrank_fx.planners.uniform import uniform

PLANNERS: dict[str, Mapping[str, Allocator]] = {
    "budget": {"effect": by_effect, "energy": by_energy, "uniform": uniform},
    "energy": {"energy": by_energy},
    "uniform": {"uniform": uniform},
}


def planner(name: str) -> Mapping[str, Allocator]:
    """The candidate allocations of a planner.

    Raises:
        OptionError: no planner has that name.
    """
    if name not in PLANNERS:
        raise OptionError(f"planner={name!r} does not exist; there are {', '.join(map(repr, PLANNERS))}")
    return PLANNERS[name]
