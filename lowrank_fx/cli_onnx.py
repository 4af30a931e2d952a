"""The command ``lowrank-fx onnx-compress``; ``cli.py`` gives it its place.

Nothing of torch is imported before it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_fx.cli_saved import Debug, write_page
from lowrank_fx.errors import OptionError

PANEL = "Target (at most one)"


def onnx_compress(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="The file to compress.", show_default=False)],
    goal: Annotated[Path, typer.Argument(metavar="OUT.onnx", help="Where the result goes.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="MODULE:LOADER",
            help="Calibration batches: an iterable, or a function that returns one; dictionaries by the inputs' names, "
            "tuples in their order, or the one input.",
        ),
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR",
            help="Cheapest plan within this relative error of the output. This is the default, at 0.1.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    keep_params: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Most accurate plan that keeps this share of the parameters.", rich_help_panel=PANEL
        ),
    ] = None,
    keep_flops: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Most accurate plan that keeps this share of the FLOPs.", rich_help_panel=PANEL
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Layers to leave alone, such as '*.pooler.*'. May be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Chooses which rows are sampled. Same seed, same plan.")] = 0,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one HTML page too.")] = None,
    no_progress: Annotated[bool, typer.Option("--no-progress", metavar="", help="Print the results alone.")] = False,
    debug: Debug = False,
) -> None:
    r"""Factor the MatMul, Gemm and Conv nodes of an ONNX file; no PyTorch model is needed.

    Modules are looked for in the current folder first. Needs the extra: pip install "lowrank_fx\[onnx]"

    Example:  [bold]lowrank-fx onnx-compress in.onnx out.onnx --data zoo:make_loader --keep-params 0.6[/bold]
    """
    from lowrank_fx import onnx_frontend
    from lowrank_fx.origin import named_batches
    from lowrank_fx.targets import Keep, Target, Tolerance

    options = {"--tolerance": tolerance, "--keep-params": keep_params, "--keep-flops": keep_flops}
    given = [f"{name} {value:g}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)}: give one target, not {len(given)}")
    target: Target = Tolerance() if tolerance is None else Tolerance(tolerance)
    if keep_params is not None or keep_flops is not None:
        target = Keep(params=keep_params, flops=keep_flops)
    batches = named_batches(data, "--data")
    made = onnx_frontend.onnx_compress(
        source, goal, batches, target, skip=skip or (), seed=seed, progress=not no_progress
    )
    report = made.report()
    typer.echo(str(report))
    typer.echo(f"\n{made.path} was written; its error on held-out rows in onnxruntime is {made.error:.3g}.")
    if html is not None:
        write_page(html, report.to_html())
