"""The whole way, in order: capture, calibrate, plan, rewrite, compile. ``optimize`` only calls the stages."""

from __future__ import annotations

import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lowrank_fx import storage
from lowrank_fx.batches import Call, assign_calls, bind_batch, bound_calls
from lowrank_fx.calibrate import calibrate
from lowrank_fx.capture import capture, device_of, unwrap
from lowrank_fx.effects import error_curves, measure_effects
from lowrank_fx.errors import CalibrationError, OptionError
from lowrank_fx.forms import FORMS
from lowrank_fx.graph_sites import find_sites
from lowrank_fx.module import LowRankModule, build
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.planners import planner as find_planner
from lowrank_fx.session import Session
from lowrank_fx.targets import Target, Tolerance, check_target


def optimize(
    model: nn.Module,
    calib_loader: Iterable[Any],
    *,
    target: Target = Tolerance(0.1),
    skip: Sequence[str] = (),
    planner: str = "budget",
    forms: Sequence[str] | None = None,
    forward_args: Callable[[Any], Any] | None = None,
    holdout: float = 0.2,
    compile: bool = True,
    copy: bool = True,
    sketch_size: int | None = None,
    sketch_memory: int | str = "256MiB",
    seed: int = 0,
    progress: bool = True,
) -> LowRankModule:
    """Make a trained model smaller and faster by factoring its linear and convolution layers.

    Args:
        model: a trained ``nn.Module``; handed back exactly as it was.
        calib_loader: any iterable of batches, read once. A mapping gives keyword arguments (keys that ``forward`` does
            not take are dropped), a tensor is the one argument, a tuple or list is positional and cut to what
            ``forward`` requires. About every fifth batch is held out to choose the plan and to report its error.
        target: ``Tolerance(error)``, ``Keep(params=share)`` or ``Keep(flops=share)``.
        skip: patterns of layers to leave alone, such as ``"*.pooler.*"``.
        planner: ``"budget"`` (the default: measured effects, the best of several allocations), ``"energy"`` or
            ``"uniform"``.
        forms: names of the forms that may be used (default: all).
        forward_args: a function from a batch to the arguments of ``forward``, where the rules above do not fit.
        holdout: share of the batches that is held out, in (0, 0.5].
        compile: run the result through ``torch.compile`` (inductor), and measure it against the compiled original.
        copy: the result owns all of its tensors; False shares those that are not factored with ``model``.
        sketch_size: force Frequent Directions sketches of this many rows on every tap.
        sketch_memory: bytes that all sketches may hold while they stay exact, such as ``"256MiB"``.
        seed: chooses which rows are sampled. The same seed, model and data give the same plan, byte for byte.
        progress: show progress bars for work over two seconds.

    Returns:
        A :class:`~lowrank_fx.module.LowRankModule`, called like ``model``.

    Raises:
        CaptureError: the model cannot be captured as a graph.
        CalibrationError: the loader or its batches cannot be used.
        TargetError: the target cannot be reached; the message names the smallest reachable value.
        OptionError: an option has a value that is not legal.
    """
    check_target(target)
    find_planner(planner)
    memory = parse_bytes(sketch_memory)
    patterns = _check_names("skip", skip)
    for name in _check_names("forms", forms or ()):
        if name not in FORMS:
            raise OptionError(f"forms={list(forms or ())!r}: no form is called {name!r}; there are {list(FORMS)}")
    inner = unwrap(model)
    signature = inspect.signature(inner.forward)

    def bind(batch: Any, index: int) -> Call:
        return bind_batch(batch, signature, forward_args, index)

    incoming = bound_calls(calib_loader, bind)
    first = next(incoming, None)
    if first is None:
        raise CalibrationError(
            "the loader gave no batch; pass an iterable of batches that has not been read to its end"
        )
    pieces = assign_calls(itertools.chain([first], incoming), holdout)
    device = device_of(inner)
    captured = capture(inner, first[1].to(device))
    cleanup = PassManager(order.cleanup()).run(captured.graph_module)
    table = find_sites(captured.graph_module, patterns)
    calibration = calibrate(
        captured.graph_module,
        captured.calls,
        table,
        pieces,
        sketch_size=sketch_size,
        sketch_memory=memory,
        seed=seed,
        batches=_length(calib_loader),
        progress=progress,
    )
    curves = error_curves(captured.graph_module, table, calibration, forms, progress)
    session = Session(
        model=inner,
        graph_module=captured.graph_module,
        calls=captured.calls,
        table=table,
        calibration=calibration,
        curves=curves,
        effects=measure_effects(captured.graph_module, curves, calibration, progress),
        planner=planner,
        cleanup=tuple(change for _, result in cleanup for change in result.changes),
        notes=captured.notes + calibration.notes,
        params=sum(parameter.numel() for parameter in inner.parameters()),
    )
    return build(session, target, None, compile=compile, clone=copy)


def load(
    model: nn.Module, folder: str | os.PathLike[str], *, example: Any = None, compile: bool = True
) -> LowRankModule:
    """Read back what :meth:`LowRankModule.save` wrote.

    Args:
        model: the original model, with the weights the plan was made for; unchanged.
        folder: the directory.
        example: a batch, needed only if the model's inputs could not be described in JSON.
        compile: run the result through ``torch.compile``.

    Raises:
        StorageError: the folder is missing, damaged, or does not fit the model; the message names the layer.
    """
    inner = unwrap(model)
    call = None if example is None else bind_batch(example, inspect.signature(inner.forward))
    return LowRankModule(storage.load(inner, folder, call), None, compile=compile)


def parse_bytes(size: int | str) -> int:
    """A number of bytes from an integer or text such as ``"256MiB"``.

    >>> parse_bytes("2KiB")
    2048

    Raises:
        OptionError: it is neither, or not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)\s*", size) if isinstance(size, str) else None
    if match is None:
        raise OptionError(f"sketch_memory={size!r} is not a size; use a number of bytes or text such as '256MiB'")
    unit = match[2]
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[0] if unit != "B" else " "))


def _check_names(option: str, names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"{option}={names!r}: give a list or tuple of names, such as {option}=('...',)")
    return tuple(names)


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None
