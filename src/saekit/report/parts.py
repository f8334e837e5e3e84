"""What a page is made of: sections with tables and figures, as plain values."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..measure.numbers import percent
from ..terminal import escaped, plain
from .marks import Chart
from .numbers import NONE, minus, number, parts_of
from .svg import svg


@dataclass(frozen=True)
class Cell:
    """One cell of a table: the text shown and, for a number, the value that stands in the JSON."""

    text: str
    value: float | None = None
    interval: str = ""
    note: str = ""
    """Shown on hover: the reason why there is no interval, say."""
    is_number: bool = False
    is_strong: bool = False
    """In bold: what the text around the table points at."""
    latent: tuple[str, int] | None = None
    """Digest of an SAE and the latent whose card it leads to."""

    @property
    def is_empty(self) -> bool:
        """Whether it shows nothing."""
        return self.text in ("", NONE) and self.value is None


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    muted: frozenset[int] = frozenset()
    """Numbers of rows that are controls."""

    @property
    def filled(self) -> list[int]:
        """Return the numbers of the columns in which any row shows something, and of the first."""
        return [at for at in range(len(self.columns)) if not at or not all(row[at].is_empty for row in self.rows)]

    def widths(self) -> list[int]:
        """Return the letters that each filled column needs so that no word of ordinary length is broken."""
        return [
            max(_longest_word(self.columns[at]), *(_room(row[at]) for row in self.rows), 1) if self.rows else 1
            for at in self.filled
        ]

    @property
    def stacks_below(self) -> int:
        """Return the width in pixels, in steps of 100, below which each row is shown as a list of names and values."""
        return _pixels(self.widths())

    @property
    def wraps_below(self) -> int:
        """Return the width below which intervals take two lines."""
        ends = [max((round(0.85 * len(row[at].interval)) for row in self.rows), default=0) for at in self.filled]
        return _pixels([max(pair) for pair in zip(self.widths(), ends)])


def _pixels(letters: Sequence[int]) -> int:
    return min(max(math.ceil((LETTER * sum(letters) + 18 * len(letters)) / 100), 3), 14) * 100


LETTER = 9.0
"""Width of a letter of a table in pixels, with some room; that of most fonts is smaller."""

WORD = 22
"""Letters of a word that are kept together; longer ones may break."""


def _longest_word(text: str) -> int:
    return min(max(map(len, re.split(r"[\s/]|(?<=[-_·,])", text)), default=0), WORD)


def _room(cell: Cell) -> int:
    if cell.is_number:
        end = max(map(len, cell.interval.split(" to ")))
        return max(len(cell.text), round(0.85 * (end + 3)) if cell.interval else 0)
    least = min(len(cell.text), 14)  # texts need some room for a line
    return max(_longest_word(cell.text), least)


@dataclass(frozen=True)
class Figure:
    """A chart, with the sentence that says what it shows."""

    chart: Chart
    caption: str

    @property
    def svg(self) -> str:
        """The chart as SVG text, for a page."""
        return self.drawn()

    def drawn(self, width: int = 540) -> str:
        """Return the chart as SVG text for a page, at a width in pixels."""
        return svg(self.chart, width, in_page=True)

    @property
    def sentence(self) -> str:
        """What stands instead of a chart whose values are all the same."""
        value = self.chart.constant
        about = self.chart.quantity or self.chart.y.title or self.chart.x.title
        return "" if value is None else f"{about} is {number(value)} throughout."

    @property
    def name(self) -> str:
        """Return a name for files of its data."""
        about = f"{self.chart.quantity or self.chart.y.title} {self.chart.x.title}"
        return "-".join(re.findall(r"[a-z0-9]+", about.lower()))[:60] or "data"

    def csv(self) -> str:
        """Return the data as a table for a spreadsheet."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([plain(name) for name in self.chart.columns])
        writer.writerows([_for_csv(value) for value in row] for row in self.chart.rows)
        return stream.getvalue()

    def json(self) -> str:
        """Return the data as a list of objects."""
        return escaped([dict(zip(self.chart.columns, row)) for row in self.chart.rows])


def _for_csv(value: object) -> object:
    """Return a value that no spreadsheet takes for a formula."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


@dataclass(frozen=True)
class Section:
    """A heading with an introduction, tables and figures."""

    title: str
    intro: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    is_folded: bool = False
    """Shown closed at first: settings, provenance."""
    kind: str = ""
    """``provenance``, ``warnings``, ``document``: shown at a place, or in a way, of its own."""


def measured_cell(measured: object, *, where: str = "result", spec: str = "") -> Cell:
    """Return a cell for ``{"value", "low", "high", "unit"[, "reason"]}``; an empty cell for None.

    Raises
    ------
    DataError
        It is something else.
    """
    if measured is None:
        return Cell(NONE, is_number=True)
    if not isinstance(measured, Mapping) or "value" not in measured:
        raise DataError(f"`{where}` must be a measured quantity with `value`, `low` and `high`; got {measured!r}.")
    text, interval = parts_of(measured, spec)
    return Cell(text, measured["value"], interval, measured.get("reason") or "", is_number=True)


def measured_as(key: str, spec: str) -> Callable[[Any], Cell]:
    """Return a column that shows the measured quantity under a key in the format of the terminal."""
    return lambda item: measured_cell(item[key], where=key, spec=spec)


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
    text = number(value) if value is None or not spec else minus(format(value, spec))
    return Cell(text, value, is_number=True)


def percent_cell(fraction: float | None) -> Cell:
    """Return a cell with a fraction in percent; ``–`` for none."""
    return Cell(NONE if fraction is None else minus(percent(fraction)), fraction, is_number=True)


def settings_section(
    what: str, result: Mapping[str, Any], others: Mapping[str, Any], saes: Mapping[str, Any] | None = None
) -> Section:
    """Return settings and provenance of a result, folded; `others` are further facts by their captions."""
    tables = [facts({"saekit": result["saekit"], **result["settings"]}, caption=f"Settings of the {what}.")]
    tables += [facts(each, caption=caption) for caption, each in others.items() if each]
    tables.append(facts(result["versions"], caption="Versions."))
    tables += [facts(each, caption=f"The SAE {name}.") for name, each in (saes or {}).items()]
    return Section(f"Settings and provenance of the {what}", "", tables, is_folded=True, kind="provenance")


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
