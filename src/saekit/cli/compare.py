"""``saekit compare``: which latents SAEs share, matched exactly, beside what chance gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import print_comparison, print_json, print_orphans, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Rows, Set, Text, Tokens
from .settings import merge, names_of

HELP = """Match the latents of SAEs one to one and tell which they share, beside random dictionaries.

\b
  saekit compare run/topk-1024-k16-seed0 run/topk-1024-k16-seed1
  saekit compare run --rows rows --out run       all SAEs of a run, also by their activations
  saekit compare A B C --threshold 0.8 --json
  saekit compare run --write                     each latent's stability into the SAE files: prune --by stability
  saekit compare run --model builtin --data builtin --orphans --out run

Decoders and encoders are matched independently, each to the largest possible sum of cosines, with a proof. A latent is
shared when both give it the same partner and both cosines exceed the threshold. With --out the numbers go to
OUT/comparison.json, with each latent's stability, and figures beside it. --orphans also measures, on the rows, what the
latents are that no other SAE has: how often they fire, what they carry, what they respond to.
"""


def compare(
    sae: Annotated[list[str], typer.Argument(metavar="SAE SAE...", help="SAEs: folders, runs, hf:owner/name/folder.")],
    rows: Rows = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", metavar="C", help="Cosine that counts as the same direction [0.7].")
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option("--strict/--not-strict", help="Whether cosines must exceed it or may equal it [exceed]."),
    ] = None,
    controls: Annotated[
        bool | None, typer.Option("--controls/--no-controls", help="Whether to match random dictionaries too [yes].")
    ] = None,
    write: Annotated[
        bool | None, typer.Option("--write", help="Write each latent's stability into the SAE files.")
    ] = None,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Measure what latents are that no other SAE has; needs rows or a model.")
    ] = False,
    model: Model = None,
    data: Data = None,
    layer: Layer = None,
    hook: Hook = None,
    text: Text = None,
    tokens: Tokens = None,
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Compare SAEs with each other."""
    from ..comparison.run import compare as run
    from ..comparison.settings import ComparisonSettings
    from ..store.address import sae_paths

    places = ("rows", "model", "data", "layer", "hook", "text", "tokens")
    known = names_of(ComparisonSettings) | dict.fromkeys((*places, "write"))
    options: dict[str, Any] = {
        "rows": rows, "threshold": threshold, "strict": strict, "controls": controls, "write": write, "model": model,
        "data": data, "layer": layer, "hook": hook, "text": text, "tokens": tokens,
    }  # fmt: skip
    settings = merge(known, file=config, options=options, sets=set_)
    found = sae_paths(sae)
    if len(found) < 2:
        raise ConfigError(
            f"at least two SAEs must be given; got `{found[0]}` alone. Name another, or a run with several."
        )
    where = {name: settings.pop(name, None) for name in places}
    write_scores = bool(settings.pop("write", False))
    with progress_bar(quiet=json) as progress:
        source: Any = None
        language: dict[str, Any] = {}
        if where["rows"] is not None or where["model"] is not None or orphans:
            from ..rows.origin import OriginSettings, find_rows
            from ..sae.model import SAE

            how = {name: where[name] for name in ("layer", "hook", "text", "tokens") if where[name] is not None}
            origin = find_rows(
                SAE.load(found[0]),
                where["rows"],
                model=where["model"],
                data=where["data"],
                path=found[0],
                settings=OriginSettings(**how),
                progress=progress,
            )
            source = origin.rows
            if origin.model is not None:
                language = {"model": origin.model, "data": origin.data, "tokens": origin.ce_tokens}
                language |= {"text": how["text"]} if "text" in how else {}
        result = run(found, source, write=write_scores, settings=ComparisonSettings(**settings), progress=progress)
        lonely = _orphans(found, source, result, language, progress) if orphans else None
    if out is not None:
        from ..report.comparison import write_figures

        result.save(Path(out) / "comparison.json")
        write_figures(result.to_json(), out)
        if lonely is not None:
            lonely.save(Path(out) / "orphans.json")
    if json:
        print_json(result.to_json())
        return
    print_comparison(result)
    if lonely is not None:
        print_orphans(lonely)
    if write_scores:
        tell("wrote each latent's stability into the SAEs; `saekit prune SAE --by stability` ranks by it")
    if out is not None:
        tell(f"wrote {out}/comparison.json and figures; `saekit report {out}` makes a page of them")


def _orphans(found: list[str], source: Any, result: Any, language: dict[str, Any], progress: Any) -> Any:
    """What orphans are; None, with the reason told, where SAEs share nothing or everything."""
    from ..comparison.orphans import orphans as run
    from ..comparison.settings import OrphanSettings
    from ..errors import DataError

    try:
        settings = OrphanSettings(**{name: language[name] for name in ("text", "tokens") if name in language})
        model, data = language.get("model"), language.get("data")
        return run(found, source, comparison=result, model=model, data=data, settings=settings, progress=progress)
    except DataError as error:
        tell(str(error))
        return None
