"""What a page is made of: sections with tables and figures, as plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .charts import Chart


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the text shown and, for a number, the value that stands in the JSON."""

    text: str
    value: float | None = None
    interval: str = ""
    note: str = ""
    """Shown on hover: the reason why there is no interval, say."""
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    muted: frozenset[int] = frozenset()
    """Numbers of rows that are controls."""


@dataclass(frozen=True)
class Figure:
    """A chart, with the sentence that says what it shows."""

    chart: Chart
    caption: str

    @property
    def svg(self) -> str:
        """The chart as SVG text."""
        return self.chart.svg()


@dataclass(frozen=True)
class Section:
    """A heading with an introduction, tables and figures."""

    title: str
    intro: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    is_folded: bool = False
    """Shown closed at first: settings, provenance."""


def number(value: float | None) -> str:
    """Format a number for a table: three significant digits, thousands separated, ``–`` for none.

    >>> number(0.123456), number(12345.6), number(None), number(0.0), number(16.0)
    ('0.123', '12,346', '–', '0', '16')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def measured_cell(measured: Any, *, where: str = "result") -> Cell:
    """Return a cell for ``{"value", "low", "high", "unit"[, "reason"]}``; an empty cell for None.

    Raises
    ------
    DataError
        It is something else.
    """
    if measured is None:
        return Cell("–", is_number=True)
    if not isinstance(measured, Mapping) or "value" not in measured:
        raise DataError(f"`{where}` must be a measured quantity with `value`, `low` and `high`; got {measured!r}.")
    low, high = measured.get("low"), measured.get("high")
    interval = "" if low is None or high is None else f"{number(low)} – {number(high)}"
    return Cell(number(measured["value"]), measured["value"], interval, measured.get("reason") or "", is_number=True)


def count_cell(value: int) -> Cell:
    """Return a cell with a whole number, thousands separated."""
    return Cell(f"{value:,}", value, is_number=True)


def text_cell(value: Any) -> Cell:
    """Return a cell that shows `value` as text; numbers keep all their digits."""
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{key}={item}" for key, item in value.items()))
    if isinstance(value, list | tuple):
        return Cell(", ".join(str(item) for item in value))
    return Cell("–" if value is None else str(value))


def facts(settings: Mapping[str, Any], *, caption: str = "") -> Table:
    """Return names and values as a table of two columns, nested settings with dotted names."""
    flat = dict(flatten(settings))
    return Table(("setting", "value"), [(Cell(name), text_cell(value)) for name, value in flat.items()], caption)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return dotted names and values of nested mappings.

    >>> flatten({"a": {"b": 1}, "c": [2]})
    [('a.b', 1), ('c', [2])]
    """
    pairs: list[tuple[str, Any]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value))
    return pairs
