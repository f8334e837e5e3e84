"""``saekit verify``: does an SAE do on real rows what its file states?"""

from __future__ import annotations

from typing import Annotated

import typer

from ..rows.settings import CaptureSettings
from .command import command
from .console import print_json, print_table, progress_of, say, tell
from .options import Data, Hook, Json, Layer, Model

HELP = """Measure an SAE on real rows of the place it states, and compare with what its file or card states.

\b
  saekit verify hf:google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 --model google/gemma-2-2b --data D
  saekit verify run/topk-1024-k16-seed0 --model builtin --data builtin
  saekit verify sae.pt --model gpt2 --data texts.txt --layer 8

An FVU of 1 or more, or an L0 more than three times off, is a warning; then what could be wrong is measured on the same
texts (other hooks, scaling, the input bias, orientation, special tokens), and what would explain the numbers is named,
best first. An SAE whose file names no hook is tried at every layer.
"""


@command("Does an SAE do what its file states?", HELP)
def verify(
    sae: Annotated[str, typer.Argument(metavar="ADDRESS", help="The SAE: a folder, a file, or hf:owner/name/folder.")],
    *,
    model: Model,
    data: Data,
    layer: Layer | None = None,
    hook: Hook | None = None,
    tokens: Annotated[int, typer.Option("--tokens", metavar="N", help="Number of rows to measure [4000].")] = 4000,
    settings: CaptureSettings,
    json: Json = False,
) -> None:
    """Verify an SAE."""
    from ..evaluation.verification import verify as verified

    with progress_of(json) as progress:
        found = verified(sae, model, data, layer=layer, hook=hook, tokens=tokens, settings=settings, progress=progress)
    for warning in found.warnings:
        tell(f"warning: {warning.message}")
    if json:
        print_json(found.to_json())
        return
    print_table(found.table())
    say(f"{'fits' if found.fits else 'does not fit'}: {found.n_rows:,} rows at {found.place}")
    for cause in found.likely_causes:
        say(f"  would fit better with {cause.what}: FVU {cause.fvu:.3g}, L0 {cause.l0:.3g}")
