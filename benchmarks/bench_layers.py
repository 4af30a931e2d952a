"""How close does a factored layer come to the speed-up that its FLOPs promise?

Linear layers and convolutions at a third of the break-even rank, compiled, against the compiled dense layer in paired
turns; and against their two products run one by one on inputs at hand, which is the best that a pair of products can
do. Nothing is calibrated and no data is needed: speed does not depend on values.

The page goes to results/layers.md, every figure to results/layers.csv, the chart to results/layers.svg.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import charts
import common
import torch
from torch import Tensor, nn

from lowrank_fx import cost
from lowrank_fx._files import write_atomic
from lowrank_fx._render import number
from lowrank_fx.latency import PairedTiming, paired_speedup

ROWS = (1, 16, 256, 1024, 4096, 8192)
FEATURES = ((384, 384), (384, 1536), (768, 768), (768, 3072), (1024, 4096), (4096, 4096))
"""Input and output features of linear layers."""

IMAGES = ((64, 56, 1), (128, 28, 1), (256, 14, 1), (64, 56, 8), (128, 28, 8), (256, 14, 8))
"""Channels, height (and width), images."""

DTYPES = (torch.float32, torch.bfloat16)
MOST_WORK = 1.2e11
"""FLOPs of a dense call above which a shape is left out: it would be measured for minutes."""

MANY_ROWS = 256
OVER_PRODUCTS, OVER_IDEAL, WORST = 0.95, 0.90, 0.80
"""What is asked where rows are many: the median over the two products, the median and the worst over FLOP-ideal."""


@dataclass(frozen=True)
class Case:
    """One layer with one input.

    Attributes:
        form: ``"lowrank"``, ``"channel"``, ``"spatial"`` or ``"channel 1x1"``.
        shape: of the layer, as text.
        rows: rows of the input; for a convolution, positions of its output.
        dtype: of weights and input.
        rank: of the pair.
        dense: the layer.
        first: the pair's first product.
        second: its second.
        example: the input.
        ideal: FLOPs of the layer over those of the pair.
        flops: of the layer, on this input.
    """

    form: str
    shape: str
    rows: int
    dtype: torch.dtype
    rank: int
    dense: nn.Module
    first: nn.Module
    second: nn.Module
    example: Tensor
    ideal: float
    flops: float


def main() -> None:
    """Measure every case, and write the page."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each comparison (default: %(default)s)")
    parser.add_argument("--fewer", action="store_true", help="two shapes of each form, to see that all works")
    options = parser.parse_args()
    facts = common.machine(options.date)
    measured = []
    with torch.no_grad():
        for case in cases(options.fewer):
            figures = measure(case, options.seconds)
            measured.append((case, *figures))
            said = f"{case.form:<12} {case.shape:<14} {case.rows:>6} rows {name_of(case.dtype):<9}"
            print(
                f"{said} {figures[0].speedup:.2f}x of {case.ideal:.2f}x, {figures[1]:.2f} of its products", flush=True
            )
    page = ["# How fast a factored layer is", "", *facts, "", *common.paragraph(LEGEND), "", *summary(measured)]
    page += ["", "![speed-up over FLOP ratio by rows](layers.svg)", "", *details(measured)]
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "layers.csv", as_csv(measured).encode())
    charts.lines(
        options.out / "layers.svg",
        curves(measured),
        "rows of the input",
        "measured speed-up over FLOP ratio",
        level=1.0,
    )
    common.publish(options.out, "layers.md", page)


LEGEND = (
    "Each layer at a third of its break-even rank, rounded to a multiple of 16, compiled by inductor, without "
    "gradients. *Ideal*: FLOPs of the layer over FLOPs of the pair. *Of ideal*: the measured speed-up over that. *Of "
    "its products*: the time of the pair's two products, each compiled and called by itself on an input at hand, over "
    "the time of the compiled pair. Convolutions are 3 x 3 with padding unless said, as many channels out as in, their "
    "input channels-last as inductor keeps it between convolutions; their rows are output positions. `layers.csv` has "
    "every figure with its spread."
)

Figures = tuple[Case, PairedTiming, float, float]
"""A case, its speed-up over dense, its share of what the products reach, and that one's interquartile range."""


def cases(fewer: bool) -> Iterator[Case]:
    """Every layer with every input that is not too much work."""
    for dtype in DTYPES:
        for into, out in FEATURES[:2] if fewer else FEATURES:
            for rows in ROWS[1:4:2] if fewer else ROWS:
                case = _linear(into, out, rows, dtype)
                if case.flops <= MOST_WORK:
                    yield case
        for channels, size, images in IMAGES[:2] if fewer else IMAGES:
            for make in (_channel, _spatial, _pointwise):
                case = make(channels, size, images, dtype)
                if case.flops <= MOST_WORK:
                    yield case


def measure(case: Case, seconds: float) -> tuple[PairedTiming, float, float]:
    """The speed-up over the dense layer, and the share of what the two products reach by themselves."""
    torch.compiler.reset()
    example = case.example
    between = case.first(example)
    dense, pair = torch.compile(case.dense), torch.compile(nn.Sequential(case.first, case.second))
    first, second = torch.compile(case.first), torch.compile(case.second)

    def products() -> None:
        first(example)
        second(between)

    against = paired_speedup(lambda: dense(example), lambda: pair(example), device="cpu", max_seconds=seconds)
    apart = paired_speedup(products, lambda: pair(example), device="cpu", max_seconds=seconds)
    return against, apart.speedup, apart.spread


# ---- cases -----------------------------------------------------------------------------------------------------------


def third_of_break_even(out_features: int, in_features: int) -> int:
    """A third of the break-even rank, as a multiple of 16.

    >>> third_of_break_even(1536, 384)
    96
    """
    return max(16, round(cost.break_even_rank(out_features, in_features) / 3 / 16) * 16)


def _linear(into: int, out: int, rows: int, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(out, into)
    return Case(
        form="lowrank",
        shape=f"{into} to {out}",
        rows=rows,
        dtype=dtype,
        rank=rank,
        dense=nn.Linear(into, out).to(dtype),
        first=nn.Linear(into, rank, bias=False).to(dtype),
        second=nn.Linear(rank, out).to(dtype),
        example=_random(rows, into, dtype=dtype),
        ideal=into * out / (rank * (into + out)),
        flops=2.0 * rows * into * out,
    )


def _convolution(
    form: str, channels: int, size: int, images: int, dtype: torch.dtype, rank: int, *kernels: tuple[int, int]
) -> Case:
    """A layer of a kernel, and its pair: kernels of the layer, the first factor and the second."""

    def conv(into: int, out: int, kernel: tuple[int, int], bias: bool) -> nn.Module:
        padding = tuple(side // 2 for side in kernel)
        layer = nn.Conv2d(into, out, kernel, padding=padding, bias=bias)  # type: ignore[arg-type]
        return layer.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    whole, one, two = kernels
    dense = channels * whole[0] * whole[1] * channels
    pair = rank * channels * (one[0] * one[1] + two[0] * two[1])
    rows = images * size * size
    return Case(
        form=form,
        shape=f"{channels} at {size} x {size}",
        rows=rows,
        dtype=dtype,
        rank=rank,
        dense=conv(channels, channels, whole, True),
        first=conv(channels, rank, one, False),
        second=conv(rank, channels, two, True),
        example=_random(images, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last),
        ideal=dense / pair,
        flops=2.0 * rows * dense,
    )


def _channel(channels: int, size: int, images: int, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(channels, 9 * channels)
    return _convolution("channel", channels, size, images, dtype, rank, (3, 3), (3, 3), (1, 1))


def _spatial(channels: int, size: int, images: int, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(3 * channels, 3 * channels)
    return _convolution("spatial", channels, size, images, dtype, rank, (3, 3), (3, 1), (1, 3))


def _pointwise(channels: int, size: int, images: int, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(channels, channels)
    return _convolution("channel 1x1", channels, size, images, dtype, rank, (1, 1), (1, 1), (1, 1))


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# ---- the page --------------------------------------------------------------------------------------------------------


def summary(measured: Sequence[Figures]) -> list[str]:
    """Medians and worst of the cases of many rows, by form and dtype, with what was asked."""
    rows = []
    for dtype in DTYPES:
        for form in dict.fromkeys(case.form for case, *_ in measured):
            chosen = [each for each in measured if each[0].form == form and each[0].dtype == dtype]
            chosen = [each for each in chosen if each[0].rows >= MANY_ROWS]
            if not chosen:
                continue
            ideal = [timing.speedup / case.ideal for case, timing, *_ in chosen]
            apart = statistics.median(share for *_, share, _ in chosen)
            middle, worst = statistics.median(ideal), min(ideal)
            rows.append(
                (
                    form,
                    name_of(dtype),
                    str(len(chosen)),
                    *(f"{apart:.2f}", common.met(apart >= OVER_PRODUCTS)),
                    *(f"{middle:.2f}", common.met(middle >= OVER_IDEAL)),
                    *(f"{worst:.2f}", common.met(worst >= WORST)),
                )
            )
    header = (
        *("form", "dtype", "cases"),
        *(f"of its products, median (asked {OVER_PRODUCTS:g})", "met"),
        *(f"of ideal, median (asked {OVER_IDEAL:g})", "met"),
        *(f"of ideal, worst (asked {WORST:g})", "met"),
    )
    return [f"**{MANY_ROWS} rows and more**", "", *common.table(header, rows, left=2)]


def details(measured: Sequence[Figures]) -> list[str]:
    """A row per case."""
    header = ("form", "layer", "dtype", "rows", "rank", "dense", "speed-up", "ideal", "of ideal", "of its products")
    rows = [
        (
            case.form,
            case.shape,
            name_of(case.dtype),
            str(case.rows),
            str(case.rank),
            f"{timing.baseline_seconds * 1e6:.0f} µs",
            f"{timing.speedup:.2f}",
            f"{case.ideal:.2f}",
            f"{timing.speedup / case.ideal:.2f}",
            f"{apart:.2f}",
        )
        for case, timing, apart, _ in measured
    ]
    return ["**Every case**", "", *common.table(header, rows, left=3)]


COLUMNS = (
    *("form", "layer", "dtype", "rows", "rank", "dense_seconds", "pair_seconds", "speedup", "speedup_iqr", "ideal"),
    *("of_products", "of_products_iqr"),
)


def as_csv(measured: Sequence[Figures]) -> str:
    """Every figure, a row per case."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case, timing, apart, spread in measured:
        figures = (timing.baseline_seconds, timing.candidate_seconds, timing.speedup, timing.spread, case.ideal)
        writer.writerow(
            [case.form, case.shape, name_of(case.dtype), case.rows, case.rank, *map(number, (*figures, apart, spread))]
        )
    return text.getvalue()


def curves(measured: Sequence[Figures]) -> dict[str, list[tuple[float, float]]]:
    """Of ideal by rows: the median over shapes, a line per form and dtype."""
    points: dict[str, dict[int, list[float]]] = {}
    for case, timing, *_ in measured:
        line = points.setdefault(f"{case.form}, {name_of(case.dtype)}", {})
        line.setdefault(case.rows, []).append(timing.speedup / case.ideal)
    return {
        name: [(float(rows), statistics.median(found)) for rows, found in sorted(line.items())]
        for name, line in points.items()
    }


def name_of(dtype: torch.dtype) -> str:
    """A dtype without its module's name."""
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
