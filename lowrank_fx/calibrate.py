"""CALIBRATE: a loader becomes a :class:`Calibration`: a sketch per tap, FLOPs, and the cached held-out batches.

The loader is read once. Rows are capped per batch, so that a tap's sketch costs no more FLOPs than the layers it feeds;
which rows are kept is decided by a generator seeded from (seed, batch index, tap), so a resumed or sharded run sees
the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lowrank_fx._progress import Progress
from lowrank_fx.batches import Assigned, Call
from lowrank_fx.capture import device_of
from lowrank_fx.compare import floating_outputs
from lowrank_fx.errors import CalibrationError, CallError
from lowrank_fx.observer import Recorder, TapObserver, sketch_sizes
from lowrank_fx.passes import order
from lowrank_fx.passes.base import PassManager
from lowrank_fx.rewrite import copy_graph_module
from lowrank_fx.signature import CallSignature
from lowrank_fx.sites import Site, SiteTable, Tap
from lowrank_fx.sketch import FrequentDirections

HOLDOUT_BYTES = 512 << 20
"""Cap on cached held-out inputs and outputs, and on cached batches for effects, each."""

EFFECT_BATCHES = 2
"""Effects are measured on so many cached calibration batches."""


@dataclass(frozen=True)
class CachedBatch:
    """A batch with the original model's outputs, flat as the graph returns them."""

    call: Call
    reference: tuple[Any, ...]


@dataclass
class Calibration:
    """What calibration learned; everything that planning needs besides the graph.

    Attributes:
        sketches: by tap name.
        rows: rows that meet each call of a site (by node name) in the first calibration batch.
        flops: FLOPs of the whole captured graph on that batch.
        effect_batches: calibration batches on which effects are measured.
        select_batches: held-out rows on which candidate plans are compared.
        report_batches: held-out rows that the reported error comes from.
        batches: number of calibration batches.
        seed: the seed that chose the rows.
        state_bytes: bytes that all sketches hold.
        notes: what the user should know.
    """

    sketches: dict[str, FrequentDirections]
    rows: dict[str, int]
    flops: int
    effect_batches: list[CachedBatch]
    select_batches: list[CachedBatch]
    report_batches: list[CachedBatch]
    batches: int
    seed: int
    state_bytes: int
    notes: tuple[str, ...] = field(default=())

    def sketch_of(self, table: SiteTable, site: Site) -> FrequentDirections | None:
        """The sketch of every row that meets ``site``: its taps' sketches merged; None if no row ever did."""
        sketches = [self.sketches[tap.name] for tap in table.taps_of(site)]
        sketches = [sketch for sketch in sketches if sketch.rows]
        if len(sketches) < 2:
            return sketches[0] if sketches else None
        pooled = FrequentDirections.from_state_dict(sketches[0].state_dict(), sketches[0].device)
        for sketch in sketches[1:]:
            pooled.merge(sketch)
        return pooled

    def rows_of(self, site: Site) -> int:
        """Rows that meet ``site`` in the first calibration batch, over all its calls."""
        return sum(self.rows.get(call.node, 0) for call in site.calls)


def calibrate(
    gm: GraphModule,
    calls: CallSignature,
    table: SiteTable,
    pieces: Iterable[Assigned],
    *,
    sketch_size: int | None = None,
    sketch_memory: int = 256 << 20,
    seed: int = 0,
    batches: int | None = None,
    progress: bool = True,
) -> Calibration:
    """Run the batches through the clean captured graph once, sketching every tap.

    Args:
        gm: the clean captured graph; unchanged.
        calls: how to call it.
        table: its sites and taps.
        pieces: batches with their roles, as :func:`~lowrank_fx.batches.assign_calls` gives them.
        sketch_size: force Frequent Directions of this size on every tap.
        sketch_memory: bytes that all sketches together may hold while every tap stays exact.
        seed: chooses the rows.
        batches: how many batches there are, for the progress bar.
        progress: show a progress bar for work over two seconds.

    Raises:
        CalibrationError: bad data; the message names the batch and the layer.
    """
    device = device_of(gm)
    recorder = Recorder(seed)
    sizes = sketch_sizes(table.taps.values(), sketch_size, sketch_memory)
    observers = {
        tap.name: TapObserver(
            tap, FrequentDirections(tap.width, sizes[tap.name], device), _fan_out(table, tap), recorder
        )
        for tap in table.taps.values()
    }
    observed = copy_graph_module(gm, clone=False)
    # Observers change no value, so bisecting rewrites must not leave any out.
    PassManager(order.observation(table.taps, dict(observers)), bisect=False).run(observed)
    for observer in observers.values():
        observer.layers = ", ".join(site.name for site in table.sites if observer.tap in table.taps_of(site))

    effect_cache, select_cache, report_cache = _Cache(), _Cache(), _Cache()
    flops, done, shown = 0, 0, -1
    with (
        torch.no_grad(),
        torch.random.fork_rng([] if device.type != "cuda" else [device]),
        Progress("calibrate", batches, progress) as bar,
    ):
        for assigned in pieces:
            try:
                args, kwargs = calls.bind(*_on(device, assigned))
            except CallError as error:
                raise CalibrationError(f"batch {assigned.index}: {error}") from error
            call = Call(args, kwargs, None if assigned.call.mask is None else assigned.call.mask.to(device))
            if assigned.role == "calibrate":
                recorder.start(assigned.index, call.mask)
                outputs = run_flat(observed, call)
                if not done:
                    flops = count_flops(gm, call)
                done += 1
                if len(effect_cache.batches) < EFFECT_BATCHES:
                    effect_cache.add(call, outputs, assigned.index)
            else:
                cache = select_cache if assigned.role == "select" else report_cache
                cache.add(call, run_flat(gm, call), assigned.index)
            if assigned.index != shown:
                shown = assigned.index
                bar.advance(note=f"batch {shown}")
    notes = [
        f"{cache.dropped} held-out batches were not kept: they exceed {HOLDOUT_BYTES >> 20} MiB"
        for cache in (select_cache, report_cache)
        if cache.dropped
    ]
    sketched = [tap.name for tap in table.taps.values() if not observers[tap.name].sketch.exact]
    if sketched:
        notes.append(
            f"{len(sketched)} of {len(table.taps)} taps are sketched, not exact: ranks there stop at half the sketch"
        )
    return Calibration(
        sketches={name: observer.sketch for name, observer in observers.items()},
        rows=_rows_by_call(table, observers),
        flops=flops,
        effect_batches=effect_cache.batches,
        select_batches=select_cache.batches,
        report_batches=report_cache.batches,
        batches=done,
        seed=seed,
        state_bytes=sum(observer.sketch.nbytes for observer in observers.values()),
        notes=tuple(notes),
    )


class _Cache:
    """Batches with their reference outputs, up to the cap."""

    def __init__(self) -> None:
        self.batches: list[CachedBatch] = []
        self.dropped = 0
        self.bytes = 0

    def add(self, call: Call, outputs: tuple[Any, ...], index: int) -> None:
        tensors = [*call.tensors(), *(leaf for leaf in outputs if isinstance(leaf, Tensor))]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self.batches and self.bytes + size > HOLDOUT_BYTES:
            self.dropped += 1
            return
        if not all(bool(tensor.isfinite().any()) for tensor in floating_outputs(outputs) if tensor.numel()):
            raise CalibrationError(f"batch {index}: the model's output has no finite value")
        self.bytes += size
        self.batches.append(CachedBatch(call.map(_owned), tuple(_owned(leaf) for leaf in outputs)))


def run_flat(gm: GraphModule, call: Call) -> tuple[Any, ...]:
    """Run the graph and return its outputs as flat leaves; ``call`` stays as it is, even if the graph writes to it."""
    call = call.map(torch.clone)
    return tuple(pytree.tree_leaves(gm(*call.args, **call.kwargs)))


def count_flops(gm: GraphModule, call: Call) -> int:
    """FLOPs of the graph on ``call`` by torch's flop counter (2 x MACs, attention included); nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # torch's registry has no entry for the kernel that scaled_dot_product_attention takes on CPU.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (call.args, call.kwargs))
    counter = FlopCounterMode(display=False, custom_mapping={attention: attention_flops})
    with mode, counter, torch.no_grad():
        gm(*args, **kwargs)
    return int(counter.get_total_flops())


def _rows_by_call(table: SiteTable, observers: dict[str, TapObserver]) -> dict[str, int]:
    return {call.node: observers[call.tap].first_rows or 0 for site in table.sites for call in site.calls}


def _fan_out(table: SiteTable, tap: Tap) -> int:
    return sum(site.out_features for site in table.sites if tap in table.taps_of(site))


def _on(device: torch.device, assigned: Assigned) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = assigned.call.to(device)
    return call.args, call.kwargs


def _owned(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
