"""The original against the optimized model on other data: outputs, size, FLOPs and speed.

What an optimized model lost was measured on rows that were held out of calibration. This measures it again on whatever
batches a user brings, and says what else changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_fx._render import count, environment, number, percent, scaled, seconds, speed
from lowrank_fx.batches import Call, bind_batch, bound_calls
from lowrank_fx.capture import device_of, plain_attention, preserved, unwrap
from lowrank_fx.compare import ErrorSum
from lowrank_fx.compiling import compile_module
from lowrank_fx.errors import CalibrationError
from lowrank_fx.frozen import Frozen
from lowrank_fx.graph_program import flop_counter
from lowrank_fx.latency import PairedTiming, paired_speedup
from lowrank_fx.report import WIDTH, aligned

# Numbers turned to float64 at a time: the logits of a language model would take gigabytes at once.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class OutputDifference:
    """How far one tensor of the outputs moved, over all batches.

    Attributes:
        name: where in the output it is, such as ``logits`` or ``[0]``; ``output`` where the model returns it alone.
        shape: its shape in the first batch.
        dtype: its dtype in the original's output, such as ``float32``.
        error: relative L2 error of a floating-point or complex tensor; None for any other.
        cosine: mean over rows (vectors along the last dimension) of the cosine to the original's row; None where it is
            not floating-point or has fewer than two dimensions. Rows that are zero in both count 1; rows in which the
            original is not finite do not count.
        same_largest: share of rows whose largest entry is at the same place as the original's, where rows may be
            scores of classes: see :func:`compare_models`.
        equal: share of equal entries of an integer or boolean tensor; None for any other.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    error: float | None
    cosine: float | None
    same_largest: float | None
    equal: float | None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_models` measured; ``print`` it, or ask it ``to_html()``.

    Attributes:
        error: relative L2 error of all floating outputs of all batches, as if they were one vector.
        outputs: a difference per tensor of the output, in the order they are returned.
        batches: number of batches compared.
        rows: number of rows in them.
        parameters: numbers of the original and of the optimized model.
        bytes: bytes of every tensor in the state dict, each once: what a safetensors file takes, its header aside.
        flops: 2 x MACs on the first batch, attention included.
        timing: paired, on the first batch; None where it was not asked for.
        timed_rows: rows of the first batch.
        compiled: whether both were compiled when they were timed.
        frozen: whether that was with their weights as constants.
    """

    error: float
    outputs: tuple[OutputDifference, ...]
    batches: int
    rows: int
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    flops: tuple[int, int]
    timing: PairedTiming | None
    timed_rows: int
    compiled: bool
    frozen: bool = False

    def __str__(self) -> str:
        table = self.table
        blocks = [
            ["lowrank_fx: the original against the optimized model", *textwrap.wrap(self.headline, WIDTH)],
            ["Outputs", *aligned(table, "ll" + "r" * (len(table[0]) - 2))],
            ["Size and cost", *aligned([("", "original", "optimized", "kept"), *self.amounts], "lrrr")],
        ]
        if self.timing is not None:
            blocks[-1] += textwrap.wrap(f"{self.speed_line}.", WIDTH, initial_indent="  ", subsequent_indent="  ")
        return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)

    def to_html(self) -> str:
        """The comparison as one page: no script, nothing loaded from elsewhere, light and dark."""
        page = environment().get_template("compare.html.j2")
        return page.render(comparison=self, title="lowrank_fx: original against optimized")

    @property
    def headline(self) -> str:
        """The outcome in one sentence."""
        kept = percent(_share(self.parameters))
        fast = "" if self.timing is None else f", measured {speed(self.timing.speedup)} as fast"
        return (
            f"With {kept} of the parameters and {percent(_share(self.flops))} of the FLOPs{fast}, the outputs have a "
            f"relative error of {number(self.error)} over {count(self.rows)} rows in {count(self.batches)} "
            f"{'batch' if self.batches == 1 else 'batches'}."
        )

    @property
    def speed_line(self) -> str:
        """The measured speed and how it was measured."""
        if self.timing is None:
            return "speed was not measured"
        timing = self.timing
        how = "compiled with frozen weights" if self.frozen else "compiled" if self.compiled else "eager"
        return (
            f"{speed(timing.speedup)} as fast on {count(self.timed_rows)} rows: {seconds(timing.baseline_seconds)} to "
            f"{seconds(timing.candidate_seconds)}, both {how}, interquartile range {timing.spread:.2f} over "
            f"{timing.rounds} rounds"
        )

    @property
    def table(self) -> list[tuple[str, ...]]:
        """A head and a row of text per output; columns that would be empty are left out."""
        rows: list[tuple[str, ...]] = [("output", "first batch", "error", "cosine", "same largest", "equal")]
        for entry in self.outputs:
            rows.append(
                (
                    entry.name,
                    f"{entry.dtype} {' x '.join(map(str, entry.shape)) or 'scalar'}",
                    "" if entry.error is None else number(entry.error),
                    "" if entry.cosine is None else f"{entry.cosine:.4f}",
                    "" if entry.same_largest is None else percent(entry.same_largest),
                    "" if entry.equal is None else percent(entry.equal),
                )
            )
        shown = [any(row[column] for row in rows[1:]) for column in range(len(rows[0]))]
        return [tuple(itertools.compress(row, shown)) for row in rows]

    @property
    def amounts(self) -> list[tuple[str, str, str, str]]:
        """Quantity, original, optimized, share kept; a row each."""
        return [
            (label, form(pair[0]), form(pair[1]), percent(_share(pair)))
            for label, pair, form in (
                ("parameters", self.parameters, count),
                ("size on disk", self.bytes, _size),
                ("FLOPs", self.flops, scaled),
            )
        ]


def compare_models(
    original: nn.Module,
    optimized: nn.Module,
    batches: Iterable[Any],
    *,
    forward_args: Callable[[Any], Any] | None = None,
    compile: bool = True,
    measure_speed: bool = True,
) -> Comparison:
    """Compare an optimized model with its original.

    Both run every batch in eval mode without gradients, eagerly: many shapes would compile many times. Whether rows
    are scores of classes cannot be seen from their shape alone, so ``same_largest`` is given where an output's name
    holds "logits" or "scores", and for outputs without a name of two or three dimensions, the last of at least two.

    Args:
        original: the model that was optimized; handed back exactly as it was.
        optimized: what :func:`lowrank_fx.optimize` or :func:`lowrank_fx.load` gave, or any module that is called alike.
        batches: any iterable of batches, read once and bound to ``forward`` as ``optimize`` does it. Rows that neither
            was calibrated on give an honest error.
        forward_args: a function from a batch to the arguments of ``forward``, where those rules do not fit.
        compile: time both models compiled; with frozen weights if the optimized one was made so.
        measure_speed: time them at all, on the first batch, in paired turns.

    Raises:
        CalibrationError: there is no batch, one cannot be used, or the two models' outputs have different structures.
    """
    original, optimized = unwrap(original), unwrap(optimized)
    signature = inspect.signature(original.forward)

    def bind(batch: Any, index: int) -> Call:
        return bind_batch(batch, signature, forward_args, index)

    overall, sums, first, rows, index = ErrorSum(), dict[str, _OutputSum](), None, 0, -1
    with preserved(original), preserved(optimized), torch.no_grad():
        with torch.compiler.set_stance("force_eager"):
            for index, call in bound_calls(batches, bind):
                first = call if first is None else first
                rows += call.batch_size
                reference, output = _run(original, call), _run(optimized, call)
                overall.add(output, reference, call.mask)
                _add(sums, output, reference, call.mask, index)
            if first is None:
                raise CalibrationError(
                    "there is no batch to compare on; pass an iterable of batches that has not been read to its end"
                )
            flops = _flops(original, first), _flops(optimized, first)
        frozen = compile and bool(getattr(optimized, "frozen", False))
        timing = _timing(original, optimized, first, compile, frozen) if measure_speed else None
    return Comparison(
        error=overall.relative,
        outputs=tuple(total.difference(name) for name, total in sums.items()),
        batches=index + 1,
        rows=rows,
        parameters=(_parameters(original), _parameters(optimized)),
        bytes=(_bytes(original), _bytes(optimized)),
        flops=flops,
        timing=timing,
        timed_rows=first.batch_size,
        compiled=compile,
        frozen=frozen,
    )


# ---- outputs ---------------------------------------------------------------------------------------------------------


class _OutputSum:
    """The difference of one output, added up over batches."""

    def __init__(self, name: str, reference: Tensor) -> None:
        floating = reference.is_floating_point()
        self._shape = tuple(reference.shape)
        self._dtype = str(reference.dtype).removeprefix("torch.")
        self._error = ErrorSum() if floating or reference.is_complex() else None
        self._has_rows = floating and reference.dim() >= 2
        unnamed = name == "output" or name.endswith("]")
        scores = reference.dim() in (2, 3) if unnamed else "logits" in name or "scores" in name
        self._has_classes = self._has_rows and scores and reference.shape[-1] >= 2
        self._cosines, self._rows, self._same, self._all_rows, self._equal, self._entries = 0.0, 0, 0, 0, 0, 0

    def add(self, value: Tensor, reference: Tensor, mask: Tensor | None) -> None:
        value = value.to(reference.device)
        if self._error is None:
            self._equal += int((value == reference).sum())
            self._entries += reference.numel()
            return
        self._error.add(value, reference, mask)
        if not self._has_rows:
            return
        if mask is not None and reference.shape[:2] == mask.shape:
            value, reference = value[mask.to(value.device)], reference[mask.to(reference.device)]
        width = reference.shape[-1]
        step = max(1, _CHUNK // max(width, 1))
        ours, theirs = (torch.split(each.reshape(-1, width), step) for each in (value, reference))
        for part, expected in zip(ours, theirs, strict=True):
            self._add_rows(part, expected)

    def _add_rows(self, value: Tensor, reference: Tensor) -> None:
        if self._has_classes:
            self._same += int((value.argmax(-1) == reference.argmax(-1)).sum())
        self._all_rows += len(reference)
        counted = reference.isfinite().all(-1)
        ours, theirs = value[counted].double(), reference[counted].double()
        both_zero = (ours == 0).all(-1) & (theirs == 0).all(-1)
        cosine = nn.functional.cosine_similarity(ours, theirs, dim=-1, eps=1e-300)
        self._cosines += float(cosine.nan_to_num(0.0, 0.0, 0.0).masked_fill(both_zero, 1.0).sum())
        self._rows += len(theirs)

    def difference(self, name: str) -> OutputDifference:
        return OutputDifference(
            name=name,
            shape=self._shape,
            dtype=self._dtype,
            error=None if self._error is None else self._error.relative,
            cosine=self._cosines / self._rows if self._rows else None,
            same_largest=self._same / self._all_rows if self._has_classes and self._all_rows else None,
            equal=self._equal / self._entries if self._entries else None,
        )


def _add(sums: dict[str, _OutputSum], output: Any, reference: Any, mask: Tensor | None, index: int) -> None:
    ours, theirs = dict(named_outputs(output)), dict(named_outputs(reference))
    for name in [*theirs, *ours]:
        if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape:
            said = [str(list(found[name].shape)) if name in found else "nothing" for found in (theirs, ours)]
            raise CalibrationError(
                f"batch {index}: output {name!r}: the original gives {said[0]} and the optimized model {said[1]}; "
                "outputs can be compared only if both models return the same structure"
            )
    for name, expected in theirs.items():
        sums.setdefault(name, _OutputSum(name, expected)).add(ours[name], expected, mask)


def named_outputs(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model's output with its place in it: ``logits``, ``[0]``, ``hidden_states[1]``.

    Mappings (``ModelOutput`` among them), dataclasses, tuples, lists and every class registered with
    ``torch.utils._pytree`` are entered.

    Args:
        output: what a model returned.
        name: the place of ``output`` itself in something larger.
    """
    if isinstance(output, Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key in output:
            yield from named_outputs(output[key], f"{name}.{key}" if name else str(key))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from named_outputs(getattr(output, field.name, None), f"{name}.{field.name}" if name else field.name)
    elif hasattr(output, "_fields"):
        for field in output._fields:
            yield from named_outputs(getattr(output, field), f"{name}.{field}" if name else field)
    else:
        leaves = output if isinstance(output, tuple | list) else pytree.tree_leaves(output)
        for position, leaf in enumerate(leaves):
            if leaf is not output:
                yield from named_outputs(leaf, f"{name}[{position}]")


# ---- size, FLOPs, speed ----------------------------------------------------------------------------------------------


def _run(model: nn.Module, call: Call) -> Any:
    # A clone of its own: a model may write into its inputs.
    own = call.map(torch.clone).to(device_of(model))
    return model(*own.args, **own.kwargs)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _bytes(model: nn.Module) -> int:
    held = model.state_dict(keep_vars=True).values()
    tensors = {id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _flops(model: nn.Module, call: Call) -> int:
    counter = flop_counter()
    with plain_attention(), warnings.catch_warnings(), counter:
        # The counter's own hooks on modules; the compiled graph runs eagerly here.
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks", UserWarning)
        _run(model, call)
    return int(counter.get_total_flops())


def _timing(original: nn.Module, optimized: nn.Module, call: Call, compile: bool, frozen: bool) -> PairedTiming:
    device = device_of(optimized)
    baseline, candidate = (
        (_runner(model, compile, frozen), call.map(torch.clone).to(device_of(model))) for model in (original, optimized)
    )
    stance = contextlib.nullcontext() if compile else torch.compiler.set_stance("force_eager")
    with stance:
        return paired_speedup(
            lambda: baseline[0](*baseline[1].args, **baseline[1].kwargs),
            lambda: candidate[0](*candidate[1].args, **candidate[1].kwargs),
            device=device,
        )


def _runner(model: nn.Module, compile: bool, frozen: bool) -> Callable[..., Any]:
    # A LowRankModule compiles its own graph.
    if not compile or getattr(model, "compiled", False):
        return model
    return Frozen(model) if frozen else compile_module(model)


def _size(amount: int) -> str:
    text = scaled(amount)
    return f"{text}B" if " " in text else f"{text} B"


def _share(pair: tuple[int, int]) -> float:
    return pair[1] / pair[0] if pair[0] else 1.0
