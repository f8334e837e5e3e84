"""Charts as inline SVG: the same numbers give the same bytes, text stays text, colours follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers, and legible on light and dark ground.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
MUTED = "#8a8f98"
_INK = "#123456"  # a placeholder, replaced by the text colour of the page
_PAPER_INK = "#22272e"
MOST_POINTS = 2000
"""A cloud of more points is drawn as an image inside the chart."""

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

_STYLES = ("-", "--", ":")

Series = tuple[Sequence[float], Sequence[float]]


def lines(series: Mapping[str, Series], *, x: str, y: str, log_y: bool = False, steps: bool = False) -> str:
    """A line per name; `x` and `y` are axis titles. Undefined points are gaps."""

    def draw(axes: Axes) -> None:
        for index, (name, (xs, ys)) in enumerate(series.items()):
            axes.plot(
                [float(v) for v in xs],
                [float("nan") if v is None else float(v) for v in ys],
                label=_plain(name),
                color=PALETTE[index % len(PALETTE)],
                linestyle=_STYLES[index // len(PALETTE) % 3],
                drawstyle="steps-mid" if steps else "default",
            )
        if log_y:
            _logarithmic(axes, "y")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(series) > 1:
            axes.legend(fontsize=8)

    return _svg(draw, (6.4, 3.0))


def intervals(points: Sequence[tuple[str, Mapping[str, Any], bool]], *, x: str) -> str:
    """A dot with its interval for each ``(name, measured, is control)``, one under the other; controls are grey."""

    def draw(axes: Axes) -> None:
        for row, (_, measured, is_control) in enumerate(points):
            colour = MUTED if is_control else PALETTE[0]
            value, low, high = (measured.get(key) for key in ("value", "low", "high"))
            if value is None:
                continue
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color=colour, linewidth=2.5, alpha=0.6)
            axes.plot([value], [row], marker="o", color=colour, markersize=5)
        axes.set_yticks(range(len(points)), [_plain(name) for name, _, _ in points])
        axes.set_ylim(len(points) - 0.5, -0.5)
        axes.set_xlabel(x)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)

    return _svg(draw, (6.4, 0.7 + 0.28 * len(points)))


@dataclass(frozen=True)
class Chart:
    """A chart before it has a format."""

    draw: Callable[[Axes], None]
    size: tuple[float, float]

    def svg(self) -> str:
        """For a page or a file of its own."""
        return _svg(self.draw, self.size)

    def png(self) -> bytes:
        """On white, for documents that take no SVG."""
        import matplotlib
        from matplotlib.figure import Figure

        inked = {key: _PAPER_INK if value == _INK else value for key, value in _STYLE.items()}
        with matplotlib.rc_context(inked):
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure.add_subplot())
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
        return stream.getvalue()


def histogram(
    series: Mapping[str, Sequence[float]], edges: Sequence[float], *, x: str, y: str, marks: Mapping[str, float]
) -> Chart:
    """Shares of the values of each name between `edges`; `marks` are labelled upright lines."""

    def draw(axes: Axes) -> None:
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        for index, (name, values) in enumerate(series.items()):
            counts = [0] * len(middles)
            for value in values:
                place = int((value - edges[0]) / (edges[-1] - edges[0]) * len(middles))
                counts[min(max(place, 0), len(middles) - 1)] += 1
            shares = [count / max(len(values), 1) for count in counts]
            axes.plot(middles, shares, drawstyle="steps-mid", color=PALETTE[index], label=_plain(name))
        for index, (name, at) in enumerate(marks.items()):
            axes.axvline(at, color=MUTED, linestyle=("--", ":", "-.")[index % 3], label=_plain(name))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)

    return Chart(draw, (6.4, 3.0))


def scatter(groups: Mapping[str, Series], *, x: str, y: str, at: float) -> Chart:
    """Points of each name, with lines at the value `at` on both axes."""

    def draw(axes: Axes) -> None:
        many = sum(len(xs) for xs, _ in groups.values()) > MOST_POINTS
        for index, (name, (xs, ys)) in enumerate(groups.items()):
            axes.scatter(
                xs, ys, s=4 if many else 9, alpha=0.4, linewidths=0, color=PALETTE[index], label=_plain(name),
                rasterized=many,
            )  # fmt: skip
        axes.axvline(at, color=MUTED, linestyle="--", linewidth=1)
        axes.axhline(at, color=MUTED, linestyle="--", linewidth=1)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(fontsize=8)

    return Chart(draw, (4.8, 4.4))


MOST_SINGLE = 20_000
"""Of a larger cloud only counts per cell are drawn, not points."""


def cloud(groups: Mapping[str, Series], *, x: str, y: str, log_x: bool = False) -> Chart:
    """Points of each name; of very many, their density."""

    def draw(axes: Axes) -> None:
        n = sum(len(xs) for xs, _ in groups.values())
        if n > MOST_SINGLE:
            every = [[value for series in groups.values() for value in series[side]] for side in (0, 1)]
            axes.hexbin(
                *every, gridsize=60, bins="log", cmap="viridis", mincnt=1, rasterized=True,
                xscale="log" if log_x else "linear",
            )  # fmt: skip
        else:
            for index, (name, (xs, ys)) in enumerate(groups.items()):
                axes.scatter(
                    xs, ys, s=4 if n > MOST_POINTS else 9, alpha=0.4, linewidths=0, color=PALETTE[index],
                    label=_plain(name), rasterized=n > MOST_POINTS,
                )  # fmt: skip
            axes.legend(fontsize=8)
        if log_x:
            _logarithmic(axes, "x")
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    return Chart(draw, (6.4, 3.6))


def donut(values: Sequence[tuple[str, float]], *, centre: str) -> Chart:
    """A ring of shares with their labels; `centre` stands in the middle."""

    def draw(axes: Axes) -> None:
        shares = [max(value, 0.0) for _, value in values]
        if not sum(shares):
            return
        colours = [PALETTE[index % len(PALETTE)] for index in range(len(values))]
        labels = [f"{_plain(name)}: {share:.1%}" for (name, _), share in zip(values, shares)]
        wedges = axes.pie(
            shares, colors=colours, startangle=90, counterclock=False, normalize=True, wedgeprops={"width": 0.38}
        )[0]
        axes.legend(wedges, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside: none overlaps
        axes.text(0, 0, centre, ha="center", va="center", fontsize=9, color=_INK)

    return Chart(draw, (5.4, 3.4))


def curves(
    series: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]], *, x: str, y: str, from_zero: bool = True
) -> Chart:
    """A line of ``(x, measured)`` per name, with intervals, over a logarithmic axis of x."""

    def draw(axes: Axes) -> None:
        for index, (name, points) in enumerate(series.items()):
            points = [point for point in points if point[1].get("value") is not None]
            colour = PALETTE[index % len(PALETTE)]
            axes.plot(
                [at for at, _ in points], [each["value"] for _, each in points], marker="o", markersize=4, color=colour,
                linestyle=_STYLES[index // len(PALETTE) % 3], label=_plain(name),
            )  # fmt: skip
            for at, each in points:
                if each.get("low") is not None and each.get("high") is not None:
                    axes.plot([at, at], [each["low"], each["high"]], color=colour, alpha=0.5, linewidth=2)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(series) > 1 or from_zero:
            axes.legend(fontsize=8)

    return Chart(draw, (6.4, 3.2))


def bars(values: Sequence[tuple[str, Mapping[str, Any]]], *, x: str, y: str) -> Chart:
    """A bar with its interval for each ``(label, measured)``."""

    def draw(axes: Axes) -> None:
        for place, (_, measured) in enumerate(values):
            value, low, high = (measured.get(key) for key in ("value", "low", "high"))
            axes.bar([place], [value or 0.0], color=PALETTE[0], width=0.7)
            if low is not None and high is not None:
                axes.plot([place, place], [low, high], color=MUTED, linewidth=2)
        axes.set_xticks(range(len(values)), [_plain(label) for label, _ in values])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)

    return Chart(draw, (6.4, 3.0))


def _logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis with plain numbers: the usual labels are formulas, which are not drawn here."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis

    def between(value: float, _: Any) -> str:  # within one decade there may be no other label
        low, high = axis.get_view_interval()
        return f"{value:g}" if high < 10 * low else ""

    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(between)


def _svg(draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    return _inline(stream.getvalue())


_METADATA = ("Date", "Creator", "Format", "Type")


def _inline(svg: str) -> str:
    """SVG that can stand inside HTML: no prolog, no fixed size, ink in the text colour of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    return svg.replace(_INK, "currentColor").strip()


def with_own_ids(svg: str, prefix: str) -> str:
    """The same SVG with every id prefixed, so that several can stand in one page."""
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)


def _plain(name: str) -> str:
    """A label that a legend shows: one with a leading underscore would be hidden."""
    return name.lstrip("_") or " "
