"""What factoring a site does to the model's output, measured.

The *effect* of a site at a form and rank is the relative L2 error of the model's outputs when that site alone is
replaced. It is measured at a few ranks, and read off between them through the site's own error: log effect against log
error, monotone. One rank is not enough: behind a pooling layer the first error directions average away and the last
ones do not, so no single measurement extrapolates.

Measuring walks the graph once per batch. At a site's first call the walk forks, once per rank: the values so far are
shared, only the part of the graph behind the site runs again. Nothing is rewritten for it; the dense product of the
factors stands in for the pair.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowrank_fx._progress import Progress
from lowrank_fx.calibrate import CachedBatch, Calibration, run_flat
from lowrank_fx.compare import ErrorSum
from lowrank_fx.errors import PlanError
from lowrank_fx.forms import FORMS, ErrorCurve, Factors, forms_for
from lowrank_fx.sites import Site, SiteTable

EFFECT_FLOPS = 2.0e12
"""Work allowed for measuring effects; it sets how many rows of the cached batches are used."""

MEASURED_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Where on a site's range of ranks its effect is measured."""

MIN_EFFECT_ROWS = 16


@dataclass(frozen=True)
class SiteCurves:
    """A site with its weight, its input's mean, and an error curve per form."""

    site: Site
    weight: Tensor
    mean: Tensor
    forms: Mapping[str, ErrorCurve]

    def factors(self, form: str, rank: int) -> Factors:
        """The factors at one rank of one form.

        Raises:
            PlanError: the form or the rank is not on offer.
        """
        curve = self.forms.get(form)
        if curve is None or not 1 <= rank <= curve.basis.shape[1]:
            raise PlanError(f"{self.site.name}: form {form!r} at rank {rank} is not on offer")
        return FORMS[form].factor(self.site, self.weight, curve, rank, self.mean)


@dataclass(frozen=True)
class EffectCurve:
    """Measured effects of one site and form, as (site error, model error) with errors ascending."""

    points: tuple[tuple[float, float], ...]

    def at(self, error: float) -> float:
        """The effect where the site's own relative error is ``error``: log-log between points, never falling.

        >>> EffectCurve(((0.1, 0.01), (0.4, 0.16))).at(0.2)  # slope 2 in log-log
        0.04
        """
        if error <= 0 or not self.points:
            return 0.0
        errors = [point[0] for point in self.points]
        position = bisect.bisect_left(errors, error)
        if position == len(errors):
            return self.points[-1][1]
        above = self.points[position]
        if above[0] == error:
            return above[1]
        if position == 0:  # below the least measured error the effect shrinks in proportion
            return above[1] * error / above[0]
        below = self.points[position - 1]
        if below[1] <= 0 or below[0] <= 0:
            return float(above[1] * (error - below[0]) / (above[0] - below[0]))
        share = math.log(error / below[0]) / math.log(above[0] / below[0])
        return float(round(below[1] * (above[1] / below[1]) ** share, 15))


def error_curves(
    gm: GraphModule,
    table: SiteTable,
    calibration: Calibration,
    forms: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, SiteCurves]:
    """The error curves of every site that calibration reached, by site name."""
    found: dict[str, SiteCurves] = {}
    with Progress("spectra", len(table.sites), progress) as bar:
        for site in table.sites:
            sketch = calibration.sketch_of(table, site)
            weight = gm.get_parameter(site.weight)
            if sketch is not None:
                curves = {
                    form.name: form.curve(site, weight, sketch) for form in forms_for(site, forms) if form.ranks(site)
                }
                if curves:
                    found[site.name] = SiteCurves(site, weight, sketch.mean, curves)
            bar.advance(note=site.name)
    return found


def measure_effects(
    gm: GraphModule, curves: Mapping[str, SiteCurves], calibration: Calibration, progress: bool = True
) -> dict[tuple[str, str], EffectCurve]:
    """Measure the effect of every site and form at the ranks of ``MEASURED_SHARES``.

    Args:
        gm: the clean captured graph.
        curves: from :func:`error_curves`.
        calibration: its effect batches are used, or so many of their rows as ``EFFECT_FLOPS`` allows.
        progress: show a progress bar for work over two seconds.

    Returns:
        An effect curve per (site name, form name).
    """
    ranks = {
        (name, form): _measured_ranks(curve.ranks)
        for name, entry in curves.items()
        for form, curve in entry.forms.items()
    }
    sums: dict[tuple[str, str, int], ErrorSum] = {
        (name, form, rank): ErrorSum() for (name, form), chosen in ranks.items() for rank in chosen
    }
    batches = _affordable(gm, calibration, len(sums))
    walk = _Walk(gm)
    with torch.no_grad(), Progress("effects", len(sums) * len(batches), progress) as bar:
        for batch in batches:
            for name, fork in walk.forks(batch, {name: entry.site for name, entry in curves.items()}):
                for form in curves[name].forms:
                    for rank in ranks[name, form]:
                        outputs = fork(substitutes(gm, curves[name], form, rank))
                        sums[name, form, rank].add(outputs, batch.reference, batch.call.mask)
                        bar.advance(note=name)
    found = {}
    for (name, form), chosen in ranks.items():
        curve = curves[name].forms[form]
        found[name, form] = _monotone([(curve.error(rank), sums[name, form, rank].relative) for rank in chosen])
    return found


def substitutes(gm: GraphModule, entry: SiteCurves, form: str, rank: int) -> dict[str, Tensor]:
    """Stand-ins for a site's weight and biases, by fully qualified name: the dense product of its factors."""
    site, factors = entry.site, entry.factors(form, rank)
    values = {site.weight: site.unmatrix(factors.dense_matrix()).to(entry.weight.dtype)}
    if factors.shift is not None:
        for name in dict.fromkeys(call.bias for call in site.calls if call.bias is not None):
            bias = gm.get_parameter(name).detach()
            values[name] = (bias.double() + factors.shift.to(bias.device)).to(bias.dtype)
    return values


def joint_error(
    gm: GraphModule,
    curves: Mapping[str, SiteCurves],
    choice: Mapping[str, tuple[str, int]],
    batches: Sequence[CachedBatch],
) -> float:
    """The relative error of the model's outputs with every chosen site factored at once.

    Args:
        gm: the clean captured graph.
        curves: from :func:`error_curves`.
        choice: site name -> (form, rank).
        batches: with reference outputs.
    """
    if not choice:
        return 0.0
    values: dict[str, Tensor] = {}
    for name, (form, rank) in choice.items():
        values.update(substitutes(gm, curves[name], form, rank))
    total = ErrorSum()
    with torch.no_grad():
        for batch in batches:
            outputs = pytree.tree_leaves(functional_call(gm, values, batch.call.args, batch.call.kwargs))
            total.add(tuple(outputs), batch.reference, batch.call.mask)
    return total.relative


class _Walk:
    """Runs a graph node by node, and lets a run fork where a site is first called."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        last: dict[Node, int] = {}
        for position, node in enumerate(self.nodes):
            for used in node.all_input_nodes:
                last[used] = position
        self.dying: list[list[Node]] = [[] for _ in self.nodes]
        for node, position in last.items():
            self.dying[position].append(node)
        self.readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                self.readers.setdefault(id(self._attribute(node)), []).append(node)

    def forks(self, batch: CachedBatch, sites: Mapping[str, Site]) -> Iterator[tuple[str, _Fork]]:
        """Run the batch; yield a fork at the first call of each site, in graph order."""
        position_of = {node.name: position for position, node in enumerate(self.nodes)}
        starts: dict[int, list[str]] = {}
        for name, site in sites.items():
            starts.setdefault(min(position_of[call.node] for call in site.calls), []).append(name)
        inputs = iter(pytree.tree_leaves((batch.call.args, batch.call.kwargs)))
        values: dict[Node, Any] = {}
        for position, node in enumerate(self.nodes):
            for name in starts.get(position, ()):
                yield name, _Fork(self, values, position)
            values[node] = next(inputs) if node.op == "placeholder" else self.execute(node, values)
            for dead in self.dying[position]:
                values.pop(dead, None)

    def execute(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """The value of one node."""
        if node.op == "get_attr":
            return self._attribute(node)
        args = torch.fx.node.map_arg(node.args, values.__getitem__)
        kwargs = torch.fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "output":
            return args[0]
        target = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        assert callable(target)
        return target(*args, **kwargs)

    def _attribute(self, node: Node) -> Any:
        value: Any = self.gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value


class _Fork:
    """The rest of a run from one node on, with some parameters exchanged."""

    def __init__(self, walk: _Walk, values: Mapping[Node, Any], position: int) -> None:
        self.walk = walk
        self.values = values
        self.position = position

    def __call__(self, parameters: Mapping[str, Tensor]) -> tuple[Any, ...]:
        walk = self.walk
        exchanged: dict[Node, Any] = {}
        for name, tensor in parameters.items():
            for reader in walk.readers[id(walk.gm.get_parameter(name))]:
                exchanged[reader] = tensor
        values = {**self.values, **{node: value for node, value in exchanged.items() if node in self.values}}
        # What the parameters' readers have already passed on (a transpose) is computed again.
        for node in walk.nodes[: self.position]:
            if node in values and any(used in exchanged for used in node.all_input_nodes):
                exchanged[node] = values[node] = walk.execute(node, {**values, **exchanged})
        result: Any = None
        for position in range(self.position, len(walk.nodes)):
            node = walk.nodes[position]
            result = values[node] = exchanged[node] if node in exchanged else walk.execute(node, values)
            for dead in walk.dying[position]:
                values.pop(dead, None)
        return tuple(pytree.tree_leaves(result))


def _measured_ranks(ranks: tuple[int, ...]) -> tuple[int, ...]:
    wanted = [share * ranks[-1] for share in MEASURED_SHARES]
    return tuple(sorted({min(ranks, key=lambda rank: (abs(rank - aim), rank)) for aim in wanted} | {ranks[0]}))


def _affordable(gm: GraphModule, calibration: Calibration, forks: int) -> list[CachedBatch]:
    """The first rows of each effect batch, so many that all forks (half the graph each) fit the work allowed."""
    batches = calibration.effect_batches
    total = sum(batch.call.batch_size for batch in batches)
    per_row = calibration.flops / max(batches[0].call.batch_size, 1) if batches else 0
    rows = int(EFFECT_FLOPS / max(forks * per_row / 2, 1.0))
    rows = min(max(rows, MIN_EFFECT_ROWS), total)
    if rows == total:
        return list(batches)
    cut = []
    with torch.no_grad():
        for batch in batches:
            call = batch.call.rows(0, max(1, rows * batch.call.batch_size // total))
            cut.append(CachedBatch(call, run_flat(gm, call)))
    return cut


def _monotone(points: list[tuple[float, float]]) -> EffectCurve:
    """Points with ascending error, and effects that never fall; non-finite effects (an overflow) count as 1e9."""
    made: list[tuple[float, float]] = []
    largest = 0.0
    for error, effect in sorted(points):
        largest = max(largest, effect if math.isfinite(effect) else 1e9)
        if made and made[-1][0] == error:
            made[-1] = (error, largest)
        else:
            made.append((error, largest))
    return EffectCurve(tuple(made))
