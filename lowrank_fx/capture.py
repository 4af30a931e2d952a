"""CAPTURE: a model and one example call become an FX graph of ATen operators.

``torch.export.export(..., strict=False)`` keeps fully qualified names, parameter identity, signatures and output
classes. The first dimension of every input is dynamic (the batch), and so is the second where it is a sequence (integer
inputs such as token ids and masks, and 3-D floating inputs). What the trace assumed about shapes is kept as guards, and
a call that breaks them is refused with the guard's own text, never computed wrongly.

The model is handed back exactly as it was: mode, hooks, buffers, gradient flags, random state.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from lowrank_fx.batches import Call
from lowrank_fx.caches import register_caches
from lowrank_fx.errors import CaptureError
from lowrank_fx.hooks import user_hooks
from lowrank_fx.refusal import depends_on_data, quiet, refused
from lowrank_fx.signature import CallSignature


@dataclass
class Captured:
    """A captured model.

    Attributes:
        graph_module: ATen graph; its parameters are the model's own ``Parameter`` objects, its modules are new.
        calls: turns user calls into graph calls.
        notes: what the user should know: detached hooks, inputs that are not dynamic.
        dynamic: which dimensions of the inputs may change; empty if none.
    """

    graph_module: GraphModule
    calls: CallSignature
    notes: tuple[str, ...]
    dynamic: str = ""


def unwrap(model: nn.Module | ExportedProgram) -> nn.Module:
    """The module inside a ``torch.compile`` wrapper or an exported program, or the module itself.

    Raises:
        CaptureError: ``model`` is not a module.
    """
    if isinstance(model, ExportedProgram):
        return model.module()
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"model is a {type(model).__name__}: TorchScript has neither a graph that torch.export takes nor modules "
            "that can be exchanged; give the model that it was made from"
        )
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model is {type(model).__name__}, not a torch.nn.Module")
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter lives; the CPU if it has none."""
    return next((tensor.device for tensor in module.parameters()), torch.device("cpu"))


def capture(model: nn.Module, call: Call) -> Captured:
    """Capture ``model`` as it runs ``call`` in eval mode.

    Args:
        model: any ``nn.Module``; left exactly as it was.
        call: an example call. A batch of one row is doubled, since export takes a size of one for a constant.

    Raises:
        CaptureError: export refused the model; the message names the model's own line and says what to do.
    """
    model = unwrap(model)
    # Export merges inputs that are one object, and a later call may give two.
    example = _at_least_two_rows(call).map(lambda tensor: tensor.detach().clone())
    notes: list[str] = []
    with preserved(model) as hooks, plain_attention(), quiet() as printed, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program, dynamic = _export(model, example)
        exported = program.module(check_guards=True)
        ignored = _unread(model, example, exported)
        if ignored:
            kwargs = {name: value for name, value in example.kwargs.items() if name not in ignored}
            example = Call(example.args, kwargs, example.mask)
            program, dynamic = _export(model, example)
            exported = program.module(check_guards=True)
    if hooks:
        notes.append(f"hooks on {_listed(hooks)} were detached for capture and are not part of the optimized model")
    if printed.getvalue():
        notes.append("the model prints while it runs, a graph does not; capture='modules' keeps the model's own Python")
    if not _any_batch(program):
        dynamic = ""
    if dynamic != _DYNAMIC[0]:
        notes.append(f"the model could not be captured with every dynamic dimension; dynamic are: {dynamic or 'none'}")
    graph_module, guards = _standalone(exported)
    calls = CallSignature(inspect.signature(model.forward), _shapes_only(example), guards, ignored)
    return Captured(graph_module, calls, tuple(notes), dynamic)


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[list[str]]:
    """Eval mode without user hooks inside, everything as it was after; yields the names of modules that had hooks.

    Hooks that are part of the model's mathematics stay; see :func:`~lowrank_fx.hooks.user_hooks`.
    """
    saved = list(user_hooks(model))
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({tensor.device.index or 0 for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices), attributes_kept(model):
        try:
            for module in model.modules():
                module.training = False
                # Filled by earlier calls it would be a constant of the graph; what it was computed from would be lost.
                for name, value in vars(module).items():
                    if "cache" in name and isinstance(value, dict) and _are_tensors(value.values()):
                        value.clear()
            for entry in saved:
                setattr(entry.module, entry.attribute, entry.own)
            yield list(dict.fromkeys(entry.name or type(entry.module).__name__ for entry in saved))
        finally:
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.detach().copy_(value)


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Every attribute of every module, and what its lists, sets and dictionaries hold, is afterwards as it was.

    A forward may count its calls, or keep what it computed; while it is traced, that is a fake tensor.
    """
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    containers: dict[int, tuple[Any, Any]] = {}

    def keep(value: Any) -> None:
        if isinstance(value, dict | list | set) and id(value) not in containers:
            containers[id(value)] = (value, copy.copy(value))
            for item in value.values() if isinstance(value, dict) else value:
                keep(item)

    for _, own in attributes:
        keep(own)
    try:
        yield
    finally:
        for value, before in containers.values():
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        for module, own in attributes:
            module.__dict__.clear()
            module.__dict__.update(own)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch's transformer layers from handing their weights to one fused kernel, which hides every layer."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


_DYNAMIC = ("batch and sequence", "batch", "")


def _export(model: nn.Module, call: Call) -> tuple[ExportedProgram, str]:
    failure: Exception | None = None
    for dynamic in _DYNAMIC:
        shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
        for tensor in call.tensors():
            dims = _dynamic_dims(tensor, dynamic)
            if dims:
                shapes[tensor] = dict.fromkeys(dims, Dim.AUTO)
        try:
            # What one attempt leaves behind in the model must not meet the next.
            with attributes_kept(model), _spelled_out(model, call):
                return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False), dynamic
        except Exception as error:  # export raises many kinds; the last attempt's reason is the one that counts
            failure = error
            if "Cache" in str(error) and register_caches():
                return _export(model, call)
            if depends_on_data(error):
                break
    assert failure is not None
    raise refused(model, failure) from failure


def _are_tensors(values: Iterable[object]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _any_batch(program: ExportedProgram) -> bool:
    """Whether the graph holds for any number of rows: a loop over them fixes it, and export says nothing."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.name in inputs]
    return any(isinstance(value, Tensor) and value.dim() and not is_concrete_int(value.shape[0]) for value in values)


def _unread(model: nn.Module, call: Call, exported: nn.Module) -> frozenset[str]:
    """Names that ``**kwargs`` swallowed (a loader's labels, say) and no operator of the graph reads."""
    assert isinstance(exported, GraphModule)
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    owners = [name for name, value in call.kwargs.items() for _ in pytree.tree_leaves(value)]
    read = {
        owner
        for owner, node in zip(reversed(owners), reversed(placeholders), strict=False)
        if any(user.target != "_guards_fn" for user in node.users)
    }
    named = inspect.signature(model.forward).parameters
    return frozenset(name for name in call.kwargs if name not in named and name not in read)


@contextlib.contextmanager
def _spelled_out(model: nn.Module, call: Call) -> Iterator[None]:
    """Give ``forward`` a signature that names what the call passes through ``**kwargs``.

    ``torch.export`` (2.13) does not find the dynamic shapes of tensors that only ``**kwargs`` takes.
    """
    forward = model.forward
    signature = inspect.signature(forward)
    unnamed = [name for name in call.kwargs if name not in signature.parameters]
    own = model.__dict__.get("forward")
    if unnamed:
        named = [entry for entry in signature.parameters.values() if entry.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in unnamed]

        def spelled_out(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        spelled_out.__signature__ = signature.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
        model.__dict__["forward"] = spelled_out
    try:
        yield
    finally:
        if unnamed and own is None:
            del model.__dict__["forward"]
        elif unnamed:
            model.__dict__["forward"] = own


def _dynamic_dims(tensor: Tensor, dynamic: str) -> tuple[int, ...]:
    if not dynamic or tensor.dim() == 0:
        return ()
    is_sequence = tensor.dim() >= 2 and (not tensor.is_floating_point() or tensor.dim() == 3)
    return (0, 1) if is_sequence and dynamic == _DYNAMIC[0] else (0,)


def _standalone(exported: nn.Module) -> tuple[GraphModule, Callable[..., object] | None]:
    """A plain GraphModule over the exported graph: own modules, the model's parameters, guards taken out."""
    assert isinstance(exported, GraphModule)
    graph = exported.graph
    guards: Callable[..., object] | None = None
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            guards = exported.get_submodule("_guards_fn").forward
            graph.erase_node(node)
        elif node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # it would pin the dtype and device of the example
    standalone = GraphModule(exported, graph, class_name="CapturedGraph")
    if any(_writes(node) for node in graph.nodes):
        _own_buffers(standalone)
    standalone.graph.lint()
    standalone.recompile()
    return standalone, guards


def _writes(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _own_buffers(gm: GraphModule) -> None:
    """Give a graph that writes to something its own copy of the state, so that running it never changes the user's."""
    for module in gm.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.detach().clone()


def _at_least_two_rows(call: Call) -> Call:
    if call.batch_size != 1:
        return call
    return call.map(lambda tensor: torch.cat((tensor, tensor)) if tensor.dim() and tensor.shape[0] == 1 else tensor)


def _shapes_only(call: Call) -> Call:
    return call.map(lambda tensor: torch.empty_like(tensor, device="meta"))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more modules" if len(names) > 5 else "")
