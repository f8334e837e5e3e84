"""``saekit evaluate``: how well SAEs reconstruct rows and what they cost the model, compared with their baselines."""

from __future__ import annotations

from typing import Annotated

from ..errors import ConfigError
from ..evaluation.settings import EvaluationSettings
from .command import Setting, command
from .console import print_evaluation, print_json, progress_of, tell
from .options import Data, Json, Model, Out, Rows, Saes

HELP = """Measure SAEs on rows, each compared with an untrained SAE and PCA, with confidence intervals over
documents.

\b
  saekit evaluate run/topk-1024-k16-seed0 --rows rows
  saekit evaluate run --model builtin --data builtin@heldout --out run      with cross-entropies
  saekit evaluate run --rows embeddings.npy --json
  saekit evaluate run --rows synthetic:d_in=64,n_features=256 --truth       against the dictionary of the rows

SAE is a folder, a run with several, or hf:owner/name/folder. With --out the numbers go to OUT/evaluation.json, from
which `saekit report OUT` makes a page.
"""


@command(
    "Measure SAEs, compared with their baselines.", HELP, flags=("controls", "truth"), named={"truth": "--truth"},
    ranked=True,
)  # fmt: skip
def evaluate(
    sae: Saes,
    *,
    model: Model | None = None,
    data: Data | None = None,
    rows: Rows | None = None,
    settings: EvaluationSettings,
    fit: Annotated[
        str | None, Setting("Rows that the baselines are fitted on [the first 32768 of the rows evaluated].")
    ] = None,
    frozen: Annotated[str | None, Setting("SAE that was trained with a frozen decoder [one among SAE...].")] = None,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Evaluate SAEs on the same rows."""
    from ..evaluation.run import evaluate as run
    from ..ranks import is_first_rank
    from ..store.address import sae_paths

    if rows is None and (model is None or data is None):
        raise ConfigError("either --rows, or --model and --data, must be given: what the SAEs are measured on.")
    with progress_of(json) as progress:
        result = run(
            sae_paths(sae),
            rows,
            model=model,
            data=data,
            fit=fit,
            frozen=frozen,
            settings=settings,
            progress=progress,
        )
    if not is_first_rank():
        return
    if out is not None:
        result.save(out / "evaluation.json")
    if json:
        print_json(result.to_json())
        return
    print_evaluation(result)
    if out is not None:
        tell(f"wrote {out}/evaluation.json; `saekit report {out}` makes a page of it")
