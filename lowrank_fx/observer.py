"""What sketches a tap while a batch runs, and how large each tap's sketch may be."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lowrank_fx.errors import CalibrationError
from lowrank_fx.exact_gram import BLOCK_ROWS
from lowrank_fx.grouped_sketch import Sketch
from lowrank_fx.sites import Tap

MIN_ROWS = 1024
"""Rows a tap may always keep of a batch, however narrow the layers behind it."""

MIN_SKETCH = 256
"""The least size of a sketch that is not asked for."""

SKETCH_MEMORY = 2 << 30
"""Bytes that all sketches may hold while they stay exact, where nobody says how many.

Exact sums are several times as fast as Frequent Directions (d = 1536, l = 740: twenty times). All taps of ResNet-50
take 1 GiB so, as do those of a ViT-B.
"""


def sketch_sizes(taps: Iterable[Tap], forced: int | None, memory: int) -> dict[str, int | None]:
    """The sketch size of every tap: None (exact) while all states together fit ``memory``.

    Then the widest taps move to Frequent Directions first; taps of one width move together, so that the sketches of a
    weight that is applied twice can be merged. Their size comes from an equal share of what the exact taps leave of the
    memory (a sketch of l rows holds at most 16 l d bytes, its buffer and co-sketches among them; 22 l d of float64
    rows, which exceed it by as much), and is at least ``MIN_SKETCH``. Taps of at most twice that width stay exact,
    because no sketch of them would be smaller: the exact state holds 8 d^2 bytes (blocks of few rows that wait to be
    summed come on top, at most half as much where d is at least 256). ``memory`` is exceeded only where the least sizes
    do not fit. A tap of g groups counts as g taps of the width of one group.
    """
    taps = list(taps)
    widths = {tap.name: tap.width // tap.groups for tap in taps}
    if forced is not None:
        return dict.fromkeys(widths, forced)
    counts: Counter[int] = Counter()
    for tap in taps:
        counts[widths[tap.name]] += tap.groups
    wide = sorted((width for width in counts if width > 2 * MIN_SKETCH), reverse=True)
    sizes: dict[int, int] = {}
    for moved in range(len(wide) + 1):
        sketched = wide[:moved]
        left = memory - sum(8 * width**2 * count for width, count in counts.items() if width not in sketched)
        for position, width in enumerate(sketched):
            # Widest first: what its least size takes beyond an equal share is missing in the shares of the others.
            sharing = sum(counts[other] for other in sketched[position:])
            sizes[width] = max(MIN_SKETCH, left // sharing // (16 * width))
            left -= 16 * width * sizes[width] * counts[width]
        if left >= 0:
            break
    return {name: sizes.get(width) for name, width in widths.items()}


class TapObserver(nn.Module):
    """Sketches the rows of one tap; inserted in front of the tap's first reader.

    Args:
        tap: what is observed.
        sketch: where the rows go.
        fan_out: sum of the output features of the layers behind the tap.
        recorder: knows the batch's index and padding mask.
        min_rows: rows that are always kept of a batch; ``MIN_ROWS`` by default.
    """

    _is_impure = True

    def __init__(self, tap: Tap, sketch: Sketch, fan_out: int, recorder: Recorder, min_rows: int | None = None) -> None:
        super().__init__()
        self.min_rows = MIN_ROWS if min_rows is None else min_rows
        self.tap = tap
        self.sketch = sketch
        self.fan_out = fan_out
        self.recorder = recorder
        self.first_rows: int | None = None
        self.first_space: tuple[int, ...] = ()
        self.layers = ""

    def forward(self, activation: Tensor) -> None:
        """Sketch a sample of the activation's rows."""
        try:
            for rows, _ in self.rows_at(activation, self.places(activation)):
                self.sketch.update(rows)
        except CalibrationError as error:
            raise CalibrationError(f"batch {self.recorder.index}: the input of {self.layers}: {error}") from error

    def sampled(self, activation: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of one batch that are sketched, and their places among all rows of the activation.

        Args:
            activation: the tap's value.

        Returns:
            The rows ``[n, width]``, and int64 ``[n]``, ascending, on the activation's device.
        """
        places = self.places(activation)
        ((rows, _),) = self.rows_at(activation, places, max(len(places), 1))
        return rows, places

    def places(self, activation: Tensor) -> Tensor:
        """The places of the rows that are sketched: int64 ``[n]``, ascending, on the activation's device."""
        patch = self.tap.patch
        if patch is not None:
            total, space = patch.rows(activation), tuple(activation.shape[2:])
            return self._chosen(total, space, None).to(activation.device)
        shape = activation.shape
        # That of the rows as they will lie; laying the groups out beside each other copies them, so once is enough.
        places = shape[:-1] if self.tap.groups == 1 else shape[:-3] + shape[-2:-1]
        return self._chosen(places.numel(), (), self._mask(places)).to(activation.device)

    def rows_at(self, activation: Tensor, places: Tensor, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows at some places; of patches, which are many times the activation, a block of ``most`` at a time.

        Args:
            activation: the tap's value.
            places: from :meth:`places`, or a part of them.
            most: patches in a block; ``BLOCK_ROWS`` by default.

        Yields:
            Rows ``[n, width]``, and their places, int64 ``[n]``.
        """
        activation = _strided(activation)
        patch = self.tap.patch
        if patch is not None:
            most = most or BLOCK_ROWS
            yield from zip(patch.blocks(activation, places, most), torch.split(places, most), strict=True)
            return
        rows = self._lay_out(activation).reshape(-1, self.tap.width)
        yield (rows if places.numel() == rows.shape[0] else rows[places]), places

    def _chosen(self, total: int, space: tuple[int, ...], mask: Tensor | None) -> Tensor:
        """The places that are kept of a batch's rows, of which the first batch's number and space are noted."""
        if self.first_rows is None:
            self.first_rows, self.first_space = total, space
        return self._sample(total, mask)

    def _lay_out(self, activation: Tensor) -> Tensor:
        """The activation as ``[..., width]``: the groups of ``[..., groups, n, d]`` lie beside each other in a row."""
        groups = self.tap.groups
        if groups == 1:
            return activation
        # An activation without groups of its own meets the matrix of each.
        apart = activation.expand(*activation.shape[:-3], groups, *activation.shape[-2:])
        return apart.movedim(-3, -2).flatten(-2)

    def _mask(self, places: torch.Size) -> Tensor | None:
        """The padding mask, where the rows' places are its tokens."""
        mask = self.recorder.mask
        if mask is not None and self.tap.sequence_first:
            mask = mask.t()
            return mask if places in (mask.shape, (mask.numel(),)) else None
        if mask is not None and places == mask.shape[:1]:
            return mask.any(1)  # one row per sequence: pooled
        if mask is None or places.numel() != mask.numel():
            return None
        return mask if places[:2] == mask.shape or len(places) == 1 else None

    def _sample(self, total: int, mask: Tensor | None) -> Tensor:
        """Which rows to keep: all real ones, or as many as cost no more FLOPs than the layers behind the tap."""
        real = torch.arange(total, device="cpu") if mask is None else mask.reshape(-1).cpu().nonzero().squeeze(1)
        cap = max(self.min_rows, total * self.fan_out // max(self.tap.width, 1))
        if real.numel() <= cap:
            return real
        key = f"{self.recorder.seed}/{self.recorder.index}/{self.tap.name}".encode()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
        chosen = torch.randperm(real.numel(), generator=generator, device="cpu")[:cap]
        return real[chosen.sort().values]


def _strided(activation: Tensor) -> Tensor:
    return activation if activation.layout is torch.strided else activation.to_dense()


class Recorder:
    """What observers know of the batch that is running."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.index = -1
        self.mask: Tensor | None = None

    def start(self, index: int, mask: Tensor | None) -> None:
        """The batch that runs next: its position in the loader and its padding mask."""
        self.index = index
        self.mask = mask
