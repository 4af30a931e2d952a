"""What calibration learns of a model: kept in memory, saved, resumed, and put together from shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lowrank_fx._bundle import read_bundle, write_bundle
from lowrank_fx.batches import Call, Role
from lowrank_fx.cache import EFFECT_BATCHES, INPUT_BYTES, Cache, CachedBatch, owned_call, packed_call, unpacked_call
from lowrank_fx.errors import CalibrationError
from lowrank_fx.fingerprint import Share, Source, base_weights, call_checksum, describe_share, weights_differ
from lowrank_fx.grouped_sketch import Sketch, load_sketch, make_sketch, merge_sketches
from lowrank_fx.judges import Measure
from lowrank_fx.observer import SKETCH_MEMORY, sketch_sizes
from lowrank_fx.program import Program
from lowrank_fx.sites import Site, SiteTable

FORMAT = 6
NAME = "calibration"

FirstRows: TypeAlias = tuple[int, int, tuple[int, ...]]
"""A batch, how many rows of it reached a tap, and the size in space of a convolution's input."""

_EMPTY = {
    "effect": Cache(EFFECT_BATCHES),
    "inputs": Cache(limit=INPUT_BYTES, outputs=False),
    "select": Cache(),
    "report": Cache(),
}
"""The caches before anything was put into them."""


@dataclass
class Calibration:
    """What calibration learned; everything that planning needs besides the model.

    Attributes:
        source: what it is made of.
        example: the loader's first batch; the model is captured with it again.
        sketches: by tap name.
        shards: which shards it holds.
        first_rows: by tap name, the first calibration batch that reached the tap, its number of rows and, for a
            convolution, its size in space.
        counted: the first calibration batch, and the FLOPs of the whole captured model on it; None before it.
        effect: calibration batches on which effects are measured.
        inputs: calibration batches on which factors are refitted and refined.
        select: held-out rows on which candidate plans are compared.
        report: held-out rows that the reported error comes from.
        pieces: checksums of the batches that were run, by position in the loader and role.
        complete: the loader was read to its end.
    """

    source: Source
    example: Call
    sketches: dict[str, Sketch]
    shards: frozenset[int]
    first_rows: dict[str, FirstRows] = field(default_factory=dict)
    counted: tuple[int, int] | None = None
    effect: Cache = field(default_factory=lambda: _empty("effect"))
    inputs: Cache = field(default_factory=lambda: _empty("inputs"))
    select: Cache = field(default_factory=lambda: _empty("select"))
    report: Cache = field(default_factory=lambda: _empty("report"))
    pieces: dict[tuple[int, Role], str] = field(default_factory=dict)
    complete: bool = False

    # ---- what planning reads -------------------------------------------------------------------------------------

    @property
    def seed(self) -> int:
        """The seed that chose the rows."""
        return self.source.seed

    @property
    def flops(self) -> int:
        """FLOPs of the whole captured model on the first calibration batch."""
        return 0 if self.counted is None else self.counted[1]

    @property
    def effect_batches(self) -> list[CachedBatch]:
        """Calibration batches on which effects are measured."""
        return self.effect.in_order()

    @property
    def input_batches(self) -> list[Call]:
        """The inputs of the calibration batches that were kept, for refitting and refining."""
        return [batch.call for batch in self.inputs.in_order()]

    @property
    def select_batches(self) -> list[CachedBatch]:
        """Held-out rows on which candidate plans are compared."""
        return self.select.in_order()

    @property
    def report_batches(self) -> list[CachedBatch]:
        """Held-out rows that the reported error comes from."""
        return self.report.in_order()

    @property
    def state_bytes(self) -> int:
        """Bytes that all sketches hold."""
        return sum(sketch.nbytes for sketch in self.sketches.values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        notes = [cache.note for cache in (self.inputs, self.select, self.report) if cache.note is not None]
        sketched = [sketch for sketch in self.sketches.values() if not sketch.exact]
        if sketched:
            notes.append(
                f"{len(sketched)} of {len(self.sketches)} taps are sketched, not exact: ranks there stop at half the "
                "sketch"
            )
        if len(self.shards) < self.source.shards:
            notes.append(f"calibrated on {_shards(self)} alone")
        if not self.complete:
            notes.append(f"calibration was interrupted after {len(self.pieces)} pieces of batches")
        return tuple(notes)

    def sketch_of(self, table: SiteTable, site: Site) -> Sketch | None:
        """The sketch of every row that meets ``site``: its taps' sketches merged; None if no row ever did."""
        sketches = [self.sketches[tap.name] for tap in table.taps_of(site)]
        sketches = [sketch for sketch in sketches if sketch.rows]
        if len(sketches) < 2:
            return sketches[0] if sketches else None
        pooled = sketches[0].copy()
        for sketch in sketches[1:]:
            merge_sketches(pooled, sketch)
        return pooled

    def rows_of(self, site: Site) -> int:
        """Rows that meet ``site`` in the first calibration batch that reached it, over all its calls."""
        return sum(rows for rows, _ in self.calls_of(site))

    def calls_of(self, site: Site) -> list[tuple[int, tuple[int, ...]]]:
        """For each call of ``site`` its rows in the first calibration batch that reached it, and the input's space."""
        return [self.first_rows.get(call.tap, (0, 0, ()))[1:] for call in site.calls]

    def judged(self, program: Program, measure: Measure | None) -> Calibration:
        """The calibration with errors measured by ``measure``; itself for the L2 distance of outputs.

        Raises:
            CalibrationError: no error can be measured by it; the message names the batch.
        """
        if measure is None:
            return self
        caches = {"effect": "calibration", "select": "held-out", "report": "held-out"}
        judged: dict[str, Any] = {
            name: getattr(self, name).judged(program, measure, what) for name, what in caches.items()
        }
        return replace(self, **judged)

    def check_model(self, model: nn.Module) -> None:
        """Make sure that it was made of this model, and has a batch of every role.

        Raises:
            CalibrationError: it was not, or has not; the message says what differs or lacks.
        """
        difference = weights_differ(self.source.weights, base_weights(model))
        if difference is not None:
            raise CalibrationError(f"the calibration does not belong to this model: {difference}; calibrate it anew")
        for cache, what in ((self.effect, "calibration"), (self.select, "held-out"), (self.report, "held-out")):
            if not cache.batches:
                held = _shards(self) if self.source.shards > 1 else "what it has read so far"
                raise CalibrationError(
                    f"the calibration holds no {what} batch ({held}), so nothing can be planned with it alone; merge "
                    "it with the other shards, or read the loader to its end"
                )

    def check_taps(self, program: Program, table: SiteTable) -> None:
        """Make sure that every tap of a captured model was sketched.

        Raises:
            CalibrationError: one was not, or has other rows, or the model was captured the other way; the message says
                which.
        """
        if program.way != self.source.way:
            raise CalibrationError(
                f"the calibration is of a model captured by {self.source.way!r}, and this one was captured by "
                f"{program.way!r}; pass capture={self.source.way!r}"
            )
        for tap in table.taps.values():
            width, groups, _ = self.source.taps.get(tap.name, (0, 0, None))
            if (width, groups) != (tap.width, tap.groups):
                has = "has no sketch of it" if not width else f"sketched rows of {width} numbers in {groups} groups"
                raise CalibrationError(
                    f"the calibration does not fit this model: {tap.name!r} has rows of {tap.width} numbers in "
                    f"{tap.groups} groups, and the calibration {has}; skip= may leave out layers, but not add any"
                )

    # ---- shards and files ----------------------------------------------------------------------------------------

    def merge(self, *others: Calibration) -> Calibration:
        """The calibration on the batches of this one and of others: shards of one run, each finished.

        Exact sketches are those of a single run up to rounding; Frequent Directions sketches keep their certificate,
        but are not those of a single run. All else is what a single run keeps.

        Args:
            others: shards of the same model, data and options; all of them, and this one, are left as they are.

        Raises:
            CalibrationError: two of them are of different runs, hold the same shard, or one is not finished.
        """
        made = self
        for other in others:
            made = made._merge(other)
        return made

    def _merge(self, other: Calibration) -> Calibration:
        for shard in (self, other):
            if not shard.complete:
                raise CalibrationError(f"{_shards(shard)} was interrupted; resume it by its checkpoint before merging")
        difference = other.source.differs(self.source)
        if difference is not None:
            raise CalibrationError(f"these calibrations are not shards of one run. Of the second: {difference}")
        both = self.shards & other.shards
        if both or self.pieces.keys() & other.pieces.keys():
            raise CalibrationError(
                f"shard {min(both, default=0)} of {self.source.shards} is in both calibrations; each shard counts once"
            )
        sketches = {name: sketch.copy() for name, sketch in self.sketches.items()}
        for name, sketch in sketches.items():
            merge_sketches(sketch, other.sketches[name])
        first_rows = dict(self.first_rows)
        for name, found in other.first_rows.items():
            first_rows[name] = min(first_rows.get(name, found), found)
        counted = [entry for entry in (self.counted, other.counted) if entry is not None]
        return replace(
            self,
            sketches=sketches,
            shards=self.shards | other.shards,
            first_rows=first_rows,
            counted=min(counted, default=None),
            effect=self.effect.merged(other.effect),
            inputs=self.inputs.merged(other.inputs),
            select=self.select.merged(other.select),
            report=self.report.merged(other.report),
            pieces={**self.pieces, **other.pieces},
        )

    def to(self, device: torch.device) -> Calibration:
        """The calibration with all tensors on ``device``; itself if they are there."""
        if all(sketch.device == device for sketch in self.sketches.values()):
            return self
        sketches = {name: load_sketch(sketch.state_dict(), device) for name, sketch in self.sketches.items()}
        caches: dict[str, Any] = {name: cache.to(device) for name, cache in self._caches().items()}
        return replace(self, sketches=sketches, **caches)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``calibration.json`` and one safetensors file into ``folder``, which is made if it does not exist.

        Killed half-way, it leaves what was there before.

        Raises:
            StorageError: the folder cannot be written, or a cached batch holds something that cannot be stored; the
                message names it.
        """
        tensors: dict[str, Tensor] = {}
        for number, sketch in enumerate(self.sketches.values()):
            tensors.update((f"sketch.{number}.{key}", tensor) for key, tensor in sketch.state_dict().items())
        caches = {role: cache.packed(tensors, role) for role, cache in self._caches().items()}
        data = {
            "source": self.source.packed(),
            "example": packed_call(self.example, tensors, "the first batch"),
            "shards": sorted(self.shards),
            "first_rows": self.first_rows,
            "counted": self.counted,
            "pieces": [[index, role, checksum] for (index, role), checksum in self.pieces.items()],
            "complete": self.complete,
            "caches": caches,
        }
        write_bundle(folder, NAME, FORMAT, data, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Calibration:
        """Read back what :meth:`save` wrote, onto the CPU; planning goes on exactly as it would have before.

        Raises:
            StorageError: the folder holds no calibration, or a damaged one, or one of another version; the message
                names the file.
        """
        return read_bundle(folder, NAME, FORMAT, cls._read)

    @classmethod
    def _read(cls, data: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
        source = Source.unpacked(data["source"])
        shards = frozenset(int(number) for number in data["shards"])
        if not shards or not all(0 <= shard < source.shards for shard in shards):
            raise ValueError(f"shards are {data['shards']!r} of {source.shards}")
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("sketch."):
                _, number, own = key.split(".", 2)
                states.setdefault(number, {})[own] = tensor
        counted = data["counted"]
        caches = {name: cache.unpacked(data["caches"][name], tensors) for name, cache in _EMPTY.items()}
        return cls(
            source=source,
            example=unpacked_call(data["example"], tensors),
            sketches={
                name: _read_sketch(name, share, states[str(number)])
                for number, (name, share) in enumerate(source.taps.items())
            },
            shards=shards,
            first_rows={str(name): _first_rows(*found) for name, found in data["first_rows"].items()},
            counted=None if counted is None else (int(counted[0]), int(counted[1])),
            pieces={(int(index), _role(role)): str(checksum) for index, role, checksum in data["pieces"]},
            complete=bool(data["complete"]),
            **caches,
        )

    def _caches(self) -> dict[str, Cache]:
        return {name: getattr(self, name) for name in _EMPTY}


def blank(
    program: Program,
    table: SiteTable,
    model: nn.Module,
    example: Call,
    *,
    sketch_size: int | None = None,
    sketch_memory: int = SKETCH_MEMORY,
    seed: int = 0,
    holdout: float = 0.2,
    shard: tuple[int, int] = (0, 1),
    keeps_batches: bool = False,
) -> Calibration:
    """A calibration that has seen nothing yet.

    Args:
        program: the captured model.
        table: its sites and taps.
        model: the user's model.
        example: the loader's first batch.
        sketch_size: force Frequent Directions of this size on every tap.
        sketch_memory: bytes that all sketches together may hold while every tap stays exact. Sizes do not depend on
            the shard, so that shards can be merged.
        seed: chooses the rows.
        holdout: share of the batches that is held out.
        shard: (i, n) for the batches whose position in the loader leaves i when divided by n.
        keeps_batches: whether the loader's own batches are kept beside the arguments of ``forward``, for a loss.
    """
    taps = table.taps.values()
    sizes = sketch_sizes(taps, sketch_size, sketch_memory)
    sketches = {tap.name: make_sketch(tap.width, tap.groups, sizes[tap.name], program.device) for tap in taps}
    shares: dict[str, Share] = {tap.name: (tap.width, tap.groups, sketches[tap.name].size) for tap in taps}
    source = Source(
        base_weights(model), program.way, shares, seed, holdout, call_checksum(example), shard[1], keeps_batches
    )
    return Calibration(source, owned_call(replace(example, batch=None)), sketches, frozenset({shard[0]}))


def _first_rows(index: int, rows: int, space: Sequence[int]) -> FirstRows:
    return int(index), int(rows), tuple(int(size) for size in space)


def _empty(name: str) -> Cache:
    return replace(_EMPTY[name], batches={})


def _read_sketch(name: str, share: Share, state: Mapping[str, Tensor]) -> Sketch:
    width, groups, size = share
    if groups < 1 or width < 1 or width % groups or int(state.get("groups", torch.tensor(1))) != groups:
        raise ValueError(f"the sketch of {name!r} is not of rows of {width} numbers in {groups} groups")
    # Before anything of that size is made: the lengths that the state speaks of are those of its tensors.
    for part in range(groups):
        own = f"{part}." if groups > 1 else ""
        if {int(state[f"{own}geometry"][0]), state[f"{own}mean"].numel()} != {width // groups}:
            raise ValueError(f"the sketch of {name!r} is not of rows of {width} numbers in {groups} groups")
    sketch = load_sketch(state)
    if (sketch.dim, len(sketch.parts), sketch.size) != (width, groups, size):
        raise ValueError(f"the sketch of {name!r} has {describe_share((sketch.dim, len(sketch.parts), sketch.size))}")
    return sketch


def _role(name: Any) -> Role:
    if name not in get_args(Role):
        raise ValueError(f"{name!r} is no role")
    role: Role = name
    return role


def _shards(calibration: Calibration) -> str:
    listed = ", ".join(map(str, sorted(calibration.shards)))
    return f"shard{'s' if len(calibration.shards) > 1 else ''} {listed} of {calibration.source.shards}"
