"""What a pass is, how passes are run, and the tools that a pass rewrites a graph with.

A pass is a contract. Its docstring shows the graph before, the graph after, the formula, and when a node is left alone;
its result says what was rewritten, one line each, and what was refused and why. A pass walks the graph once:
only :class:`PassManager` repeats, cleans up, verifies and deletes.

What a pass keeps true:

* ``meta["val"]`` of every node it makes (:func:`parameter_node` and :func:`call_node` see to it);
* values of the model that was captured: the graph shares its parameters with the user's model, so a pass registers new
  tensors (:func:`set_parameter`, :func:`replace_parameter`) and never writes into one that is there;
* ties: a weight is its tensor, not its name, so ask :func:`users_of_tensor` who else reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from lowrank_fx import _env
from lowrank_fx.errors import PassError
from lowrank_fx.passes.verify import (
    attr_tensor,
    check_graph,
    fake_mode_of,
    is_dead,
    registered_tensors,
    resolve_attr,
    run_on_metas,
    unused_names,
    used_tensors,
)

__all__ = [
    "Pass",
    "PassManager",
    "PassResult",
    "Refusal",
    "RewriteBudget",
    "alias_groups",
    "attr_tensor",
    "call_node",
    "clean",
    "copy_origin",
    "delete_attr",
    "fake_mode_of",
    "free_name",
    "get_parameter",
    "is_dead",
    "names_of_tensor",
    "parameter_node",
    "registered_tensors",
    "replace_parameter",
    "resolve_attr",
    "run_on_metas",
    "set_buffer",
    "set_parameter",
    "users_by_tensor",
    "users_of_attr",
    "users_of_tensor",
]

_ORIGIN_KEYS = ("nn_module_stack", "stack_trace", "torch_fn", "custom")


@dataclass(frozen=True)
class Refusal:
    """A node that a pass looked at and left alone.

    Attributes:
        node: the name of the node, or the FQN of the site.
        reason: why, as a clause: "rank 96 is at or above break-even 85".
    """

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changes: one line per rewrite, in graph order: "bn1 folded into conv1".
        refusals: what was left alone and why, in graph order.
    """

    changes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    @property
    def rewrites(self) -> int:
        """How many rewrites were applied."""
        return len(self.changes)


class RewriteBudget:
    """How many rewrites a run of the pass manager may still apply.

    A pass calls :meth:`take` right before each rewrite and leaves the node alone when it answers False. This is what
    makes ``LOWRANK_FX_MAX_REWRITES`` a bisection switch: the first N rewrites are always the same ones.

    Args:
        limit: the number of rewrites allowed, or None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.taken = 0

    def take(self) -> bool:
        """Take one rewrite from the budget; False when it is used up."""
        if self.limit is not None and self.taken >= self.limit:
            return False
        self.taken += 1
        return True

    def refusal(self, node: Node | str) -> Refusal:
        """The refusal for a node that the budget did not reach."""
        name = node if isinstance(node, str) else node.name
        return Refusal(name, f"LOWRANK_FX_MAX_REWRITES={self.limit} is used up")


class Pass(ABC):
    """One rewrite of a captured graph.

    The docstring of a pass holds the graph before, the graph after, the formula, and "left alone when ...".

    Attributes:
        name: the kebab-case name that reports, errors and dumps use.
    """

    name: ClassVar[str]

    @abstractmethod
    def run(self, gm: GraphModule, budget: RewriteBudget) -> PassResult:
        """Rewrite ``gm`` in place, walking it once.

        Args:
            gm: the captured model.
            budget: asked with ``budget.take()`` right before each rewrite, once per line of ``changes``.

        Returns:
            What was rewritten and what was refused: exactly the changes that were made.

        Raises:
            PassError: the graph does not have the form that the pass requires.
        """


class PassManager:
    """Runs passes in order, and keeps the graph clean between them.

    After a pass that changed something, dead code goes, parameters and buffers that lost their last user go (those that
    never had one stay), and the graph is linted and recompiled. With ``LOWRANK_FX_CHECK=1`` the verifier runs before
    the first pass and after each one. With ``LOWRANK_FX_DUMP`` the graph after each pass is written to
    ``NN_<pass>.txt`` in that folder, replacing the file of an earlier run.

    Args:
        passes: the passes, in the order in which they run.
        verify: whether the verifier runs; None leaves it to ``LOWRANK_FX_CHECK``.
    """

    def __init__(self, passes: Sequence[Pass], *, verify: bool | None = None) -> None:
        self.passes = tuple(passes)
        self.verify = verify

    def run(self, gm: GraphModule) -> tuple[tuple[str, PassResult], ...]:
        """Run every pass once on ``gm``, in place.

        Returns:
            The name and the result of each pass, in order.

        Raises:
            PassError: a pass raised, or broke the graph's invariants or its contract. The message names the pass, the
                passes that ran before it, and the cause.
            OptionError: an environment variable of lowrank_fx has a value that is not legal.
        """
        budget = RewriteBudget(_env.max_rewrites())
        verify = _env.check_enabled() if self.verify is None else self.verify
        folder = _env.dump_folder()
        clean(gm)
        if verify:
            check_graph(gm)
        done: list[tuple[str, PassResult]] = []
        for number, step in enumerate(self.passes, start=1):
            try:
                result = _run_one(gm, step, budget, verify)
            except Exception as error:
                before = ", ".join(name for name, _ in done) or "none"
                cause = str(error) if isinstance(error, PassError) else f"{type(error).__name__}: {error}"
                raise PassError(f"pass {step.name!r} failed (passes that ran before it: {before}): {cause}") from error
            done.append((step.name, result))
            if folder is not None:
                _dump(gm, folder, number, step.name, result)
        return tuple(done)


def _run_one(gm: GraphModule, step: Pass, budget: RewriteBudget, verify: bool) -> PassResult:
    used_before, unused_before = used_tensors(gm), unused_names(gm)
    code_before = _fingerprint(gm) if verify else ()
    taken_before = budget.taken
    result = step.run(gm, budget)
    taken = budget.taken - taken_before
    if taken != result.rewrites:
        raise PassError(
            f"it took {taken} rewrites from the budget and reports {result.rewrites}; "
            "call budget.take() once for each line of PassResult.changes"
        )
    if result.rewrites:
        clean(gm)
        used_after = used_tensors(gm)
        for target, tensor in list(registered_tensors(gm)):
            if id(tensor) in used_before and id(tensor) not in used_after:
                delete_attr(gm, target)
    if verify:
        if not result.rewrites and _fingerprint(gm) != code_before:
            raise PassError("it reports no change, but the graph is another one")
        check_graph(gm, allowed_unused=unused_before)
    return result


def _fingerprint(gm: GraphModule) -> tuple[object, ...]:
    tensors = tuple((name, id(tensor)) for name, tensor in registered_tensors(gm))
    return (str(gm.graph), tensors)


def _dump(gm: GraphModule, folder: Path, number: int, name: str, result: PassResult) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"pass {number}: {name}", f"rewrites: {result.rewrites}"]
    lines += [f"  {change}" for change in result.changes]
    lines += [f"refusals: {len(result.refusals)}"]
    lines += [f"  {refusal.node}: {refusal.reason}" for refusal in result.refusals]
    lines += ["", gm.print_readable(print_output=False), "", str(gm.graph), ""]
    (folder / f"{number:02d}_{name}.txt").write_text("\n".join(lines), encoding="utf-8")


def clean(gm: GraphModule) -> None:
    """Remove dead nodes, lint, recompile. Parameters stay; inserted modules (observers) stay."""
    for node in reversed(list(gm.graph.nodes)):
        if is_dead(node):
            gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()


# Parameters ---------------------------------------------------------------------------------------------------------


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


def alias_groups(gm: GraphModule) -> tuple[tuple[str, ...], ...]:
    """The FQNs of each distinct parameter or buffer; a tied weight is one group of several names."""
    groups: dict[int, list[str]] = {}
    for name, tensor in registered_tensors(gm):
        groups.setdefault(id(tensor), []).append(name)
    return tuple(tuple(names) for names in groups.values())


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


# Nodes --------------------------------------------------------------------------------------------------------------


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
) -> Node:
    """Make a ``call_function`` node with a true ``meta["val"]``.

    Args:
        gm: the graph module.
        op: the operator, such as ``torch.ops.aten.linear.default``.
        args: its arguments; nodes carry their own ``meta["val"]``.
        kwargs: its keyword arguments.
        like: the node whose place in the model (module stack, source line) the new one takes over.
        before: the node in front of which it is put.

    Raises:
        PassError: an argument carries no ``meta["val"]``, or the operator does not take such arguments.
    """
    named = dict(kwargs or {})
    try:
        value = run_on_metas(fake_mode_of(gm), op, args, named)
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
