"""Printing: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import typer

from ..progress import DELAY, show_progress
from ..settings import Progress


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print aligned columns on stdout; the first line holds the headings, the first column the names."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        typer.echo("  ".join(cells).rstrip())
        if number == 0:
            typer.echo("─" * _width(lines))


def print_fitting(*tables: Sequence[Sequence[str]]) -> None:
    """Print the first of these tables that fits the screen, or the last; without a screen the first."""
    chosen = tables[0]
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        chosen = next((table for table in tables if _width(table) <= width), tables[-1])
    print_table(chosen)


def _width(lines: Sequence[Sequence[str]]) -> int:
    columns = range(len(lines[0]))
    return sum(max(len(line[column]) for line in lines) for column in columns) + 2 * (len(columns) - 1)


def print_facts(values: Mapping[str, Any], indent: int = 0) -> None:
    """Print names and values, one per line, tables indented; names without a value are left out."""
    values = {name: value for name, value in values.items() if value is not None}
    width = max((len(str(name)) for name, value in values.items() if not isinstance(value, Mapping)), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            if value:
                typer.echo(f"{' ' * indent}{name}:")
                print_facts(value, indent + 2)
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            typer.echo(f"{' ' * indent}{str(name).ljust(width)}  {shown}")


def tell(message: str) -> None:
    """Print a line on stderr."""
    typer.echo(message, err=True)


def print_warnings(warnings: Iterable[Any]) -> None:
    """Print the warnings of a result, a line each."""
    for each in warnings:
        typer.echo(str(each))


def print_evaluation(result: Any) -> None:
    """Print the numbers that matter most, for a screen of ordinary width; the JSON and the page have all."""
    names = tuple(name for name in _SHOWN if name in result.entries[0].metrics)
    lines = result.table(names)
    alone = [1 + names.index(name) for name in _WITHOUT_INTERVAL if name in names]
    print_table([[bare(cell) if i in alone else cell for i, cell in enumerate(line)] for line in lines])
    typer.echo(result.footer())


def print_curve(points: Sequence[Mapping[str, Any]]) -> None:
    """Print the measured sizes of an SAE as bars of the variance explained, with the other numbers."""
    names = [name for name in _ALONG if any(name in point["metrics"] for point in points)]
    lines = [["latents", "variance explained", *names]]
    for point in points:
        cells = [_number(point["metrics"].get(name, {}).get("value")) for name in names]
        lines.append([f"{point['latents']:,}", _bar(point["metrics"].get("fvu", {}).get("value")), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        numbers = [cell.rjust(width) for cell, width in zip(line, widths)]
        typer.echo("  ".join([numbers[0], line[1].ljust(widths[1]), *numbers[2:]]).rstrip())


_ALONG = ("fvu", "l0", "ce_sae", "ce_recovered_zero", "rsa")
_BAR = 32


def _bar(fvu: float | None) -> str:
    """Return a bar in eighths of a block: full for an FVU of 0, empty from 1 on."""
    eighths = 0 if fvu is None else round(8 * _BAR * min(max(1 - fvu, 0.0), 1.0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")).ljust(_BAR, "·")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


_SHOWN = ("fvu", "l0", "dead_fraction", "ce_sae", "ce_recovered_zero")
_WITHOUT_INTERVAL = ("l0", "dead_fraction")


def bare(cell: str) -> str:
    """Return a number without its interval."""
    return cell.split(" [")[0]


def print_comparison(result: Any) -> None:
    """Print shared latents, equal partners and cosines of all pairs, then the chance level and the rule."""
    print_table([line[:4] for line in result.table()])
    typer.echo(result.footer())


def print_orphans(result: Any) -> None:
    """Print the properties of orphans, after an empty line."""
    typer.echo()
    print_table(result.table())
    typer.echo(result.footer())


def progress_of(json: bool) -> AbstractContextManager[Progress]:
    """Show progress on stderr; with JSON only of work that takes longer than a moment."""
    return show_progress(delay=DELAY if json else 0.0)
