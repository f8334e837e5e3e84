"""``saekit transfer``: train on one language, domain or SAE, test on every other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .console import bare, print_fitting, print_json, print_table, progress_bar, tell
from .options import ConfigFile, Data, Hook, Json, Layer, Model, Out, Set, Text
from .settings import merge, names_of, required, whole_numbers
from .show import expand

HELP = """Train classifiers on each value of a column (a language, a domain) and test them on every other, beside dense
states, bag of words and chance; or let a classifier of one SAE's latents read those of another, matched.

\b
  saekit transfer --model M --sae run/topk-1024-k16-seed0 --data hate.csv.gz --across lang --group templ_id --out found
  saekit transfer --model M --sae A --to B --data texts.csv --label label --out found     SAE to SAE, by matching
  saekit transfer --model M --sae A --to B --to-model M2 --set by="documents" --data texts.csv --out found
  saekit transfer --model vit --sae A --images photos --across source --out found         images, by patches

Off the diagonal nothing of the tested value is seen in training; the drop is against a classifier of the tested value,
judged on the same rows. With --out the numbers go to OUT/transfer.json, with heat maps beside it; an interrupted call
goes on where it stopped. Without --across all rows are one value: plain classification.
"""

MOST_SHOWN = 14


def transfer(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[SAE...]", help="Further SAEs after --sae.", show_default=False)
    ] = None,
    model: Model = None,
    sae: Annotated[
        list[str] | None, typer.Option("--sae", metavar="SAE...", help="SAEs of the model: folders, runs, hf:….")
    ] = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="SAE", help="Another SAE that the classifier is to read.")
    ] = None,
    to_model: Annotated[
        str | None, typer.Option("--to-model", metavar="M", help="The model of --to, where it is another.")
    ] = None,
    data: Data = None,
    images: Annotated[
        str | None, typer.Option("--images", metavar="D", help="Images instead of texts: a folder, array, data set.")
    ] = None,
    text: Text = None,
    label: Annotated[
        str | None, typer.Option("--label", metavar="COLUMN", help="Column of the classes [label].")
    ] = None,
    across: Annotated[
        str | None, typer.Option("--across", metavar="COLUMN", help="Column of the values to transfer between.")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option("--group", metavar="COLUMN", help="Column of what must not be torn apart: template, author."),
    ] = None,
    values: Annotated[
        str | None, typer.Option("--values", metavar="en,de", help="Some of the values, with commas between [all].")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", metavar="N", help="Most rows of each value [all].")] = None,
    layer: Layer = None,
    hook: Hook = None,
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="P", help="Pooling over tokens: sum, mean, max, last, … [sum].")
    ] = None,
    arms: Annotated[
        str | None, typer.Option("--arms", metavar="sae,dense", help="Ways to classify [all that there are].")
    ] = None,
    folds: Annotated[
        int | None, typer.Option("--folds", metavar="K", help="Judge every row by cross-fitting [one locked test set].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of split, folds and resamples [0].")] = None,
    out: Out = None,
    config: ConfigFile = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Train on one, test on the others."""
    from ..classification.transfer import transfer as across_values
    from ..classification.transfer import transfer_features as across_saes

    options: dict[str, Any] = {
        "model": model, "sae": [*(sae or []), *(more or [])] or None, "to": to, "to_model": to_model, "data": data,
        "images": images, "text": text, "label": label, "across": across, "group": group,
        "values": None if values is None else values.split(","), "rows": rows, "layer": layer, "hook": hook,
        "pool": pool, "arms": None if arms is None else arms.split(","), "folds": folds, "seed": seed,
        "out": None if out is None else str(out),
    }  # fmt: skip
    known: dict[str, Any] = {
        **names_of(across_saes, without=("saes", "progress", "budget")),
        **names_of(across_values, without=("progress", "budget")),
        "to": None, "images": None, "C": None,
    }  # fmt: skip
    settings = merge(known, file=config, options=options, sets=set_)
    required(settings, "model")
    if (settings.get("data") is None) == (settings.get("images") is None):
        raise ConfigError("exactly one of --data and --images must be given: what is classified.")
    if settings.get("to") is not None and settings.get("across") is not None:
        raise ConfigError("at most one of --across (values of a column) and --to (another SAE) may be given; got both.")
    folder = None if settings.get("out") is None else Path(settings["out"])
    saes = expand(_listed(settings.pop("sae", [])))
    if "C" in settings:
        settings["budget"] = _budget(settings.pop("C"))
    if folder is not None:
        settings.setdefault("cache", str(folder / "features"))
    to_saes = expand(_listed(settings.pop("to"))) if "to" in settings else []
    if to_saes and not saes:
        raise ConfigError("--sae must be given with --to: the SAE that the classifier learns from.")
    source: Any = settings.pop("data", None)
    if "images" in settings:
        from ..inputs.images import read_images

        source = read_images(settings.pop("images"))
    with progress_bar(quiet=json) as progress:
        if to_saes:
            result = across_saes(source, saes=[*saes, *to_saes], **settings, progress=progress)
        else:
            unknown = {"to_model", "by", "threshold"} & set(settings)
            if unknown:
                raise ConfigError(f"`{sorted(unknown)[0]}` needs --to: it says how latents of another SAE are read.")
            result = across_values(source, sae=saes, **settings, progress=progress)
    if folder is not None:
        from ..report.transfer import write_transfer_figures

        result.save(folder / "transfer.json")
        write_transfer_figures(result.to_json(), folder)
    if json:
        print_json(result.to_json())
        return
    print_transfer(result)
    if folder is not None:
        tell(f"wrote {folder}/transfer.json; `saekit report {folder}` makes a page of it")


def print_transfer(result: Any) -> None:
    """The ways to classify, the matrix of the first of an SAE, and what they say in words."""
    lines = result.table()
    # from the whole table to one number each, with the interval of what decides
    print_fitting(lines, [[line[0], *map(bare, line[1:-2]), *line[-2:]] for line in lines])
    typer.echo(result.caption())
    shown = next((way.name for way in result.ways if way.family == "sae"), result.ways[0].name)
    if 1 < len(result.values) <= MOST_SHOWN:
        typer.echo(f"\nAUC of `{shown}`; * can be told from chance (0.5):")
        print_table(result.matrix_table(shown, "auc"))
    typer.echo()
    for way in result.ways:
        typer.echo(way.sentence)
    for note in result.notes:
        tell(f"note: {note}")


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _budget(value: Any) -> Any:
    """The strengths of the penalty that the inner cross-validation chooses from."""
    from ..classification.arms import Budget

    numbers = whole_numbers(value, "C") if isinstance(value, str) else value
    return Budget(C=tuple(float(each) for each in (numbers if isinstance(numbers, list | tuple) else [numbers])))
