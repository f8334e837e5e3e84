"""``saekit convert``: an SAE in the format of another library."""

from __future__ import annotations

from typing import Annotated

import typer

from .command import command
from .console import print_json, progress_of, say
from .options import Json

HELP = """Read an SAE of any format and write it in another, with the same codes and reconstructions, or refuse.

\b
  saekit convert hf:google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 gemma --to native
  saekit convert run/topk-1024-k16-seed0 exported --to saelens
  saekit convert layer7.sae.pt qwen --to sparsify --k 50

What is written is read back and compared on random rows; the differences are printed. A format that cannot express
the SAE refuses it and says what it lacks. --format, --orientation and --k state what a foreign file does not say.
"""


@command("An SAE in another library's format.", HELP)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The SAE: a folder, a file, or hf:owner/name/folder.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; new or empty.")],
    *,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="native, saelens, sparsify or dictionary_learning [native].")
    ] = "native",
    latents: Annotated[
        int | None, typer.Option("--latents", metavar="N", help="Only the first N latents [all].")
    ] = None,
    format: Annotated[str | None, typer.Option("--format", metavar="NAME", help="Format of SRC [recognized].")] = None,
    orientation: Annotated[
        str | None,
        typer.Option("--orientation", metavar="NAME", help="latents_first or width_first, for square files."),
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", metavar="N", help="k of a TopK SAE whose file does not say it.")
    ] = None,
    json: Json = False,
) -> None:
    """Convert an SAE."""
    from ..sae.model import SAE
    from ..store.exports import export

    with progress_of(json):
        sae = SAE.load(source, latents=latents, format=format, orientation=orientation, k=k)
        difference = export(sae, target, to)
    if json:
        print_json({"source": source, "target": target, "format": to, "differences": difference._asdict()})
        return
    say(f"{sae}\nwritten to {target} as {to}")
    say(
        f"read back: codes differ by {difference.codes:.1e}, reconstructions by {difference.reconstruction:.1e} "
        "of their largest value"
    )
