"""All graphs of one model, from the first calibrated call to the factored graphs.

A family is in one of these phases:

* ``calibrating``: calls run dense and are sketched;
* ``planning``: one thread makes the plan, calls of others run dense;
* ``factored``: calls run the factored graphs;
* ``dense``: the plan leaves every layer as it is, or there can be none, and the status says why;
* ``stale``: a weight has changed since, so calls run dense until :func:`~lowrank_fx.refresh`.

Which graph a call runs is an attribute of the :class:`~lowrank_fx.backend.region.Binding`, exchanged in one step, so
threads that call meanwhile run the one or the other, and both are right. Calls never wait: who does not get the lock
runs dense.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lowrank_fx._ambient import settled
from lowrank_fx.backend.members import Member, Rivals
from lowrank_fx.backend.options import BackendOptions
from lowrank_fx.backend.planning import Planned, make_plan
from lowrank_fx.backend.roots import parameters_of
from lowrank_fx.backend.saved import Saved, read_saved
from lowrank_fx.backend.watch import Watch, on_optimizer_step
from lowrank_fx.errors import CalibrationError, LowRankError
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan
from lowrank_fx.sites import Skip

Phase: TypeAlias = Literal["calibrating", "planning", "factored", "dense", "stale"]

PATIENCE = 2
"""Layers that are called rarely hold the plan up for at most so many times the calibration steps."""

logger = logging.getLogger("lowrank_fx.backend")

_FAMILIES: weakref.WeakSet[Family] = weakref.WeakSet()
_LOCK = threading.RLock()
_SERIAL = itertools.count()


class Family:
    """The graphs of one model under one set of options.

    Args:
        root: the model; None where a function was compiled that is no model's.
        options: the user's.

    Attributes:
        phase: see above.
        steps: calls that were calibrated: of the layer that was called most often.
        planned: the plan and its factors, once there are some.
        plan: the plan, once there is one.
        timing: of the factored graphs against the dense ones, where that was measured.
        reason: why the phase is what it is, where there is something to say.
        work: held while a call is calibrated, and while the plan is made.
        numbers: gives each graph its number.
        serial: later families have greater ones.
    """

    def __init__(self, root: nn.Module | None, options: BackendOptions) -> None:
        self._root = None if root is None else weakref.ref(root)
        self.options = options
        self.phase: Phase = "calibrating"
        self.steps = 0
        self.planned: Planned | Saved | None = None
        self.plan: Plan | None = None
        self.timing: PairedTiming | None = None
        self.reason = ""
        self.work = threading.RLock()
        self.numbers = itertools.count()
        self.serial = next(_SERIAL)
        self._members: weakref.WeakSet[Member] = weakref.WeakSet()
        self._counts: Counter[str] = Counter()
        self._changed: str | None = None
        self._told: set[str] = set()
        self._watch: Watch | None = None
        self._hopeful = False

    @property
    def root(self) -> nn.Module | None:
        """The model, while it lives."""
        return None if self._root is None else self._root()

    @property
    def members(self) -> list[Member]:
        """The graphs, in the order in which they came."""
        with _LOCK:
            return sorted(self._members, key=lambda member: member.number)

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters and buffers of all graphs, each once."""
        return list({id(tensor): tensor for member in self.members for tensor in member.tensors}.values())

    def join(self, member: Member, gone: Sequence[Member] = ()) -> None:
        """Take in a graph that has just come; what is known of the model by now holds for it.

        Args:
            member: the graph.
            gone: those in whose place it is, because the model has other tensors under their names now.
        """
        with _LOCK:
            self._members.add(member)
            for other in gone:
                self._members.discard(other)
        if self._hopeful:
            self._hopeful = False
            self.phase, self.reason = "calibrating", ""
            member.calibrate()
        if self._watch is not None:
            changed = self._watch.replaced(member.names, member.tensors)
            if changed is None and self.phase == "factored":
                # Nothing may have run since a weight changed.
                changed = self._watch.changed(every=True)
            if changed is not None:
                self.weights_changed(changed)
        if self.phase == "factored":
            self._adopt(member)

    def watched(self, member: Member) -> Watch:
        """A watch over a member's tensors, since the calibration started: factors are made of what they were then."""
        if self._watch is None:
            self._watch = Watch(parameters_of(self.root))
        return self._watch.part(member.names, member.tensors)

    # ---- calibrating ---------------------------------------------------------------------------------------------

    def count(self, member: Member) -> None:
        """A call of ``member`` was calibrated; the plan is made once there are enough. Called with ``work`` held."""
        self._counts.update(member.sites)
        self.steps = max(self._counts.values(), default=0)
        wanted = self.options.calibration_steps
        if self.steps < wanted:
            return
        if min(self._counts.values()) >= wanted:
            self.settle()
        elif self.steps >= PATIENCE * wanted:
            rare = sum(count < wanted for count in self._counts.values())
            self.say(
                f"{rare} of {len(self._counts)} layers were called fewer than {wanted} times in {self.steps} calls; "
                "the plan is made without waiting for them any longer"
            )
            self.settle()

    def refuse(self, member: Member, reason: str, level: int = logging.INFO) -> None:
        """``member`` cannot be calibrated. The model stays dense if that holds for all; until another graph comes."""
        member.run_dense()
        if any(other.waits for other in self.members):
            self.say(f"graph {member.number} stays dense: {reason}", level)
        else:
            self._give_up(reason, level)
            self._hopeful = True

    def settle(self, *, insist: bool = False) -> None:
        """Make the plan, and let the graphs run factored. Called with ``work`` held.

        Args:
            insist: whether what stands in the way is raised; otherwise it is logged, and the dense graphs run on.

        Raises:
            LowRankError: ``insist``, and no plan can be made.
        """
        self.phase, self._changed = "planning", None
        members = self.members
        recordings = [member.recording for member in members if member.recording is not None]
        self.say(f"planning for {self.options.target} after {self.steps} calls of {len(recordings)} graphs")
        try:
            if not recordings:
                raise CalibrationError("no call has been calibrated yet")
            parameters = [tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter)]
            calibrated = [each for each in recordings if each.kept["calibrate"]]
            self._take(make_plan(calibrated, parameters, self.options, Rivals(members)))
        except LowRankError as error:
            self._give_up(str(error))
            if insist:
                raise
        except Exception as error:  # the call that calibrated last has its outputs; a plan must not take them away
            logger.exception("no plan could be made")
            self._give_up(f"{type(error).__name__}: {error}")
            if insist:
                raise
        for member in members:
            member.recording = None
        if self._changed is not None:
            self.weights_changed(self._changed)

    def take_saved(self) -> bool:
        """Use the saved model that the options name; whether there is one. Called with ``work`` held."""
        if not isinstance(self.options.plan, str):
            return False
        self._watch = Watch(parameters_of(self.root))
        try:
            self._take(read_saved(self.root, self.options.plan))
        except LowRankError as error:
            self._give_up(str(error))
        return True

    def _take(self, planned: Planned | Saved) -> None:
        self.planned, self.plan = planned, planned.plan
        self.timing = planned.timing if isinstance(planned, Planned) else None
        if not planned.plan.factored:
            self._give_up(f"the plan leaves every layer dense: {'; '.join(planned.plan.notes)}")
            return
        for member in self.members:
            self._adopt(member)
        self.phase = "factored"
        # A graph that came while the others were exchanged.
        for member in self.members:
            if member.waits:
                self._adopt(member)
        self.say(f"{len(planned.plan.factored)} of {len(planned.plan.sites)} layers are factored from now on")

    def _adopt(self, member: Member) -> None:
        planned, module = self.planned, None
        if planned is None:  # another thread has found a changed weight
            member.run_dense()
            return
        try:
            with settled(member.tensors[0].device):
                module = planned.rewritten(member.graph)
        except LowRankError as error:
            self.say(f"graph {member.number} stays dense: {error}", logging.WARNING)
        member.run_factored(module)

    def _give_up(self, reason: str, level: int = logging.WARNING) -> None:
        self.phase, self.reason, self.planned = "dense", reason, None
        for member in self.members:
            member.run_dense()
        self.say(f"the dense graphs run on: {reason}", level)

    # ---- weights that change -------------------------------------------------------------------------------------

    def weights_changed(self, name: str) -> None:
        """A weight is not what it was: nothing that was made of it is used any more."""
        if self.phase == "planning":
            self._changed = name
        elif self.phase == "factored":
            self.phase = "stale"
            self.reason = (
                f"{name} has changed since the factors were made; the dense graphs run until "
                "lowrank_fx.refresh(compiled) is called"
            )
            for member in self.members:
                member.run_dense()
            self.planned = None
            self.say(self.reason, logging.WARNING)
        elif self.phase == "calibrating" and self._watch is not None:
            self.restart(f"{name} has changed")

    def restart(self, reason: str) -> None:
        """Calibrate from the beginning."""
        self.say(f"calibration starts again: {reason}")
        self.steps, self.planned, self.plan, self.timing, self.reason = 0, None, None, None, ""
        self._counts.clear()
        self._watch, self._hopeful = None, False
        held = parameters_of(self.root)
        for member in self.members:
            if any(held.get(name, own) is not own for name, own in zip(member.names, member.tensors, strict=True)):
                with _LOCK:
                    self._members.discard(member)
                member.leave()
            else:
                member.calibrate()
        self.phase = "calibrating"

    # ---- what is said --------------------------------------------------------------------------------------------

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Log a line, and print it where that was asked for."""
        root = self.root
        line = f"{type(root).__name__ if root is not None else 'function'}: {text}"
        logger.log(level, line, stacklevel=2)
        if self.options.verbose:
            print(f"lowrank_fx: {line}", file=sys.stderr)

    def say_once(self, text: str, level: int = logging.INFO) -> None:
        """Log a line that the calls to come would repeat."""
        if text not in self._told:
            self._told.add(text)
            self.say(text, level)


def family_of(root: nn.Module | None, tensors: Sequence[Tensor], options: BackendOptions) -> Family:
    """The family that a graph belongs to; a new one if there is none.

    Args:
        root: its model. Without one, the family that shares a tensor with it.
        tensors: its parameters and buffers.
        options: the user's; the same model compiled with others is another family.

    Raises:
        OptionError: a pattern of ``skip`` matches no weight of the model.
    """
    own = {id(tensor) for tensor in tensors}
    with _LOCK:  # from the search to the entry: two threads that bring a model's first graphs find one family
        for family in _FAMILIES:
            if family.options != options:
                continue
            if root is not None and family.root is root:
                return family
            if root is None and family._root is None and any(id(tensor) in own for tensor in family.tensors):
                return family
        if root is not None:
            skipped = Skip(options.skip)
            for name, parameter in root.named_parameters(remove_duplicate=False):
                if parameter.dim() >= 2:
                    skipped.reason(name)
            skipped.check()
        made = Family(root, options)
        _FAMILIES.add(made)
        _listen()
    return made


def families() -> list[Family]:
    """All families of graphs that ``torch.compile`` still holds."""
    with _LOCK:
        return list(_FAMILIES)


def forget_all() -> None:
    """Start anew with the next call of any model."""
    with _LOCK:
        _FAMILIES.clear()


def _stepped(parameters: Sequence[Tensor]) -> None:
    moved = {id(parameter) for parameter in parameters}
    for family in families():
        if any(id(tensor) in moved for tensor in family.tensors):
            family.weights_changed("a weight (an optimizer stepped)")


_HOOKS: list[torch.utils.hooks.RemovableHandle] = []


def _listen() -> None:
    if not _HOOKS:
        _HOOKS.append(on_optimizer_step(_stepped))
