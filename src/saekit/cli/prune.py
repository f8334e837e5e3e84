"""``saekit prune``: smaller SAEs from a trained one, and one file that serves every size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .console import print_curve, print_json, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Rows, Set, Text, Tokens
from .rows_option import rows_for
from .settings import merge, required, whole_numbers

if TYPE_CHECKING:
    from ..sae.model import SAE

HELP = """Rank the latents of an SAE, keep the most important ones, and measure what every size is worth.

\b
  saekit prune run/topk-1024-k16-seed0 --by energy --sizes 64,256 --rows rows --out small
  saekit prune run/topk-1024-k16-seed0 --sizes 64,256 --model builtin --data builtin --out small
  saekit prune SAE --by backward --sizes 64,256 --refit --rows rows --out small

--by takes energy, weighted_energy, frequency, mean, loss (exact leave-one-out), forward or backward (greedy),
attribution or cross_entropy (gradients of --model on --data), random, unsorted, a score that the SAE carries
(stability, after saekit compare --write), or a .npy file with a number per latent. Latents are ranked on every second
document of the rows and measured on the others. Without --rows and --model, the rows come from the model and the texts
that the SAE was trained on.

\b
OUT/progressive/   all latents in order of importance; sae.json says what each size is worth:
                   SAE.load("OUT/progressive", latents=256) or (…, fvu=0.2) reads that part alone
OUT/<size>/        an ordinary SAE of that size
OUT/sizes.json     the curve with intervals
"""

SETTINGS = (
    "rows", "model", "data", "layer", "hook", "text", "tokens", "by", "sizes", "selection", "refit", "recalibrate",
    "batch_rows", "sample_rows", "latents", "ce_tokens", "draws", "seed", "out",
)  # fmt: skip


def prune(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="The SAE: a folder, or hf:owner/name/folder.")],
    by: Annotated[
        str | None, typer.Option("--by", metavar="NAME", help="What the latents are ranked by [energy].")
    ] = None,
    sizes: Annotated[str | None, typer.Option("--sizes", metavar="64,256", help="Numbers of latents to keep.")] = None,
    selection: Annotated[
        str | None, typer.Option("--selection", help="TopK chooses `before` pruning's cut or `after` it [before].")
    ] = None,
    refit: Annotated[bool | None, typer.Option("--refit", help="Fit each decoder anew by least squares.")] = None,
    recalibrate: Annotated[
        bool | None, typer.Option("--recalibrate", help="Lower thresholds until as many latents fire as before.")
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
    """Prune an SAE to several sizes."""
    options: dict[str, Any] = {
        "by": by, "sizes": sizes, "selection": selection, "refit": refit, "recalibrate": recalibrate, "rows": rows,
        "model": model, "data": data, "layer": layer, "hook": hook, "text": text, "tokens": tokens,
        "out": None if out is None else str(out),
    }  # fmt: skip
    settings = merge(dict.fromkeys(SETTINGS), file=config, options=options, sets=set_)
    required(settings, "sizes", "out")
    wanted = whole_numbers(settings["sizes"], "--sizes") if isinstance(settings["sizes"], str) else settings["sizes"]
    with progress_bar(quiet=json) as progress:
        found = run(sae, wanted, settings, progress)
    if json:
        print_json(found)
        return
    print_curve([{"latents": point["size"], "metrics": point["metrics"]} for point in found["curve"]["points"]])
    tell(f'\nAny size from one file: SAE.load("{found["progressive"]}", latents=…); see `saekit show` of it')


def run(path: str, sizes: list[int], settings: dict[str, Any], progress: Any) -> dict[str, Any]:
    """Do it; returns what was written and measured, as plain JSON."""
    from ..rows.split import halves
    from ..sae.model import SAE
    from ..sizes.attribution import ATTRIBUTIONS
    from ..sizes.prune import check_sizes, check_ties
    from ..sizes.prune import prune as pruned_to
    from ..sizes.ranking import ORDERS
    from ..sizes.ranking import rank as ranked_by
    from ..sizes.size_curve import measure_sizes

    sae = SAE.load(path)
    sizes = check_sizes(sae, sizes, "--sizes")
    by = _by(sae, settings.get("by", "energy"))
    if isinstance(by, str) and by in sae.scores and by not in ORDERS:  # known before any row: do not let wait for them
        check_ties(ranked_by(sae, None, by=by), sizes, "--sizes")
    source, language = rows_for(sae, path, settings, progress)
    chosen_on, measured_on = halves(source)
    common: dict[str, Any] = {name: settings[name] for name in ("batch_rows", "seed") if name in settings}
    if isinstance(by, str) and by.replace("-", "_") in ATTRIBUTIONS:
        sae, language = _attributed(sae, source, language, progress)
    ranked = ranked_by(sae, chosen_on, by=by, **common, progress=progress)
    check_ties(ranked, sizes, "--sizes")
    how = {name: settings[name] for name in ("selection", "refit", "recalibrate") if settings.get(name)}
    small = pruned_to(ranked, chosen_on, by="unsorted", sizes=sizes, **how, **common, progress=progress)
    measuring: dict[str, Any] = {
        **language,
        **common,
        **{name: settings[name] for name in ("sample_rows", "latents", "draws") if name in settings},
        "progress": progress,
    }
    prefixes = measure_sizes(ranked, measured_on, sorted({*sizes, sae.n_latents}), name=Path(path).name, **measuring)
    curve = prefixes
    if how.keys() - {"selection"} or how.get("selection") == "after":
        curve = measure_sizes(small, measured_on, name=f"{Path(path).name}, pruned", **measuring)
    folder = Path(settings["out"])
    prefixes.write_into(ranked).save(folder / "progressive")
    for each in small:
        each.save(folder / str(each.n_latents))
    curve.save(folder / "sizes.json")
    return {
        "out": str(folder),
        "progressive": str(folder / "progressive"),
        "saes": [str(folder / str(each.n_latents)) for each in small],
        "by": ranked.provenance.get("latent_order", "unsorted"),
        "ranking": ranked.provenance.get("ranking", {}),
        "curve": curve.to_json(),
    }


def _attributed(sae: SAE, source: Any, language: dict[str, Any], progress: Any) -> tuple[SAE, dict[str, Any]]:
    """The SAE with its gradient attributions from the texts in even places; the others are left to measure on."""
    from ..inputs.texts import read_texts
    from ..measure.fidelity import CHARACTERS_PER_TOKEN
    from ..provenance import place_of
    from ..rows.split import text_halves
    from ..sizes.attribution import attribution

    if not language:
        raise ConfigError("--model and --data must be given: --by attribution is a gradient of a language model.")
    words = {"text": language["text"]} if "text" in language else {}
    texts = read_texts(language["data"], **words, columns=(), characters=2 * language["tokens"] * CHARACTERS_PER_TOKEN)
    chosen_on, measured_on = text_halves(texts)
    hook = place_of(sae, source.info)
    found = attribution(sae, language["model"], chosen_on, hook=hook, tokens=language["tokens"], progress=progress)
    scores = {name: score for name, score in found.scores.items() if name != "frequency"}
    return sae.with_scores(**scores), {**language, "data": measured_on}


def _by(sae: SAE, by: str) -> Any:
    """A name, or the scores in a file."""
    if not by.endswith(".npy"):
        from ..sizes.attribution import ATTRIBUTIONS
        from ..sizes.ranking import check_order

        check_order(sae, by, "--by", also=ATTRIBUTIONS)
        return by
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.load(by, allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--by must name a .npy file of a number per latent; `{by}` cannot be read: {error}"
        ) from None
