"""``saekit explain``: what each latent responds to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..explanation.settings import ExplainSettings, JudgeSettings
from .command import command
from .completion import saes
from .console import print_json, print_table, print_text, print_warnings, progress_of, say, tell
from .options import Data, Hook, Json, Layer, Model, Out

if TYPE_CHECKING:
    from ..explanation.judge import Judge

HELP = """Show what each latent responds to: contexts, a label, and how well the label holds in other documents.

\b
  saekit explain run/topk-1024-k16-seed0 --model builtin --data builtin --out run/topk-1024-k16-seed0
  saekit show run/topk-1024-k16-seed0 --latent 17        its card, from the results in that folder
  saekit explain SAE --model gpt2 --data texts.txt --latents 3,17
  saekit explain SAE --model M --data D --controls shuffled,random,frozen,randomized
  saekit explain SAE --model gpt2 --data texts.txt --out out --judge http://localhost:8000/v1 --judge-model qwen3

A label is made in one half of the documents, of the tokens that the latent fires on, after or before, of the position
or of the tokens around; its AUC is that of the label for where the latent fires in the other half. Every score is
compared with that of controls, and those that a random dictionary reaches too are named. `frozen` and `randomized`
train an SAE each, which takes minutes. No judge and no key is needed. With --out, OUT/explanation.json holds all of it.

With --judge a language model tests the labels on texts that they were not made of, and with --explain-with one writes
them. What that costs is printed before. Answers are kept in OUT/answers.jsonl, so that a run that was ended goes on
from there; the scores go to OUT/label_scores.json. The key of an endpoint is read from the environment variable
OPENAI_API_KEY, and written nowhere.
"""


FLAGS = (
    "tokens",
    "latents",
    "cards",
    "context",
    "controls",
    "groups",
    "surprisal",
    "judge_model",
    "judge_latents",
    "judge_windows",
)


@command("What each latent responds to.", HELP, flags=FLAGS, ranked=True)
def explain(
    sae: Annotated[
        str, typer.Argument(metavar="SAE", help="The SAE: a folder, or hf:owner/name/folder.", autocompletion=saes)
    ],
    *,
    model: Model,
    data: Data,
    layer: Layer | None = None,
    hook: Hook | None = None,
    null: Annotated[
        str | None,
        typer.Option("--null", metavar="SAE,…", help="Further SAEs to compare with, of a frozen decoder, say."),
    ] = None,
    settings: ExplainSettings,
    judge: Annotated[
        str,
        typer.Option(
            "--judge",
            metavar="M",
            help="Language model that tests the labels: a folder, a hub name, `builtin`, or the http(s) address of an "
            "OpenAI-compatible endpoint [none].",
        ),
    ]
    | None = None,
    explain_with: Annotated[
        str,
        typer.Option("--explain-with", metavar="M", help="Language model that writes the labels [none is needed]."),
    ]
    | None = None,
    judging: JudgeSettings,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Explain the latents of an SAE."""
    tester, writer = _judges(judge, explain_with, judging)
    from ..explanation.run import explain as run
    from ..ranks import is_first_rank

    with progress_of(json) as progress:
        found = run(
            sae,
            model,
            data,
            layer=layer,
            hook=hook,
            nulls=() if null is None else null.split(","),
            settings=settings,
            progress=progress,
        )
        if not is_first_rank():
            return
        if out is not None:
            found.save(out / f"{found.KIND}.json")
        scores = None
        if tester is not None:
            from ..explanation.label_scores import plan_label_tests

            tests = plan_label_tests(
                found, sae, model, data, judge=tester, explain_with=writer, settings=judging, progress=progress
            )
            tell(f"{tester.name} is asked {tests.cost(out)}")
            scores = tests.run(out, progress)
            if out is not None:
                scores.save(out / f"{scores.KIND}.json")
    if json:
        print_json(found.to_json() if scores is None else {**found.to_json(), scores.KIND: scores.to_json()})
        return
    if settings.latents is None:
        print_table(found.table())
    else:
        for card in found.cards:
            say(f"{card!r}\n")
    if found.scores:
        say()
        print_table(found.score_table())
    if found.groups:
        say()
        print_table(found.group_table())
    print_text(found.caption())
    if scores is not None:
        print_table(scores.table())
        print_text(scores.caption())
    print_warnings(found.warnings)


def _judges(judge: str | None, explain_with: str | None, settings: JudgeSettings) -> tuple[Judge | None, Judge | None]:
    """Return the models that test and write labels, before anything is read."""
    if judge is None:
        if explain_with is not None or settings != JudgeSettings():
            raise ConfigError(
                "explain: --explain-with and settings of a judge need a model that tests the labels; got none. "
                "Give --judge."
            )
        return None, None
    from ..explanation.judge import open_judge

    return open_judge(judge, settings), None if explain_with is None else open_judge(explain_with, settings)
