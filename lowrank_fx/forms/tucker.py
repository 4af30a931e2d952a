"""``tucker2``: 1 x 1 to fewer channels, the kernel between few channels, 1 x 1 to the output's channels.

Kim, Park, Yoo, Choi, Yang, Shin 2016, "Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
Applications", section 3, with the output's error in the place of the kernel's own norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_fx.forms.alternating import Composition, SecondMaps
from lowrank_fx.forms.base import ErrorCurve, rank_step
from lowrank_fx.forms.split import AlternatingForm, kept_starts, spanned
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.linalg import symmetric_eigen
from lowrank_fx.sites import Site

INNER_SHARE = 0.75
"""The share of the input's channels that is kept, over the share of the output's.

At one number of weights the best pair of ranks keeps .4 to 1.4 times as much of the input, mostly less than 1, on a
ResNet's layers (six layers, four sizes each).
"""

TUCKER_SWEEPS = 4
"""Rounds of alternation."""

TUCKER_STEPS = 3
"""Steps of conjugate gradients in each round."""


class Tucker2(AlternatingForm):
    """``tucker2``: 1 x 1 from i to r1 channels, the kernel from r1 to r2, 1 x 1 from r2 to o, in each group.

    The rank is r2; r1 is :meth:`inner`. For a given first factor the other two are exact: the best kernel behind it,
    and the projection of the outputs that this kernel gives on their principal directions.
    """

    name = "tucker2"

    def late(self, site: Site) -> tuple[int, ...]:
        """Every dimension that the kernel spans."""
        return spanned(site)

    def inner(self, site: Site, rank: int) -> int:
        """The channels r1 of a group behind the first factor: ``INNER_SHARE`` of what ``rank`` keeps of the outputs.

        Where the ranks go in steps, it is a multiple of the step.
        """
        return self._inner(site, rank, self._step(site))

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The ranks on offer: below break-even and the outputs of a group, in the steps the dtype likes."""
        step = self._step(site)
        return tuple(rank for rank in range(step, self._limit(site) + 1, step) if self._saves(site, rank, step))

    def curve(self, site: Site, weight: Tensor, sketch: Sketch) -> ErrorCurve:
        """The error of every rank at the start of the alternation.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            sketch: of the rows that meet it.
        """
        ranks = self._offered(site, sketch)
        problems = self._problems(site, weight, sketch)
        energy = sum(problem.energy for problem in problems)
        inner = [self.inner(site, rank) for rank in ranks]
        starts = [problem.start(inner[-1]) for problem in problems]
        explained = [0.0] * len(ranks)
        for problem, start in zip(problems, starts, strict=True):
            for place, gram in enumerate(problem.behind(start).grams(inner)):
                energies, _ = symmetric_eigen(gram)
                explained[place] += float(energies[: ranks[place]].clamp(min=0).sum())
        tail = [energy]
        for rank, found in zip(ranks, explained, strict=True):
            # Ranks between those on offer have the error of the one below.
            tail += [tail[-1]] * (rank - len(tail)) + [min(max(energy - found, 0.0), tail[-1])]
        return ErrorCurve(ranks, tuple(tail), energy, kept_starts(starts, weight))

    def _improved(self, site: Site, problem: Composition, start: Tensor, rank: int) -> Tensor:
        first = start[: self.inner(site, rank)]
        for _ in range(TUCKER_SWEEPS):
            core, outer = _projected(problem.behind(first), len(first), rank)
            first = problem.projected(outer).first(core, first, TUCKER_STEPS)
            first = problem.orthonormal(first)
        return first

    def _finished(self, site: Site, maps: SecondMaps, first: Tensor, rank: int) -> tuple[Tensor, ...]:
        inner = self.inner(site, rank)
        core, outer = _projected(maps, inner, rank)
        shapes = self._shapes(site, rank)
        parts = first[:inner], core.to(first.dtype), outer.to(first.dtype)
        return tuple(part.reshape(-1, *shape[1:]) for part, shape in zip(parts, shapes, strict=True))

    def _shapes(self, site: Site, rank: int) -> list[tuple[int, ...]]:
        inner, ones = self.inner(site, rank), (1,) * (len(site.shape) - 2)
        return [
            (site.groups * inner, site.shape[1], *ones),
            (site.groups * rank, inner, *site.shape[2:]),
            (site.out_features, rank, *ones),
        ]

    def _limit(self, site: Site) -> int:
        return site.out_features // site.groups - 1

    def _step(self, site: Site) -> int:
        # As in cost.candidate_ranks: multiples from a break-even rank of 64 on.
        multiple = rank_step(site.dtype)
        return multiple if self._limit(site) >= 64 and self._saves(site, 64, multiple) else 1

    def _inner(self, site: Site, rank: int, step: int) -> int:
        wanted = INNER_SHARE * site.shape[1] * rank * site.groups / site.out_features
        return min(max(round(wanted / step), 1) * step, site.shape[1])

    def _saves(self, site: Site, rank: int, step: int) -> bool:
        inner, channels, outputs = self._inner(site, rank, step), site.shape[1], site.out_features // site.groups
        weights = inner * channels + inner * rank * (site.in_features // channels) + rank * outputs
        return weights < outputs * site.in_features


def _projected(maps: SecondMaps, inner: int, rank: int) -> tuple[Tensor, Tensor]:
    """The best core ``[rank, inner, q]`` and outputs' directions ``[m, rank]`` behind the first ``inner`` rows."""
    second, gram = maps.fitted(inner)
    outer = symmetric_eigen(gram)[1][:, :rank]
    return torch.einsum("mk,mrq->krq", outer, second), outer
