"""Ideas that could make factored layers faster, and what each is worth: packing, freezing, row-blocking, and others.

*Packing*: the first factors of sites that read one activation as one product. *Freezing*: inductor packs weights ahead.
*Row-blocking*: both products of a pair on some rows at a time, so that the middle activation stays in cache.
*Channels-last*: the layout of convolutions. *Fast ranks*: of what a rank should be a multiple. Everything stands
against the same pairs without the idea, in paired turns; nothing is calibrated and no data is needed, since speed does
not depend on values. The page goes to results/speed_ideas.md; its sentences of decision were written by the figures of
the page in the repository, those on fast ranks are written by the figures beside them. ``--only`` measures some
sections again and leaves the others as they are.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import common
import torch
from torch import Tensor, nn
from torch._dynamo import mark_static
from torch._inductor import config as inductor
from torch.nn import functional as F

from lowrank_fx import cost
from lowrank_fx.compiling import compile_module
from lowrank_fx.frozen import Frozen
from lowrank_fx.latency import PairedTiming, paired_speedup

HOW = ("apart", "packed", "joined")
"""Ways to apply first factors of one activation; see :class:`Shared`."""

WIDTHS, ROWS, DTYPES = (384, 768), (1, 32, 128, 256, 2048), (torch.float32, torch.bfloat16)
BLOCKS = 4
"""Layers in a row of the table of packing: enough that the cost of a compiled call does not hide theirs."""

BATCHES = ((1, 32), (1, 128), (16, 128))
"""Sentences and tokens of the encoders."""

LONG = (4096, 768, 3072, 192)
"""Rows, features in and out, and rank of the pair that is applied in blocks of rows."""

IMAGES, CHANNELS, SIZE, RANK = (1, 8), 128, 28, 48
"""Images, channels, height (and width) and rank of the convolutions."""

SHAPES, SHAPE_ROWS = ((768, 768), (384, 1536)), 1024
"""Features in and out of the pairs whose ranks are compared, and rows."""

MIDDLE, AROUND = 128, (16, 8, 4, 2, 1)
"""The rank that the others are compared with, and how far below and above it those lie: each a multiple of that."""

AS_FAST = 0.97
"""Share of the speed between the multiples of the widest step around it that a fast rank reaches at least."""


def main() -> None:
    """Measure, and write the page."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each comparison (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    options = parser.parse_args()
    page = options.out / "speed_ideas.md"
    facts = common.machine(options.date)
    head, kept = (facts, {}) if options.only is None else (last_facts(page) or facts, common.sections(page))
    with torch.no_grad():
        for name in options.only or SECTIONS:
            title, text, measured = SECTIONS[name]
            torch.compiler.reset()
            print(f"{title} ...", flush=True)
            own = [] if options.only is None else [*common.machine(options.date), ""]
            kept[title] = [*own, *common.paragraph(text), "", *measured(options.seconds)]
    lines = ["# Ideas for speed, and what they are worth", "", *head, "", *common.paragraph(LEGEND)]
    for title, _, _ in SECTIONS.values():
        if title in kept:
            lines += ["", f"## {title}", "", *kept[title]]
    lines += ["", "## CUDA", "", *common.paragraph(CUDA)]
    common.publish(options.out, page.name, lines)


def last_facts(page: Path) -> list[str]:
    """What the last page says of its machine; nothing where there is none."""
    lines = page.read_text().splitlines()[2:] if page.exists() else [""]
    return lines[: lines.index("")]


LEGEND = (
    "Each figure is the speed of the pairs with the idea over the same pairs without it (above 1 the idea is faster), "
    "the median of paired turns ± its standard error. Pairs are at half of their break-even rank where no rank is "
    "said. *Compiled*: by inductor, without gradients."
)


# ---- layers and models -----------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A linear layer of random weights, dense or a pair."""

    def __init__(self, into: int, out: int, rank: int | None) -> None:
        super().__init__()
        self.bias = _weight(out)
        self.factors = nn.ParameterList(
            [_weight(out, into)] if rank is None else [_weight(rank, into), _weight(out, rank)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply it: float ``[..., in]`` to ``[..., out]``."""
        return self.last(x if len(self.factors) == 1 else F.linear(x, self.factors[0]))

    def last(self, x: Tensor) -> Tensor:
        """Apply the last factor."""
        return F.linear(x, self.factors[-1], self.bias)


class Shared(nn.Module):
    """Layers that read one activation.

    Args:
        layers: pairs.
        how: ``"apart"``; ``"packed"``, one first factor that was packed before; ``"joined"``, packed in each call.
    """

    def __init__(self, layers: Sequence[Layer], how: str) -> None:
        super().__init__()
        self.how = how
        self.layers: Any = nn.ModuleList(layers)
        self.ranks = [layer.factors[0].shape[0] for layer in layers]
        self.packed = nn.Parameter(self.join(), requires_grad=False) if how == "packed" else None

    def join(self) -> Tensor:
        """The rows of all first factors: float ``[sum of ranks, in]``."""
        return torch.cat([layer.factors[0] for layer in self.layers])

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each layer gives."""
        if self.how == "apart":
            return [layer(x) for layer in self.layers]
        inner = F.linear(x, self.join() if self.packed is None else self.packed)
        return [layer.last(part) for layer, part in zip(self.layers, torch.split(inner, self.ranks, -1), strict=True)]


class Triples(nn.Module):
    """Three pairs on each activation, layer behind layer."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shared([_pair(width, width) for _ in range(3)], how) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all: float ``[rows, width]``."""
        for block in self.blocks:
            first, second, third = block(x)
            x = x + first * second - third
        return x


class Block(nn.Module):
    """A block of a transformer encoder.

    Args:
        width: features; heads are of 32.
        how: how query, key and value are applied; see :class:`Shared`.
        layer: makes a layer of so many features in and out, dense or a pair.
    """

    def __init__(self, width: int, layer: Callable[[int, int], Layer], how: str) -> None:
        super().__init__()
        self.qkv = Shared([layer(width, width) for _ in range(3)], how)
        self.out, self.up, self.down = layer(width, width), layer(width, 4 * width), layer(4 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it: float ``[batch, tokens, width]``."""
        query, key, value = (part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in self.qkv(x))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.first(x + self.out(mixed))
        made: Tensor = self.second(x + self.down(F.gelu(self.up(x))))
        return made


def encoder(layers: int, layer: Callable[[int, int], Layer], how: str = "apart") -> nn.Module:
    """Blocks of 384 features."""
    return nn.Sequential(*(Block(384, layer, how) for _ in range(layers)))


def convolutions(form: str) -> nn.Module:
    """Two factored 3 x 3 convolutions, with ReLU behind each."""
    kernels = {"spatial": ((3, 1), (1, 3)), "tucker2": ((1, 1), (3, 3), (1, 1))}[form]
    steps: list[nn.Module] = []
    for _ in range(2):
        widths = (CHANNELS, *[RANK] * (len(kernels) - 1), CHANNELS)
        for place, (high, wide) in enumerate(kernels):
            last = place == len(kernels) - 1
            padding = (high // 2, wide // 2)
            steps.append(nn.Conv2d(widths[place], widths[place + 1], (high, wide), padding=padding, bias=last))
        steps.append(nn.ReLU())
    return nn.Sequential(*steps)


def _pair(into: int, out: int) -> Layer:
    return Layer(into, out, int(cost.break_even_rank(out, into) / 2))


def _dense(into: int, out: int) -> Layer:
    return Layer(into, out, None)


_Made = TypeVar("_Made")


def _seeded(make: Callable[..., _Made], *arguments: object) -> _Made:
    """Make a model; equal calls give equal weights."""
    torch.manual_seed(0)
    return make(*arguments)


def _weight(*shape: int) -> nn.Parameter:
    return nn.Parameter((torch.rand(*shape) - 0.5) * 2 / shape[-1] ** 0.5, requires_grad=False)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    mark_static(made)  # compiled for its sizes, whatever came before
    return made


# ---- what is measured ------------------------------------------------------------------------------------------------


def packing(seconds: float) -> Iterator[str]:
    """A row per width, dtype and number of rows; then whole encoders."""
    rows = []
    for width in WIDTHS:
        for dtype in DTYPES:
            apart, packed, joined = (_seeded(Triples, width, how).to(dtype) for how in HOW)
            for count in ROWS:
                x = _random(count, width, dtype=dtype)
                found = [_compared(apart, other, x, seconds / 2) for other in (packed, joined)]
                rows.append((str(width), _name(dtype), str(count), *map(_figure, found)))
    yield from common.table(("width", "dtype", "rows", "packed", "joined in each call"), rows, left=2)
    yield from ("", *common.paragraph(WHOLE), "")
    rows = []
    models = [compile_module(_seeded(encoder, 6, _pair, how)) for how in HOW]
    for batch, tokens in BATCHES:
        x = _random(batch, tokens, 384)
        found = [_compared(models[0], other, x, 4 * seconds) for other in models[1:]]
        rows.append((f"{batch} x {tokens}", _milliseconds(found[0]), *map(_figure, found)))
    yield from common.table(("batch x tokens", "apart", "packed", "joined in each call"), rows)


def freezing(seconds: float) -> Iterator[str]:
    """A row per kind of layers, dtype and batch."""
    rows = []
    for kind, layer in (("dense", _dense), ("pairs", _pair)):
        for dtype, batch in ((torch.float32, 1), (torch.float32, 16), (torch.bfloat16, 16)):
            plain, frozen = (compile_module(_seeded(encoder, 2, layer).to(dtype)) for _ in range(2))
            timing = _compared(plain, _freezing(frozen), _random(batch, 32, 384, dtype=dtype), seconds)
            rows.append((kind, _name(dtype), f"{batch} x 32", _milliseconds(timing), _figure(timing)))
    yield from common.table(("layers", "dtype", "batch x tokens", "not frozen", "frozen"), rows, left=2)


def joined_when_frozen(seconds: float) -> Iterator[str]:
    """A row per batch of whole encoders, frozen as ``optimize(frozen=True)`` does it."""
    rows = []
    plain, frozen, joined = (
        compile_module(_seeded(encoder, 6, _pair)),
        *(Frozen(_seeded(encoder, 6, _pair)) for _ in range(2)),
    )
    for batch, tokens in BATCHES:
        x = _random(batch, tokens, 384)
        found = _compared(plain, frozen, x, 4 * seconds), _compared(frozen, _joining(joined), x, 4 * seconds)
        rows.append((f"{batch} x {tokens}", _milliseconds(found[0]), *map(_figure, found)))
        if frozen.refused or joined.refused:
            raise AssertionError(frozen.refused or joined.refused)
    yield from common.table(("batch x tokens", "not frozen", "frozen", "joined, over frozen"), rows)


def row_blocking(seconds: float) -> Iterator[str]:
    """A row per size of block; then the pair against the dense layer."""
    count, into, out, rank = LONG
    torch.manual_seed(0)
    pair, dense, x = Layer(into, out, rank), Layer(into, out, None), _random(count, into)
    first, second, weight = pair.factors[0].t(), pair.factors[1].t(), dense.factors[0].t()
    compiled = compile_module(pair)
    rows = []
    for size in (256, 512, 1024):

        def eager(x: Tensor, size: int = size) -> Tensor:
            made = x.new_empty(count, out)
            for start in range(0, count, size):
                part = slice(start, start + size)
                torch.addmm(pair.bias, x[part] @ first, second, out=made[part])
            return made

        joined = compile_module(_Blocked(pair, size))
        rows.append(
            (str(size), _figure(_compared(pair, eager, x, seconds)), _figure(_compared(compiled, joined, x, seconds)))
        )
    yield from common.table(("rows of a block", "eager", "compiled"), rows, left=0)
    made, inner = x.new_empty(count, out), x.new_empty(count, rank)

    def dense_again(x: Tensor) -> Tensor:
        return torch.addmm(dense.bias, x, weight, out=made)

    def pair_again(x: Tensor) -> Tensor:
        return torch.addmm(pair.bias, torch.mm(x, first, out=inner), second, out=made)

    ideal = into * out / (rank * (into + out))
    against = (
        _compared(dense, pair, x, 2 * seconds, alike=False),
        _compared(dense_again, pair_again, x, 2 * seconds, alike=False),
    )
    reached = [
        (how, _figure(timing), f"{ideal:.2f}", f"{timing.speedup / ideal:.0%}")
        for how, timing in zip(("new for each call", "the same for all calls"), against, strict=True)
    ]
    yield from ("", *common.paragraph(OUTPUTS), "")
    yield from common.table(("memory of the output", "pair over dense", "FLOP ratio", "reached"), reached)


class _Blocked(nn.Module):
    """A pair applied to some rows at a time."""

    def __init__(self, pair: Layer, size: int) -> None:
        super().__init__()
        self.pair, self.size = pair, size

    def forward(self, x: Tensor) -> Tensor:
        """Apply it: float ``[rows, in]`` to ``[rows, out]``."""
        return torch.cat([self.pair(part) for part in torch.split(x, self.size)])


def channels_last(seconds: float) -> Iterator[str]:
    """A row per form, dtype and number of images."""
    rows = []
    last = torch.channels_last
    for form in ("spatial", "tucker2"):
        for dtype, images in ((torch.float32, 1), (torch.float32, 8), (torch.bfloat16, 8)):
            plain, laid = (_seeded(convolutions, form).to(dtype) for _ in range(2))
            laid = laid.to(memory_format=last)  # type: ignore[call-overload]
            x = _random(images, CHANNELS, SIZE, SIZE, dtype=dtype)
            in_place = x.contiguous(memory_format=last)
            found = (
                _compared(plain, lambda x, laid=laid: laid(x.contiguous(memory_format=last)), x, seconds),
                _compared(compile_module(plain), compile_module(laid), x, seconds),
                _compared(compile_module(plain), compile_module(laid), in_place, seconds),
            )
            rows.append((form, _name(dtype), str(images), *map(_figure, found)))
    header = ("form", "dtype", "images", "eager", "compiled", "compiled, input channels-last")
    yield from common.table(header, rows, left=2)


def fast_ranks(seconds: float) -> Iterator[str]:
    """A row per rank; then what the figures say of the package's steps."""
    ranks = sorted({MIDDLE, *(MIDDLE + sign * away for away in AROUND for sign in (-1, 1))})
    columns: list[list[str]] = []
    speeds: defaultdict[torch.dtype, list[dict[int, float]]] = defaultdict(list)
    names = []
    for dtype in DTYPES:
        for name, make, x in _ranked(dtype):
            torch.compiler.reset()
            middle = compile_module(_seeded(make, MIDDLE).to(dtype))
            found: dict[int, PairedTiming] = {}
            for rank in ranks:
                other = compile_module(_seeded(make, rank).to(dtype))
                found[rank] = _compared(middle, other, x, seconds, alike=False)
            names.append(f"{name}, {_name(dtype)}")
            # FLOPs are in proportion to the rank.
            columns.append([_figure(timing, rank / MIDDLE) for rank, timing in found.items()])
            speeds[dtype].append({rank: timing.speedup + timing.error for rank, timing in found.items()})
    cells = zip(map(str, ranks), (str(_multiple(rank)) for rank in ranks), *columns, strict=True)
    yield from common.table(("rank", "multiple of", *names), list(cells))
    yield from ("", *common.paragraph(" ".join(rank_decision(dtype, own) for dtype, own in speeds.items())))


def _ranked(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[int], nn.Module], Tensor]]:
    """What is made of a rank, by name, and its input."""
    for into, out in SHAPES:
        yield f"{into} to {out}", partial(Layer, into, out), _random(SHAPE_ROWS, into, dtype=dtype)
    yield "3 x 3", channel_pair, _random(IMAGES[-1], CHANNELS, SIZE, SIZE, dtype=dtype)


def channel_pair(rank: int) -> nn.Module:
    """A 3 x 3 convolution in the form ``channel``."""
    first = nn.Conv2d(CHANNELS, rank, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.Conv2d(rank, CHANNELS, 1))


def _multiple(rank: int) -> int:
    """The largest of ``AROUND`` that divides a rank."""
    return max(step for step in AROUND if rank % step == 0)


def rank_decision(dtype: torch.dtype, columns: Sequence[dict[int, float]]) -> str:
    """What follows for the steps of a dtype.

    Args:
        dtype: of the pairs.
        columns: for each kind of pair the speed over that at ``MIDDLE``, error added, by rank.
    """
    widest, *finer = AROUND
    least = {
        step: min(
            rate * _between(column, rank)
            for column in columns
            for rank, rate in column.items()
            if _multiple(rank) == step
        )
        for step in finer
    }
    # The steps down to which all ranks are fast, those of larger steps too; the widest is what they are held against.
    fast = [step for step in AROUND if all(least[other] >= AS_FAST for other in finer if other >= step)]
    own, name = cost.FAST_STEP, _name(dtype)
    listed = ", ".join(f"{rate:.2f} ({step})" for step, rate in least.items())
    said = f"In {name} the slowest multiples reach, errors added, {listed} of the speed between those of {widest}."
    if min(fast) == own:
        return f"{said} Decision: the package's step of {own} is the finest that is fast; it stays."
    if min(fast) < own:
        return (
            f"{said} Decision: steps of {min(fast)} would be as fast on this machine as the package's {own}, which "
            f"stays for machines with matrix tiles; finer ones would save less than {own} ranks per layer."
        )
    return f"{said} Decision: the package's step of {own} is finer than is fast here, {min(fast)}: to be made coarser."


def _between(speeds: dict[int, float], rank: int) -> float:
    """The time at a rank, over that at ``MIDDLE``, on the line between the widest steps around it.

    A line, since part of a pair's time does not depend on its rank.
    """
    widest = AROUND[0]
    below = rank // widest * widest
    if below == rank:
        return 1 / speeds[rank]
    share = (rank - below) / widest
    return (1 - share) / speeds[below] + share / speeds[below + widest]


def _freezing(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Inductor freezes only in calls, the first and all later ones, that find the setting switched on."""

    def frozen(x: Tensor) -> Tensor:
        with inductor.patch(freezing=True):
            return run(x)

    return frozen


def _joining(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Inductor joins products of one activation where this setting is on when it compiles frozen code."""

    def joined(x: Tensor) -> Tensor:
        with inductor.patch({"cpp.enable_concat_linear": True}):
            return run(x)

    return joined


def _compared(
    baseline: Callable[..., Tensor], candidate: Callable[..., Tensor], x: Tensor, seconds: float, *, alike: bool = True
) -> PairedTiming:
    """The speed of ``candidate`` over that of ``baseline`` on ``x``; where they are alike, that is seen first."""
    expected, got = baseline(x).double(), candidate(x).double()
    off = float((got - expected).norm() / expected.norm())
    # The same products summed in another order: the dtype's rounding, grown through the layers.
    if alike and not off <= 64 * torch.finfo(x.dtype).eps:
        raise AssertionError(f"with the idea the results differ by {off:.1e}")
    # A single thread's own time leaves out what else the machine does.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return paired_speedup(lambda: baseline(x), lambda: candidate(x), device="cpu", max_seconds=seconds, clock=clock)


# ---- the page --------------------------------------------------------------------------------------------------------


def _figure(timing: PairedTiming, times: float = 1.0) -> str:
    return f"{times * timing.speedup:.2f} ± {times * timing.error:.2f}"


def _milliseconds(timing: PairedTiming) -> str:
    return f"{1000 * timing.baseline_seconds:.1f} ms"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PACKING = (
    "Four layers of three square pairs that read one activation (query, key and value), by plain operators. *Packed*: "
    "their first factors are one weight, made before; *joined*: they are concatenated in each call. Decision: by the "
    "whole model, below."
)
WHOLE = (
    "A compiled encoder of 6 layers of 384, float32, every linear layer a pair; only query, key and value share. "
    "Decision: not built. 7 % at 32 rows shrink to 4 % at 128 and to no more than the noise at a batch, where a model "
    "is calibrated and timed; it would cost a second compilation of each model and first factors that share their "
    "memory. Concatenating in each call keeps the factors apart and gains less."
)
FREEZING = (
    "A compiled encoder of 2 layers of 384, all linear layers dense or all pairs. *Frozen*: with inductor's `freezing` "
    "switched on around each call, any of which may compile; that is counted. Decision: the option `frozen=True`, not "
    "a default. Frozen code holds copies of the weights and sees no change of them, so the option looks at the weights "
    "before each call. At few rows in float32 freezing gains more than any other idea here."
)
JOINED = (
    "The encoder of 6 layers of above, every linear layer a pair, frozen as `optimize(frozen=True)` does it: its look "
    "at the weights is counted. *Joined*: with inductor's `cpp.enable_concat_linear`, which packs the first factors of "
    "query, key and value into one product when it freezes, over frozen without it. Decision: not used, nothing is "
    "gained; torch leaves the setting off too."
)
BLOCKING = (
    "A pair of 768 to 3072 at rank 192 on 4,096 rows, float32: both products on some rows at a time, over the pair on "
    "all rows (compiled: slices and a concatenation). Decision: not built, no size of block measured faster."
)
OUTPUTS = (
    "The same pair against the dense layer, eager. Each call's output is 48 MiB, and part of what the pair misses of "
    "its FLOP ratio is the cost of new memory for it. Decision: nothing to build, memory is the allocator's."
)
LAYOUT = (
    "Two 3 x 3 convolutions of 128 channels at 28 x 28, factored at rank 48, with ReLU behind each. *Eager*: weights "
    "and input channels-last, the input's conversion counted. *Compiled*: only the weights are stored channels-last; "
    "inductor lays out the activations itself. Decision: not a default, since channels-last weights change the "
    "strides of activations, on which a captured `view` can fail; `fast.to(memory_format=torch.channels_last)` does "
    "it for a finished model, compiled or not."
)
RANKS = (
    f"Compiled pairs around rank {MIDDLE}: linear ones at {SHAPE_ROWS:,} rows, and a 3 x 3 convolution of {CHANNELS} "
    f"channels in the form `channel` at {SIZE} x {SIZE}, {IMAGES[-1]} images. A figure is FLOPs per second over those "
    f"at rank {MIDDLE}: 1 means that time grows as the rank does. From a break-even rank of 64 on, targets other than "
    f"`Keep(params=)` have multiples of {cost.FAST_STEP} on offer. A step counts as fast where all its ranks, and "
    f"those of larger steps, reach {AS_FAST:g} of the speed that the line between the times of the multiples of "
    f"{AROUND[0]} around them gives: part of the time is of no rank."
)
CUDA = (
    "Nothing was measured on CUDA, since no accelerator was at hand, and no figure of this page holds there. Decision: "
    "none of these ideas is used there until it measured faster on such a device; packing, which saves launches, would "
    "be the first to measure. Two more are not built for the same reason. *Captured CUDA graphs* for small batches, "
    'where launches cost more than products: `torch.compile(fast, mode="reduce-overhead")` on a finished model makes '
    "them without the package's help. *A fused kernel* for a pair, which would keep the middle activation on the chip."
)

SECTIONS: dict[str, tuple[str, str, Callable[[float], Iterator[str]]]] = {
    "packing": ("Packing: one product for the first factors that read one activation", PACKING, packing),
    "freezing": ("Freezing: weights packed ahead by inductor", FREEZING, freezing),
    "joined": ("Packing by inductor, when frozen", JOINED, joined_when_frozen),
    "blocking": ("Row-blocking: the middle activation kept in cache", BLOCKING, row_blocking),
    "layout": ("Channels-last", LAYOUT, channels_last),
    "ranks": ("Fast ranks", RANKS, fast_ranks),
}

if __name__ == "__main__":
    main()
