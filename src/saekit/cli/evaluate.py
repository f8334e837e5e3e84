"""``saekit evaluate``: how well SAEs reconstruct rows and what they cost the model, beside their controls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import print_evaluation, print_json, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Rows, Set, Text, Tokens
from .settings import merge, names_of

HELP = """Measure SAEs on rows, each beside an untrained SAE and PCA, with intervals from resampled documents.

\b
  saekit evaluate run/topk-1024-k16-seed0 --rows rows
  saekit evaluate run --model builtin --data builtin@heldout --out run      with cross-entropies
  saekit evaluate run --rows embeddings.npy --json

SAE is a folder, a run with several, or hf:owner/name/folder. With --out the numbers go to OUT/evaluation.json, from
which `saekit report OUT` makes a page.
"""

GIVEN = ("rows", "model", "data", "fit", "frozen")


def evaluate(
    sae: Annotated[list[str], typer.Argument(metavar="SAE...", help="SAEs: folders, runs, hf:owner/name/folder.")],
    model: Model = None,
    data: Data = None,
    rows: Rows = None,
    layer: Layer = None,
    hook: Hook = None,
    tokens: Tokens = None,
    text: Text = None,
    controls: Annotated[
        bool | None, typer.Option("--controls/--no-controls", help="Whether to measure the controls [yes].")
    ] = None,
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Evaluate SAEs on the same rows."""
    from ..evaluation.run import evaluate as run
    from ..evaluation.settings import EvaluationSettings
    from ..store.address import sae_paths

    known = names_of(EvaluationSettings) | dict.fromkeys(GIVEN)
    options: dict[str, Any] = {
        "model": model, "data": data, "rows": rows, "layer": layer, "hook": hook, "tokens": tokens, "text": text,
        "controls": controls,
    }  # fmt: skip
    settings = merge(known, file=config, options=options, sets=set_)
    if settings.get("rows") is None and (settings.get("model") is None or settings.get("data") is None):
        raise ConfigError("either --rows, or --model and --data, must be given: what the SAEs are measured on.")
    given = {name: settings.pop(name) for name in GIVEN if name in settings}
    with progress_bar(quiet=json) as progress:
        result = run(sae_paths(sae), **given, settings=EvaluationSettings(**settings), progress=progress)
    if out is not None:
        result.save(Path(out) / "evaluation.json")
    if json:
        print_json(result.to_json())
        return
    print_evaluation(result)
    if out is not None:
        tell(f"wrote {out}/evaluation.json; `saekit report {out}` makes a page of it")
