"""The invariants of a captured graph, and the verifier that holds every pass to them.

A graph is well formed when

1. ``torch.fx``'s own lint accepts it: defined before used, no name twice, placeholders before calls, the output last;
2. every ``get_attr`` target resolves to a tensor (or, for a higher order operator, to a module), and the node's
   ``meta["val"]`` has that tensor's shape and dtype;
3. every call of an ATen operator carries a ``meta["val"]`` that agrees in structure, dtype, rank and sizes with running
   the operator again on the metas of its arguments;
4. no node is dead: what has no user and no effect is gone;
5. no parameter or buffer lost its last user without being deleted (checked when the caller says which were unused
   before).

The readers of a graph that both the verifier and the passes need live here as well; authors of passes find all of them
in :mod:`lowrank_fx.passes.base`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from lowrank_fx.errors import PassError

_SHOWN_PROBLEMS = 8
_MISSING = object()


def resolve_attr(gm: GraphModule, target: str) -> object:
    """What the dotted name ``target`` refers to in ``gm``.

    Raises:
        PassError: nothing has that name.
    """
    found: object = gm
    for part in target.split("."):
        found = getattr(found, part, _MISSING)
        if found is _MISSING:
            raise PassError(f"{target!r} does not exist in the graph module: {part!r} is missing")
    return found


def attr_tensor(gm: GraphModule, node: Node) -> Tensor:
    """The tensor that a ``get_attr`` node reads. Tied weights give the same object for different nodes.

    Raises:
        PassError: the node is not a ``get_attr``, or its target is missing or not a tensor.
    """
    if node.op != "get_attr":
        raise PassError(f"node {node.name!r} is a {node.op}, not a get_attr; it reads no parameter")
    found = resolve_attr(gm, str(node.target))
    if not isinstance(found, Tensor):
        raise PassError(f"node {node.name!r} reads {node.target!r}, which is a {type(found).__name__}, not a tensor")
    return found


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The fake tensor mode that the graph's ``meta["val"]`` were made in.

    Raises:
        PassError: no node carries a fake tensor, so the graph does not come from ``torch.export``.
    """
    for node in gm.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    raise PassError('no node of the graph carries a fake tensor in meta["val"]; capture the model with torch.export')


def is_dead(node: Node) -> bool:
    """Whether a node has neither users nor effects.

    An inserted module is never dead: an observer records what passes through it, used or not.
    """
    return not node.users and node.op != "call_module" and not node.is_impure()


def run_on_metas(
    mode: FakeTensorMode,
    op: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    new_guards: bool = True,
) -> Any:
    """The value of ``op`` on the ``meta["val"]`` of its argument nodes, under the fake mode.

    Args:
        mode: the graph's fake tensor mode.
        op: the operator.
        args: positional arguments; nodes may be nested in lists, tuples, dictionaries and slices.
        kwargs: keyword arguments, likewise.
        new_guards: False keeps what the run learns about symbolic sizes out of the graph's shape environment.

    Raises:
        PassError: an argument node carries no ``meta["val"]``.
    """

    def meta_of(node: Node) -> Any:
        if "val" not in node.meta:
            raise PassError(f'argument {node.name!r} ({node.op} of {node.target}) carries no meta["val"]')
        return node.meta["val"]

    fake_args, fake_kwargs = map_arg((tuple(args), dict(kwargs)), meta_of)
    if isinstance(op, OpOverload) and op._schema.is_mutable:
        # The operator may resize or transpose its argument in place, and that argument is another node's meta.
        fake_args, fake_kwargs = pytree.tree_map_only(
            FakeTensor, lambda t: t.new_empty_strided(t.size(), t.stride()), (fake_args, fake_kwargs)
        )
    environment = mode.shape_env
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(mode)
        stack.enter_context(enable_python_dispatcher())
        if environment is not None and not new_guards:
            stack.enter_context(environment.suppress_guards())
            stack.enter_context(environment.ignore_fresh_unbacked_symbols())
        return op(*fake_args, **fake_kwargs)


def used_tensors(gm: GraphModule) -> dict[int, Tensor]:
    """The tensors that live nodes of the graph read, by identity.

    Everything inside a module that a node calls or passes on (an observer, the body of a higher order operator) counts
    as used.
    """
    used: dict[int, Tensor] = {}
    for node in gm.graph.nodes:
        if node.op not in {"get_attr", "call_module"} or is_dead(node):
            continue
        found = resolve_attr(gm, str(node.target))
        if isinstance(found, Tensor):
            used[id(found)] = found
        elif isinstance(found, nn.Module):
            used.update((id(tensor), tensor) for tensor in (*found.parameters(), *found.buffers()))
    return used


def registered_tensors(gm: GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its FQNs, so a tied weight comes once per name."""
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def unused_names(gm: GraphModule) -> frozenset[str]:
    """The FQNs of parameters and buffers that no live node of the graph reads, under this or another name."""
    used = used_tensors(gm)
    return frozenset(name for name, tensor in registered_tensors(gm) if id(tensor) not in used)


def check_graph(gm: GraphModule, *, allowed_unused: Collection[str] | None = None) -> None:
    """Hold a graph module to the invariants listed at the top of this file.

    Args:
        gm: the graph module, whose graph was cleaned of dead code (``torch.export`` leaves some behind).
        allowed_unused: FQNs of the parameters and buffers that may be without a user (:func:`unused_names` of the graph
            before the pass). None does not look at unused ones at all.

    Raises:
        PassError: an invariant is broken; the message lists what, node by node.
    """
    problems = list(_problems(gm))
    if allowed_unused is not None and not problems:
        problems = [
            f"{name!r} is registered but no node reads it any more; delete it with its last user"
            for name in sorted(unused_names(gm) - set(allowed_unused))
        ]
    if problems:
        shown = problems[:_SHOWN_PROBLEMS]
        rest = len(problems) - len(shown)
        if rest:
            shown.append(f"and {rest} more")
        raise PassError("the graph breaks its invariants:\n  " + "\n  ".join(shown))


def _problems(gm: GraphModule) -> Iterator[str]:
    dangling = [_problem_of_attr(gm, node) for node in gm.graph.nodes if node.op == "get_attr"]
    if any(dangling):
        # Lint would stop at the first of them with a message that does not name the node.
        yield from (problem for problem in dangling if problem)
        return
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        yield f"lint: {error}"
        return
    yield from _problems_of_order(gm)
    mode = fake_mode_of(gm)
    for node in gm.graph.nodes:
        if is_dead(node):
            yield f"{node.name!r} ({node.target}) is dead: it has no user and no effect"
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            yield from _problems_of_call(mode, node, node.target)


def _problem_of_attr(gm: GraphModule, node: Node) -> str | None:
    try:
        found = resolve_attr(gm, str(node.target))
    except PassError as error:
        return f"{node.name!r} dangles: {error}"
    if isinstance(found, nn.Module):
        return None
    if not isinstance(found, Tensor):
        return f"{node.name!r} reads {node.target!r}, which is a {type(found).__name__}, not a tensor"
    meta = node.meta.get("val")
    if not isinstance(meta, Tensor):
        return f'{node.name!r} reads {node.target!r} but carries no tensor in meta["val"]'
    if meta.dtype != found.dtype or tuple(meta.shape) != tuple(found.shape):
        return f'{node.name!r}: meta["val"] says {_describe(meta)}, but {node.target!r} is {_describe(found)}'
    return None


def _problems_of_order(gm: GraphModule) -> Iterator[str]:
    nodes = list(gm.graph.nodes)
    called = False
    for node in nodes:
        if node.op == "placeholder" and called:
            yield f"placeholder {node.name!r} comes after a call; placeholders come first"
        called = called or node.op.startswith("call_")
    outputs = [node for node in nodes if node.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        yield f"the graph has {len(outputs)} outputs and ends in {nodes[-1].name!r}; it must end in its only output"


def _problems_of_call(mode: FakeTensorMode, node: Node, op: OpOverload) -> Iterator[str]:
    if not op._schema.returns:
        return
    if "val" not in node.meta:
        yield f'{node.name!r} ({op}) carries no meta["val"]'
        return
    if torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags:
        return  # each run makes new symbols, so there is nothing to compare with
    try:
        expected = run_on_metas(mode, op, node.args, node.kwargs, new_guards=False)
    except Exception as error:  # an operator may raise anything on arguments that do not fit
        yield f"{node.name!r} ({op}) does not run on the metas of its arguments: {error}"
        return
    given_leaves, given_tree = pytree.tree_flatten(node.meta["val"])
    expected_leaves, expected_tree = pytree.tree_flatten(expected)
    if len(given_leaves) != len(expected_leaves):
        yield f'{node.name!r} ({op}): meta["val"] has the structure {given_tree}, the operator gives {expected_tree}'
        return
    for given, true in zip(given_leaves, expected_leaves, strict=True):
        if not _agree(given, true):
            yield f'{node.name!r} ({op}): meta["val"] says {_describe(given)}, the operator gives {_describe(true)}'


def _agree(given: object, true: object) -> bool:
    if isinstance(true, Tensor):
        return (
            isinstance(given, Tensor)
            and given.dtype == true.dtype
            and given.dim() == true.dim()
            and all(_same_size(a, b) for a, b in zip(given.shape, true.shape, strict=True))
        )
    if isinstance(true, int | torch.SymInt):
        return isinstance(given, int | torch.SymInt) and _same_size(given, true)
    return type(given) is type(true)


def _same_size(given: int | torch.SymInt, true: int | torch.SymInt) -> bool:
    """Whether two sizes agree; a number where the operator gives a symbol is a size that was frozen by mistake."""
    if isinstance(true, int):
        return given == true if isinstance(given, int) else _hint(given) in {true, None}
    if isinstance(given, int):
        return False
    hints = {_hint(given), _hint(true)}
    return None in hints or len(hints) == 1


def _hint(size: torch.SymInt) -> int | None:
    return size.node.hint if size.node.has_hint() else None


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(str(size) for size in value.shape)}]"
    return f"{type(value).__name__} {value}"
