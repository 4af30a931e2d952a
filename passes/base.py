"""What a pass is, how passes are run, and the tools that a pass rewrites a graph with.

A pass is a contract. Its docstring shows the graph before, the graph after, the formula, and when a node is left alone;
its result says what was rewritten, one line each, and what was refused and why. A pass walks the graph once:
only :class:`PassManager` repeats, cleans up, verifies and deletes.

What a pass keeps true:

* ``meta["val"]`` of every node it makes;
* values of the model that was captured: a pass registers new tensors and never writes into one that is there;
* ties: a weight is its tensor, not its name, so a pass asks who else reads the tensor.

The tools for it are in ``edit.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch.fx import GraphModule, Node

from lowrank_fx._env import check_enabled, dump_folder, max_rewrites
from lowrank_fx.errors import PassError
from lowrank_fx.passes.edit import delete_attr
from lowrank_fx.passes.verify import check_graph, is_dead, registered_tensors, unused_names, used_tensors


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
        bisect: whether ``LOWRANK_FX_MAX_REWRITES`` applies.
    """

    def __init__(self, passes: Sequence[Pass], *, verify: bool | None = None, bisect: bool = True) -> None:
        self.bisect = bisect
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
        budget = RewriteBudget(max_rewrites() if self.bisect else None)
        verify = check_enabled() if self.verify is None else self.verify
        folder = dump_folder()
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
