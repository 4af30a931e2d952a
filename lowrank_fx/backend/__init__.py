"""``torch.compile(model, backend="lowrank_fx", options={...})``: calibrate while calling, then run factored.

The first calls run the model as it is and sketch what its layers see; then a plan is made, and from the next call on
the factored graphs run. Nothing else has to be called, and Dynamo compiles nothing again at the switch.

How it is built:

* Each region of Dynamo is lowered to ATen operators when it arrives (``lowering.py``), with the model's parameters in
  it. From there on it is a program like any other (``regions.py``): sites, sketches, forms, effects, planners and
  passes are those of ``optimize``. There is one table of operators, and fused attention is written out on the way.
* One plan is made for all regions of a model (``family.py``, ``planning.py``); the model is found on the stack
  (``roots.py``). Two models never share a plan, although Dynamo lets them share a region (``region.py``).
* While gradients are needed, and once a weight has changed, the dense graph runs (``watch.py``).

The plan is made inside of the call that completes the calibration, which takes as long as planning takes; calls of
other threads run dense meanwhile. The model's own weights stay where they are, for training and for whatever is left
dense, so this backend makes a model faster, not smaller in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from lowrank_fx.backend.family import Family, Phase, families, forget_all
from lowrank_fx.backend.lowering import lower
from lowrank_fx.backend.options import BackendOptions
from lowrank_fx.backend.region import Region
from lowrank_fx.backend.roots import holds, modules_of
from lowrank_fx.errors import CaptureError, LowRankError, OptionError
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan
from lowrank_fx.report import Report

__all__ = ["BackendOptions", "Status", "finish_calibration", "lowrank_fx", "refresh", "status"]

logger = logging.getLogger("lowrank_fx.backend")


def lowrank_fx(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend: what ``torch.compile`` calls for each region of a model.

    Args:
        gm: the region, as Dynamo made it.
        example_inputs: its arguments; parameters are the model's own.
        options: see :class:`BackendOptions`.
        mode: of ``torch.compile``; refused, it is one of inductor's.

    Returns:
        What runs in the place of the region.

    Raises:
        OptionError: an option is not legal, or ``mode`` was given.
        TargetError: the target's number is not legal.
    """
    if mode is not None:
        raise OptionError(
            f"mode={mode!r}: the backend 'lowrank_fx' has no modes; for those of inductor pass a function as "
            "options={'inner': ...}"
        )
    parsed = BackendOptions.parse(options)
    try:
        lowered = lower(gm, example_inputs)
    except CaptureError as error:
        logger.warning("a graph of %d nodes stays dense: %s", len(gm.graph.nodes), error)
        lowered = None
    dense: Callable[..., Any] = _inner(parsed)(gm, list(example_inputs))
    if lowered is None or not any(_is_matrix(lowered.graph, state.position) for state in lowered.states):
        return dense
    return Region(lowered, dense, parsed)


lowrank_fx.reset = forget_all  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


@dataclass(frozen=True)
class Status:
    """How far a compiled model has come.

    Attributes:
        phase: ``"waiting"`` (no call yet), ``"calibrating"``, ``"planning"``, ``"factored"``, ``"dense"`` (nothing is
            factored, and ``reason`` says why) or ``"stale"`` (a weight has changed; the dense graphs run).
        steps: calls that were calibrated.
        calibration_steps: how many are wanted.
        graphs: regions of the model that hold weights.
        plan: the plan, or None before there is one.
        report: the plan as a report to print, or None.
        reason: why the phase is what it is, where there is something to say.
    """

    phase: Phase | Literal["waiting"]
    steps: int = 0
    calibration_steps: int = 0
    graphs: int = 0
    plan: Plan | None = None
    timing: PairedTiming | None = None
    reason: str = ""

    @property
    def report(self) -> Report | None:
        """The plan as a report to print, or None before there is one."""
        return None if self.plan is None else Report(self.plan, self.timing)

    def __str__(self) -> str:
        said = f"{self.phase}: {self.steps} of {self.calibration_steps} calls calibrated, {self.graphs} graphs"
        return f"{said}; {self.reason}" if self.reason else said


def status(compiled: Any) -> Status:
    """How far a compiled model has come: phase, steps seen, plan and report.

    Args:
        compiled: what ``torch.compile(model, backend="lowrank_fx")`` returned, the model itself, or a compiled
            function that refers to its models by name.
    """
    found = _families(compiled)
    if not found:
        return Status("waiting")
    family = found[-1]
    return Status(
        phase=family.phase,
        steps=family.steps,
        calibration_steps=family.options.calibration_steps,
        graphs=len(family.members),
        plan=family.plan,
        timing=family.timing,
        reason=family.reason,
    )


def finish_calibration(compiled: Any) -> Status:
    """Make the plan now, from the calls that were calibrated so far; the next call runs factored.

    Args:
        compiled: see :func:`status`.

    Raises:
        LowRankError: there is no such model, no call was calibrated, or the target cannot be reached.
    """
    for family in _known(compiled):
        with family.work:
            if family.phase == "calibrating":
                family.settle(insist=True)
    return status(compiled)


def refresh(compiled: Any) -> Status:
    """Forget the factors and calibrate again, with the weights as they are now.

    To be called after weights were changed in a way that is not noticed (see ``watch.py``), and whenever the status is
    ``"stale"``, once training is done.

    Args:
        compiled: see :func:`status`.

    Raises:
        LowRankError: there is no such model.
    """
    for family in _known(compiled):
        with family.work:
            family.restart("refresh was called")
    return status(compiled)


def _known(compiled: Any) -> list[Family]:
    found = _families(compiled)
    if not found:
        raise LowRankError(
            f"{type(compiled).__name__} has no graph of the backend 'lowrank_fx': compile it with "
            'torch.compile(model, backend="lowrank_fx") and call it first'
        )
    return found


def _families(compiled: Any) -> list[Family]:
    """The families of a compiled model, those made last at the end."""
    modules = modules_of(compiled)
    return [
        family
        for family in sorted(families(), key=lambda family: family.serial)
        if any(family.root is module or holds(module, family.tensors) for module in modules)
    ]


def _inner(options: BackendOptions) -> Callable[..., Any]:
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(options.inner)
    return backend


def _is_matrix(graph: GraphModule, position: int) -> bool:
    """Whether a parameter may be the weight of a layer."""
    node = [node for node in graph.graph.nodes if node.op == "placeholder"][position]
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() >= 2
