"""Where the rows come from that an SAE is ranked and measured on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fixtures.known_saes import random_sae
from saekit import TopK, TrainSettings, capture, stream, train
from saekit.errors import ConfigError, ShapeError
from saekit.places import warnings_on
from saekit.rows.origin import OriginSettings, find_rows, training_rows
from saekit.rows.shards import open_rows


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)


def test_rows_that_are_given_are_taken(x, tmp_path):
    np.save(tmp_path / "rows.npy", x)
    for rows in (x, tmp_path / "rows.npy", open_rows(tmp_path / "rows.npy")):
        found = find_rows(random_sae(), rows)
        assert (found.rows.n_rows, found.model, found.ce_tokens) == (50, None, 0)
    with pytest.raises(ShapeError, match="must have the width"):
        find_rows(random_sae(), x[:, :3])


def test_rows_of_the_training_are_found_beside_the_run(x, tmp_path):
    np.save(tmp_path / "rows.npy", x)
    digest = open_rows(tmp_path / "rows.npy").info["digest"]
    (tmp_path / "run" / "sae").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"source": {"path": "elsewhere/rows.npy"}}))
    sae = random_sae().replace(provenance={"data_digest": digest})
    for path in (tmp_path / "run" / "sae", tmp_path / "run"):
        assert find_rows(sae, path=path).rows.info["digest"] == digest
    assert training_rows(str(tmp_path / "run"), {"data_digest": "sha256:other"}) is None
    assert training_rows("hf:a/b", {"data_digest": digest}) is None
    with pytest.raises(ConfigError, match="`rows`, or `model` and `data`, must be given"):
        find_rows(sae)


def test_a_model_makes_them(stories):
    texts = ["Once upon a time there was a little dog who ran."] * 20
    sae = random_sae(d=64).replace(provenance={"hook": "layers.1"})
    found = find_rows(sae, model=stories, data=texts, settings=OriginSettings(tokens=100, ce_tokens=40))
    assert (found.rows.n_rows, found.ce_tokens) == (100, 40)
    with pytest.raises(ConfigError, match="`data` must be given with `model`"):
        find_rows(sae, model=stories)
    with pytest.raises(ConfigError, match="`the SAE` does not say where in the model it belongs"):
        find_rows(random_sae(d=64), model=stories, data=texts)


def test_what_a_run_was_trained_on_is_found_by_its_recorded_path(stories, tmp_path, monkeypatch):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Once upon a time there were {n} dogs."}) + "\n" for n in range(40)))
    shutil.copytree(stories, tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    rows = capture(Path("models/mine"), str(texts), layer=1, out="rows")
    [sae] = train(TopK(16, k=2), rows, tokens=128, settings=TrainSettings(batch_rows=64))
    sae = sae.replace(provenance={**sae.provenance, "data_path": str(texts)})
    monkeypatch.chdir("/")
    assert find_rows(sae).rows.info["rows_path"] == str(tmp_path / "rows")
    shutil.rmtree(tmp_path / "rows")
    again = find_rows(sae, settings=OriginSettings(tokens=50))
    assert again.rows.info["model_digest"] == rows.info["model_digest"]
    (tmp_path / "models" / "mine").rename(tmp_path / "models" / "moved")
    with pytest.raises(ConfigError, match=r"`model` \(--model\) must be given.*was trained on `.*/mine`, which"):
        find_rows(sae)
    moved = find_rows(sae, model=tmp_path / "models" / "moved", data=str(texts), settings=OriginSettings(tokens=50))
    assert warnings_on([("a", sae)], moved.rows.info) == []


def test_where_files_lie_decides_no_digest_and_no_resuming(stories, tmp_path):
    texts = ["Once upon a time there was a little dog who ran."] * 20
    shutil.copytree(stories, tmp_path / "copy" / stories.name)
    one, other = (stream(model, texts, layer=1) for model in (stories, tmp_path / "copy" / stories.name))
    assert one.info["model_path"] != other.info["model_path"]
    assert one.info["digest"] == other.info["digest"]
    capture(stories, texts, layer=1, out=tmp_path / "rows")
    capture(tmp_path / "copy" / stories.name, texts, layer=1, out=tmp_path / "rows")
