"""``saekit convert``: an SAE in the format of another library."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ConfigError, MissingFileError, listed
from .command import command
from .console import print_json, progress_of, say
from .options import Json

HELP = """Read an SAE of any format and write it in another, with the same codes and reconstructions, or refuse.

\b
  saekit convert hf:google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82 gemma --to native
  saekit convert run/topk-1024-k16-seed0 exported --to saelens
  saekit convert layer7.sae.pt qwen --to sparsify --k 50
  saekit convert out/explanation.json browser --to neuronpedia --model-id gpt2-small --source-id 6-res-topk

What is written is read back and compared on random rows; the differences are printed. A format that cannot express
the SAE refuses it and says what it lacks. --format, --orientation and --k state what a foreign file does not say.

What `saekit explain` found becomes files for other browsers of latents: neuronpedia (DST/upload for its upload call,
DST/import for its bulk import) or saedashboard. --model-id and --source-id are the names that it has there. Latents
that never fired cannot be shown there; DST/skipped_indexes.json lists them.
"""


@command("An SAE in another library's format.", HELP)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="The SAE: a folder, a file, or hf:owner/name/folder; or an explanation.json."
        ),
    ],
    target: Annotated[str, typer.Argument(metavar="DST", help="Folder to write; new or empty.")],
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="native, saelens, sparsify or dictionary_learning; of an explanation neuronpedia or saedashboard "
            "[native].",
        ),
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
    model_id: Annotated[
        str | None, typer.Option("--model-id", metavar="NAME", help="Name of the model at Neuronpedia [from its own].")
    ] = None,
    source_id: Annotated[
        str | None,
        typer.Option("--source-id", metavar="NAME", help="Name of the SAE there, layer-set [from hook and rule]."),
    ] = None,
    json: Json = False,
) -> None:
    """Convert an SAE."""
    if to in ("neuronpedia", "saedashboard"):
        sae_only = {"--latents": latents, "--format": format, "--orientation": orientation, "--k": k}
        _refuse_options(sae_only, "an SAE is converted")
        _convert_explanation(source, target, to, (model_id, source_id), json)
        return
    _refuse_options({"--model-id": model_id, "--source-id": source_id}, "--to is neuronpedia or saedashboard")
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


def _refuse_options(given: dict[str, Any], where: str) -> None:
    """Refuse options that mean nothing here."""
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise ConfigError(f"convert: {listed(wrong)} must be given only where {where}. Leave it out.")


def _convert_explanation(source: str, target: str, to: str, names: tuple[str | None, str | None], json: bool) -> None:
    """Write an explanation for another browser of latents."""
    from ..explanation.dashboards import export_dashboards
    from ..explanation.explanation_result import Explanation
    from ..files import check_new_folder, check_path

    path = check_path(source)
    file = path / f"{Explanation.KIND}.json" if path.is_dir() else path
    if not file.is_file():
        raise MissingFileError(
            f"`{source}` must be what `saekit explain --out` wrote, to be written as {to}; there is no `{file}`. "
            "Make one: saekit explain SAE --model M --data D --out DIR"
        )
    check_new_folder(target, "convert")
    found = export_dashboards(Explanation.load(file), target, to, model_id=names[0], source_id=names[1])
    if json:
        about = {"latents": found.latents, "skipped": found.skipped, "model_id": found.model_id}
        print_json({"source": source, "target": target, "format": to, **about, "source_id": found.source_id})
        return
    say(f"{found.latents:,} latents of {found.source_id} of {found.model_id} written to {target} as {to}")
    if found.skipped:
        say(f"{len(found.skipped):,} latents without examples are left out; {target}/skipped_indexes.json lists them")
