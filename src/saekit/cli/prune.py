"""``saekit prune``: smaller SAEs from a trained one, and one file that serves every size."""

from __future__ import annotations

from typing import Annotated

import typer

from ..sizes.settings import PruningStudySettings
from .command import command
from .completion import RANKINGS, one_of, saes
from .console import print_curve, print_json, print_warnings, progress_of, say, tell
from .options import Data, Json, Model, Out, Rows

HELP = """Rank the latents of an SAE, keep the most important ones, and measure every size.

\b
  saekit prune run/topk-1024-k16-seed0 --by energy --sizes 64,256 --rows rows --out small
  saekit prune run/topk-1024-k16-seed0 --sizes 64,256 --model builtin --data builtin --out small
  saekit prune SAE --by backward --sizes 64,256 --refit --rows rows --out small

--by takes energy, weighted_energy, frequency, mean, loss (exact leave-one-out), forward or backward (greedy),
attribution or cross_entropy (gradients of --model on --data), alignment_self (cosine of encoder and decoder row, which
predicts stability) or encoder_norm, random, unsorted, a score that the SAE carries (stability, after saekit compare
--write), or a .npy file with a number per latent. Latents are ranked on every second
document of the rows and measured on the others. Without --rows and --model, the rows come from the model and the texts
that the SAE was trained on.

\b
OUT/progressive/   all latents in order of importance; sae.json has the metrics of each size:
                   SAE.load("OUT/progressive", latents=256) or (…, fvu=0.2) reads that part alone
OUT/<size>/        an ordinary SAE of that size
OUT/sizes.json     the curve with intervals
"""


@command(
    "Smaller SAEs from a trained one, each size measured.", HELP, flags=("selection", "refit", "recalibrate")
)  # fmt: skip
def prune(
    sae: Annotated[
        str, typer.Argument(metavar="SAE", help="The SAE: a folder, or hf:owner/name/folder.", autocompletion=saes)
    ],
    *,
    by: Annotated[
        str,
        typer.Option("--by", metavar="NAME", help="Ranking of the latents [energy].", autocompletion=one_of(RANKINGS)),
    ] = "energy",
    sizes: Annotated[tuple[int, ...], typer.Option("--sizes", metavar="64,256", help="Numbers of latents to keep.")],
    rows: Rows | None = None,
    model: Model | None = None,
    data: Data | None = None,
    settings: PruningStudySettings,
    out: Out,
    json: Json = False,
) -> None:
    """Prune an SAE to several sizes."""
    from ..sizes.run import study_pruning

    with progress_of(json) as progress:
        found = study_pruning(
            sae, rows, sizes=sizes, by=by, model=model, data=data, settings=settings, progress=progress
        )
    found.save(out)
    if json:
        print_json(found.to_json(out))
        return
    print_curve([{"latents": point.size, "metrics": point.metrics.to_json()} for point in found.curve.points])
    if answer := found.curve.answer():
        say(f"\n{answer}")
    print_warnings(found.curve.warnings)
    tell(f'\nAny size from one file: SAE.load("{out}/progressive", latents=…); see `saekit show` of it')
