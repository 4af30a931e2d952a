"""The options of ``torch.compile(model, backend="lowrank_fx", options={...})``, validated."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lowrank_fx.arguments import check_names
from lowrank_fx.effort import EffortName, effort_of
from lowrank_fx.errors import LowRankError, OptionError
from lowrank_fx.plan import Plan
from lowrank_fx.targets import Keep, Target, Tolerance

TARGETS = ("tolerance", "keep_params", "keep_flops", "keep_latency")
"""The options that name a target; at most one of them is given."""


@dataclass(frozen=True)
class BackendOptions:
    """What a user may choose.

    Attributes:
        calibration_steps: calls that are sketched before the plan is made, 1 or more.
        target: what is asked for, from ``tolerance``, ``keep_params``, ``keep_flops`` or ``keep_latency``.
        skip: patterns of layers to leave alone, such as ``"*.pooler.*"``.
        effort: how much may be measured for the plan, ``"high"`` or ``"low"``; the call that ends calibration waits
            for it.
        seed: chooses the rows that are sampled.
        inner: the backend that compiles the graphs, by name or as a function.
        plan: a folder that :meth:`LowRankModule.save` wrote (or its ``plan.json``), whose factors are used without any
            calibration; or a :class:`~lowrank_fx.plan.Plan`, whose forms and ranks are used: it holds no factors, so
            calls are still sketched for them, but nothing is searched.
        verbose: print what is logged, and show progress bars.
    """

    calibration_steps: int = 32
    target: Target = field(default_factory=Tolerance)
    skip: tuple[str, ...] = ()
    effort: EffortName = "high"
    seed: int = 0
    inner: str | Callable[..., Any] = "inductor"
    plan: str | Plan | None = None
    verbose: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """The options that a user gave; what is not given has its default.

        Raises:
            OptionError: a name is unknown, or a value is not legal; the message lists the legal ones.
            TargetError: the target's number is not legal.
        """
        given = dict(options or {})
        legal = (*(entry.name for entry in fields(cls) if entry.name != "target"), *TARGETS)
        unknown = [name for name in given if name not in legal]
        if unknown:
            raise OptionError(
                f"options={{{unknown[0]!r}: ...}}: the backend 'lowrank_fx' has no such option; the legal ones are "
                f"{', '.join(sorted(legal))}"
            )
        target = _target({name: given.pop(name) for name in TARGETS if name in given})
        made = cls(**{**given, "target": target, "skip": check_names("skip", given.get("skip", ()))})
        if isinstance(made.plan, os.PathLike):
            made = cls(**{**vars(made), "plan": os.fspath(made.plan)})
        made._check()
        return made

    def _check(self) -> None:
        for name, least in (("calibration_steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{name}={value!r}: give a whole number of at least {least}")
        effort_of(self.effort)
        if not isinstance(self.verbose, bool):
            raise OptionError(f"verbose={self.verbose!r}: give True or False")
        if not (isinstance(self.inner, str) or callable(self.inner)) or self.inner == "lowrank_fx":
            raise OptionError(
                f"inner={self.inner!r}: give another backend of torch.compile, by its name or as a function"
            )
        if not isinstance(self.plan, str | Plan | None):
            raise OptionError(
                f"plan={self.plan!r:.80}: give the folder of a saved model, its plan.json, or a lowrank_fx.Plan"
            )


def _target(given: Mapping[str, Any]) -> Target:
    if len(given) > 1:
        raise OptionError(f"{', '.join(given)} are several targets; give one of {', '.join(TARGETS)}")
    if not given:
        return Tolerance()
    ((name, value),) = given.items()
    if name == "tolerance":
        return Tolerance(value)
    quantity = name.removeprefix("keep_")
    if quantity not in {entry.name for entry in fields(Keep)}:
        raise OptionError(f"{name}={value!r}: this version of lowrank_fx has no target of that kind; use keep_flops")
    try:
        return Keep(**{quantity: value})
    except TypeError as error:
        raise LowRankError(f"{name}={value!r}: {error}") from error
