"""``saekit compare``: which latents SAEs share, matched exactly, beside what chance gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import print_comparison, print_json, progress_bar, tell
from .options import ConfigFile, Json, Out, Rows, Set
from .settings import merge, names_of
from .show import expand

HELP = """Match the latents of SAEs one to one and tell which they share, beside random dictionaries.

\b
  saekit compare run/topk-1024-k16-seed0 run/topk-1024-k16-seed1
  saekit compare run --rows rows --out run       all SAEs of a run, also by their activations
  saekit compare A B C --threshold 0.8 --json

Decoders and encoders are matched independently, each to the largest possible sum of cosines, with a proof. A latent is
shared when both give it the same partner and both cosines exceed the threshold. With --out the numbers go to
OUT/comparison.json, with each latent's stability, and figures beside it.
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
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Compare SAEs with each other."""
    from ..study.compare import compare as run

    known = {**names_of(run, without=("saes", "source", "progress")), "rows": None}
    options: dict[str, Any] = {"rows": rows, "threshold": threshold, "strict": strict, "controls": controls}
    settings = merge(known, file=config, options=options, sets=set_)
    found = expand(sae)
    if len(found) < 2:
        raise ConfigError(
            f"at least two SAEs must be given; got `{found[0]}` alone. Name another, or a run with several."
        )
    source = settings.pop("rows", None)
    with progress_bar(quiet=json) as progress:
        result = run(found, source, **settings, progress=progress)
    if out is not None:
        from ..report import write_figures

        result.save(Path(out) / "comparison.json")
        write_figures(result.to_json(), out)
    if json:
        print_json(result.to_json())
        return
    print_comparison(result)
    if out is not None:
        tell(f"wrote {out}/comparison.json and figures; `saekit report {out}` makes a page of them")
