"""Ideas that were measured before they got, or did not get, a place in the product.

*A shared first factor*: sites that read one activation (q, k and v; gate and up) are factored as one stacked matrix,
r (d + m_1 + m_2 + ...) numbers, instead of each by itself, sum of r_i (d + m_i). *Re-gauge*: of a pair A B of rank r the
r^2 numbers that a change of basis in between can make an identity are left out: B = B_P [I | C] (pivoted columns, the
input is gathered) or A = [I; D] A_P (pivoted rows, the output is put together).

The page goes to results/ideas.md. Everything here is eager but for the rows that say compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import common
import torch
from subjects import SUBJECTS, Subject
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_fx._render import number, percent
from lowrank_fx.calibration import Calibration
from lowrank_fx.compiling import compile_module
from lowrank_fx.double_sided import OutputMetric
from lowrank_fx.effects import joint_error
from lowrank_fx.forms import Factors
from lowrank_fx.forms.output import group_spectrum
from lowrank_fx.gradients import output_gradients
from lowrank_fx.latency import paired_speedup
from lowrank_fx.pipeline import calibrate, take
from lowrank_fx.program import Program
from lowrank_fx.sites import Site, SiteTable

SHARES = (0.8, 0.67, 0.5)
SHAPES = ((384, 384), (384, 1536), (768, 768), (768, 3072))
ROWS = (1, 16, 128, 256, 2048)
TURN_SECONDS = 0.6

Chosen = dict[str, tuple[Site, Factors]]


# ---- a shared first factor -------------------------------------------------------------------------------------------


class Scaled(NamedTuple):
    """How the output rows of a site count: weight times R, R the identity or the root of its gradients' moment."""

    weight: float
    metric: OutputMetric | None = None

    def root(self, matrix: Tensor) -> Tensor:
        """The weighed rows of a float64 matrix ``[m, n]``."""
        return self.weight * (matrix if self.metric is None else self.metric.root(matrix))

    def inverse(self, matrix: Tensor) -> Tensor:
        """What :meth:`root` undoes."""
        return (matrix if self.metric is None else self.metric.inverse_root(matrix)) / self.weight


@dataclass
class Bench:
    """A calibrated model, and its sites that share a tap."""

    program: Program
    table: SiteTable
    calibration: Calibration

    @classmethod
    def of(cls, subject: Subject) -> Bench:
        """Calibrate a subject."""
        calibration = calibrate(subject.model, subject.loader, progress=False)
        program = take(subject.model, calibration.example)
        return cls(program, program.find_sites(), calibration)

    def shared(self) -> list[list[Site]]:
        """The linear sites of each tap that feeds several, each called once."""
        groups: dict[str, list[Site]] = {}
        for site in self.table.sites:
            if site.kind == "linear" and len(site.calls) == 1:
                groups.setdefault(site.calls[0].tap, []).append(site)
        return [sites for sites in groups.values() if len(sites) > 1]

    def matrix(self, site: Site) -> Tensor:
        """The weight of a site, float64 ``[m, d]``."""
        return site.matrix(self.program.weight(site).detach()).double()

    def error(self, factored: Chosen, most: int | None = None) -> float:
        """Relative error of the outputs on held-out batches."""
        return joint_error(self.program, factored, self.calibration.select_batches[:most])

    def spectrum(self, block: Sequence[Site], scales: dict[str, Scaled]) -> tuple[Tensor, Tensor, Tensor]:
        """The stacked weighed weight of sites that share a tap, its output directions and their energies."""
        stacked = torch.cat([scales[site.name].root(self.matrix(site)) for site in block])
        sketch = self.calibration.sketches[block[0].calls[0].tap]
        return stacked, *group_spectrum(stacked, sketch.parts[0], block[0].centered, min(stacked.shape))

    def factors(self, block: Sequence[Site], scales: dict[str, Scaled], rank: int) -> Chosen:
        """Factors of sites that share a tap, with one first factor."""
        stacked, directions, _ = self.spectrum(block, scales)
        first = directions[:, :rank].T @ stacked
        mean = self.calibration.sketches[block[0].calls[0].tap].mean
        made: Chosen = {}
        for site, own in zip(block, directions[:, :rank].split([site.out_features for site in block]), strict=True):
            second = scales[site.name].inverse(own)
            shift = self.matrix(site) @ mean - second @ (first @ mean) if site.centered else None
            dtype = self.program.weight(site).dtype
            made[site.name] = (site, Factors(first.to(dtype), second.to(dtype).contiguous(), shift))
        return made

    def site_error(self, factored: Chosen) -> float:
        """Root mean square, over sites, of the relative error of a site's own output."""
        squares = []
        for site, factors in factored.values():
            sketch, matrix = self.calibration.sketches[site.calls[0].tap], self.matrix(site)
            lost = sketch.certificate(matrix - factors.dense_matrix(), centered=site.centered)[0]
            squares.append(lost / sketch.certificate(matrix, centered=site.centered)[0])
        return math.sqrt(sum(squares) / len(squares))

    def scales(self, sites: Sequence[Site]) -> dict[str, dict[str, Scaled]]:
        """The ways to weigh the sites against each other, by name."""
        alike: dict[str, Scaled] = {}
        effect: dict[str, Scaled] = {}
        gradient: dict[str, Scaled] = {}
        gradients = output_gradients(self.program, self.table, self.calibration, progress=False)
        batches = self.calibration.effect_batches
        for site in sites:
            _, _, energies = self.spectrum([site], {site.name: Scaled(1.0)})
            alike[site.name] = Scaled(float(energies.sum()) ** -0.5)
            rank = round(SHARES[1] * break_even([site]))
            moved = joint_error(self.program, self.factors([site], {site.name: Scaled(1.0)}, rank), batches)
            effect[site.name] = Scaled(moved / float(energies[rank:].sum()) ** 0.5)
            moment = gradients[site.name].parts[0]
            trace = float(moment.gram(centered=False).trace())
            gradient[site.name] = Scaled(trace**0.5, OutputMetric.of(moment))
        return {"relative error": alike, "measured effect": effect, "gradients": gradient}


def break_even(block: Sequence[Site]) -> float:
    """The rank at which a pair with one first factor costs as much as the dense weights."""
    width, height = block[0].in_features, sum(site.out_features for site in block)
    return width * height / (width + height)


def partitions(sites: Sequence[Site]) -> list[list[list[Site]]]:
    """All ways to divide sites into blocks."""
    if not sites:
        return [[]]
    made = []
    for rest in partitions(sites[1:]):
        made.append([[sites[0]], *rest])
        made += [[*rest[:i], [sites[0], *rest[i]], *rest[i + 1 :]] for i in range(len(rest))]
    return made


def allocated(bench: Bench, blocks: list[list[Site]], scales: dict[str, Scaled], share: float) -> tuple[float, list[int]]:
    """Weighed squared error and ranks of blocks that share a budget: the dearest directions per number first."""
    budget = share * sum(site.in_features * site.out_features for site in sum(blocks, []))
    prices = [block[0].in_features + sum(site.out_features for site in block) for block in blocks]
    spectra = [bench.spectrum(block, scales)[2].tolist() for block in blocks]
    found = [(energy / prices[i], i) for i, own in enumerate(spectra) for energy in own]
    ranks = [0] * len(blocks)
    for _, i in sorted(found, key=lambda each: -each[0]):
        if prices[i] <= budget and ranks[i] < len(spectra[i]):
            ranks[i], budget = ranks[i] + 1, budget - prices[i]
    return sum(sum(own[rank:]) for own, rank in zip(spectra, ranks, strict=True)), ranks


def ways(bench: Bench, sites: list[Site], scales: dict[str, Scaled], share: float) -> dict[str, Chosen]:
    """The factors of the sites of one tap, by the name of the way."""
    single = [[site] for site in sites]
    divided = {str(i): blocks for i, blocks in enumerate(partitions(sites))}
    found = {name: allocated(bench, blocks, scales, share) for name, blocks in divided.items()}
    best = min(found, key=lambda name: found[name][0])
    chosen = {
        "apart, uniform": (single, [int(share * break_even(block)) for block in single]),
        "apart, by error": (single, allocated(bench, single, scales, share)[1]),
        "one first factor": ([sites], [int(share * break_even(sites))]),
        "divided by error": (divided[best], found[best][1]),
    }
    made: dict[str, Chosen] = {}
    for name, (blocks, ranks) in chosen.items():
        made[name] = {}
        for block, rank in zip(blocks, ranks, strict=True):
            made[name].update(bench.factors(block, scales, max(rank, 1)))
    return made
