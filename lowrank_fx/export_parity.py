"""EXPORT: whether a file computes what the model does, and the way a file comes to its place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_fx.compare import relative_error
from lowrank_fx.errors import ExportError

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
"""The relative L2 error that is allowed, by the coarsest dtype.

Half precision rounds every value in between to eps / 2, and runtimes keep other values in between than torch does: 8
eps is what a few hundred independent roundings come to (sqrt(256) eps / 2). Single precision may differ by more
roundings, since runtimes sum in other orders: 84 eps.
"""


def coarsest_dtype(module: nn.Module, inputs: Sequence[Tensor]) -> torch.dtype:
    """The least precise dtype among a model's parameters and inputs that :data:`TOLERANCES` has; float32 if none is."""
    found = {each.dtype for each in (*module.parameters(), *inputs)} & TOLERANCES.keys()
    return max(found, key=TOLERANCES.__getitem__, default=torch.float32)


def compare_outputs(
    names: Sequence[str], given: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, where: str
) -> dict[str, float]:
    """How far each output of a file is from the model's.

    Args:
        names: of the outputs.
        given: what the file computed.
        expected: what the model computed.
        tolerance: the relative L2 error that is allowed.
        where: what was run on which inputs, for messages.

    Returns:
        The relative L2 error by output, in float64. Values that are not finite in the model's output have to be the
        same in the file's, and are left out. Integers and booleans have the share of those that differ.

    Raises:
        ExportError: an output has another shape, or an error beyond ``tolerance`` (0 for integers and booleans); the
            message names the first.
    """
    if len(given) != len(expected):
        raise ExportError(f"{where} gives {len(given)} outputs, the model {len(expected)}")
    errors: dict[str, float] = {}
    for name, value, reference in zip(names, given, expected, strict=True):
        value, reference = value.detach().cpu(), reference.detach().cpu()
        if value.shape != reference.shape:
            raise ExportError(
                f"{where} gives output {name!r} with shape {list(value.shape)}, the model {list(reference.shape)}"
            )
        allowed = tolerance if reference.is_floating_point() or reference.is_complex() else 0.0
        errors[name] = _error(value, reference)
        if not errors[name] <= allowed:
            raise ExportError(
                f"{where} gives output {name!r} {errors[name]:.2g} away from the model's (relative L2), more than the "
                f"{allowed:.2g} that is allowed"
            )
    return errors


def _error(value: Tensor, reference: Tensor) -> float:
    if not (reference.is_floating_point() or reference.is_complex()):
        return float((value != reference).double().mean()) if reference.numel() else 0.0
    undefined = reference.isnan()
    if bool((value.isnan() != undefined).any()):
        return float("inf")
    return relative_error(value[~undefined], reference[~undefined])


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A path in a new folder beside ``path``; what lies in that folder afterwards is moved to where ``path`` is.

    If an exception comes out of the block, nothing is left and what was at ``path`` stays.

    Raises:
        ExportError: the folder that ``path`` is in does not exist, or cannot be written.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    try:
        yield folder / path.name
        # What the file refers to is there before it.
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
            with file.open("rb+") as stream:
                os.fsync(stream.fileno())
            os.replace(file, path.parent / file.name)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
