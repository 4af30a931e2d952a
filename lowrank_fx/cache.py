"""Batches that are kept with the original model's outputs, up to a cap that does not depend on how a run is split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_fx._ambient import seeded
from lowrank_fx._bundle import pack, unpack
from lowrank_fx.batches import Call
from lowrank_fx.compare import ErrorSum, floating_outputs
from lowrank_fx.errors import CalibrationError
from lowrank_fx.judges import Judge, Measure
from lowrank_fx.loader_batch import map_tensors, plain_batch, tensors_in
from lowrank_fx.program import Outputs, Program

HOLDOUT_BYTES = 512 << 20
"""Cap on cached inputs and outputs, per role."""

INPUT_BYTES = 256 << 20
"""Cap on the inputs of calibration batches that are kept for refitting and refining."""

EFFECT_BATCHES = 2
"""Effects are measured on so many cached calibration batches."""


@dataclass(frozen=True)
class CachedBatch:
    """A batch with the original model's outputs.

    Attributes:
        call: the batch.
        reference: the floating tensors among the outputs, in the order of the leaves.
        judge: measures other outputs against them; None for their L2 distance. It is neither copied, moved nor stored.
    """

    call: Call
    reference: tuple[Any, ...]
    judge: Judge | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs and outputs, and of what else the loader gave."""
        given = self.call.tensors()
        known = {id(tensor) for tensor in given}
        others = [tensor for tensor in tensors_in(self.call.batch) if id(tensor) not in known]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*given, *others, *self.reference))

    def measure(self, outputs: Outputs, total: ErrorSum) -> None:
        """Add to ``total`` how far ``outputs`` of a changed model are from the original's.

        Raises:
            CalibrationError: they cannot be compared, or a loss of the user's fails on them.
        """
        if self.judge is None:
            total.add_trial(outputs, self.reference, self.call.mask)
        else:
            total.add_squares(self.judge.error(outputs), self.judge.size)

    def judged(self, program: Program, measure: Measure, what: str) -> CachedBatch:
        """The batch with errors on it measured by ``measure``; see :meth:`Measure.judge`."""
        judge = measure.judge(program, self.call, what)
        return CachedBatch(self.call, judge.reference, judge)

    def first(self, program: Program, rows: int) -> CachedBatch:
        """The first rows, with what the original returns for them alone."""
        call = self.call.rows(0, rows)
        if self.judge is not None:
            return replace(self, call=call).judged(program, self.judge.measure, self.judge.what)
        with seeded(program.device):
            return CachedBatch(call, program.run(call))

    def owned(self) -> CachedBatch:
        """The batch in memory of its own."""
        return CachedBatch(owned_call(self.call), tuple(_owned(tensor) for tensor in self.reference))

    def to(self, device: torch.device) -> CachedBatch:
        """The batch on ``device``."""
        return CachedBatch(self.call.to(device), tuple(tensor.to(device) for tensor in self.reference))


@dataclass
class Cache:
    """The first batches of one role, as many as fit the cap (the first one always does).

    Attributes:
        most: how many batches it takes at most; None for any number.
        batches: by their position in the loader.
        offered: how many batches there were.
        closed: position of the first batch that was not taken. None behind it are, even if they would fit: so the
            caches of all shards, put together and cut again, are the cache of a single run.
        limit: the cap in bytes; None for ``HOLDOUT_BYTES``.
        outputs: whether the original's outputs are kept with the inputs.
    """

    most: int | None = None
    batches: dict[int, CachedBatch] = field(default_factory=dict)
    offered: int = 0
    closed: int | None = None
    limit: int | None = None
    outputs: bool = True

    def add(self, index: int, call: Call, outputs: Sequence[Any]) -> None:
        """Offer the batch at position ``index`` of the loader.

        Raises:
            CalibrationError: the outputs have no floating tensor.
        """
        self.offered += 1
        if self.closed is not None:
            return
        self._take(index, CachedBatch(call, tuple(floating_outputs(outputs)) if self.outputs else ()))

    def judged(self, program: Program, measure: Measure, what: str) -> Cache:
        """The cache with errors on its batches measured by ``measure``.

        Raises:
            CalibrationError: no error can be measured by it; the message names the batch.
        """
        batches = {
            index: batch.judged(program, measure, f"{what} batch {index}") for index, batch in self.batches.items()
        }
        if not any(batch.judge.size > 0 for batch in batches.values() if batch.judge is not None):
            raise CalibrationError(
                f"{measure.name} measures nothing here: on no {what} batch does it tell outputs of zero from those of "
                "the original, once its first order is taken out. A loss that is linear in the outputs (the mean of "
                "a loss that the model itself returns) has nothing else; let it take logits or predictions"
            )
        return replace(self, batches=batches)

    def in_order(self) -> list[CachedBatch]:
        """The batches in the order of the loader."""
        return [self.batches[index] for index in sorted(self.batches)]

    @property
    def note(self) -> str | None:
        """How many batches were not kept; None if all were."""
        dropped = self.offered - len(self.batches)
        if not dropped:
            return None
        what = "held-out batches were not kept" if self.outputs else "calibration batches take no part in refitting"
        return f"{dropped} {what}: they exceed {self._cap >> 20} MiB"

    def merged(self, other: Cache) -> Cache:
        """The cache of a run over the batches of both; shares memory with them."""
        ends = [cache.closed for cache in (self, other) if cache.closed is not None]
        made = replace(self, batches={}, offered=self.offered + other.offered, closed=min(ends, default=None))
        for index, batch in sorted({**self.batches, **other.batches}.items()):
            if made.closed is None or index < made.closed:
                made._take(index, batch, owned=True)
        return made

    def to(self, device: torch.device) -> Cache:
        """The cache on ``device``."""
        batches = {index: batch.to(device) for index, batch in self.batches.items()}
        return replace(self, batches=batches)

    def packed(self, tensors: dict[str, Tensor], role: str) -> dict[str, Any]:
        """The cache as JSON data; its tensors go into ``tensors``.

        Raises:
            StorageError: a batch holds something that cannot be stored; the message names both.
        """
        entries = []
        for index, batch in self.batches.items():
            what = f"batch {index} ({role})"
            reference = [pack(tensor, tensors, f"the output for {what}") for tensor in batch.reference]
            entries.append({"index": index, "call": packed_call(batch.call, tensors, what), "reference": reference})
        return {"offered": self.offered, "closed": self.closed, "batches": entries}

    def unpacked(self, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Cache:
        """The cache, of this one's kind, that :meth:`packed` made ``data`` of.

        Raises:
            ValueError: the data is malformed (or another error of malformed data).
        """
        batches = {}
        for entry in data["batches"]:
            reference = tuple(unpack(item, tensors) for item in entry["reference"])
            if self.outputs:
                floating_outputs(reference)
            batches[int(entry["index"])] = CachedBatch(unpacked_call(entry["call"], tensors), reference)
        closed = data["closed"]
        return replace(
            self, batches=batches, offered=int(data["offered"]), closed=None if closed is None else int(closed)
        )

    @property
    def _cap(self) -> int:
        return HOLDOUT_BYTES if self.limit is None else self.limit

    def _take(self, index: int, batch: CachedBatch, *, owned: bool = False) -> None:
        kept = sum(other.nbytes for other in self.batches.values())
        if self.batches and (len(self.batches) == self.most or kept + batch.nbytes > self._cap):
            self.closed = index
        else:
            self.batches[index] = batch if owned else batch.owned()


def owned_call(call: Call) -> Call:
    """The call with tensors of its own."""
    return call.map(_owned)


def packed_call(call: Call, tensors: dict[str, Tensor], what: str) -> dict[str, Any]:
    """A call as JSON data; its tensors go into ``tensors``.

    Of the loader's batch, mappings that are no dictionaries become some; tensors that are arguments are stored once.

    Raises:
        StorageError: it holds something that cannot be stored; the message says so of ``what``.
    """
    values = {"args": call.args, "kwargs": call.kwargs, "mask": call.mask}
    data = {name: pack(value, tensors, what) for name, value in values.items()}
    if call.batch is None:
        return data
    places = {id(tensor): place for place, tensor in enumerate(call.tensors())}
    shared = [places.get(id(tensor)) for tensor in tensors_in(call.batch)]
    batch = map_tensors(call.batch, lambda tensor: torch.empty(0) if id(tensor) in places else tensor)
    packed = pack(plain_batch(batch), tensors, f"the loader's own batch of {what}")
    return {**data, "batch": packed, "shared": shared}


def unpacked_call(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Call:
    """The call that :func:`packed_call` made ``data`` of.

    Raises:
        ValueError: the data is malformed (or another error of malformed data).
    """
    args, kwargs, mask = (unpack(data[name], tensors) for name in ("args", "kwargs", "mask"))
    if not (isinstance(args, tuple) and isinstance(kwargs, dict) and isinstance(mask, Tensor | None)):
        raise ValueError("a batch is not a call")
    call = Call(args, kwargs, mask)
    if "batch" not in data:
        return call
    batch, given, places = unpack(data["batch"], tensors), call.tensors(), iter(data["shared"])

    def shared(tensor: Tensor) -> Tensor:
        place = next(places)
        return tensor if place is None else given[place]

    return replace(call, batch=map_tensors(batch, shared))


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
