"""What is written for other browsers keeps their limits, and the codes as they are."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.kills import contents
from saekit import SAE
from saekit.errors import ConfigError
from saekit.explanation.dashboards import export_dashboards
from saekit.explanation.explanation_result import Card, Example, Written
from saekit.explanation.run import explain
from saekit.explanation.settings import ExplainSettings
from saekit.sae.rules import TopKRule

N = 300


@pytest.fixture(scope="module")
def found(models, corpus):
    """300 latents, of which some never fire; hostile texts in one card."""
    W = torch.randn(N, 16, generator=torch.Generator().manual_seed(0))
    b = torch.zeros(N)
    b[290:] = -1e4
    sae = SAE(W, b, W, torch.zeros(16), TopKRule(40), provenance={"hook": "layers.1", "context": 24})
    result = explain(
        sae, models["gpt2"], corpus, settings=ExplainSettings(tokens=1500, top=3, sample=5), progress=False
    )
    first, *rest = result.cards
    tokens = ["", "a\0b", "\ud800", "</script>", "\u202e", " cat"] + ["x"] * 1500
    codes = [0.0] * 5 + [2.0] + [0.0] * 1500
    hostile = replace(
        first,
        label="`" * 600,
        detection_percentile=1.0,
        top=[Example(0, 5, tokens, codes)],
        promoted=[Written("", 1.0), *[Written(str(i), 0.5) for i in range(30)]],
    )
    return replace(result, cards=[hostile, *rest, Card(299, "", 0.0, 0.0, 0.0, None, None, None, None, None)])


def check_upload(body: Any) -> None:
    """The limits of the upload call."""
    assert set(body) == {"modelId", "source", "features"}
    assert body["source"] == body["source"].lower()
    assert re.fullmatch(r"[^-]+-[^_]+(__.+)?", body["source"])
    assert 1 <= len(body["features"]) <= 128
    assert len({each["index"] for each in body["features"]}) == len(body["features"])
    for each in body["features"]:
        assert 0 <= each["index"] <= 10_000_000
        assert 0 <= each["density"] <= 1
        for logits in (each["topLogits"], each["bottomLogits"]):
            assert len(logits) <= 20
            assert all(set(one) == {"token", "value"} and one["token"] for one in logits)
        for one in each["explanations"]:
            assert set(one) == {"text"}  # names of methods and models must be registered
            assert 1 <= len(one["text"]) <= 512
        assert len(each["activations"]) >= 1
        for one in each["activations"]:
            assert 1 <= len(one["tokens"]) == len(one["values"]) <= 1024
            assert all(one["tokens"])
            assert "\0" not in "".join(one["tokens"])
            assert one.get("quantileFraction", 0) <= 1
            assert one.get("quantileMin", 0) <= one.get("quantileMax", 0)
            assert len({"quantileMin", "quantileMax", "quantileFraction"} & set(one)) in (0, 3)


def lines(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def test_neuronpedia(found, tmp_path):
    about = export_dashboards(found, tmp_path / "np", "neuronpedia", source_id="1-res-topk__k40")
    bodies = [json.loads(path.read_text()) for path in sorted((tmp_path / "np" / "upload").glob("batch-*.json"))]
    for body in bodies:
        check_upload(body)
    features = {each["index"]: each for body in bodies for each in body["features"]}
    fired = [card.latent for card in found.cards if card.top]
    assert len(bodies) == -(-len(fired) // 128) >= 2
    assert sorted(features) == fired
    assert about.skipped == sorted(set(range(N)) - set(fired))
    assert set(range(290, 300)) <= set(about.skipped)
    assert json.loads((tmp_path / "np" / "skipped_indexes.json").read_text()) == {"skipped_indexes": about.skipped}
    hostile = features[found.cards[0].latent]
    assert hostile["activations"][0]["tokens"][:6] == ["\ufffd", "a b", "\ufffd", "</script>", "\u202e", " cat"]
    assert len(hostile["explanations"][0]["text"]) == 512
    for card in found.cards[1:20]:
        shown = features[card.latent]["activations"]
        assert [each["values"] for each in shown] == [each.codes for each in (*card.top, *card.sample)]
        assert bool(features[card.latent]["explanations"]) == (card.is_told and bool(card.label))
        for each, example in zip(shown[len(card.top) :], card.sample, strict=True):
            if "quantileMin" in each:
                size = abs(example.codes[example.peak])
                assert each["quantileMin"] / 1.2 <= size <= each["quantileMax"] * 1.2


def test_the_bulk_import_has_the_same_keys_in_every_line(found, tmp_path):
    export_dashboards(found, tmp_path, "neuronpedia")
    files = sorted((tmp_path / "import").rglob("*.jsonl*"))
    assert {path.relative_to(tmp_path / "import").parts[0] for path in files} == {
        "release.jsonl", "model.jsonl", "sourceset.jsonl", "source.jsonl", "features", "activations", "explanations",
    }  # fmt: skip
    needed = {
        "model.jsonl": {"id", "layers", "neuronsPerLayer", "owner", "creatorId"},
        "sourceset.jsonl": {"modelId", "name", "description", "creatorName", "creatorId", "urls"},
        "source.jsonl": {"id", "modelId", "setName", "creatorId"},
        "features": {"modelId", "layer", "index"},
        "activations": {"id", "modelId", "layer", "index", "tokens", "values", "maxValue", "maxValueTokenIndex",
                        "minValue", "creatorId"},
        "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
    }  # fmt: skip
    for path in files:
        rows, kind = lines(path), path.relative_to(tmp_path / "import").parts[0]
        assert len({tuple(row) for row in rows}) <= 1
        assert all(value is not None for row in rows for value in row.values())
        assert all(needed.get(kind, set()) <= set(row) for row in rows)
    (source,) = lines(tmp_path / "import" / "source.jsonl")
    rows = [row for path in files if "activations" in path.parts for row in lines(path)]
    assert {row["layer"] for row in rows} == {source["id"]}
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["values"][row["maxValueTokenIndex"]] == row["maxValue"] for row in rows)


SUBSCRIPTED = [
    "feature_index",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "decoder_weights_dist",
    "activations",
]
"""What readers of SAEDashboard's files take by subscript."""


def test_saedashboard(found, tmp_path):
    about = export_dashboards(found, tmp_path, "saedashboard", model_id="gpt2-small", source_id="6-res-topk")
    batch = json.loads((tmp_path / "batch-0.json").read_text())
    assert [batch[name] for name in ("model_id", "layer", "sae_set", "sae_id_suffix")] == [
        "gpt2-small",
        "6",
        "res-topk",
        None,
    ]
    assert len(batch["features"]) == 128
    for feature, card in zip(batch["features"], found.cards, strict=False):
        assert set(SUBSCRIPTED) <= set(feature)
        assert sum(feature["freq_hist_data_bar_heights"]) == sum(count for _, count in card.histogram)
        assert max(feature["freq_hist_data_bar_values"]) <= card.maximum * 1.2
        for each, example in zip(feature["activations"], (*card.top, *card.sample), strict=True):
            assert set(each) == {
                "tokens", "values", "bin_min", "bin_max", "bin_contains", "qualifying_token_index",
            }  # fmt: skip
            assert each["values"][each["qualifying_token_index"]] == example.codes[example.peak]
            is_top = example.quantile is None
            assert (each["bin_min"], each["bin_contains"]) == (-1, -1) if is_top else each["bin_contains"] == 0.2
    assert (tmp_path / "run_settings.json").is_file()
    assert json.loads((tmp_path / "skipped_indexes.json").read_text())["skipped_indexes"] == about.skipped


def test_the_same_explanation_makes_the_same_bytes(found, tmp_path):
    for to in ("neuronpedia", "saedashboard"):
        for name in ("one", "two"):
            export_dashboards(found, tmp_path / to / name, to)
        assert contents(tmp_path / to / "one") == contents(tmp_path / to / "two")


def test_refusals(found, tmp_path):
    for change, message in (
        ({"to": "neuropedia"}, "Did you mean"),
        ({"source_id": "Layer6"}, "of the form 6-res-topk"),
        ({"model_id": "GPT 2"}, "of the form gpt2-small"),
    ):
        with pytest.raises(ConfigError, match=message):
            export_dashboards(found, tmp_path / "a", **{"to": "neuronpedia", **change})
    with pytest.raises(ConfigError, match="latents with examples"):
        export_dashboards(replace(found, cards=found.cards[-1:]), tmp_path / "a", "neuronpedia")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="must not exist, or be an empty folder"):
        export_dashboards(found, tmp_path, "neuronpedia")
    assert not (tmp_path / "a").exists()
