"""``saekit sources``: which latents of a crosscoder belong to both of its sources, and which to one."""

from __future__ import annotations

from typing import Annotated

import typer

from ..comparison.settings import SourceSettings
from .command import command
from .console import print_json, print_table, print_text, print_warnings, progress_of, tell
from .options import Json, Out, Rows

HELP = """Compare the two sources of a crosscoder: shared latents, latents of one source alone, and whether they are.

\b
  saekit train --rows joined:base=rows-a,tuned=rows-b --arch batchtopk --latents 1024 --k 16 --out run
  saekit train --rows joined-null:base=rows-a,tuned=rows-b --arch batchtopk --latents 1024 --k 16 --out null
  saekit sources run/batchtopk-1024-k16-seed0 --rows joined:base=rows-a,tuned=rows-b \
--null null/batchtopk-1024-k16-seed0

rows-a and rows-b were captured from the same texts (two layers, or a base model and a tuned one). The null was trained
on rows whose sources hold the same but for noise: what it calls specific is the error rate.
"""


@command("Compare the two sources of a crosscoder.", HELP)
def sources(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="A crosscoder of two sources.")],
    *,
    rows: Rows,
    null: Annotated[
        str | None, typer.Option("--null", metavar="SAE", help="Crosscoder trained on the null of the rows [none].")
    ] = None,
    settings: SourceSettings,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Compare sources."""
    from ..comparison.sources import compare_sources
    from ..sae.model import SAE

    with progress_of(json) as progress:
        result = compare_sources(
            SAE.load(sae), rows, null=None if null is None else SAE.load(null), settings=settings, progress=progress
        )
    if out is not None:
        result.save(out / "source_comparison.json")
    if json:
        print_json(result.to_json())
        return
    print_table(result.table())
    print_text(result.caption())
    print_warnings(result.warnings)
    if out is not None:
        tell(f"wrote {out}/source_comparison.json; `saekit report {out}` makes a page of it")
