"""Train on one value of a column, test on another: languages, domains, models, in full matrices with controls."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from ..files import check_path
from ..inputs.images import Images
from ..inputs.labelled import column_of, image_keys, read_labelled
from ..inputs.records import one_column, records_of
from ..inputs.settings import Split
from ..inputs.texts import read_texts
from ..progress import shows_progress
from ..provenance import facts_of_sae
from ..ranks import refuse_unsplit
from ..sae.model import SAE
from ..sae.naming import named_saes
from ..settings import Progress, silent, suggest_keywords
from .cells import transfer_of
from .features import ModelLike, Named
from .plan import plan_classification
from .run import judged
from .settings import ClassifierSettings
from .transfer_result import Transfer

RESULT = "transfer.json"

Saes = SAE | str | os.PathLike[str] | Sequence[SAE | str | os.PathLike[str]]


@suggest_keywords
@shows_progress
def transfer(
    saes: Saes = (),
    *,
    model: ModelLike,
    data: Any,
    across: str | Sequence[str] | None = None,
    split: Split = Split(),
    settings: ClassifierSettings = ClassifierSettings(),
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Train classifiers on each value of a column (a language, a domain) and test them on every other.

    Off the diagonal nothing of the tested value is seen in training (zero-shot). On the diagonal an in-domain
    classifier is tested on the same test set; the drop is the paired difference of the two. Without `across` there is
    one value: the same numbers as `classify`.

    Parameters
    ----------
    saes
        One SAE of the model, several, or none: values, or paths.
    model
        Language model, or vision model for images: a value, a path or a name.
    data
        Labelled texts, as `read_texts` takes them; or `Images` (for a loaded vision model, whatever `read_images`
        takes).
    across
        Column of the values; or the values themselves, one per row of data in memory. None: no transfer, one value with
        all rows.
    split
        Columns, and how rows are split. Rows of one group (template, author, document) are never on both sides of the
        split, in whatever values they are. Without groups, equal texts are kept together.
    settings
        Which classifiers are compared, and how. Between values the kinds of arms are by default those of
        `saekit.classification.settings.ACROSS_KINDS`, under one pooling.
    out
        Output folder: ``transfer.json``, fits, features. Fits that are there are not computed again. Figures:
        `saekit.report.transfer.write_transfer_figures`.
    progress
        Called with the stages ``tokens`` (``images``), ``arms`` and ``scores`` [shown on stderr; ``False``: none].

    Returns
    -------
    Transfer

    Raises
    ------
    ConfigError
        A setting is unknown or out of range.
    DataError
        A column or label is missing, a value has one class only or lacks one, there are too few rows or groups.
    ShapeError
        An SAE is for rows of another width.
    """
    refuse_unsplit("transfer")
    data, across = _with_values(data, across, split)
    named = [] if isinstance(saes, list | tuple) and not saes else named_saes(saes, "transfer")
    plan = plan_classification(named, model=model, data=data, across=across, split=split, settings=settings, out=out)
    return saved(transfer_of(judged(plan, progress or silent), facts_of(named)), out)


def saved(result: Transfer, out: str | os.PathLike[str] | None) -> Transfer:
    """Write a result into the output folder, if there is one, and return it."""
    if out is not None:
        result.save(check_path(out) / RESULT)
    return result


def _with_values(data: Any, across: Any, split: Split) -> tuple[Any, str | None]:
    """Return data with the values as its column ``across``, where they are given by themselves, and that name."""
    if across is None or isinstance(across, str):
        return data, across
    if isinstance(data, str | os.PathLike | Images):
        raise ConfigError(
            "transfer: `across` may be a list of values for data in memory only; got one for a file or images. Name a "
            "column of it."
        )
    rows = [row if isinstance(row, Mapping) else dict(zip((split.text, split.label), row)) for row in records_of(data)]
    values = one_column(across)
    if len(values) != len(rows):
        raise InputError(f"transfer: `across` must hold a value per row; got {len(values)} for {len(rows)} rows.")
    return [{**row, _ACROSS: value} for row, value in zip(rows, values)], _ACROSS


_ACROSS = "across"


def facts_of(named: Named) -> list[dict[str, Any]]:
    """Return name, shape, digest and provenance of each SAE."""
    return [{"name": name, **facts_of_sae(sae)} for name, sae in named]


@suggest_keywords
def held_out(data: Any, *, across: str | Sequence[str] | None = None, split: Split = Split()) -> np.ndarray:
    """Return the rows that an SAE should not be trained on, if it is to be tested on rows that it has not seen.

    Parameters
    ----------
    data, across, split
        As they are given to `classify`, `transfer` or `transfer_features`.

    Returns
    -------
    numpy.ndarray
        ``bool [n_rows]``, for the rows as `read_texts` or `read_images` gives them: True for a test row, and where a
        row shares its group or its text with one. With `folds` every row that is used is a test row.

    Raises
    ------
    ConfigError, DataError
        As `transfer`.

    Examples
    --------
    ::

        split = sk.Split(group="templ_id")
        seen = held_out("hate.csv.gz", across="lang", split=split)
        texts = [text for text, out in zip(sk.read_texts("hate.csv.gz"), seen) if not out]
        rows = sk.capture(model, texts, layer=4)
    """
    data, across = _with_values(data, across, split)
    labelled = read_labelled(data, across=across, split=split)
    test = np.unique(labelled.test)
    names = {labelled.keys[row] for row in test}
    if isinstance(data, Images):
        own = column_of(data, split.group, "group") if split.group is not None else image_keys(data)
        return np.array([each in names for each in own])
    columns = [] if split.group is None else [split.group]
    table = read_texts(data, text=split.text, split=split.hub_split, columns=columns)
    texts = {labelled.texts[row] for row in test}
    own = column_of(table, split.group, "group") if split.group is not None else list(table.texts)
    return np.array([name in names or each in texts for name, each in zip(own, table.texts)])
