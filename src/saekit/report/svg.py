"""Charts as SVG: the same numbers give the same bytes, text stays text, colours follow the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ..terminal import plain
from .marks import GREY, LONGEST, LONGEST_TITLE, MUTED, PALETTE, Axis, Box, Chart, Line, Points, Rule, Span, Wedge, cut
from .numbers import number

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "12 4", "4 2", "1 2", "14 3 3 3")
"""Patterns of lines, so that series differ without colour."""

_LETTER = 7.2
"""Width of a letter of 12 px, about."""

STYLE = "".join(f".c{index}{{color:{colour}}}" for index, colour in enumerate(PALETTE)) + f".cm{{color:{GREY}}}"
"""Colours of a file of its own; a page has rules of its own."""

_FONT = "font-family:system-ui,sans-serif;font-size:12px"


@dataclass(frozen=True)
class Scale:
    """Where a value of an axis is drawn."""

    axis: Axis
    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """Return the place of a value in the drawing."""
        to = _forward(self.axis)
        low, high = to(self.low), to(self.high)
        return self.start + (to(value) - low) / ((high - low) or 1.0) * (self.stop - self.start)

    def ticks(self, room: int) -> list[tuple[float, str]]:
        """Return values with their labels, as many as have room."""
        if self.axis.scale == "names":
            return [(at, cut(name, LONGEST)) for at, name in enumerate(self.axis.names)]
        if self.axis.scale == "log":
            return _log_ticks(self.low, self.high, room, binary=self.axis.binary)
        return _linear_ticks(self.low, self.high, room)


def _forward(axis: Axis) -> Callable[[float], float]:
    return (lambda value: math.log(max(value, 1e-300))) if axis.scale == "log" else float


def _linear_ticks(low: float, high: float, room: int) -> list[tuple[float, str]]:
    rough = (high - low) / max(room, 1)
    power = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    values = [n * step for n in range(first, first + 4 * room + 4) if n * step <= high + 1e-9 * abs(step)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) + (1 if f"{step:e}"[:3] == "2.5" else 0)
    return [(value, f"{value + 0.0:,.{decimals}f}".replace("-", "−")) for value in values]


def _log_ticks(low: float, high: float, room: int, *, binary: bool) -> list[tuple[float, str]]:
    base = 2 if binary else 10
    if not binary and high < 10 * low:
        return [tick for tick in _linear_ticks(low, high, room) if tick[0] > 0]
    first, last = math.floor(math.log(low, base) - 1e-9), math.ceil(math.log(high, base) + 1e-9)
    factors = (1,) if binary or last - first > 3 else (1, 2, 5)
    values = [base**n * f for n in range(first, last + 1) for f in factors]
    values = [value for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
    step = max(1, math.ceil(len(values) / max(room, 1)))
    return [(value, number(value) if value >= 1 else f"{value:g}") for value in values[::step]]


# ------------------------------------------------------------------------------------------------------- the drawing


def svg(chart: Chart, width: int = 680, *, in_page: bool = False) -> str:
    """Return SVG text of a width; within a page, that has the colours and shows what each mark tells on hover."""
    ring = any(isinstance(mark, Wedge) for mark in chart.marks)
    draw = _ring if ring else _plot
    parts, hover, height = draw(chart, width)
    told = escape(json.dumps(hover, ensure_ascii=False, separators=(",", ":")))
    own = (
        f'data-hover="{told}">'
        if in_page
        else f'xmlns="http://www.w3.org/2000/svg" style="{_FONT}"><style>{STYLE}</style>'
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img" {own}{"".join(parts)}</svg>'


Told = list[tuple[float, float, str]]


def _plot(chart: Chart, width: int) -> tuple[list[str], Told, int]:
    legend, top = _legend(chart, width)
    longest = width // 3 if width < 500 else width // 2
    left, is_above = _left(chart, longest)
    height = chart.height + top + (12 * len(chart.y.names) if is_above else 0)
    drop = _drop(chart.x) if chart.x.scale == "names" and chart.x.names else 0.0
    turned = drop > 0 and _widest(chart.x) > (width - left - 12) / len(chart.x.names) - 4
    bottom = 26.0 + (18 if chart.x.title else 0) + (drop if turned else 0)
    title = 16 if chart.y.title else 4
    x = _scale(chart, chart.x, "x", left, width - 14.0)
    y = _scale(chart, chart.y, "y", height - bottom, top + title + 8.0)
    names = _names_above(chart.y, x, y) if is_above else _y_axis(chart.y, x, y, (left, longest))
    parts = [*legend, *_x_axis(chart.x, x, y, turned), *names]
    if chart.y.title:
        parts.append(_text(4, top + 10, cut(chart.y.title, LONGEST_TITLE), "start", soft=True))
    for mark in chart.marks:
        parts += _mark(mark, x, y)
    hover = [(round(x(at), 1), round(y(value), 1), plain(text, keep="\n")) for at, value, text in chart.hover]
    return parts, hover, round(height)


def _left(chart: Chart, longest: int) -> tuple[float, bool]:
    """Return the room at the left for the labels of y, and whether names stand above their marks instead."""
    if chart.y.scale != "names":
        return 52.0, False
    wanted = _widest(chart.y) + 14
    is_above = wanted > longest and not any(isinstance(mark, Box) for mark in chart.marks)
    return (8.0 if is_above else min(wanted, longest)), is_above


def _widest(axis: Axis) -> float:
    return max((_LETTER * len(cut(name, LONGEST)) for name in axis.names), default=0.0)


def _scale(chart: Chart, axis: Axis, which: str, start: float, stop: float) -> Scale:
    """Return the scale that has room for all marks."""
    if axis.scale == "names":
        n = max(len(axis.names), 1)
        ends = (n - 0.5, -0.5) if which == "y" else (-0.5, n - 0.5)
        return Scale(axis, *ends, start, stop)
    values = [value for mark in chart.marks for value in _extent(mark, which) if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if axis.scale == "log":
        low, high = max(low, 1e-12), max(high, 1e-12)
        return (
            Scale(axis, low / 1.06, high * 1.06, start, stop)
            if high > low
            else Scale(axis, low / 2, high * 2, start, stop)
        )
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
    low = low - margin if axis.low is None else min(axis.low, low)
    high = high + margin if axis.high is None else max(axis.high, high)
    return Scale(axis, low, high, start, stop)


def _extent(mark: object, which: str) -> Sequence[float]:
    """Return the values of a mark along an axis that must have room."""
    if isinstance(mark, Line | Points):
        return [value for value in (mark.xs if which == "x" else mark.ys) if value is not None]
    if isinstance(mark, Span | Box):
        return mark.x if which == "x" else mark.y
    if isinstance(mark, Rule) and mark.axis == which:
        return [mark.at, *(mark.band or ())]
    return ()


def _x_axis(axis: Axis, x: Scale, y: Scale, turned: bool) -> Iterator[str]:
    foot = y.start
    yield f'<path class="axis" d="M{x.start:.1f} {foot:.1f}H{x.stop:.1f}" stroke="currentColor" opacity=".5"/>'
    for value, label in x.ticks(max(2, int((x.stop - x.start) / 64))):
        at = x(value)
        if axis.scale != "names":
            yield _grid(f"M{at:.1f} {foot:.1f}V{y.stop:.1f}")
        if turned:
            where = f'transform="translate({at + 4:.1f} {foot + 12:.1f}) rotate(-40)"'
            yield f'<text {where} text-anchor="end" fill="currentColor">{escape(cut(label, 24))}</text>'
        else:
            yield _text(at, foot + 16, label, "middle")
    if axis.title:
        yield _text(
            x.stop, foot + (34 if not turned else 26 + _drop(axis)), cut(axis.title, LONGEST_TITLE), "end", soft=True
        )


def _drop(axis: Axis) -> float:
    return min(_widest(axis), 150) * 0.75


def _y_axis(axis: Axis, x: Scale, y: Scale, room: tuple[float, float]) -> Iterator[str]:
    left, longest = room
    letters = max(4, int((min(left, longest) - 12) / _LETTER))
    for value, label in y.ticks(max(2, int(abs(y.start - y.stop) / 46))):
        at = y(value)
        if axis.scale != "names":
            yield _grid(f"M{x.start:.1f} {at:.1f}H{x.stop:.1f}")
        yield _text(left - 7, at + 4, cut(label, letters), "end")


def _names_above(axis: Axis, x: Scale, y: Scale) -> Iterator[str]:
    """Write each name over its marks: there is no room for them at the side."""
    for at, name in enumerate(axis.names):
        yield _text(x.start, y(at) - 9, cut(name, int((x.stop - x.start) / _LETTER)), "start")


def _grid(path: str) -> str:
    return f'<path d="{path}" stroke="currentColor" opacity=".12"/>'


def _text(x: float, y: float, text: str, anchor: str, *, soft: bool = False) -> str:
    tone = ' opacity=".7"' if soft else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"{tone}>{escape(plain(text))}</text>'
    )


def _legend(chart: Chart, width: int) -> tuple[list[str], float]:
    """Return the names of the series above the chart, in as many lines as they need, and their height."""
    if not chart.legend or any(isinstance(mark, Wedge) for mark in chart.marks):
        return [], 0
    parts, at, line = [], 4.0, 12.0
    lined = any(isinstance(mark, Line) for mark in chart.marks)
    for name, series in chart.legend:
        shown = cut(name, min(LONGEST + 20, int((width - 40) / _LETTER)))
        wide = 30 + _LETTER * len(shown) + 14
        if at + wide > width and at > 4:
            at, line = 4.0, line + 18
        dash = _dash(series)
        key = (
            f'<path d="M{at:.1f} {line - 4:.1f}h18" stroke-width="2.4"{dash}/>'
            if lined or series < 0
            else (f'<path d="M{at + 4:.1f} {line - 9:.1f}h10v10h-10z" fill="currentColor" stroke="none"/>')
        )
        parts.append(f'<g class="{_class(series)}" stroke="currentColor" fill="none">{key}</g>')
        parts.append(_text(at + 24, line, shown, "start"))
        at += wide
    return parts, line + 8


def _class(series: int) -> str:
    return "cm" if series == MUTED else f"c{series % len(PALETTE)}"


def _dash(series: int) -> str:
    if series == MUTED:
        return ' stroke-dasharray="5 4"'
    pattern = _DASHES[series % len(_DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _mark(mark: object, x: Scale, y: Scale) -> Iterator[str]:
    if isinstance(mark, Line):
        yield from _line(mark, x, y)
    elif isinstance(mark, Points):
        path = "".join(f"M{x(at):.1f} {y(value):.1f}h0" for at, value in zip(mark.xs, mark.ys) if value is not None)
        yield _round(mark.series, path, 5, ".45")
    elif isinstance(mark, Span):
        path = f"M{x(mark.x[0]):.1f} {y(mark.y[0]):.1f}L{x(mark.x[1]):.1f} {y(mark.y[1]):.1f}"
        yield _round(mark.series, path, 5, ".35")
    elif isinstance(mark, Box):
        yield from _box(mark, x, y)
    elif isinstance(mark, Rule):
        yield from _rule(mark, x, y)


def _round(series: int, path: str, width: int, opacity: str) -> str:
    tone = f'stroke-linecap="round" opacity="{opacity}"'
    return f'<path class="{_class(series)}" d="{path}" {_STROKE} stroke-width="{width}" {tone}/>'


_STROKE = 'stroke="currentColor" fill="none"'


def _line(mark: Line, x: Scale, y: Scale) -> Iterator[str]:
    path, pen = [], "M"
    places = [(x(at), None if value is None else y(value)) for at, value in zip(mark.xs, mark.ys)]
    half = (places[1][0] - places[0][0]) / 2 if mark.steps and len(places) > 1 else 0.0
    for at, height in places:
        if height is None:
            pen = "M"
            continue
        path.append(f"{pen}{at - half:.1f} {height:.1f}" + (f"H{at + half:.1f}" if half else ""))
        pen = "L"
    own = _class(mark.series)
    dash = "" if mark.series == MUTED else _dash(mark.series)
    if len(path) > 1:
        yield f'<path class="{own}" d="{"".join(path)}" {_STROKE} stroke-width="2"{dash} stroke-linejoin="round"/>'
    if mark.dots or len(path) == 1:
        dots = "".join(f"M{at:.1f} {height:.1f}h0" for at, height in places if height is not None)
        yield f'<path class="{own}" d="{dots}" {_STROKE} stroke-width="8" stroke-linecap="round"/>'


def _box(mark: Box, x: Scale, y: Scale) -> Iterator[str]:
    left, right = sorted(x(side) for side in mark.x)
    top, bottom = sorted(y(side) for side in mark.y)
    gap = 0.8 if mark.text else 0.0
    shade = "" if mark.shade >= 1 and not mark.text else f' opacity="{0.1 + 0.8 * min(mark.shade, 1.0):.2f}"'
    yield (
        f'<rect class="{_class(mark.series)}" x="{left + gap:.1f}" y="{top + gap:.1f}" '
        f'width="{max(right - left - 2 * gap, 0.5):.1f}" height="{max(bottom - top - 2 * gap, 0.5):.1f}" '
        f'fill="currentColor"{shade}/>'
    )
    if mark.text:
        tone = ' class="onfill"' if mark.shade > 0.55 else ""
        yield (
            f'<text x="{(left + right) / 2:.1f}" y="{(top + bottom) / 2 + 4:.1f}" text-anchor="middle" '
            f'fill="{"#fff" if tone else "currentColor"}"{tone}>{escape(mark.text)}</text>'
        )


def _rule(mark: Rule, x: Scale, y: Scale) -> Iterator[str]:
    if mark.band is not None and mark.axis == "y":
        top, bottom = sorted(y(end) for end in mark.band)
        yield (
            f'<rect class="cm" x="{x.start:.1f}" y="{top:.1f}" width="{x.stop - x.start:.1f}" '
            f'height="{bottom - top:.1f}" fill="currentColor" opacity=".18"/>'
        )
    across = (
        f"M{x(mark.at):.1f} {y.start:.1f}V{y.stop:.1f}"
        if mark.axis == "x"
        else f"M{x.start:.1f} {y(mark.at):.1f}H{x.stop:.1f}"
    )
    yield f'<path class="cm" d="{across}" {_STROKE} stroke-width="1.4" stroke-dasharray="5 4"/>'


def _ring(chart: Chart, width: int) -> tuple[list[str], Told, int]:
    height, outer, inner = chart.height, chart.height / 2 - 10, chart.height / 2 - 52
    at = (outer + 10, height / 2)
    parts = []
    for mark in chart.marks:
        if isinstance(mark, Wedge) and mark.stop > mark.start:
            parts.append(
                f'<path class="{_class(mark.series)}" d="{_sector(mark, at, outer, inner)}" fill="currentColor"/>'
            )
    parts.append(_text(at[0], at[1] + 4, cut(chart.centre, LONGEST_TITLE), "middle"))
    beside = width > 2 * outer + 150
    left, line = (2 * outer + 36, at[1] - 9 * len(chart.legend) + 8) if beside else (6.0, height + 8.0)
    for name, series in chart.legend:
        parts.append(f'<path class="{_class(series)}" d="M{left:.1f} {line - 10:.1f}h11v11h-11z" fill="currentColor"/>')
        parts.append(_text(left + 18, line, cut(name, int((width - left - 20) / _LETTER)), "start"))
        line += 19
    hover = [
        (round(at[0] + outer * x, 1), round(at[1] - outer * y, 1), plain(text, keep="\n")) for x, y, text in chart.hover
    ]
    return parts, hover, round(max(height, line))


def _sector(mark: Wedge, at: tuple[float, float], outer: float, inner: float) -> str:
    stop = min(mark.stop, mark.start + 0.9999)  # a whole turn would be no arc at all
    large = int(stop - mark.start > 0.5)

    def place(turn: float, radius: float) -> str:
        return (
            f"{at[0] + radius * math.sin(2 * math.pi * turn):.2f} {at[1] - radius * math.cos(2 * math.pi * turn):.2f}"
        )

    return (
        f"M{place(mark.start, outer)}A{outer} {outer} 0 {large} 1 {place(stop, outer)}"
        f"L{place(stop, inner)}A{inner} {inner} 0 {large} 0 {place(mark.start, inner)}Z"
    )
