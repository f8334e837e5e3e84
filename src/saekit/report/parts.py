"""What a page is made of: sections with tables and figures, as plain values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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


def measured_cell(measured: object, *, where: str = "result") -> Cell:
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


def text_cell(value: object) -> Cell:
    """Return a cell that shows `value` as text; numbers keep all their digits."""
    if isinstance(value, Mapping):
        return Cell(", ".join(f"{key}={item}" for key, item in value.items()))
    if isinstance(value, list | tuple):
        return Cell(", ".join(str(item) for item in value))
    return Cell("–" if value is None else str(value))


Column = str | Callable[[Any], Cell]
"""What a column shows of an item: the value under a key, or the cell that a function makes."""


def table_of(
    items: Sequence[object],
    columns: Sequence[tuple[str, Column]],
    *,
    caption: str = "",
    is_muted: Callable[[Any], bool] = lambda _: False,
) -> Table:
    """Return a table with a row per item, from headings with what stands below them."""
    shown = [show if callable(show) else _keyed(show) for _, show in columns]
    rows = [[show(each) for show in shown] for each in items]
    muted = frozenset(place for place, each in enumerate(items) if is_muted(each))
    return Table([heading for heading, _ in columns], rows, caption, muted)


def _keyed(key: str) -> Callable[[Any], Cell]:
    return lambda item: cell_of(item[key], where=key)


def tables_of(items: Sequence[object], columns: Sequence[tuple[str, Column]], *, caption: str = "") -> list[Table]:
    """Return the same as the tables of a section: none where there are no items."""
    return [table_of(items, columns, caption=caption)] if items else []


def cell_of(value: Any, *, where: str = "result") -> Cell:
    """Return a cell for what stands in the JSON: a measured quantity, a number, text, or nothing (``–``)."""
    if value is None or isinstance(value, Mapping):
        return measured_cell(value, where=where)
    if isinstance(value, str):
        return Cell(value or "–")
    return count_cell(value) if isinstance(value, int) else number_cell(value)


def number_cell(value: float | None, spec: str = "") -> Cell:
    """Return a cell with a number that has no interval; ``–`` for none."""
    text = number(value) if value is None or not spec else format(value, spec)
    return Cell(text, value, is_number=True)


def settings_section(
    what: str, result: Mapping[str, Any], others: Mapping[str, Any], saes: Mapping[str, Any] | None = None
) -> Section:
    """Return settings and provenance of a result, folded; `others` are further facts by their captions."""
    tables = [facts({"saekit": result["saekit"], **result["settings"]}, caption=f"Settings of the {what}.")]
    tables += [facts(each, caption=caption) for caption, each in others.items() if each]
    tables.append(facts(result["versions"], caption="Versions."))
    tables += [facts(each, caption=f"The SAE {name}.") for name, each in (saes or {}).items()]
    return Section(f"Settings and provenance of the {what}", "", tables, is_folded=True)


def facts(settings: Mapping[str, object], *, caption: str = "") -> Table:
    """Return names and values as a table of two columns, nested settings with dotted names."""
    flat = dict(flatten(settings))
    return Table(("setting", "value"), [(Cell(name), text_cell(value)) for name, value in flat.items()], caption)


def flatten(settings: Mapping[str, object], prefix: str = "") -> list[tuple[str, Any]]:
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
