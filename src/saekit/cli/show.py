"""``saekit show``: what is in a file, without loading a model or a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import print_curve, print_facts, print_json
from .options import Json

HELP = """Show what an SAE file says about itself, without reading its tensors or any model.

\b
  saekit show run/topk-1024-k16-seed0
  saekit show run                       every SAE of a training run
  saekit show hf:owner/name/folder --json

Where the worth of prefixes was measured (saekit prune), it is drawn: the longer the bar, the less is lost.
"""


def show(
    sae: Annotated[
        list[str], typer.Argument(metavar="SAE...", help="Folder of an SAE, of a run, or hf:owner/name/folder.")
    ],
    json: Json = False,
) -> None:
    """Print the description of each SAE."""
    from ..store.native import describe

    found = [describe(path) for path in expand(sae)]
    if json:
        print_json(found[0] if len(found) == 1 else {"saes": found})
        return
    for number, facts in enumerate(found):
        if number:
            typer.echo()
        print_facts(_ordered(facts))
        if facts["sizes"] is not None:
            typer.echo("\nWhat its prefixes are worth (SAE.load(path, latents=…) or (path, fvu=…)):")
            print_curve(facts["sizes"]["points"])


def _ordered(facts: dict[str, Any]) -> dict[str, Any]:
    """What a reader wants first, first; digests of single tensors left out."""
    rule = dict(facts["rule"])
    name = rule.pop("name")
    settings = ", ".join(f"{key}={value}" for key, value in rule.items())
    scaling = facts["scaling"]["kind"]
    scores = [name.removeprefix("scores.") for name in facts["tensors"] if name.startswith("scores.")]
    head = {
        "sae": facts["path"],
        "latents": f"{facts['n_latents']:,}",
        "width": facts["d_in"] if facts["d_in"] == facts["d_out"] else f"{facts['d_in']} → {facts['d_out']}",
        "rule": f"{name}({settings})",
        "scaling": scaling,
        "dtype": facts["dtype"],
        "latent order": facts["latent_order"],
        **({"scores": ", ".join(scores)} if scores else {}),
        "size": f"{facts['file']['bytes'] / 2**20:.1f} MiB",
        "digest": facts["file"]["digest"],
        "schema": f"{facts['schema']} (written by saekit {facts['saekit']})",
    }
    provenance = dict(facts["provenance"])
    stability = provenance.get("stability")
    if isinstance(stability, dict) and isinstance(stability.get("compared_with"), list):
        others = [other.get("name") for other in stability["compared_with"] if isinstance(other, dict)]
        provenance["stability"] = {**stability, "compared_with": others}
    return {**head, "provenance": provenance}


def expand(paths: list[str]) -> list[str]:
    """Paths of single SAEs, from paths of SAEs or of runs that hold several."""
    found: list[str] = []
    for path in paths:
        folder = Path(path)
        is_run = not path.startswith("hf:") and folder.is_dir() and not (folder / "sae.json").is_file()
        inside = sorted(str(file.parent) for file in folder.glob("*/sae.json")) if is_run else []
        found += inside or [path]
    return found
