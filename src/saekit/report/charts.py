"""Charts as inline SVG: the same numbers give the same bytes, text stays text, colours follow the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by colour-blind readers, and legible on light and dark ground.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
MUTED = "#8a8f98"
_INK = "#123456"  # a placeholder, replaced by the text colour of the page

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


def lines(series: Mapping[str, Series], *, x: str, y: str, log_y: bool = False, steps: bool = False) -> str:
    """A line per name; `x` and `y` are axis titles. Undefined points are gaps."""

    def draw(axes: Axes) -> None:
        for index, (name, (xs, ys)) in enumerate(series.items()):
            axes.plot(
                [float(v) for v in xs],
                [float("nan") if v is None else float(v) for v in ys],
                label=_plain(name),
                color=PALETTE[index % len(PALETTE)],
                linestyle=("-", "--", ":")[index // len(PALETTE) % 3],
                drawstyle="steps-mid" if steps else "default",
            )
        if log_y:
            axes.set_yscale("log")
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
