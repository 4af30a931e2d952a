"""CALIBRATE: a loader fills a :class:`Calibration`: a sketch per tap, FLOPs, and cached batches.

The loader is read once. Rows are capped per batch, so that a tap's sketch costs no more FLOPs than the layers it feeds;
which rows are kept is decided by a generator seeded from (seed, batch index, tap), so a resumed or sharded run sees
the same rows. A checkpoint is the calibration as it is between two pieces of batches: nothing else carries over from
one to the next, so a run that resumes it goes on bit by bit as the interrupted one would have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lowrank_fx._ambient import seeded
from lowrank_fx._describe import describe_call
from lowrank_fx._progress import Progress
from lowrank_fx.batch_runs import run_batch
from lowrank_fx.batches import Assigned, Call
from lowrank_fx.calibration import NAME, Calibration
from lowrank_fx.errors import CalibrationError, CallError, StorageError
from lowrank_fx.fingerprint import call_checksum
from lowrank_fx.observer import Recorder, TapObserver
from lowrank_fx.program import Outputs, Program
from lowrank_fx.sites import SiteTable, Tap

CHECKPOINT_SECONDS = 30.0
"""Seconds between checkpoints, at least."""

CHECKPOINT_SHARE = 0.05
"""Share of the time that writing checkpoints may take, about."""


class Checkpoint:
    """A folder that holds the state of a calibration run while it lasts, and the calibration when it is done.

    Args:
        folder: written to by one run at a time; each shard needs one of its own.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._due = 0.0

    def resume(self, start: Calibration) -> Calibration:
        """The state that an interrupted run of the same kind left here; ``start`` itself if there is none.

        Raises:
            StorageError: the folder holds a damaged state, or that of another run; the message says what differs.
        """
        if not (self.folder / f"{NAME}.json").exists():
            return start
        found = Calibration.load(self.folder)
        difference = found.source.differs(start.source)
        if difference is None and found.shards != start.shards:
            mine, theirs = (", ".join(map(str, sorted(state.shards))) for state in (found, start))
            difference = f"it holds shard {mine} of {start.source.shards}, not {theirs}"
        if difference is not None:
            raise StorageError(
                f"{self.folder}: the checkpoint is of another run: {difference}; use another folder, or delete this one"
            )
        return found

    def keep(self, state: Calibration) -> None:
        """Write the state, if that has not been done for a while."""
        if time.monotonic() >= self._due:
            self.write(state)

    def write(self, state: Calibration) -> None:
        """Write the state.

        Raises:
            StorageError: the folder cannot be written, or a batch holds something that cannot be stored.
        """
        started = time.monotonic()
        state.save(self.folder)
        ended = time.monotonic()
        self._due = ended + max(CHECKPOINT_SECONDS, (ended - started) / CHECKPOINT_SHARE)


def run_calibration(
    program: Program,
    table: SiteTable,
    pieces: Iterable[Assigned],
    state: Calibration,
    *,
    checkpoint: Checkpoint | None = None,
    batches: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Run the batches through a captured model once, sketching every tap.

    Args:
        program: the captured model; unchanged.
        table: its sites and taps.
        pieces: all batches with their roles, as :func:`~lowrank_fx.batches.assign_calls` gives them. Those that
            ``state`` has seen, and those of other shards, are read but not run.
        state: a blank calibration, or an interrupted one; taken over. A complete one is returned as it is.
        checkpoint: where the state is written, after the first piece and the last, and now and then in between.
        batches: how many batches there are, for the progress bar.
        progress: show a progress bar for work over two seconds.

    Returns:
        The complete calibration.

    Raises:
        CalibrationError: bad data; the message names the batch and the layer. Or the batches are not those that the
            state was made of.
        StorageError: the checkpoint cannot be written.
    """
    device = program.device
    state = state.to(device)
    if state.complete:
        return state
    recorder = Recorder(state.seed)
    observers = {
        tap.name: TapObserver(tap, state.sketches[tap.name], _fan_out(table, tap), recorder)
        for tap in table.taps.values()
    }
    observed = program.observed(table, observers)
    for observer in observers.values():
        observer.layers = ", ".join(site.name for site in table.sites if observer.tap in table.taps_of(site))

    (shard,) = state.shards
    unmet = set(state.pieces)
    shown = -1
    with (
        torch.no_grad(),
        Progress("calibrate", batches, progress) as bar,
    ):
        for assigned in _read(pieces, state, checkpoint):
            key = (assigned.index, assigned.role)
            if key in unmet:
                _check_same(assigned, state.pieces[key])
                unmet.discard(key)
            elif assigned.index % state.source.shards == shard:
                checksum = call_checksum(assigned.call)
                _run(program, observed, recorder, assigned, state)
                for name, observer in observers.items():
                    if observer.first_rows is not None:
                        first = assigned.index, observer.first_rows, observer.first_space
                        state.first_rows.setdefault(name, first)
                state.pieces[key] = checksum
                if checkpoint is not None:
                    checkpoint.keep(state)
            if assigned.index != shown:
                shown = assigned.index
                bar.advance(note=f"batch {shown}")
    if unmet:
        index, role = min(unmet)
        raise CalibrationError(
            f"the loader ended, and batch {index} never came with the role ({role}) that it had in the interrupted "
            "run; a resumed run needs the same batches in the same order"
        )
    state.complete = True
    if checkpoint is not None:
        checkpoint.write(state)
    return state


def _run(
    program: Program,
    observed: Callable[[Call], Outputs],
    recorder: Recorder,
    assigned: Assigned,
    state: Calibration,
) -> None:
    """Run one piece of a batch and keep what its role asks for."""
    device, index = program.device, assigned.index
    moved = assigned.call.to(device)
    try:
        args, kwargs = program.bind(moved.args, moved.kwargs)
    except CallError as error:
        raise CalibrationError(
            f"batch {index} is {describe_call(moved)}, and batch 0 was {describe_call(state.example)}: {error}; "
            "capture='modules' takes every shape that the model itself takes"
        ) from error
    call = Call(args, kwargs, moved.mask, moved.batch)
    if assigned.role == "calibrate":
        recorder.start(index, call.mask)
        outputs = run_batch(program, observed, call, index, state.example)
        if state.counted is None:
            with seeded(device):
                state.counted = (index, program.count_flops(call))
        state.effect.add(index, call, outputs)
        state.inputs.add(index, replace(call, batch=None), outputs)
    else:
        cache = state.select if assigned.role == "select" else state.report
        cache.add(index, call, run_batch(program, program.run, call, index, state.example))


def _read(pieces: Iterable[Assigned], state: Calibration, checkpoint: Checkpoint | None) -> Iterator[Assigned]:
    """The pieces; where reading fails, what was calibrated so far is kept in the checkpoint and the error says so."""
    try:
        yield from pieces
    except CalibrationError as error:
        if checkpoint is None or not state.pieces:
            raise
        checkpoint.write(state)
        raise CalibrationError(
            f"{error}; what was calibrated until then is kept in {str(checkpoint.folder)!r}: the same call with the "
            "same checkpoint= goes on from there"
        ) from error


def _check_same(assigned: Assigned, checksum: str) -> None:
    if call_checksum(assigned.call) != checksum:
        raise CalibrationError(
            f"batch {assigned.index} is not the one of the interrupted run; a resumed run needs the same batches in "
            "the same order: shuffle with a fixed seed, or start anew with another checkpoint folder"
        )


def _fan_out(table: SiteTable, tap: Tap) -> int:
    return sum(site.out_features for site in table.sites if tap in table.taps_of(site))
