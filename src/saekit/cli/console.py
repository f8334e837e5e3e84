"""Printing: results to stdout, everything else to stderr."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import typer

from ..measure.numbers import decimals
from ..progress import DELAY, show_progress
from ..settings import Progress
from ..terminal import escaped, plain


def say(text: str = "", *, err: bool = False) -> None:
    """Print text on stdout or stderr: the only way in which commands print, so that none can move the terminal."""
    typer.echo(plain(text, keep="\n\t"), err=err)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; what does not show itself is escaped, which JSON reads back."""
    say(escaped(value))


def screen_width() -> int:
    """Return the columns of the screen, or of COLUMNS; without a screen `PAGE`."""
    return shutil.get_terminal_size((PAGE, 24)).columns


PAGE = 100
"""Columns of text where there is no screen; running text is never wider."""


def print_table(lines: Sequence[Sequence[str]], keep: Sequence[str] = ()) -> None:
    """Print aligned columns on stdout, as wide as the screen at most (see `fitted`)."""
    lines = fitted([[plain(cell) for cell in line] for line in lines], screen_width(), keep)
    widths = _widths(lines)
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        say("  ".join(cells).rstrip())
        if number == 0:
            say("─" * _width(lines))


def fitted(lines: Sequence[Sequence[str]], width: int, keep: Sequence[str] = ()) -> list[list[str]]:
    """Return a table that is at most `width` wide: from the right, intervals are left out, then columns.

    Parameters
    ----------
    lines
        The first holds the headings, the first column the names.
    width
        Columns of the screen.
    keep
        Headings of columns that keep their intervals longest.

    Examples
    --------
    >>> fitted([["", "fvu", "l0"], ["a", "0.2 [0.1, 0.3]", "16 [15, 17]"]], 24)
    [['', 'fvu', 'l0'], ['a', '0.2 [0.1, 0.3]', '16']]
    """
    found = [list(line) for line in lines]
    columns = range(len(found[0]) - 1, 0, -1)
    for column in sorted(columns, key=lambda column: found[0][column] in keep):
        if _width(found) <= width:
            return found
        for line in found[1:]:
            line[column] = bare(line[column])
    while _width(found) > width and len(found[0]) > 2:
        found = [line[:-1] for line in found]
    return found


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]


def _width(lines: Sequence[Sequence[str]]) -> int:
    return sum(_widths(lines)) + 2 * (len(lines[0]) - 1)


def print_text(text: str) -> None:
    """Print running text on stdout, wrapped to the screen."""
    for line in text.splitlines():
        say(textwrap.fill(plain(line), min(screen_width(), PAGE), break_long_words=False, break_on_hyphens=False))


def print_facts(values: Mapping[str, Any], indent: int = 0) -> None:
    """Print names and values, one per line, tables indented; names without a value are left out."""
    values = {name: value for name, value in values.items() if value is not None}
    width = max((len(str(name)) for name, value in values.items() if not isinstance(value, Mapping)), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            if value:
                say(f"{' ' * indent}{plain(str(name))}:")
                print_facts(value, indent + 2)
        else:
            shown = ", ".join(map(_fact, value)) if isinstance(value, list | tuple) else _fact(value)
            say(f"{' ' * indent}{plain(str(name)).ljust(width)}  {shown}")


def _fact(value: Any) -> str:
    """Return a value in few digits; whole numbers keep theirs."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 10_000 else f"{value:.4g}"
    return plain(str(value))


def tell(message: str) -> None:
    """Print a line on stderr."""
    say(message, err=True)


def print_warnings(warnings: Iterable[Any]) -> None:
    """Print the warnings of a result, a line each."""
    for each in warnings:
        print_text(str(each))


def print_evaluation(result: Any) -> None:
    """Print the numbers that matter most, for a screen of ordinary width; the JSON and the page have all."""
    from ..measure.metrics import leading_recovered

    metrics = result.entries[0].metrics
    names = (*(name for name in _SHOWN if name in metrics), *leading_recovered(metrics)[:1])
    lines = result.table(names)
    lines[0] = [heading.split(" (")[0] for heading in lines[0]]  # the caption says what it is recovered from
    alone = [1 + names.index(name) for name in _WITHOUT_INTERVAL if name in names]
    print_table([[bare(cell) if i in alone else cell for i, cell in enumerate(line)] for line in lines])
    for table in (result.sources_table(), result.pursuit_table(), result.hedging_table(), result.truth_table()):
        if table:
            say()
            print_table(table)
    print_text(result.caption())
    print_warnings(result.warnings)


def print_curve(points: Sequence[Mapping[str, Any]]) -> None:
    """Print the measured sizes of an SAE as bars of the variance explained, with the other numbers."""
    from ..measure.metrics import leading_recovered

    along = (*_ALONG[:-1], *leading_recovered(points[-1]["metrics"] if points else {})[:1], *_ALONG[-1:])
    names = [name for name in along if any(name in point["metrics"] for point in points)]
    lines = [["latents", "variance explained", *(_SHORTER.get(name, name) for name in names)]]
    for point in points:
        cells = [_number(point["metrics"].get(name)) for name in names]
        lines.append([f"{point['latents']:,}", _bar(point["metrics"].get("fvu", {}).get("value")), *cells])
    widths = _widths(lines)
    for line in lines:
        numbers = [cell.rjust(width) for cell, width in zip(line, widths)]
        say("  ".join([numbers[0], line[1].ljust(widths[1]), *numbers[2:]]).rstrip())


_ALONG = ("fvu", "l0", "ce_sae", "rsa")
_SHORTER = {
    "ce_sae": "ce",
    "ce_recovered_zero": "recovered (zero)",
    "ce_recovered_mean": "recovered (mean)",
}
_BAR = 24


def _bar(fvu: float | None) -> str:
    """Return a bar in eighths of a block: full for an FVU of 0, empty from 1 on."""
    eighths = 0 if fvu is None else round(8 * _BAR * min(max(1 - fvu, 0.0), 1.0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")).ljust(_BAR, "·")


def _number(measured: Mapping[str, Any] | None) -> str:
    """Return a measured value in the digits that its interval leaves."""
    from ..measure.results import Measured

    if measured is None or measured.get("value") is None:
        return "–"
    return bare(str(Measured(measured["value"], measured.get("low"), measured.get("high"))))


_SHOWN = ("fvu", "l0", "dead_fraction", "ce_sae")
_WITHOUT_INTERVAL = ("l0", "dead_fraction")


def bare(cell: str) -> str:
    """Return a number without its interval: at most three significant digits, as no ends tell how many hold.

    >>> [bare(f"{number} [0, 1]") for number in ("15.99994", "0.830", "0.0000", "+0.5012", "–")]
    ['16', '0.830', '0', '+0.5012', '–']
    """
    number, *ends = cell.split(" [")
    digits = number.replace(".", "")
    shorten = ends and digits.isdecimal() and len(digits.lstrip("0")) not in (1, 2, 3)
    return decimals(float(number)) if shorten else number


def print_comparison(result: Any) -> None:
    """Print shared latents, equal partners and cosines of all pairs, then the chance level and the rule."""
    print_table([line[:4] for line in result.table()])
    if result.function_table():
        say()
        print_table(result.function_table())
    if result.along_table():
        say()
        print_table(result.along_table())
    if result.predictors:
        each = ", ".join(f"{name} {value}" for name, value in result.predictors.items())
        print_text(f"what one SAE alone says about the stability of its latents (rank correlation): {each}")
    print_text(result.caption())
    print_warnings(result.warnings)


def print_orphans(result: Any) -> None:
    """Print the properties of orphans, after an empty line."""
    say()
    print_table(result.table())
    print_text(result.caption())
    print_warnings(result.warnings)


def progress_of(json: bool) -> AbstractContextManager[Progress]:
    """Show progress on stderr; with JSON only of work that takes longer than a moment."""
    return show_progress(delay=DELAY if json else 0.0)
