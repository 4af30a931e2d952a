"""How do the CPU time and the peak memory of ``optimize`` grow with a model's width, its depth and the data?

A residual network of GELU layers of twice its width, random weights, inputs of a falling spectrum; one of width, depth
and calibration rows is varied at a time. Every run is a process of its own, on one thread (idle threads that spin would
count as work): its seconds are CPU seconds of the whole process, its memory is the process's peak above what it was
when model and data were there. Nothing is compiled.

The page goes to results/scaling.md, the charts to results/scaling_seconds.svg and results/scaling_memory.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn

from lowrank_fx import Keep, calibrate, optimize


class Size(NamedTuple):
    """What is varied: numbers in a row, residual layers, rows of calibration data."""

    width: int
    depth: int
    rows: int


BASE = Size(width=256, depth=4, rows=2048)
AXES: Mapping[str, tuple[int, ...]] = {
    "width": (128, 256, 512, 1024),
    "depth": (2, 4, 8, 16),
    "rows": (1024, 2048, 4096, 8192),
}
BATCH = 128
SHARE = 0.5
SEED = 0
MIB = 1 << 20

STAGES = {"calibrate": "calibration", "rest": "plan and rewrite", "seconds": "both"}

LEGEND = (
    f"x + B gelu(A norm(x)) with A [2 w, w] and B [w, 2 w], {BASE.depth} of them at w = {BASE.width} and "
    f"{BASE.rows:,} rows in batches of {BATCH} unless varied; `Keep(params={SHARE})`. *Plan and rewrite*: all of "
    "`optimize` behind its calibration (error curves, gradients, effects, candidates, corrections, factors). *Peak*: "
    "above the peak before; in it are the sketches, the cached batches and a copy of the model. A line's "
    "*exponent* is the slope of its least squares fit over logarithms: 1 grows as the size does, 0 not at all. FLOPs "
    "grow as width^2, depth^1 and rows^1, weights as width^2 and depth^1."
)


class Residual(nn.Module):
    """x + B gelu(A norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Rows [n, w] to rows [n, w]."""
        y: Tensor = x + self.inner(x)
        return y


def main() -> None:
    """Run every size in a process of its own, and write the page and its charts."""
    parser = common.option_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=AXES, help="axes to measure; nothing is written")
    parser.add_argument("--one", nargs=3, type=int, metavar=("WIDTH", "DEPTH", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run(Size(*options.one))))
        return
    lines = ["# How cost grows", "", *common.machine(options.date, threads=1), "", *common.paragraph(LEGEND)]
    known: dict[Size, dict[str, float]] = {}
    for axis in options.only or AXES:
        for value in AXES[axis]:
            size = BASE._replace(**{axis: value})
            if size not in known:
                known[size] = in_fresh_process(size)
    if options.only:
        return
    import charts

    for name, up in (("seconds", "CPU seconds"), ("memory", "peak MiB")):
        key = "mib" if name == "memory" else name
        curves = {}
        for axis in AXES:
            points = series(known, axis, key)
            curves[f"{axis}: exponent {exponent(points):.2f}"] = [(x / AXES[axis][0], y) for x, y in points]
        charts.lines(options.out / f"scaling_{name}.svg", curves, "times the smallest of its axis", up, log_up=True)
    for axis in AXES:
        lines += ["", f"## {axis.capitalize()}", "", *section(known, axis)]
    lines += ["", "![CPU seconds by size](scaling_seconds.svg)", "", "![peak memory by size](scaling_memory.svg)"]
    common.publish(options.out, "scaling.md", lines)


def section(known: Mapping[Size, Mapping[str, float]], axis: str) -> list[str]:
    """A row per size of one axis, and the exponents below."""
    keys = (*STAGES, "mib")
    rows = []
    for value in AXES[axis]:
        found = known[BASE._replace(**{axis: value})]
        rows.append((f"{value:,}", *(f"{found[key]:.1f}" for key in STAGES), f"{found['mib']:.0f}"))
    slopes = [f"{exponent(series(known, axis, key)):.2f}" for key in keys]
    header = (axis, *(f"{name}, CPU s" for name in STAGES.values()), "peak, MiB")
    return common.table(header, [*rows, ("exponent", *slopes)])


def series(known: Mapping[Size, Mapping[str, float]], axis: str, key: str) -> list[tuple[float, float]]:
    """Points (size, figure) of one axis."""
    return [(float(value), known[BASE._replace(**{axis: value})][key]) for value in AXES[axis]]


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least squares line through the logarithms of points with positive coordinates."""
    across = [math.log(x) for x, _ in points]
    up = [math.log(y) for _, y in points]
    middle, level = sum(across) / len(points), sum(up) / len(points)
    steps = [x - middle for x in across]
    return sum(step * (y - level) for step, y in zip(steps, up, strict=True)) / sum(step * step for step in steps)


def in_fresh_process(size: Size) -> dict[str, float]:
    """What one size needs."""
    return common.in_fresh_process(__file__, "--one", *map(str, size))


def run(size: Size) -> dict[str, float]:
    """One size in this process: CPU seconds of calibration, of the rest and of both, and peak MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = nn.Sequential(*(Residual(size.width) for _ in range(size.depth))).eval()
    # Inputs whose eigenvalues fall as 1 / i, in a basis that no column follows.
    mixing = torch.linalg.qr(torch.randn(size.width, size.width)).Q
    rows = torch.randn(size.rows, size.width) * torch.arange(1, size.width + 1) ** -0.5 @ mixing
    batches = list(torch.split(rows, BATCH))
    with torch.no_grad():
        model(batches[0])
    # The first capture in a process imports and builds what every later one uses.
    small = nn.Sequential(Residual(8)).eval()
    optimize(small, list(torch.randn(5, 4, 8)), target=Keep(params=SHARE), compile=False, progress=False)
    before = _peak()
    started = time.process_time()
    calibration = calibrate(model, batches, progress=False)
    between = time.process_time()
    optimize(model, calibration, target=Keep(params=SHARE), compile=False, progress=False)
    ended = time.process_time()
    return {
        "calibrate": between - started,
        "rest": ended - between,
        "seconds": ended - started,
        "mib": max((_peak() - before) / MIB, 1.0),
    }


def _peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
