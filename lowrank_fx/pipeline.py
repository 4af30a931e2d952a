"""The whole way, in order: capture, calibrate, plan, rewrite, compile. ``optimize`` only calls the stages."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import nn

from lowrank_fx import storage
from lowrank_fx._ambient import settled
from lowrank_fx._sizes import parse_size
from lowrank_fx.arguments import check_names, check_shard, length_of, opened
from lowrank_fx.batch_runs import random_note, rehearse
from lowrank_fx.batches import Call, assign_calls, bind_batch, bound_calls
from lowrank_fx.calibration import Calibration, blank
from lowrank_fx.calibration_run import Checkpoint, run_calibration
from lowrank_fx.capture import capture as capture_graph
from lowrank_fx.capture import device_of, unwrap
from lowrank_fx.effort import EffortName, effort_of
from lowrank_fx.errors import CaptureError, OptionError
from lowrank_fx.forms import check_forms
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.judges import Measure
from lowrank_fx.losses import LossFn, measure_note, measure_of
from lowrank_fx.module import LowRankModule, build, check_frozen, check_refine
from lowrank_fx.planners import planner as find_planner
from lowrank_fx.program import Program
from lowrank_fx.refine_options import Refine
from lowrank_fx.refusal import ExportRefusedError
from lowrank_fx.session import Session
from lowrank_fx.sites import SiteTable
from lowrank_fx.study import studied
from lowrank_fx.targets import Target, Tolerance, check_target
from lowrank_fx.tree_program import TreeProgram

Capture: TypeAlias = Literal["auto", "export", "modules"]


def optimize(
    model: nn.Module,
    calib_loader: Iterable[Any] | Calibration,
    *,
    target: Target = Tolerance(0.1),
    skip: Sequence[str] = (),
    planner: str = "budget",
    forms: Sequence[str] | None = None,
    effort: EffortName = "high",
    forward_args: Callable[[Any], Any] | None = None,
    holdout: float = 0.2,
    compile: bool = True,
    frozen: bool | Literal["auto"] = False,
    copy: bool = True,
    capture: Capture = "auto",
    sketch_size: int | None = None,
    sketch_memory: int | str = "2GiB",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    refine: Refine | None = None,
    loss_fn: LossFn | Literal["kl"] | None = None,
    progress: bool = True,
) -> LowRankModule:
    """Make a trained model smaller and faster by factoring its linear and convolution layers.

    Args:
        model: a trained ``nn.Module``; handed back exactly as it was.
        calib_loader: any iterable of batches, read once. A mapping gives keyword arguments (keys that ``forward`` does
            not take are dropped), a tensor is the one argument, a tuple or list is positional and cut to what
            ``forward`` requires. About every fifth batch is held out to choose the plan and to report its error.
            Or a :class:`~lowrank_fx.calibration.Calibration` of this model, as :func:`calibrate` returns it.
        target: ``Tolerance(error)``, ``Metric(fn, max_drop=drop)``, ``Keep(latency=share)``, ``Keep(params=share)`` or
            ``Keep(flops=share)``. The first three never return a slower model: with ``compile`` (for a share of the
            time and ``Metric(of="latency")`` in any case) layers are timed, dense and factored, and one is factored
            only where that measured faster; if the model as a whole is not faster for it, layers are folded back, else
            the original returns. What they give depends on the clock of this machine. The last two obey their budget,
            and the report says where it does not pay.
        skip: patterns of layers to leave alone, such as ``"*.pooler.*"``.
        planner: ``"budget"`` (the default: measured effects, the best of several allocations), ``"energy"`` or
            ``"uniform"``.
        forms: names of the forms that may be used (default: all).
        effort: how much may be measured for the plan: ``"high"``, or ``"low"`` for a first try, in a fraction of the
            time (see :mod:`lowrank_fx.effort`). Held-out data chooses and reports either way.
        forward_args: a function from a batch to the arguments of ``forward``, where the rules above do not fit.
        holdout: share of the batches that is held out, in (0, 0.5].
        compile: run the result through ``torch.compile`` (inductor), and measure it against the compiled original.
        frozen: compile both with their weights as constants, which inductor lays out for speed. For inference: calls
            with gradients enabled run the ordinary compiled model. Changed weights are seen by the next call, which
            compiles anew; only writes that torch does not count, as those through ``param.data``, cannot be seen (see
            :mod:`lowrank_fx.frozen`). The laid-out weights are held beside the model's own. Single layers are timed
            unfrozen. ``"auto"`` freezes both if the original measured faster so on the first calibration batch; a note
            in the plan says what it measured.
        copy: the result owns all of its tensors; False shares those that are not factored with ``model``.
        capture: ``"export"`` takes the model as a graph, by ``torch.export``; ``"modules"`` as its tree of modules,
            whose own Python keeps running; ``"auto"`` as a graph, and as a tree where that is refused or would fix the
            batch size.
        sketch_size: force Frequent Directions sketches of this many rows on every tap.
        sketch_memory: bytes that all sketches may hold while they stay exact, such as ``"256MiB"``; exact sums are
            several times as fast as Frequent Directions.
        seed: chooses which rows are sampled. The same seed, model and data give the same plan, byte for byte, for
            targets that obey no clock.
        checkpoint: a folder that keeps the state of calibration, see :func:`calibrate`, and of refinement, see
            :meth:`LowRankModule.replan`.
        refine: after the plan is made, let factors, biases and norms learn from the original on the calibration
            batches, without labels: ``Refine()``, or ``Refine(steps=..., lr=...)``. A ``Metric`` keeps one call for the
            refined plan.
        loss_fn: what errors are measured by, in the place of the L2 distance of outputs: effects, candidates,
            corrections, and the error that is reported. A differentiable function of (what the model returns, the
            loader's batch) that gives the mean loss of the batch's rows; or ``"kl"``, for logits without labels.
            ``refine`` minimises the L2 distance or ``"kl"``; a function only chooses among its states. See
            :mod:`lowrank_fx.losses` for what is made of it; errors stay relative to those of outputs of zero.
        progress: show progress bars for work over two seconds.

    Returns:
        A :class:`~lowrank_fx.module.LowRankModule`, called like ``model``.

    Raises:
        CaptureError: the model cannot be captured in the way that ``capture`` asks for.
        CalibrationError: the loader or its batches cannot be used.
        TargetError: the target cannot be reached; the message names the smallest reachable value.
        OptionError: an option has a value that is not legal.
        StorageError: the checkpoint cannot be written, is damaged, or is of another run.
    """
    check_target(target)
    check_refine(refine, clone=copy)
    check_frozen(frozen, compile=compile, measured=True)
    find_planner(planner)
    limits = effort_of(effort)
    measure = measure_of(loss_fn)
    check_forms(check_names("forms", forms or ()))
    inner = unwrap(model)
    calibrating: dict[str, Any] = {
        "forward_args": forward_args,
        "holdout": holdout,
        "sketch_size": sketch_size,
        "sketch_memory": sketch_memory,
        "seed": seed,
        "checkpoint": checkpoint,
    }
    with settled(device_of(inner)) as remarks:
        if isinstance(calib_loader, Calibration):
            for name, value in calibrating.items():
                if name == "checkpoint" and refine is not None:
                    continue
                if value != inspect.signature(optimize).parameters[name].default:
                    raise OptionError(f"{name}={value!r} has no effect on a calibration that is done; leave it out")
            program, table, calibration = _adopt(inner, calib_loader, capture, skip)
        else:
            program, table, calibration = _calibrate(
                inner,
                calib_loader,
                **calibrating,
                capture=capture,
                skip=skip,
                shard=None,
                measure=measure,
                progress=progress,
            )
        calibration = calibration.judged(program, measure)
        study = studied(program, table, calibration, limits, forms=forms, progress=progress)
        session = Session(
            model=inner,
            program=program,
            table=table,
            calibration=calibration,
            curves=study.curves,
            effects=study.effects,
            planner=planner,
            forms=None if forms is None else tuple(forms),
            effort=limits,
            notes=(
                *remarks,
                *measure_note(measure),
                *program.notes,
                *calibration.notes,
                *study.notes,
                *random_note(program, calibration.select_batches[0]),
            ),
            params=sum(parameter.numel() for parameter in inner.parameters()),
            progress=progress,
        )
        return build(
            session,
            target,
            None,
            compile=compile,
            clone=copy,
            frozen=frozen,
            refine=refine,
            checkpoint=checkpoint,
        )


def calibrate(
    model: nn.Module,
    calib_loader: Iterable[Any],
    *,
    forward_args: Callable[[Any], Any] | None = None,
    holdout: float = 0.2,
    capture: Capture = "auto",
    skip: Sequence[str] = (),
    sketch_size: int | None = None,
    sketch_memory: int | str = "2GiB",
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | None = None,
    loss_fn: LossFn | Literal["kl"] | None = None,
    progress: bool = True,
) -> Calibration:
    """Run the calibration batches through a model, and return what planning needs to know of them.

    ``optimize(model, loader)`` is ``optimize(model, calibrate(model, loader))``. Apart from each other, the two may run
    in different processes (``save`` and ``load`` of the calibration are in between), and the batches may be divided
    among several machines.

    Args:
        model: a trained ``nn.Module``; handed back exactly as it was.
        calib_loader: any iterable of batches, read once; see :func:`optimize`.
        forward_args: a function from a batch to the arguments of ``forward``.
        holdout: share of the batches that is held out, in (0, 0.5].
        capture: ``"auto"``, ``"export"`` or ``"modules"``; see :func:`optimize`.
        skip: patterns of layers to leave alone. Planning may leave out more, but not fewer.
        sketch_size: force Frequent Directions sketches of this many rows on every tap.
        sketch_memory: bytes that all sketches may hold while they stay exact; see :func:`optimize`.
        seed: chooses which rows are sampled.
        checkpoint: a folder where the state is kept while the batches run: after the first, after the last, and about
            every 30 seconds in between. The same call goes on from there after an interruption, bit by bit as if there
            had been none: the loader is read again, which must give the same batches in the same order, but those that
            were seen are not run. A finished checkpoint is returned without running any.
        shard: ``(i, n)`` runs only the batches whose position in the loader leaves i when divided by n. Each shard
            reads the whole loader, so that all agree on what is held out. :meth:`Calibration.merge` puts them together.
        loss_fn: the one that :func:`optimize` will be given. A function is not kept, but the batches that it needs are.
        progress: show a progress bar for work over two seconds.

    Raises:
        CaptureError: the model cannot be captured in the way that ``capture`` asks for.
        CalibrationError: the loader or its batches cannot be used, or are not those of the interrupted run.
        OptionError: an option has a value that is not legal.
        StorageError: the checkpoint cannot be written, is damaged, or is of another run.
    """
    inner = unwrap(model)
    with settled(device_of(inner)):
        return _calibrate(
            inner,
            calib_loader,
            forward_args=forward_args,
            holdout=holdout,
            capture=capture,
            skip=skip,
            sketch_size=sketch_size,
            sketch_memory=sketch_memory,
            seed=seed,
            checkpoint=checkpoint,
            shard=shard,
            measure=measure_of(loss_fn),
            progress=progress,
        ).calibration


class _Calibrated(NamedTuple):
    program: Program
    table: SiteTable
    calibration: Calibration


def _calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward_args: Callable[[Any], Any] | None,
    holdout: float,
    capture: Capture,
    skip: Sequence[str],
    sketch_size: int | None,
    sketch_memory: int | str,
    seed: int,
    checkpoint: str | os.PathLike[str] | None,
    shard: tuple[int, int] | None,
    measure: Measure | None,
    progress: bool,
) -> _Calibrated:
    """Capture a model with the loader's first batch, and calibrate it with all of them."""
    memory = parse_size("sketch_memory", sketch_memory, "2GiB")
    patterns = check_names("skip", skip)
    part = check_shard(shard)
    signature = inspect.signature(model.forward)

    keeps_batches = measure is not None and measure.needs_batch

    def bind(batch: Any, index: int) -> Call:
        call = bind_batch(batch, signature, forward_args, index)
        return replace(call, batch=batch) if keeps_batches else call

    first, calls = opened(bound_calls(loader, bind))
    pieces = assign_calls(calls, holdout)
    given = first[1].to(device_of(model))
    example = replace(given, batch=None)
    rehearse(model, example)
    program = take(model, example, capture)
    table = program.find_sites(patterns)
    if measure is not None:  # what cannot be measured fails before the loader is read
        args, kwargs = program.bind(example.args, example.kwargs)
        measure.judge(program, replace(given, args=args, kwargs=kwargs).map(torch.clone), "batch 0")
    state = blank(
        program,
        table,
        model,
        first[1],
        sketch_size=sketch_size,
        sketch_memory=memory,
        seed=seed,
        holdout=holdout,
        shard=part,
        keeps_batches=keeps_batches,
    )
    keeper = None if checkpoint is None else Checkpoint(checkpoint)
    if keeper is not None:
        state = keeper.resume(state)
    batches = length_of(loader)
    done = run_calibration(program, table, pieces, state, checkpoint=keeper, batches=batches, progress=progress)
    return _Calibrated(program, table, done)


def _adopt(model: nn.Module, calibration: Calibration, capture: Capture, skip: Sequence[str]) -> _Calibrated:
    """Capture a model as it was when it was calibrated."""
    calibration.check_model(model)
    program = take(model, calibration.example.to(device_of(model)), capture)
    table = program.find_sites(check_names("skip", skip))
    calibration.check_taps(program, table)
    return _Calibrated(program, table, calibration.to(program.device))


def take(model: nn.Module, call: Call, capture: Capture = "auto") -> Program:
    """Capture a model, one way or the other.

    Args:
        model: the model, unwrapped.
        call: an example call.
        capture: see :func:`optimize`.

    Raises:
        CaptureError: the model cannot be captured that way.
        OptionError: ``capture`` is not a legal value.
    """
    if capture not in get_args(Capture):
        raise OptionError(f"capture={capture!r}: the legal values are {', '.join(map(repr, get_args(Capture)))}")
    if capture == "modules":
        return TreeProgram.from_model(model, example=call)
    try:
        captured = capture_graph(model, call)
    except CaptureError as error:
        if capture == "export":
            raise
        cause = error.cause if isinstance(error, ExportRefusedError) else str(error)
        return TreeProgram.from_model(model, (f"taken as a tree of modules, because {cause}",), example=call)
    if capture == "auto" and not captured.dynamic:
        reason = "taken as a tree of modules, because torch.export can capture it for one batch size only"
        with contextlib.suppress(CaptureError):  # an exported graph has no tree, and a copy may be refused
            return TreeProgram.from_model(model, (reason,), example=call)
    return GraphProgram.from_capture(captured)


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    example: Any = None,
    compile: bool = True,
    frozen: bool = False,
    strict: bool = True,
) -> LowRankModule:
    """Read back what :meth:`LowRankModule.save` wrote.

    Args:
        model: the original model, with the weights the plan was made for; unchanged.
        folder: the directory.
        example: a batch, needed only if the model's inputs could not be described in JSON.
        compile: run the result through ``torch.compile``.
        frozen: compile it with its weights as constants; see :func:`optimize`.
        strict: False takes a model whose weights are other ones of the same shapes, such as one that was trained on
            since: the stored factors follow its weights as far as that can be done without data, and what is not
            factored is its own. A note in the plan says so.

    Raises:
        OptionError: ``frozen`` without ``compile``.
        StorageError: the folder is missing, damaged, or does not fit the model; the message names the layer.
    """
    check_frozen(frozen, compile=compile)
    inner = unwrap(model)
    call = None if example is None else bind_batch(example, inspect.signature(inner.forward))
    with settled(device_of(inner)):
        made = storage.load(inner, folder, call, strict=strict)
        return LowRankModule(made, None, compile=compile, frozen=frozen)
