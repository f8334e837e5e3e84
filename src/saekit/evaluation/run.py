"""Evaluate SAEs: reconstruction, sparsity, redundancy and, with a language model, what they cost it.

One pass over the rows serves all SAEs and all their controls; nothing of size rows times latents is ever held.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..inputs.texts import read_texts
from ..measure.accumulators import Moments, Reconstruction, Sparsity
from ..measure.bootstrap import LEVEL, N_GROUPS, DocumentBootstrap, Estimate, row_groups
from ..measure.controls import Arm, pca_arm, sae_arm, untrained_like
from ..measure.fidelity import Skipped, measure_fidelity
from ..measure.metrics import METRICS, Metrics
from ..measure.pca import PCA, Covariance
from ..measure.redundancy import random_max_cosine, redundancy
from ..models.hooks import find_hook
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..provenance import _bytes, known_place, library_versions, place_of, release, sae_digest
from ..rows.arrays import ArrayRows
from ..rows.shards import open_rows
from ..rows.source import Source
from ..rows.stream import stream
from ..rows.tokens import CONTEXT
from ..sae.model import SAE
from .result import Control, Entry, Evaluation

CALIBRATION_ROWS = 32_768
"""First rows that the mean row and the principal components are computed from."""

SAMPLE_ROWS = 4_096
"""Rows of these that are kept to find thresholds and the number of components."""

MODEL_ROWS = 131_072
"""Rows taken when they are made from a language model and `rows` is not given."""

CE_TOKENS = 32_768
"""Tokens that cross-entropies are measured on when `tokens` is not given."""

CHARACTERS_PER_TOKEN = 12
"""How much text is read for a number of tokens."""

BLOCK_ROWS = 64
"""Rows without a document are resampled in runs of this many."""

Progress = Callable[[str, int, int | None], None]
"""Called with the stage (``"rows"``, ``"tokens"``), how much is done, and the total where it is known."""


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
    _check_settings(rows=rows, tokens=tokens, batch_rows=batch_rows, draws=draws)
    named = _named(saes)
    width = _common_width(named)
    frozen_sae = None if frozen is None else _as_sae(frozen)
    if frozen_sae is not None:
        _check_sae("frozen", frozen_sae, width)
    if source is None and model is None:
        raise ConfigError(
            "evaluate: rows or a language model with texts must be given; got neither. "
            "Pass `source`, or `model` and `data`."
        )
    if model is not None and data is None:
        raise ConfigError("evaluate: `model` must come with `data`, the texts it reads; got none. Pass data='builtin'.")
    if source is not None:
        source = _as_source(source)
        _check_width(source, width)
    lm = None if model is None else load_language_model(model)
    place = None if lm is None else _place(lm, named, layer, hook, source, width)
    tokens = CE_TOKENS if tokens is None else tokens
    if not isinstance(data, str | os.PathLike | Sequence | None):
        data = list(data)  # an iterator can be read only once
    texts = None
    if lm is not None and lm.is_causal and tokens:
        texts = read_texts(data, text=text, columns=(), characters=tokens * CHARACTERS_PER_TOKEN)
    if source is None:
        assert lm is not None
        rows = MODEL_ROWS if rows is None else rows
        source = stream(lm, data, hook=place, text=text, tokens=rows)
        _check_width(source, width)

    base = source if fit is None else _as_source(fit)
    _check_width(base, width)
    fitted = _fit(base, batch_rows, rows, controls, own=fit is None)
    arms, parts = _arms(named, frozen_sae, fitted, controls, seed)
    seen = _measure_rows(arms, source, batch_rows, rows, fitted.mean, draws, seed, progress)
    estimates = [dict(each) for each in seen.estimates]
    language_model: dict[str, Any] | None = None
    info = dict(source.info)
    if lm is not None and place is not None and texts is not None:
        costs, language_model = measure_fidelity(
            lm,
            place,
            texts,
            arms,
            mean=fitted.mean,
            tokens=tokens,
            context=min(info.get("context") or CONTEXT, lm.context),
            skipped=Skipped.by(info),
            draws=draws,
            seed=seed,
            progress=progress,
        )
        for each, cost in zip(estimates, costs, strict=True):
            each.update(cost)
    entries = [
        _entry(named[i], arms, parts[i], estimates, seen.sparsities[parts[i][""]], info.get("digest"))
        for i in range(len(named))
    ]
    settings: dict[str, Any] = {
        "rows": rows,
        "tokens": tokens if lm is not None else None,
        "cross_entropy": _cross_entropy(lm, language_model is not None),
        "controls": controls,
        "controls_fitted_on": fitted.about,
        "batch_rows": batch_rows,
        "seed": seed,
        "intervals": {
            "level": LEVEL,
            "draws": draws,
            "method": "basic bootstrap over documents, paired between an SAE and its controls",
            "documents": f"put into at most {N_GROUPS} groups by document id",
            "rows_without_document": f"runs of {BLOCK_ROWS} consecutive rows",
        },
    }
    return Evaluation(
        saekit=release(),
        versions=library_versions(lm is not None),
        settings=settings,
        rows=info,
        n_rows=seen.n_rows,
        language_model=language_model,
        entries=entries,
    )


# ---------------------------------------------------------------------------------------------------------- the call


def _check_settings(**settings: int | None) -> None:
    least = {"rows": 1, "tokens": 0, "batch_rows": 1, "draws": 0}
    for name, value in settings.items():
        if value is not None and value < least[name]:
            raise ConfigError(f"evaluate: `{name}` must be at least {least[name]}; got {value}.")


def _as_sae(sae: SAE | str | os.PathLike[str]) -> SAE:
    return sae if isinstance(sae, SAE) else SAE.load(sae)


def _named(saes: Any) -> list[tuple[str, SAE]]:
    """The SAEs with a name for each, unique."""
    given = [saes] if isinstance(saes, SAE | str | os.PathLike) else list(saes)
    if not given:
        raise ConfigError("evaluate: at least one SAE must be given; got an empty list.")
    named: list[tuple[str, SAE]] = []
    for item in given:
        sae = _as_sae(item)
        name = _name(sae) if isinstance(item, SAE) else os.path.basename(os.fspath(item).rstrip("/\\")) or "sae"
        taken = {other for other, _ in named}
        unique, count = name, 1
        while unique in taken:
            count += 1
            unique = f"{name} ({count})"
        named.append((unique, sae))
    return named


def _name(sae: SAE) -> str:
    config = _config(sae)
    parts = [str(config.get("arch") or sae.rule.name), str(sae.n_latents)]
    k = config.get("k") or sae.rule.settings().get("k")
    parts += [f"k{k}"] if k else []
    untrained = sae.provenance.get("rows_seen") == 0
    parts += [str(config["control"])] if config.get("control") else ["untrained"] if untrained else []
    parts += ["consensus"] if sae.provenance.get("consensus") else []
    parts += [f"seed{sae.provenance['seed']}"] if sae.provenance.get("seed") is not None else []
    return "-".join(parts)


def _config(sae: SAE) -> dict[str, Any]:
    config = sae.provenance.get("config")
    return config if isinstance(config, dict) else {}


def _common_width(named: list[tuple[str, SAE]]) -> int:
    width = named[0][1].d_in
    for name, sae in named:
        _check_sae(name, sae, width)
    return width


def _check_sae(name: str, sae: SAE, width: int) -> None:
    if sae.d_in != sae.d_out:
        raise ShapeError(
            f"evaluate: `{name}` must write rows of the width it reads; it maps {sae.d_in} to {sae.d_out}. "
            "A transcoder needs target rows, which evaluate does not take."
        )
    if sae.d_in != width:
        raise ShapeError(
            f"evaluate: all SAEs must have one width; `{name}` has {sae.d_in} beside {width}. Evaluate them apart."
        )
    for key, tensor in sae.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DataError(
                f"`{name}` must have finite weights; `{key}` holds NaN or infinity. Its training went wrong."
            )


def _place(
    lm: LanguageModel, named: list[tuple[str, SAE]], layer: int | None, hook: str | None, source: Any, width: int
) -> str:
    """The name of the hook of all SAEs, checked against the model."""
    info = getattr(source, "info", {})
    if layer is not None or hook is not None:
        place = place_of(layer=layer, hook=hook, where="evaluate")
    else:
        found = {known for _, sae in named if (known := known_place(sae)) is not None}
        if len(found) > 1:
            raise ConfigError(
                f"evaluate: all SAEs must belong to one hook; these belong to {sorted(found)}. Evaluate them apart."
            )
        place = found.pop() if found else place_of(named[0][1], info, where="evaluate", name=f"`{named[0][0]}`")
    captured_from = info.get("model_digest")
    if captured_from is not None and captured_from != lm.digest:
        raise ConfigError(
            f"evaluate: the rows must come from the model given, `{lm.name}`; they were captured from "
            f"`{info.get('model')}` with other weights. Give that model."
        )
    target = find_hook(lm.model, place)
    if re.fullmatch(r"layers\.\d+", target.name) and lm.d_model != width:
        raise ShapeError(
            f"evaluate: `{lm.name}` must have the width of the SAEs, {width}; its residual stream has {lm.d_model}. "
            "Were the SAEs trained on another model?"
        )
    return target.name


def _cross_entropy(lm: LanguageModel | None, is_measured: bool) -> str:
    if lm is None:
        return "not measured: no language model was given"
    if not lm.is_causal:
        return f"not measured: {lm.name} is not a causal language model"
    return "measured" if is_measured else "not measured: tokens = 0"


def _check_width(source: Source, width: int) -> None:
    if source.d_in != width:
        raise ShapeError(
            f"evaluate: rows must have the width of the SAEs, {width}; they have {source.d_in}. "
            "Were the SAEs trained on another model or hook?"
        )


def _as_source(source: Any) -> Source:
    if isinstance(source, str | os.PathLike):
        return open_rows(source)
    return source if isinstance(source, Source) else ArrayRows(source)


# ---------------------------------------------------------------------------------------------------------- controls


@dataclass(frozen=True)
class _Fitted:
    """What the controls are made from."""

    mean: Tensor
    sample: Tensor
    pca: PCA | None
    about: str


def _fit(source: Source, batch_rows: int, limit: int | None, controls: bool, *, own: bool) -> _Fitted:
    """Mean row, principal components and a sample, from the first rows."""
    limit = min(CALIBRATION_ROWS, limit or CALIBRATION_ROWS) if own else CALIBRATION_ROWS
    covariance, moments = Covariance(source.d_in), Moments(source.d_in, n_groups=1)
    sample: list[Tensor] = []
    for first, x, _ in _batches(source, batch_rows, limit):
        moments.update(x, torch.zeros(len(x), dtype=torch.long))
        if controls:
            covariance.update(x)
        if first < SAMPLE_ROWS:
            sample.append(x[: SAMPLE_ROWS - first].clone())
    if not sample:
        raise DataError("evaluate: there must be at least one row; the source has none. Is the data empty?")
    pca = covariance.compute() if covariance.n_rows > 1 else None
    about = f"the first {moments.n_rows:,} of the rows evaluated" if own else f"{moments.n_rows:,} rows given as `fit`"
    return _Fitted(moments.mean.float(), torch.cat(sample), pca, about)


def _arms(
    named: list[tuple[str, SAE]], frozen: SAE | None, fitted: _Fitted, controls: bool, seed: int
) -> tuple[list[Arm], list[dict[str, int]]]:
    """Everything to measure, without repeats; per SAE the places of itself (``""``) and of its controls."""
    arms = [sae_arm(name, sae) for name, sae in named]
    parts: list[dict[str, int]] = [{"": i} for i in range(len(arms))]
    if not controls:
        return arms, parts
    made: dict[Any, int] = {}

    def place(key: Any, make: Callable[[], Arm]) -> int:
        if key not in made:
            arms.append(make())
            made[key] = len(arms) - 1
        return made[key]

    given = [i for i, (_, sae) in enumerate(named) if _config(sae).get("control") == "frozen-decoder"]
    for i, (_, sae) in enumerate(named):
        l0 = _sample_l0(sae, fitted.sample)
        key = ("untrained", *_control_key(sae, l0))
        parts[i]["untrained"] = place(key, partial(_untrained, sae, fitted, l0, seed))
        if frozen is not None:
            parts[i]["frozen-decoder"] = place("frozen", partial(sae_arm, "frozen-decoder", frozen, _shape(frozen)))
        elif i not in given and (similar := _most_similar(sae, [(j, named[j][1]) for j in given])) is not None:
            parts[i]["frozen-decoder"] = similar
        if fitted.pca is not None:
            k = max(1, min(sae.d_in, round(l0)))
            about = {"fitted_on": fitted.about}
            parts[i]["pca"] = place(("pca", k), partial(pca_arm, fitted.pca.take(k), about))
    return arms, parts


def _control_key(sae: SAE, l0: float) -> tuple[Any, ...]:
    """SAEs with equal keys share their untrained control: shape, rule, scaling and, for thresholds, the L0 to match."""
    scaling = (str(sae.scaling.settings()), *(_bytes(tensor) for tensor in sae.scaling.tensors().values()))
    group = id(sae) if sae.rule.name == "groupmax" else 0
    settings = sae.rule.settings()
    return sae.n_latents, sae.rule.name, str(settings), group, scaling, sae.dtype, None if settings else round(l0, 3)


def _sample_l0(sae: SAE, sample: Tensor) -> float:
    with torch.no_grad():
        return sae.encode(sample).l0()


def _untrained(sae: SAE, fitted: _Fitted, l0: float, seed: int) -> Arm:
    blank = untrained_like(sae, fitted.mean, fitted.sample, l0, seed)
    about: dict[str, Any] = {
        "made": "random unit decoder rows, encoder equal to them, biases at the mean row",
        "seed": seed,
        "fitted_on": fitted.about,
    }
    if "threshold" in blank.rule.tensors():
        about["threshold"] = float(blank.rule.tensors()["threshold"][0])
    return sae_arm("untrained", blank, _shape(blank) | about)


def _shape(sae: SAE) -> dict[str, Any]:
    return {"n_latents": sae.n_latents, "d_in": sae.d_in, "rule": {"name": sae.rule.name, **sae.rule.settings()}}


def _most_similar(sae: SAE, others: list[tuple[int, SAE]]) -> int | None:
    """The place of the SAE that is most like `sae` in shape and rule."""

    def likeness(item: tuple[int, SAE]) -> tuple[bool, bool, bool, int]:
        place, other = item
        same_k = other.rule.settings() == sae.rule.settings()
        return (other.n_latents == sae.n_latents, other.rule.name == sae.rule.name, same_k, -place)

    return max(others, key=likeness)[0] if others else None


# ---------------------------------------------------------------------------------------------------------- the pass


@dataclass(frozen=True)
class _Seen:
    """What one pass over the rows gave, per arm."""

    estimates: list[dict[str, Estimate]]
    sparsities: list[Sparsity | None]
    n_rows: int


def _batches(source: Source, batch_rows: int, limit: int | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """``(first row, x, document)`` in stored order, up to `limit` rows."""
    first = 0
    for batch in source.batches(batch_rows):
        room = len(batch.x) if limit is None else limit - first
        if room <= 0:
            return
        document = batch.document
        yield first, batch.x[:room], None if document is None else document[:room]
        first += min(len(batch.x), room)
        if limit is not None and first >= limit:
            return


def _measure_rows(
    arms: list[Arm],
    source: Source,
    batch_rows: int,
    limit: int | None,
    mean: Tensor,
    draws: int,
    seed: int,
    progress: Progress | None,
) -> _Seen:
    """One pass over the rows for all arms."""
    moments = Moments(source.d_in)
    reconstructions = [Reconstruction(source.d_in, centre=mean, moments=moments) for _ in arms]
    sparsities = [None if arm.sae is None else Sparsity(arm.sae.n_latents) for arm in arms]
    device = arms[0].sae.device if arms[0].sae is not None else mean.device
    total = source.n_rows if limit is None else min(limit, source.n_rows or limit)
    all_by_document = True
    for first, x, document in _batches(source, batch_rows, limit):
        group, by_document = row_groups(document, first, len(x), BLOCK_ROWS)
        all_by_document &= by_document
        x, group = x.to(device), group.to(device)
        moments.update(x, group)
        for arm, reconstruction, sparsity in zip(arms, reconstructions, sparsities, strict=True):
            x_hat, codes = arm.forward(x)
            reconstruction.update(x, x_hat, group)
            if sparsity is not None and codes is not None:
                sparsity.update(codes, group)
        if progress is not None:
            progress("rows", first + len(x), total)
    by_place = f"interval from runs of {BLOCK_ROWS} consecutive rows: documents are not known"
    reason = None if all_by_document else by_place
    bootstrap = DocumentBootstrap.over(moments.rows_per_group, draws=draws, seed=seed, reason=reason)
    estimates = []
    for arm, reconstruction, sparsity in zip(arms, reconstructions, sparsities, strict=True):
        found = reconstruction.compute(bootstrap)
        if sparsity is not None:
            found |= sparsity.compute(bootstrap)
        if arm.l0 is not None:
            found["l0"] = Estimate(float(arm.l0), None, "no interval: the number of components, fixed beforehand")
        estimates.append(found | _weights(arm))
    return _Seen(estimates, sparsities, moments.n_rows)


def _weights(arm: Arm) -> dict[str, Estimate]:
    """What the weights alone say."""
    sae = arm.sae
    if sae is None or sae.n_latents < 2:
        return {}
    null = random_max_cosine(sae.n_latents, sae.d_in)
    decoder = redundancy(sae.W_dec)
    return {
        "decoder_redundancy": decoder,
        "encoder_redundancy": decoder if sae.W_enc is sae.W_dec else redundancy(sae.W_enc),
        "redundancy_null": Estimate(null, None, "no interval: computed, not measured"),
    }


# ---------------------------------------------------------------------------------------------------------- the result

_SHARED = ("redundancy_null", "ce_clean", "ce_zero", "ce_mean")  # the same for an SAE and its controls


def _entry(
    named: tuple[str, SAE],
    arms: list[Arm],
    part: dict[str, int],
    estimates: list[dict[str, Estimate]],
    sparsity: Sparsity | None,
    digest: Any,
) -> Entry:
    name, sae = named
    assert sparsity is not None
    own = estimates[part[""]]
    controls = {}
    for label, place in part.items():
        if not label:
            continue
        other = estimates[place]
        shared = [key for key in own if key in other and key not in _SHARED]
        differences = {key: own[key].minus(other[key]) for key in shared}
        controls[label] = Control(
            _measured(other), _measured(differences, ranged=False), arms[place].about or _shape(sae)
        )
    trained_on = sae.provenance.get("data_digest")
    return Entry(
        name=name,
        sae={**_shape(sae), "digest": sae_digest(sae), "provenance": sae.provenance},
        on_training_rows=None if trained_on is None or digest is None else trained_on == digest,
        metrics=_measured(own),
        density=sparsity.histogram(),
        controls=controls,
    )


def _measured(estimates: dict[str, Estimate], *, ranged: bool = True) -> Metrics:
    """Estimates with unit and interval, cut at the range of the metric (a difference has another range)."""
    values = {}
    for key, each in estimates.items():
        metric = METRICS[key]
        least, most = (metric.least, metric.most) if ranged else (None, None)
        values[key] = each.measured(metric.unit, least=least, most=most)
    return Metrics(values)
