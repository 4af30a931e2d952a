"""A region that Dynamo compiled, and what runs when it is called.

``torch.compile`` keeps what a backend returns and calls it from then on. It keeps a :class:`Region`, whose inside is
exchanged when the plan is made; Dynamo sees nothing of that and compiles nothing again.

Dynamo passes parameters as arguments and gives a region to every model that runs the same code. So a region holds a
:class:`Binding` for each set of parameters that it met: two models of one class never share a plan.

While gradients are needed the dense graph runs, compiled by the inner backend like that of any other backend: gradient
mode is on, and an input or a parameter requires gradients. Nothing is calibrated then, and nothing factored is used, so
the model's own parameters train, in training and in evaluation mode. The first such call is logged.
"""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from lowrank_fx._ambient import settled
from lowrank_fx.backend.family import PATIENCE, Family, family_of
from lowrank_fx.backend.lowering import Lowered, run_written
from lowrank_fx.backend.options import BackendOptions
from lowrank_fx.backend.recording import Recording
from lowrank_fx.backend.regions import RegionGraph
from lowrank_fx.backend.roots import find_root, names_of
from lowrank_fx.backend.watch import Watch
from lowrank_fx.compiling import CompiledGraph, compile_module
from lowrank_fx.errors import CalibrationError


class Region:
    """What Dynamo calls.

    Args:
        lowered: the region as a graph of ATen operators.
        dense: the region, compiled by the inner backend.
        options: the user's.
    """

    def __init__(self, lowered: Lowered, dense: Callable[..., Any], options: BackendOptions) -> None:
        self.lowered = lowered
        self.dense = dense
        self.options = options
        self._bindings: tuple[Binding, ...] = ()
        self._last: Binding | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        """Run the region."""
        if self.lowered.attached:
            args = (*args, *self.lowered.attached)
        binding = self._last
        if binding is None or not binding.owns(args):
            binding = self._last = self._binding(args)
        return binding.step(args)

    def _binding(self, args: Sequence[Any]) -> Binding:
        with self._lock:
            for binding in self._bindings:
                if binding.owns(args):
                    return binding
            tensors = [args[state.position] for state in self.lowered.states]
            root = find_root(tensors)
            names = names_of(root, tensors, [state.source for state in self.lowered.states])
            family = family_of(root, tensors, self.options)
            made = Binding(self, family, tensors, names)
            # A model whose parameters were exchanged has a new binding in the place of its old one.
            gone = [other for other in self._bindings if other.family is family and other.names == made.names]
            self._bindings = (*(other for other in self._bindings if other not in gone), made)
            if root is not None:
                weakref.finalize(root, _forget, weakref.ref(self), weakref.ref(made))
        family.join(made, gone)
        return made

    def forget(self, binding: Binding | None) -> None:
        """Let go of a model that is gone."""
        self._bindings = tuple(other for other in self._bindings if other is not binding)
        if self._last is binding:
            self._last = None


def _forget(region: weakref.ref[Region], binding: weakref.ref[Binding]) -> None:
    own = region()
    if own is not None:
        own.forget(binding())


class Binding:
    """A region with one model's parameters.

    Args:
        region: the region.
        family: of the model.
        tensors: parameters and buffers, in the order of the region's states.
        names: theirs in the model.

    Attributes:
        step: what a call runs.
        recording: what was calibrated.
    """

    def __init__(self, region: Region, family: Family, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        self.region = region
        self.family = family
        self.tensors = tuple(tensors)
        self.names = tuple(names)
        self.number = next(family.numbers)
        self.recording: Recording | None = None
        states = region.lowered.states
        self._positions = tuple(state.position for state in states)
        self._arity = len(states) + len(region.lowered.inputs) - len(region.lowered.attached)
        self._graph: RegionGraph | None = None
        self._factored: Callable[..., Any] | None = None
        self._watch: Watch | None = None
        self._skipped = 0
        self.step: Callable[[Sequence[Any]], Any] = self._calibrate
        if family.phase in ("dense", "stale"):
            self.run_dense()

    def owns(self, args: Sequence[Any]) -> bool:
        """Whether a call passes this binding's parameters."""
        return all(map(operator.is_, map(args.__getitem__, self._positions), self.tensors))

    @property
    def graph(self) -> RegionGraph:
        """The region with the model's parameters in it, clean."""
        if self._graph is None:
            self._graph = RegionGraph(self.region.lowered.bound(self.tensors, self.names))
        return self._graph

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of its sites, once a call was calibrated."""
        return () if self.recording is None else tuple(site.name for site in self.recording.table.sites)

    @property
    def writes(self) -> bool:
        """Whether a call writes to its inputs."""
        return self.region.lowered.writes

    @property
    def waits(self) -> bool:
        """Whether it is still to be told what to run."""
        return self.step == self._calibrate

    # ---- what a call may run -------------------------------------------------------------------------------------

    def run_dense(self) -> None:
        """Run the dense graph from now on."""
        self.recording = self._factored = self._watch = None
        self.step = self._dense

    def leave(self) -> None:
        """The model has other tensors by now: be forgotten."""
        self.run_dense()
        self.region.forget(self)

    def calibrate(self) -> None:
        """Calibrate from now on."""
        self.recording = self._factored = self._watch = self._graph = None
        self._skipped = 0
        self.step = self._calibrate

    def run_factored(self, module: GraphModule | None) -> None:
        """Run a rewritten graph from now on, compiled by the inner backend; the dense one if there is none."""
        if module is None:
            self.run_dense()
            return
        self._factored = self.compiled(module)
        self._watch = self._watch or self.family.watched(self)
        self.step = self._settled

    def compiled(self, module: GraphModule) -> Callable[..., Any]:
        """A rewritten graph, compiled by the inner backend when it is first called."""
        inner, lowered = self.region.options.inner, self.region.lowered
        if lowered.dynamic:
            return compile_module(module, backend=inner, dynamic=True, own=True)
        return CompiledGraph(module, inner)

    def dense_on(self, inputs: Sequence[Any]) -> Any:
        """What the dense graph returns for inputs alone."""
        args = dict(zip(self._positions, self.tensors, strict=True))
        args.update(zip(self.region.lowered.inputs, inputs, strict=True))
        return self._dense([args[position] for position in sorted(args)])

    def _dense(self, args: Sequence[Any]) -> Any:
        return self.region.dense(*args[: self._arity])

    def _settled(self, args: Sequence[Any]) -> Any:
        watch, factored = self._watch, self._factored
        if watch is None or factored is None or self._needs_gradients(args):
            return self._dense(args)
        changed = watch.changed()
        if changed is not None:
            self.family.weights_changed(changed)
            return self._dense(args)
        lowered = self.region.lowered
        return run_written(factored, lowered.kinds, [args[position] for position in lowered.inputs])

    def _calibrate(self, args: Sequence[Any]) -> Any:
        family = self.family
        if self._needs_gradients(args):
            family.say_once(
                "gradients are recorded, so the dense graph runs and nothing is calibrated; call the model under "
                "torch.no_grad() or torch.inference_mode()"
            )
            return self._dense(args)
        if not family.work.acquire(blocking=False):
            return self._dense(args)
        try:
            if family.phase != "calibrating" or family.take_saved():
                return self.step(args) if not self.waits else self._dense(args)
            return self._recorded(args)
        finally:
            family.work.release()

    def _recorded(self, args: Sequence[Any]) -> Any:
        """A calibrating call, with the family's ``work`` held."""
        family = self.family
        watch = self._watch or family.watched(self)
        # Other graphs may have been calibrated before a weight changed and this one came.
        changed = watch.changed(every=self._watch is None)
        if changed is not None:
            family.weights_changed(changed)
            watch = family.watched(self)
        self._watch = watch
        if self.recording is None:
            steps, seed = self.region.options.calibration_steps, self.region.options.seed
            with settled(self.tensors[0].device):
                self.recording = Recording(self.graph, self.number, steps, seed)
        recording, lowered = self.recording, self.region.lowered
        if not recording.table.sites:
            reasons = "; ".join(f"{refused.name}: {refused.reason}" for refused in recording.table.left_alone)
            family.refuse(self, f"none of its layers can be factored ({reasons or 'it has no such layer'})")
            return self._dense(args)
        inputs = [args[position] for position in lowered.inputs]
        mask = None if lowered.mask is None else args[lowered.mask]
        if recording.role() == "calibrate":
            outputs = run_written(recording.run, lowered.kinds, (inputs, mask))
        else:
            recording.hold_out(inputs, mask)
            outputs = self._dense(args)
        try:
            with settled(self.tensors[0].device):
                recording.take(outputs)
        except CalibrationError as error:
            self._skip(error)
        else:
            family.count(self)
        return outputs

    def _skip(self, error: CalibrationError) -> None:
        """A call that nothing can be learned from; the graph gives up when there are too many of them."""
        self._skipped += 1
        most = PATIENCE * self.region.options.calibration_steps
        if self._skipped >= most:
            reason = f"{most} calls could not be calibrated; of the last one: {error}"
            self.family.refuse(self, reason, logging.WARNING)
        elif self._skipped == 1:
            self.family.say(
                f"graph {self.number}: a call is left out of the calibration, and so are others like it: {error}",
                logging.WARNING,
            )

    def _needs_gradients(self, args: Sequence[Any]) -> bool:
        return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in args)
