"""What a user asks for.

:class:`Tolerance` says how much error is allowed, :class:`Keep` how much may remain, :class:`Metric` how much a measure
of the user's own may drop. A target is a frozen value with a versioned JSON form; the planner turns it into ranks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import numpy as np
from torch import Tensor, nn

from lowrank_fx.errors import TargetError

Scope: TypeAlias = Literal["model", "sites"]
Quantity: TypeAlias = Literal["params", "flops"]
CostKind: TypeAlias = Literal["params", "flops", "latency"]


@dataclass(frozen=True)
class Tolerance:
    """The cheapest plan (fewest FLOPs) whose error on held-out batches is at most ``error``.

    It is held to that on the half of the held-out rows that chooses among plans; the other half reports. A model that
    is going to be compiled is factored only where that measured faster, and, compiled or not, the original comes back
    if no plan measured faster as a whole: what is returned depends on the clock.

    Args:
        error: relative error of the model's floating outputs on held-out batches, greater than 0: by L2, or by the
            ``loss_fn`` that was asked for.

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
    """The most accurate plan that keeps at most this share of the parameters, of the FLOPs, or of the time.

    A share of parameters or FLOPs is obeyed whether or not it makes the model faster, and the plan depends on no clock.
    A share of the time is made of measured times of the layers, dense and factored, on the device at hand: a layer is
    factored only where that measured faster, and the plan depends on the clock.

    Args:
        params: share of the parameters that may remain, in (0, 1].
        flops: share of the FLOPs that may remain, in (0, 1].
        of: ``"model"`` counts everything the model holds or computes, after over before; ``"sites"`` counts the
            weights (or FLOPs, or time) only of the layers that can be factored.
        regauge: only with ``params``: the pairs of linear layers in float32 and float64 are *re-gauged*, which takes
            r^2 of their r (m + n) numbers away without changing what they compute, and so buys higher ranks
            (``gauge.py``). They round about ten times as much as plain ones: leave it off for a model that is going to
            run in half precision or under autocast.
        latency: share of the original's time that may remain on the first calibration batch, in (0, 1], both compiled
            if the result is, to within the standard error of the measurement; a model that misses it says so in a note.
            Exactly one of the three is given.

    Raises:
        TargetError: not exactly one of ``params``, ``flops`` and ``latency``, a share outside (0, 1], an unknown
            ``of``, or ``regauge`` without ``params``.
    """

    params: float | None = None
    flops: float | None = None
    of: Scope = "model"
    regauge: bool = False
    latency: float | None = None

    def __post_init__(self) -> None:
        given = self._given
        if len(given) != 1:
            raise TargetError(f"{self!r}: give exactly one of params=, flops= and latency=, such as Keep(params=0.5)")
        for name, value in given.items():
            if not _is_number(value) or not 0 < value <= 1:
                raise TargetError(f"Keep({name}={value!r}): the share that may remain must be above 0 and at most 1")
        if self.of not in ("model", "sites"):
            raise TargetError(f"Keep(of={self.of!r}): the legal values are 'model' and 'sites'")
        if not isinstance(self.regauge, bool):
            raise TargetError(f"Keep(regauge={self.regauge!r}): give True or False")
        if self.regauge and self.params is None:
            raise TargetError(
                f"Keep({self.quantity}={self.share!r}, regauge=True): re-gauging saves parameters; use it with "
                "params=, as in Keep(params=0.5, regauge=True)"
            )

    @property
    def quantity(self) -> CostKind:
        """What is counted: ``"params"``, ``"flops"`` or ``"latency"``."""
        return next(iter(self._given))

    @property
    def share(self) -> float:
        """The share that may remain, in (0, 1]."""
        return next(iter(self._given.values()))

    @property
    def _given(self) -> dict[CostKind, float]:
        shares: dict[CostKind, float | None] = {"params": self.params, "flops": self.flops, "latency": self.latency}
        return {name: share for name, share in shares.items() if share is not None}

    def __str__(self) -> str:
        scope = "" if self.of == "model" else f', of="{self.of}"'
        regauge = ", regauge=True" if self.regauge else ""
        return f"Keep({self.quantity}={self.share:g}{scope}{regauge})"

    def to_json(self) -> dict[str, Any]:
        """The target as JSON data."""
        return {"type": "keep", "quantity": self.quantity, "share": self.share, "of": self.of, "regauge": self.regauge}


@dataclass(frozen=True)
class Metric:
    """The cheapest plan found under which a metric of the user's own drops by at most ``max_drop``.

    The original is scored first, then plans that a search proposes, each one once and with the very factors that would
    be returned; one that drops the metric by more is never returned, nor is one whose metric is not finite or
    overflows, as a perplexity may. ``fn`` should measure on data that was not
    calibrated on. Two metrics are equal if all that JSON keeps of them is: the function counts by its name.

    Args:
        fn: a function from a model to its metric. It gets an ``nn.Module`` that is called like the user's model (eager,
            under ``torch.no_grad``, random numbers seeded alike every time) and owns its tensors, and returns a finite
            number; a tensor or array of one element is one.
        max_drop: how much worse the metric may be than the original's, in its own unit (not a share); 0 or more.
        of: what is made small, ``"flops"``, ``"params"`` or ``"latency"``: the time on the first calibration batch, by
            the measured times of the layers.
        evaluations: how often ``fn`` is called at most, the call for the original included; 2 or more.
        higher_is_better: False for a metric that falls as a model gets better, such as perplexity.

    Attributes:
        name: the function's qualified name, with its module.

    Raises:
        TargetError: an argument is not legal.
    """

    fn: Callable[[nn.Module], object] = field(repr=False, compare=False)
    max_drop: float
    _: KW_ONLY
    of: CostKind = "flops"
    evaluations: int = 12
    higher_is_better: bool = True
    name: str = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.fn) or isinstance(self.fn, nn.Module):
            raise TargetError(
                f"Metric({self.fn!r}): give a function from a model to a number, as in Metric(accuracy, max_drop=0.01)"
            )
        object.__setattr__(self, "name", _qualified_name(self.fn))
        if not _is_number(self.max_drop) or self.max_drop < 0:
            raise TargetError(
                f"Metric({self._short}, max_drop={self.max_drop!r}): the drop must be a finite number, 0 or more, "
                "in the metric's own unit, such as 0.01"
            )
        if self.of not in get_args(CostKind):
            raise TargetError(f"Metric(of={self.of!r}): the legal values are 'flops', 'params' and 'latency'")
        if not isinstance(self.evaluations, int) or isinstance(self.evaluations, bool) or self.evaluations < 2:
            raise TargetError(
                f"Metric(evaluations={self.evaluations!r}): give a whole number of at least 2; the original takes one"
            )
        if not isinstance(self.higher_is_better, bool):
            raise TargetError(f"Metric(higher_is_better={self.higher_is_better!r}): give True or False")

    @property
    def quantity(self) -> CostKind:
        """What is made small: ``"params"``, ``"flops"`` or ``"latency"``."""
        return self.of

    @property
    def recorded(self) -> Quantity:
        """The quantity whose share a plan records for each score: FLOPs for time, since no plan holds a time."""
        return "flops" if self.of == "latency" else self.of

    def drop(self, before: float, after: float) -> float:
        """How much worse ``after`` is than ``before``, in the metric's own unit; negative where it is better."""
        return before - after if self.higher_is_better else after - before

    def holds(self, before: float, after: float) -> bool:
        """Whether ``after`` is within the drop; what a sum of two floats rounds away does not count."""
        if not math.isfinite(after):
            return False
        rounding = 2 * np.finfo(np.float64).eps * max(abs(before), abs(after), self.max_drop)
        return bool(self.drop(before, after) <= self.max_drop + rounding)

    def score(self, model: nn.Module, plan: str, *, original: bool = False) -> float:
        """The metric of a model; infinitely bad for a plan where it overflows or is not finite.

        Args:
            model: what ``fn`` is called with.
            plan: what the model is, in words, for messages.
            original: it is the original, whose metric has to be finite.

        Raises:
            TargetError: ``fn`` raised another error than an arithmetic one, or returned something other than a number;
                for the original also where it raised any, or returned a number that is not finite.
        """
        worst = -math.inf if self.higher_is_better else math.inf
        try:
            value = self.fn(model)
        except TargetError:  # a metric that was read from JSON says so itself
            raise
        except Exception as error:
            if isinstance(error, ArithmeticError) and not original:
                return worst
            raise TargetError(f"the metric {self.name} failed for {plan}: {type(error).__name__}: {error}") from error
        # Arrays and tensors are read by what they hold; anything else that offers item() is not known to be a number.
        one = isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1
        number = value.item() if one else value  # type: ignore[attr-defined]
        if isinstance(number, int | float) and _fits(number):
            return float(number)
        if isinstance(number, int | float) and not original:
            return worst
        raise TargetError(f"the metric {self.name} returned {value!r:.80} for {plan}; it must return a finite number")

    @property
    def _short(self) -> str:
        return self.name.rpartition(".")[2]

    def __str__(self) -> str:
        given = [self._short, f"max_drop={self.max_drop:g}"]
        if self.of != "flops":
            given.append(f'of="{self.of}"')
        if self.evaluations != 12:
            given.append(f"evaluations={self.evaluations}")
        if not self.higher_is_better:
            given.append("higher_is_better=False")
        return f"Metric({', '.join(given)})"

    def to_json(self) -> dict[str, Any]:
        """The target as JSON data; of the function only its name."""
        return {
            "type": "metric",
            "fn": self.name,
            "max_drop": self.max_drop,
            "of": self.of,
            "evaluations": self.evaluations,
            "higher_is_better": self.higher_is_better,
        }


@dataclass(frozen=True)
class _NameOnly:
    """Stands for the function of a metric that was read from JSON."""

    name: str

    def __call__(self, model: nn.Module) -> NoReturn:
        """Raise :class:`TargetError`: the function itself is not known."""
        raise TargetError(
            f"the metric {self.name} was read from JSON, which keeps its name alone; give the function again, as in "
            f"Metric({self.name.rpartition('.')[2]}, max_drop=...)"
        )


Target: TypeAlias = Tolerance | Keep | Metric


def target_from_json(data: Any) -> Target:
    """Read a target back from :meth:`Tolerance.to_json`, :meth:`Keep.to_json` or :meth:`Metric.to_json`.

    A metric comes back without its function: it prints and compares, but scoring with it raises ``TargetError``.

    Raises:
        TargetError: the data is not of that form.
    """
    try:
        if data["type"] == "tolerance":
            return Tolerance(data["error"])
        if data["type"] == "keep" and data["quantity"] in get_args(CostKind):
            return Keep(**{data["quantity"]: data["share"]}, of=data["of"], regauge=data["regauge"])
        if data["type"] == "metric" and isinstance(data["fn"], str):
            options = {name: data[name] for name in ("of", "evaluations", "higher_is_better")}
            return Metric(_NameOnly(data["fn"]), data["max_drop"], **options)
    except (TypeError, KeyError) as error:
        raise TargetError(f"not a target: {data!r} ({error})") from error
    raise TargetError(f"not a target: {data!r}; known types are 'tolerance', 'keep' and 'metric'")


def check_target(target: object) -> Target:
    """Return ``target`` if it is one.

    Raises:
        TargetError: it is something else, such as a bare number.
    """
    if isinstance(target, Tolerance | Keep | Metric):
        return target
    raise TargetError(
        f"target={target!r} is not a target; use Tolerance(0.1), Keep(params=0.5), Keep(flops=0.5), "
        "Keep(latency=0.7) or Metric(accuracy, max_drop=0.01)"
    )


def obeys_speed(target: Target) -> bool:
    """Whether a target never returns a slower model; any other obeys its budget, and the report says what it costs."""
    return not isinstance(target, Keep) or target.latency is not None


def asks_for_time(target: Target) -> bool:
    """Whether it is the time itself that a target keeps a share of, or makes small."""
    return isinstance(target, Keep | Metric) and target.quantity == "latency"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(number: float) -> bool:
    """Whether a number is finite as a float; an integer may be too large."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _qualified_name(fn: Callable[..., object]) -> str:
    """Where a function is defined; that of its class for any other callable."""
    if isinstance(fn, _NameOnly):
        return fn.name
    while isinstance(fn, functools.partial):
        fn = fn.func
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}.{named.__qualname__}"
