"""What the calls of one region leave behind while they are calibrated: sketches, and inputs with a role each.

The graph with observers in it gives the caller the outputs of its own call, so a calibrating call costs the sketches
and nothing else. Reference outputs for effects and errors are computed when the plan is made, from the inputs that were
kept: then everything is measured with the same random numbers, and calls pay for a copy of their inputs at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_fx._ambient import settled
from lowrank_fx.backend.regions import RegionCall, RegionGraph
from lowrank_fx.batches import Role
from lowrank_fx.cache import EFFECT_BATCHES
from lowrank_fx.compare import check_outputs
from lowrank_fx.errors import CalibrationError
from lowrank_fx.grouped_sketch import make_sketch
from lowrank_fx.observer import SKETCH_MEMORY, Recorder, TapObserver, sketch_sizes
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.rewrite import copy_graph_module
from lowrank_fx.sites import SiteTable, Tap

KEPT_BYTES = 128 << 20
"""What the inputs of one role may hold; the first call's always fit."""

MIN_ROWS = 32
"""Rows that are sketched of every call, however narrow the layers behind a tap."""

WAITING = 1024
"""Rows that a sketch takes in at a time, at least."""

PERIOD = 5
"""Every fifth call is held out; in turn it chooses among plans and reports the error."""


class CallObserver(nn.Module):
    """Sketches a tap in whatever mode the caller is: autocast and inference mode would reach into the sketch.

    Rows wait until there are as many as they are long, and :data:`WAITING` at least. Taking in a few rows costs nearly
    what taking in that many does, and a call may bring few.

    Args:
        observer: the one that sketches.
        device: of the sketch.
    """

    _is_impure = True

    def __init__(self, observer: TapObserver, device: torch.device) -> None:
        super().__init__()
        self.observer = observer
        self.device = device
        self._waiting: list[Tensor] = []
        self._count = 0
        self._new: list[tuple[Tensor, Tensor]] = []
        self._error: CalibrationError | None = None

    def forward(self, activation: Tensor) -> None:
        """Take a sample of the activation's rows, for :meth:`take` or :meth:`drop` when the call is over."""
        try:
            with settled(self.device):
                rows, _ = self.observer.sampled(activation.detach())
                if rows.numel():
                    # The activation may be written to behind this, and its rows are those of a call that is over soon.
                    kept = rows.to(self.device, copy=_share(rows, activation))
                    self._new.append((kept, torch.stack(torch.aminmax(kept))))
        except CalibrationError as error:  # the call would end half-way, after it has written to its inputs
            self._error = error

    def check(self) -> None:
        """Make sure that the rows of the call that has just run can be sketched.

        Raises:
            CalibrationError: they cannot.
        """
        if self._error is not None:
            raise self._error
        if not all(math.isfinite(end) for _, ends in self._new for end in ends.tolist()):
            raise CalibrationError(f"the input of {self.observer.layers} holds NaN or infinite values")

    def drop(self) -> None:
        """Forget the rows of the call that has just run."""
        self._new, self._error = [], None

    def take(self) -> None:
        """Take in the rows of the call that has just run.

        Raises:
            CalibrationError: they cannot be sketched.
        """
        for rows, _ in self._new:
            self._waiting.append(rows)
            self._count += rows.shape[0]
        self.drop()
        if self._count >= max(self.observer.tap.width, WAITING):
            self.flush()

    def flush(self) -> None:
        """Let the sketch take in the rows that wait.

        Raises:
            CalibrationError: they cannot be sketched.
        """
        if not self._waiting:
            return
        rows, self._waiting, self._count = torch.cat(self._waiting), [], 0
        try:
            self.observer.sketch.update(rows)
        except CalibrationError as error:
            raise CalibrationError(f"the input of {self.observer.layers}: {error}") from error


class Recording:
    """The calls of one region that were calibrated.

    Args:
        program: the region.
        number: of the region.
        steps: how many calls are going to be calibrated.
        seed: chooses the rows.
    """

    def __init__(self, program: RegionGraph, number: int, steps: int, seed: int) -> None:
        self.program = program
        self.number = number
        self.table = program.find_sites()
        self.calls = 0
        self._held: tuple[Role, RegionCall] | None = None
        self.kept: dict[Role, list[tuple[int, RegionCall]]] = {"calibrate": [], "select": [], "report": []}
        self._kept_bytes = dict.fromkeys(self.kept, 0)
        self._period = PERIOD if steps >= 2 * PERIOD else max(2, steps // 2)
        self._recorder = Recorder(seed)
        sizes = sketch_sizes(self.table.taps.values(), None, SKETCH_MEMORY)
        self.observers = {
            name: TapObserver(
                tap,
                make_sketch(tap.width, tap.groups, sizes[name], self._device(tap)),
                # The caller is waiting: a sketch may cost half as much as the layers behind it, not as much as they.
                _fan_out(self.table, tap) // 2,
                self._recorder,
                MIN_ROWS,
            )
            for name, tap in self.table.taps.items()
        }
        for name, observer in self.observers.items():
            tap = self.table.taps[name]
            observer.layers = ", ".join(site.name for site in self.table.sites if tap in self.table.taps_of(site))
        self._observed = copy_graph_module(program.module, clone=False)
        self._inserted = {
            name: CallObserver(observer, self._device(observer.tap)) for name, observer in self.observers.items()
        }
        PassManager(order.observation(self.table.taps, self._inserted), bisect=False).run(self._observed)

    def role(self) -> Role:
        """What the next call is for."""
        held, turn = (self.calls + 1) % self._period == 0, (self.calls + 1) // self._period
        if not held:
            return "calibrate"
        return "select" if turn % 2 else "report"

    def run(self, inputs: Sequence[Any], mask: Tensor | None) -> Any:
        """Run a call of the role ``"calibrate"``; its outputs are those of the region. :meth:`take` takes it in.

        Args:
            inputs: of the graph.
            mask: the padding mask, or None.
        """
        self.hold_out(inputs, mask)
        for observer in self._inserted.values():
            observer.drop()  # a call before this one may have failed half-way
        self._recorder.start(self.calls, None if mask is None else mask_of(mask))
        return self._observed(*inputs)

    def hold_out(self, inputs: Sequence[Any], mask: Tensor | None) -> None:
        """Hold a call before it runs, and maybe writes to its inputs; :meth:`take` takes it in."""
        real = None if mask is None else mask_of(mask)
        role, call = self.role(), RegionCall(tuple(inputs), {}, real, region=self.number)
        self._held = (role, _copied(call)) if self._wanted(role, call) else None

    def take(self, outputs: Any) -> None:
        """Take in the call that has just run.

        Args:
            outputs: what it returned.

        Raises:
            CalibrationError: nothing can be learned from it, as if it had not been.
        """
        held, self._held = self._held, None
        observers = self._inserted.values()
        try:
            for observer in observers:
                observer.check()
            if held is not None:
                check_outputs(outputs, held[1].mask)
        except CalibrationError:
            for observer in observers:
                observer.drop()
            raise
        for observer in observers:
            observer.take()
        if held is not None:
            role, call = held
            self.kept[role].append((self.calls, call))
            self._kept_bytes[role] += _bytes(call)
        self.calls += 1

    def finish(self) -> None:
        """Let the sketches take in what waits; no call is calibrated after this.

        Raises:
            CalibrationError: an activation cannot be sketched.
        """
        for observer in self._inserted.values():
            observer.flush()

    @property
    def effect_calls(self) -> list[tuple[int, RegionCall]]:
        """The calls on which effects are measured."""
        return self.kept["calibrate"][:EFFECT_BATCHES]

    def _wanted(self, role: Role, call: RegionCall) -> bool:
        return not self.kept[role] or self._kept_bytes[role] + _bytes(call) <= KEPT_BYTES

    def _device(self, tap: Tap) -> torch.device:
        site = next(site for site in self.table.sites if tap in self.table.taps_of(site))
        return self.program.weight(site).device


def mask_of(mask: Tensor) -> Tensor:
    """Where a padding mask ``[B, T]`` says that a position is real: true, positive, or zero in one that is added."""
    if mask.is_floating_point() and not bool((mask > 0).any()):
        return mask == 0
    return mask > 0


def _share(rows: Tensor, activation: Tensor) -> bool:
    """Whether rows lie in the memory of the activation that they are of; those that were sampled do not."""
    strided = activation.layout is torch.strided
    return strided and rows.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr()


def _copied(call: RegionCall) -> RegionCall:
    with torch.inference_mode(False), torch.no_grad():
        args = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), call.args)
        return replace(call, args=args)


def _bytes(call: RegionCall) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in call.tensors())


def _fan_out(table: SiteTable, tap: Tap) -> int:
    return sum(site.out_features for site in table.sites if tap in table.taps_of(site))
