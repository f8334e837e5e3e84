"""Charts as inline SVG: the same numbers give the same bytes, text stays text, colours follow the page."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_bytes
from ..terminal import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, and legible on light and dark ground.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
MUTED = "#8a8f98"
_INK = "#123456"  # a placeholder, replaced by the text colour of the page
_PAPER_INK = "#22272e"
MOST_POINTS = 2000
"""A cloud of more points is drawn as an image inside the chart."""
MOST_SINGLE = 20_000
"""A larger cloud is drawn as counts per cell, not as points."""

_STYLE: Any = {
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "saekit",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}

Series = tuple[Sequence[float], Sequence[float]]
"""Positions of points on both axes."""

Quantity = Mapping[str, Any]
"""A measured quantity as in JSON: `value`, `low`, `high`."""


@dataclass(frozen=True)
class Chart:
    """A chart before it has a format."""

    draw: Callable[[Axes], None]
    size: tuple[float, float]
    """Width and height in inches."""

    def svg(self) -> str:
        """Return SVG text for a page or a file of its own."""
        stream = io.StringIO()
        with _styled(self, _STYLE) as figure:
            figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
        return _inline(stream.getvalue())

    def png(self) -> bytes:
        """Return a PNG on white, for documents that take no SVG."""
        stream = io.BytesIO()
        inked = {key: _PAPER_INK if value == _INK else value for key, value in _STYLE.items()}
        with _styled(self, inked) as figure:
            figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
        return stream.getvalue()


Charts = Mapping[str, tuple[Chart, str]]
"""Charts with their captions, by name."""


def write_charts(drawn: Charts, folder: str | os.PathLike[str], prefix: str) -> list[Path]:
    """Write each chart as ``<prefix>-<name>.svg`` and ``.png`` into `folder` and return the paths."""
    written = []
    for name, (chart, _) in drawn.items():
        stem = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in f"{prefix}-{name}")
        for ending, data in ((".svg", chart.svg().encode()), (".png", chart.png())):
            written.append(Path(folder) / f"{stem}{ending}")
            write_bytes(written[-1], data)
    return written


def lines(series: Mapping[str, Series], *, x: str, y: str, log_y: bool = False, steps: bool = False) -> Chart:
    """Draw a line per name; `x` and `y` are axis titles. Undefined points are gaps."""

    def draw(axes: Axes) -> None:
        for index, (name, (xs, ys)) in enumerate(series.items()):
            axes.plot(
                [float(v) for v in xs],
                [float("nan") if v is None else float(v) for v in ys],
                label=_plain(name),
                color=_colour(index),
                linestyle=_line_style(index),
                drawstyle="steps-mid" if steps else "default",
            )
        if log_y:
            _logarithmic(axes, "y")
        axes.set(xlabel=_title(x), ylabel=_title(y))
        if len(series) > 1:
            axes.legend(fontsize=8)

    return Chart(draw, (6.4, 3.0))


def intervals(points: Sequence[tuple[str, Quantity, bool]], *, x: str, from_zero: bool = True) -> Chart:
    """Draw a dot with its interval for each ``(name, measured, is control)``, one below another; controls are grey."""

    def draw(axes: Axes) -> None:
        for row, (_, measured, is_control) in enumerate(points):
            colour = MUTED if is_control else PALETTE[0]
            if _has_interval(measured):
                axes.plot([measured["low"], measured["high"]], [row, row], color=colour, linewidth=2.5, alpha=0.6)
            if measured["value"] is not None:
                axes.plot([measured["value"]], [row], marker="o", color=colour, markersize=5)
        axes.set_yticks(range(len(points)), [_plain(name) for name, _, _ in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.set_xlabel(_title(x))
        if from_zero:
            axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)

    return Chart(draw, (6.4, 0.7 + 0.28 * len(points)))


def histogram(
    series: Mapping[str, Sequence[float]], edges: Sequence[float], *, x: str, y: str, marks: Mapping[str, float]
) -> Chart:
    """Draw the fraction of the values of each name between `edges`; `marks` are labelled upright lines."""

    def draw(axes: Axes) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        for index, (name, values) in enumerate(series.items()):
            counts = [0] * len(middles)
            for value in values:
                place = int((value - edges[0]) / (edges[-1] - edges[0]) * len(middles))
                counts[min(max(place, 0), len(middles) - 1)] += 1
            fractions = [count / max(len(values), 1) for count in counts]
            axes.plot(middles, fractions, drawstyle="steps-mid", color=_colour(index), label=_plain(name))
        for index, (name, at) in enumerate(marks.items()):
            axes.axvline(at, color=MUTED, linestyle=("--", ":", "-.")[index % 3], label=_plain(name))
        axes.set(xlabel=_title(x), ylabel=_title(y))
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)

    return Chart(draw, (6.4, 3.0))


def scatter(
    groups: Mapping[str, Series], *, x: str, y: str, log_x: bool = False, threshold: float | None = None
) -> Chart:
    """Draw the points of each name, or their density where there are very many.

    A `threshold` is for two quantities of one kind: a dashed line on both axes, in a nearly square chart.
    """
    n = sum(len(xs) for xs, _ in groups.values())

    def draw_points(axes: Axes) -> None:
        for index, (name, (xs, ys)) in enumerate(groups.items()):
            axes.scatter(
                xs, ys, s=4 if n > MOST_POINTS else 9, alpha=0.4, linewidths=0, color=_colour(index),
                label=_plain(name), rasterized=n > MOST_POINTS,
            )  # fmt: skip
        if threshold is not None:
            axes.axvline(threshold, color=MUTED, linestyle="--", linewidth=1)
            axes.axhline(threshold, color=MUTED, linestyle="--", linewidth=1)
        axes.legend(fontsize=8)

    def draw_density(axes: Axes) -> None:
        every = [[value for series in groups.values() for value in series[side]] for side in (0, 1)]
        axes.hexbin(
            *every, gridsize=60, bins="log", cmap="viridis", mincnt=1, rasterized=True,
            xscale="log" if log_x else "linear",
        )  # fmt: skip

    def draw(axes: Axes) -> None:
        (draw_density if n > MOST_SINGLE else draw_points)(axes)
        if log_x:
            _logarithmic(axes, "x")
        axes.set(xlabel=_title(x), ylabel=_title(y))

    return Chart(draw, (6.4, 3.6) if threshold is None or n > MOST_SINGLE else (4.8, 4.4))


def donut(values: Sequence[tuple[str, float]], *, centre: str) -> Chart:
    """Draw a ring of fractions with their labels; `centre` stands in the middle."""

    def draw(axes: Axes) -> None:
        fractions = [max(value, 0.0) for _, value in values]
        if not sum(fractions):
            return
        labels = [f"{_plain(name)}: {fraction:.1%}" for (name, _), fraction in zip(values, fractions)]
        wedges = axes.pie(
            fractions, colors=[_colour(index) for index in range(len(values))], startangle=90, counterclock=False,
            normalize=True, wedgeprops={"width": 0.38},
        )[0]  # fmt: skip
        axes.legend(wedges, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside: none overlaps
        axes.text(0, 0, _title(centre), ha="center", va="center", fontsize=9, color=_INK)

    return Chart(draw, (5.4 + _margin([name for name, _ in values], 16), 3.4))


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

    def draw(axes: Axes) -> None:
        if level is not None and level[1]["value"] is not None:
            axes.axhline(level[1]["value"], color=MUTED, linestyle="--", label=_plain(level[0]))
            if _has_interval(level[1]):
                axes.axhspan(level[1]["low"], level[1]["high"], color=MUTED, alpha=0.2, linewidth=0)
        for index, (name, points) in enumerate(series.items()):
            points = [point for point in points if point[1]["value"] is not None]
            axes.plot(
                [at for at, _ in points], [each["value"] for _, each in points], marker="o", markersize=4,
                color=_colour(index), linestyle=_line_style(index), label=_plain(name),
            )  # fmt: skip
            for at, each in points:
                if _has_interval(each):
                    axes.plot([at, at], [each["low"], each["high"]], color=_colour(index), alpha=0.5, linewidth=2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set(xlabel=_title(x), ylabel=_title(y))
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(series) > 1 or from_zero:
            axes.legend(fontsize=7 if len(series) > 6 else 8)

    return Chart(draw, (6.4, 3.6 if level else 3.2))


def bars(groups: Mapping[str, Mapping[str, Quantity]], *, x: str = "", y: str) -> Chart:
    """Draw bars with intervals, those of a group side by side: ``{group: {name: measured}}``."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    width = 0.8 / max(len(names), 1)

    def draw(axes: Axes) -> None:
        labelled = set()
        for place, group in enumerate(groups.values()):
            for name, measured in group.items():
                index = names.index(name)
                at = place + (index - (len(names) - 1) / 2) * width
                label = None if name in labelled else _plain(name)
                labelled.add(name)
                axes.bar([at], [measured["value"] or 0.0], width=width * 0.92, color=_colour(index), label=label)
                if _has_interval(measured):
                    axes.plot([at, at], [measured["low"], measured["high"]], color=MUTED, linewidth=1.8)
        axes.set_xticks(range(len(groups)), [_plain(label) for label in groups])
        axes.set(xlabel=_title(x), ylabel=_title(y))
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        if len(names) > 1:
            axes.set_ylim(top=axes.get_ylim()[1] * 1.2)  # room for the names above the bars
            axes.legend(fontsize=7, ncols=min(len(names), 4), loc="upper center")

    return Chart(draw, (6.4, 3.0))


def heat_map(
    numbers: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    x: str,
    y: str,
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
    centred
        Colours from 0 to 1, white at 0.5, instead of from the smallest to the largest number.
    bracketed
        Numbers that stand in brackets.
    """

    def draw(axes: Axes) -> None:
        from matplotlib import colormaps

        known = [number for line in numbers for number in line if number is not None]
        low, high = (0.0, 1.0) if centred else (min(known, default=0.0) - 0.02, max(known, default=1.0) + 0.02)
        colours = colormaps["PuOr_r" if centred else "cividis"]  # both told apart by colour-blind readers
        for i, line in enumerate(numbers):
            for j, number in enumerate(line):
                if number is None:
                    continue
                colour = colours(min(max((number - low) / (high - low), 0.0), 1.0))
                axes.fill([j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=colour)
                is_light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.5
                text = f"{number:.2f}" if centred else f"{number:.3f}"
                axes.text(
                    j + 0.5, i + 0.5, f"({text})" if bracketed is not None and bracketed[i][j] else text, ha="center",
                    va="center", fontsize=7, color="#000000" if is_light else "#ffffff",
                )  # fmt: skip
        middles = [place + 0.5 for place in range(max(len(rows), len(columns)))]
        shown = [_plain(name) for name in columns]
        axes.set_xticks(middles[: len(columns)], shown, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(middles[: len(rows)], [_plain(name) for name in rows])
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel=_title(x), ylabel=_title(y))
        axes.grid(visible=False)
        axes.tick_params(length=0)

    margin = _margin([*rows, *columns], 16)
    return Chart(draw, (0.55 * len(columns) + 1.6 + margin, 0.55 * len(rows) + 1.2 + margin))


def _has_interval(measured: Quantity) -> bool:
    return measured.get("low") is not None and measured.get("high") is not None


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _line_style(index: int) -> str:
    return ("-", "--", ":")[index // len(PALETTE) % 3]


def _logarithmic(axes: Axes, which: str) -> None:
    """Make an axis logarithmic, with plain numbers: the usual labels are formulas, which are not drawn here."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis

    def between(value: float, _: object) -> str:  # within one decade there may be no other label
        low, high = axis.get_view_interval()
        return f"{value:g}" if high < 10 * low else ""

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(between)


@contextmanager
def _styled(chart: Chart, style: Any) -> Iterator[Figure]:
    """Draw the chart as a figure of matplotlib, within its style."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader of an SVG has the font, or nobody has
        figure = Figure(figsize=chart.size, layout="constrained")
        chart.draw(figure.add_subplot())
        yield figure


_METADATA = ("Date", "Creator", "Format", "Type")


def _inline(svg: str) -> str:
    """Return SVG that can stand inside HTML: no prolog, no fixed size, ink in the text colour of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    return svg.replace(_INK, "currentColor").strip()


def with_own_ids(svg: str, prefix: str) -> str:
    """Prefix every id of an SVG, so that several can stand in one page."""
    return re.sub("<[^>]+>", lambda tag: re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", tag[0]), svg)


_LONGEST, _LONGEST_TITLE = 40, 72
"""Characters of a name and of a title that are drawn: longer ones would leave no room for what they name."""
_LETTER = 0.08  # inches


def _plain(name: str) -> str:
    """Return a label that a legend shows: one with a leading underscore would be hidden."""
    return _cut(name, _LONGEST).lstrip("_") or " "


def _margin(names: Sequence[str], room: int) -> float:
    """Return the inches that the longest name needs beyond those of a name of `room` characters."""
    return _LETTER * max(min(max(map(len, names), default=0), _LONGEST) - room, 0)


def _title(text: str) -> str:
    return _cut(text, _LONGEST_TITLE)


def _cut(text: str, length: int) -> str:
    text = plain(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"
