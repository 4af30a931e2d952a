"""What a build needs to know of the clock and of the compiler before it plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lowrank_fx.capture import preserved, unwrap
from lowrank_fx.frozen import Frozen
from lowrank_fx.latency import paired_speedup
from lowrank_fx.session import Session
from lowrank_fx.site_times import SiteTimes
from lowrank_fx.timing_cache import TimingCache
from lowrank_fx.timings import CONFIDENCE, Timings


def site_times(session: Session, *, compiled: bool) -> SiteTimes:
    """The times of a session's sites, dense and factored, in the variants that it can plan with.

    Args:
        session: the calibrated model.
        compiled: whether the result is going to be compiled.
    """
    offered: dict[str, dict[str, Sequence[int]]] = {
        name: {form: curve.ranks for form, curve in entry.forms.items() if (name, form) in session.effects}
        for name, entry in session.curves.items()
    }
    timings = Timings(session.program.device, TimingCache())
    return SiteTimes(timings, session.table, session.calibration, offered, compiled, session.progress)


def share_of_run(run: Callable[[], object], times: SiteTimes, device: torch.device) -> float:
    """How much of a model's time its sites take while dense: in (0, 1].

    The model and its sites' operators, one after another, are timed in paired turns: what else the machine does in the
    meantime is not in the ratio.

    Args:
        run: runs the model on what the sites were timed for.
        times: of the sites.
        device: where both run.
    """
    sites = times.dense_runs()
    timing = paired_speedup(run, lambda: [site() for site in sites], device=device)
    return min(1 / timing.speedup, 1.0)


def share_of_sites(session: Session, times: SiteTimes) -> float:
    """How much of the user's model's time its sites take while dense, on the first calibration batch: in (0, 1].

    Sites are timed with weights that are not frozen, so the model is too, whatever becomes of the result.
    """
    call = session.calibration.effect_batches[0].call.map(torch.clone)
    model = unwrap(session.model)
    run = session.compiled_original() if times.compiled else model
    with preserved(model), torch.no_grad():  # hooks of the user's must not see these runs
        return share_of_run(lambda: run(*call.args, **call.kwargs), times, session.program.device)


def freezing(session: Session) -> tuple[bool, str]:
    """Whether the user's model measured faster with its weights frozen, on the first calibration batch.

    Args:
        session: the calibrated model; ``torch.compile`` runs it.

    Returns:
        The answer, and a note that gives the measurement.
    """
    call = session.calibration.effect_batches[0].call.map(torch.clone)
    model, plain, frozen = unwrap(session.model), session.compiled_original(), session.compiled_original(frozen=True)
    with preserved(model), torch.no_grad():  # hooks of the user's must not see these runs
        timing = paired_speedup(
            lambda: plain(*call.args, **call.kwargs),
            lambda: frozen(*call.args, **call.kwargs),
            device=session.program.device,
        )
    refused = frozen.refused if isinstance(frozen, Frozen) else None
    pays = refused is None and timing.speedup - CONFIDENCE * timing.error > 1
    if not pays:
        session.forget_frozen()
    if refused is not None:
        return False, f"weights are not frozen, because {refused}"
    return pays, f"weights are {'' if pays else 'not '}frozen: the original so measured {timing.speedup:.2f}x as fast"


def refused_by_compile(session: Session, *, frozen: bool = False) -> str | None:
    """Why ``torch.compile`` cannot run a model that was taken as a module tree; its graphs it always can.

    Args:
        session: the calibrated model.
        frozen: whether its weights are going to be frozen.
    """
    if session.program.way == "export":
        return None
    call = session.calibration.effect_batches[0].call.map(torch.clone)
    try:
        with preserved(session.model), torch.no_grad():
            session.compiled_original(frozen=frozen)(*call.args, **call.kwargs)
    except Exception as error:  # whatever the compiler and the model's Python may raise
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None
