"""How the geometry of a convolution divides among the factors that replace it, and comes together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """How a convolution steps over its input.

    Attributes:
        stride: per dimension of space.
        padding: zeros on both sides, per dimension; or ``"same"`` or ``"valid"``.
        dilation: per dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]

    @property
    def trivial(self) -> bool:
        """Whether it is what a convolution does by itself: steps of one, no zeros."""
        padded = any(self.padding) if isinstance(self.padding, tuple) else self.padding == "same"
        return not padded and max(*self.stride, *self.dilation) == 1


def owners(factors: Sequence[Tensor]) -> tuple[int, ...]:
    """Which factor carries the geometry of every dimension: the one whose kernel spans it, else the first.

    Args:
        factors: kernels ``[out, in, *kernel]`` in the order of their application.
    """
    spans = [factor.shape[2:] for factor in factors]
    return tuple(
        next((number for number, span in enumerate(spans) if span[axis] > 1), 0) for axis in range(len(spans[0]))
    )


def divided(geometry: Geometry, factors: Sequence[Tensor]) -> list[Geometry]:
    """The geometry of every factor.

    A factor without a bias turns zeros into zeros, so each may pad the dimensions that it spans itself.
    """
    places = owners(factors)
    made = []
    for number, factor in enumerate(factors):
        own = [place == number for place in places]
        stride, dilation = (
            tuple(value if mine else 1 for value, mine in zip(values, own, strict=True))
            for values in (geometry.stride, geometry.dilation)
        )
        padding: tuple[int, ...] | str
        if isinstance(geometry.padding, str):
            # By name, zeros come with a span; a kernel of one has neither.
            padding = geometry.padding if math.prod(factor.shape[2:]) > 1 else (0,) * len(own)
        else:
            padding = tuple(value if mine else 0 for value, mine in zip(geometry.padding, own, strict=True))
        made.append(Geometry(stride, padding, dilation))
    return made


def joined(geometries: Sequence[Geometry], factors: Sequence[Tensor]) -> Geometry:
    """The geometry that :func:`divided` divided."""
    places = owners(factors)
    stride, dilation = (
        tuple(values[place][axis] for axis, place in enumerate(places))
        for values in ([each.stride for each in geometries], [each.dilation for each in geometries])
    )
    named = [each.padding for each in geometries if isinstance(each.padding, str)]
    if named:
        return Geometry(stride, named[0], dilation)
    numbers = [each.padding for each in geometries if isinstance(each.padding, tuple)]
    return Geometry(stride, tuple(numbers[place][axis] for axis, place in enumerate(places)), dilation)
