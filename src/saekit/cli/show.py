"""``saekit show``: what is in a file, without loading a model or a tensor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, MissingFileError
from .command import command
from .console import print_curve, print_facts, print_json, say
from .options import Json, Saes

if TYPE_CHECKING:
    from ..explanation.explanation_result import Card

HELP = """Show what an SAE file says about itself, without reading its weights or any model; or what this machine runs.

\b
  saekit show run/topk-1024-k16-seed0
  saekit show run                       every SAE of a training run
  saekit show run/topk-1024-k16-seed0 --latent 17       the card of a latent, made by `saekit explain`
  saekit show hf:owner/name/folder --json
  saekit show layer7.sae.pt             an SAE of another library
  saekit show hf:EleutherAI/sae-llama-3-8b-32x/layers.10     of a safetensors file, its header is all that is downloaded
  saekit show --machine                 processor, devices, memory, and which kernels run here, and why

Sizes that `saekit prune` measured are drawn as bars: the longer the bar, the more variance is explained.
"""


@command("What is in an SAE file.", HELP)
def show(
    sae: Saes | None = None,
    *,
    machine: Annotated[bool, typer.Option("--machine", help="Show this machine, and which kernels run on it.")] = False,
    latent: Annotated[
        int | None, typer.Option("--latent", metavar="J", help="Latent to show instead, as `saekit explain` found it.")
    ] = None,
    explained: Annotated[
        Path | None,
        typer.Option(
            "--explained", metavar="DIR", help="Folder of the explanation [the SAE's, or one of two around it]."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Print the description of each SAE, the card of a latent, or this machine."""
    if machine:
        if sae or latent is not None:
            raise ConfigError("show: `--machine` must be given alone; got an SAE or a latent too.")
        from ..kernels import describe as describe_machine

        found_here = describe_machine()
        print_json(found_here.to_json()) if json else say(repr(found_here))
        return
    if not sae:
        raise ConfigError(
            "show: Missing argument `SAE...`: SAEs, or --machine, must be given. Example: saekit show run"
        )
    from ..store.address import sae_paths
    from ..store.opening import describe

    if latent is not None:
        for path in sae_paths(sae):
            card = _card(str(path), latent, explained)
            if json:
                from ..measure.results import to_plain

                print_json(to_plain(card))
            else:
                say(repr(card))
        return
    found = [describe(path) for path in sae_paths(sae)]
    if json:
        print_json(found[0] if len(found) == 1 else {"saes": found})
        return
    for number, facts in enumerate(found):
        if number:
            say()
        print_facts(_ordered(facts))
        if facts["sizes"] is not None:
            say("\nIts prefixes (SAE.load(path, latents=…) or (path, fvu=…)):")
            print_curve(facts["sizes"]["points"])


def _card(path: str, latent: int, explained: Path | None) -> Card:
    """Return the card of a latent from the explanation of an SAE.

    Raises
    ------
    MissingFileError
        There is no explanation of this SAE in the folders looked at.
    """
    from ..explanation.explanation_result import Explanation
    from ..sae.model import SAE

    digest = SAE.load(path).digest()
    here = Path(path)
    folders = [explained] if explained is not None else list(dict.fromkeys([here, here.parent, here.parent.parent]))
    for folder in folders:
        file = folder / f"{Explanation.KIND}.json"
        if file.is_file():
            found = Explanation.load(file)
            if found.sae.get("digest") == digest:
                return found[latent]
    raise MissingFileError(
        f"an explanation of `{path}` must be in {' or '.join(f'`{folder}`' for folder in folders)}; there is none. "
        f"Make one: saekit explain {path} --model M --data D --out {path}"
    )


def _ordered(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts in the order of interest, without the digests of single tensors."""
    from ..sae.model import predicts_other_rows

    rule = dict(facts["rule"])
    name = rule.pop("name")
    settings = ", ".join(f"{key}={value}" for key, value in rule.items())
    scaling = facts["scaling"]["kind"]
    scores = [name.removeprefix("scores.") for name in facts["tensors"] if name.startswith("scores.")]
    head = {
        "sae": facts["path"],
        **({"kind": "transcoder"} if predicts_other_rows(facts["d_in"], facts["d_out"], facts["provenance"]) else {}),
        "latents": f"{facts['n_latents']:,}",
        "width": facts["d_in"] if facts["d_in"] == facts["d_out"] else f"{facts['d_in']} → {facts['d_out']}",
        "rule": f"{name}({settings})",
        "scaling": scaling,
        "dtype": facts["dtype"],
        "latent order": facts["latent_order"],
        **({"scores": ", ".join(scores)} if scores else {}),
        **_file(facts),
    }
    return {**head, "provenance": _shortened(facts["provenance"])}


def _shortened(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance with the names alone of the SAEs that the stability compares with."""
    stability = provenance.get("stability")
    if not (isinstance(stability, dict) and isinstance(stability.get("compared_with"), list)):
        return provenance
    others = [other.get("name") for other in stability["compared_with"] if isinstance(other, dict)]
    return {**provenance, "stability": {**stability, "compared_with": others}}


def _file(facts: dict[str, Any]) -> dict[str, Any]:
    """Return size, digest and schema of saekit's own file."""
    if "file" not in facts:
        return {}
    return {
        "size": f"{facts['file']['bytes'] / 2**20:.1f} MiB",
        "digest": facts["file"]["digest"],
        "schema": f"{facts['schema']} (written by saekit {facts['saekit']})",
    }
