"""``saekit push``: SAEs and their results on the hub, with a model card."""

from __future__ import annotations

from typing import Annotated

import typer

from .command import command
from .console import print_json, progress_of, say, tell
from .options import Json

HELP = """Upload the SAEs of a folder and the results in it to a repository of the Hugging Face hub, with a model card.

\b
  saekit push run/topk-1024-k16-seed0 hf:me/my-sae --dry-run    print the card and the list of files, without network
  saekit push run/topk-1024-k16-seed0 hf:me/my-sae --private
  saekit push run hf:me/my-saes@v2                              all SAEs of a run, on a branch

Only sae.safetensors, sae.json and result files (evaluation.json, …) are uploaded, in one commit; no checkpoints, rows,
logs or other files. Paths of this machine are removed from them. The card has the numbers with their intervals, the
verdicts, what was not measured, and code that loads the SAE. Log in once with `hf auth login`, or set HF_TOKEN.
"""


@command("SAEs and their results on the hub.", HELP)
def push(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of an SAE, or a run with several.")],
    address: Annotated[str, typer.Argument(metavar="hf:OWNER/NAME", help="Repository; @branch may follow.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    message: Annotated[str | None, typer.Option("--message", metavar="TEXT", help="Title of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card and the list of files, and upload nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Push the SAEs of a folder."""
    from ..report.sharing import pack
    from ..store.pushing import upload

    with progress_of(json):
        parcel = pack(folder, address)
        url = None if dry_run else upload(address, parcel.files, private=private, message=message)
    for name in parcel.left_out:
        tell(f"left out: {name} is not about these SAEs")
    if json:
        facts = {
            "target": address,
            "files": parcel.sizes(),
            "left_out": parcel.left_out,
            "card": parcel.card,
            "url": url,
        }
        print_json(facts)
        return
    if dry_run:
        say(f"{parcel.card}\n{'─' * 40}")
    for name, size in parcel.sizes().items():
        say(f"{size:>14,} bytes  {name}")
    say("nothing was uploaded: --dry-run" if url is None else f"pushed to {url}")
