"""The plan: per site a form, a rank, what they cost and what they are predicted to do. Frozen, versioned JSON.

A plan holds no tensor and no timing, so the same seed, model and data give the same plan byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from lowrank_fx._files import parse_json
from lowrank_fx.errors import PlanError, TargetError
from lowrank_fx.forms import ACTIVATION, DENSE, FORMS, SHARED
from lowrank_fx.sites import LeftAlone
from lowrank_fx.targets import Target, target_from_json

PLAN_VERSION = 4

OLDEST_VERSION = 3
"""Plans from this version on can be read. A new field takes a new version, and a default, which older plans have."""


@dataclass(frozen=True)
class SitePlan:
    """What becomes of one site.

    Attributes:
        name: the site's fully qualified name.
        weight: fully qualified name of its weight.
        form: a form's name, or ``"dense"``.
        rank: the rank, or None where dense.
        out_features: rows of the weight as a matrix.
        in_features: columns of the weight as a matrix.
        params: weights before and after.
        flops: FLOPs before and after, at the shape of the first calibration batch.
        error: relative error of the layer's own output on the sketched rows, for the factors as stored: the lower end
            of what the sketch certifies.
        bound: the upper end; the two differ by rounding unless the tap was sketched.
        effect: predicted relative error of the model's output if this site alone is factored.
        reason: why it stays dense; empty where it is factored.
        basis: what chose the directions that are kept: ``"activation"``, the outputs' ``"gradient"`` besides, or
            ``"shared"`` for layers with one first factor, which the first of them pays for.
        pivots: the first of the inputs, next to each other, the pivots of a re-gauged pair; None for any other.
        gathered: a re-gauged pair gathers its inputs, and ``pivots`` counts in the order that this gives.
        shares: the name of the site whose first factor it uses; None where it has its own.
    """

    name: str
    weight: str
    form: str
    rank: int | None
    out_features: int
    in_features: int
    params: tuple[int, int]
    flops: tuple[int, int]
    error: float
    bound: float
    effect: float
    reason: str
    basis: str = ACTIVATION
    pivots: int | None = None
    gathered: bool = False
    shares: str | None = None

    @property
    def factored(self) -> bool:
        """Whether the site is replaced by a pair."""
        return self.form != DENSE


@dataclass(frozen=True)
class Totals:
    """Parameters and FLOPs before and after, of the whole model and of the sites' weights alone.

    FLOPs are those of the captured graph at the shape of the first calibration batch.
    """

    model_params: tuple[int, int]
    model_flops: tuple[int, int]
    site_params: tuple[int, int]
    site_flops: tuple[int, int]

    def kept(self, quantity: str, of: str) -> float:
        """After over before, for ``quantity`` in ``params``/``flops`` and ``of`` in ``model``/``sites``."""
        before, after = getattr(self, f"{'model' if of == 'model' else 'site'}_{quantity}")
        return after / before if before else 1.0


@dataclass(frozen=True)
class TradeOff:
    """One point of the trade-off curve: a share kept and the error predicted for it."""

    params: float
    flops: float
    error: float


@dataclass(frozen=True)
class MetricPoint:
    """A plan that was scored.

    Attributes:
        kept: the share of the model that it keeps.
        error: on the select half.
        value: its metric; None where that was not finite, which JSON has no number for.
    """

    kept: float
    error: float
    value: float | None

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            object.__setattr__(self, "value", None)


@dataclass(frozen=True)
class MetricSearch:
    """What a search by the user's metric saw.

    Attributes:
        before: the original's metric.
        after: the metric of this plan.
        points: every other evaluation, in order; shares are of what the target makes small, or
            of the FLOPs where that is time.
    """

    before: float
    after: float
    points: tuple[MetricPoint, ...]

    @property
    def evaluations(self) -> int:
        """How often the metric was asked for, the original included."""
        return 1 + len(self.points)


@dataclass(frozen=True)
class Refinement:
    """What refinement did.

    Attributes:
        steps: that were done.
        best_step: after how many of them the state was best that came back; 0 if none lowered the held-out error.
        before: error on the select half before the first step.
        after: error on the select half of what came back.
        options: of refinement, as JSON.
    """

    steps: int
    best_step: int
    before: float
    after: float
    options: str


@dataclass(frozen=True)
class Plan:
    """A plan for one model.

    Attributes:
        target: what was asked for.
        planner: the planner's name.
        candidate: which candidate allocation won on held-out data, and the errors of all.
        seed: the seed of calibration.
        sites: in graph order.
        left_alone: weights that are no sites, with the reason.
        cleanup: what was folded before sites were found (batch norms, constants).
        notes: what else a user should know.
        totals: parameters and FLOPs before and after.
        predicted_error: joint error predicted from the sites' effects.
        select_error: joint error on the held-out half that candidates were compared on.
        error: joint error on the other held-out half; the one to report.
        candidates: candidate allocation -> its error on the select half, at the budget chosen.
        curve: trade-off curve, predicted.
        metric: what the search by a metric saw; None for other targets.
        refinement: what refinement did; None where none was asked for.
    """

    target: Target
    planner: str
    candidate: str
    seed: int
    sites: tuple[SitePlan, ...]
    left_alone: tuple[LeftAlone, ...]
    cleanup: tuple[str, ...]
    notes: tuple[str, ...]
    totals: Totals
    predicted_error: float
    select_error: float
    error: float
    candidates: tuple[tuple[str, float], ...]
    curve: tuple[TradeOff, ...]
    metric: MetricSearch | None = None
    refinement: Refinement | None = None

    @property
    def factored(self) -> tuple[SitePlan, ...]:
        """The sites that are replaced by pairs."""
        return tuple(site for site in self.sites if site.factored)

    def to_json(self) -> str:
        """Canonical JSON: the same plan gives the same bytes."""
        data = {
            "version": PLAN_VERSION,
            **{entry.name: _plain(getattr(self, entry.name)) for entry in dataclasses.fields(self)},
        }
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back.

        Raises:
            PlanError: the text is no plan of a version that is known; the message says where.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise PlanError(f"a plan is not JSON: {error}") from error
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Any) -> Plan:
        """Read a plan from the JSON data of :meth:`to_json`.

        Raises:
            PlanError: the data is no plan of a version that is known; the message says where.
        """
        version = data.get("version") if isinstance(data, dict) else type(data).__name__
        if type(version) is int and version > PLAN_VERSION:
            raise PlanError(
                f"a plan of version {PLAN_VERSION} is expected, this one says {version!r}: it was made by a newer "
                "lowrank_fx; upgrade lowrank_fx to read it"
            )
        if type(version) is not int or version < OLDEST_VERSION:
            raise PlanError(f"a plan of version {PLAN_VERSION} is expected, this one says {version!r:.60}")
        fields = {name: value for name, value in data.items() if name != "version"}
        plan: Plan = _read(fields, cls, "plan", version == PLAN_VERSION)
        by_name = {site.name: site for site in plan.sites}
        outputs: Counter[str] = Counter()
        for site in plan.sites:
            outputs[site.shares or site.name] += site.out_features
        for site in plan.sites:
            _check_site(site, outputs[site.shares or site.name])
            if site.shares is not None:
                _check_sharing(site, by_name.get(site.shares))
        return plan


def _read(data: Any, kind: Any, where: str, complete: bool) -> Any:
    """JSON data as a value of the type ``kind``: a dataclass by its fields, a tuple, a number, a text.

    Args:
        data: the data.
        kind: the type.
        where: its place, for messages.
        complete: whether fields that have a default must be there too, as they are in a plan of this version.
    """
    if kind == Target:
        try:
            target = target_from_json(data)
        except TargetError as error:
            raise PlanError(f"a plan is malformed: {where}: {error}") from error
        unknown = sorted(data.keys() - target.to_json().keys())
        if unknown:
            raise PlanError(f"a plan is malformed: {where} has an unknown {unknown[0][:60]!r}")
        return target
    if isinstance(kind, UnionType) and isinstance(data, dict):
        kind = next((member for member in get_args(kind) if dataclasses.is_dataclass(member)), kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(data, dict):
        kinds = get_type_hints(kind)
        newer = () if complete else [each.name for each in dataclasses.fields(kind) if _has_default(each)]
        wrong = sorted((data.keys() ^ kinds.keys()) - (set(newer) - data.keys()))
        if wrong:
            word = "lacks" if wrong[0] in kinds else "has an unknown"
            raise PlanError(f"a plan is malformed: {where} {word} {wrong[0][:60]!r}")
        return kind(**{name: _read(data[name], kinds[name], f"{where}.{name}", complete) for name in data})
    if get_origin(kind) is tuple and isinstance(data, list):
        members = get_args(kind)
        members = members[:1] * len(data) if members[-1] is Ellipsis else members
        if len(members) == len(data):
            return tuple(_read(data[i], members[i], f"{where}[{i}]", complete) for i in range(len(data)))
    allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    is_number = type(data) is int or (type(data) is float and math.isfinite(data))
    if (is_number and float in allowed) or (type(data) is not float and type(data) in allowed):
        return data
    raise PlanError(f"a plan is malformed: {where} is {repr(data)[:60]}, which is no {getattr(kind, '__name__', kind)}")


def _has_default(entry: dataclasses.Field[Any]) -> bool:
    return entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING


def _check_site(site: SitePlan, outputs: int) -> None:
    """That an entry makes sense by itself; layers with its first factor have so many ``outputs`` together."""
    if min(site.out_features, site.in_features) < 1 or min(*site.params, *site.flops) < 0:
        raise PlanError(f"site {site.name!r}: its sizes, weights or FLOPs are no counts")
    if site.form != DENSE and site.form not in FORMS:
        raise PlanError(f"site {site.name!r}: no form is called {site.form!r}; there are {[DENSE, *FORMS]}")
    # Between two convolutions that share the kernel's positions there may be more channels than outputs, and in a first
    # factor that several layers share, as many rows as they have outputs together.
    most = outputs if site.basis == SHARED else site.out_features
    limit = min(most, site.in_features) if site.form in ("lowrank", "channel") else site.in_features
    if site.factored and not (site.rank is not None and 1 <= site.rank <= limit):
        raise PlanError(f"site {site.name!r}: rank {site.rank!r} is not between 1 and {limit}")
    if site.basis == SHARED and site.form != "lowrank":
        raise PlanError(f"site {site.name!r}: layers with the form {site.form!r} cannot have one first factor")
    if not site.factored and site.rank is not None:
        raise PlanError(f"site {site.name!r}: it stays dense, yet has the rank {site.rank}")
    if site.pivots is None:
        if site.gathered:
            raise PlanError(f"site {site.name!r}: its inputs are gathered, yet it has no pivots")
        return
    last = site.in_features - (site.rank or 0)
    if site.form != "lowrank" or not 0 <= site.pivots <= last:
        raise PlanError(f"site {site.name!r}: pivots at {site.pivots} are not those of a pair, between 0 and {last}")


def _check_sharing(site: SitePlan, owner: SitePlan | None) -> None:
    if owner is None or owner.shares is not None:
        raise PlanError(f"site {site.name!r}: it uses the first factor of {site.shares!r}, which has none of its own")
    both = [(each.form, each.rank, each.in_features, each.pivots) for each in (site, owner)]
    if both[0] != both[1] or site.form != "lowrank" or site.pivots is not None:
        raise PlanError(f"site {site.name!r}: it cannot use the first factor of {site.shares!r}, which is another")


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: _plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
