"""The forms that divide a kernel's dimensions between two convolutions: ``channel_in``, ``spatial``, ``spatial_t``.

With the kernel's positions reordered, ``W [m, q, c]`` for the q positions of the second convolution, the dense kernel
of the pair is ``W'[m, q, c] = sum_r V[m, r, q] H[r, c]``. There is no closed form for the least output error; the best
H on the positions' mean Gram starts an alternation of exact and conjugate gradient steps (``alternating.py``). For the
spatial pair with the plain Frobenius norm in the place of the output error: Jaderberg, Vedaldi, Zisserman 2014,
"Speeding up Convolutional Neural Networks with Low Rank Expansions", scheme 2.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lowrank_fx import cost
from lowrank_fx.forms.alternating import Composition, SecondMaps
from lowrank_fx.forms.base import ErrorCurve, Factors, Form, apply_blocks, rank_step, with_prior
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.sites import Site
from lowrank_fx.sketch import FrequentDirections

SWEEPS = 3
"""Rounds of alternation. On a ResNet's taps the start is 11 % above where 20 rounds end, and 3 are 1 % above."""

STEPS = 2
"""Steps of conjugate gradients in each round."""

LEAST_SHRUNK = 1e-9
"""The share of the rows' energy that Frequent Directions are taken to have shrunk away at least."""

KEPT_SIZE = 2
"""Factors that were found are kept, as many numbers as this many of the dense weight."""


class AlternatingForm(Form):
    """Convolutions one after another, found by alternation, the last ones spanning the dimensions ``late``."""

    kinds = ("conv1d", "conv2d", "conv3d")
    needs = "convolutions whose kernel is larger than one"

    @abstractmethod
    def late(self, site: Site) -> tuple[int, ...]:
        """The dimensions of space that the first convolution does not span; none where the form is not for the site."""

    def applies(self, site: Site) -> bool:
        """Whether the kernel has the dimensions that this form divides."""
        return site.kind in self.kinds and bool(self.late(site))

    def factor(self, site: Site, weight: Tensor, curve: ErrorCurve, rank: int, sketch: Sketch) -> Factors:
        """The factors of ``rank``, improved by alternation; kept with the curve.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            curve: from :meth:`Form.curve`.
            rank: one of ``curve.ranks``.
            sketch: the one that made the curve.
        """
        found = curve.made.get(rank)
        if found is None:
            firsts, maps = [], []
            for problem, start in zip(self._problems(site, weight, sketch), self._starts(site, curve), strict=True):
                first = self._improved(site, problem, start, rank).to(weight.dtype)
                firsts.append(first)
                maps.append(problem.behind(first.double()))
            found = self._found(site, weight, firsts, maps, rank, sketch)
            curve.made[rank] = found
            while len(curve.made) > 1 and _numbers(curve.made.values()) > KEPT_SIZE * weight.numel():
                curve.made.pop(next(iter(curve.made)))
        return found

    def start(self, site: Site, weight: Tensor, curve: ErrorCurve, rank: int, sketch: Sketch) -> Factors:
        """The factors of ``rank`` before any alternation; the least squares solution is kept for the next rank.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            curve: from :meth:`Form.curve`.
            rank: one of ``curve.ranks``.
            sketch: the one that made the curve.
        """
        firsts = [start.to(weight.dtype) for start in self._starts(site, curve)]
        if "maps" not in curve.work:
            problems = zip(self._problems(site, weight, sketch), firsts, strict=True)
            curve.work["maps"] = [problem.behind(first.double()) for problem, first in problems]
        return self._found(site, weight, firsts, curve.work["maps"], rank, sketch)

    def _found(
        self,
        site: Site,
        weight: Tensor,
        firsts: Sequence[Tensor],
        maps: Sequence[SecondMaps],
        rank: int,
        sketch: Sketch,
    ) -> Factors:
        """The factors behind the groups' first factors as they are stored."""
        parts = [self._finished(site, own, first, rank) for own, first in zip(maps, firsts, strict=True)]
        factors = self._assembled(site, [torch.cat(each).contiguous() for each in zip(*parts, strict=True)], None)
        if not site.centered:
            return factors
        left = weight.detach().double().flatten(1) - factors.dense_matrix()
        return self._assembled(site, list(factors.tensors.values()), apply_blocks(left, sketch.mean, site.groups))

    def _starts(self, site: Site, curve: ErrorCurve) -> tuple[Tensor, ...]:
        """Each group's first factors of the largest rank, float64."""
        return curve.basis.double().chunk(site.groups)

    @abstractmethod
    def _improved(self, site: Site, problem: Composition, start: Tensor, rank: int) -> Tensor:
        """One group's first factor of ``rank`` after alternation, float64."""

    @abstractmethod
    def _finished(self, site: Site, maps: SecondMaps, first: Tensor, rank: int) -> tuple[Tensor, ...]:
        """One group's factors behind ``first``, in the order of their application, in their own shapes and dtype."""

    def blank(self, site: Site, weight: Tensor, rank: int) -> Factors:
        """Factors of ``rank`` that hold zeros, in the dtype and on the device of ``weight``."""
        return self._assembled(site, [weight.new_zeros(shape) for shape in self._shapes(site, rank)], None)

    @abstractmethod
    def _shapes(self, site: Site, rank: int) -> list[tuple[int, ...]]:
        """The factors' shapes, in the order of their application."""

    def _assembled(self, site: Site, factors: Sequence[Tensor], shift: Tensor | None) -> Factors:
        mid = factors[1] if len(factors) == 3 else None
        return Factors(factors[0], factors[-1], shift, site.groups, factor_mid=mid)

    def params(self, site: Site, rank: int) -> int:
        """Weights of the factors of ``rank``."""
        return sum(map(math.prod, self._shapes(site, rank)))

    def flops(self, site: Site, rank: int, rows: int, space: Sequence[int] = ()) -> int:
        """FLOPs of the factors of ``rank`` over ``rows`` positions of the output.

        Args:
            site: the site.
            rank: the rank.
            rows: positions of the output, over all images.
            space: the size in space of one image of the input; not given, one that the strides divide.
        """
        assert site.patch is not None
        late, (first, *others) = self.late(site), map(math.prod, self._shapes(site, rank))
        # The first convolution has not taken the steps of the dimensions that others span.
        before, after = (
            (space, site.patch.positions(*space)) if space else (site.patch.stride, (1,) * len(site.patch.stride))
        )
        inner = rows * math.prod(before[axis] for axis in late) // math.prod(after[axis] for axis in late)
        return 2 * (inner * first + rows * sum(others))

    def _kernel(self, site: Site, *, late: bool) -> tuple[int, ...]:
        """The kernel of the first convolution, or of the one that spans the other dimensions."""
        others = self.late(site)
        return tuple(size if (axis in others) == late else 1 for axis, size in enumerate(site.shape[2:]))

    def _sizes(self, site: Site) -> tuple[int, int]:
        """Positions of the late dimensions, q, and numbers at each of them, c."""
        places = math.prod(self._kernel(site, late=True))
        return places, site.in_features // places

    def _offered(self, site: Site, sketch: Sketch) -> tuple[int, ...]:
        """The ranks that a sketch supports."""
        ranks = self.ranks(site)
        if sketch.size is None:
            return ranks
        limit = self._supported(site, sketch.size)
        return tuple(rank for rank in ranks if rank <= limit) or ranks[:1]

    def _supported(self, site: Site, size: int) -> int:
        return size // 2

    def _problems(self, site: Site, weight: Tensor, sketch: Sketch) -> list[Composition]:
        """Each group's weight and Gram, with the late positions in front of channels and other positions."""
        late = self.late(site)
        dims = len(site.shape) - 2
        order = [*(axis + 1 for axis in late), 0, *(axis + 1 for axis in range(dims) if axis not in late)]
        places, width = self._sizes(site)
        made = []
        for block, part in zip(weight.detach().double().chunk(site.groups), sketch.parts, strict=True):
            gram = seen_gram(part, site.centered).view(*site.shape[1:], *site.shape[1:])
            turned = gram.permute(*order, *(len(order) + axis for axis in order)).reshape(places * width, -1)
            kernel = block.permute(0, *(axis + 1 for axis in order)).reshape(-1, places, width)
            made.append(Composition(kernel, turned))
        return made


class SplitForm(AlternatingForm):
    """Two convolutions: the first spans the dimensions that are not ``late``, to ``rank`` channels per group."""

    def ranks(self, site: Site) -> tuple[int, ...]:
        """The ranks on offer: below break-even, in the steps the dtype likes."""
        places, width = self._sizes(site)
        return cost.candidate_ranks(site.out_features * places, width, rank_step(site.dtype), site.groups)

    def _supported(self, site: Site, size: int) -> int:
        # The second factor reads rank x places features; beyond the size of the sketch it fits what the sketch lost.
        return min(size // 2, size // self._sizes(site)[0])

    def curve(self, site: Site, weight: Tensor, sketch: Sketch) -> ErrorCurve:
        """The error of every rank at the start of the alternation.

        The first factors at the start are nested, so one Cholesky factor of all their features gives the error of each
        rank with the best second factor.

        Args:
            site: the site.
            weight: its weight as stored in the model.
            sketch: of the rows that meet it.
        """
        ranks = self._offered(site, sketch)
        problems = self._problems(site, weight, sketch)
        starts = [problem.start(ranks[-1]) for problem in problems]
        explained = sum(problem.behind(start).explained() for problem, start in zip(problems, starts, strict=True))
        assert isinstance(explained, Tensor)
        energy = sum(problem.energy for problem in problems)
        return ErrorCurve(
            ranks, (energy, *(energy - explained).clamp(min=0).tolist()), energy, kept_starts(starts, weight)
        )

    def _improved(self, site: Site, problem: Composition, start: Tensor, rank: int) -> Tensor:
        return problem.improved(start[:rank], SWEEPS, STEPS)

    def _finished(self, site: Site, maps: SecondMaps, first: Tensor, rank: int) -> tuple[Tensor, ...]:
        second = maps.second(rank).to(first.dtype)
        shapes = self._shapes(site, rank)
        return first[:rank].reshape(rank, *shapes[0][1:]), second.reshape(-1, *shapes[1][1:])

    def _shapes(self, site: Site, rank: int) -> list[tuple[int, ...]]:
        return [
            (site.groups * rank, site.shape[1], *self._kernel(site, late=False)),
            (site.out_features, rank, *self._kernel(site, late=True)),
        ]


class ChannelIn(SplitForm):
    """``channel_in``: a convolution of 1 x 1 to ``rank`` channels per group, then one with the whole kernel."""

    name = "channel_in"

    def late(self, site: Site) -> tuple[int, ...]:
        """Every dimension that the kernel spans."""
        return spanned(site)


class Spatial(SplitForm):
    """``spatial``: the kernel's first dimension (k x 1), then the others (1 x k)."""

    name = "spatial"
    needs = "convolutions whose kernel is larger than one in two dimensions"

    def late(self, site: Site) -> tuple[int, ...]:
        """Every dimension that the kernel spans, but the first."""
        return spanned(site)[1:]


class SpatialT(SplitForm):
    """``spatial_t``: all dimensions of the kernel but the first (1 x k), then the first (k x 1)."""

    name = "spatial_t"
    needs = "convolutions whose kernel is larger than one in two dimensions"

    def late(self, site: Site) -> tuple[int, ...]:
        """The first dimension that the kernel spans, where it spans others."""
        axes = spanned(site)
        return axes[:1] if len(axes) > 1 else ()


def spanned(site: Site) -> tuple[int, ...]:
    """The dimensions of space in which a convolution's kernel is larger than one."""
    return tuple(axis for axis, size in enumerate(site.shape[2:]) if size > 1)


def seen_gram(sketch: FrequentDirections, centered: bool) -> Tensor:
    """The Gram of one group's rows, ``[d, d]``, float64.

    Exact mode takes the prior rows in. Of Frequent Directions it is the sketch's own estimate, where what was shrunk
    away comes back: least squares must not take directions that were lost for free.
    """
    if sketch.exact:
        return with_prior(sketch, centered)
    root, ridge = sketch.completed(centered)
    gram = root.double().T @ root.double()
    # Of few rows nothing was shrunk, but least squares still have to leave alone what no row has shown.
    gram.diagonal().add_(max(ridge, LEAST_SHRUNK * float(gram.trace()) / sketch.dim))
    return gram


def kept_starts(starts: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Every group's first factors, one below the other, as a curve keeps them."""
    return torch.cat(list(starts)).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _numbers(kept: Iterable[Factors]) -> int:
    return sum(tensor.numel() for factors in kept for tensor in factors.tensors.values())
