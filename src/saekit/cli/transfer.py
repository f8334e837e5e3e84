"""``saekit transfer``: train on one language, domain or SAE, test on every other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..classification.settings import ClassifierSettings, Matching
from ..errors import ConfigError
from ..inputs.settings import Split
from .classify import images_or_texts
from .command import Setting, command
from .console import print_json, print_table, print_text, print_warnings, progress_of, say, tell
from .options import Data, Images, Json, Model, Out, Sae

if TYPE_CHECKING:
    from ..classification.transfer_result import Transfer

HELP = """Train classifiers on each value of a column (a language, a domain) and test them on every other, with dense
states, bag of words and chance; or let a classifier of one SAE's latents read those of another, matched.

\b
  saekit transfer --model M --sae run/topk-1024-k16-seed0 --data hate.csv.gz --across lang --group templ_id --out found
  saekit transfer --model M --sae A --to B --data texts.csv --label label --out found     SAE to SAE, by matching
  saekit transfer --model M --sae A --to B --to-model M2 --set by="documents" --data texts.csv --out found
  saekit transfer --model vit --sae A --images photos --across source --out found         images, by patches

Off-diagonal cells are zero-shot. The drop is measured against an in-domain classifier on the same test set. With --out
the numbers go to OUT/transfer.json, with heat maps next to it; an interrupted call continues. Without
--across all rows are one value: the numbers of `saekit classify`.
"""

MOST_SHOWN = 14


FLAGS = ("label", "group", "values", "max_rows", "pools", "arms", "folds", "seed")
NAMED = {"pools": "--pool", "max_rows": "--rows"}


@command("Train on one language, domain or SAE, test on the others.", HELP, flags=FLAGS, named=NAMED)
def transfer(
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[SAE...]", help="Further SAEs after --sae.", show_default=False)
    ] = None,
    *,
    model: Model,
    sae: Sae | None = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", metavar="SAE", help="SAE to transfer the classifier to.")
    ] = None,
    to_model: Annotated[
        str | None, typer.Option("--to-model", metavar="M", help="Model of --to [that of the first SAE].")
    ] = None,
    data: Data | None = None,
    images: Images | None = None,
    across: Annotated[
        str | None, typer.Option("--across", metavar="COLUMN", help="Column of the values to transfer between.")
    ] = None,
    split: Split,
    settings: ClassifierSettings,
    matching: Matching,
    C: Annotated[
        tuple[float, ...] | None,
        Setting("Inverse strengths of the L2 penalty, instead of budget.C [0.01,0.1,1,10,100]."),
    ] = None,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Train on one, test on the others."""
    if to and across is not None:
        raise ConfigError("at most one of --across (values of a column) and --to (another SAE) may be given; got both.")
    saes = [*(sae or []), *(more or [])]
    if to and not saes:
        raise ConfigError("--sae must be given with --to: the SAE that the classifier learns from.")
    if not to:
        _check_unneeded(matching, to_model)
    source = images_or_texts(data, images)
    from ..classification.transfer import RESULT
    from ..classification.transfer import transfer as across_values
    from ..classification.transfer_features import transfer_features as across_saes
    from ..store.address import sae_paths

    if C is not None:
        settings = replace(settings, budget=replace(settings.budget, C=C))
    first, second = sae_paths(saes), sae_paths(to or [])
    common: dict[str, Any] = {"data": source, "split": split, "settings": settings, "out": out}
    with progress_of(json) as progress:
        if to:
            models = [model] * len(first) + [model if to_model is None else to_model] * len(second)
            result = across_saes([*first, *second], model=models, matching=matching, **common, progress=progress)
        else:
            result = across_values(first, model=model, across=across, **common, progress=progress)
    if out is not None:
        from ..report.transfer import write_transfer_figures

        write_transfer_figures(result.to_json(), out)
    if json:
        print_json(result.to_json())
        return
    print_transfer(result)
    if out is not None:
        tell(f"wrote {out}/{RESULT}; `saekit report {out}` makes a page of it")


def _check_unneeded(matching: Matching, to_model: str | None) -> None:
    given = {
        "to_model": to_model is not None,
        "by": matching.by != Matching().by,
        "threshold": matching.threshold is not None,
    }
    unneeded = [name for name, value in given.items() if value]
    if unneeded:
        raise ConfigError(f"`{unneeded[0]}` needs --to: it says how latents of another SAE are read.")


def print_transfer(result: Transfer) -> None:
    """Print the classifiers, the matrix of the first of an SAE, and what they say in words."""
    lines = result.table()
    print_table(lines, keep=lines[0][-2:])  # what decides
    print_text(result.caption())
    if 1 < len(result.values) <= MOST_SHOWN:
        say(f"\nAUC of `{result.shown_arm}`; * can be told from chance (0.5):")
        print_table(result.matrix_table(result.shown_arm, "auc"))
    say()
    for arm in result.arms:
        print_text(arm.sentence)
    print_warnings(result.warnings)
