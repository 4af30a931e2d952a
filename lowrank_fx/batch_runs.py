"""Running a model on the user's batches: whatever fails says which batch it was, and where in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowrank_fx._ambient import seeded
from lowrank_fx._describe import describe_call
from lowrank_fx.batches import Call
from lowrank_fx.cache import CachedBatch
from lowrank_fx.compare import check_outputs, floating_outputs, relative_error
from lowrank_fx.errors import CalibrationError, CaptureError, LowRankError
from lowrank_fx.observer import TapObserver
from lowrank_fx.program import Outputs, Program
from lowrank_fx.refusal import quiet
from lowrank_fx.tree_program import TreeProgram
from lowrank_fx.walk import Walk

STEADY = 1e-5
"""Two runs of a batch that differ by less, or by less than their dtype resolves, count as equal."""


def rehearse(model: nn.Module, call: Call) -> None:
    """Run a model on the first batch before any work is put into it.

    Args:
        model: the user's model; a copy that shares its parameters runs.
        call: the first batch, on the model's device.

    Raises:
        CalibrationError: the model fails on the batch, or returns nothing that an error can be measured on.
    """
    try:
        tree = TreeProgram.from_model(model)
    except CaptureError:  # a model that cannot be copied may still be captured as a graph
        return
    example = call.map(torch.clone)
    with torch.no_grad(), seeded(tree.device), quiet():
        try:
            output = tree.module(*example.args, **example.kwargs)
        except LowRankError:
            raise
        except Exception as error:  # whatever the model's own code raises
            raise CalibrationError(f"batch 0 is {describe_call(call)}, and {_said(tree, call, error)}") from error
    try:
        floating_outputs(output)
    except CalibrationError as error:
        raise CalibrationError(f"batch 0: {error}") from error


def run_batch(program: Program, run: Callable[[Call], Outputs], call: Call, index: int, first: Call) -> Outputs:
    """Run one batch, or a part of it.

    Args:
        program: the captured model.
        run: a way to run it.
        call: the batch, on the program's device, as the program takes it.
        index: its position in the loader.
        first: the loader's first batch, for the message.

    Returns:
        The outputs.

    Raises:
        CalibrationError: the model fails on the batch, a layer's input cannot be sketched, or the outputs cannot be
            compared; the message names the batch and the layer.
    """
    try:
        with seeded(program.device):
            outputs = run(call)
    except LowRankError:
        raise
    except Exception as error:  # whatever the model's own code raises
        before = f" (batch 0 was {describe_call(first)})" if index else ""
        said = f"batch {index} is {describe_call(call)}{before}, and {_why(program, call, error)}"
        raise CalibrationError(said) from error
    try:
        check_outputs(outputs, call.mask)
    except CalibrationError as error:
        raise CalibrationError(f"batch {index}: {error}{_nan_place(program, call)}") from error
    return outputs


def random_note(program: Program, batch: CachedBatch) -> tuple[str, ...]:
    """A note if the model's output is random: the batch is run again, with other random numbers.

    Args:
        program: the captured model.
        batch: with the outputs of the run that seed 0 gave.
    """
    with torch.no_grad(), seeded(program.device, 1):
        again = floating_outputs(program.run(batch.call))
    spread = relative_error(again, batch.reference, batch.call.mask)
    resolution = max(torch.finfo(tensor.dtype).eps for tensor in again)
    if spread <= max(resolution, STEADY):
        return ()
    return (
        "the model's output is random (dropout left on?): two runs on the same batch differ by a relative "
        f"{spread:.2g}. Errors were measured with the same random numbers on both sides; between runs that draw their "
        "own, errors below that mean nothing",
    )


def _why(program: Program, call: Call, error: Exception) -> str:
    """What failed: the model itself, or a sketch of one of its activations."""
    try:
        with torch.no_grad(), seeded(program.device):
            program.run(call)
    except LowRankError as own:
        return str(own)
    except Exception as own:  # the model's own words, without the observers in between
        return _said(program, call, own)
    layers = next((owner.layers for owner in _owners(error) if isinstance(owner, TapObserver)), "a layer")
    return f"the input of {layers} cannot be sketched: {_brief(error)}; skip= leaves such layers alone"


def _said(program: Program, call: Call, error: Exception) -> str:
    place = _graph_place(program.module, call) if isinstance(program.module, GraphModule) else ""
    names = {id(module): name for name, module in program.module.named_modules() if name}
    place = place or next((names[id(owner)] for owner in reversed(_owners(error)) if id(owner) in names), "")
    where = f" in {place!r}" if place else ""
    return f"the model fails on it{where}: {_brief(error)}"


def _nan_place(program: Program, call: Call) -> str:
    """Where NaN comes from when the model runs ``call``, as the end of a sentence; empty if there is none."""
    if any(_has_nan(tensor) for tensor in call.tensors()):
        return "; the batch itself holds NaN"
    with torch.no_grad(), seeded(program.device):
        place = (
            _graph_nan(program.module, call) if isinstance(program.module, GraphModule) else _tree_nan(program, call)
        )
    return f"; it first appears in {place!r}" if place else ""


def _graph_nan(graph: GraphModule, call: Call) -> str:
    run = Walk(graph).run(call)
    while run.next.op != "output":
        # A single NaN may be a constant that the model fills in somewhere.
        if any(_has_nan(value) and value.numel() > 1 for value in pytree.tree_leaves(run.compute())):
            return _module_of(run.next)
        run.move()
    return ""


def _tree_nan(program: Program, call: Call) -> str:
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, module in program.module.named_modules():

            def look(module: nn.Module, args: object, output: object, name: str = name) -> None:
                if any(_has_nan(value) for value in pytree.tree_leaves(output)):
                    found.append(name or type(module).__name__)

            # Children end before their parents, so the first one found holds no smaller one.
            stack.callback(module.register_forward_hook(look).remove)
        program.run(call)
    return found[0] if found else ""


def _has_nan(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any())


def _graph_place(graph: GraphModule, call: Call) -> str:
    """The module whose operator fails when the graph runs ``call``."""
    run = Walk(graph).run(call)
    try:
        with torch.no_grad():
            while run.next.op != "output":
                run.compute()
                run.move()
    except Exception:  # the same one again; where it comes from is what counts
        return _module_of(run.next)
    return ""


def _module_of(node: Node) -> str:
    """The fully qualified name of the module whose forward a node came from; its class where that is the model."""
    stack = [*(node.meta.get("nn_module_stack") or {}).values()]
    path, kind = stack[-1] if stack else ("", "")
    return str(path) or str(kind).rpartition(".")[2]


def _owners(error: Exception) -> list[object]:
    """What the methods on the way to an exception belong to, outermost first."""
    owners, trace = [], error.__traceback__
    while trace is not None:
        owners.append(trace.tb_frame.f_locals.get("self"))
        trace = trace.tb_next
    return owners


def _brief(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
