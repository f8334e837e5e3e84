"""``saekit sources``: train on joined rows and on their null, compare, report; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saekit as sk
from fixtures.tiny_models import TEXTS
from fixtures.tiny_models import folders as folders
from saekit import SAE, BatchTopK, TrainSettings
from saekit.rows.capture_texts import TextRunner
from saekit.rows.joined import stream_joined
from saekit.rows.settings import StreamSettings


def test_a_crosscoder_is_trained_and_its_sources_are_compared(call, tmp_path):
    draw = np.random.default_rng(0)
    codes = np.maximum(draw.normal(size=(2000, 8)), 0)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", (codes @ draw.normal(size=(8, 6))).astype(np.float32))
    for kind, out in (("joined", "run"), ("joined-null", "null")):
        status, _, err = call(
            "train", "--rows", f"{kind}:base=a.npy,tuned=b.npy", "--arch", "batchtopk", "--latents", "16", "--k", "3",
            "--out", out,
        )  # fmt: skip
        assert status == 0, err
    name = "batchtopk-16-k3-seed0"
    asked = ("sources", f"run/{name}", "--rows", "joined:base=a.npy,tuned=b.npy", "--null", f"null/{name}")
    status, out, err = call(*asked, "--out", "run", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["sources"] == ["base", "tuned"]
    assert set(found["null"]["specific"]) == {"base", "tuned"}
    status, out, _ = call(*asked)
    assert status == 0
    assert "specific to base" in out
    evaluated = ("evaluate", f"run/{name}", "--rows", "joined:base=a.npy,tuned=b.npy")
    status, out, err = call(*evaluated, "--out", "run", "--json")
    assert status == 0, err
    assert json.loads(out)["entries"][0]["sources"]["tuned"]["fvu"]["value"] < 1
    assert "tuned: fvu" in call(*evaluated)[1]
    status, _, err = call("report", "run")
    assert status == 0, err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Which latents belong to which source" in page
    assert "Each source of the rows" in page
    status, _, err = call("sources", f"run/{name}", "--rows", "a.npy")
    assert (status, "must have the width" in err) == (2, True)
    status, _, err = call(*asked, "--set", "error_limit=true")  # a setting without a flag
    assert (status, "`error_limit` (--set error_limit=…) must be a number; got True" in err) == (2, True), err


# ---------------------------------------------------------------- from models

TYPED = ("--arch", "batchtopk", "--latents", "16", "--k", "3", "--tokens", "256", "--batch-rows", "64", "--json")


@pytest.fixture
def train(call, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS * 8))

    def run(*arguments: object) -> tuple[int, str, str]:
        return call("train", "--data", "texts.txt", "--out", "run", *arguments)

    return run


def parts_in(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "sae.json").read_text())["provenance"]["parts"]


def test_a_crosscoder_of_layers_is_trained_from_the_model(train, folders, tmp_path):
    status, out, err = train("--model", folders["llama"], "--layers", "0,2", "--join", *TYPED)
    assert status == 0, err
    [sae] = json.loads(out)["saes"]
    assert sae["sae"] == "run/batchtopk-16-k3-seed0"
    assert [part["hook"] for part in parts_in(tmp_path / sae["sae"])] == ["layers.0", "layers.2"]
    settings = StreamSettings(outliers=None)
    rows = stream_joined(folders["llama"], "texts.txt", layer=[0, 2], tokens=256, settings=settings)
    [same] = sk.train(BatchTopK(16, k=3), rows, tokens=256, settings=TrainSettings(batch_rows=64))
    assert same.digest() == SAE.load(tmp_path / sae["sae"]).digest()  # the same words in Python


def test_a_crosscoder_of_two_models_is_trained_from_them(train, folders, tmp_path):
    pair = f"joined:base={folders['neox']},tuned={folders['llama']}"  # one of which adds a token to every text
    status, _, err = train("--model", pair, "--layer", "1", *TYPED)
    assert status == 0, err
    assert "no token is left out as an outlier" in err
    parts = parts_in(tmp_path / "run" / "batchtopk-16-k3-seed0")
    assert [(part["name"], part["hook"]) for part in parts] == [("base", "layers.1"), ("tuned", "layers.1")]
    assert parts[0]["model"] != parts[1]["model"]


def test_the_end_names_the_sources_as_commands_take_them(train, folders):
    status, out, err = train("--model", folders["llama"], "--layers", "0,2", "--join", *TYPED[:-1])
    assert status == 0, err
    assert "--rows joined:layers.0=R,layers.2=R" in " ".join((out + err).split())


def test_what_cannot_be_joined_is_refused_before_a_model_runs(train, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(TextRunner, "rows", lambda *args, **more: pytest.fail("a model was run"))
    other = tmp_path / "other"
    shutil.copytree(folders["llama"], other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"cat"', '"CAT"').replace('"sat"', '"cat"'))
    llama = folders["llama"]
    for arguments, said in (
        (["--model", f"joined:base={llama},tuned={other}", "--layer", "1"], "must have the same tokenizer"),
        (["--model", f"joined:base={llama},tuned={folders['gpt2']}", "--layer", "7"], "7"),
        (["--model", f"joined-null:a={llama},b={llama}", "--layer", "1"], "cannot begin with joined-null:"),
        (["--model", f"joined:base={llama}", "--layer", "1"], "got models `base` and 1"),
        (["--model", f"joined:{llama},tuned={other}", "--layer", "1"], "a name and a path"),
        (["--model", f"joined:base={llama},tuned={other}", "--layers", "0,1"], "one --layer or --hook of several"),
        (["--model", llama, "--layer", "1", "--join"], "several --layers of one model"),
        (["--model", llama, "--layers", "1", "--join"], "two or more layers"),
        (["--model", llama, "--layers", "1,9", "--join"], "9"),
        (["--model", llama, "--layers", "0,1", "--join", "--hook-out", "layers.1.mlp"], "--hook-out must be left out"),
        (["--model", llama, "--layers", "0,1", "--join", "--arch", "topk"], "must be a BatchTopK; got TopK"),
        (["--model", llama, "--layers", "0,1", "--join", "--set", "start=x"], "`start` must be left out"),
    ):
        status, _, err = train(*TYPED, *arguments)
        assert status == 2, (arguments, err)
        assert said in err, (said, err)
