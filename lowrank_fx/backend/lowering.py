"""A region of Dynamo becomes a graph of ATen operators, the form that sites are found in everywhere else.

Dynamo hands over calls of torch-level functions (``torch._C._nn.linear``, ``torch.conv2d``, one
``multi_head_attention_forward`` that hides its linear layers). Tracing the region once more, on the fake tensors that
Dynamo leaves in it, gives the operators that ``torch.export`` gives for the same model. So one table of operators, one
set of passes and one program class serve both, and nothing in this package looks at torch-level functions.

Under autocast the operators that Dynamo saw take 32-bit weights and give 16-bit results. Casts are written out here
(:func:`_write_casts`), so that the graph computes the same with autocast off, which is how it is planned.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import tracing
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lowrank_fx._ambient import settled
from lowrank_fx.backend.attention import DECOMPOSITIONS
from lowrank_fx.errors import CaptureError
from lowrank_fx.passes.verify import run_on_metas
from lowrank_fx.rewrite import copy_graph_module

aten = torch.ops.aten

_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)

_NORMS = {aten.batch_norm.default: 5, aten.instance_norm.default: 5}
"""Operators that write to their running statistics without saying so, and where the flag stands that makes them."""


@dataclass(frozen=True)
class State:
    """A parameter or buffer that Dynamo passes to a region.

    Attributes:
        position: among the region's arguments.
        source: how Dynamo came to it, such as ``L['self']._modules['fc']._parameters['weight']``.
    """

    position: int
    source: str


@dataclass(frozen=True)
class Lowered:
    """A region as a graph of ATen operators whose parameters are still arguments.

    Attributes:
        graph: takes what the region takes.
        states: which arguments are parameters and buffers.
        inputs: positions of the other arguments.
        mask: position of the padding mask among the arguments; None without one.
        kinds: of the devices that it computes on.
        writes: whether the region writes to an input.
        dynamic: whether sizes are among the arguments.
        attached: parameters and buffers that the region holds itself (Dynamo does so where it does not pass them); they
            count as further arguments, behind those of a call.
    """

    graph: GraphModule
    states: tuple[State, ...]
    inputs: tuple[int, ...]
    mask: int | None
    kinds: tuple[str, ...]
    writes: bool
    dynamic: bool
    attached: tuple[Tensor, ...] = ()

    def bound(self, tensors: Sequence[Tensor], names: Sequence[str]) -> GraphModule:
        """The graph with tensors in the place of the arguments that stand for parameters and buffers.

        Args:
            tensors: one for each of ``states``; they are shared, not copied.
            names: their fully qualified names.
        """
        copied = copy_graph_module(self.graph, clone=False)
        graph = copied.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        holder = nn.Module()
        for state, tensor, name in zip(self.states, tensors, names, strict=True):
            _register(holder, name, tensor)
            node = placeholders[state.position]
            with graph.inserting_before(node):
                constant = graph.create_node("get_attr", name)  # the name is registered below
            constant.meta = {"val": node.meta["val"]}
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
            _place(constant, name.rpartition(".")[0])
        kept = [node for node in graph.nodes if node.op == "placeholder"]
        first = next((node for node in graph.nodes if node.op != "placeholder"), None)
        for node in kept:  # constants stand between them
            if first is not None and node > first:
                first.prepend(node)
        if self.mask is not None:
            _rename(graph, placeholders[self.mask], "attention_mask")
        # What the graph still calls by name (tensors that tracing lifted) is not in the holder yet.
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) not in names:
                setattr(holder, str(node.target), getattr(self.graph, str(node.target)))
        made = GraphModule(holder, graph, class_name="RegionGraph")
        made.graph.eliminate_dead_code()
        made.graph.lint()
        made.recompile()
        return made


def run_written(run: Callable[..., Any], kinds: Sequence[str], inputs: Sequence[Any]) -> Any:
    """Run a graph that was lowered: its casts are written out, and autocast must not cast once more.

    Args:
        run: the graph, rewritten or not.
        kinds: of the devices that it computes on.
        inputs: its arguments.
    """
    casting = [kind for kind in kinds if torch.is_autocast_enabled(kind)]
    if not casting:
        return run(*inputs)
    with contextlib.ExitStack() as stack:
        for kind in casting:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return run(*inputs)


def lower(gm: GraphModule, example_inputs: Sequence[Any]) -> Lowered:
    """Lower a region, inside of the call of the backend.

    Args:
        gm: as Dynamo made it.
        example_inputs: its arguments; parameters are the model's own.

    Raises:
        CaptureError: it cannot be lowered, or writes to its parameters or buffers; the message says why.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [node.meta.get("example_value") for node in placeholders]
    mode = next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)
    if mode is None:
        raise CaptureError("none of its inputs is a tensor")
    attached = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    states = (
        *(
            State(position, _source(node))
            for position, (node, example) in enumerate(zip(placeholders, example_inputs, strict=True))
            if _is_state(node, example)
        ),
        *(State(len(placeholders) + position, name) for position, name in enumerate(attached)),
    )
    values += [mode.from_tensor(tensor, static_shapes=True) for tensor in attached.values()]
    graph = _traced(gm, list(attached), values, mode)
    autocast = any(torch.is_autocast_enabled(kind) for kind in _kinds(values))
    islands = any(node.target in _AUTOCAST for node in graph.graph.nodes)
    if islands:
        _enter_islands(graph, mode)
    if autocast or islands:
        _write_casts(graph, mode, _kinds(values))
    for node in reversed(graph.graph.nodes):
        # The lowered graph runs where no gradients are recorded, with its casts written out.
        if node.target in (torch._C._set_grad_enabled, *_AUTOCAST):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    written = {position for position, node in enumerate(_placeholders(graph)) if node in set(_written(graph))}
    positions = {state.position for state in states}
    if written & positions:
        raise CaptureError("it writes to a parameter or buffer of its model (a batch norm in training mode, a cache)")
    inputs = tuple(position for position in range(len(placeholders)) if position not in positions)
    return Lowered(
        graph=graph,
        states=states,
        inputs=inputs,
        mask=_mask(placeholders, values, inputs),
        kinds=_kinds(values),
        writes=bool(written),
        dynamic=any(isinstance(value, torch.SymInt) for value in values),
        attached=tuple(attached.values()),
    )


def _traced(gm: GraphModule, attached: Sequence[str], values: Sequence[Any], mode: FakeTensorMode) -> GraphModule:
    count = len(values) - len(attached)

    def run(*given: Any) -> Any:
        return functional_call(gm, dict(zip(attached, given[count:], strict=True)), given[:count])

    try:
        # Dynamo gives its backends another fake mode than the one its own values are of.
        with tracing(None), mode, torch.no_grad():
            return make_fx(
                run if attached else gm,
                decomposition_table=DECOMPOSITIONS,
                pre_dispatch=True,
                tracing_mode="real",
                _allow_non_fake_inputs=True,
            )(*values)
    except Exception as error:  # tracing raises many kinds
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise CaptureError(f"it cannot be traced: {type(error).__name__}: {line}") from error


def _placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _is_state(node: Node, example: Any) -> bool:
    if isinstance(example, nn.Parameter):
        return True
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return isinstance(example, Tensor) and (static or "_buffers[" in _source(node))


def _source(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    return node.name if source is None else str(source.name)


def _mask(placeholders: Sequence[Node], values: Sequence[Any], inputs: Sequence[int]) -> int | None:
    """The one input that is called ``attention_mask`` and has the shape of one."""
    found = [
        position
        for position in inputs
        if "attention_mask" in _source(placeholders[position])
        and isinstance(values[position], Tensor)
        and values[position].dim() == 2
    ]
    return found[0] if len(found) == 1 else None


def _kinds(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value.device.type for value in values if isinstance(value, Tensor)))


def _register(holder: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        child = holder._modules[part]
        assert child is not None
        holder = child
    if isinstance(tensor, nn.Parameter):
        holder._parameters[leaf] = tensor
    else:
        holder.register_buffer(leaf, tensor)


def _place(constant: Node, owner: str) -> None:
    """Say of the nodes that apply a parameter which module they belong to; names of folded weights follow it."""
    for user in constant.users:
        users = user.users if user.target is aten.to.dtype else (user,)
        for node in users:
            node.meta.setdefault("nn_module_stack", {owner: (owner, "")})


def _rename(graph: torch.fx.Graph, node: Node, name: str) -> None:
    if all(other.name != name for other in graph.nodes):
        node._rename(name)
        node.target = name


# ---- what is written to ----------------------------------------------------------------------------------------------


def _written(gm: GraphModule) -> Iterator[Node]:
    """The nodes whose memory the graph writes to, views followed to what they are views of."""
    for node in gm.graph.nodes:
        flag = _NORMS.get(node.target)
        if flag is not None and len(node.args) > flag and node.args[flag] is True:
            yield from (argument for argument in node.args[3:5] if isinstance(argument, Node))
        if not isinstance(node.target, OpOverload):
            continue
        for position, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
            for leaf in pytree.tree_leaves(given):
                if isinstance(leaf, Node):
                    yield _memory_of(leaf)


def _memory_of(node: Node) -> Node:
    while node.args and isinstance(source := node.args[0], Node):
        if node.target is not operator.getitem:  # one of several results, such as those of unbind
            if not isinstance(node.target, OpOverload):
                break
            if all(returned.alias_info is None for returned in node.target._schema.returns) and not _may_alias(node):
                break
        node = source
    return node


def _may_alias(node: Node) -> bool:
    """Operators that give their input back where there is nothing to do, and do not say so."""
    return node.target in (aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints, aten.to.dtype)


# ---- autocast --------------------------------------------------------------------------------------------------------


def _enter_islands(gm: GraphModule, mode: FakeTensorMode) -> None:
    """Give every node the dtype that it has where autocast is switched on or off within the graph.

    Tracing writes the switches down and does not turn them: what it knows holds for autocast as the caller has it.
    """
    entered: dict[Node, contextlib.AbstractContextManager[Any]] = {}
    with contextlib.ExitStack() as stack:
        for node in gm.graph.nodes:
            if node.target is _AUTOCAST[0]:
                entered[node] = inside = contextlib.ExitStack()
                inside.enter_context(torch.autocast(*node.args))
                stack.push(inside)
            elif node.target is _AUTOCAST[1]:
                entered[node.args[0]].__exit__(None, None, None)
            elif isinstance(node.target, OpOverload) or node.target is operator.getitem:
                value = run_on_metas(mode, node.target, node.args, node.kwargs, new_guards=False)
                if _dtype(value) != _dtype(node.meta.get("val")):
                    node.meta["val"] = value


def _write_casts(gm: GraphModule, mode: FakeTensorMode, kinds: Sequence[str]) -> None:
    """Cast the inputs of every operator that gives another dtype without autocast than it gave with it.

    Autocast casts all floating inputs of an operator to one dtype, that of its result; which one, the trace knows.

    Raises:
        CaptureError: an operator gives yet another dtype.
    """
    with _plain(kinds):
        for node in gm.graph.nodes:
            if not isinstance(node.target, OpOverload) or _dtype(node.meta.get("val")) is None:
                continue
            wanted = _dtype(node.meta["val"])
            if _dtype(run_on_metas(mode, node.target, node.args, node.kwargs, new_guards=False)) == wanted:
                continue
            assert wanted is not None
            _cast_inputs(gm, mode, node, wanted)
            if _dtype(run_on_metas(mode, node.target, node.args, node.kwargs, new_guards=False)) != wanted:
                raise CaptureError(f"{node.target} gives {wanted} under autocast, and no cast of its inputs does so")


def _cast_inputs(gm: GraphModule, mode: FakeTensorMode, node: Node, dtype: torch.dtype) -> None:
    def cast(argument: Node) -> Node:
        value = argument.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return argument
        with gm.graph.inserting_before(node):
            made = gm.graph.call_function(aten.to.dtype, (argument, dtype))
        made.meta["val"] = run_on_metas(mode, aten.to.dtype, made.args, {}, new_guards=False)
        return made

    node.args = map_arg(node.args, cast)
    node.kwargs = map_arg(node.kwargs, cast)


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype of the first floating tensor."""
    found = (leaf.dtype for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return next(found, None)


@contextlib.contextmanager
def _plain(kinds: Sequence[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(settled(torch.device(kind)))
        yield
