"""Batches for refinement: the rows of kept inputs, shuffled and cut anew, and images moved about.

A step learns more from rows of many batches than from one batch over and over. Which batch comes at which step follows
from (seed, step) alone, so a run that is resumed needs no state of a generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lowrank_fx.batches import Call
from lowrank_fx.errors import CalibrationError

_MOST = 2**63 - 1


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU whose numbers follow from ``seed`` and ``step``."""
    generator = torch.Generator()
    # Mersenne Twister spreads near seeds well enough; the factor keeps two runs' steps apart.
    return generator.manual_seed((seed * 0x9E3779B97F4A7C15 + step) % _MOST)


@dataclass(frozen=True)
class _Pool:
    """Rows that may stand in one batch; ``call`` holds all of them."""

    call: Call
    rows: int
    whole: bool

    def batch(self, places: Tensor) -> Call:
        """The rows at ``places``, int64 ``[rows]``."""
        if self.whole:
            return self.call
        return self.call.map(lambda tensor: tensor.index_select(0, places.to(tensor.device)))


class ShuffledBatches:
    """Kept inputs as batches for training, epoch after epoch, each epoch in another order.

    Inputs whose tensors all have the batch's rows first, and the same shape behind them, are pooled: each epoch cuts
    their rows anew. Any other input stays the batch it was. What else the loader gave is left out.

    Args:
        inputs: at least one.
        size: rows of a batch; None for those of the first input. Of a pool whose rows do not divide by it, batches
            are equal up to a row, and as near to ``size`` as that allows.
        seed: of the order.

    Raises:
        CalibrationError: there is no input.
    """

    def __init__(self, inputs: Sequence[Call], size: int | None, seed: int) -> None:
        if not inputs:
            raise CalibrationError(
                "no calibration inputs were kept, so there is nothing to refine on; calibrate with a loader again"
            )
        self._seed = seed
        self._pools: list[_Pool] = []
        alike: dict[Any, list[Call]] = {}
        for call in (given if given.batch is None else replace(given, batch=None) for given in inputs):
            key = _arrangement(call)
            if key is None:
                self._pools.append(_Pool(call, 0, True))
            else:
                alike.setdefault(key, []).append(call)
        for calls in alike.values():
            self._pools.append(_Pool(_joined(calls), sum(call.batch_size for call in calls), False))
        wanted = size if size is not None else _rows(inputs[0])
        self._pieces = [1 if pool.whole else max(1, round(pool.rows / wanted)) for pool in self._pools]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return sum(self._pieces)

    def at(self, step: int) -> Call:
        """The batch of a step, counted from 0; its tensors are the inputs' own or copies of their rows."""
        epoch, position = divmod(step, len(self))
        generator = step_generator(self._seed, epoch)
        cuts = [
            (pool, torch.randperm(pool.rows, generator=generator).tensor_split(pieces))
            for pool, pieces in zip(self._pools, self._pieces, strict=True)
        ]
        order = torch.randperm(len(self), generator=generator)
        place = int(order[position])
        for pool, parts in cuts:
            if place < len(parts):
                return pool.batch(parts[place])
            place -= len(parts)
        raise AssertionError("an epoch has as many batches as its pools have pieces")


def flip_and_shift(call: Call, generator: torch.Generator, pixels: int = 4) -> Call:
    """Every image mirrored left to right by chance, and moved by up to ``pixels`` each way; zeros move in.

    For ``Refine(augment=flip_and_shift)``.

    Args:
        call: a batch; its floating tensors ``[images, channels, height, width]`` are moved, all by the same amounts.
        generator: of the random numbers, on the CPU.
        pixels: the largest move, at least 0.
    """
    moves: dict[int, tuple[Tensor, Tensor]] = {}

    def move(tensor: Tensor) -> Tensor:
        if tensor.dim() != 4 or not tensor.is_floating_point():
            return tensor
        images, _, height, width = tensor.shape
        if images not in moves:
            mirrored = torch.rand(images, generator=generator, dtype=torch.float64, device="cpu") < 0.5
            moves[images] = mirrored, torch.randint(0, 2 * pixels + 1, (2, images), generator=generator)
        mirrored, (down, right) = (value.to(tensor.device) for value in moves[images])
        turned = torch.where(mirrored[:, None, None, None], tensor.flip(-1), tensor)
        padded = F.pad(turned, (pixels,) * 4)
        rows = down[:, None] + torch.arange(height, device=tensor.device)
        columns = right[:, None] + torch.arange(width, device=tensor.device)
        image = torch.arange(images, device=tensor.device)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()

    return call.map(move)


def _rows(call: Call) -> int:
    """Rows of a call; 1 where it has none."""
    return call.batch_size if any(tensor.dim() for tensor in call.tensors()) else 1


def _arrangement(call: Call) -> Any:
    """What two calls must have in common to stand in one batch; None for a call that must stay whole."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs, call.mask))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(
        tensor.is_nested or tensor.layout is not torch.strided or tensor.dim() == 0 or len(tensor) != len(tensors[0])
        for tensor in tensors
    ):
        return None
    return str(spec), tuple(
        (str(leaf.dtype), tuple(leaf.shape[1:])) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )


def _joined(calls: Sequence[Call]) -> Call:
    """The rows of calls of one arrangement, as one call."""
    if len(calls) == 1:
        return calls[0]
    flattened = [pytree.tree_flatten((call.args, call.kwargs, call.mask)) for call in calls]
    spec = flattened[0][1]
    columns = zip(*(leaves for leaves, _ in flattened), strict=True)
    joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return Call(*pytree.tree_unflatten(joined, spec))
