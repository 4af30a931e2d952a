"""EXPORT: a model's program as exporters take it: on the CPU, with plain inputs and outputs, and with inputs to check.

A captured graph was rewritten since ``torch.export`` made it, so it is exported again; the dimensions that could change
stay so. A module tree is captured first, where ``torch.export`` takes it.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from lowrank_fx.batches import Call, bind_batch
from lowrank_fx.capture import capture
from lowrank_fx.errors import CaptureError, ExportError
from lowrank_fx.export_inputs import (
    Shapes,
    argument_names,
    distinct,
    filled,
    merged,
    output_names,
    plain,
    trials,
)
from lowrank_fx.graph_program import GraphProgram
from lowrank_fx.program import Program
from lowrank_fx.refusal import quiet
from lowrank_fx.session import Session
from lowrank_fx.signature import CallSignature
from lowrank_fx.storage import Artifact

HELD_OUT = "held-out batches"
GIVEN = "the given example"
RANDOM = "random values in the shapes of the captured example"


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        artifact: on the CPU.
        module: its graph.
        calls: how the graph is called.
        leaves: the leaves of a call, with real tensors.
        source: where these come from.
    """

    artifact: Artifact
    module: GraphModule
    calls: CallSignature
    leaves: tuple[Any, ...]
    source: str

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def shapes(self) -> Shapes:
        """Per tensor among the leaves its captured sizes: numbers, and symbols where they may change."""
        return _shapes([node.meta["val"] for node in self.module.graph.find_nodes(op="placeholder")])

    @property
    def input_names(self) -> list[str]:
        """The names of the tensors among the inputs."""
        names = argument_names(self.calls)
        return [name for name, leaf in zip(names, self.leaves, strict=True) if isinstance(leaf, Tensor)]

    def call(self, tensors: Sequence[Tensor]) -> Any:
        """The model's output, in its own classes, for other tensors in the places of :attr:`tensors`."""
        args, kwargs = pytree.tree_unflatten(merged(self.leaves, tensors), self.calls._spec)
        return self.module(*args, **kwargs)

    def plain_call(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of :meth:`plain_module` for other tensors."""
        args, kwargs = pytree.tree_unflatten(merged(self.leaves, tensors), self.calls._spec)
        return tuple(plain(value) for value in args), {key: plain(value) for key, value in kwargs.items()}

    def flat_module(self) -> nn.Module:
        """A module from the tensors among the inputs to the tuple of those among the outputs."""

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return tuple(leaf for leaf in pytree.tree_leaves(self.call(tensors)) if isinstance(leaf, Tensor))

        return _Adopted(self.module, run, self.input_names)

    def plain_module(self) -> nn.Module:
        """A module that is called as the model was captured, and returns dictionaries, lists and tuples.

        Other classes among the inputs are expected as dictionaries, lists or tuples, too.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves((args, kwargs))
            args, kwargs = pytree.tree_unflatten(leaves, self.calls._spec)
            return plain(self.module(*args, **kwargs))

        names = [name for name in self.calls._given if name not in self.calls.example.kwargs]
        return _Adopted(self.module, run, names, list(self.calls.example.kwargs))

    def output_names(self) -> tuple[list[str], list[bool]]:
        """The name of every leaf of the output, and which of them are tensors; none is that of an input or a weight."""
        with torch.no_grad():
            output = self.call(self.tensors)
        tensors = [isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(output)]
        taken = [*self.input_names, *self.module.state_dict(keep_vars=True)]
        return distinct(output_names(output), taken, "_out"), tensors


class _Adopted(nn.Module):
    """The parameters and modules of another module under the same names, with another ``forward``."""

    def __init__(
        self, module: nn.Module, run: Callable[..., Any], positional: Sequence[str], keywords: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self._modules = module._modules

        def forward(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        # torch names the inputs of a program by the signature, and needs it to find the shapes of keywords.
        legal = distinct([name.replace(".", "_").replace("*", "") for name in (*positional, *keywords)])
        parameters = [
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD if place < len(positional) else inspect.Parameter.KEYWORD_ONLY,
            )
            for place, name in enumerate(legal)
        ]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward
        self.training = False


def subject(artifact: Artifact, session: Session | None, example: Any = None) -> Subject:
    """Prepare a model for export.

    Args:
        artifact: the model.
        session: gives held-out inputs; None for a loaded or folded model.
        example: a batch as a loader yields it, or the arguments of ``forward`` as ``(tuple, dict)``, whose rows the
            file is checked with; None for held-out rows or, where there are none, random values.

    Raises:
        ExportError: the model cannot become a graph, or there is no example to make one with.
        CallError: the example does not fit the model.
        CalibrationError: likewise.
    """
    artifact = replace(artifact, program=_on_cpu(artifact.program))
    program = artifact.program
    held_out = None if session is None else _held_out(session)
    call = held_out
    if isinstance(program, GraphProgram):
        module, calls = program.module, program.calls
        if example is not None:
            call = _bound(example, calls.signature)
    else:
        if example is not None:
            call = _bound(example, inspect.signature(program.module.forward))
        if call is None:
            raise ExportError(
                "the model was taken as a module tree, which has to run once to become a graph, and a loaded or folded "
                "model keeps no inputs; pass example= (on the command line --data), such as it was calibrated with"
            )
        module, calls = _captured(program, call)
    casts = _casts(module)
    if call is None:
        leaves, source = filled(module, calls), RANDOM
    else:
        leaves = pytree.tree_leaves(calls.bind(call.args, call.kwargs))
        source = GIVEN if example is not None else HELD_OUT
    leaves = pytree.tree_map_only(
        Tensor, lambda leaf: leaf.detach().cpu().to(casts.get(leaf.dtype, leaf.dtype)), leaves
    )
    return Subject(artifact, module, calls, tuple(leaves), source)


def exported(module: nn.Module, subject: Subject, args: Any, kwargs: Any, *, dynamic: bool) -> ExportedProgram:
    """A module of a subject as an exported program.

    Args:
        module: :meth:`Subject.flat_module` or :meth:`Subject.plain_module`.
        subject: whose module it is.
        args: an example call, whose sizes are those of the program where they cannot change.
        kwargs: likewise.
        dynamic: whether the dimensions that were captured as such may change.

    Raises:
        ExportError: ``torch.export`` refuses it.
    """
    shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for tensor, sizes in zip(given, subject.shapes, strict=True):
        free = [dim for dim, size in enumerate(sizes) if not isinstance(size, int)]
        if dynamic and free:
            shapes[tensor] = dict.fromkeys(free, Dim.AUTO)
    try:
        with quiet(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # export raises many kinds
        raise ExportError(f"torch.export refuses the rewritten model: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # where the user's sources lie is nothing that a file should tell
    return program


def input_shapes(program: ExportedProgram) -> Shapes:
    """The sizes of the tensors that a program takes: numbers, and expressions of symbols where they may change."""
    wanted = set(program.graph_signature.user_inputs)
    return _shapes([node.meta["val"] for node in program.graph.find_nodes(op="placeholder") if node.name in wanted])


def check_inputs(subject: Subject, *, dynamic: bool) -> list[list[Tensor]]:
    """One or two lists of inputs to check a file with; see :func:`~lowrank_fx.export_inputs.trials`.

    Sizes that are fixed are those of the example that was given.

    Raises:
        CallError: the model takes no inputs of these sizes.
    """
    if not dynamic and subject.source == GIVEN:
        return [[tensor.contiguous() for tensor in subject.tensors]]
    found = trials(subject.tensors, subject.shapes, subject.calls, subject.leaves)
    return found if dynamic else found[:1]


def _shapes(values: Sequence[Any]) -> Shapes:
    return [tuple(_size(size) for size in value.shape) for value in values if isinstance(value, Tensor)]


def _size(size: Any) -> Any:
    return int(size) if is_concrete_int(size) else size.node.expr


def first_line(error: BaseException) -> str:
    """The class and the first line of an exception."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _held_out(session: Session) -> Call | None:
    for batches in (session.calibration.report_batches, session.calibration.select_batches):
        if batches:
            return batches[0].call
    return None


def _bound(example: Any, signature: inspect.Signature) -> Call:
    match example:
        case (tuple(), Mapping()):
            return bind_batch(example, signature, lambda given: given)
    return bind_batch(example, signature)


def _on_cpu(program: Program) -> Program:
    before, after = program.device, torch.device("cpu")
    if before == after:
        return program
    program = program.copy()
    program.module.to(after)
    program.moved(before, after)
    return program


def _captured(program: Program, call: Call) -> tuple[GraphModule, CallSignature]:
    try:
        captured = capture(program.module, call.to("cpu"))
    except CaptureError as error:
        raise ExportError(
            "the model runs as a module tree and cannot become a graph, so it cannot be exported: "
            f"{_without_hint(error)}"
        ) from error
    return captured.graph_module, captured.calls


def _without_hint(error: CaptureError) -> str:
    """What capture says, without the advice to take the module tree, which the model was taken as."""
    return re.sub(r"(, or|; if the model runs by itself,) pass capture='modules'.*", "", str(error), flags=re.DOTALL)


def _casts(module: GraphModule) -> dict[torch.dtype, torch.dtype]:
    """What became of each floating dtype of the captured parameters: a model may have been cast since."""
    made: dict[torch.dtype, torch.dtype] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value, tensor = node.meta.get("val"), pytree.tree_leaves(_attribute(module, str(node.target)))[0]
        if isinstance(value, Tensor) and isinstance(tensor, Tensor) and value.dtype.is_floating_point:
            made.setdefault(value.dtype, tensor.dtype)
    return {before: after for before, after in made.items() if before != after}


def _attribute(module: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)
