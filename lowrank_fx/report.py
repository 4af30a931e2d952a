"""The report of a plan: plain text to print, and one HTML page to show to others.

Both say the same: what was asked and what came of it, a row per layer, what was left alone and why, and the trade-off
curve with the asked target and the knee marked on it. The page is self-contained; its pictures are inline SVG.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from lowrank_fx._render import Mark, count, environment, knee, number, percent, scaled, seconds, speed
from lowrank_fx.double_sided import variant
from lowrank_fx.latency import PairedTiming
from lowrank_fx.plan import Plan, SitePlan, TradeOff
from lowrank_fx.targets import Keep, Metric, Quantity, Tolerance, obeys_speed
from lowrank_fx.timings import SiteSpeed

WIDTH = 110
"""Columns of the plain text."""

Rows: TypeAlias = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Report:
    """What a plan does to a model, layer by layer.

    Attributes:
        plan: the plan.
        timing: the measured speed against the original, or None where nothing was measured.
        speeds: measured of the factored layers against their dense originals, by name.
    """

    plan: Plan
    timing: PairedTiming | None
    speeds: Mapping[str, SiteSpeed] = field(default_factory=dict)

    def __str__(self) -> str:
        blocks = [
            [f"lowrank_fx: {self.plan.target}", *_wrap(self.headline)],
            self._totals(),
            self._scores(),
            self._layers(),
            self._left_alone(),
            _section("Folded before layers were looked for", self.plan.cleanup),
            _section("Notes", self.notes),
            self.trade_off(),
        ]
        return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks if block)

    def to_html(self) -> str:
        """The report as one page: no script, nothing loaded from elsewhere, light and dark."""
        return (
            environment()
            .get_template("report.html.j2")
            .render(report=self, marks=self.marks, title=f"lowrank_fx: {self.plan.target}")
        )

    # ---- what is said, in words and numbers ------------------------------------------------------------------------

    @property
    def headline(self) -> str:
        """The outcome in one or two sentences."""
        plan = self.plan
        if not plan.factored:
            return f"No layer is factored: the model is the original. {' '.join(_sentences(plan.notes))}".strip()
        totals = plan.totals
        said = (
            f"{len(plan.factored)} of {len(plan.sites)} layers are factored: "
            f"{percent(totals.kept('params', 'model'))} of the parameters and {percent(totals.kept('flops', 'model'))} "
            f"of the FLOPs remain, at a held-out error of {number(plan.error)}"
            f"{f' and a metric of {plan.metric.after:.6g}, before {plan.metric.before:.6g}' if plan.metric else ''}."
        )
        if self.timing is None:
            return f"{said} Its speed was not measured."
        if self.timing.speedup < 1:
            return f"{said} It measured slower than the original: {speed(self.timing.speedup)}."
        return f"{said} It measured {speed(self.timing.speedup)} as fast as the original."

    @property
    def quantity(self) -> Quantity:
        """What the plan was made to save: the quantity that was asked for, or FLOPs for a tolerance or for time."""
        target = self.plan.target
        asked = target.quantity if isinstance(target, Keep | Metric) else "flops"
        return "flops" if asked == "latency" else asked  # a plan that was saved knows of no time but its own

    @property
    def asked_error(self) -> float | None:
        """The error that was allowed, or None where a budget was asked for."""
        return self.plan.target.error if isinstance(self.plan.target, Tolerance) else None

    @property
    def flop_ratio(self) -> float:
        """FLOPs of the original over FLOPs of the plan: the speed-up if time followed FLOPs."""
        return 1 / max(self.plan.totals.kept("flops", "model"), 1e-12)

    @property
    def speed(self) -> str:
        """The model's measured speed-up beside its FLOP ratio, in one sentence; empty where it was not measured."""
        timing = self.timing
        if timing is None:
            return ""
        kept = 1 / timing.speedup
        target = self.plan.target
        of_time = ""
        if isinstance(target, Keep) and target.quantity == "latency" and target.of == "model":
            of_time = f", {percent(kept)} of the time remains, asked {percent(target.share)}"
        return (
            f"{speed(timing.speedup)} measured ({seconds(timing.baseline_seconds)} to "
            f"{seconds(timing.candidate_seconds)}, interquartile range {timing.spread:.2f} over {timing.rounds} rounds)"
            f"{of_time}; {speed(self.flop_ratio)} if time followed FLOPs, of which it reaches "
            f"{timing.speedup / self.flop_ratio:.0%}"
        )

    @property
    def slow_layers(self) -> str:
        """The layers that measured slower than dense, where the target obeys a budget; empty without."""
        slow = {name: own for name, own in self.speeds.items() if own.speedup < 1}
        if not slow or obeys_speed(self.plan.target):
            return ""
        worst = sorted(slow, key=lambda name: slow[name].speedup)
        shown = ", ".join(f"{name} ({speed(slow[name].speedup)})" for name in worst[:8])
        more = f" and {len(worst) - 8} more" if len(worst) > 8 else ""
        return (
            f"{len(slow)} of {len(self.speeds)} factored layers measured slower than dense, as the target obeys its "
            f"budget and not the clock: {shown}{more}"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What else a user should know."""
        return (*self.plan.notes, *([self.slow_layers] if self.slow_layers else []))

    @property
    def amounts(self) -> list[tuple[str, str, str, str, str, str]]:
        """Quantity, scope, before, after, share kept, share asked for; a row each."""
        rows = []
        for quantity, label in (("params", "parameters"), ("flops", "FLOPs")):
            for of in ("model", "sites"):
                before, after = getattr(self.plan.totals, f"{'model' if of == 'model' else 'site'}_{quantity}")
                target = self.plan.target
                asked = isinstance(target, Keep) and (target.quantity, target.of) == (quantity, of)
                share = percent(target.share) if isinstance(target, Keep) and asked else ""
                form = count if quantity == "params" else scaled
                kept = percent(self.plan.totals.kept(quantity, of))
                rows.append((label, f"of the {of}", form(before), form(after), kept, share))
        return rows

    @property
    def metric(self) -> str:
        """The metric before and after, what it was allowed to lose, and how often it was asked for; empty without."""
        target, seen = self.plan.target, self.plan.metric
        if seen is None or not isinstance(target, Metric):
            return ""
        return (
            f"{seen.before:.6g} to {seen.after:.6g} by {target.name}, a drop of "
            f"{target.drop(seen.before, seen.after):.3g}, asked at most {target.max_drop:g}; evaluated "
            f"{seen.evaluations} times of at most {target.evaluations}"
        )

    @property
    def scores(self) -> list[tuple[str, str, str, str, str]]:
        """Share kept, error, metric, drop and verdict of every model that the metric was asked about; a row each."""
        target, seen = self.plan.target, self.plan.metric
        if seen is None or not isinstance(target, Metric):
            return []
        rows = [(percent(1.0), number(0.0), f"{seen.before:.6g}", "", "the original")]
        for point in seen.points:
            if point.value is None:
                rows.append((percent(point.kept), number(point.error), "not finite", "", "drops too far"))
                continue
            verdict = "holds" if target.holds(seen.before, point.value) else "drops too far"
            drop = f"{target.drop(seen.before, point.value):.3g}"
            rows.append((percent(point.kept), number(point.error), f"{point.value:.6g}", drop, verdict))
        return rows

    @property
    def limit(self) -> tuple[str, float] | None:
        """What was asked for, as :func:`chart` draws it; a share of the sites is told as one of the model."""
        target, totals = self.plan.target, self.plan.totals
        if isinstance(target, Metric):
            return None
        if isinstance(target, Tolerance):
            return "error", target.error
        if target.quantity == "latency":
            return None
        if target.of == "model":
            return "kept", target.share
        model = totals.model_params if target.quantity == "params" else totals.model_flops
        sites = totals.site_params if target.quantity == "params" else totals.site_flops
        return "kept", (model[1] - sites[1] + target.share * sites[0]) / max(model[0], 1)

    @property
    def prefix(self) -> str:
        """What all layers' names start with, told once instead of in every row."""
        return common_prefix([site.name for site in self.plan.sites])

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Weights that are no layers a form could stand for, by the reason."""
        grouped: dict[str, list[str]] = {}
        for entry in self.plan.left_alone:
            grouped.setdefault(entry.reason, []).append(entry.name)
        return grouped

    @property
    def marks(self) -> list[Mark]:
        """The asked target and the knee, for :func:`chart`."""
        plan, quantity = self.plan, self.quantity
        marks = [Mark("asked", f"{plan.target}: {number(plan.error)}", plan.totals.kept(quantity, "model"), plan.error)]
        bend = knee(plan.curve, quantity)
        if bend is not None:
            marks.append(Mark("knee", "knee", getattr(bend, quantity), bend.error))
        return marks

    # ---- plain text ------------------------------------------------------------------------------------------------

    def _totals(self) -> list[str]:
        plan, timing = self.plan, self.timing
        header = ("", "", "before", "after", "kept", "asked")
        rows = [(label if of.endswith("model") else "", of, *rest) for label, of, *rest in self.amounts]
        lines = aligned([header, *rows], "llrrrr")
        asked = "" if self.asked_error is None else f", asked at most {self.asked_error:g}"
        facts = [
            (
                "error",
                f"{number(plan.error)} on held-out data{asked}; {number(plan.select_error)} on the half that chose the "
                f"plan, {number(plan.predicted_error)} predicted",
            )
        ]
        if self.metric:
            facts.append(("metric", self.metric))
        if timing is not None:
            facts.append(("speed", self.speed))
        if plan.candidates:
            tried = ", ".join(
                f"{name} {number(error)}{' (chosen)' if name == plan.candidate else ''}"
                for name, error in plan.candidates
            )
            facts.append(("candidates", f"{tried}: error of each on the half that chose the plan"))
        if plan.refinement is not None:
            done = plan.refinement
            kept = f"that of step {done.best_step} was kept" if done.best_step else "none of them lowered it"
            said = f"error {number(done.before)} to {number(done.after)} on that half in {done.steps} steps, {kept}"
            facts.append(("refinement", said))
        facts.append(("planner", f"{plan.planner}, seed {plan.seed}"))
        for name, fact in facts:
            lines += textwrap.wrap(fact, WIDTH, initial_indent=f"  {name:<12}", subsequent_indent=" " * 14)
        return lines

    def _scores(self) -> list[str]:
        if not self.scores:
            return []
        header = (f"{'FLOPs' if self.quantity == 'flops' else 'parameters'} kept", "error", "metric", "drop", "")
        return ["Metric: every model that was scored, in order", *aligned([header, *self.scores], "rrrrl")]

    def _layers(self) -> list[str]:
        sites = self.plan.sites
        if not sites:
            return ["Layers", "  none that a form could stand for"]
        timed = bool(self.speeds)
        cells = [(*_cells(site), *(_speed_cells(self.speeds.get(site.name)) if timed else ())) for site in sites]
        header: tuple[str, ...] = ("shape", "form", "rank", "parameters", "kept", "error", "bound", "effect")
        header = (*header, "speed", "FLOPs", "of it") if timed else header
        widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
        room = max(WIDTH - sum(widths) - 2 * (len(widths) + 1), 24)
        prefix = self.prefix if max(len(site.name) for site in sites) > room else ""
        names = [_shortened(site.name.removeprefix(prefix), room) for site in sites]
        room = max(len(name) for name in [*names, "layer"])

        def line(name: str, row: Sequence[str]) -> str:
            fields = [f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)]
            return "  ".join([f"  {name:<{room}}", *fields])

        lines = ["Layers" + (f" (names start with {prefix})" if prefix else ""), line("layer", header)]
        told = ""
        for site, name, row in zip(sites, names, cells, strict=True):
            if site.factored:
                lines.append(line(name, row))
                continue
            start = line(name, row[:2]) + "  "
            reason = "as above" if site.reason == told else site.reason
            lines += textwrap.wrap(reason, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
            told = site.reason
        return lines

    def _left_alone(self) -> list[str]:
        items = []
        for reason, names in self.reasons.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            items.append(f"{shown}: {reason}")
        return _section("Left alone", items)

    def trade_off(self) -> list[str]:
        """The trade-off curve as lines, with the asked target and the knee marked."""
        plan, quantity = self.plan, self.quantity
        if len(plan.curve) < 2:
            return []
        totals = plan.totals
        asked = TradeOff(totals.kept("params", "model"), totals.kept("flops", "model"), plan.predicted_error)
        bend = knee(plan.curve, quantity)
        entries = [(point, "knee of the curve" if point == bend else "") for point in plan.curve]
        entries.append((asked, f"asked: {plan.target}, measured {number(plan.error)}"))
        entries.sort(key=lambda entry: (-getattr(entry[0], quantity), bool(entry[1])))
        rows = [
            (percent(point.params), percent(point.flops), number(point.error), f"<- {mark}" if mark else "")
            for point, mark in entries
        ]
        return [
            "Trade-off: what may remain of the model, and the error predicted for it",
            *aligned([("parameters", "FLOPs", "error", ""), *rows], "rrrl"),
        ]


# ---- lines of text ---------------------------------------------------------------------------------------------------


def common_prefix(names: Sequence[str]) -> str:
    """The dotted prefix that all of several names share, with its last dot; empty for a single name.

    >>> common_prefix(["encoder.layer.0.q", "encoder.layer.1.q"])
    'encoder.layer.'
    """
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(names) < 2 or len(set(level)) > 1:
            break
        shared.append(level[0])
    return "".join(f"{part}." for part in shared)


def _shortened(name: str, room: int) -> str:
    return name if len(name) <= room else "..." + name[len(name) - room + 3 :]


def _cells(site: SitePlan) -> tuple[str, ...]:
    shape = f"{site.out_features} x {site.in_features}"
    if not site.factored:
        return shape, site.form, *[""] * 6
    before, after = site.params
    return (
        shape,
        variant(site.form, site.basis),
        str(site.rank),
        f"{count(before)} -> {count(after)}",
        percent(after / before) if before else "added",  # a tied head: its embedding keeps the dense weight
        number(site.error),
        number(site.bound),
        number(site.effect),
    )


def _speed_cells(own: SiteSpeed | None) -> tuple[str, str, str]:
    """Measured speed-up, FLOP ratio, and the share of the one in the other."""
    if own is None:
        return "", "", ""
    return speed(own.speedup), speed(own.flop_ratio), f"{own.of_ideal:.0%}"


def aligned(rows: Rows, sides: str) -> list[str]:
    """Rows of cells as lines, a column per letter of ``sides``: ``l`` or ``r``."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    signs = {"l": "<", "r": ">"}
    return [
        "  " + "  ".join(f"{cell:{signs[side]}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        for row in rows
    ]


def _section(title: str, items: Sequence[str]) -> list[str]:
    lines = [title]
    for item in items:
        lines += textwrap.wrap(item, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines if items else []


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH)


def _sentences(notes: Sequence[str]) -> list[str]:
    return [f"{note[:1].upper()}{note[1:].rstrip('.')}." for note in notes[-1:]]
