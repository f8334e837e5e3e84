"""``saekit progressive``: which way to a small SAE keeps most, at every size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import print_json, print_table, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Rows, Set, Text, Tokens
from .rows_option import rows_for
from .settings import merge, whole_numbers

HELP = """Compare the ways of getting small SAEs: the widest vanilla SAE of a run pruned by each ranking, Matryoshka
prefixes, separately trained SAEs, and unsorted prefixes, at equal sizes, over the seeds of the run.

\b
  saekit train --rows rows --arch topk,matryoshka --latents 1024 --k 16 --seeds 0,1,2 --out run
  saekit progressive run --rows rows
  saekit progressive run --model builtin --data builtin --sizes 128,256,512,1024 --out run    with cross-entropies

RUN is the folder of a training run, or several SAEs. Latents are ranked on every second document of the rows, and
measured on the others. Without --rows and --model, the rows come from what the run was trained on. With --out the
numbers go to OUT/progressive.json, from which `saekit report OUT` makes a page.
"""

CE_TOKENS = 8192
"""Tokens of the cross-entropies by default: they are measured for every way, size and seed."""

SETTINGS = (
    "rows", "model", "data", "layer", "hook", "text", "tokens", "by", "sizes", "batch_rows", "sample_rows",
    "latents", "ce_tokens", "draws", "seed", "out",
)  # fmt: skip


MEASURING = ("batch_rows", "sample_rows", "latents", "draws", "seed")

SHOWN = ("fvu", "ce_sae", "rsa", "detection", "shared")
"""Metrics that get a table in the terminal; the page and the JSON have all."""


def progressive(
    run: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folder of a training run, or SAEs.")],
    by: Annotated[
        str | None, typer.Option("--by", metavar="A,B", help="Rankings [energy,frequency,unsorted,random].")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option("--sizes", metavar="64,256", help="Numbers of latents [those of the run].")
    ] = None,
    rows: Rows = None,
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
    """Compare small SAEs."""
    from ..rows.split import halves
    from ..sae.model import SAE
    from ..sizes.progressive import RANKINGS
    from ..sizes.progressive import progressive as compare_sizes
    from ..store.address import sae_paths

    options: dict[str, Any] = {
        "by": by, "sizes": sizes, "rows": rows, "model": model, "data": data, "layer": layer, "hook": hook,
        "text": text, "tokens": tokens, "out": None if out is None else str(out),
    }  # fmt: skip
    settings = merge(dict.fromkeys(SETTINGS), file=config, options=options, sets=set_)
    paths = sae_paths(run)
    short = len({Path(path).name for path in paths}) == len(paths)
    saes = {Path(path).name if short else path: SAE.load(path) for path in paths}
    if not saes:
        raise ConfigError(f"RUN must be a folder with SAEs; `{run[0]}` holds none.")
    wanted = settings.get("sizes")
    if isinstance(wanted, str):
        wanted = whole_numbers(wanted, "--sizes")
    rankings = settings.get("by") or RANKINGS
    rankings = [part.strip() for part in rankings.split(",")] if isinstance(rankings, str) else rankings
    with progress_bar(quiet=json) as progress:
        source, language = rows_for(next(iter(saes.values())), paths[0], settings, progress, ce_tokens=CE_TOKENS)
        chosen_on, measured_on = halves(source)
        result = compare_sizes(
            saes,
            measured_on,
            fit=chosen_on,
            sizes=wanted,
            by=rankings,
            **language,
            **{name: settings[name] for name in MEASURING if name in settings},
            progress=progress,
        )
    if settings.get("out") is not None:
        result.save(Path(settings["out"]) / "progressive.json")
    if json:
        print_json(result.to_json())
        return
    first = result.curves[0].metrics
    shown = [name for name in SHOWN if name in first and first[name].is_defined]
    for number, metric in enumerate(shown):
        if number:
            typer.echo()
        print_table(result.table(metric))
    for each in result.rankings:
        if each.fit is not None:
            typer.echo(f"\n{each.name}, {each.by}: exponent {each.fit.alpha}, R² {each.fit.r2:.3f}; {each.fit.verdict}")
    if settings.get("out") is not None:
        tell(f"wrote {settings['out']}/progressive.json; `saekit report {settings['out']}` makes a page of it")
