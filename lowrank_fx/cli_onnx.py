"""The command ``lowrank-fx onnx-compress``; ``cli.py`` gives it its place.

Nothing of torch is imported before it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowrank_fx.cli_options import (
    Debug,
    EffortChoice,
    Html,
    KeepFlops,
    KeepParams,
    Quiet,
    Seed,
    SkipPatterns,
    WithinError,
    Work,
    chosen_target,
)
from lowrank_fx.cli_saved import write_page


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
    tolerance: WithinError = None,
    keep_params: KeepParams = None,
    keep_flops: KeepFlops = None,
    skip: SkipPatterns = None,
    effort: Work = EffortChoice.high,
    seed: Seed = 0,
    html: Html = None,
    no_progress: Quiet = False,
    debug: Debug = False,
) -> None:
    r"""Factor the MatMul, Gemm and Conv nodes of an ONNX file; no PyTorch model is needed.

    Modules are looked for in the current folder first. Needs the extra: pip install "lowrank_fx\[onnx]"

    Example:  [bold]lowrank-fx onnx-compress in.onnx out.onnx --data zoo:make_loader --keep-params 0.6[/bold]
    """
    from lowrank_fx import onnx_frontend
    from lowrank_fx.origin import named_batches

    target = chosen_target(tolerance=tolerance, params=keep_params, flops=keep_flops)
    batches = named_batches(data, "--data")
    made = onnx_frontend.onnx_compress(
        source, goal, batches, target, skip=skip or (), effort=effort.value, seed=seed, progress=not no_progress
    )
    report = made.report()
    typer.echo(str(report))
    typer.echo(f"\n{made.path} was written; its error on held-out rows in onnxruntime is {made.error:.3g}.")
    if html is not None:
        write_page(html, report.to_html())
