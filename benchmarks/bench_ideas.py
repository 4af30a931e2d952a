"""Ideas that were measured to decide on their place in the product.

*A shared first factor*: sites that read one activation (q, k and v; gate and up) are factored as one stacked matrix,
r (d + m_1 + m_2 + ...) numbers, instead of each by itself, sum of r_i (d + m_i). The product has it since
(``shared_inputs.py``); accuracy.md has what it is worth there. *Re-gauge* (``gauge.py``): how fast a pair is without
the r^2 numbers that change nothing; accuracy.md has what they buy. *The inner rank of tucker2*: whether a choice of it
would win. The page goes to results/ideas.md.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import common
import torch
from subjects import SUBJECTS, Subject
from torch import Tensor
from torch.nn import functional as F

from lowrank_fx import cost
from lowrank_fx._render import number, percent
from lowrank_fx.double_sided import OutputMetric
from lowrank_fx.effects import joint_error
from lowrank_fx.forms import FORMS, ErrorCurve, Factors, Form, forms_for, tucker
from lowrank_fx.forms.output import group_spectrum
from lowrank_fx.gauge import regauge
from lowrank_fx.gradients import output_gradients
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.latency import paired_speedup
from lowrank_fx.pipeline import calibrate, take
from lowrank_fx.program import Factored
from lowrank_fx.sites import Site

SHARES = (0.8, 0.67, 0.5)
SHAPES = ((384, 384), (384, 1536), (768, 768), (768, 3072))
ROWS = (1, 16, 128, 256, 2048)
KEPT = (0.2, 0.35, 0.5, 0.7)
RATIOS = (0.35, 0.5, 0.75, 1.0, 1.4)

Block = Sequence[Site]
"""Sites that share a tap and a first factor."""


def main() -> None:
    """Measure what there is data for, and write the page."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="sections to measure")
    options = parser.parse_args()
    data = common.data_dir(parser, options.data_dir)
    if data is None:
        return
    page = options.out / "ideas.md"
    kept = common.sections(page)
    with torch.no_grad():
        for part in (part for part in PARTS if part in options.only):
            title, measured = PARTS[part]
            kept[title] = [*common.machine(options.date), "", *measured(data)]
            lines = ["# Ideas and what they are worth"]
            for title, _ in PARTS.values():
                if title in kept:
                    lines += ["", f"## {title}", "", *kept[title]]
            common.publish(options.out, page.name, lines)


SHARED = (
    "Only the linear sites whose tap feeds several are factored, each way with the same numbers, in the metric of "
    "their output gradients. *Error*: relative L2 error of the outputs on held-out batches. *By error*: the directions "
    "that cost least per number; *divided* also chooses, per tap, by the same error, which sites share a factor. "
    "The product does that since, for all layers that a plan factors: accuracy.md."
)

GAUGE = (
    "The speed of a re-gauged pair against the pair of the same rank, half of break-even. *Window*: its pivots lie "
    "next to each other, as they nearly always can; *gathered*: they do not, so the inputs are gathered first. "
    "Decision: an option, not a default, since one row at a time is slower with it; windows are taken wherever "
    "rounding allows it, because they are faster from 16 rows on, and gathered inputs are not."
)

INNER = (
    "`tucker2` has two ranks, and keeps a fixed share of the input's channels for what it keeps of the output's: "
    f"{tucker.INNER_SHARE:g} times. Every layer that `tucker2` can stand for, at shares of its weights: how often that "
    "ratio of ranks has the least error on the calibration rows of all forms, and how often any of "
    f"{', '.join(f'{ratio:g}' for ratio in RATIOS)}; where any has, its error over that of the best form without a "
    "choice of ratios. Decision: one ratio. Where layers keep a third of their weights or more, another form has less "
    "error at any ratio; below that, a choice would lower a layer's own error by what the last column says."
)


# ---- a shared first factor -------------------------------------------------------------------------------------------


class Bench:
    """A calibrated model: its linear sites by tap, and for each the metric of its output gradients, not normalized."""

    taps: dict[str, list[Site]]
    metrics: dict[str, OutputMetric]

    def __init__(self, subject: Subject) -> None:
        self.calibration = calibrate(subject.model, subject.loader, progress=False)
        self.program = take(subject.model, self.calibration.example)
        table = self.program.find_sites()
        gradients = output_gradients(self.program, table, self.calibration, progress=False).sketches
        self.metrics, self.taps = {}, {}
        for site in table.sites:
            if site.kind == "linear" and len(site.calls) == 1:
                moment = gradients[site.name].parts[0]
                weight = float(moment.gram(centered=False).trace()) ** 0.5
                self.metrics[site.name] = OutputMetric.of(moment).scaled(weight)
                self.taps.setdefault(site.calls[0].tap, []).append(site)

    def matrix(self, site: Site) -> Tensor:
        """The weight of a site, float64 ``[m, d]``."""
        return site.matrix(self.program.weight(site).detach()).double()

    def error(self, factored: Factored) -> float:
        """Relative error of the outputs on held-out batches."""
        return joint_error(self.program, factored, self.calibration.select_batches)

    def spectrum(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """The stacked weighed weight of a block, its output directions and their energies."""
        stacked = torch.cat([self.metrics[site.name].root(self.matrix(site)) for site in block])
        sketch = self.calibration.sketches[block[0].calls[0].tap]
        return stacked, *group_spectrum(stacked, sketch.parts[0], block[0].centered, min(stacked.shape))

    def factors(self, block: Block, rank: int) -> dict[str, tuple[Site, Factors]]:
        """Factors of a block, which has one first factor."""
        stacked, directions, _ = self.spectrum(block)
        directions = directions[:, :rank]
        first, made = directions.T @ stacked, {}
        mean = self.calibration.sketches[block[0].calls[0].tap].mean
        for site, own in zip(block, torch.split(directions, [site.out_features for site in block]), strict=True):
            second, dtype = self.metrics[site.name].inverse_root(own), self.program.weight(site).dtype
            shift = self.matrix(site) @ mean - second @ (first @ mean) if site.centered else None
            made[site.name] = (site, Factors(first.to(dtype), second.to(dtype).contiguous(), shift))
        return made


def break_even(block: Block) -> float:
    """The rank at which a block costs as much as its dense weights."""
    return cost.break_even_rank(sum(site.out_features for site in block), block[0].in_features)


def divisions(sites: Block) -> list[list[list[Site]]]:
    """All ways to divide sites into blocks."""
    if not sites:
        return [[]]
    made = []
    for rest in divisions(sites[1:]):
        made.append([[sites[0]], *rest])
        made += [[*rest[:place], [sites[0], *rest[place]], *rest[place + 1 :]] for place in range(len(rest))]
    return made


def allocated(bench: Bench, blocks: Sequence[Block], share: float) -> tuple[float, list[int]]:
    """Weighed squared error and ranks of blocks that share a budget: the dearest directions per number first."""
    budget = share * sum(site.in_features * site.out_features for block in blocks for site in block)
    prices = [block[0].in_features + sum(site.out_features for site in block) for block in blocks]
    spectra = [bench.spectrum(block)[2].tolist() for block in blocks]
    found = [(energy / price, i) for i, price in enumerate(prices) for energy in spectra[i]]
    ranks = [0] * len(blocks)
    for _, i in sorted(found, key=lambda each: -each[0]):
        if prices[i] <= budget and ranks[i] < len(spectra[i]):
            # From break-even on a block is dense, and loses nothing.
            ranks[i] = ranks[i] + 1 if ranks[i] + 1 < break_even(blocks[i]) else len(spectra[i])
            budget -= prices[i]
    return sum(sum(own[rank:]) for own, rank in zip(spectra, ranks, strict=True)), ranks


def ways(bench: Bench, sites: Block, share: float) -> dict[str, Factored]:
    """The factors of the sites of one tap, by the name of the way."""
    single = [[site] for site in sites]
    divided = min(divisions(sites), key=lambda blocks: allocated(bench, blocks, share)[0])
    chosen: dict[str, tuple[Sequence[Block], list[int]]] = {
        "apart, uniform": (single, [int(share * break_even(block)) for block in single]),
        "apart, by error": (single, allocated(bench, single, share)[1]),
        "one first factor": ([sites], [int(share * break_even(sites))]),
        "divided, by error": (divided, allocated(bench, divided, share)[1]),
    }
    return {
        name: {
            site: made
            for block, rank in zip(blocks, ranks, strict=True)
            for site, made in bench.factors(block, max(rank, 1)).items()
        }
        for name, (blocks, ranks) in chosen.items()
    }


def shared_table(bench: Bench) -> list[str]:
    """A row per way."""
    rows: dict[str, list[str]] = {}
    for share in SHARES:
        made = [ways(bench, sites, share) for sites in bench.taps.values() if len(sites) > 1]
        for name in made[0]:
            error = bench.error({site: own for each in made for site, own in each[name].items()})
            rows.setdefault(name, []).append(number(error))
    header = ("way", *(f"error at {share:g}" for share in SHARES))
    return common.table(header, [(name, *cells) for name, cells in rows.items()])


def shared(data: Path) -> list[str]:
    """What one first factor for several layers is worth, without anything else of the product."""
    lines = common.paragraph(SHARED)
    for subject in (SUBJECTS[name](data) for name in ("minilm", "lm")):
        lines += ["", f"**{subject.title}**", "", *shared_table(Bench(subject))]
    return lines


# ---- the re-gauge ----------------------------------------------------------------------------------------------------


def versions(first: Tensor, second: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The pair and its re-gauged versions."""

    def apart(largest: float) -> Callable[[Tensor], Tensor]:
        made = regauge(first, second, largest)
        columns, into = made.columns.to(first.dtype), made.second.to(first.dtype)
        return lambda x: made.gauge.apply(x, columns, into, None)

    return {
        "pair": lambda x: F.linear(F.linear(x, first), second),
        "window": apart(math.inf),
        "gathered": apart(0.0),
    }


def speed_table() -> list[str]:
    """A row per layer and version."""
    rows = []
    for width, height in SHAPES:
        rank = width * height // (width + height) // 2
        shapes, generator = ((rank, width), (height, rank), (max(ROWS), width)), torch.Generator().manual_seed(0)
        first, second, x = (torch.randn(shape, generator=generator) for shape in shapes)
        for compiled in (False, True):
            made = {name: torch.compile(run) if compiled else run for name, run in versions(first, second).items()}
            pair = made.pop("pair")
            for name, run in made.items():
                cells = []
                for count in ROWS:
                    sides = [lambda side=side, part=x[:count]: side(part) for side in (pair, run)]
                    timing = paired_speedup(*sides, device="cpu", max_seconds=1.0)
                    cells.append(f"{timing.speedup:.2f}x")
                layer, how = f"{width} -> {height}, rank {rank}", "compiled" if compiled else "eager"
                rows.append((layer, percent(rank / (width + height)), how, name, *cells))
    header = ("layer", "numbers saved", "how", "version", *(f"{count} rows" for count in ROWS))
    return common.table(header, rows, left=1)


def gauge(data: Path) -> list[str]:
    """How fast re-gauged pairs are."""
    return [*common.paragraph(GAUGE), "", *speed_table()]


# ---- the inner rank of tucker2 ---------------------------------------------------------------------------------------


def inner(data: Path) -> list[str]:
    """Whether ``tucker2`` would do better with a choice of its second rank."""
    rows = []
    for subject in (SUBJECTS[name](data) for name in ("resnet20", "resnet56")):
        calibration = calibrate(subject.model, subject.loader, progress=False)
        program = take(subject.model, calibration.example)
        table = program.find_sites()
        layers = []
        for site in table.sites:
            sketch = calibration.sketch_of(table, site)
            if sketch is not None and FORMS["tucker2"].applies(site):
                layers.append(least_errors(site, program.weight(site), sketch))
        for share in KEPT:
            found = [layer[share] for layer in layers if share in layer]
            now = [errors for errors in found if errors.fixed < errors.others]
            any_ratio = [errors for errors in found if errors.free < errors.others]
            gained = [errors.free / min(errors.fixed, errors.others) for errors in any_ratio]
            ratio = f"{statistics.fmean(gained):.2f}" if gained else ""
            rows.append((subject.title, percent(share), str(len(found)), str(len(now)), str(len(any_ratio)), ratio))
    header = ("model", "weights kept", "layers", "best at its ratio", "best at any", "error over the best without")
    return [*common.paragraph(INNER), "", *common.table(header, rows, left=1)]


class Least(NamedTuple):
    """A layer's least errors at one number of weights: of the other forms, at the fixed ratio of ranks, at any."""

    others: float
    fixed: float
    free: float


def least_errors(site: Site, weight: Tensor, sketch: Sketch) -> dict[float, Least]:
    """A layer's least errors at each share of its weights at which ``tucker2`` and another form have a rank."""
    forms = [form for form in forms_for(site, None) if form.ranks(site)]
    curves = [(form, form.curve(site, weight, sketch)) for form in forms if form.name != "tucker2"]
    others = [errors_of(form, site, curve) for form, curve in curves]
    ratios = {}
    for ratio in RATIOS:
        with patch.object(tucker, "INNER_SHARE", ratio):
            form = FORMS["tucker2"]
            ratios[ratio] = errors_of(form, site, form.curve(site, weight, sketch))
    found = {}
    for share in KEPT:
        taken = [errors[share] for errors in others if share in errors]
        own = {ratio: errors[share] for ratio, errors in ratios.items() if share in errors}
        if taken and tucker.INNER_SHARE in own:
            found[share] = Least(min(taken), own[tucker.INNER_SHARE], min(own.values()))
    return found


def errors_of(form: Form, site: Site, curve: ErrorCurve) -> dict[float, float]:
    """A form's error at the largest rank within each share of a layer's weights; none where there is none."""
    weights = {rank: form.params(site, rank) for rank in curve.ranks}
    most = {share: share * site.out_features * site.in_features for share in KEPT}
    within = {share: [rank for rank in curve.ranks if weights[rank] <= most[share]] for share in KEPT}
    return {share: curve.error(ranks[-1]) for share, ranks in within.items() if ranks}


PARTS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "shared": ("A shared first factor", shared),
    "gauge": ("The re-gauge", gauge),
    "inner": ("The inner rank of tucker2", inner),
}


if __name__ == "__main__":
    main()
