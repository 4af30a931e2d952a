"""What the demos share: one calibration, several targets, a table on the terminal and a page."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import nn

from lowrank_fx._files import write_atomic
from lowrank_fx._render import Mark, environment, number, percent, speed
from lowrank_fx.module import LowRankModule
from lowrank_fx.origin import Origin, write_origin
from lowrank_fx.pipeline import optimize
from lowrank_fx.report import WIDTH, Report, aligned
from lowrank_fx.targets import Target

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Score:
    """One number that a demo measures on its test data.

    Attributes:
        name: the head of its column on the page.
        short: the head of its column on the terminal.
        text: a value as text.
    """

    name: str
    short: str
    text: Callable[[float], str]


@dataclass(frozen=True)
class Job:
    """A model, data, and what to ask for.

    Attributes:
        title: the page's heading.
        about: model and data in a sentence or two.
        model: the trained model, in eval mode.
        calibration: batches without labels.
        targets: what to ask for, one after the other, from one calibration.
        shown: the one of ``targets`` whose layers the page shows, and whose model is saved.
        scores: what ``measure`` returns.
        measure: from a model to its scores on test data, in the order of ``scores``.
        legend: what the scores are, for the line above the table.
        explained: the same for the page, as sentences.
        origin: how ``lowrank-fx compare`` finds model and test data again.
    """

    title: str
    about: str
    model: nn.Module
    calibration: Sequence[Any]
    targets: tuple[Target, ...]
    shown: Target
    scores: tuple[Score, ...]
    measure: Callable[[nn.Module], tuple[float, ...]]
    legend: str
    explained: str
    origin: Origin


@dataclass(frozen=True)
class Measured:
    """One target and what came of it.

    Attributes:
        report: plan and timing.
        scores: what the job measured, in the order of its scores.
    """

    report: Report
    scores: tuple[float, ...]


COLUMNS = ("target", "parameters kept, of the layers", "of the model", "FLOPs kept", "held-out error")
SHORT_COLUMNS = ("target", "layers", "model", "FLOPs", "error")


def run_job(job: Job, out: Path, *, compile: bool, progress: bool, console: Console | None = None) -> list[Measured]:
    """Optimize a model for every target of a job, print what came of it, and write into ``out``.

    The folder gets ``report.html``, the model of the target that is shown, and ``origin.json``, so that
    ``lowrank-fx compare`` works on it.

    Args:
        job: what to do.
        out: the folder, which is made if it does not exist.
        compile: compile the models with inductor; False is faster, and its speeds say less.
        progress: say what is being done, and show bars for work over two seconds.
        console: where to print; stdout by default.

    Returns:
        A measurement per target, in their order.

    Raises:
        LowRankError: a target cannot be reached, or ``out`` cannot be written.
    """
    from rich.console import Console

    started = time.monotonic()
    console = Console(highlight=False) if console is None else console

    def show(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def say(text: str) -> None:
        if progress:
            show(text)

    say(job.about)
    before = job.measure(job.model)
    made: LowRankModule | None = None
    measured = []
    for index, target in enumerate(job.targets):
        begun = time.monotonic()
        what = "calibrate, plan, rewrite, compile, measure" if made is None else "plan, rewrite, compile, measure"
        say(f"[{index + 1}/{len(job.targets)}] {target}: {what} ...")
        if made is None:
            made = optimize(job.model, job.calibration, target=target, compile=compile, progress=progress)
        else:
            made = made.replan(target)
        measured.append(Measured(made.report(), job.measure(made)))
        say(f"      {made.report().headline} ({time.monotonic() - begun:.0f} s)")
        if target == job.shown:
            _save(job, made, out)

    report = next(entry.report for entry in measured if entry.report.plan.target == job.shown)
    rows = [_original(job, before), *(_row(job, entry) for entry in measured)]
    page = (
        environment()
        .get_template("demo.html.j2")
        .render(
            job=job,
            title=f"lowrank_fx: {job.title[:1].lower()}{job.title[1:]}",
            compiled=compile,
            header=(*COLUMNS, *(score.name for score in job.scores), "speed"),
            rows=rows,
            chosen=1 + job.targets.index(job.shown),
            report=report,
            marks=_marks(measured, report),
        )
    )
    write_atomic(out / "report.html", page.encode())

    legend = (
        "Kept of the layers' parameters, of the model's and of its FLOPs; error on held-out data; on the test data "
        f"{job.legend}; speed against the original"
    )
    header = (*SHORT_COLUMNS, *(score.short for score in job.scores), "speed")
    lines = ["", *textwrap.wrap(legend, WIDTH), *aligned([header, *rows], "l" + "r" * (len(header) - 1))]
    lines += ["", *report.trade_off()]
    show("\n".join(line.rstrip() for line in lines))
    show(
        f"\n{out / 'report.html'} shows this and every layer of {job.shown}; lowrank-fx compare {out} tries that model."
    )
    show(f"Took {time.monotonic() - started:.0f} s.")
    return measured


def _save(job: Job, made: LowRankModule, out: Path) -> None:
    made.save(out)
    if job.origin.weights is not None:
        state = {name: tensor.contiguous() for name, tensor in job.model.state_dict().items()}
        save_file(state, out / job.origin.weights)
    write_origin(job.origin, out)


def _original(job: Job, scores: Sequence[float]) -> tuple[str, ...]:
    everything = percent(1.0)
    values = (score.text(value) for score, value in zip(job.scores, scores, strict=True))
    return "the original", everything, everything, everything, "", *values, ""


def _row(job: Job, measured: Measured) -> tuple[str, ...]:
    """The cells of one target."""
    plan, timing = measured.report.plan, measured.report.timing
    return (
        str(plan.target),
        percent(plan.totals.kept("params", "sites")),
        percent(plan.totals.kept("params", "model")),
        percent(plan.totals.kept("flops", "model")),
        number(plan.error),
        *(score.text(value) for score, value in zip(job.scores, measured.scores, strict=True)),
        "-" if timing is None else speed(timing.speedup),
    )


def _marks(measured: Sequence[Measured], shown: Report) -> list[Mark]:
    """Every target on the chart of the one that is shown."""
    marks = shown.marks
    for entry in measured:
        plan = entry.report.plan
        if entry.report is not shown and plan.factored:
            kept = plan.totals.kept(shown.quantity, "model")
            marks.append(Mark("other", f"{plan.target}: {number(plan.error)}", kept, plan.error))
    return marks
