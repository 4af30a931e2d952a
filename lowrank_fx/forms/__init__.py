"""The forms: ways to factor a site, each with its error curve, its factors and its cost.

To add a form: subclass :class:`Form` in a file of this package, put it into ``FORMS``, and give ``passes/`` a rewrite
for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from lowrank_fx.errors import OptionError
from lowrank_fx.forms.base import (
    ACTIVATION,
    DENSE,
    GRADIENT,
    PRIOR_ROWS,
    SHARED,
    ErrorCurve,
    Factors,
    Form,
    apply_blocks,
    composed,
    dense_flops,
    dense_params,
    relative,
)
from lowrank_fx.forms.output import Channel, LowRank
from lowrank_fx.forms.split import ChannelIn, Spatial, SpatialT
from lowrank_fx.forms.tucker import Tucker2
from lowrank_fx.sites import Site

__all__ = [
    "ACTIVATION",
    "DENSE",
    "FORMS",
    "GRADIENT",
    "PRIOR_ROWS",
    "SHARED",
    "Channel",
    "ChannelIn",
    "ErrorCurve",
    "Factors",
    "Form",
    "LowRank",
    "Spatial",
    "SpatialT",
    "Tucker2",
    "apply_blocks",
    "check_forms",
    "composed",
    "dense_flops",
    "dense_params",
    "forms_for",
    "relative",
    "why_none",
]

FORMS: dict[str, Form] = {
    form.name: form for form in (LowRank(), Channel(), ChannelIn(), Spatial(), SpatialT(), Tucker2())
}


def check_forms(names: Sequence[str]) -> None:
    """Make sure that there are forms of these names.

    Raises:
        OptionError: there is none of some name.
    """
    for name in names:
        if name not in FORMS:
            raise OptionError(f"forms={list(names)!r}: no form is called {name!r}; there are {list(FORMS)}")


def forms_for(site: Site, allowed: Sequence[str] | None) -> list[Form]:
    """The forms that can stand for ``site``, among those the user allows (None: all).

    Raises:
        OptionError: ``allowed`` names a form that does not exist.
    """
    check_forms(allowed or ())
    return [form for name, form in FORMS.items() if (allowed is None or name in allowed) and form.applies(site)]


def why_none(site: Site, allowed: Sequence[str] | None) -> str:
    """Why no form is on offer for ``site``, among those the user allows (None: all)."""
    if allowed is not None and not forms_for(site, allowed):
        needs = "; ".join(f"{name} is for {FORMS[name].needs}" for name in allowed)
        return f"no form that is allowed can stand for it ({needs})"
    return "no rank is on offer below its break-even rank"
