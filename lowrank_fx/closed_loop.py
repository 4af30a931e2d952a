"""A closed loop: every factored layer is fitted again, in graph order, to the inputs that the factored model gives it.

A layer was factored for the *original's* activations. In the factored model its input is already off, so what it should
compute is no longer W: with X' the rows that reach it now and Y what the original gave there, the anchored objective is

    min over W' of the planned form and rank, and b', of |Y - W' X' - b'|^2

(for W' of rank r the reduced-rank regression of ``anchored.py``).
Where the layer's output is added to another branch, as in every residual network, Y is what makes the *sum* right:
the other branch's error is in it too, and the layer may undo of it what its own input tells.

Original and factored graph are walked in step. For every batch the walk goes on from one factored layer to the next,
one region at a time: within a region one batch's values are alive, and between two regions, for all batches, only what
crosses from one to the other. ``MEMORY`` bounds that; batches that would exceed it take no part.

Each half of the rows has to confirm what the other one gave; where it does not, W stays and the layer is only factored
for the inputs that it has now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lowrank_fx._progress import Progress
from lowrank_fx.anchored import Moments, PairSum, anchored_weight, choose_ridge
from lowrank_fx.batches import Call
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import substitutes
from lowrank_fx.grouped_sketch import Sketch, make_sketch, merge_sketches
from lowrank_fx.observer import Recorder, TapObserver
from lowrank_fx.program import Factored
from lowrank_fx.sites import Site, SiteTable, Tap
from lowrank_fx.walk import Run, Walk

MEMORY = 512 << 20
"""Bytes of values of both models that are held for all batches between two regions; the first batch always takes part.

The second moments of one layer's input come on top (about eight matrices of 8 d^2 bytes), and one batch's values within
a region.
"""

MAX_WIDTH = 4096
"""A layer with longer rows (of one group) keeps its factors: its second moments would take more than 1 GiB."""

ROWS = 4
"""So many times the rows are used that a sketch of the layer's input is made of, where a batch has them.

ResNet-20 at half its parameters, held-out error by this factor: 1 gives .333, 4 gives .325.
"""

aten = torch.ops.aten

Remake: TypeAlias = Callable[[Site, Tensor, Sketch], Factors]
"""The planned form and rank of a site, for another weight of the same shape and another exact sketch of its input."""


def closed_loop(
    gm: GraphModule,
    table: SiteTable,
    factored: Factored,
    remake: Remake,
    calls: Sequence[Call],
    seed: int = 0,
    progress: bool = False,
) -> dict[str, tuple[Site, Factors]]:
    """Fit every factored site that is called once, in graph order.

    Args:
        gm: the clean captured graph.
        table: its sites and taps.
        factored: a site and its factors, by site name.
        remake: factors a site in its planned form and rank.
        calls: inputs of calibration batches, as many as fit ``MEMORY``.
        seed: chooses the rows, where a batch has more than the layer's own cost allows.
        progress: show a progress bar for work over two seconds.

    Returns:
        The same sites with fitted factors. A site that is called several times, that no row reaches, or whose rows are
        longer than ``MAX_WIDTH`` keeps its own.
    """
    fitted = dict(factored)
    walk = Walk(gm)
    sites = [site for site, _ in factored.values() if len(site.calls) == 1 and _narrow(table, site)]
    sites.sort(key=lambda site: walk.position[site.calls[0].node])
    if not sites or not calls:
        return fitted
    with torch.no_grad(), Progress("closed loop", len(sites), progress) as bar:
        loop = _Loop(gm, table, walk, factored, affordable(walk, sites, calls), seed)
        for site in sites:
            found = loop.fit(site, remake)
            if found is not None:
                fitted[site.name] = (site, found)
            bar.advance(note=site.name)
    return fitted


def too_wide(table: SiteTable, sites: Iterable[Site]) -> list[str]:
    """Names of the sites that keep their factors because their rows are longer than ``MAX_WIDTH``.

    Args:
        table: the sites and taps.
        sites: the factored ones.
    """
    return [site.name for site in sites if not _narrow(table, site)]


def affordable(walk: Walk, sites: Sequence[Site], calls: Sequence[Call], memory: int | None = None) -> list[Call]:
    """The first calls whose values between two regions fit; at least one.

    What crosses is measured on the first call and taken to grow with the size of the inputs.

    Args:
        walk: through the graph.
        sites: in graph order; a region ends at each.
        calls: at least one.
        memory: bytes; None for ``MEMORY``.
    """
    return affordable_at(walk, [walk.position[site.calls[0].node] for site in sites], calls, memory)


def affordable_at(walk: Walk, positions: Sequence[int], calls: Sequence[Call], memory: int | None = None) -> list[Call]:
    """The same for regions that end at ``positions`` in the graph, which rise."""
    run, most = walk.run(calls[0]), 0
    for position in positions:
        _advance(run, position)
        most = max(most, live_bytes([run]))
    per_number = 2 * most / max(_size(calls[0]), 1)
    left = float(MEMORY if memory is None else memory)
    taken: list[Call] = []
    for call in calls:
        left -= per_number * _size(call)
        if taken and left < 0:
            break
        taken.append(call)
    return taken


def live_bytes(runs: Sequence[Run]) -> int:
    """Bytes of the values that runs hold, parameters left out and shared memory counted once."""
    held: dict[int, int] = {}
    for run in runs:
        for node, value in run.values.items():
            if node.op != "get_attr" and isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@dataclass(frozen=True)
class _Inputs:
    """Exact sketches of a tap's rows, a half of them each, and which rows they were, by batch."""

    tap: Tap
    sketches: tuple[Sketch, Sketch]
    observer: TapObserver


class _Loop:
    """Both models' runs of all batches, somewhere between the first and the last factored site."""

    def __init__(
        self, gm: GraphModule, table: SiteTable, walk: Walk, factored: Factored, calls: Sequence[Call], seed: int
    ) -> None:
        self.gm, self.table, self.walk, self.calls = gm, table, walk, calls
        self.recorder = Recorder(seed)
        self.originals = [walk.run(call) for call in calls]
        self.changed = [walk.run(call) for call in calls]
        values: dict[str, Tensor] = {}
        for site, factors in factored.values():
            values.update(substitutes(gm, site, factors))
        for run in self.changed:
            run.exchange(values)
        self.inputs: _Inputs | None = None

    def fit(self, site: Site, remake: Remake) -> Factors | None:
        """Bring all runs to ``site``, fit it, and let the factored ones go on with the result."""
        (tap,) = self.table.taps_of(site)
        node = self.walk.nodes[self.walk.position[site.calls[0].node]]
        fixed = self.gm.get_parameter(site.biases[0]).detach() if site.biases else None
        weight = self.gm.get_parameter(site.weight)
        before = self.inputs
        known = before is not None and before.tap == tap  # the layer before had the same input
        inputs = before if before is not None and known else self._inputs(tap, weight.device)
        halves = tuple(PairSum(sketch) for sketch in inputs.sketches)
        for index, (call, original, changed) in enumerate(zip(self.calls, self.originals, self.changed, strict=True)):
            for run in (original, changed):
                _advance(run, self.walk.position[node.name])
            self.recorder.start(index, call.mask)
            activation = changed.values[self._node(tap.node)]
            places = inputs.observer.places(activation)
            wanted = _laid_out(site, _wanted(node, original, changed))
            if fixed is not None and not site.centered:
                wanted = wanted - fixed  # a bias that others share stays as it is, so it takes no part
            for half, own in _halves(index, len(self.calls), len(places)):
                for rows, block in inputs.observer.rows_at(activation, places[own]):
                    if not known:
                        inputs.sketches[half].update(rows)
                    halves[half].add(rows, wanted[block])
        self.inputs = inputs
        factors = _solved(site, weight, fixed, halves, remake)
        if factors is not None:
            for run in self.changed:
                run.exchange(substitutes(self.gm, site, factors))
        return factors

    def _inputs(self, tap: Tap, device: torch.device) -> _Inputs:
        sketches = (make_sketch(tap.width, tap.groups, None, device), make_sketch(tap.width, tap.groups, None, device))
        fan_out = sum(site.out_features for site in self.table.sites if tap in self.table.taps_of(site))
        return _Inputs(tap, sketches, TapObserver(tap, sketches[0], ROWS * fan_out, self.recorder))

    def _node(self, name: str) -> Node:
        node: Node = self.walk.nodes[self.walk.position[name]]
        return node


def _solved(
    site: Site, weight: Tensor, bias: Tensor | None, halves: Sequence[PairSum], remake: Remake
) -> Factors | None:
    """The factors for the rows of both halves; None where there are no rows."""
    parts = [part for part in (half.moments() for half in halves) if part is not None]
    if not parts:
        return None
    matrix = site.matrix(weight.detach()).double()
    ridge = choose_ridge(parts, matrix, centered=site.centered) if len(parts) == 2 else float("inf")
    moments: Moments = parts[0] if len(parts) == 1 else parts[0].merged(parts[1])
    sketch = halves[0].sketch.copy()
    merge_sketches(sketch, halves[1].sketch)
    target = anchored_weight(moments if site.centered else moments.about_zero(), matrix, ridge)
    factors = remake(site, site.unmatrix(target).to(weight.dtype), sketch)
    if factors.shift is None or bias is None:
        return factors
    return replace(factors, shift=moments.offset(factors.dense_matrix()) - bias.double())


def _wanted(node: Node, original: Run, changed: Run) -> Tensor:
    """What the site should give: the original's output, and what else would make the sum right that it goes into."""
    value: Tensor = original.compute()
    other = _added(node)
    if other is None:
        return value
    before, now = _ahead(original, other), _ahead(changed, other)
    if before is None or now is None or not value.shape == before.shape == now.shape:
        return value
    return value + (before - now)


def _added(node: Node) -> Node | None:
    """What the value of ``node`` is added to, where that is all that happens to it."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in (aten.add.Tensor, aten.add_.Tensor) and not user.kwargs:
            others = [argument for argument in user.args if argument is not node]
            return others[0] if len(others) == 1 and isinstance(others[0], Node) else None
        passed_on = user.target is aten.clone.default or (user.target is aten.dropout.default and user.args[2] is False)
        if not passed_on:
            break
        node = user
    return None


def _ahead(run: Run, node: Node) -> Tensor | None:
    """The value of a node that may not have been computed yet; None where it needs what is not there, or writes."""
    found = _computed(run, node, {})
    return found if isinstance(found, Tensor) else None


def _computed(run: Run, node: Node, made: dict[Node, Any]) -> Any:
    if node in run.values:
        return run.values[node]
    if node not in made:
        pending = run.walk.position[node.name] > run.position
        if not pending or run.walk.position[node.name] <= run.walk.last_write:
            return None
        arguments = {argument: _computed(run, argument, made) for argument in node.all_input_nodes}
        if any(value is None for value in arguments.values()):
            return None
        made[node] = run.exchanged[node] if node in run.exchanged else run.walk.compute(node, arguments)
    return made[node]


def _halves(index: int, batches: int, rows: int) -> list[tuple[int, slice]]:
    """Which half of the evidence rows belong to: batches take turns, and a single one is cut in the middle."""
    if batches > 1:
        return [(index % 2, slice(None))]
    return [(0, slice(0, rows // 2)), (1, slice(rows // 2, None))]


def _laid_out(site: Site, value: Tensor) -> Tensor:
    """A site's output as rows ``[n, out_features]``, in the order of its input's rows."""
    if site.kind == "bmm" and site.groups > 1:
        value = value.movedim(-3, -2).flatten(-2)
    if site.patch is not None:
        value = value.movedim(1, -1)
    return value.reshape(-1, site.out_features)


def _advance(run: Run, position: int) -> None:
    while run.position < position:
        run.compute()
        run.move()


def _narrow(table: SiteTable, site: Site) -> bool:
    return all(tap.width // tap.groups <= MAX_WIDTH for tap in table.taps_of(site))


def _size(call: Call) -> int:
    return sum(tensor.numel() for tensor in call.tensors())
