"""Charts of the benchmarks' pages, drawn by matplotlib as SVG files that are the same for the same figures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lowrank_fx._files import write_atomic

matplotlib.use("svg")
from matplotlib import pyplot

SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "lowrank_fx",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}
MARKERS = "osD^v<>P"


def lines(
    path: Path,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    up: str,
    *,
    level: float | None = None,
    log_up: bool = False,
) -> None:
    """A line with dots per curve over a logarithmic axis.

    Args:
        path: where the SVG goes; its folder is made if it does not exist.
        curves: points by name.
        across: what the horizontal axis is.
        up: what the vertical axis is.
        level: a height to be marked.
        log_up: whether the vertical axis is logarithmic too.
    """
    with matplotlib.rc_context(SETTINGS):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1.2, label=name)
        axes.set_xscale("log")
        if log_up:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if level is not None:
            axes.axhline(level, color="black", linewidth=0.8)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(fontsize=8)
        _write(figure, path)


def dots(path: Path, groups: Mapping[str, Sequence[tuple[float, float, str]]], across: str, up: str) -> None:
    """Dots with a word at each, in a colour and a shape per group, over a logarithmic axis.

    Args:
        path: where the SVG goes; its folder is made if it does not exist.
        groups: points and what is written at each, by name.
        across: what the horizontal axis is.
        up: what the vertical axis is.
    """
    with matplotlib.rc_context(SETTINGS):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for place, (name, points) in enumerate(groups.items()):
            x, y, words = zip(*points, strict=True)
            axes.scatter(x, y, s=22, marker=MARKERS[place % len(MARKERS)], label=name)
            for at in zip(x, y, words, strict=True):
                axes.annotate(at[2], at[:2], xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        if groups:
            axes.legend(fontsize=8)
        _write(figure, path)


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], up: str, *, level: float | None = None) -> None:
    """Bars side by side, a group per name.

    Args:
        path: where the SVG goes; its folder is made if it does not exist.
        groups: heights by bar's name, by group's name.
        up: what the vertical axis is.
        level: a height to be marked.
    """
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(len(names), 1)
    with matplotlib.rc_context(SETTINGS):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for place, name in enumerate(names):
            at = [
                at + (place - (len(names) - 1) / 2) * width for at, group in enumerate(groups.values()) if name in group
            ]
            axes.bar(at, [group[name] for group in groups.values() if name in group], width, label=name)
        axes.set_xticks(range(len(groups)), list(groups), rotation=20, ha="right")
        if level is not None:
            axes.axhline(level, color="black", linewidth=0.8)
        axes.set_ylabel(up)
        axes.legend(fontsize=8)
        _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, drawn.getvalue())
