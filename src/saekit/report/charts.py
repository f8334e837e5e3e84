"""Charts of the report: each is made of numbers, and can be drawn as SVG or PNG or written as a table."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from ..files import check_path, write_bytes
from .marks import LONGEST, MUTED, Axis, Box, Chart, Hover, Line, Mark, Points, Rule, Span, Wedge, cut
from .numbers import Quantity, has_interval, number, told

MOST_POINTS = 1500
"""A cloud of more points is drawn as counts per cell."""

MOST_HOVER = 240
"""Points of a line that tell their numbers; a longer line tells as many, evenly spread."""

Series = tuple[Sequence[float], Sequence[float | None]]
"""Positions of points on both axes."""

Charts = Mapping[str, tuple[Chart, str]]
"""Charts with their captions, by name."""


def write_charts(drawn: Charts, folder: str | os.PathLike[str], prefix: str) -> list[Path]:
    """Write each chart as ``<prefix>-<name>.svg`` and ``.png`` into `folder` and return the paths."""
    written = []
    for name, (chart, _) in drawn.items():
        stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in f"{prefix}-{name}")
        for ending, data in ((".svg", chart.svg().encode()), (".png", chart.png())):
            written.append(check_path(folder) / f"{stem}{ending}")
            write_bytes(written[-1], data)
    return written


def lines(series: Mapping[str, Series], *, x: str, y: str, log_y: bool = False, steps: bool = False) -> Chart:
    """Draw a line per name; `x` and `y` are axis titles. Undefined points are gaps."""
    marks: list[Mark] = []
    hover: list[Hover] = []
    rows, values = [], []
    for index, (name, (xs, ys)) in enumerate(series.items()):
        known = [(at, value) for at, value in zip(xs, ys) if value is not None and (value > 0 or not log_y)]
        marks.append(Line(index, xs, [v if v is not None and (v > 0 or not log_y) else None for v in ys], steps=steps))
        hover += [
            (at, value, f"{_label(name)}{x}: {number(at)}\n{y}: {number(value)}") for at, value in _thinned(known)
        ]
        rows += [(name, at, value) for at, value in known]
        values += [value for _, value in known]
    return Chart(
        Axis(x), Axis(y, "log" if log_y else "linear"), marks, ("series", x, y), rows, _legend(series), hover,
        values=values,
    )  # fmt: skip


def intervals(points: Sequence[tuple[str, Quantity, bool]], *, x: str, from_zero: bool = True) -> Chart:
    """Draw a dot with its interval for each ``(name, measured, is control)``, one below another; controls are grey."""
    marks: list[Mark] = []
    hover, rows, values = [], [], []
    known = [(name, each, muted) for name, each, muted in points if each["value"] is not None]
    for row, (name, each, is_control) in enumerate(known):
        colour = MUTED if is_control else 0
        if has_interval(each):
            marks.append(Span(colour, (each["low"], each["high"]), (row, row)))
        marks.append(Line(colour, [each["value"]], [row], dots=True))
        hover.append((each["value"], row, f"{name}\n{x}: {told(each)}"))
        rows.append((name, each["value"], each.get("low"), each.get("high")))
        values += [v for v in (each["value"], each.get("low"), each.get("high")) if v is not None]
    return Chart(
        Axis(x, low=0.0 if from_zero else None), Axis("", "names", [name for name, _, _ in known]), marks,
        ("name", "value", "low", "high"), rows, (), hover, 62 + 26 * len(known), values=values,
    )  # fmt: skip


def histogram(
    series: Mapping[str, Sequence[float]], edges: Sequence[float], *, x: str, y: str, marks: Mapping[str, float]
) -> Chart:
    """Draw the fraction of the values of each name between `edges`; `marks` are labelled upright lines."""
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    drawn: list[Mark] = []
    hover: list[Hover] = []
    rows: list[Sequence[object]] = []
    for index, (name, values) in enumerate(series.items()):
        counts = [0] * len(middles)
        for value in values:
            at = int((value - edges[0]) / (edges[-1] - edges[0]) * len(middles))
            counts[min(max(at, 0), len(middles) - 1)] += 1
        fractions = [count / max(len(values), 1) for count in counts]
        drawn.append(Line(index, middles, fractions, steps=True))
        for (low, high), middle, count, fraction in zip(pairwise(edges), middles, counts, fractions):
            if count:
                hover.append(
                    (middle, fraction, f"{name}\n{x}: {number(low)} to {number(high)}\n{number(fraction)} ({count:,})")
                )
                rows.append((name, low, high, count))
    for name, value in marks.items():
        drawn.append(Rule("x", value))
        hover.append((value, 0.0, f"{name}: {number(value)}"))
    legend = [*_legend(series), *((f"{name}: {number(value)}", MUTED) for name, value in marks.items())]
    return Chart(Axis(x), Axis(y, low=0.0), drawn, ("series", "from", "to", "count"), rows, legend, hover)


def scatter(
    groups: Mapping[str, Series], *, x: str, y: str, log_x: bool = False, threshold: float | None = None
) -> Chart:
    """Draw the points of each name, or counts per cell where there are very many.

    A `threshold` is for two quantities of one kind: a dashed line on both axes, in a nearly square chart.
    """
    named = [(name, at, value) for name, (xs, ys) in groups.items() for at, value in zip(xs, ys) if value is not None]
    rules = [] if threshold is None else [Rule("x", threshold), Rule("y", threshold)]
    axes = (Axis(x, "log" if log_x else "linear"), Axis(y))
    height = 300 if threshold is None else 420
    if len(named) > MOST_POINTS:
        boxes, hover, cells = _cells(named, x, y, log_x)
        columns = (f"{x} from", f"{x} to", f"{y} from", f"{y} to", "count")
        return Chart(*axes, [*boxes, *rules], columns, cells, (), hover, height)
    hover = [(at, value, f"{_label(name)}{x}: {number(at)}\n{y}: {number(value)}") for name, at, value in named]
    drawn = [Points(index, xs, ys) for index, (xs, ys) in enumerate(groups.values())]
    legend = [(name, index) for index, name in enumerate(groups) if name]
    return Chart(*axes, [*drawn, *rules], ("group", x, y), named, legend, hover, height)


def _cells(
    named: Sequence[tuple[str, float, float]], x: str, y: str, log_x: bool
) -> tuple[list[Mark], list[Hover], list[Sequence[object]]]:
    """Return counts per cell of a grid, shaded by their logarithm."""
    grid = (44, 30)
    to = math.log10 if log_x else float
    back = (lambda value: 10**value) if log_x else float
    xs, ys = [to(at) for _, at, _ in named], [value for _, _, value in named]
    low, high = (min(xs), min(ys)), (max(xs), max(ys))
    step = [((b - a) or 1.0) / n for a, b, n in zip(low, high, grid)]
    counts: dict[tuple[int, int], int] = {}
    for at, value in zip(xs, ys):
        key = (min(int((at - low[0]) / step[0]), grid[0] - 1), min(int((value - low[1]) / step[1]), grid[1] - 1))
        counts[key] = counts.get(key, 0) + 1
    largest = max(counts.values())
    marks: list[Mark] = []
    hover: list[Hover] = []
    rows: list[Sequence[object]] = []
    for (i, j), count in sorted(counts.items()):
        side = (back(low[0] + i * step[0]), back(low[0] + (i + 1) * step[0]))
        rise = (low[1] + j * step[1], low[1] + (j + 1) * step[1])
        marks.append(Box(0, side, rise, 0.2 + 0.8 * math.log1p(count) / math.log1p(largest)))
        middle = back(low[0] + (i + 0.5) * step[0])
        about = f"{count:,} {'point' if count == 1 else 'points'}\n{x}: {number(side[0])} to {number(side[1])}"
        hover.append((middle, sum(rise) / 2, f"{about}\n{y}: {number(rise[0])} to {number(rise[1])}"))
        rows.append((*side, *rise, count))
    return marks, hover, rows


def donut(values: Sequence[tuple[str, float]], *, centre: str) -> Chart:
    """Draw a ring of fractions with their labels; `centre` stands in the middle."""
    fractions = [max(value, 0.0) for _, value in values]
    total, start = sum(fractions) or 1.0, 0.0
    marks, hover = [], []
    for index, ((name, value), fraction) in enumerate(zip(values, fractions)):
        stop = start + fraction / total
        marks.append(Wedge(index, start, stop))
        middle = math.pi * (start + stop)
        hover.append((0.8 * math.sin(middle), 0.8 * math.cos(middle), f"{name}: {value:.1%}"))
        start = stop
    legend = [(f"{cut(name, LONGEST)}: {value:.1%}", index) for index, (name, value) in enumerate(values)]
    rows = list(values) if any(fractions) else []
    axes = (Axis("", low=-1.0, high=1.0), Axis("", low=-1.0, high=1.0))
    return Chart(*axes, marks, ("part", "fraction"), rows, legend, hover, 240, centre)


def curves(
    series: Mapping[str, Sequence[tuple[float, Quantity]]],
    *,
    x: str,
    y: str,
    from_zero: bool = True,
    level: tuple[str, Quantity] | None = None,
) -> Chart:
    """Draw a line of ``(x, measured)`` per name, with intervals, over a logarithmic axis of x.

    A `level` is one measured quantity to compare them with, drawn across.
    """
    marks: list[Mark] = []
    hover: list[Hover] = []
    rows: list[Sequence[object]] = []
    legend = _legend(series) if len(series) > 1 or level else []
    if level is not None and level[1]["value"] is not None:
        marks.append(
            Rule("y", level[1]["value"], (level[1]["low"], level[1]["high"]) if has_interval(level[1]) else None)
        )
        rows.append((level[0], None, level[1]["value"], level[1].get("low"), level[1].get("high")))
        legend.append((f"{level[0]}: {told(level[1])}", MUTED))
    for index, (name, points) in enumerate(series.items()):
        known = [(at, each) for at, each in points if each["value"] is not None]
        marks += [Span(index, (at, at), (each["low"], each["high"])) for at, each in known if has_interval(each)]
        marks.append(Line(index, [at for at, _ in known], [each["value"] for _, each in known], dots=True))
        hover += [(at, each["value"], f"{_label(name)}{x}: {number(at)}\n{y}: {told(each)}") for at, each in known]
        rows += [(name, at, each["value"], each.get("low"), each.get("high")) for at, each in known]
    values = [each["value"] for points in series.values() for _, each in points if each["value"] is not None]
    axes = (Axis(x, "log", binary=True), Axis(y, low=0.0 if from_zero else None))
    return Chart(*axes, marks, ("series", x, y, "low", "high"), rows, legend, hover, values=values)


def bars(groups: Mapping[str, Mapping[str, Quantity]], *, x: str = "", y: str) -> Chart:
    """Draw bars with intervals, those of a group side by side: ``{group: {name: measured}}``."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(len(names), 1)
    marks: list[Mark] = []
    hover: list[Hover] = []
    rows: list[Sequence[object]] = []
    for at, (group, measured) in enumerate(groups.items()):
        for name, each in measured.items():
            if each["value"] is None:
                continue
            index = names.index(name)
            middle = at + (index - (len(names) - 1) / 2) * width
            marks.append(Box(index, (middle - 0.46 * width, middle + 0.46 * width), (0.0, each["value"])))
            if has_interval(each):
                marks.append(Span(MUTED, (middle, middle), (each["low"], each["high"])))
            hover.append((middle, each["value"], f"{' '.join(filter(None, (group, name)))}\n{y}: {told(each)}"))
            rows.append((group, name, each["value"], each.get("low"), each.get("high")))
    legend = [(name, index) for index, name in enumerate(names)] if len(names) > 1 else []
    axes = (Axis(x, "names", list(groups)), Axis(y, low=0.0))
    return Chart(*axes, marks, ("group", "name", "value", "low", "high"), rows, legend, hover)


def bars_across(parts: Sequence[tuple[str, float]], *, x: str) -> Chart:
    """Draw a bar from 0 to each value, one below another; those below 0 in another colour."""
    marks = [
        Box(int(value < 0), (min(0.0, value), max(0.0, value)), (at - 0.36, at + 0.36))
        for at, (_, value) in enumerate(parts)
    ]
    hover = [(value, at, f"{name}\n{x}: {number(value)}") for at, (name, value) in enumerate(parts)]
    axes = (Axis(x), Axis("", "names", [name for name, _ in parts]))
    return Chart(*axes, marks, ("name", "value"), list(parts), (), hover, 62 + 24 * len(parts))


def heat_map(
    numbers: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x: str,
    y: str,
    quantity: str = "",
    centred: bool = False,
    bracketed: Sequence[Sequence[bool]] | None = None,
) -> Chart:
    """Draw a table of numbers as colours, each with its number in it.

    Parameters
    ----------
    numbers
        A value for each row and column, or None.
    rows, columns, x, y
        Names of the rows and columns, and titles of the axes.
    quantity
        What the numbers are.
    centred
        Two colours from 0 to 1 that part at 0.5, instead of one from the smallest to the largest number.
    bracketed
        Numbers that stand in brackets.
    """
    known = [each for line in numbers for each in line if each is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    marks: list[Mark] = []
    hover: list[Hover] = []
    data: list[Sequence[object]] = []
    for i, line in enumerate(numbers):
        for j, each in enumerate(line):
            if each is None:
                continue
            text = f"{each:.2f}" if centred else f"{each:.3f}"
            shade = abs(each - 0.5) * 2 if centred else (each - low) / ((high - low) or 1.0)
            shown = f"({text})" if bracketed is not None and bracketed[i][j] else text
            marks.append(Box(int(centred and each < 0.5), (j - 0.5, j + 0.5), (i - 0.5, i + 0.5), shade, shown))
            hover.append((j, i, f"{y}: {rows[i]}\n{x}: {columns[j]}\n{shown}"))
            data.append((rows[i], columns[j], each))
    axes = (Axis(x, "names", columns), Axis(y, "names", rows))
    return Chart(*axes, marks, (y, x, "value"), data, (), hover, 110 + 34 * len(rows), values=known, quantity=quantity)


def _thinned(points: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / MOST_HOVER))
    return iter(points[::-step][::-1])  # the last one is always among them


def _legend(series: Mapping[str, object]) -> list[tuple[str, int]]:
    return [(name, index) for index, name in enumerate(series)] if len(series) > 1 else []


def _label(name: str) -> str:
    return f"{name}\n" if name else ""
