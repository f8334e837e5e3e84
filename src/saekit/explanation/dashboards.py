"""Explanations in the layouts of other browsers of latents: Neuronpedia's two imports, and SAEDashboard's batches."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import check_new_folder, write_bytes, write_json
from ..settings import check_choice, suggest_keywords
from .explanation_result import Card, Example, Explanation

BATCH = 128
"""Latents in a file: what Neuronpedia's upload takes at once."""

MOST_LOGITS, MOST_TOKENS, LONGEST_LABEL, MOST_LATENTS = 20, 1024, 512, 10_000_001
"""Limits of Neuronpedia's upload."""

FIFTHS = 5
"""Intervals, of equally many codes, that examples are drawn from."""

CREATOR = "saekit"
"""What stands where Neuronpedia has the account of who uploads; change it before the import."""

_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SOURCE = re.compile(r"[a-z0-9]+-[a-z0-9-]+(__[a-z0-9-]+)?")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    latents: int
    """Latents written."""
    skipped: list[int]
    """Latents without an example, which the layouts have no place for."""
    model_id: str
    """Name of the model."""
    source_id: str
    """Name of the SAE, ``layer-set``."""


@suggest_keywords
def export_dashboards(
    explanation: Explanation,
    folder: str | os.PathLike[str],
    to: str,
    *,
    model_id: str | None = None,
    source_id: str | None = None,
) -> Exported:
    """Write an explanation for another browser of latents.

    ``neuronpedia``: ``upload/batch-N.json``, the bodies of its upload call (128 latents each), and ``import/``, the
    folder of its bulk import. ``saedashboard``: ``batch-N.json`` as SAEDashboard writes them, which Neuronpedia's
    converter reads. Labels that cannot be told from chance are not written. What was skipped stands in
    ``skipped_indexes.json``.

    Parameters
    ----------
    explanation
        What `explain` found.
    folder
        Where to write; must not exist, or be empty.
    to
        ``neuronpedia`` or ``saedashboard``.
    model_id, source_id
        Names there, in lower case; a source is ``layer-set``, with ``__suffix`` where there are several. By default
        from the names of the model, the hook and the SAE.

    Raises
    ------
    ConfigError
        The layout is unknown, a name does not fit, no latent has an example, or the folder is not empty.
    """
    check_choice("convert", DASHBOARDS, to=to)
    folder = check_new_folder(folder, "convert")
    model, source = _model_id(explanation, model_id), _source_id(explanation, source_id)
    cards = [card for card in explanation.cards if (card.top or card.sample) and card.latent < MOST_LATENTS]
    if not cards:
        raise ConfigError(f"convert: the format {to} needs latents with examples; there are none. Explain more texts.")
    seen = {card.latent for card in cards}
    skipped = [latent for latent in _explained(explanation) if latent not in seen]
    found = Exported(len(cards), skipped, model, source)
    DASHBOARDS[to](explanation, cards, folder, found)
    write_json(folder / "skipped_indexes.json", {"skipped_indexes": skipped})
    return found


def _explained(explanation: Explanation) -> Sequence[int]:
    """Return the latents that were asked for."""
    asked = explanation.settings.get("latents")
    return asked if asked is not None else range(int(explanation.sae["n_latents"]))


def _model_id(explanation: Explanation, given: str | None) -> str:
    name = str(explanation.model.get("model", "model")) if given is None else given
    own = re.sub(r"[^a-z0-9._-]+", "-", name.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-._") or "model"
    return _fitting("model_id", own if given is None else given, _MODEL, "gpt2-small")


def _source_id(explanation: Explanation, given: str | None) -> str:
    digits = re.search(r"\d+", explanation.hook)
    rule = re.sub(r"[^a-z0-9]+", "-", str(explanation.sae["rule"]["name"]).lower()).strip("-")
    own = f"{digits[0] if digits else '0'}-saekit-{rule}-{explanation.sae['n_latents']}"
    return _fitting("source_id", own if given is None else given, _SOURCE, "6-res-topk")


def _fitting(name: str, value: str, form: re.Pattern[str], example: str) -> str:
    if not form.fullmatch(value):
        raise ConfigError(f"convert: `{name}` must be of the form {example}, in lower case; got {value!r}.")
    return value


# ------------------------------------------------------------------------------------------------------ what they share


@dataclass(frozen=True)
class _Shown:
    """An example as these layouts have it."""

    tokens: list[str]
    values: list[float]
    peak: int
    low: float
    """Least code of the interval that it was drawn from; -1 for one of the strongest."""
    high: float
    fraction: float
    """Fraction of the codes in that interval; -1 for one of the strongest."""


def _shown(card: Card) -> Iterator[_Shown]:
    """Yield the examples of a card: the strongest, then those drawn from intervals."""
    for example in (*card.top, *card.sample):
        start = max(0, min(example.peak - MOST_TOKENS // 2, len(example.tokens) - MOST_TOKENS))
        part = slice(start, start + MOST_TOKENS)
        tokens = [_token(each) for each in example.tokens[part]]
        yield _Shown(tokens, example.codes[part], example.peak - start, *_interval(card, example))


def _interval(card: Card, example: Example) -> tuple[float, float, float]:
    if example.quantile is None or not card.histogram:
        return -1.0, card.maximum, -1.0
    fifth = min(int(example.quantile * FIFTHS), FIFTHS - 1)
    low, high = (_quantile(card, (fifth + step) / FIFTHS) for step in (0, 1))
    return low, high, 1 / FIFTHS


def _quantile(card: Card, fraction: float) -> float:
    """Return the magnitude below which a fraction of the codes lies, to within a bin."""
    if fraction >= 1:
        return card.maximum
    low, counts = np.array(card.histogram).T
    at = int(np.searchsorted(np.cumsum(counts) / counts.sum(), fraction, side="right"))
    return float(low[min(at, len(low) - 1)])


def _token(text: str) -> str:
    """Return the text of a token as these layouts take it: never empty, without the sign that databases refuse."""
    return text.replace("\0", " ").encode("utf-16", "surrogatepass").decode("utf-16", "replace") or "\ufffd"


def _bars(card: Card) -> tuple[list[float], list[float]]:
    """Return centres and counts of the bins of nonzero codes, four per octave."""
    return [float(low) * 2 ** (1 / 8) for low, _ in card.histogram], [float(count) for _, count in card.histogram]


def _logits(card: Card) -> tuple[list[str], list[float], list[str], list[float]]:
    """Return tokens and values of the logits that a latent raises most and lowers most."""
    found: list[Any] = []
    for written in (card.promoted, card.suppressed):
        some = written[:MOST_LOGITS]
        found += [[_token(each.token) for each in some], [each.value for each in some]]
    return found[0], found[1], found[2], found[3]


def _label(card: Card) -> str | None:
    """Return the label of a latent that is told from chance by it."""
    return card.label[:LONGEST_LABEL] if card.label and card.is_told else None


def _batches(rows: Sequence[Any]) -> Iterator[tuple[int, Sequence[Any]]]:
    for number, start in enumerate(range(0, len(rows), BATCH)):
        yield number, rows[start : start + BATCH]


# ---------------------------------------------------------------------------------------------------------- Neuronpedia


def _neuronpedia(explanation: Explanation, cards: Sequence[Card], folder: Path, names: Exported) -> None:
    for number, some in _batches(cards):
        features = [_upload_feature(card) for card in some]
        body = {"modelId": names.model_id, "source": names.source_id, "features": features}
        write_json(folder / "upload" / f"batch-{number}.json", body)
    for name, row in _import_tables(explanation, names).items():
        _write_lines(folder / "import" / f"{name}.jsonl", [row])
    for number, some in _batches(cards):
        rows = {"features": [], "activations": [], "explanations": []}  # type: dict[str, list[dict[str, Any]]]
        for card in some:
            rows["features"].append(_feature_row(explanation, card, names))
            rows["activations"] += _activation_rows(card, names)
            rows["explanations"] += _explanation_rows(card, names)
        for kind, lines in rows.items():
            _write_lines(folder / "import" / kind / f"batch-{number}.jsonl.gz", lines)


def _upload_feature(card: Card) -> dict[str, Any]:
    """Return a latent for the upload call; methodName and modelName are left out, as they must be registered there."""
    top, top_values, bottom, bottom_values = _logits(card)
    label = _label(card)
    return {
        "index": card.latent,
        "density": min(max(card.density, 0.0), 1.0),
        "topLogits": [{"token": token, "value": value} for token, value in zip(top, top_values, strict=True)],
        "bottomLogits": [{"token": token, "value": value} for token, value in zip(bottom, bottom_values, strict=True)],
        "explanations": [] if label is None else [{"text": label}],
        "activations": [
            {"tokens": each.tokens, "values": each.values}
            if each.fraction < 0
            else {
                "tokens": each.tokens,
                "values": each.values,
                "quantileMin": each.low,
                "quantileMax": each.high,
                "quantileFraction": each.fraction,
            }
            for each in _shown(card)
        ],
    }


def _import_tables(explanation: Explanation, names: Exported) -> dict[str, dict[str, Any]]:
    """Return the rows of model, set and source; of the model's layers those up to the SAE's are known."""
    layer, _, rest = names.source_id.partition("-")
    set_name = rest.partition("__")[0]
    width = explanation.sae.get("d_in", 0)
    return {
        "release": {
            "name": set_name,
            "description": set_name,
            "creatorName": CREATOR,
            "creatorId": CREATOR,
            "urls": [],
        },
        "model": {
            "id": names.model_id,
            "displayName": names.model_id,
            "layers": int(layer) + 1 if layer.isdecimal() else 1,
            "neuronsPerLayer": 0,
            "dimension": width,
            "owner": CREATOR,
            "creatorId": CREATOR,
        },
        "sourceset": {
            "modelId": names.model_id,
            "name": set_name,
            "description": f"{explanation.hook}, {explanation.sae['n_latents']} latents",
            "creatorName": CREATOR,
            "creatorId": CREATOR,
            "urls": [],
            "releaseName": set_name,
        },
        "source": {
            "id": names.source_id,
            "modelId": names.model_id,
            "setName": set_name,
            "creatorId": CREATOR,
            "dataset": str(explanation.data.get("name", "")),
        },
    }


def _feature_row(explanation: Explanation, card: Card, names: Exported) -> dict[str, Any]:
    top, top_values, bottom, bottom_values = _logits(card)
    centres, counts = _bars(card)
    return {
        "modelId": names.model_id,
        "layer": names.source_id,
        "index": str(card.latent),
        "creatorId": CREATOR,
        "frac_nonzero": card.density,
        "maxActApprox": card.maximum,
        "pos_str": top,
        "pos_values": top_values,
        "neg_str": bottom,
        "neg_values": bottom_values,
        "freq_hist_data_bar_values": centres,
        "freq_hist_data_bar_heights": counts,
        "topkCosSimIndices": [int(each["latent"]) for each in card.neighbours],
        "topkCosSimValues": [each["cosine"] for each in card.neighbours],
        "hookName": explanation.hook,
        "hasVector": False,
        "vectorDefaultSteerStrength": card.maximum,
    }


def _activation_rows(card: Card, names: Exported) -> Iterator[dict[str, Any]]:
    for number, each in enumerate(_shown(card)):
        most = int(np.argmax(np.abs(each.values)))
        yield {
            "id": f"{names.model_id}-{names.source_id}-{card.latent}-{number}",
            "modelId": names.model_id,
            "layer": names.source_id,
            "index": str(card.latent),
            "creatorId": CREATOR,
            "tokens": each.tokens,
            "values": each.values,
            "maxValue": each.values[most],
            "maxValueTokenIndex": most,
            "minValue": min(each.values),
            "binMin": each.low,
            "binMax": each.high,
            "binContains": each.fraction,
            "qualifyingTokenIndex": each.peak,
        }


def _explanation_rows(card: Card, names: Exported) -> Iterator[dict[str, Any]]:
    label = _label(card)
    if label is not None:
        yield {
            "id": f"{names.model_id}-{names.source_id}-{card.latent}",
            "modelId": names.model_id,
            "layer": names.source_id,
            "index": str(card.latent),
            "description": label,
            "authorId": CREATOR,
        }


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as lines of JSON with the same keys: the import takes the columns from the first line."""
    data = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
    write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


# --------------------------------------------------------------------------------------------------------- SAEDashboard


def _saedashboard(explanation: Explanation, cards: Sequence[Card], folder: Path, names: Exported) -> None:
    layer, _, rest = names.source_id.partition("-")
    set_name, _, suffix = rest.partition("__")
    facts = {"model_id": names.model_id, "layer": layer, "sae_set": set_name, "sae_id_suffix": suffix or None}
    for number, some in _batches(cards):
        write_json(folder / f"batch-{number}.json", {**facts, "features": [_dashboard_feature(card) for card in some]})
    used = {"hook": explanation.hook, "data": explanation.data, "model": explanation.model, **explanation.settings}
    write_json(folder / "run_settings.json", {**facts, "saekit": explanation.saekit, "settings": used})


_EMPTY = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "decoder_weights_dist",
)  # fmt: skip
"""Entries that readers expect and that an explanation does not have."""


def _dashboard_feature(card: Card) -> dict[str, Any]:
    top, top_values, bottom, bottom_values = _logits(card)
    centres, counts = _bars(card)
    return {
        "feature_index": card.latent,
        **{name: [] for name in _EMPTY},
        "neg_str": bottom,
        "neg_values": bottom_values,
        "pos_str": top,
        "pos_values": top_values,
        "frac_nonzero": card.density,
        "freq_hist_data_bar_heights": counts,
        "freq_hist_data_bar_values": centres,
        "activations": [
            {
                "tokens": each.tokens,
                "values": each.values,
                "bin_min": each.low,
                "bin_max": each.high,
                "bin_contains": each.fraction,
                "qualifying_token_index": each.peak,
            }
            for each in _shown(card)
        ],
    }


DASHBOARDS: dict[str, Callable[[Explanation, Sequence[Card], Path, Exported], None]] = {
    "neuronpedia": _neuronpedia, "saedashboard": _saedashboard,
}  # fmt: skip
"""Writers by the name of their layout."""
