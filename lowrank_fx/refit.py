"""A closed-loop correction of the factors: every factored layer is refitted with the layers before it already factored.

Each site was factored for the *original's* activations. In the factored model its input is already off, so its output
is too. Walking original and factored graph in step, each site's output z is fitted, per output channel, to the
original's output y by least squares,

    min over a, c of |y - (a z + c)|^2:    a = cov(y, z) / var(z),    c = mean(y) - a mean(z)

(without a bias of the site's own: a = <y, z> / <z, z>, a bias that it shares being taken off both). ``a`` goes into the
rows of ``factor_out`` and ``c`` into the bias, so nothing grows; what follows then sees the corrected value. Two
numbers per channel need few rows, so the cached batches suffice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

from lowrank_fx.cache import CachedBatch
from lowrank_fx.forms import Factors
from lowrank_fx.graph_program import substitutes
from lowrank_fx.sites import Site
from lowrank_fx.walk import Walk

MIN_VARIANCE = 1e-12
"""A channel whose factored output varies less than this share of the largest channel's is not scaled."""


def refit(
    gm: GraphModule, factored: Mapping[str, tuple[Site, Factors]], batches: Sequence[CachedBatch]
) -> dict[str, tuple[Site, Factors]]:
    """Refit every factored site that is called once, in graph order.

    Args:
        gm: the clean captured graph.
        factored: a site and its factors, by site name.
        batches: calibration batches.

    Returns:
        The same sites with refitted factors; a site that is called several times keeps its own.
    """
    walk = Walk(gm)
    refitted = dict(factored)
    called = {site.calls[0].node: name for name, (site, _) in factored.items() if len(site.calls) == 1}
    values: dict[str, Tensor] = {}
    for site, factors in factored.values():
        values.update(substitutes(gm, site, factors))
    originals = [walk.run(batch.call) for batch in batches]
    changed = [walk.run(batch.call) for batch in batches]
    masks = [batch.call.mask for batch in batches]
    for run in changed:
        run.exchange(values)
    with torch.no_grad():
        for node in walk.nodes:
            wanted = [run.compute() for run in originals]
            actual = [run.compute() for run in changed]
            name = called.get(node.name)
            if name is not None:
                site, factors = factored[name]
                fitted = _fit(gm, site, factors, _rows(site, wanted, masks), _rows(site, actual, masks))
                refitted[name] = (site, fitted)
                for run in changed:
                    run.exchange(substitutes(gm, site, fitted))
                    run.compute()
            for run in (*originals, *changed):
                run.move()
    return refitted


def _fit(gm: GraphModule, site: Site, factors: Factors, wanted: Tensor, actual: Tensor) -> Factors:
    """Factors whose output is the least-squares fit of ``wanted`` on ``actual``, both float64 ``[rows, out]``."""
    if not wanted.shape[0]:
        return factors
    if factors.shift is None:
        if site.biases:
            # A bias that other sites share stays as it is, so it takes no part in the fit.
            fixed = gm.get_parameter(site.biases[0]).detach().double()
            wanted, actual = wanted - fixed, actual - fixed
        variance, covariance = actual.square().mean(0), (wanted * actual).mean(0)
    else:
        wanted_mean, actual_mean = wanted.mean(0), actual.mean(0)
        variance = (actual - actual_mean).square().mean(0)
        covariance = ((wanted - wanted_mean) * (actual - actual_mean)).mean(0)
    varies = variance > MIN_VARIANCE * variance.max()
    scale = torch.where(varies, covariance / torch.where(varies, variance, 1.0), 1.0)
    shift = None
    if factors.shift is not None:
        bias = gm.get_parameter(site.biases[0]).detach().double()
        shift = scale * (bias + factors.shift) + wanted_mean - scale * actual_mean - bias
    return factors.scaled(scale, shift)


def _rows(site: Site, outputs: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """The outputs of a site in several batches as float64 rows, padding left out."""
    rows = []
    for value, mask in zip(outputs, masks, strict=True):
        if mask is not None and site.calls[0].sequence_first:
            mask = mask.t()
        if site.kind == "bmm" and site.groups > 1:
            value = value.movedim(-3, -2).flatten(-2)
        if site.patch is not None:
            value = value.movedim(1, -1)
        elif mask is not None and value.dim() >= 3 and value.shape[:2] == mask.shape:
            value = value[mask]
        elif mask is not None and value.dim() == 2 and value.shape[0] == mask.numel():
            value = value[mask.reshape(-1)]
        rows.append(value.reshape(-1, site.out_features).double())
    return torch.cat(rows)
