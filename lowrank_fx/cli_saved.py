"""The commands of ``lowrank-fx`` that work on a saved model: its report, its comparison, its export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_fx.cli_options import Compile, Debug, Frozen, Html, Model, check_frozen
from lowrank_fx.errors import OptionError


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What optimize wrote.", show_default=False)],
    html: Html = None,
    debug: Debug = False,
) -> None:
    """Print the report of a saved model; no weights are read."""
    from lowrank_fx.report import Report
    from lowrank_fx.storage import read_plan, read_speeds

    made = Report(*read_plan(folder), read_speeds(folder))
    typer.echo(str(made))
    if html is not None:
        write_page(html, made.to_html())


def compare(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What optimize or a demo wrote.", show_default=False)],
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="MODULE:LOADER", help="Batches to compare on; by default those that DIR names."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the comparison as one HTML page too.")
    ] = None,
    compile: Compile = True,
    frozen: Frozen = False,
    debug: Debug = False,
) -> None:
    """Compare a saved model with its original: outputs, size and speed.

    Run it in the folder that DIR was made in, or say with --model where the original is. Give --data batches that were
    not calibrated on.
    """
    from lowrank_fx.comparison import compare_models
    from lowrank_fx.origin import ORIGIN_FILE, named_batches
    from lowrank_fx.pipeline import load

    check_frozen(frozen, compile=compile)
    origin, original = _original(folder, model, {"--data MODULE:LOADER": data})
    if data is not None:
        batches = named_batches(data, "--data")
    else:
        assert origin is not None
        batches = named_batches(
            origin.data, f"{folder / ORIGIN_FILE}: data", "; run this where DIR was made, or give --data MODULE:LOADER"
        )
    optimized = load(original, folder, compile=compile, frozen=frozen)
    made = compare_models(original, optimized, batches, compile=compile)
    typer.echo(str(made))
    if data is None and origin is not None and not origin.fresh:
        typer.echo("\nThese are the batches it was calibrated on; give --data others for the error on fresh data.")
    if html is not None:
        write_page(html, made.to_html())


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What optimize or a demo wrote.", show_default=False)],
    onnx: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it as ONNX.", rich_help_panel="Formats (at least one)"),
    ] = None,
    pt2: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write it as an exported program, for torch.export.load.",
            rich_help_panel="Formats (at least one)",
        ),
    ] = None,
    aoti: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Compile it to a package for this processor, by AOTInductor.",
            rich_help_panel="Formats (at least one)",
        ),
    ] = None,
    torchscript: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write it as TorchScript, which torch has deprecated.",
            rich_help_panel="Formats (at least one)",
        ),
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", metavar="", help="Write one dense operator per layer instead of its factors.")
    ] = False,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:LOADER", help="Batches whose first one the file is checked with; by default random values."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    r"""Write a saved model for another runtime, and check there that it computes the same.

    Run it in the folder that DIR was made in, or say with --model where the original is.
    ONNX needs the extra: pip install "lowrank_fx\[onnx]"

    Example:  [bold]lowrank-fx export out/ --onnx model.onnx[/bold]
    """
    import warnings

    from lowrank_fx.origin import named_batches
    from lowrank_fx.pipeline import load

    formats = {"onnx": onnx, "pt2": pt2, "aoti": aoti, "torchscript": torchscript}
    if not any(formats.values()):
        raise OptionError(f"give at least one of {', '.join(f'--{name} FILE' for name in formats)}")
    _, original = _original(folder, model)
    example = None if data is None else next(iter(named_batches(data, "--data")), None)
    if data is not None and example is None:
        raise OptionError(f"--data {data!r} gave no batch")
    made = load(original, folder, compile=False)
    for name, path in formats.items():
        if path is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the help says it
                typer.echo(str(getattr(made, f"export_{name}")(path, fold=fold, example=example)))


def _original(folder: Path, model: str | None, others: Mapping[str, str | None] | None = None) -> tuple[Any, Any]:
    """What a folder was made from, or None, and the original model.

    Args:
        folder: what optimize or a demo wrote.
        model: the option that names the original; None for the one that the folder names.
        others: more options that the folder could answer, with what was given.

    Raises:
        OptionError: the folder names no model, or does not answer one of ``others`` that was not given.
        StorageError: the folder holds no plan.
    """
    from lowrank_fx.origin import ORIGIN_FILE, named_model, original_model, read_origin
    from lowrank_fx.storage import read_plan

    read_plan(folder)
    origin = read_origin(folder)
    for option, value in {"--model MODULE:FACTORY": model, **(others or {})}.items():
        if value is None and origin is None:
            raise OptionError(f"{folder} has no {ORIGIN_FILE} that says what it was made from; give {option}")
    if model is not None:
        return origin, named_model(model, "--model")
    assert origin is not None
    return origin, original_model(origin, folder, "; run this where DIR was made, or give --model MODULE:FACTORY")


def write_page(path: Path, page: str) -> None:
    """Write a page, and say so."""
    from lowrank_fx._files import write_atomic

    write_atomic(path, page.encode())
    typer.echo(f"\n{path} shows this as a page.")
