"""``saekit catalog``: SAEs that are known to exist, with the address of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from .command import command
from .console import print_json, say
from .options import Json

if TYPE_CHECKING:
    from ..store.catalog import Release

HELP = """List releases of SAEs that saekit can read, by model and layer, with the address to load one.

\b
  saekit catalog                        all of them
  saekit catalog gemma-2-2b             of one model
  saekit catalog gemma transcoder       every word must fit

An address is what every command and SAE.load take: `saekit show ADDRESS`, SAE.load("ADDRESS"). The parts in braces
differ from SAE to SAE. With sae-lens installed, its own names work too:
saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre.
"""


@command("SAEs that are known to exist.", HELP)
def catalog(
    words: Annotated[list[str] | None, typer.Argument(metavar="[WORD]...", help="Words that must all fit.")] = None,
    *,
    json: Json = False,
) -> None:
    """Print the releases whose facts hold every word."""
    from ..errors import ConfigError
    from ..store.catalog import find_releases, releases

    found = find_releases(*(words or ()))
    if not found:
        models = sorted({release.model for release in releases()})
        raise ConfigError(f"catalog: no release fits `{' '.join(words or ())}`; the models are {', '.join(models)}.")
    if json:
        print_json({"releases": [dataclasses.asdict(release) for release in found]})
        return
    _print_releases(found)
    example = next((release.example for release in found if "{" not in release.example), None)
    if example is not None:
        say(f'\nLoad one: SAE.load("{example}"), or look at it: saekit show {example}')


def _print_releases(found: Sequence[Release]) -> None:
    """Print the releases under their models."""
    for model, own in groupby(sorted(found, key=lambda release: release.model), key=lambda release: release.model):
        say(model)
        for release in own:
            say(f"  {release.place}  layers {release.layers}  {release.widths}  {release.format}")
            say(f"      {release.address}")
