"""What pages and printed reports are drawn with: numbers as text, the trade-off chart, the templates."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowrank_fx.plan import TradeOff
from lowrank_fx.targets import Quantity

# ---- the trade-off curve ---------------------------------------------------------------------------------------------


def knee(curve: Sequence[TradeOff], quantity: Quantity) -> TradeOff | None:
    """The point of a trade-off curve beyond which a further saving costs more and more error.

    Share kept and error are scaled to the unit square; the knee is the point farthest below the chord from the
    smallest share kept (at the largest error) to the largest, that is with the largest ``1 - x - y``. Points with an
    error above 1 do not count: an output of zeros would be better, and how bad they are says nothing of the others.

    Source: Satopää, Albrecht, Irwin and Raghavan, "Finding a 'Kneedle' in a Haystack: Detecting Knee Points in System
    Behavior", 2011, section III, for a convex falling curve and without its smoothing.

    Args:
        curve: points in any order.
        quantity: ``"params"`` or ``"flops"``: which share of :class:`~lowrank_fx.plan.TradeOff` is x.

    Returns:
        A point of ``curve``, or None where no point lies below the chord or fewer than three count.
    """
    usable = [point for point in curve if point.error <= 1]
    points = sorted(usable, key=lambda point: (getattr(point, quantity), -point.error))
    if len(points) < 3:
        return None
    first, last = points[0], points[-1]
    width = getattr(last, quantity) - getattr(first, quantity)
    height = first.error - last.error
    if width <= 0 or height <= 0:
        return None

    def below(point: TradeOff) -> float:
        return float(
            1 - (getattr(point, quantity) - getattr(first, quantity)) / width - (point.error - last.error) / height
        )

    best = max(points[1:-1], key=below)
    return best if below(best) > 1e-9 else None


@dataclass(frozen=True)
class Mark:
    """A point to show on a chart.

    Attributes:
        kind: ``"asked"`` or ``"knee"``.
        label: what is written beside it.
        kept: share kept, the x coordinate.
        error: relative error, the y coordinate.
    """

    kind: str
    label: str
    kept: float
    error: float


@dataclass(frozen=True)
class _Placed:
    kind: str
    label: str
    x: float
    y: float
    label_x: float
    label_y: float


WIDTH = 1000
LEFT, RIGHT, TOP, BOTTOM = 60, 680, 20, 300
"""Edges of the plotting area of :func:`chart`; labels may run on to its right, up to ``WIDTH``."""

_LABEL_HEIGHT = 19
_LETTER_WIDTH = 6.8


def chart(
    curve: Sequence[TradeOff], quantity: Quantity, marks: Sequence[Mark], limit: tuple[str, float] | None = None
) -> Markup:
    """The trade-off curve as an SVG element, styled by the page's style sheet.

    Errors above 1 are cut off: an output of zeros would be better.

    Args:
        curve: predicted.
        quantity: what the x axis shows.
        marks: points to name beside the curve.
        limit: what was asked for, as a line to draw: ``("error", value)`` or ``("kept", share of the model)``.

    Returns:
        Markup that needs no further escaping; empty where the curve has fewer than two points.
    """
    if len(curve) < 2:
        return Markup()
    points = sorted((getattr(point, quantity), point.error) for point in curve)
    axis, value = ("", 0.0) if limit is None else limit
    kept = [x for x, _ in points] + [mark.kept for mark in marks] + [value] * (axis == "kept")
    errors = [min(y, 1.0) for _, y in points] + [mark.error for mark in marks] + [value] * (axis == "error")
    x_ticks = ticks(min(kept), max(kept), 7)
    y_ticks = ticks(0.0, max(max(errors), 1e-9), 5)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return round(LEFT + across * (RIGHT - LEFT), 1), round(BOTTOM - y / y_ticks[-1] * (BOTTOM - TOP), 1)

    drawn = (
        environment()
        .get_template("chart.svg.j2")
        .render(
            width=WIDTH,
            edges=(LEFT, RIGHT, TOP, BOTTOM),
            axis=axis,
            limit=place(value if axis == "kept" else x_ticks[0], value if axis == "error" else 0.0),
            quantity={"params": "parameters", "flops": "FLOPs"}[quantity],
            line=[place(x, y) for x, y in points],
            dots=[(*place(x, y), x, y) for x, y in points if y <= y_ticks[-1]],
            marks=_placed(marks, place),
            x_ticks=[(place(tick, 0)[0], f"{100 * tick:.0f} %") for tick in x_ticks],
            y_ticks=[(place(x_ticks[0], tick)[1], f"{tick:g}") for tick in y_ticks],
        )
    )
    return Markup(drawn)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers in equal steps that enclose ``[low, high]``, about ``most`` of them.

    >>> ticks(0.31, 1.0, 5)
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = max(high - low, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _placed(marks: Sequence[Mark], place: Callable[[float, float], tuple[float, float]]) -> list[_Placed]:
    """Marks with room for their labels: above and right of their points, where a falling curve leaves space."""
    done: list[_Placed] = []
    for mark in sorted(marks, key=lambda mark: mark.error):
        x, y = place(mark.kept, mark.error)
        left = min(x + 16, WIDTH - len(mark.label) * _LETTER_WIDTH)
        top = y - 14
        for other in sorted(done, key=lambda other: -other.label_y):
            apart = (
                left > other.label_x + len(other.label) * _LETTER_WIDTH
                or other.label_x > left + len(mark.label) * _LETTER_WIDTH
            )
            if not apart and abs(top - other.label_y) < _LABEL_HEIGHT:
                top = other.label_y - _LABEL_HEIGHT
        done.append(_Placed(mark.kind, mark.label, x, y, round(left, 1), round(top, 1)))
    return done


# ---- the page --------------------------------------------------------------------------------------------------------


@functools.cache
def environment() -> Environment:
    """The templates of the pages. Every value they print is escaped: layer names and reasons come from models."""
    made = Environment(
        loader=PackageLoader("lowrank_fx"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(percent=percent, number=number, scaled=scaled, count=count, speed=speed, seconds=seconds)
    made.globals.update(chart=chart)
    return made


# ---- numbers and lines -----------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share with one decimal, rounded so that less than all never reads as all.

    >>> percent(0.599), percent(0.99999)
    ('59.9 %', '>99.9 %')
    """
    text = f"{100 * share:.1f} %"
    return ">99.9 %" if text == "100.0 %" and share < 1 else text


def number(error: float) -> str:
    """A relative error with four decimals.

    >>> number(0.12341), number(0.0), number(2e-6)
    ('0.1234', '0', '<0.0001')
    """
    if error == 0:
        return "0"
    return "<0.0001" if abs(error) < 5e-5 else f"{error:.4f}"


def count(amount: int) -> str:
    """A whole number with separators.

    >>> count(22713216)
    '22,713,216'
    """
    return f"{amount:,}"


def scaled(amount: int) -> str:
    """A number with four digits and the prefix of its thousands.

    >>> scaled(12_310_000_000), scaled(999)
    ('12.31 G', '999')
    """
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if amount >= 10**power:
            return f"{amount / 10**power:.4g} {prefix}"
    return str(amount)


def speed(ratio: float) -> str:
    """A ratio of times.

    >>> speed(1.4567)
    '1.46x'
    """
    return f"{ratio:.2f}x"


def seconds(duration: float) -> str:
    """A duration with three digits, in the unit that fits.

    >>> seconds(0.03121), seconds(4.2e-05), seconds(2.5)
    ('31.2 ms', '42 us', '2.5 s')
    """
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if duration >= factor:
            return f"{duration / factor:.3g} {unit}"
    return f"{duration / 1e-9:.3g} ns"
