"""ONNX in, ONNX out: ``onnx_compress`` calls the stages of ``optimize`` on a model that onnxruntime runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank_fx._ambient import settled
from lowrank_fx._files import write_atomic
from lowrank_fx._sizes import parse_size
from lowrank_fx.arguments import check_names, length_of, opened
from lowrank_fx.batch_runs import random_note
from lowrank_fx.batches import assign_calls, bound_calls
from lowrank_fx.calibration import Calibration, blank
from lowrank_fx.calibration_run import run_calibration
from lowrank_fx.corrections import Made
from lowrank_fx.effects import held_out_error
from lowrank_fx.effort import Effort, EffortName, effort_of
from lowrank_fx.errors import CalibrationError, LowRankError, StorageError, TargetError
from lowrank_fx.forms import check_forms
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.payoff import settle
from lowrank_fx.plan import Plan
from lowrank_fx.planners import planner as find_planner
from lowrank_fx.report import Report
from lowrank_fx.session import Session
from lowrank_fx.sites import SiteTable
from lowrank_fx.study import studied
from lowrank_fx.targets import Keep, Target, Tolerance, asks_for_time, check_target, obeys_speed

if TYPE_CHECKING:
    from lowrank_fx.onnx_frontend.model import OnnxModel
    from lowrank_fx.onnx_frontend.program import OnnxProgram

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 3e-2}
"""By how much the written file's error may exceed the plan's, besides ``DRIFT`` of it: two products round otherwise
than one, and onnxruntime fuses nodes. About a thousand float32 steps, 32 of float16."""

DRIFT = 0.01


@dataclass(frozen=True)
class OnnxResult:
    """What :func:`onnx_compress` made.

    Attributes:
        path: the written file.
        plan: a row per layer, and what the whole costs and does.
        timing: the file's measured speed against the original's in onnxruntime, or None where nothing was factored.
        error: relative error of the written file on the held-out rows that report, run by onnxruntime as it is.
    """

    path: Path
    plan: Plan
    timing: PairedTiming | None
    error: float

    def report(self) -> Report:
        """A row per layer, and what the whole plan costs and does; ``print`` it, or ask it ``to_html()``."""
        return Report(self.plan, self.timing)


def onnx_compress(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    calib_loader: Iterable[Any],
    target: Target = Tolerance(0.1),
    *,
    skip: Sequence[str] = (),
    planner: str = "budget",
    forms: Sequence[str] | None = None,
    effort: EffortName = "high",
    holdout: float = 0.2,
    sketch_memory: int | str = "2GiB",
    seed: int = 0,
    progress: bool = True,
) -> OnnxResult:
    """Make an ONNX file smaller and faster by factoring its MatMul, Gemm and Conv nodes; no PyTorch model is needed.

    Nodes that are not factored, and what else the file says (metadata, opsets, names and shapes of inputs and outputs),
    stay as they are. The written file is checked, run on held-out rows, and replaces ``path_out`` in one step.

    Args:
        path_in: an ONNX file with float32, float16 or float64 weights; tensors may be in files beside it.
        path_out: where the result goes. It may be ``path_in``.
        calib_loader: any iterable of batches, read once: dictionaries by the names of the inputs (other names are
            dropped), tuples or lists in their order (cut to their number), or the one input; NumPy arrays or tensors.
            About every fifth batch is held out. An ``attention_mask`` keeps padding out of the statistics.
        target: ``Tolerance(error)``, ``Keep(params=share)``, ``Keep(flops=share)``, or ``Metric(fn, max_drop=drop)``,
            whose function is given a module that takes tensors (by the order or the names of the inputs) and returns
            the output, or a dictionary of several.
        skip: patterns of layers to leave alone, by the names in the report or of the initializers.
        planner: ``"budget"``, ``"energy"`` or ``"uniform"``.
        forms: names of the forms that may be used (default: all).
        effort: how much may be measured for the plan, ``"high"`` or ``"low"``; see :mod:`lowrank_fx.effort`.
        holdout: share of the batches that is held out, in (0, 0.5].
        sketch_memory: bytes that all sketches may hold while they stay exact.
        seed: chooses which rows are sampled. The same seed, file and data give the same plan.
        progress: show progress bars for work over two seconds.

    Returns:
        Plan, measured speed and measured error. A ``Tolerance`` or ``Metric`` under which nothing pays leaves a copy of
        the original at ``path_out``, and the plan says so.

    Raises:
        StorageError: a file cannot be read or written.
        CaptureError: ``path_in`` is not a valid ONNX model, or onnxruntime refuses it.
        CalibrationError: the loader or its batches cannot be used; the message names the batch and the node.
        TargetError: the target cannot be reached, or asks for pairs that ONNX files do not get.
        OptionError: an option has a value that is not legal.
        LowRankError: onnx or onnxruntime is not installed, or the written file does not do what was planned.
    """
    _require()
    from lowrank_fx.onnx_frontend.model import read_model
    from lowrank_fx.onnx_frontend.program import OnnxProgram

    check_target(target)
    if isinstance(target, Keep) and target.regauge:
        raise TargetError(f"{target}: pairs in ONNX files are not re-gauged; leave regauge out")
    if asks_for_time(target):
        raise TargetError(
            f"{target}: no table of times is made of onnxruntime's operators; use Tolerance(...), which never writes a "
            "slower file, or Keep(flops=...)"
        )
    find_planner(planner)
    limits = effort_of(effort)
    check_forms(check_names("forms", forms or ()))
    skip = check_names("skip", skip)
    _check_goal(path_out)
    memory = parse_size("sketch_memory", sketch_memory, "2GiB")
    program = OnnxProgram(read_model(path_in))
    with settled(program.device) as remarks:
        session = _session(
            program,
            calib_loader,
            skip=skip,
            planner=planner,
            forms=forms,
            effort=limits,
            holdout=holdout,
            memory=memory,
            seed=seed,
            progress=progress,
            notes=remarks,
        )
        return _written(session, program, target, Path(path_in), Path(path_out))


def _session(
    program: OnnxProgram,
    loader: Iterable[Any],
    *,
    skip: Sequence[str],
    planner: str,
    forms: Sequence[str] | None,
    effort: Effort,
    holdout: float,
    memory: int,
    seed: int,
    progress: bool,
    notes: tuple[str, ...],
) -> Session:
    """Calibrate a model and measure what its sites do."""
    table = program.find_sites(skip)
    calibration = _calibrated(program, table, loader, holdout=holdout, memory=memory, seed=seed, progress=progress)
    missing = program.without_derivative(table.sites)
    underivable = f"of {', '.join(missing)} there is no derivative here" if missing else ""
    study = studied(program, table, calibration, effort, forms=forms, underivable=underivable, progress=progress)
    return Session(
        model=program.module,
        program=program,
        table=table,
        calibration=calibration,
        curves=study.curves,
        effects=study.effects,
        planner=planner,
        forms=None if forms is None else tuple(forms),
        effort=effort,
        notes=(*notes, *study.notes, *calibration.notes, *random_note(program, calibration.select_batches[0])),
        params=program.params(),
        progress=progress,
    )


def _calibrated(
    program: OnnxProgram,
    table: SiteTable,
    loader: Iterable[Any],
    *,
    holdout: float,
    memory: int,
    seed: int,
    progress: bool,
) -> Calibration:
    from lowrank_fx.onnx_frontend.inputs import binder

    if isinstance(loader, np.ndarray):
        raise CalibrationError(
            "the loader is an array, which is one batch and not an iterable of batches; pass [batch]"
        )
    first, calls = opened(bound_calls(loader, binder(program.model)))
    pieces = assign_calls(calls, holdout)
    state = blank(program, table, program.module, first[1], sketch_memory=memory, seed=seed, holdout=holdout)
    return run_calibration(program, table, pieces, state, batches=length_of(loader), progress=progress)


def _written(session: Session, program: OnnxProgram, target: Target, source: Path, goal: Path) -> OnnxResult:
    """Plan, rewrite, write, check and measure."""
    from lowrank_fx.onnx_frontend.model import read_model, written
    from lowrank_fx.onnx_frontend.program import OnnxProgram

    def rewritten(made: Made) -> OnnxModel:
        program_of = made.into(program, clone=True)
        assert isinstance(program_of, OnnxProgram)
        return program_of.model

    def time_of(plan: Plan, made: Made) -> PairedTiming:
        return _timed(session, program.model, rewritten(made))

    aimed = session.aimed(target, None)
    timing: PairedTiming | None = None
    if obeys_speed(target):
        _, (plan, made, _), _, timing = settle(aimed, target, time_of)
    else:
        plan, made, _ = aimed.planned(target)
    if not made.factored:
        _copy(program.model, source, goal)
        return OnnxResult(goal, plan, None, 0.0)
    timing = timing if timing is not None else time_of(plan, made)
    with written(rewritten(made), goal, source) as draft:
        error = held_out_error(OnnxProgram(read_model(draft)), session.calibration.report_batches)
        rounding = max(ROUNDING[getattr(torch, site.dtype.removeprefix("torch."))] for site in session.table.sites)
        if not error <= plan.error * (1 + DRIFT) + rounding:
            raise LowRankError(
                f"{goal}: the rewritten file has an error of {error:.3g} on held-out rows, and its plan "
                f"{plan.error:.3g}; nothing was written. The model may amplify rounding, or choose between branches "
                "by it"
            )
    return OnnxResult(goal, plan, timing, error)


def _timed(session: Session, before: OnnxModel, after: OnnxModel) -> PairedTiming:
    """Time both in onnxruntime, optimised as it does by default, on the first calibration batch."""
    from lowrank_fx.onnx_frontend.runtime import Runner

    inputs = session.calibration.effect_batches[0].call.kwargs
    calls: list[Callable[[], object]] = []
    for model in (before, after):
        runner = Runner(model)
        feeds = runner.bound(inputs)
        calls.append(lambda runner=runner, feeds=feeds: runner.session.run(None, feeds))  # type: ignore[misc]
    return paired_speedup(calls[0], calls[1], device="cpu")


def _copy(model: OnnxModel, source: Path, goal: Path) -> None:
    """The original, byte for byte, or with its tensors in a file beside the new one."""
    from lowrank_fx.onnx_frontend.model import drop_tensor_files, written

    if model.external:
        with written(model, goal, source):
            return
    write_atomic(goal, source.read_bytes())
    drop_tensor_files(goal, source=source)


def _check_goal(path: str | os.PathLike[str]) -> None:
    """Calibration takes its time; what cannot be written is told before."""
    goal = Path(path)
    if goal.is_dir():
        fault = "it is a folder; name a file"
    elif goal.exists() and not goal.is_file():
        fault = "it is there and is no file"
    elif not goal.parent.is_dir():
        fault = f"there is no folder {str(goal.parent)!r}; make it first"
    elif not os.access(goal.parent, os.W_OK | os.X_OK):
        fault = f"the folder {str(goal.parent)!r} may not be written to"
    else:
        return
    raise StorageError(f"{os.fspath(path)!r} could not be written: {fault}")


def _require() -> None:
    for name in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LowRankError(
                f"onnx_compress needs {name}, which cannot be imported ({error}): pip install lowrank_fx[onnx]"
            ) from error
