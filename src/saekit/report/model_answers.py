"""Section of what a model did on a task."""

from __future__ import annotations

from collections.abc import Mapping

from .numbers import number
from .parts import Cell, Section, number_cell, settings_section, table_of

_COLUMNS = (
    ("target", lambda result: Cell(str(result["target"].get("model")))),
    ("task", lambda result: Cell(f"{result['task'].get('kind')} of {result['task'].get('name')}")),
    ("questions", lambda result: Cell(number(result["n_questions"]), result["n_questions"], is_number=True)),
    ("accuracy", "accuracy"),
    ("chance", lambda result: number_cell(result["chance"])),
    ("answers by position", lambda result: Cell(", ".join(f"{n:,}" for n in result["most_chosen"].values()))),
)


def actions(result: Mapping[str, object]) -> list[Section]:
    """Show accuracy compared with chance, answers by position, settings."""
    main = Section(
        "What a model did on a task",
        "The answer with the largest log-probability after the text is taken. The records are a data set: the features "
        "of another model may predict what this one does. A model that prefers one position does not read "
        "the question.",
        [table_of([result], _COLUMNS)],
    )
    return [main, settings_section("actions", result, {"The target.": result["target"], "The task.": result["task"]})]
