"""Rows for commands that rank or measure latents: given, made by a model, or those of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, SaekitError
from ..files import read_json

ROWS = 131_072
"""Rows that are made from a model, when --tokens does not say how many."""

CE_TOKENS = 32_768
"""Tokens of the cross-entropies, when `ce_tokens` does not say how many."""


def rows_for(
    sae: Any, path: str, settings: dict[str, Any], progress: Any, *, ce_tokens: int = CE_TOKENS
) -> tuple[Any, dict[str, Any]]:
    """The rows that an SAE is ranked and measured on, and the language model with its texts where there is one.

    Parameters
    ----------
    sae, path
        The SAE, and where it was read from.
    settings
        ``rows``, ``model``, ``data``, ``layer``, ``hook``, ``text``, ``tokens``, ``ce_tokens``, as far as given.
        Without rows and model: the file of rows beside the training run that has the digest of the training's rows,
        or the model and the texts of the training.
    progress
        The bars.
    ce_tokens
        Tokens of the cross-entropies, unless the settings say.

    Returns
    -------
    source, language
        The rows; keywords of `saekit.measure_sizes` about the model, empty without one.

    Raises
    ------
    ConfigError
        Nothing says where the rows come from.
    """
    from ..models.loading import load_language_model
    from ..provenance import known_place, place_of
    from ..rows.capture import capture
    from ..rows.shards import open_rows

    known = sae.provenance
    model, data = settings.get("model"), settings.get("data")
    if settings.get("rows") is None and model is None:
        again = _training_rows(path, known.get("data_digest"))
        if again is not None:
            return again, {}
        if not (known.get("model") and known_place(known) and (data or known.get("data"))):
            raise ConfigError(
                f"--rows, or --model and --data, must be given: the latents of `{path}` are ranked on rows, and it "
                "does not say which model and texts it was trained on."
            )
        model, data = known["model"], data or known["data"]
    if model is None:
        return open_rows(settings["rows"]), {}
    if data is None:
        raise ConfigError("--data must be given with --model: the texts that it reads.")
    lm = load_language_model(model)
    place = place_of(sae, layer=settings.get("layer"), hook=settings.get("hook"), name=f"`{path}`")
    words = {"text": settings["text"]} if settings.get("text") is not None else {}
    tokens = settings.get("tokens") or ROWS
    language = {"model": lm, "data": data, **words, "tokens": min(tokens, settings.get("ce_tokens", ce_tokens))}
    if settings.get("rows") is not None:
        return open_rows(settings["rows"]), language
    source = capture(
        lm, data, hook=place, **words, tokens=tokens, progress=lambda done, total: progress("rows", done, total)
    )
    return source, language


def _training_rows(path: str, digest: Any) -> Any:
    """The file of rows that a run was trained on, if it lies here or beside the run and is still the same."""
    from ..rows.shards import open_rows

    if path.startswith("hf:") or digest is None:
        return None
    folder = Path(path)
    for run in (folder, folder.parent):
        record = run / "run.json"
        if not record.is_file():
            continue
        name = read_json(record).get("source", {}).get("path")
        places = [Path(name), run.parent / Path(name).name, run / Path(name).name] if name else []
        for place in places:
            try:
                rows = open_rows(place)
            except (SaekitError, OSError):
                continue
            if rows.info.get("digest") == digest:
                return rows
    return None
