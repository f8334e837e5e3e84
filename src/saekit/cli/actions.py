"""``saekit actions``: what a language model answers, as labels that the features of another may predict."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigError
from .command import Setting, command
from .console import print_json, print_table, print_text, progress_of, tell
from .options import Data, Json, Model, Out, Text

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


@command("Answers of a language model, as labels to predict.", HELP)
def actions(
    *,
    model: Model,
    task: Annotated[
        str, typer.Option("--task", metavar="T", help="`cloze`, or a table of questions with choices [cloze].")
    ] = "cloze",
    data: Data | None = None,
    text: Text | None = None,
    questions: Annotated[
        int | None,
        typer.Option("--questions", metavar="N", help="Maximum number of questions [1000 for cloze, else all]."),
    ] = None,
    choices: Annotated[int, typer.Option("--choices", metavar="K", help="Choices per question of a cloze [4].")] = 4,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Random seed (sentences and distractors of a cloze) [0].")
    ] = 0,
    normalize: Annotated[
        str,
        typer.Option(
            "--normalize", metavar="BY", help="Divide log-probabilities by `tokens`, `characters`, or `none` [none]."
        ),
    ] = "none",
    split: Annotated[str | None, Setting("Split of a hub data set [train where there is one].")] = None,
    words: Annotated[
        tuple[int, ...], Setting("Minimum and maximum number of words of the sentences of a cloze [6,40].")
    ] = (6, 40),
    choices_column: Annotated[str, Setting("Column of the choices in a table [choices].")] = "choices",
    answer_column: Annotated[str, Setting("Column of the right answer in a table [answer].")] = "answer",
    joint: Annotated[str, Setting("What is put between the text and a choice [a space].")] = " ",
    batch_tokens: Annotated[int | None, Setting("Tokens per forward pass [as capture].")] = None,
    out: Out,
    json: Json = False,
) -> None:
    """Run a model on a task and write down what it did."""
    from ..classification.model_answers import CARD, RECORDS, act
    from ..classification.tasks import cloze_task, read_task

    text = "text" if text is None else text
    if task == "cloze":
        asked = cloze_task(
            "builtin" if data is None else data,
            questions=1000 if questions is None else questions,
            choices=choices,
            words=_two(words),
            text=text,
            split=split,
            seed=seed,
        )
    else:
        asked = read_task(task, text=text, choices=choices_column, answer=answer_column, split=split, limit=questions)
    with progress_of(json) as progress:
        result = act(model, asked, normalize=normalize, joint=joint, batch_tokens=batch_tokens, progress=progress)
    result.save(out)
    if json:
        print_json(result.to_json())
        return
    print_table(result.table())
    print_text(result.caption())
    tell(f"wrote {out / RECORDS} ({result.n_questions:,} records, column `correct`) and {out / CARD}")


def _two(words: tuple[int, ...]) -> tuple[int, int]:
    if len(words) != 2:
        raise ConfigError(f"`words` must be a minimum and a maximum; got {words}. Example: --set words=[6,40]")
    return words[0], words[1]
