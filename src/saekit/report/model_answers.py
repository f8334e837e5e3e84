"""Section of what a model did on a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .parts import Cell, Section, Table, facts, measured_cell, number


def actions(result: Mapping[str, Any]) -> list[Section]:
    """Show accuracy compared with chance, answers by position, settings."""
    task = result["task"]
    row = [
        Cell(str(result["target"].get("model"))),
        Cell(f"{task.get('kind')} of {task.get('name')}"),
        Cell(number(result["n_questions"]), result["n_questions"], is_number=True),
        measured_cell(result["accuracy"], where="accuracy"),
        Cell(number(result["chance"]), result["chance"], is_number=True),
        Cell(", ".join(f"{count:,}" for count in result["most_chosen"].values())),
    ]
    columns = ("target", "task", "questions", "accuracy", "chance", "answers by position")
    main = Section(
        "What a model did on a task",
        "The answer with the largest log-probability after the text is taken. The records are a data set: the features "
        "of another model may predict what this one does. A model that prefers one position does not read "
        "the question.",
        [Table(columns, [row])],
    )
    tables = [
        facts({"saekit": result["saekit"], **result["settings"]}, caption="Settings."),
        facts(result["target"], caption="The target."),
        facts(task, caption="The task."),
        facts(result["versions"], caption="Versions."),
    ]
    return [main, Section("Settings and provenance of the actions", "", tables, is_folded=True)]
