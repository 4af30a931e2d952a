"""The tools a pass rewrites a graph with: parameters under their names, nodes with a true ``meta["val"]``.

* The graph shares its parameters with the user's model, so new tensors are registered (:func:`set_parameter`,
  :func:`replace_parameter`) and none that is there is written to.
* A weight is its tensor, not its name: :func:`users_of_tensor` tells who reads it under any name.
* :func:`parameter_node` and :func:`call_node` give every new node its ``meta["val"]``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowrank_fx.errors import PassError
from lowrank_fx.passes.verify import (
    fake_mode_of,
    registered_tensors,
    resolve_attr,
    run_on_metas,
)

_ORIGIN_KEYS = ("nn_module_stack", "stack_trace", "torch_fn", "custom")
# A module's second call appears in the module stack as "layer@1".
_CALL_NUMBER = re.compile(r"@\d+")


def _owner(gm: GraphModule, target: str) -> tuple[nn.Module, str]:
    path, _, leaf = target.rpartition(".")
    owner = resolve_attr(gm, path) if path else gm
    if not isinstance(owner, nn.Module):
        raise PassError(f"{target!r} cannot be an attribute: {path!r} is a {type(owner).__name__}, not a module")
    return owner, leaf


def get_parameter(gm: GraphModule, target: str) -> Tensor:
    """The parameter or buffer with the FQN ``target``.

    Raises:
        PassError: nothing has that name, or it is not a tensor.
    """
    found = resolve_attr(gm, target)
    if not isinstance(found, Tensor):
        raise PassError(f"{target!r} is a {type(found).__name__}, not a parameter or buffer")
    return found


def _make_owner(gm: GraphModule, target: str) -> tuple[nn.Module, str]:
    *path, leaf = target.split(".")
    owner: nn.Module = gm
    for position, part in enumerate(path):
        child = getattr(owner, part, None)
        if child is None:
            child = nn.Module()
            owner.add_module(part, child)
        if not isinstance(child, nn.Module):
            taken = ".".join(path[: position + 1])
            raise PassError(f"{target!r} cannot be registered: {taken!r} is a {type(child).__name__}, not a module")
        owner = child
    if hasattr(owner, leaf) and getattr(owner, leaf) is not None:
        raise PassError(f"{target!r} cannot be registered: the name is taken; ask free_name for one that is not")
    return owner, leaf


def set_parameter(gm: GraphModule, target: str, tensor: Tensor, trainable: bool) -> nn.Parameter:
    """Register a new parameter under ``target``, with the modules on the way to it.

    Args:
        gm: the graph module.
        target: the FQN.
        tensor: the values, used without a copy.
        trainable: whether it requires gradients.

    Raises:
        PassError: the name is taken, or part of the path is not a module.
    """
    owner, leaf = _make_owner(gm, target)
    parameter = nn.Parameter(tensor.detach(), requires_grad=trainable)
    owner.register_parameter(leaf, parameter)
    return parameter


def set_buffer(gm: GraphModule, target: str, tensor: Tensor) -> Tensor:
    """Register a new persistent buffer under ``target``, with the modules on the way to it.

    Raises:
        PassError: the name is taken, or part of the path is not a module.
    """
    owner, leaf = _make_owner(gm, target)
    buffer = tensor.detach()
    owner.register_buffer(leaf, buffer, persistent=True)
    return buffer


def replace_parameter(gm: GraphModule, target: str, tensor: Tensor, trainable: bool) -> nn.Parameter:
    """Put a new parameter in the place of the one under ``target``; the old tensor is not written to.

    Nodes that read ``target`` read the new values, and their ``meta["val"]`` follows. Other names of the old tensor
    keep it: a pass refuses weights that another node reads (:func:`users_of_tensor`).

    Raises:
        PassError: there is no parameter under ``target``.
    """
    get_parameter(gm, target)
    delete_attr(gm, target)
    parameter = set_parameter(gm, target, tensor, trainable)
    mode = fake_mode_of(gm)
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target == target:
            node.meta["val"] = mode.from_tensor(parameter, static_shapes=True)
            node.meta.pop("tensor_meta", None)
    return parameter


def delete_attr(gm: GraphModule, target: str) -> None:
    """Delete a parameter or buffer, and the plain containers on the way to it that are left with nothing in them.

    Raises:
        PassError: nothing has that name.
    """
    owner, leaf = _owner(gm, target)
    if not hasattr(owner, leaf):
        raise PassError(f"{target!r} does not exist in the graph module: it cannot be deleted")
    delattr(owner, leaf)
    path = target.rpartition(".")[0]
    while path and type(owner) is nn.Module and not (owner._parameters or owner._buffers or owner._modules):
        owner, leaf = _owner(gm, path)
        delattr(owner, leaf)
        path = path.rpartition(".")[0]


def free_name(gm: GraphModule, wanted: str) -> str:
    """``wanted`` if no attribute of the graph module has that FQN, else ``wanted_1``, ``wanted_2``, ..."""
    name, number = wanted, 0
    while _exists(gm, name):
        number += 1
        name = f"{wanted}_{number}"
    return name


def _exists(gm: GraphModule, target: str) -> bool:
    try:
        return resolve_attr(gm, target) is not None
    except PassError:
        return False


def names_of_tensor(gm: GraphModule, tensor: Tensor) -> tuple[str, ...]:
    """The FQNs under which ``tensor`` itself (not an equal one) is registered."""
    return tuple(name for name, other in registered_tensors(gm) if other is tensor)


def users_by_tensor(gm: GraphModule) -> dict[int, tuple[Node, ...]]:
    """The nodes that take each tensor as an argument, whatever its name, in graph order, by ``id(tensor)``."""
    users: dict[int, set[Node]] = {}
    for reader in gm.graph.find_nodes(op="get_attr"):
        users.setdefault(id(resolve_attr(gm, str(reader.target))), set()).update(reader.users)
    return {key: tuple(sorted(found)) for key, found in users.items()}


def users_of_tensor(gm: GraphModule, tensor: Tensor) -> tuple[Node, ...]:
    """The nodes that take ``tensor`` itself as an argument, whatever its name, in graph order.

    It reads the whole graph; a pass that asks for every node of a kind calls :func:`users_by_tensor` once.
    """
    return users_by_tensor(gm).get(id(tensor), ())


def users_of_attr(gm: GraphModule, target: str) -> tuple[Node, ...]:
    """The nodes that take the tensor under ``target`` as an argument, under this or another of its names.

    Raises:
        PassError: nothing has that name, or it is not a tensor.
    """
    return users_of_tensor(gm, get_parameter(gm, target))


def parameter_node(gm: GraphModule, target: str, before: Node) -> Node:
    """Make a ``get_attr`` node for the parameter or buffer ``target``, with a true ``meta["val"]``.

    Args:
        gm: the graph module.
        target: the FQN.
        before: the node in front of which it is put.

    Raises:
        PassError: nothing has that name, or it is not a tensor.
    """
    tensor = get_parameter(gm, target)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(target)
    node.meta["val"] = fake_mode_of(gm).from_tensor(tensor, static_shapes=True)
    return node


def call_node(
    gm: GraphModule,
    op: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: Node,
    before: Node,
    value: Any = None,
) -> Node:
    """Make a ``call_function`` node with a true ``meta["val"]``.

    Args:
        gm: the graph module.
        op: the operator, such as ``torch.ops.aten.linear.default``.
        args: its arguments; nodes carry their own ``meta["val"]``.
        kwargs: its keyword arguments.
        like: the node whose place in the model (module stack, source line) the new one takes over.
        before: the node in front of which it is put.
        value: its ``meta["val"]``, where that is known; by default the operator runs on the metas of its arguments,
            which takes milliseconds where sizes are symbols.

    Raises:
        PassError: an argument carries no ``meta["val"]``, or the operator does not take such arguments.
    """
    named = dict(kwargs or {})
    try:
        value = run_on_metas(fake_mode_of(gm), op, args, named) if value is None else value
    except PassError:
        raise
    except Exception as error:  # an operator may raise anything on arguments that do not fit
        raise PassError(f"{op} does not run on the metas of its arguments {tuple(args)}: {error}") from error
    with gm.graph.inserting_before(before):
        node = gm.graph.call_function(op, tuple(args), named, name=_short_name(op))
    node.meta["val"] = value
    copy_origin(like, node)
    return node


def _short_name(op: Callable[..., Any]) -> str:
    """The name that ``torch.export`` would give a call: ``linear``, not ``linear_default``."""
    return op._schema.name.split("::")[1] if isinstance(op, OpOverload) else op.__name__


def copy_origin(source: Node, to: Node) -> None:
    """Copy where in the model a node comes from: its module stack, source line and torch function."""
    for key in _ORIGIN_KEYS:
        if key in source.meta:
            to.meta[key] = source.meta[key]


def module_of(node: Node) -> str:
    """The FQN of the module whose ``forward`` a node comes from; empty for the model itself, or where that is lost."""
    paths = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return _CALL_NUMBER.sub("", paths[-1]) if paths else ""
