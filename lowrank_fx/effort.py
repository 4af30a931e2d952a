"""How much work a plan may cost before it is made.

What is cheap is always done: sketches, error curves, held-out comparison of candidates. What is dear is measuring: how
far the outputs move when one site is factored, in every variant and at several ranks, then again around the plan, and
fitting the factors to each other. ``"high"`` does all of it. ``"low"`` measures each site in one variant at few ranks
on few rows and corrects what costs next to nothing: for first tries, for large models, and where a caller waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from lowrank_fx.errors import OptionError

EffortName: TypeAlias = Literal["low", "high"]


@dataclass(frozen=True)
class Effort:
    """The limits of one effort.

    Attributes:
        samples: rows of batches whose output gradients are taken; one that is run with two random vectors counts twice.
        probes: random vectors per batch, at most.
        twins: whether output forms race in both bases; otherwise the one that gradients choose stands for both.
        batches: cached batches that effects are measured on.
        shares: where on a site's range of ranks its effect is measured at most.
        straight: an effect within this ratio of the one expected from its neighbours is where a straight curve is.
        around: whether effects are measured again around the plan.
        corrections: those of ``corrections.CORRECTIONS`` that are tried.
    """

    samples: int
    probes: int
    twins: bool
    batches: int
    shares: tuple[float, ...]
    straight: float
    around: bool
    corrections: tuple[str, ...]


EFFORTS: dict[str, Effort] = {
    "low": Effort(
        samples=64,
        probes=1,
        twins=False,
        batches=1,
        shares=(1 / 8, 1 / 2, 1),
        straight=2.0,
        around=False,
        corrections=("refitted",),
    ),
    "high": Effort(
        samples=512,
        probes=4,
        twins=True,
        batches=2,
        shares=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1),
        straight=1.1,
        around=True,
        corrections=("refitted", "closed loop"),
    ),
}


def effort_of(name: str) -> Effort:
    """The limits of an effort by its name.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in EFFORTS:
        raise OptionError(f"effort={name!r} does not exist; there are {', '.join(map(repr, EFFORTS))}")
    return EFFORTS[name]
