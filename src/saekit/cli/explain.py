"""``saekit explain``: what each latent responds to."""

from __future__ import annotations

from typing import Annotated

import typer

from ..explanation.settings import ExplainSettings
from .command import command
from .completion import saes
from .console import print_json, print_table, print_text, print_warnings, progress_of, say
from .options import Data, Hook, Json, Layer, Model, Out

HELP = """Show what each latent responds to: contexts, a label, and how well the label holds in other documents.

\b
  saekit explain run/topk-1024-k16-seed0 --model builtin --data builtin --out run/topk-1024-k16-seed0
  saekit show run/topk-1024-k16-seed0 --latent 17        its card, from the results in that folder
  saekit explain SAE --model gpt2 --data texts.txt --latents 3,17
  saekit explain SAE --model M --data D --controls shuffled,random,frozen,randomized

A label is made in one half of the documents, of the tokens that the latent fires on, after or before, of the position
or of the tokens around; its AUC is that of the label for where the latent fires in the other half. Every score stands
beside that of controls, and those that a random dictionary reaches too are named. `frozen` and `randomized` train an
SAE each, which takes minutes. No judge and no key is needed. With --out, OUT/explanation.json holds all of it.
"""


@command("What each latent responds to.", HELP, flags=("tokens", "latents", "cards", "context", "controls"))
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
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Explain the latents of an SAE."""
    from ..explanation.run import explain as run

    with progress_of(json) as progress:
        found = run(
            sae,
            model,
            data,
            layer=layer,
            hook=hook,
            nulls=null.split(",") if null else (),
            settings=settings,
            progress=progress,
        )
    if out is not None:
        found.save(out / f"{found.KIND}.json")
    if json:
        print_json(found.to_json())
        return
    if settings.latents is None:
        print_table(found.table())
    else:
        for card in found.cards:
            say(f"{card!r}\n")
    if found.scores:
        say()
        print_table(found.score_table())
    print_text(found.caption())
    print_warnings(found.warnings)
