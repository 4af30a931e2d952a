"""What ``torch.export`` says when it refuses a model, in words for the user, and its noise kept off the terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from lowrank_fx.errors import CaptureError

_NOISY = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export", "torch._subclasses.fake_tensor")

_DATA_DEPENDENT = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


class ExportRefusedError(CaptureError):
    """``torch.export`` refused a model.

    Args:
        model: the model's class.
        file: where the model's own code was when it failed; empty if none of it was running.
        line: ``"12 (n = x.item())"``, the number and the code.
        cause: the exception, in one line.
        short: the same in a few words.
        advice: what to do.
    """

    def __init__(self, model: str, file: str, line: str, cause: str, short: str, advice: str) -> None:
        at = f" at {file}:{line}" if file else ""
        super().__init__(f"torch.export could not capture {model}{at}: {cause}; {advice}")
        # Plans keep notes, and where a checkout lies on a disk is nothing that a plan should depend on.
        at = f" at {Path(file).name}:{line}" if file else ""
        self.cause = f"torch.export refuses it{at}: {short}"


def refused(model: nn.Module, error: Exception) -> ExportRefusedError:
    """What an exception that export raised means: the model's own line, the cause, what to do."""
    here, torch_root = Path(__file__).parent, Path(torch.__file__).parent
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(torch_root)
        and not Path(frame.filename).is_relative_to(here)
        and not frame.filename.startswith("<")
    ]
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    file, line = (own[-1].filename, f"{own[-1].lineno} ({(own[-1].line or '').strip()})") if own else ("", "")
    cause = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    shown = f"{type(error).__name__}: {cause}" if cause else type(error).__name__
    short = "what it does depends on a tensor's values" if depends_on_data(error) else shown
    return ExportRefusedError(type(model).__name__, file, line, shown, short, _advice(error, cause))


def depends_on_data(error: Exception) -> bool:
    """Whether the trace failed because it needed a tensor's values: no choice of dynamic dimensions helps then."""
    return isinstance(error, _DATA_DEPENDENT) or ".numpy() is not supported" in str(error)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep off the terminal what tracing writes to it; yields what was written to the standard output.

    Torch logs a warning and prints the partial graph for every model that it refuses. Whatever the model's own code
    prints would show fake tensors. Log records below warnings, which only the user can have asked for, pass.
    """

    def calm(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    loggers = [logging.getLogger(name) for name in _NOISY]
    printed = io.StringIO()
    for logger in loggers:
        logger.addFilter(calm)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(printed):
            yield printed
    finally:
        for logger in loggers:
            logger.removeFilter(calm)


def _advice(error: Exception, cause: str) -> str:
    if "not a known type" in cause:
        return "register that class with torch.utils._pytree.register_pytree_node, or return tensors"
    if depends_on_data(error):
        return (
            "control flow that depends on a tensor's values (if, while, .item()) cannot become a graph: move it out of "
            "forward, use torch.where or torch.cond, or pass capture='modules', which keeps the model's own Python"
        )
    return "if the model runs by itself, pass capture='modules', which keeps its own Python"
