"""A chart as a value: marks between axes, what each tells on hover, and the data behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..terminal import plain

# Okabe and Ito's palette: told apart by colour-blind readers, and legible on light and dark ground.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
GREY = "#8a8f98"
MUTED = -1
"""Number of the colour of baselines, controls and thresholds."""


@dataclass(frozen=True)
class Axis:
    """An axis: what it measures, how, and from where to where."""

    title: str = ""
    scale: str = "linear"
    """``linear``, ``log``, or ``names``: whole numbers that stand for `names`."""
    names: Sequence[str] = ()
    low: float | None = None
    """Where it begins; by default with the marks."""
    high: float | None = None
    binary: bool = False
    """Ticks at powers of two."""


@dataclass(frozen=True)
class Line:
    """A line through points; None is a gap."""

    series: int
    xs: Sequence[float]
    ys: Sequence[float | None]
    dots: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Points:
    """A cloud of points."""

    series: int
    xs: Sequence[float]
    ys: Sequence[float | None]


@dataclass(frozen=True)
class Span:
    """An interval, as a thick stroke between two places."""

    series: int
    x: tuple[float, float]
    y: tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A bar or a cell: `x` and `y` are its sides, `shade` its strength from 0 to 1, `text` stands in it."""

    series: int
    x: tuple[float, float]
    y: tuple[float, float]
    shade: float = 1.0
    text: str = ""


@dataclass(frozen=True)
class Rule:
    """A dashed line across the chart at a value of the `axis` named."""

    axis: str
    at: float
    band: tuple[float, float] | None = None
    """Its interval, shaded."""


@dataclass(frozen=True)
class Wedge:
    """A part of a ring, from `start` to `stop` in turns from the top, clockwise."""

    series: int
    start: float
    stop: float


Mark = Line | Points | Span | Box | Rule | Wedge

Hover = tuple[float, float, str]
"""A place in the units of the axes, and what is told about it."""


@dataclass(frozen=True)
class Chart:
    """A chart before it has a format."""

    x: Axis
    y: Axis
    marks: Sequence[Mark]
    columns: Sequence[str]
    """Names of the columns of `rows`."""
    rows: Sequence[Sequence[object]]
    """The numbers in it."""
    legend: Sequence[tuple[str, int]] = ()
    """Names of the series."""
    hover: Sequence[Hover] = ()
    height: int = 300
    centre: str = ""
    """Text in the middle of a ring."""
    values: Sequence[float] = field(default=(), repr=False)
    """What the chart is about; where all are equal, a sentence says more."""
    quantity: str = ""
    """What these values are, where no axis says it."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not self.rows

    @property
    def constant(self) -> float | None:
        """The value that all points have; None where they differ."""
        first = self.values[0] if self.values else None
        return first if first is not None and all(abs(v - first) <= 1e-9 * abs(first) for v in self.values) else None

    def svg(self, width: int = 680) -> str:
        """Return SVG text for a file of its own."""
        from .svg import svg

        return svg(self, width)

    def png(self) -> bytes:
        """Return a PNG on white, for documents that take no SVG."""
        from .images import png

        return png(self)


LONGEST, LONGEST_TITLE = 40, 72
"""Characters of a name and of a title that are drawn: longer ones would leave no room for what they name."""


def cut(text: str, length: int) -> str:
    """Return text of one line, at most `length` long."""
    text = plain(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"
