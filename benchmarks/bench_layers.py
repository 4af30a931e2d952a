"""How close does a factored layer come to the speed-up that its FLOPs promise?

Linear layers and convolutions at a third of the break-even rank, compiled, against the compiled dense layer in paired
turns; and against their two products run one by one on inputs at hand, which is the best that a pair of products can
do. Nothing is calibrated and no data is needed: speed does not depend on values.

What is measured is listed in layer_shapes.csv, or in the file of ``--shapes``: a line per layer and input with its
``kind`` (linear, conv3x3, conv1x1 or separable), channels or features ``in`` and ``out``, the input's height and width
``size`` (1 for linear layers) and ``images`` (rows for linear layers).

The page goes to results/layers.md, the chart to results/layers.svg, every figure to results/layers.csv, which is
written after each case.
"""

from __future__ import annotations

import csv
import io
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import charts
import common
import torch
from torch import Tensor, nn

from lowrank_fx import cost
from lowrank_fx._files import write_atomic
from lowrank_fx.latency import PairedTiming, paired_speedup

SHAPES = common.HERE / "layer_shapes.csv"
FIELDS = ("kind", "in", "out", "size", "images")
DTYPES = (torch.float32, torch.bfloat16)
MOST_WORK = 4e10
"""FLOPs of a dense call above which a shape is left out: about half a second on two cores, and it is called often."""

MANY_ROWS = 256
OVER_PRODUCTS, OVER_IDEAL, WORST = 0.95, 0.90, 0.80
"""What is asked where rows are many: the median over the two products, the median and the worst over FLOP-ideal."""


@dataclass(frozen=True)
class Case:
    """One layer with one input.

    Attributes:
        form: ``"lowrank"``, ``"channel"``, ``"spatial"``, ``"channel 1x1"`` or ``"depthwise 1x1"``.
        shape: of the layer, as text.
        rows: rows of the input; for a convolution, positions of its output.
        dtype: of weights and input.
        rank: of the pair.
        dense: the layer, behind its depthwise neighbour where it has one.
        first: the pair's first product, behind that neighbour likewise.
        second: its second.
        example: the input.
        ideal: FLOPs of the layer over those of the pair.
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


@dataclass(frozen=True)
class Shape:
    """A layer and the size of its input, as listed.

    Attributes:
        kind: one of ``KINDS``.
        into: features or channels of the input.
        out: of the output.
        size: height and width of the input; 1 for linear layers.
        images: how many; for linear layers, rows.
    """

    kind: str
    into: int
    out: int
    size: int
    images: int

    def __str__(self) -> str:
        layer = str(self.into) if self.into == self.out and self.kind != "linear" else f"{self.into} to {self.out}"
        return layer if self.kind == "linear" else f"{layer} at {self.size} x {self.size}"

    @property
    def rows(self) -> int:
        """Rows of the input; for a convolution, positions of its output."""
        return self.images * self.size**2

    @property
    def flops(self) -> float:
        """Of the dense layer, its depthwise neighbour left out."""
        return 2.0 * self.rows * self.into * self.out * (9 if self.kind == "conv3x3" else 1)


def main() -> None:
    """Measure every case, write the figures after each, and the page at the end, whatever ends it."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each comparison (default: %(default)s)")
    parser.add_argument("--shapes", type=Path, default=SHAPES, help="what to measure (default: layer_shapes.csv)")
    parser.add_argument("--fewer", action="store_true", help="two lines of each kind, to see that all works")
    options = parser.parse_args()
    try:
        shapes = read_shapes(options.shapes)
    except (OSError, ValueError) as error:
        parser.error(f"--shapes {options.shapes}: {error}")
    if options.fewer:
        shapes = [shape for kind in KINDS for shape in [each for each in shapes if each.kind == kind][:2]]
    chosen = [shape for shape in shapes if shape.flops <= MOST_WORK]
    left = left_out([shape for shape in shapes if shape.flops > MOST_WORK])
    print(left, flush=True)
    facts, started = common.machine(options.date), time.monotonic()
    measured: list[Figures] = []
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            for case in cases(chosen):
                figures = measure(case, options.seconds)
                measured.append((case, *figures))
                write_atomic(options.out / "layers.csv", as_csv(measured).encode())
                said = f"{case.form:<14} {case.shape:<18} {case.rows:>6} rows {name_of(case.dtype):<9}"
                print(
                    f"{said} {figures[0].speedup:.2f}x of {case.ideal:.2f}x, {figures[1]:.2f} of its products",
                    flush=True,
                )
    finally:
        if measured:
            done = (
                f"{len(measured)} of {planned(chosen)} cases, {(time.monotonic() - started) / 60:.0f} minutes. {left}"
            )
            page = ["# How fast a factored layer is", "", *facts, "", *common.paragraph(LEGEND), ""]
            page += [*common.paragraph(done), "", *summary(measured)]
            page += ["", "![speed-up over FLOP ratio by rows](layers.svg)", "", *details(measured)]
            charts.lines(
                options.out / "layers.svg",
                curves(measured),
                "rows of the input",
                "measured speed-up over FLOP ratio",
                level=1.0,
            )
            common.publish(options.out, "layers.md", page)


LEGEND = (
    f"Each layer at a third of its break-even rank, rounded to a multiple of {cost.FAST_STEP}, compiled by inductor, "
    "without gradients. *Ideal*: FLOPs of the layer over FLOPs of the pair. *Of ideal*: the measured speed-up over "
    "that. *Of its products*: the time of the pair's two products, each compiled and called by itself on an input at "
    "hand, over the time of the compiled pair. Convolutions are 3 x 3 with padding unless said, their input "
    "channels-last as inductor keeps it between convolutions; their rows are output positions. *Depthwise 1x1*: a "
    "3 x 3 depthwise convolution and the 1 x 1 one behind it, which alone is factored; the depthwise one is in all "
    "times and FLOPs, beside the first product. `layers.csv` has every figure with its spread."
)

Figures = tuple[Case, PairedTiming, float, float]
"""A case, its speed-up over dense, its share of what the products reach, and that one's interquartile range."""


def read_shapes(path: Path) -> list[Shape]:
    """The lines of a file of shapes.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no shape; the message says which.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"its first line must be {','.join(FIELDS)}")
        shapes = []
        for row in reader:
            kind, numbers = row["kind"], [row[field] or "" for field in FIELDS[1:]]
            if kind not in KINDS or not all(number.isdecimal() and int(number) for number in numbers):
                raise ValueError(f"line {reader.line_num}: give one of {', '.join(KINDS)}, and four numbers above 0")
            shape = Shape(kind, *map(int, numbers))
            if kind == "linear" and shape.size != 1:
                raise ValueError(f"line {reader.line_num}: a linear layer's size is 1, its rows are its images")
            shapes.append(shape)
    return shapes


def cases(shapes: Sequence[Shape]) -> Iterator[Case]:
    """Every layer in every form and dtype."""
    for dtype in DTYPES:
        for shape in shapes:
            for make in KINDS[shape.kind]:
                yield make(shape, dtype)


def planned(shapes: Sequence[Shape]) -> int:
    """How many cases there are."""
    return len(DTYPES) * sum(len(KINDS[shape.kind]) for shape in shapes)


def left_out(shapes: Sequence[Shape]) -> str:
    """Which shapes are too much work, in words."""
    listed = (f"{shape.kind} {shape} on {shape.rows:,} rows ({shape.flops:.1e})" for shape in shapes)
    return f"Left out for more than {MOST_WORK:.0e} FLOPs per call: {'; '.join(listed) or 'none'}."


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
    """A third of the break-even rank, as a multiple of 16, as plans for FLOPs or time have it.

    >>> third_of_break_even(1536, 384)
    96
    """
    third = cost.break_even_rank(out_features, in_features) / 3
    return max(1, round(third / cost.FAST_STEP)) * cost.FAST_STEP


def _linear(shape: Shape, dtype: torch.dtype) -> Case:
    into, out = shape.into, shape.out
    rank = third_of_break_even(out, into)
    return Case(
        form="lowrank",
        shape=str(shape),
        rows=shape.rows,
        dtype=dtype,
        rank=rank,
        dense=nn.Linear(into, out).to(dtype),
        first=nn.Linear(into, rank, bias=False).to(dtype),
        second=nn.Linear(rank, out).to(dtype),
        example=_random(shape.rows, into, dtype=dtype),
        ideal=into * out / (rank * (into + out)),
    )


def _convolution(
    form: str, shape: Shape, dtype: torch.dtype, rank: int, *kernels: tuple[int, int], depthwise: bool = False
) -> Case:
    """A layer of a kernel, and its pair: kernels of the layer, the first factor and the second."""

    def conv(into: int, out: int, kernel: tuple[int, int], bias: bool, groups: int = 1) -> nn.Module:
        padding = tuple(side // 2 for side in kernel)
        layer = nn.Conv2d(into, out, kernel, padding=padding, groups=groups, bias=bias)  # type: ignore[arg-type]
        made: nn.Module = layer.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made

    whole, one, two = kernels
    into, out = shape.into, shape.out
    dense = into * whole[0] * whole[1] * out
    pair = rank * (into * one[0] * one[1] + out * two[0] * two[1])
    layer, first = conv(into, out, whole, True), conv(into, rank, one, False)
    if depthwise:
        before = conv(into, into, (3, 3), True, groups=into)
        layer, first = nn.Sequential(before, layer), nn.Sequential(before, first)
        dense, pair = dense + 9 * into, pair + 9 * into
    return Case(
        form=form,
        shape=str(shape),
        rows=shape.rows,
        dtype=dtype,
        rank=rank,
        dense=layer,
        first=first,
        second=conv(rank, out, two, True),
        example=_random(shape.images, into, shape.size, shape.size, dtype=dtype).to(memory_format=torch.channels_last),
        ideal=dense / pair,
    )


def _channel(shape: Shape, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(shape.out, 9 * shape.into)
    return _convolution("channel", shape, dtype, rank, (3, 3), (3, 3), (1, 1))


def _spatial(shape: Shape, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(3 * shape.out, 3 * shape.into)
    return _convolution("spatial", shape, dtype, rank, (3, 3), (3, 1), (1, 3))


def _pointwise(shape: Shape, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(shape.out, shape.into)
    return _convolution("channel 1x1", shape, dtype, rank, (1, 1), (1, 1), (1, 1))


def _separable(shape: Shape, dtype: torch.dtype) -> Case:
    rank = third_of_break_even(shape.out, shape.into)
    return _convolution("depthwise 1x1", shape, dtype, rank, (1, 1), (1, 1), (1, 1), depthwise=True)


KINDS: Mapping[str, tuple[Callable[[Shape, torch.dtype], Case], ...]] = {
    "linear": (_linear,),
    "conv3x3": (_channel, _spatial),
    "conv1x1": (_pointwise,),
    "separable": (_separable,),
}
"""The forms that a kind of layer is measured in."""


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
        texts = (f"{figure:.6g}" for figure in (*figures, apart, spread))
        writer.writerow([case.form, case.shape, name_of(case.dtype), case.rows, case.rank, *texts])
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
