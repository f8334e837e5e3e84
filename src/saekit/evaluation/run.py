"""Evaluate SAEs: reconstruction, sparsity, redundancy and, with a language model, what they cost it.

One pass over the rows serves all SAEs and all their controls; nothing of size rows times latents is ever held.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..inputs.records import repeatable
from ..measure.decoder_projection import with_projections
from ..measure.fidelity import SplicedModel, place_warnings
from ..measure.intervals import Estimate
from ..measure.metrics import METRICS
from ..measure.reconstruction import (
    SAMPLE_ROWS,
    Measurement,
    as_metrics,
    calibrate,
    interval_facts,
    measure_reconstructors,
)
from ..measure.results import to_plain
from ..measure.settings import CE_TOKENS
from ..measure.verdicts import detectable, family_verdicts, resolution
from ..models.language import LanguageModel
from ..places import NOTE, Warned
from ..progress import shows_progress
from ..provenance import facts_of_sae, library_versions, release
from ..ranks import Ranks, agreed, check_same, together, working
from ..rows.opening import Rows, check_row_width, check_targets, source_for
from ..rows.origin import refuse_unread
from ..rows.settings import StreamSettings, TokenMask
from ..rows.shared_reading import shared_reading
from ..rows.source import Source
from ..rows.stream import stream
from ..rows.synthetic import SyntheticRows
from ..sae.model import SAE
from ..sae.naming import Given, as_sae, check_alike, common_width, named_saes, shape_of
from ..sae.parts import check_parts, common_parts
from ..settings import Progress, silent, suggest_keywords
from .controls import Reconstructors, with_controls
from .hedging import hedging, hedging_config
from .pursuit import against_pursuit
from .result import Control, Evaluated, Evaluation
from .settings import MODEL_ROWS, EvaluationSettings
from .truth import against_truth, known_dictionary


@suggest_keywords
@shows_progress
def evaluate(
    saes: Given | Sequence[Given],
    rows: Rows | None = None,
    *,
    model: str | os.PathLike[str] | LanguageModel | None = None,
    data: Any = None,
    fit: Rows | None = None,
    frozen: Given | None = None,
    settings: EvaluationSettings = EvaluationSettings(),
    progress: Progress | None = None,
) -> Evaluation:
    """Measure SAEs on the same rows, each compared with its baselines.

    The columns of each source of a crosscoder are measured as rows of their own, too: in all columns together the
    source that varies most decides.
    A transcoder is measured against the rows that it predicts: its target takes the place of the row in every metric,
    and its prediction the place of the target in the language model.

    Parameters
    ----------
    saes
        One SAE or several of the same width: values, or paths that `SAE.load` takes.
    rows
        Rows to measure on: a source, an array ``[n, d_in]``, or the path of a cache folder or array file; for
        transcoders with their targets (``ArrayRows(x, target=y)``). None: rows that `model` makes of `data`.
    model, data
        A causal language model and texts for the cross-entropies: what `load_model` and `read_texts` take. Documents
        are cut and special tokens skipped exactly as `capture` does it; skipped tokens pass through unchanged.
    fit
        Rows that the controls are fitted on (mean row, components, threshold); by default the first 32,768 of the
        rows evaluated, which favours PCA a little.
    frozen
        An SAE trained with a frozen decoder. One among `saes` whose provenance says so is used as well.
    settings
        How many rows and tokens, where in the model, which controls, how many resamples.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"rows"`` and ``"tokens"``
        [shown on stderr; ``False``: none].

    Returns
    -------
    Evaluation
        ``.metrics`` of the first SAE, ``.entries`` for all.

    Raises
    ------
    ConfigError
        Neither rows nor a model with data, no hook, SAEs of different hooks, a setting out of range, crosscoders of
        different sources, or rows of others.
    ShapeError
        The SAEs and the rows or the model have different widths.
    DataError
        No rows, or NaN in rows or weights.

    Examples
    --------
    ::

        sk.evaluate(saes, rows).metrics.fvu.value
        sk.evaluate(saes, rows, settings=EvaluationSettings(max_rows=20_000, controls=False))
    """
    with together("evaluate") as ranks:
        return _evaluated(_Call(saes, rows, model, data, fit, frozen), settings, progress, ranks)


@dataclass(frozen=True)
class _Call:
    """What is evaluated on what, as it was given."""

    saes: Given | Sequence[Given]
    rows: Rows | None
    model: str | os.PathLike[str] | LanguageModel | None
    data: Any
    fit: Rows | None
    frozen: Given | None


def _evaluated(call: _Call, settings: EvaluationSettings, progress: Progress | None, ranks: Ranks) -> Evaluation:
    """Evaluate as one of the ranks; all return the same."""
    named = named_saes(call.saes, "evaluate")
    width = common_width(named, "evaluate")
    first = named[0][1]
    sources = common_parts(named, "evaluate")
    frozen_sae = _frozen(call.frozen, first)
    rows, model = call.rows, call.model
    if rows is None and model is None:
        raise ConfigError(
            "evaluate: rows or a language model with texts must be given; got neither. "
            "Pass `rows`, or `model` and `data`."
        )
    refuse_unread(model, call.data, "evaluate")
    if model is None and settings.tokens:
        raise ConfigError(
            f"evaluate: `tokens` is about a language model, and there is none; got {settings.tokens}. "
            "Rows are limited by max_rows (--set max_rows=N)."
        )
    if rows is None:
        settings = replace(settings, max_rows=_rows_to_make(settings))
    settings = replace(settings, tokens=CE_TOKENS if settings.tokens is None else settings.tokens)
    source = None if rows is None else source_for(first, rows, "evaluate")
    data = repeatable(call.data)
    spliced = None
    if model is not None:
        spliced = SplicedModel.of(model, data, [sae for _, sae in named], source, settings, "evaluate")
    if source is None:
        assert spliced is not None
        how = StreamSettings(target=spliced.target, **vars(TokenMask.by(first.provenance)))
        source = stream(spliced.lm, data, hook=spliced.hook, text=settings.text, tokens=settings.max_rows, settings=how)
        check_row_width(source, width, "evaluate")
        check_targets(first, source, "evaluate")
        spliced = replace(spliced, rows=dict(source.info))
    known = known_dictionary(source) if settings.truth else None
    if settings.hedging_rows:
        _check_hedging(named, ranks)
    if settings.pursuit_rows:
        _check_pursuit(named)
    base = source if call.fit is None else source_for(first, call.fit, "evaluate")
    for _, sae in named:
        for each in (source, base):
            check_parts(sae, each.info, "evaluate")
    _check_same(ranks, named, frozen_sae, settings, (source, base), spliced)
    with working():
        with shared_reading([base], ranks):
            calibration = calibrate(base, settings, like=first, with_controls=settings.controls, own=call.fit is None)
        measured = with_controls(named, frozen_sae, calibration if settings.controls else None, settings.seed)
        found = measure_reconstructors(
            measured.reconstructors, source, calibration.mean, spliced=spliced, settings=settings,
            progress=silent if ranks.rank else progress, ranks=ranks, sources=sources,
        )  # fmt: skip
        with shared_reading([source], ranks):
            sample = calibration.sample if call.fit is None else next(source.batches(SAMPLE_ROWS)).x
        sparse = [each.sae for each in measured.reconstructors]
        found = with_projections(found, sparse, sample, intervals=settings.intervals)
    return agreed(ranks, lambda: _result(named, measured, found, (source, known), settings, spliced, calibration.about))


def _result(
    named: Sequence[tuple[str, SAE]],
    measured: Reconstructors,
    found: Measurement,
    rows: tuple[Source, SyntheticRows | None],
    settings: EvaluationSettings,
    spliced: SplicedModel | None,
    fitted_on: str,
) -> Evaluation:
    """Return the result; `rows` come with their dictionary, where it is known and asked for."""
    source, known = rows
    info = dict(source.info)
    entries = [_entry(name, sae, at, measured, found, info.get("digest")) for at, (name, sae) in enumerate(named)]
    if settings.pursuit_rows:
        entries = [
            replace(each, pursuit=against_pursuit(sae, source, settings.pursuit_rows))
            for each, (_, sae) in zip(entries, named, strict=True)
        ]
    if settings.hedging_rows:
        entries = [
            replace(each, hedging=hedging(sae, source, settings.hedging_rows, settings.seed))
            for each, (_, sae) in zip(entries, named, strict=True)
        ]
    if known is not None:
        entries = [
            replace(each, truth=against_truth(sae, known)) for each, (_, sae) in zip(entries, named, strict=True)
        ]
    return Evaluation(
        saekit=release(),
        versions=library_versions(spliced is not None),
        settings=_facts(settings, spliced, fitted_on),
        rows=info,
        n_rows=found.n_rows,
        language_model=found.language_model,
        entries=decided(entries, measured.controls, found.estimates),
        warnings=place_warnings(named, source, spliced) + _notes(named[0][1], settings),
    )


def _check_hedging(named: Sequence[tuple[str, SAE]], ranks: Ranks) -> None:
    """Refuse SAEs that cannot be trained on, and several ranks, which would train together."""
    if ranks.size > 1:
        raise ConfigError("evaluate: `hedging_rows` must be 0 on several ranks; measure it in a call of one process.")
    for _, sae in named:
        hedging_config(sae)


def _check_pursuit(named: Sequence[tuple[str, SAE]]) -> None:
    """Refuse SAEs whose decoder alone does not reconstruct."""
    for name, sae in named:
        if sae.is_transcoder or sae.W_skip is not None:
            raise ConfigError(
                f"evaluate: `pursuit_rows` is for SAEs that reconstruct what they read; `{name}` is a transcoder or "
                "has a skip path. Leave it out."
            )


def _check_same(
    ranks: Ranks,
    named: Sequence[tuple[str, SAE]],
    frozen: SAE | None,
    settings: EvaluationSettings,
    rows: Sequence[Source],
    spliced: SplicedModel | None,
) -> None:
    """Refuse ranks that were started for different evaluations."""
    if ranks.size == 1:
        return
    texts = None if spliced is None or spliced.texts is None else spliced.texts.digest
    facts = {
        "versions": {**library_versions(with_model=True), "saekit": release()},
        "settings": vars(settings),
        "saes": {name: sae.digest() for name, sae in named},
        "frozen": None if frozen is None else frozen.digest(),
        "rows": [{key: each.info.get(key) for key in ("digest", "n_rows")} for each in rows],
        "model": None if spliced is None else spliced.lm.digest,
        "texts": texts,
        "device": named[0][1].device.type,
    }
    check_same(ranks, "evaluate", to_plain(facts))


def _notes(first: SAE, settings: EvaluationSettings) -> list[Warned]:
    """Return what a reader must know about the baselines of transcoders."""
    if not (first.is_transcoder and settings.controls):
        return []
    message = (
        "transcoders are compared with affine maps of the same rows, of rank L0 (`linear`) and of full rank "
        "(`affine`, the one that a skip path must be better than); there is no untrained transcoder, because random "
        "decoder directions say nothing about the rows to predict"
    )
    return [Warned(NOTE, message)]


def _rows_to_make(settings: EvaluationSettings) -> int:
    """Return the number of rows that a model makes: as many as the tokens that were asked for, if any were."""
    if settings.max_rows is not None:
        return settings.max_rows
    return settings.tokens or MODEL_ROWS


def _frozen(frozen: Given | None, first: SAE) -> SAE | None:
    """Return the SAE with a frozen decoder, checked; None where none is given."""
    if frozen is None:
        return None
    sae = as_sae(frozen)
    check_alike("frozen", sae, first, "evaluate")
    return sae


def _facts(settings: EvaluationSettings, spliced: SplicedModel | None, fitted_on: str) -> dict[str, Any]:
    """Return what the result says about how it was made."""
    return {
        "rows": settings.max_rows,
        "tokens": settings.tokens if spliced is not None else None,
        "cross_entropy": "not measured: no language model was given" if spliced is None else spliced.status,
        "controls": settings.controls,
        "controls_fitted_on": fitted_on,
        "batch_rows": settings.batch_rows,
        "seed": settings.seed,
        "intervals": interval_facts(settings.intervals),
    }


DECIDED = ("fvu", "ce_sae")
"""Metrics with a verdict: is the SAE better than its baseline?"""


def decided(
    entries: Sequence[Evaluated], controls: Sequence[dict[str, int]], estimates: Sequence[dict[str, Estimate]]
) -> list[Evaluated]:
    """Return what was measured about SAEs with the verdicts over their baselines; each metric is one family of claims.

    Parameters
    ----------
    entries
        SAEs with their baselines.
    controls
        Per SAE, by label the index of each baseline.
    estimates
        By index and metric.
    """
    pairs = [(at, label, other) for at, each in enumerate(controls) for label, other in each.items()]
    verdicts: dict[tuple[int, str], dict[str, str]] = {(at, label): {} for at, label, _ in pairs}
    detects: dict[tuple[int, str], dict[str, float]] = {(at, label): {} for at, label, _ in pairs}
    for name in DECIDED:
        gaps = _advantages(name, pairs, estimates)
        margin = METRICS[name].margin
        words = family_verdicts(list(gaps.values()), margin, least=None, most=None)
        for (pair, gap), word in zip(gaps.items(), words):
            verdicts[pair][name] = word
            half = resolution(gap.measured(""))
            if not math.isnan(half):
                detects[pair][name] = detectable(half, margin)
    return [_with_verdicts(entry, at, verdicts, detects) for at, entry in enumerate(entries)]


def _advantages(
    name: str, pairs: Sequence[tuple[int, str, int]], estimates: Sequence[dict[str, Estimate]]
) -> dict[tuple[int, str], Estimate]:
    """Return how much better than each baseline an SAE is in a metric that both have, by its index and the label."""
    known = [pair for pair in pairs if name in estimates[pair[0]] and name in estimates[pair[2]]]
    # less is better of both metrics, so the baseline minus the SAE
    return {(at, label): estimates[other][name].minus(estimates[at][name]) for at, label, other in known}


def _with_verdicts(
    entry: Evaluated,
    at: int,
    verdicts: Mapping[tuple[int, str], dict[str, str]],
    detects: Mapping[tuple[int, str], dict[str, float]],
) -> Evaluated:
    """Return what was measured about the SAE of one index with the verdicts over each of its baselines."""
    controls = {
        label: replace(control, verdicts=verdicts[at, label], detects=detects[at, label])
        for label, control in entry.controls.items()
    }
    return replace(entry, controls=controls)


_COMMON = ("redundancy_null", "ce_clean", "ce_zero", "ce_mean")  # the same for an SAE and its controls


def _entry(name: str, sae: SAE, at: int, measured: Reconstructors, found: Measurement, digest: object) -> Evaluated:
    own, sparsity = found.estimates[at], found.sparsities[at]
    assert sparsity is not None
    controls = {}
    for label, index in measured.controls[at].items():
        other = found.estimates[index]
        differences = {key: own[key].minus(other[key]) for key in own if key in other and key not in _COMMON}
        about = measured.reconstructors[index].about or shape_of(sae)
        controls[label] = Control(
            found.metrics(index), as_metrics(differences, ranged=False), about, sources=found.of_sources(index)
        )
    trained_on = sae.provenance.get("data_digest")
    return Evaluated(
        name=name,
        sae=facts_of_sae(sae),
        on_training_rows=None if trained_on is None or digest is None else trained_on == digest,
        metrics=found.metrics(at),
        density=sparsity.histogram(),
        controls=controls,
        sources=found.of_sources(at),
    )
