"""Charts as PNG on white, made with matplotlib, for documents that take no SVG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .marks import (
    GREY,
    LONGEST,
    LONGEST_TITLE,
    MUTED,
    PALETTE,
    Axis,
    Box,
    Chart,
    Line,
    Mark,
    Points,
    Rule,
    Span,
    Wedge,
    cut,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE: Any = {
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def png(chart: Chart) -> bytes:
    """Return the chart as the bytes of a PNG file."""
    import matplotlib
    from matplotlib.figure import Figure

    stream = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure = Figure(figsize=_size(chart), layout="constrained")
        axes = figure.add_subplot()
        for mark in chart.marks:
            _draw(axes, mark)
        if any(isinstance(mark, Wedge) for mark in chart.marks):
            axes.text(0, 0, cut(chart.centre, LONGEST_TITLE), ha="center", va="center")
            axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
            axes.axis("off")
        _axis(axes, chart.x, "x")
        _axis(axes, chart.y, "y")
        _legend(axes, chart)
        figure.savefig(stream, format="png", dpi=160, metadata={"Software": None})
    return stream.getvalue()


def _size(chart: Chart) -> tuple[float, float]:
    """Return width and height in inches, with room for long names."""
    wide = 4.8 if chart.height > 400 and not chart.x.names else 6.4
    names = [*chart.y.names, *(name for name, _ in chart.legend if chart.centre)]
    return wide + _beyond(names), max(chart.height / 100, 1.2) + _beyond(chart.x.names)


def _beyond(names: Sequence[str]) -> float:
    """Return the inches that the longest name takes beyond 16 letters."""
    return 0.08 * max(min(max(map(len, names), default=0), LONGEST) - 16, 0)


def _colour(series: int) -> str:
    return GREY if series == MUTED else PALETTE[series % len(PALETTE)]


def _draw(axes: Axes, mark: Mark) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patches import Wedge as Sector

    if isinstance(mark, Rule):
        line = axes.axvline if mark.axis == "x" else axes.axhline
        line(mark.at, color=GREY, linestyle="--", linewidth=1.2)
        if mark.band is not None and mark.axis == "y":
            axes.axhspan(*mark.band, color=GREY, alpha=0.2, linewidth=0)
        return
    colour = _colour(mark.series)
    if isinstance(mark, Line):
        style = "-" if mark.series == MUTED else ("-", "--", ":", "-.")[mark.series % 4]
        ys = _gaps(mark.ys)
        axes.plot(
            mark.xs, ys, color=colour, linestyle=style, marker="o" if mark.dots else "", markersize=4.5, linewidth=1.6,
            drawstyle="steps-mid" if mark.steps else "default",
        )  # fmt: skip
    elif isinstance(mark, Points):
        axes.scatter(mark.xs, _gaps(mark.ys), s=8, alpha=0.4, linewidths=0, color=colour)
    elif isinstance(mark, Span):
        axes.plot(mark.x, mark.y, color=colour, alpha=0.45, linewidth=2.5)
    elif isinstance(mark, Box):
        size = (mark.x[1] - mark.x[0], mark.y[1] - mark.y[0])
        shade = 0.1 + 0.8 * min(mark.shade, 1.0) if mark.text or mark.shade < 1 else 1.0
        axes.add_patch(Rectangle((mark.x[0], mark.y[0]), *size, color=colour, alpha=shade, linewidth=0))
        axes.plot(mark.x, mark.y, alpha=0)  # patches give the axes no room
        if mark.text:
            axes.text(
                sum(mark.x) / 2, sum(mark.y) / 2, mark.text, ha="center", va="center", fontsize=7,
                color="#ffffff" if mark.shade > 0.55 else "#000000",
            )  # fmt: skip
    else:
        axes.add_patch(Sector((0, 0), 1.0, 90 - 360 * mark.stop, 90 - 360 * mark.start, width=0.38, color=colour))


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _axis(axes: Axes, axis: Axis, which: str) -> None:
    axes.set(**{f"{which}label": cut(axis.title, LONGEST_TITLE)})
    own = axes.xaxis if which == "x" else axes.yaxis
    if axis.scale == "names":
        rotated = which == "x" and sum(map(len, axis.names)) > 60
        turn: Any = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if rotated else {}
        own.set_ticks(range(len(axis.names)), [cut(name, LONGEST) for name in axis.names], **turn)
        ends = (-0.5, len(axis.names) - 0.5)
        axes.set(**{f"{which}lim": ends[::-1] if which == "y" else ends})
        own.grid(visible=False)
    elif axis.scale == "log":
        axes.set(**{f"{which}scale": "log"})
        if axis.binary:
            (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=2)
        own.set_major_formatter(lambda value, _: f"{value:,g}")
        own.set_minor_formatter(lambda value, _: "")
    elif axis.low is not None:
        (axes.set_xlim if which == "x" else axes.set_ylim)(min(axis.low, *own.get_view_interval()))


def _legend(axes: Axes, chart: Chart) -> None:
    from matplotlib.lines import Line2D

    if chart.legend:
        keys = [Line2D([], [], color=_colour(series), marker="s", linestyle="") for _, series in chart.legend]
        axes.legend(keys, [cut(name, LONGEST + 20).lstrip("_") or " " for name, _ in chart.legend], fontsize=8)
