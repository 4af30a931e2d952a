"""How much of a trained model's accuracy is left when its layers are factored, and what is each idea worth?

Five real models (``subjects.py``), each calibrated on unlabelled training data and measured on data that nothing else
saw. One row per lead, each on top of those before it; then what ``optimize`` returns, and what refinement makes of it.
Every choice within a row is made by held-out calibration data.

Nothing is compiled: compiling changes the speed, not the accuracy. The page goes to results/accuracy.md; ``--only``
measures some of its sections again and leaves the others as they are.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import common
from subjects import SUBJECTS, Aim, Measured, Subject
from torch import nn

from lowrank_fx import Keep, LowRankModule, Refine, calibrate, optimize
from lowrank_fx._render import number, percent
from lowrank_fx.double_sided import split_variant
from lowrank_fx.effects import measure_effects
from lowrank_fx.planners.budget import by_effect
from lowrank_fx.planners.energy import by_energy
from lowrank_fx.planners.problem import Allocator, Problem
from lowrank_fx.planners.uniform import uniform
from lowrank_fx.program_module import ProgramModule
from lowrank_fx.session import Session
from lowrank_fx.training_batches import flip_and_shift

T = TypeVar("T")

Variants: TypeAlias = Callable[[str, str], bool]
"""Whether a variant takes part, by its form and basis."""

BASIC = ("lowrank", "channel")
"""The forms that project a layer's output on its principal directions, without alternation."""

REFINE = {
    "minilm": Refine(steps=150),
    "resnet20": Refine(steps=300, lr=0.01, batch=128, augment=flip_and_shift),
    "resnet56": Refine(steps=150, lr=0.01, batch=128, augment=flip_and_shift),
    "vit": Refine(steps=200, batch=128, augment=flip_and_shift),
    "lm": Refine(steps=400),
}
"""How each model is refined; the steps are for its hardest target, others take ``Aim.steps``."""


@dataclass(frozen=True)
class Lead:
    """One way to plan.

    Attributes:
        name: of the row.
        variants: which variants of forms take part.
        allocate: spends the budget.
        around: effects are measured again around the plan, and it is made anew by them.
        corrected: how the factors are corrected afterwards: ``""``, ``"refitted"`` or ``"closed loop"``.
        shared: layers with one input have one first factor where that is predicted to do better.
    """

    name: str
    variants: Variants
    allocate: Allocator
    around: bool = False
    corrected: str = ""
    shared: bool = False


def _basic(form: str, basis: str) -> bool:
    return form in BASIC and basis == "activation"


def _activation(form: str, basis: str) -> bool:
    return basis == "activation"


def _any(form: str, basis: str) -> bool:
    return True


LEADS = (
    Lead("output PCA, uniform", _basic, uniform),
    Lead("allocated by energy", _basic, by_energy),
    Lead("allocated by measured effects", _basic, by_effect),
    Lead("+ all forms", _activation, by_effect),
    Lead("+ gradient basis", _any, by_effect),
    Lead("+ measured again around the plan", _any, by_effect, around=True),
    Lead("+ refitted", _any, by_effect, True, "refitted"),
    Lead("+ closed loop instead", _any, by_effect, True, "closed loop"),
    Lead("+ one first factor for several", _any, by_effect, True, "closed loop", shared=True),
)


def main() -> None:
    """Measure what there is data for, and write the page."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="sections to measure")
    parser.add_argument("--no-refine", action="store_true", help="leave the rows of refinement out")
    options = parser.parse_args()
    data = common.data_dir(parser, options.data_dir)
    if data is None:
        return
    page = options.out / "accuracy.md"
    sections = common.sections(page)
    for name in options.only:
        subject = SUBJECTS[name](data)
        facts = common.machine(options.date)
        body = section(subject, None if options.no_refine else REFINE[name])
        sections[subject.title] = [*facts, "", *body]
        lines = ["# Accuracy that is left without labels", "", *common.paragraph(LEGEND)]
        for title, text in sections.items():
            lines += ["", f"## {title}", "", *text]
        common.publish(options.out, page.name, lines)


LEGEND = (
    "A row per lead, each on top of those above it, all from one calibration; *optimize* is what `optimize` returns, "
    'which compares candidates on held-out calibration data; *KL*: with `loss_fn="kl"`, meant for '
    "language models, whose perplexity it is about; "
    "*re-gauged*: with `Keep(params=..., regauge=True)`. *Held-out error*: relative error of the model's outputs on "
    "calibration data that chose nothing, L2 or KL as the plan was made. *Asked* is what the project set itself, for "
    "the plan before and after refinement. Refinement distils from the original on the calibration batches, without "
    "labels. *Seconds* are those of the row alone, after calibration."
)


def section(subject: Subject, refine: Refine | None) -> list[str]:
    """A table per target."""
    target = subject.aims[0].target
    calibration, calibrated = _timed(lambda: calibrate(subject.model, subject.loader))
    made, planned = _timed(lambda: optimize(subject.model, calibration, target=target, compile=False))
    assert made.session is not None
    ways = {"optimize": made}
    if subject.language:
        ways["optimize, KL"] = optimize(subject.model, calibration, target=target, compile=False, loss_fn="kl")
    usual = ways["optimize, KL" if subject.language else "optimize"]
    header = (
        "",
        subject.figure,
        "asked",
        "met",
        *subject.extra,
        "of parameters",
        "of FLOPs",
        "held-out error",
        "seconds",
    )
    lines = common.paragraph(
        f"{subject.about} Calibration took {calibrated:.0f} s, effects and the first plan {planned:.0f} s."
    )
    sessions: dict[Variants, Session] = {_any: made.session}
    for variants in (_basic, _activation):
        sessions[variants] = _raced(made.session, variants)
    for aim in subject.aims:
        rows = [*_rows(subject, aim, sessions)]
        for name, way in ways.items():
            plain, seconds = _timed(lambda way=way, aim=aim: way.replan(aim.target))  # type: ignore[misc]
            asked = aim.plain if way is usual else None
            rows.append(_row(f"{name} ({plain.plan.candidate})", subject, plain, asked, plain, seconds))
        if regauged := aim.regauged:
            plain, seconds = _timed(lambda aim=regauged: made.replan(aim))  # type: ignore[misc]
            rows.append(_row(f"optimize, re-gauged ({plain.plan.candidate})", subject, plain, None, plain, seconds))
        if refine is not None:
            own = dataclasses.replace(refine, steps=aim.steps or refine.steps)
            best = aim.regauged or aim.target
            done, seconds = _timed(lambda best=best, own=own: usual.replan(best, refine=own))  # type: ignore[misc]
            kept = done.plan.refinement
            said = "" if kept is None else f" ({kept.best_step} of {own.steps} steps kept)"
            start = "re-gauged, refined" if aim.regauged else "refined"
            rows.append(_row(f"{start}{said}", subject, done, aim.refined, done, seconds))
        lines += ["", f"**{aim.target}**", "", *common.table(header, rows)]
    return lines


def _rows(subject: Subject, aim: Aim, sessions: Mapping[Variants, Session]) -> Iterator[tuple[str, ...]]:
    """A row per lead that changes anything."""
    before: object = None
    for lead in LEADS:
        own = sessions[lead.variants]
        (model, factored), seconds = _timed(lambda lead=lead, own=own: _planned(own, lead, aim.target))  # type: ignore[misc]
        if factored == before:
            continue
        before = factored
        yield _row(lead.name, subject, model, None, None, seconds)


def _raced(session: Session, variants: Variants) -> Session:
    """The session as it would be with some variants only: what another one beat in a race may run again."""
    curves = {
        name: dataclasses.replace(
            entry, forms={key: curve for key, curve in entry.forms.items() if variants(*split_variant(key))}
        )
        for name, entry in session.curves.items()
    }
    effects = measure_effects(session.program, curves, session.calibration)
    return dataclasses.replace(session, curves=curves, effects=effects)


def _planned(session: Session, lead: Lead, target: Keep) -> tuple[nn.Module, object]:
    """The model of a lead, and what tells it from another."""
    session = session.aimed(target, None)
    budget = session.budget(target)
    pick = lead.allocate(session.problem, target.quantity, budget)
    if lead.around:
        for allocate in (session.marginal(pick) or {}).values():
            pick = allocate(session.problem, target.quantity, budget)
    if lead.shared:
        session, pick = session.sharing(pick) or (session, pick)
    problem: Problem = session.problem
    factored = session.maker.corrected(problem.factored(pick), lead.corrected)
    model = ProgramModule(session.program.factorize(factored, clone=False))
    return model, (problem.factored(pick), lead.corrected)


def _row(
    name: str, subject: Subject, model: nn.Module, asked: float | None, made: LowRankModule | None, seconds: float
) -> tuple[str, ...]:
    figure: Measured = subject.measure(model)
    reached = asked is None or (figure.value >= asked if subject.rising else figure.value <= asked)
    digits = ".4f" if subject.rising else ".2f"
    return (
        name,
        f"{figure.value:{digits}}" + ("" if figure.error is None else f" ± {figure.error:{digits}}"),
        "" if asked is None else f"{asked:g}",
        "" if asked is None else common.met(reached),
        *figure.extra,
        "" if made is None else percent(made.plan.totals.kept("params", "model")),
        "" if made is None else percent(made.plan.totals.kept("flops", "model")),
        "" if made is None else number(made.plan.error),
        f"{seconds:.0f}",
    )


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.monotonic()
    result = work()
    return result, time.monotonic() - started


if __name__ == "__main__":
    main()
