"""What a user asks for: :class:`Tolerance` (how much error is allowed) or :class:`Keep` (how much may remain).

A target is a frozen value with a versioned JSON form; the planner turns it into ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from lowrank_fx.errors import TargetError

Scope: TypeAlias = Literal["model", "sites"]
Quantity: TypeAlias = Literal["params", "flops"]


@dataclass(frozen=True)
class Tolerance:
    """The cheapest plan (fewest FLOPs) whose error on held-out batches is at most ``error``.

    It is held to that on the half of the held-out rows that chooses among plans; the other half reports. Whether such a
    plan is returned, or the original because that measured faster, depends on the clock.

    Args:
        error: relative L2 error of the model's floating outputs on held-out batches, greater than 0.

    Raises:
        TargetError: ``error`` is not a positive finite number.
    """

    error: float = 0.1

    def __post_init__(self) -> None:
        if not _is_number(self.error) or self.error <= 0:
            raise TargetError(f"Tolerance({self.error!r}): the error must be a finite number above 0, such as 0.1")

    def __str__(self) -> str:
        return f"Tolerance({self.error:g})"

    def to_json(self) -> dict[str, Any]:
        """The target as JSON data."""
        return {"type": "tolerance", "error": self.error}


@dataclass(frozen=True)
class Keep:
    """The most accurate plan that keeps at most this share of the parameters or of the FLOPs.

    Args:
        params: share of the parameters that may remain, in (0, 1].
        flops: share of the FLOPs that may remain, in (0, 1]; exactly one of the two is given.
        of: ``"model"`` counts everything the model holds or computes, after over before; ``"sites"`` counts the
            weights (or FLOPs) of the layers that can be factored alone.

    Raises:
        TargetError: not exactly one of ``params`` and ``flops``, a share outside (0, 1], or an unknown ``of``.
    """

    params: float | None = None
    flops: float | None = None
    of: Scope = "model"

    def __post_init__(self) -> None:
        given = {name: value for name, value in (("params", self.params), ("flops", self.flops)) if value is not None}
        if len(given) != 1:
            raise TargetError(f"{self!r}: give exactly one of params= and flops=, such as Keep(params=0.5)")
        for name, value in given.items():
            if not _is_number(value) or not 0 < value <= 1:
                raise TargetError(f"Keep({name}={value!r}): the share that may remain must be above 0 and at most 1")
        if self.of not in ("model", "sites"):
            raise TargetError(f"Keep(of={self.of!r}): the legal values are 'model' and 'sites'")

    @property
    def quantity(self) -> Quantity:
        """What is counted: ``"params"`` or ``"flops"``."""
        return "params" if self.params is not None else "flops"

    @property
    def share(self) -> float:
        """The share that may remain, in (0, 1]."""
        share = self.params if self.params is not None else self.flops
        assert share is not None
        return share

    def __str__(self) -> str:
        scope = "" if self.of == "model" else f', of="{self.of}"'
        return f"Keep({self.quantity}={self.share:g}{scope})"

    def to_json(self) -> dict[str, Any]:
        """The target as JSON data."""
        return {"type": "keep", "quantity": self.quantity, "share": self.share, "of": self.of}


Target: TypeAlias = Tolerance | Keep


def target_from_json(data: Any) -> Target:
    """Read a target back from :meth:`Tolerance.to_json` or :meth:`Keep.to_json`.

    Raises:
        TargetError: the data is not of that form.
    """
    try:
        if data["type"] == "tolerance":
            return Tolerance(data["error"])
        if data["type"] == "keep" and data["quantity"] in ("params", "flops"):
            return Keep(**{data["quantity"]: data["share"]}, of=data["of"])
    except (TypeError, KeyError) as error:
        raise TargetError(f"not a target: {data!r} ({error})") from error
    raise TargetError(f"not a target: {data!r}; known types are 'tolerance' and 'keep'")


def check_target(target: object) -> Target:
    """Return ``target`` if it is one.

    Raises:
        TargetError: it is something else, such as a bare number.
    """
    if isinstance(target, Tolerance | Keep):
        return target
    raise TargetError(f"target={target!r} is not a target; use Tolerance(0.1), Keep(params=0.5) or Keep(flops=0.5)")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
