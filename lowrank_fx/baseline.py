"""The pick that every proxy has to beat: a uniform allocation that owes nothing to measured effects nor to gradients.

Error curves, effects and gradients all choose among forms and ranks; on held-out rows their plan has to do better than
equal shares of the plainest forms, or those are the plan.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from lowrank_fx.curves import EffectCurve, SiteCurves
from lowrank_fx.double_sided import split_variant
from lowrank_fx.forms import ACTIVATION, FORMS
from lowrank_fx.forms.output import OutputForm
from lowrank_fx.planners.problem import Problem, filled
from lowrank_fx.planners.uniform import uniform
from lowrank_fx.settle import Choice
from lowrank_fx.targets import CostKind

BASELINE = "uniform, plain"
"""Its name among the candidates of a plan."""


def baseline(problem: Problem, quantity: CostKind, budget: int) -> Choice | None:
    """A uniform allocation, and what its steps leave of the budget spent too; None where nothing of it fits.

    Args:
        problem: with the options of :func:`plain_effects`.
        quantity: what is saved.
        budget: what the sites may cost.
    """
    if problem.smallest(quantity) > budget:
        return None
    return problem.factored(filled(problem, quantity, budget, uniform(problem, quantity, budget)))


def plain_effects(curves: Mapping[str, SiteCurves]) -> dict[tuple[str, str], EffectCurve] | None:
    """The output forms in the basis of activations, in the race or not, without an effect of any.

    Args:
        curves: by site name.

    Returns:
        None where a low effort made no curves in that basis.
    """
    variants = [(name, form) for name, entry in curves.items() for form in entry.forms]
    if any(split_variant(form)[0] not in curves[name].forms for name, form in variants):
        return None
    return {(name, form): EffectCurve(()) for name, form in variants if is_plain(form)}


def plain_beyond(curves: Mapping[str, SiteCurves], effects: Container[tuple[str, str]]) -> dict[str, SiteCurves]:
    """The plain variants that left the race, by site name.

    Args:
        curves: by site name.
        effects: by site name and variant: those that are in it.
    """
    found = {}
    for name, entry in curves.items():
        left = {form: curve for form, curve in entry.forms.items() if is_plain(form) and (name, form) not in effects}
        if left:
            found[name] = replace(entry, forms=left)
    return found


def is_plain(name: str) -> bool:
    """Whether a variant is an output form in the basis of activations."""
    form, basis = split_variant(name)
    return basis == ACTIVATION and isinstance(FORMS[form], OutputForm)
