"""``saekit actions``: what a language model answers, as labels that the features of another may predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_json, print_table, progress_bar, tell
from .options import ConfigFile, Data, Json, Model, Out, Set, Text
from .settings import merge, required

HELP = """Let a language model choose answers, and record what it chose and whether it was right.

\b
  saekit actions --model builtin --task cloze --data builtin --questions 1000 --out acts
  saekit actions --model gpt2 --task questions.jsonl --text question --set choices_column="options" --out acts
  saekit classify --model reader --sae SAE --data acts/actions.jsonl --label correct --group document --out found

--task takes `cloze` (the last word of sentences of --data against words that are about as frequent) or a table with
the columns text, choices (a list) and answer (its number or text): a file, or a data set of the hub. The choice with
the largest sum of log-probabilities after the text is taken. OUT/actions.jsonl is a data set of its own (text; said:
with the chosen answer; asked: with all answers; correct, margin, …), OUT/actions.json says what it is.
"""

SETTINGS = (
    "model", "task", "data", "text", "split", "questions", "choices", "words", "seed", "normalize", "joint",
    "choices_column", "answer_column", "batch_tokens", "out",
)  # fmt: skip


def actions(
    model: Model = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="T", help="`cloze`, or a table of questions with choices [cloze].")
    ] = None,
    data: Data = None,
    text: Text = None,
    questions: Annotated[
        int | None, typer.Option("--questions", metavar="N", help="Most questions [1000 of a cloze; all of a table].")
    ] = None,
    choices: Annotated[
        int | None, typer.Option("--choices", metavar="K", help="Answers to choose from in a cloze [4].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sentences and distractors of a cloze [0].")] = None,
    normalize: Annotated[
        str | None, typer.Option("--normalize", help="Compare per `tokens`, `characters`, or `none`: the sum [none].")
    ] = None,
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Run a model on a task and write down what it did."""
    from ..classification.model_answers import CARD, RECORDS, act, cloze_task, read_task

    options: dict[str, Any] = {
        "model": model, "task": task, "data": data, "text": text, "questions": questions, "choices": choices,
        "seed": seed, "normalize": normalize, "out": None if out is None else str(out),
    }  # fmt: skip
    settings = merge(dict.fromkeys(SETTINGS), file=config, options=options, sets=set_)
    required(settings, "model", "out")
    wanted = settings.get("task", "cloze")
    given: dict[str, Any] = {name: settings[name] for name in ("text", "split") if name in settings}
    if wanted == "cloze":
        given |= {name: settings[name] for name in ("questions", "choices", "seed") if name in settings}
        if "words" in settings:
            given["words"] = tuple(settings["words"])
        asked = cloze_task(settings.get("data", "builtin"), **given)
    else:
        names = {"choices": "choices_column", "answer": "answer_column", "limit": "questions"}
        given |= {name: settings[key] for name, key in names.items() if key in settings}
        asked = read_task(wanted, **given)
    how = {name: settings[name] for name in ("normalize", "joint", "batch_tokens") if name in settings}
    with progress_bar(quiet=json) as progress:
        result = act(settings["model"], asked, **how, progress=progress)
    folder = Path(settings["out"])
    result.save(folder)
    if json:
        print_json(result.to_json())
        return
    print_table(result.table())
    typer.echo(result.caption())
    tell(f"wrote {folder / RECORDS} ({result.n_questions:,} records, column `correct`) and {folder / CARD}")
