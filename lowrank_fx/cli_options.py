"""What the commands of ``lowrank-fx`` have in common: their options, and the target that some of them name.

Nothing of torch is imported before a command runs.
"""

from __future__ import annotations

import functools
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_fx.errors import OptionError

if TYPE_CHECKING:
    from lowrank_fx.targets import Target

target_option = functools.partial(typer.Option, rich_help_panel="Target (at most one)")
"""An option in the panel of ``--help`` that targets stand in."""


class EffortChoice(StrEnum):
    """How much may be measured for a plan."""

    low = "low"
    high = "high"


class Scope(StrEnum):
    """What a share to keep counts."""

    model = "model"
    sites = "sites"


Debug = Annotated[bool, typer.Option("--debug", metavar="", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--no-progress", metavar="", help="Print the results alone.")]
Compile = Annotated[
    bool,
    typer.Option("--compile/--no-compile", metavar="", help="Compile the models, and measure them compiled."),
]
Frozen = Annotated[
    bool,
    typer.Option("--frozen", metavar="", help="Compile the models with their weights as constants, for inference."),
]
Model = Annotated[
    str | None,
    typer.Option(metavar="MODULE:FACTORY", help="The original model; by default the one that DIR names."),
]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page too.")]
SkipPatterns = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Layers to leave alone, such as '*.pooler.*'. May be repeated."),
]
Work = Annotated[
    EffortChoice,
    typer.Option("--effort", help="How much may be measured for the plan. low is several times as fast."),
]
Seed = Annotated[int, typer.Option(help="Chooses which rows are sampled. Same seed, same plan.")]
WithinError = Annotated[
    float | None,
    target_option(
        metavar="ERROR",
        help="Cheapest plan within this relative error of the output. This is the default, at 0.1.",
    ),
]
KeepParams = Annotated[
    float | None,
    target_option(
        metavar="SHARE",
        help="Most accurate plan that keeps this share of the parameters, such as 0.5.",
    ),
]
KeepFlops = Annotated[
    float | None,
    target_option(
        metavar="SHARE",
        help="Most accurate plan that keeps this share of the FLOPs, such as 0.6.",
    ),
]


def check_frozen(frozen: bool, *, compile: bool) -> bool:
    """Return whether weights are to be frozen.

    Raises:
        OptionError: they are, but nothing is compiled.
    """
    if frozen and not compile:
        raise OptionError("--frozen says how the models are compiled; leave out --no-compile, or --frozen")
    return frozen


def chosen_target(
    *,
    tolerance: float | None,
    params: float | None,
    flops: float | None,
    latency: float | None = None,
    of: Scope | None = None,
    metric: str | None = None,
    max_drop: float | None = None,
    regauge: bool = False,
) -> Target:
    """The one target of a command line.

    Raises:
        OptionError: more than one is given, ``--of`` without a share, ``--regauge`` without
            ``--keep-params``, or one of ``--metric`` and ``--max-drop`` alone.
        TargetError: a value is not legal.
    """
    from lowrank_fx.origin import resolve
    from lowrank_fx.targets import Keep, Metric, Tolerance

    options = {
        "--tolerance": tolerance,
        "--keep-params": params,
        "--keep-flops": flops,
        "--keep-latency": latency,
    }
    given = [f"{name} {value:g}" for name, value in options.items() if value is not None]
    if metric is not None:
        given.append(f"--metric {metric}")
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)}: give one target, not {len(given)}")
    if max_drop is not None and metric is None:
        raise OptionError(f"--max-drop {max_drop:g} says how much a metric may drop; use it with --metric")
    if regauge and params is None:
        raise OptionError("--regauge saves parameters; use it with --keep-params")
    if params is None and flops is None and latency is None:
        if of is not None:
            keeps = "--keep-params, --keep-flops or --keep-latency"
            raise OptionError(f"--of {of.value} says what a share counts; use it with {keeps}")
        if metric is not None:
            if max_drop is None:
                raise OptionError(f"--metric {metric} needs --max-drop DROP: how much lower it may be, such as 0.01")
            return Metric(resolve(metric, "--metric"), max_drop)
        return Tolerance() if tolerance is None else Tolerance(tolerance)
    counted = Scope.model if of is None else of
    return Keep(params=params, flops=flops, latency=latency, of=counted.value, regauge=regauge)
