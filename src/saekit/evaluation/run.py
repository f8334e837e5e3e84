"""Evaluate SAEs: reconstruction, sparsity, redundancy and, with a language model, what they cost it.

One pass over the rows serves all SAEs and all their controls; nothing of size rows times latents is ever held.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..measure.fidelity import SplicedModel, repeatable
from ..measure.reconstruction import Measurement, as_metrics, calibrate, interval_facts, measure_reconstructors
from ..measure.settings import CE_TOKENS, MeasureSettings
from ..models.language import LanguageModel
from ..provenance import facts_of_sae, library_versions, release
from ..rows.opening import as_source, check_row_width
from ..rows.source import Source
from ..rows.stream import stream
from ..sae.model import SAE
from ..sae.naming import as_sae, check_width, common_width, named_saes, shape_of
from ..settings import Progress
from .controls import Measured, with_controls
from .result import Control, Entry, Evaluation

MODEL_ROWS = 131_072
"""Rows taken when they are made from a language model and `rows` is not given."""


def evaluate(
    saes: SAE | str | os.PathLike[str] | Sequence[SAE | str | os.PathLike[str]],
    source: Source | Tensor | Any | None = None,
    *,
    model: str | os.PathLike[str] | LanguageModel | None = None,
    data: Any = None,
    layer: int | None = None,
    hook: str | None = None,
    text: str = "text",
    rows: int | None = None,
    tokens: int | None = None,
    controls: bool = True,
    frozen: SAE | str | os.PathLike[str] | None = None,
    fit: Source | Tensor | Any | None = None,
    batch_rows: int = 4096,
    draws: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure SAEs on the same rows, each beside the controls that it must beat.

    Parameters
    ----------
    saes
        One SAE or several of the same width: values, or paths that `SAE.load` takes.
    source
        The rows: a source, an array ``[n, d_in]``, or the path of a cache folder or array file. None: taken from
        `model` and `data`.
    model, data
        A causal language model and texts for the cross-entropies: what `load_model` and `read_texts` take. Documents
        are cut and special tokens skipped exactly as `capture` does it; skipped tokens pass through unchanged.
    layer, hook
        Where in the model the SAEs belong; by default what their provenance says.
    text
        Name of the text column of `data`.
    rows
        Most rows to see. By default all rows of `source`, or 131,072 from a model.
    tokens
        Most tokens for the cross-entropies (default 32,768); 0 leaves them out.
    controls
        Whether to measure the untrained SAE, the frozen-decoder SAE where there is one, and PCA.
    frozen
        An SAE trained with a frozen decoder. One among `saes` whose provenance says so is used as well.
    fit
        Rows that the controls are fitted on (mean row, components, threshold); by default the first 32,768 of the
        rows evaluated, which favours PCA a little.
    batch_rows
        Rows at a time; changes no result beyond rounding.
    draws
        Resamples of documents behind each interval; 0 for no intervals.
    seed
        Of the untrained SAE and of the resamples.
    progress
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Evaluation
        ``.metrics`` of the first SAE, ``.entries`` for all.

    Raises
    ------
    ConfigError
        Neither rows nor a model with data, no hook, SAEs of different hooks, a setting out of range.
    ShapeError
        The SAEs and the rows or the model have different widths.
    DataError
        No rows, or NaN in rows or weights.
    """
    settings = MeasureSettings(
        layer=layer, hook=hook, text=text, max_rows=rows, tokens=CE_TOKENS if tokens is None else tokens,
        batch_rows=batch_rows, draws=draws, seed=seed,
    )  # fmt: skip
    named = named_saes(saes, "evaluate")
    width = common_width(named, "evaluate")
    frozen_sae = None if frozen is None else as_sae(frozen)
    if frozen_sae is not None:
        check_width("frozen", frozen_sae, width, "evaluate")
    _check_what_is_given(source, model, data)
    rows_given = None if source is None else as_source(source, width, "evaluate")
    data = repeatable(data)
    spliced = None
    if model is not None:
        spliced = SplicedModel.of(model, data, [sae for _, sae in named], rows_given, settings, "evaluate")
    if rows_given is None:
        assert spliced is not None
        settings = replace(settings, max_rows=MODEL_ROWS if rows is None else rows)
        rows_given = stream(spliced.lm, data, hook=spliced.hook, text=text, tokens=settings.max_rows)
        check_row_width(rows_given, width, "evaluate")
        spliced = replace(spliced, rows=dict(rows_given.info))
    base = rows_given if fit is None else as_source(fit, width, "evaluate")
    calibration = calibrate(base, settings, with_pca=controls, own=fit is None)
    measured = with_controls(named, frozen_sae, calibration if controls else None, settings.seed)
    found = measure_reconstructors(
        measured.reconstructors, rows_given, calibration.mean, spliced=spliced, settings=settings, progress=progress
    )
    info = dict(rows_given.info)
    return Evaluation(
        saekit=release(),
        versions=library_versions(spliced is not None),
        settings={
            "rows": settings.max_rows,
            "tokens": settings.tokens if spliced is not None else None,
            "cross_entropy": "not measured: no language model was given" if spliced is None else spliced.status,
            "controls": controls,
            "controls_fitted_on": calibration.about,
            "batch_rows": settings.batch_rows,
            "seed": settings.seed,
            "intervals": interval_facts(settings.draws),
        },
        rows=info,
        n_rows=found.n_rows,
        language_model=found.language_model,
        entries=[_entry(name, sae, at, measured, found, info.get("digest")) for at, (name, sae) in enumerate(named)],
    )


def _check_what_is_given(source: Any, model: Any, data: Any) -> None:
    if source is None and model is None:
        raise ConfigError(
            "evaluate: rows or a language model with texts must be given; got neither. "
            "Pass `source`, or `model` and `data`."
        )
    if model is not None and data is None:
        raise ConfigError("evaluate: `model` must come with `data`, the texts it reads; got none. Pass data='builtin'.")


_COMMON = ("redundancy_null", "ce_clean", "ce_zero", "ce_mean")  # the same for an SAE and its controls


def _entry(name: str, sae: SAE, at: int, measured: Measured, found: Measurement, digest: Any) -> Entry:
    own, sparsity = found.estimates[at], found.sparsities[at]
    assert sparsity is not None
    controls = {}
    for label, index in measured.controls[at].items():
        other = found.estimates[index]
        differences = {key: own[key].minus(other[key]) for key in own if key in other and key not in _COMMON}
        about = measured.reconstructors[index].about or shape_of(sae)
        controls[label] = Control(found.metrics(index), as_metrics(differences, ranged=False), about)
    trained_on = sae.provenance.get("data_digest")
    return Entry(
        name=name,
        sae=facts_of_sae(sae),
        on_training_rows=None if trained_on is None or digest is None else trained_on == digest,
        metrics=found.metrics(at),
        density=sparsity.histogram(),
        controls=controls,
    )
