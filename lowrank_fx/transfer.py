"""A stored plan on other weights: the factors of a model that was trained on since, without any data.

What lies behind the first of a layer's factors is kept, put together a matrix ``V``, and the first one, ``A``, follows
the weight. With ``W`` the weight in the shape of ``V A`` (the outputs, and the kernel's positions that ``V`` spans, by
the rest), each group by itself,

    A' = A + t (V^+ W - A)        t = max(0, 1 - g^2 / |V V^+ W - V A|^2)

``V^+ W`` is the first factor nearest to the new weight. It is not the stored one even where the weight is what it was:
that one was chosen for the layer's inputs, for the gradients behind it, for factored layers in front, and none of these
is stored. What is stored is the distance to the first weight's, ``g = |V V^+ W_0 - V A|``. Where the new weight is
further away, what its change adds, as far as ``V`` spans it, is about the rest of the square, and ``t`` is the share of
the way that leaves the least expected error if the two have nothing in common (as in W. James, C. Stein, "Estimation
with quadratic loss", 1961). Unchanged weights give ``t = 0``, the stored factors; where these were a plain projection
``g`` is 0 and ``t`` is 1; a change that is small next to ``g`` moves them little.

Of layers with one first factor that one is kept, and the last one of each follows: the same of transposed matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lowrank_fx._env import max_rewrites
from lowrank_fx.forms import FORMS, SHARED, Factors
from lowrank_fx.forms.split import AlternatingForm
from lowrank_fx.gauge import Gauge
from lowrank_fx.linalg import least_squares
from lowrank_fx.passes.factorize_regauged import ORDER
from lowrank_fx.plan import SitePlan
from lowrank_fx.program import Program
from lowrank_fx.sites import Site

ROUNDING = 1e-5
"""By this share a distance may differ from the stored one for a weight that is what it was."""


@dataclass(frozen=True)
class Before:
    """What of the captured model the factored one does not hold any more, as far as :mod:`transfer` needs it.

    Attributes:
        gaps: of every factored layer ``g``, by the layer's name.
        values: of tensors that both have, with other values: biases that took a shift, norms that were refined.
    """

    gaps: Mapping[str, float]
    values: Mapping[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, captured: Program, sites: Mapping[str, Site], entries: Sequence[SitePlan], made: nn.Module) -> Before:
        """Compare a captured model with what it became.

        Args:
            captured: the captured model.
            sites: those that are factored, by name.
            entries: what the plan says of them.
            made: the factored module.
        """
        old = captured.module.state_dict()
        values = {
            name: old[name].clone()
            for name, tensor in made.state_dict().items()
            if name in old and _moved(old[name], tensor)
        }
        gaps = {}
        for entry in entries:
            site = sites[entry.name]
            if max_rewrites() is not None and site.weight in made.state_dict():
                continue  # bisecting left it dense
            gaps[entry.name] = _gap(_nearest(site, entry, captured.weight(site), factors_of(made, entry, sites)))
        return cls(gaps, values)


def factors_of(module: nn.Module, entry: SitePlan, sites: Mapping[str, Site]) -> Factors:
    """The factors of a site in a factored module, without a shift.

    Args:
        module: the module.
        entry: what the plan says of the site.
        sites: those that are factored, by name.
    """
    site, state = sites[entry.name], module.state_dict()
    shared = None if entry.shares is None else sites[entry.shares].attribute("factor_in")

    def leaf(name: str) -> Tensor | None:
        # Under its weight's name, or in the module that stands in for it.
        found = [state[each] for each in (site.attribute(name), f"{site.calls[0].node}.{name}") if each in state]
        return found[0] if found else None

    # Where bisecting stopped short of sharing, the layer has a first factor of its own.
    own, last = leaf("factor_in"), leaf("factor_out")
    first = own if own is not None or shared is None else state[shared]
    assert first is not None
    assert last is not None
    gauge = None if entry.pivots is None else Gauge(entry.pivots, leaf(ORDER) if entry.gathered else None)
    stacked = site.kind == "bmm"
    return Factors(first, last, None, site.groups, stacked, factor_mid=leaf("factor_mid"), gauge=gauge, first=shared)


def transferred(site: Site, entry: SitePlan, weight: Tensor, factors: Factors, gap: float) -> Factors:
    """The factors of another weight.

    Args:
        site: the site.
        entry: what the plan says of it.
        weight: the site's weight, as stored in the model.
        factors: the stored factors.
        gap: what :class:`Before` says of the site.

    Returns:
        Factors in the weight's dtype and on its device, of the same form and rank: the stored ones, the same objects,
        where the weight is no further from them than the first one was.
    """
    parts = _nearest(site, entry, weight, factors)
    found = _gap(parts)
    if not math.isfinite(found) or found <= gap * (1 + ROUNDING) or found == 0:
        return factors
    share = 1 - (gap / found) ** 2
    first = torch.cat([own + share * (nearest - own) for _, own, nearest in parts]).to(weight.dtype)
    if entry.basis == SHARED:
        return replace(factors, factor_out=first.T.contiguous())
    if isinstance(FORMS[entry.form], AlternatingForm):
        return replace(factors, factor_in=first.reshape(factors.factor_in.shape).contiguous())
    if site.kind == "bmm":
        return replace(factors, factor_in=first.reshape(site.groups, -1, first.shape[1]).mT.contiguous())
    if factors.gauge is None:
        return replace(factors, factor_in=first.reshape(factors.factor_in.shape).contiguous())
    return replace(factors, factor_in=first, gauge=None).regauged()


def move(module: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Change tensors of a module, in place, by as much as they were changed once before.

    Args:
        module: the module.
        before: values before that change, by name; names that the module does not have are passed over.
        after: the values after it.
    """
    own = module.state_dict(keep_vars=True)
    for name, old in before.items():
        if name not in own or name not in after or not after[name].shape == old.shape == own[name].shape:
            continue
        value = own[name].detach()
        change = (after[name].double() - old.double().to(after[name].device)).to(value.device)
        moved = value.double() + change
        # A variance stays one.
        positive = (value > 0) & (old > 0).to(value.device) & (after[name] > 0).to(value.device)
        moved = torch.where(positive & (moved <= 0), value.double(), moved)
        own[name].data = moved.to(value.dtype)


def _nearest(site: Site, entry: SitePlan, weight: Tensor, factors: Factors) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every group V ``[m, r]``, A ``[r, d]`` and V^+ W ``[r, d]``, in float64 on the weight's device."""
    kind = FORMS[entry.form]
    firsts: Sequence[Tensor]
    seconds: Sequence[Tensor]
    blocks: Sequence[Tensor]
    if entry.basis == SHARED:
        firsts, seconds, blocks = [factors.factor_out.T], [factors.factor_in.T], [site.matrix(weight.detach()).T]
    elif isinstance(kind, AlternatingForm):
        firsts, seconds, blocks = _divided(kind, site, weight, factors)
    else:
        first, second = factors.matrices()
        firsts, seconds = first.chunk(site.groups), second.chunk(site.groups)
        blocks = site.matrix(weight.detach()).chunk(site.groups)
    made = []
    for first, second, block in zip(firsts, seconds, blocks, strict=True):
        own, behind = first.to(weight.device).double(), second.to(weight.device).double()
        made.append((behind, own, least_squares(behind, block.double())))
    return made


def _divided(
    kind: AlternatingForm, site: Site, weight: Tensor, factors: Factors
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """The same of convolutions one after another; a row is an output at a position of the late dimensions."""
    late, dims = kind.late(site), len(site.shape) - 2
    order = [0, *(axis + 2 for axis in late), 1, *(axis + 2 for axis in range(dims) if axis not in late)]
    width = factors.factor_in[0].numel()
    blocks = [block.permute(order).reshape(-1, width) for block in weight.detach().chunk(site.groups)]
    last = factors.factor_mid if factors.factor_mid is not None else factors.factor_out
    seconds = [part.flatten(2).mT.double() for part in last.chunk(site.groups)]  # [outputs, positions, channels]
    if factors.factor_mid is not None:
        outer = [part.flatten(1).double() for part in factors.factor_out.chunk(site.groups)]
        seconds = [torch.einsum("mk,kqr->mqr", own, core) for own, core in zip(outer, seconds, strict=True)]
    return factors.factor_in.flatten(1).chunk(site.groups), [part.flatten(0, 1) for part in seconds], blocks


def _gap(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    """``|V V^+ W - V A|`` over all groups."""
    return math.sqrt(sum(float((second @ (nearest - own)).square().sum()) for second, own, nearest in parts))


def _moved(old: Tensor, new: Tensor) -> bool:
    if old.shape != new.shape or old.dtype != new.dtype or not new.is_floating_point():
        return False
    return old.data_ptr() != new.data_ptr() and not torch.equal(old, new)
