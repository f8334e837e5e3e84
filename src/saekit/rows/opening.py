"""Rows from whatever was given: a source, an array, the path of a folder or of an array file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..places import Warned, warnings_on
from ..sae.model import SAE
from ..sae.parts import check_parts
from .arrays import ArrayRows
from .first_use import first_rows, warnings_on_first_use
from .shards import open_rows
from .source import Columns, Source

SCALE_ROWS = 4096
"""First rows that the variance of rows is compared on."""

FEWEST_SCALE_ROWS = 256
"""Number of rows below which their variance is not compared."""

Rows: TypeAlias = Source | Tensor | np.ndarray | str | os.PathLike[str]
"""Rows as functions take them: a source, an array ``[n, d_in]``, the path of a cache folder or array file."""


def source_of(rows: Rows) -> Source:
    """Return rows as a source: a source itself, an array ``[n, d_in]``, or the path of a cache folder or array file."""
    if isinstance(rows, str | os.PathLike):
        return open_rows(rows)
    return rows if isinstance(rows, Source) else ArrayRows(rows)


def as_source(rows: Rows, width: int, where: str) -> Source:
    """Return a source of rows of the width of an SAE.

    Parameters
    ----------
    rows
        A source, an array ``[n, d_in]``, or the path of a cache folder or array file.
    width
        The width that the rows must have.
    where
        Function that messages name.

    Raises
    ------
    ShapeError
        Another width.
    """
    source = source_of(rows)
    check_row_width(source, width, where)
    return source


def source_for(sae: SAE, rows: Rows, where: str) -> Source:
    """Return a source of the rows that an SAE reads; for a transcoder, with the rows that it predicts.

    Raises
    ------
    ShapeError
        Rows or targets of another width.
    ConfigError
        A transcoder, and rows without targets; a crosscoder, and rows of other sources.
    """
    source = as_source(rows, sae.d_in, where)
    check_targets(sae, source, where)
    check_parts(sae, source.info, where)
    return source


def check_targets(sae: SAE, source: Source, where: str) -> None:
    """Refuse a transcoder on rows that come without those that it predicts, or with rows of another width."""
    if not sae.is_transcoder:
        return
    width = source.info.get("d_out")
    if width is None:
        out = sae.provenance.get("hook_out")
        raise ConfigError(
            f"{where}: rows for a transcoder must come with those that it predicts{f' (`{out}`)' if out else ''}; "
            "these do not. Give `model` and `data` instead, or capture them with `target`, or ArrayRows(x, target=y)."
        )
    if width != sae.d_out:
        raise ShapeError(
            f"{where}: the target rows must have the width that the transcoder writes, {sae.d_out}; they have {width}. "
            "Was it trained on another model or hook?"
        )


def target_rows(batch: Columns, sae: SAE) -> Tensor:
    """Return what an SAE must give for rows: the rows themselves, or the targets of a transcoder."""
    if not sae.is_transcoder:
        return batch.x
    assert batch.target is not None  # `check_targets` saw to it
    return batch.target


def check_row_width(source: Source, width: int, where: str) -> None:
    """Refuse rows of another width than that of the SAE; raises `ShapeError`."""
    if source.d_in != width:
        raise ShapeError(
            f"{where}: rows must have the width of the SAE, {width}; they have {source.d_in}. "
            "Was it trained on another model or hook?"
        )


def warnings_on_rows(named: Sequence[tuple[str, SAE]], source: Source) -> list[Warned]:
    """Return what is not as in training when SAEs are put onto these rows; see `saekit.places.warnings_on`.

    SAEs of other libraries are tried on the first rows; see `saekit.rows.first_use`.
    """
    found = warnings_on(named, {**source.info, "row_variance": _variance(source)})
    return found + warnings_on_first_use(named, lambda: first_rows(source), source.info)


def _variance(source: Source) -> float | None:
    """Return the variance of the first rows, where no model has to make them."""
    if source.info.get("kind") not in ("array", "capture", "shards", "joined"):
        return None
    return variance_of(next(source.batches(SCALE_ROWS)).x)


def variance_of(x: Tensor) -> float | None:
    """Return the mean squared distance of rows from their mean; None of so few that it says little."""
    if len(x) < FEWEST_SCALE_ROWS:
        return None
    x = x.double()
    return float((x - x.mean(0)).square().sum(1).mean())


def facts_of(source: Source) -> dict[str, Any]:
    """Return what is written down about rows: enough to find them again."""
    keys = ("model", "hook", "hook_out", "data", "digest")
    return {key: source.info[key] for key in keys if source.info.get(key) is not None}
