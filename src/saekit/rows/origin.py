"""Rows that an SAE is ranked and measured on: given, made by a language model, or those of its training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, SaekitError
from ..files import read_sealed
from ..settings import Progress, silent, suggest_keywords
from .settings import CE_TOKENS

if TYPE_CHECKING:
    from ..models.language import LanguageModel
    from ..sae.model import SAE
    from .source import Source

ROWS = 131_072
"""Rows that are made by a language model, where `tokens` is not given."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class OriginSettings:
    """Where rows come from when they are made by a language model."""

    layer: int | None = None
    """Residual stream after block L, counted from 0 [where the SAE belongs]."""
    hook: str | None = None
    """Any module of the language model instead of `layer` [where the SAE belongs]."""
    target: str | None = None
    """Module whose rows a transcoder predicts [the one that it states]."""
    text: str = "text"
    """Name of the text column [text]."""
    tokens: int = ROWS
    """Rows (tokens) to make [131072]."""
    ce_tokens: int = CE_TOKENS
    """Maximum number of tokens for the cross-entropies [32768]."""


@dataclass(frozen=True)
class Origin:
    """Rows, and the language model that they come from where there is one."""

    rows: Source
    model: LanguageModel | None = None
    data: Any = None
    """The texts; None without a model."""
    ce_tokens: int = 0
    """Tokens of the cross-entropies; 0 without a model."""


def find_rows(
    sae: SAE,
    rows: Any = None,
    *,
    model: Any = None,
    data: Any = None,
    path: str | os.PathLike[str] = "",
    settings: OriginSettings = OriginSettings(),
    progress: Progress | None = None,
) -> Origin:
    """Return the rows that an SAE is ranked and measured on.

    Parameters
    ----------
    sae
        The SAE; its provenance says what it was trained on.
    rows
        A source of rows. Without it, and without `model`: the rows of the training, where they were or next to its run,
        recognized by their digest; or else the model and the texts of the training, by their recorded paths.
    model, data
        A language model and texts: they make the rows where `rows` is not given, and serve the cross-entropies.
    path
        Where the SAE was read from.
    settings
        Where in the model, and how many rows.
    progress
        Called as ``progress("rows", done, total)``.

    Raises
    ------
    ConfigError
        Nothing says where the rows come from, or the model of the training is not where it was.
    """
    from ..models.loading import load_language_model
    from ..provenance import place_of, target_of
    from .capture import capture
    from .opening import source_for
    from .settings import CaptureSettings, TokenMask

    name = os.fspath(path) or "the SAE"
    if rows is None and model is None:
        again = training_rows(name, sae.provenance)
        if again is not None:
            return Origin(again)
        model, data = _training_texts(sae, name, data)
    refuse_unread(model, data, "find_rows")
    source = None if rows is None else source_for(sae, rows, "find_rows")
    if model is None:
        assert source is not None
        return Origin(source)
    if data is None:
        raise ConfigError("`data` must be given with `model`: the texts that it reads.")
    lm = load_language_model(model)
    hook = place_of(sae, layer=settings.layer, hook=settings.hook, name=f"`{name}`")
    if source is None:
        target = target_of(sae, target=settings.target, name=f"`{name}`")
        how = CaptureSettings(target=target, **vars(TokenMask.by(sae.provenance)))
        source = capture(
            lm, data, hook=hook, text=settings.text, tokens=settings.tokens, settings=how, progress=progress or silent
        )
    return Origin(source, lm, data, min(settings.tokens, settings.ce_tokens))


def refuse_unread(model: object, data: object, where: str) -> None:
    """Refuse texts that no language model reads: nobody should believe that something was measured on them.

    Raises
    ------
    ConfigError
        There are texts and no model.
    """
    if model is None and data is not None:
        raise ConfigError(
            f"{where}: `data` is what a language model reads, and there is none. Give `model` with it, or leave it out."
        )


def _training_texts(sae: SAE, name: str, data: object) -> tuple[Any, Any]:
    """Return the model that an SAE was trained on, and `data` or else the texts of the training."""
    from ..models.pretrained import find_model
    from ..provenance import known_place

    known = sae.provenance
    data = data or _where(known, "data")
    if not (known.get("model") and data and known_place(sae)):
        raise ConfigError(
            f"`rows`, or `model` and `data`, must be given: the latents of `{name}` are ranked on rows, and it "
            "does not say which model and texts it was trained on."
        )
    model = _where(known, "model")
    try:
        find_model(model)
    except ModelError as error:
        raise ConfigError(
            f"`model` (--model) must be given, with `data` (--data), or `rows` (--rows): `{name}` was trained on "
            f"`{model}`, which is not found. {error}"
        ) from None
    return model, data


def _where(known: Mapping[str, object], what: str) -> Any:
    """Return the path at which the model or the texts of a training were, or their name where they had no path."""
    return known.get(f"{what}_path") or known.get(what)


def training_rows(path: str, known: Mapping[str, object]) -> Source | None:
    """Return the rows that an SAE was trained on, if they are where they were or next to its run, and still the same.

    Parameters
    ----------
    path
        Where the SAE, or its run, lies.
    known
        The SAE's provenance.
    """
    from .shards import open_rows

    digest = known.get("data_digest")
    if digest is None:
        return None
    for place in dict.fromkeys(_places_of_rows(path, known)):
        try:
            rows = open_rows(place)
        except (SaekitError, OSError):
            continue
        if rows.info.get("digest") == digest:
            return rows
    return None


def _recorded_paths(run: Path) -> list[Path]:
    """Return the paths of rows that the record of a training run names."""
    record = read_sealed(run / "run.json", since=2, version="format")
    source = record.get("source") if isinstance(record, dict) else None
    known = source if isinstance(source, dict) else {}
    return [Path(known[key]) for key in ("rows_path", "path") if isinstance(known.get(key), str) and known[key]]


def _places_of_rows(path: str, known: Mapping[str, Any]) -> Iterator[Path]:
    """Yield where the rows of a training may be: where they were, and beside the run and its folder."""
    if known.get("rows_path"):
        yield Path(known["rows_path"])
    if path.startswith("hf:"):
        return
    for run in (Path(path), Path(path).parent):
        if (run / "run.json").is_file():
            names = _recorded_paths(run)
            yield from names
            yield from (folder / name.name for name in names for folder in (run.parent, run))
