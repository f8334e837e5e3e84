"""``saekit classify`` and ``saekit predict``: what an interpretable classifier costs, and why it decides as it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..classification.settings import ClassifierSettings
from ..errors import ConfigError
from ..inputs.settings import Split
from ..terminal import plain
from .command import command
from .console import bare, print_facts, print_json, print_table, print_text, print_warnings, progress_of, say, tell
from .options import Data, Images, Json, Model, Out, Sae, Text
from .settings import required
from .workers import Part, Workers, only_cells, sharing_of, started, tell_cells

if TYPE_CHECKING:
    from ..classification.plan import Plan

HELP = """Classify texts or images by SAE features, compared with baselines (dense states under the same pooling,
TF-IDF, pixels, principal components) and controls (random and untrained dictionaries, as many random latents).
Selection, thresholds and penalties are chosen within the training rows; the test rows are used once, with intervals.

\b
  saekit classify --model builtin --sae run/topk-1024-k16-seed0 --data reviews.csv --label stars --out found
  saekit classify --model M --sae A B --data F --label label --group author --pool sum,max --out found
  saekit classify --model M --sae A --data F --split-column split --arms words,dense,sparse --ks 1,16 --out found
  saekit classify --model M --sae A --data F --out found --missing       what an interrupted run has left to do
  saekit classify found/* --summary --out found                          several data sets, one table
  saekit classify --model vit --sae A --images photos --out found        images

--workers 4 fits in four processes; calls with --workers on other machines join in where they see the same folder. Tasks
of an array job take --part I/N each. Claims of processes that died expire. The result is that of one process.

With --out every arm is kept in OUT/fits as soon as it is fitted: the same call again computes what is missing. The
numbers go to OUT/classification.json, the fitted classifier to OUT/classifier, for `saekit predict`.
"""

PREDICT_HELP = """Classify texts with a classifier that `saekit classify` has fitted, and say which latents decided.

\b
  saekit predict found/classifier "how do I freeze my card?" --explain
  saekit predict found/classifier --data new.csv --json
  saekit predict found/classifier --data new.csv --explain --out found     then: saekit report found
  saekit predict found/classifier                           what it is, and its classes' top latents
"""

SUMMARY = "summary.json"


FLAGS = (
    "label", "group", "split_column", "folds", "pools", "arms", "ks", "select_by", "max_rows", "train_rows",
    "test_rows", "min_rows", "train_sizes", "margin", "shuffles", "seed", "save_arm",
)  # fmt: skip
NAMED = {"pools": "--pool", "max_rows": "--limit"}


@command("Classify texts or images by latents, compared with baselines.", HELP, flags=FLAGS, named=NAMED, ranked=True)
def classify(
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SAE...]", help="More SAEs; with --summary, results.", show_default=False),
    ] = None,
    *,
    model: Model | None = None,
    sae: Sae | None = None,
    data: Data | None = None,
    images: Images | None = None,
    split: Split,
    settings: ClassifierSettings,
    missing: Annotated[
        bool | None, typer.Option("--missing", "--dry-run", help="List the arms that are not computed yet, and stop.")
    ] = None,
    summary: Annotated[
        bool | None, typer.Option("--summary", help="Put results of several data sets into one table.")
    ] = None,
    workers: Workers | None = None,
    part: Part | None = None,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Classify texts or images by SAE features."""
    from ..ranks import is_first_rank, refuse

    sharing = sharing_of(workers, part, has_folder=out is not None)
    if sharing is not None:
        refuse("classify with --workers or --part")
    if summary:
        if is_first_rank():
            _summary(more or [], out, json)
        return
    saes = [*(sae or []), *(more or [])]
    required({"model": model, "sae": saes or None, "data": data if images is None else images}, "model", "sae", "data")
    source = images_or_texts(data, images)
    from ..classification.plan import plan_classification
    from ..classification.run import RESULT, run_fits, run_plan
    from ..sae.naming import named_saes
    from ..store.address import sae_paths

    assert model is not None
    named = named_saes(sae_paths(saes), "classify")
    plan = plan_classification(named, model=model, data=source, split=split, settings=settings, out=out)
    if missing:
        if is_first_rank():
            _missing(plan, json)
        return
    with started(workers), progress_of(json) as progress:
        if only_cells(part):
            fits = run_fits(plan, progress, sharing)
        else:
            result = run_plan(plan, progress, sharing)
    if not is_first_rank():
        return
    if only_cells(part):
        tell_cells(fits, len(plan.jobs), json=json)
        return
    if out is not None:
        from ..report.classification import write_classification_figures

        write_classification_figures(result.to_json(), out)
    if json:
        print_json(result.to_json())
        return
    print_classification(result)
    if out is not None:
        tell(f"wrote {out}/{RESULT}; `saekit report {out}` makes a page of it")


def images_or_texts(data: str | None, images: str | None) -> Any:
    """Return what is classified: the address of texts, or the images that were read.

    Raises
    ------
    ConfigError
        Both are given, or none.
    """
    if (data is None) == (images is None):
        raise ConfigError("exactly one of --data and --images must be given: what is classified.")
    if images is None:
        return data
    from ..inputs.images import read_images

    return read_images(images)


def _missing(plan: Plan, json: bool) -> None:
    """Tell what an interrupted run has left to do."""
    from ..classification.stored_fits import missing_jobs

    left = [job.name for job in missing_jobs(plan)]
    if json:
        print_json({"cells": len(plan.jobs), "missing": left})
        return
    for name in left:
        say(name)
    tell(f"{len(left)} of {len(plan.jobs)} fits are missing")


def print_classification(result: Any) -> None:
    """Format the arms, with the columns that fit a screen, and the warnings."""
    print_table([[line[0], line[1], bare(line[2]), *line[5:]] for line in result.table()])
    if result.families:
        say()
        lines = [[*line[:2], *map(bare, line[3:5]), *line[5:]] for line in result.families_table()]
        print_table(lines, keep=lines[0][-2:])
    print_text(result.caption())
    print_warnings(result.warnings)


@command("Use a fitted classifier, and see which latents decide.", PREDICT_HELP)
def predict(
    classifier: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the classifier.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT...]", help="Texts to classify.", show_default=False)
    ] = None,
    *,
    data: Data | None = None,
    text: Text | None = None,
    model: Model | None = None,
    explain: Annotated[bool, typer.Option("--explain", help="Name the latents that decided.")] = False,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Predict classes of texts."""
    from ..classification.text_classifier import load_classifier

    if texts and data is not None:
        raise ConfigError("at most one of TEXT and --data may be given; got both.")
    if out is not None and not (explain and (texts or data is not None)):
        raise ConfigError(
            "predict: --out must come with --explain and texts: it writes OUT/decisions.json, the latents that decided "
            "about each. Add --explain and texts, or leave --out out."
        )
    loaded = load_classifier(classifier, model=model)
    if not texts and data is None:
        _describe(loaded, json)
        return
    read = texts if data is None else _texts_of(data, text)
    assert read is not None
    warnings = loaded.warnings()
    for warning in () if json else warnings:
        tell(str(warning))
    predictions, lines = _explained(loaded, read, out) if explain else _predicted(loaded, read)
    if json:
        print_json({"predictions": predictions, "warnings": [each.to_json() for each in warnings]})
        return
    for line in lines:
        say(line)


def _texts_of(data: str, text: str | None) -> list[str]:
    from ..inputs.texts import read_texts

    return list(read_texts(data, text="text" if text is None else text, columns=()).texts)


def _explained(classifier: Any, texts: Sequence[str], out: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return which latents decided about each text, as JSON and as lines; with `out` also in its decisions.json."""
    found = [classifier.explain(each) for each in texts]
    if out is not None:
        from ..classification.decisions_result import Decisions

        Decisions.of(classifier, found).save(out / "decisions.json")
    return [each.to_json() for each in found], [f"{each.text}\n{each!r}\n" for each in found]


def _predicted(classifier: Any, texts: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the most probable class of each text, as JSON and as lines."""
    rows = [
        {"text": each, "predicted": classifier.classes[int(p.argmax())], "probability": float(p.max())}
        for each, p in zip(texts, classifier.predict_proba(texts))
    ]
    return rows, [f"{plain(row['predicted'])}\t{row['probability']:.2f}\t{plain(row['text'])}" for row in rows]


def _describe(classifier: Any, json: bool) -> None:
    card = classifier.card
    if json:
        print_json(card)
        return
    shown = {key: card[key] for key in ("arm", "hook", "pool", "verdict", "saekit")}
    print_facts({**shown, "model": card["model"]["name"], "macro-F1": card["macro_f1"]["value"], **_sparse_facts(card)})
    for name, rows in classifier.top_latents(5).items():
        say(f"\n{name}")
        for latent, weight, label in rows:
            say(f"  {weight:+.3f}  latent {latent}  {label}")


def _sparse_facts(card: dict[str, Any]) -> dict[str, Any]:
    """Return what is to be told about the sparse arm of a classifier, and its price."""
    few = card.get("sparse")
    if few is None:
        return {}
    from ..measure.results import Measured

    price = Measured.from_json(few["difference"])
    return {
        "sparse arm": f"{few['k']} latents, macro-F1 {few['macro_f1']['value']:.3f} on {few['n_test']:,} test rows; "
        f"minus that of all latents {price:+.3f}",
        "shown by --explain": f"{few['shown']} latents with {_percent(few['full_shown_fraction'])} of what moves the "
        f"logit, {_percent(few['shown_fraction'])} in the sparse arm (mean over the test rows)",
    }


def _percent(fraction: float | None) -> str:
    return "an unknown part" if fraction is None else f"{fraction:.0%}"


def _summary(folders: list[str], out: Path | None, json: bool) -> None:
    """One table from the results in these folders."""
    from ..classification.result import Classification, summarize
    from ..files import check_path

    files = [file for folder in folders for file in _results(check_path(folder))]
    if len(files) < 2:
        raise ConfigError(
            f"--summary needs at least two results; got {len(files)}. Name folders that `saekit classify --out` wrote."
        )
    results = [Classification.load(file) for file in files]
    names = [each.name for each in results]
    if len(set(names)) < len(names):  # one data set under several models: the folder tells them apart
        names = [file.parent.name for file in files]
    if len(set(names)) < len(names):
        names = [str(file.parent) for file in files]
    found = summarize(dict(zip(names, results)))
    if out is not None:
        found.save(out / SUMMARY)
    if json:
        print_json(found.to_json())
        return
    print_table(found.table())
    print_text(found.caption())
    if out is not None:
        tell(f"wrote {out}/{SUMMARY}")


def _results(path: Path) -> list[Path]:
    from ..classification.run import RESULT
    from ..files import check_path

    if check_path(path).is_file():
        return [path]
    return [path / RESULT] if (path / RESULT).is_file() else sorted(path.glob(f"*/{RESULT}"))
