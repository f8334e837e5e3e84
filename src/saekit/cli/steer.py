"""``saekit steer``: generate while latents are edited, or measure what they do to texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from ..explanation.settings import EffectSettings, SteerSettings
from .command import Table, command
from .completion import saes
from .console import print_json, print_table, print_text, print_warnings, progress_of
from .options import Data, Hook, Json, Layer, Model, Out
from .settings import whole_numbers

if TYPE_CHECKING:
    from ..measure.results import Result

HELP = """Generate from a prompt while latents are edited, next to the untouched model and control directions.

\b
  saekit steer run/topk-1024-k16-seed0 --model builtin --latent 17 --strength 8 "Once upon a time"
  saekit steer SAE --model gpt2 --edit 17=ablate --edit 4=*2 --at generated "The weather is"

--strength is the code that the latent is set to, in the units of `sae.encode`. --edit takes 8 (set), +2 (add), *2
(scale), 0..3 (clamp) or ablate. What an edit does counts only against its controls: the same change of codes written in
the directions of other latents, at the same tokens and the same norm. `read back` is the mean code that the untouched
model gives the generated text.

\b
  saekit steer SAE --model builtin --data builtin --latent 17 --latent 40

With --data and no prompt, the effect of latents is measured on texts: ablated where they fire, in documents that their
labels were not made of, and added in doses elsewhere, against 20 latents that fire about as often and 20 directions
drawn from the covariance of the rows.
"""


@command(
    "Generate while latents are edited, compared with controls.",
    HELP,
    flags=("at", "new_tokens", "temperature", "controls", "seed"),
)
def steer(
    sae: Annotated[
        str, typer.Argument(metavar="SAE", help="The SAE: a folder, or hf:owner/name/folder.", autocompletion=saes)
    ],
    prompt: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to continue.")] = None,
    *,
    model: Model,
    data: Data | None = None,
    latent: Annotated[
        list[str] | None,
        typer.Option("--latent", metavar="J", help="Latent to set, or to measure with --data; several: 3,17."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", metavar="X", help="Code that --latent is set to.")
    ] = None,
    edit: Annotated[
        list[str] | None, typer.Option("--edit", metavar="J=EDIT", help="Another edit, several times if wanted.")
    ] = None,
    layer: Layer | None = None,
    hook: Hook | None = None,
    settings: SteerSettings,
    effect: Annotated[EffectSettings, Table()] = EffectSettings(),
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Steer a language model, or measure what latents do to it."""
    latents = whole_numbers(",".join(latent), "--latent") if latent else []
    if data is not None:
        _check_measurable(latents, prompt, edit, strength)
        from ..explanation.effects import effects

        with progress_of(json) as progress:
            found: Result = effects(
                sae, model, data, latents, layer=layer, hook=hook, settings=effect, progress=progress
            )
    else:
        edits = _edits(latents, strength, edit or [])
        if not prompt:
            raise ConfigError("a prompt must be given, or --data to measure what latents do to texts; got neither.")
        from ..explanation.steering import steer as run

        with progress_of(json) as progress:
            found = run(sae, model, prompt, edits, layer=layer, hook=hook, settings=settings, progress=progress)
    if out is not None:
        found.save(out / f"{found.KIND}.json")
    if json:
        print_json(found.to_json())
        return
    if data is not None:
        print_table(found.table())
    else:
        _print_texts(found)
    print_text(found.caption())
    print_warnings(found.warnings)


def _check_measurable(
    latents: list[int], prompt: list[str] | None, edit: list[str] | None, strength: float | None
) -> None:
    """Refuse what is about generation where the effects of latents are measured on texts, and no latents."""
    if prompt or edit or strength is not None or not latents:
        raise ConfigError("with --data, what --latent does is measured: give it, and no prompt, --strength or --edit.")


def _print_texts(found: Any) -> None:
    """Print the numbers of each prompt, then its texts whole."""
    for each in found.prompts:
        rows = [line[1:5] for line in found.table()[1:] if line[0] == each.prompt]
        print_table([["by", "kl", "read back", "perplexity"], *rows])
        print_text(f"untouched: {each.prompt}{each.clean.text}")
        print_text(f"edited:    {each.prompt}{each.steered.text}")
        for name, tokens in (("raised", each.raised), ("lowered", each.lowered)):
            print_text(f"{name}: " + ", ".join(f"{one['token']} {one['change']:+.2f}" for one in tokens))


def _edits(latents: list[int], strength: float | None, texts: list[str]) -> dict[int, float | str]:
    """Return the edits of the command line by latent."""
    if bool(latents) != (strength is not None):
        missing = "--strength" if strength is None else "--latent"
        raise ConfigError(f"--latent and --strength must be given together; {missing} is missing.")
    found: dict[int, float | str] = {} if strength is None else dict.fromkeys(latents, strength)
    for text in texts:
        name, equals, edit = text.partition("=")
        if not equals or not name.strip().isdecimal():
            raise ConfigError(f"--edit must be a latent and what becomes of it, 17=ablate say; got {text!r}.")
        if int(name) in found:
            raise ConfigError(f"every latent must have one edit; latent {int(name)} has two.")
        found[int(name)] = edit
    if not found:
        raise ConfigError("something to edit must be given: --latent and --strength, or --edit; got neither.")
    return found
