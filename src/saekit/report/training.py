"""Sections of a training run: its curves and settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts
from .numbers import number
from .parts import Cell, Figure, Section, Table, facts


def training(result: Mapping[str, Any]) -> list[Section]:
    """Show curves over the rows seen, and the settings of the run."""
    learners = result["learners"]
    figures = []
    for name, title in (
        ("fvu", "FVU on the training batch"),
        ("l0", "latents per row"),
        ("dead_fraction", "dead fraction"),
    ):
        series = {label: (log["rows"], log[name]) for label, log in learners.items() if log.get(name)}
        if series:
            figures.append(Figure(charts.lines(series, x="rows seen", y=title, log_y=name == "fvu"), f"{title}."))
    columns = ("", "rows seen", "FVU", "L0", "dead")
    rows = [
        [Cell(label), *(_last(log, name) for name in ("rows", "fvu", "l0", "dead_fraction"))]
        for label, log in learners.items()
    ]
    sections = [Section("Training", "", [Table(columns, rows, "Last logged values, on training batches.")], figures)]
    if result.get("run"):
        sections.append(Section("Training run", "", [facts(result["run"])], is_folded=True))
    return sections


def _last(log: Mapping[str, Any], name: str) -> Cell:
    value = log[name][-1] if log.get(name) else None
    return Cell(number(value), value, is_number=True)
