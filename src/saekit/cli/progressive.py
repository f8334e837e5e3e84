"""``saekit progressive``: which way to a small SAE keeps most, at every size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..grid import Sharing
from ..sizes.settings import ProgressiveStudySettings
from .command import command
from .completion import saes
from .console import print_json, print_table, print_warnings, progress_of, say, tell
from .options import Data, Json, Model, Out, Rows
from .workers import Part, Workers, only_cells, sharing_of, started, tell_cells

if TYPE_CHECKING:
    from ..sizes.result import Progressive

HELP = """Compare the ways of getting small SAEs: the widest vanilla SAE of a run pruned by each ranking, Matryoshka
prefixes, separately trained SAEs, and unsorted prefixes, at equal sizes, over the seeds of the run.

\b
  saekit train --rows rows --arch topk,matryoshka --latents 1024 --k 16 --seeds 0,1,2 --out run
  saekit progressive run --rows rows
  saekit progressive run --model builtin --data builtin --sizes 128,256,512,1024 --out run    with cross-entropies

--workers 4 measures four SAEs at a time, each in a process; calls with --workers on other machines join in where they
see the same folder. Tasks of an array job take --part I/N each. The result is that of one process.

RUN is the folder of a training run, or several SAEs. Latents are ranked on every second document of the rows, and
measured on the others. Without --rows and --model, the rows come from what the run was trained on. With --out the
numbers go to OUT/progressive.json, from which `saekit report OUT` makes a page.
"""

SHOWN = ("fvu", "ce_sae", "rsa", "detection", "shared")
"""Metrics that get a table in the terminal; the page and the JSON have all."""


@command("Pruned, nested and separately trained SAEs compared.", HELP, flags=("by",))
def progressive(
    run: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folder of a training run, or SAEs.", autocompletion=saes)
    ],
    *,
    settings: ProgressiveStudySettings,
    sizes: Annotated[
        tuple[int, ...] | None,
        typer.Option("--sizes", metavar="64,256", help="Numbers of latents [those of the run]."),
    ] = None,
    rows: Rows | None = None,
    model: Model | None = None,
    data: Data | None = None,
    workers: Workers | None = None,
    part: Part | None = None,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Compare small SAEs."""
    sharing = sharing_of(workers, part, has_folder=out is not None)
    from ..sizes.progressive import compare_sizes, compute_parts
    from ..sizes.run import plan_study

    with started(workers), progress_of(json) as progress:
        plan = plan_study(run, rows, sizes=sizes, model=model, data=data, settings=settings, progress=progress)
        if out is not None and sharing is not None and only_cells(part):
            done = compute_parts(plan, out, sharing)
        else:
            result = compare_sizes(plan, None if sharing is None else out, sharing or Sharing())
    if only_cells(part):
        tell_cells(done, len(plan.jobs), json=json)
        return
    if out is not None:
        result.save(out / "progressive.json")
    if json:
        print_json(result.to_json())
        return
    print_progressive(result)
    if out is not None:
        tell(f"wrote {out}/progressive.json; `saekit report {out}` makes a page of it")


def print_progressive(result: Progressive) -> None:
    """Print a table per metric, then the power laws."""
    first = result.curves[0].metrics
    shown = [name for name in SHOWN if name in first and first[name].is_defined]
    for number, metric in enumerate(shown):
        if number:
            say()
        print_table(result.table(metric))
    for each in result.rankings:
        if each.fit is not None:
            say(f"\n{each.name}, {each.by}: exponent {each.fit.alpha}, R² {each.fit.r2:.3f}; {each.fit.verdict}")
    print_warnings(result.warnings)
