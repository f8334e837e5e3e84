"""Printing: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import typer


class Progress(Protocol):
    """Called as work advances: ``progress(stage, done, total)``; `total` is None when it is not known."""

    def __call__(self, stage: str, done: int, total: int | None = None) -> None:
        """Tell how far a stage is."""
        ...


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Aligned columns on stdout; the first line holds the headings, the first column the names."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for number, line in enumerate(lines):
        cells = [cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
        typer.echo("  ".join(cells).rstrip())
        if number == 0:
            typer.echo("─" * (sum(widths) + 2 * (len(widths) - 1)))


def print_facts(values: Mapping[str, Any], indent: int = 0) -> None:
    """Names and values, one per line, tables indented."""
    width = max((len(str(name)) for name, value in values.items() if not isinstance(value, Mapping)), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            if value:
                typer.echo(f"{' ' * indent}{name}:")
                print_facts(value, indent + 2)
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else "–" if value is None else value
            typer.echo(f"{' ' * indent}{str(name).ljust(width)}  {shown}")


def tell(message: str) -> None:
    """A line on stderr."""
    typer.echo(message, err=True)


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress]:
    """Bars on stderr, one per stage; without a terminal a line at the end of each stage."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet:
        yield lambda stage, done, total=None: None
    elif console.is_terminal:
        with _bars(console) as progress:
            yield progress
    else:
        yield _lines()


@contextmanager
def _bars(console: Any) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int | None = None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def _lines() -> Progress:
    begun: dict[str, float] = {}

    def progress(stage: str, done: int, total: int | None = None) -> None:
        start = begun.setdefault(stage, time.monotonic())
        if total is not None and done >= total and start >= 0:
            tell(f"{stage}: {done:,} in {time.monotonic() - start:.1f} s")
            begun[stage] = -1.0

    return progress
