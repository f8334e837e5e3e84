"""``saekit classify`` and ``saekit predict``: what an interpretable classifier costs, and why it decides as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import bare, print_facts, print_fitting, print_json, print_table, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Set, Text
from .settings import merge, names_of, required, whole_numbers
from .show import expand

HELP = """Classify texts by SAE features, beside everything they must beat: dense states under the same pooling, TF-IDF,
principal components, random and untrained dictionaries, as many random latents. Selection, thresholds and penalties are
chosen within the training rows; the test rows judge once, with intervals.

\b
  saekit classify --model builtin --sae run/topk-1024-k16-seed0 --data reviews.csv --label stars --out found
  saekit classify --model M --sae A B --data F --label label --group author --pool sum,max --out found
  saekit classify --model M --sae A --data F --split-column split --arms words,dense,sparse --ks 1,16 --out found
  saekit classify --model M --sae A --data F --out found --missing       what an interrupted run has left to do
  saekit classify found/* --summary --out found                          several data sets, one table
  saekit transfer --model vit --sae A --images photos --out found        images: the same question

With --out every arm is kept in OUT/cells as soon as it is fitted: the same call again computes what is missing. The
numbers go to OUT/classification.json, the fitted classifier to OUT/classifier, for `saekit predict`.
"""

PREDICT_HELP = """Classify texts with a classifier that `saekit classify` has fitted, and say which latents decided.

\b
  saekit predict found/classifier "how do I freeze my card?" --explain
  saekit predict found/classifier --data new.csv --json
  saekit predict found/classifier                           what it is, and its classes' top latents
"""

RESULT = "classification.json"
SUMMARY = "summary.json"


def classify(
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SAE...]", help="More SAEs; with --summary, results.", show_default=False),
    ] = None,
    model: Model = None,
    sae: Annotated[
        list[str] | None, typer.Option("--sae", metavar="SAE...", help="SAEs of the model: folders, runs, hf:….")
    ] = None,
    data: Data = None,
    text: Text = None,
    label: Annotated[
        str | None, typer.Option("--label", metavar="COLUMN", help="Column of the classes [label].")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="COLUMN", help="Column of what must not be torn apart: author, template."),
    ] = None,
    split_column: Annotated[
        str | None, typer.Option("--split-column", metavar="COLUMN", help="Column whose `test` rows judge [drawn].")
    ] = None,
    folds: Annotated[
        int | None, typer.Option("--folds", metavar="K", help="Nested cross-validation [one locked test set].")
    ] = None,
    layer: Layer = None,
    hook: Hook = None,
    pool: Annotated[
        str | None,
        typer.Option("--pool", metavar="P,P", help="Poolings over tokens: sum, mean, … [sum,max]."),
    ] = None,
    arms: Annotated[str | None, typer.Option("--arms", metavar="A,B", help="Kinds of arms [all].")] = None,
    ks: Annotated[str | None, typer.Option("--ks", metavar="1,16", help="Numbers of latents [1,2,4,…,512].")] = None,
    select_by: Annotated[
        str | None,
        typer.Option(
            "--select-by",
            metavar="S",
            help="How latents are ranked: auc, l1, … or stored: stability [mean_difference].",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", help="Most rows, drawn by seed [all].")] = None,
    train_rows: Annotated[int | None, typer.Option("--train-rows", metavar="N", help="Most training rows.")] = None,
    test_rows: Annotated[int | None, typer.Option("--test-rows", metavar="N", help="Most test rows.")] = None,
    min_rows: Annotated[
        int | None,
        typer.Option("--min-rows", metavar="N", help="Leave out classes with fewer rows [refuse rare ones]."),
    ] = None,
    train_sizes: Annotated[
        str | None, typer.Option("--train-sizes", metavar="64,256", help="Training rows of the low-data curves [none].")
    ] = None,
    margin: Annotated[
        float | None, typer.Option("--margin", metavar="D", help="Differences of macro-F1 that count as none [0.01].")
    ] = None,
    shuffles: Annotated[
        int | None, typer.Option("--shuffles", metavar="N", help="Fits of every arm to permuted labels [1].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of split, folds and resamples [0].")] = None,
    save_arm: Annotated[
        str | None,
        typer.Option("--save-arm", metavar="ARM", help="Arm to keep as a classifier; `none` [the best SAE arm]."),
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", "--dry-run", help="List the arms that are not computed yet, and stop.")
    ] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="Put results of several data sets into one table.")
    ] = False,
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Judge SAE features as a classifier's input."""
    if summary:
        _summary(more or [], out, json)
        return
    from ..classification.run import plan_classification
    from ..classification.text_classifier import fit_classifier, is_savable, save_classifier

    options: dict[str, Any] = {
        "model": model, "sae": [*(sae or []), *(more or [])] or None, "data": data, "text": text, "label": label,
        "group": group, "split_column": split_column, "folds": folds, "layer": layer, "hook": hook,
        "pools": _names(pool), "arms": _names(arms), "ks": _numbers(ks, "--ks"), "select_by": select_by,
        "limit": limit,
        "train_rows": train_rows, "test_rows": test_rows, "min_rows": min_rows,
        "train_sizes": _numbers(train_sizes, "--train-sizes"),
        "margin": margin, "shuffles": shuffles, "seed": seed, "save_arm": save_arm,
        "out": None if out is None else str(out),
    }  # fmt: skip
    known: dict[str, Any] = {
        **names_of(plan_classification, without=("saes", "budget")), "sae": None, "save_arm": None, "budget": {},
    }  # fmt: skip
    settings = merge(known, file=config, options=options, sets=set_)
    required(settings, "model", "sae", "data")
    saes = settings.pop("sae")
    keep = settings.pop("save_arm", None)
    plan = plan_classification(
        settings.pop("model"), expand([saes] if isinstance(saes, str) else list(saes)), settings.pop("data"), **settings
    )
    if missing:
        left = [cell.name for cell in plan.missing()]
        if json:
            print_json({"cells": len(plan.cells), "missing": left})
            return
        for name in left:
            typer.echo(name)
        tell(f"{len(left)} of {len(plan.cells)} cells are missing")
        return
    if keep not in (None, "none"):
        found = [cell.arm for cell in plan.cells if cell.arm.name == keep]
        if not found:
            raise ConfigError(f"--save-arm must name an arm; got `{keep}`. `--missing` lists their names.")
        if not is_savable(found[0]):
            raise ConfigError(
                f"--save-arm must name a linear probe of an SAE's latents: only these can be explained by latents; got "
                f"`{keep}`. Name another, such as the same arm without its tree."
            )
    with progress_bar(quiet=json) as progress:
        result = plan.run(progress)
    if plan.out is not None:
        from ..report.classification import write_classification_figures

        result.save(plan.out / RESULT)
        write_classification_figures(result.to_json(), plan.out)
        if keep != "none" and (keep is not None or _is_linear(result)):
            save_classifier(fit_classifier(plan, result, keep), plan.out / "classifier")
    if json:
        print_json(result.to_json())
        return
    print_classification(result)
    if plan.out is not None:
        tell(f"wrote {plan.out}/{RESULT}; `saekit report {plan.out}` makes a page of it")


def print_classification(result: Any) -> None:
    """The arms, with the columns that fit a screen, and what to beware of."""
    lines = result.table()
    short = [[line[0], line[1], bare(line[2]), *line[5:]] for line in lines]
    without = [line[:5] for line in short]  # shuffled labels: what is off chance is among the notes
    print_fitting(short, without, [[line[0], bare(line[1]), *line[2:]] for line in without])
    typer.echo(result.caption())


def predict(
    classifier: Annotated[str, typer.Argument(metavar="DIR", help="Folder of the classifier.")],
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT...]", help="Texts to classify.", show_default=False)
    ] = None,
    data: Data = None,
    text: Text = None,
    model: Model = None,
    explain: Annotated[bool, typer.Option("--explain", help="Name the latents that decided.")] = False,
    json: Json = False,
) -> None:
    """Predict classes of texts."""
    from ..classification.text_classifier import load_classifier

    if texts and data is not None:
        raise ConfigError("at most one of TEXT and --data may be given; got both.")
    loaded = load_classifier(classifier, model=model)
    if not texts and data is None:
        _describe(loaded, json)
        return
    if data is not None:
        from ..inputs.texts import read_texts

        texts = list(read_texts(data, text=text or "text", columns=()).texts)
    assert texts is not None
    if explain:
        found = [loaded.explain(each) for each in texts]
        if json:
            print_json({"predictions": [each.to_json() for each in found]})
            return
        for each in found:
            typer.echo(f"{each.text}\n{each!r}\n")
        return
    probabilities = loaded.predict_proba(texts)
    rows = [
        {"text": each, "predicted": loaded.classes[int(p.argmax())], "probability": float(p.max())}
        for each, p in zip(texts, probabilities)
    ]
    if json:
        print_json({"predictions": rows})
        return
    for row in rows:
        typer.echo(f"{row['predicted']}\t{row['probability']:.2f}\t{row['text']}")


def _describe(classifier: Any, json: bool) -> None:
    card = classifier.card
    if json:
        print_json(card)
        return
    shown = {key: card[key] for key in ("arm", "hook", "pool", "verdict", "saekit")}
    print_facts({**shown, "model": card["model"]["name"], "macro-F1": card["macro_f1"]["value"]})
    for name, rows in classifier.top_latents(5).items():
        typer.echo(f"\n{name}")
        for latent, weight, label in rows:
            typer.echo(f"  {weight:+.3f}  latent {latent}  {label}")


def _summary(folders: list[str], out: Path | None, json: bool) -> None:
    """One table from the results in these folders."""
    from ..classification.result import Classification, summarize

    files = [file for folder in folders for file in _results(Path(folder))]
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
    typer.echo(found.caption())
    if out is not None:
        tell(f"wrote {out}/{SUMMARY}")


def _results(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [path / RESULT] if (path / RESULT).is_file() else sorted(path.glob(f"*/{RESULT}"))


def _is_linear(result: Any) -> bool:
    return any(arm.family == "sae" and arm.probe == "logistic" for arm in result.arms)


def _names(value: str | None) -> list[str] | None:
    return None if value is None else [part.strip() for part in value.split(",")]


def _numbers(value: str | None, option: str) -> list[int] | None:
    return None if value is None else whole_numbers(value, option)
