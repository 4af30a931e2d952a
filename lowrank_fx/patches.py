"""The im2col geometry of a convolution: how a patch of its input becomes a row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Patch:
    """The im2col geometry of a convolution over one, two or three dimensions of space.

    Attributes:
        kernel: the kernel's size, per dimension.
        stride: step between output positions.
        padding: zeros before and after, per dimension: ((top, bottom), (left, right)) for an image.
        dilation: step between the kernel's own positions.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def __str__(self) -> str:
        """The geometry in short: ``k3x3 s1x1 p1,1,1,1 d1x1``."""
        kernel, stride, dilation = ("x".join(map(str, sizes)) for sizes in (self.kernel, self.stride, self.dilation))
        sides = ",".join(str(amount) for side in self.padding for amount in side)
        return f"k{kernel} s{stride} p{sides} d{dilation}"

    def positions(self, *space: int) -> tuple[int, ...]:
        """The output's size in space, for an input of the size ``space``."""
        return tuple(
            (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(
                space, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def rows(self, activation: Tensor) -> int:
        """How many patches ``activation``, ``[batch, channels, *space]``, has."""
        return activation.shape[0] * math.prod(self.positions(*activation.shape[2:]))

    def extract(self, activation: Tensor, index: Tensor) -> Tensor:
        """The patches at the flat output positions ``index``, without building all of them.

        Args:
            activation: ``[batch, channels, *space]``.
            index: int64 ``[n]``, positions in ``batch x`` the output's space, row-major.

        Returns:
            ``[n, channels * kernel positions]``, ordered as a convolution weight flattened from dim 1.
        """
        (rows,) = self.blocks(activation, index, max(len(index), 1))
        return rows

    def blocks(self, activation: Tensor, index: Tensor, most: int) -> Iterator[Tensor]:
        """As :meth:`extract`, at most ``most`` patches at a time: no more of them are in memory at once."""
        # Channels last: a position's channels then lie together, and every step of a patch is one run of memory.
        sides = [amount for side in reversed(self.padding) for amount in side]
        last = activation.movedim(1, -1)
        padded = (F.pad(last, [0, 0, *sides]) if any(sides) else last).contiguous()  # padding by nothing is a copy too
        space, positions = padded.shape[1:-1], (activation.shape[0], *self.positions(*activation.shape[2:]))
        steps = index.new_zeros(1)
        for size, kernel, dilation in zip(space, self.kernel, self.dilation, strict=True):
            steps = (steps[:, None] * size + torch.arange(kernel, device=index.device) * dilation).flatten()
        flat = padded.flatten(0, -2)
        for part in torch.split(index, most):
            start, *places = torch.unravel_index(part, positions)
            for size, place, stride in zip(space, places, self.stride, strict=True):
                start = start * size + place * stride
            yield flat[start[:, None] + steps].transpose(1, 2).flatten(1)
