"""``saekit classify`` and ``saekit predict`` from end to end: what they print, what they leave, how they fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SAE, load_model
from saekit.sae.rules import TopKRule
from saekit.store.native import save

QUICK = (
    "--set",
    "budget.C=[0.1, 10.0]",
    "--set",
    "budget.thresholds=[0.0]",
    "--set",
    "budget.widen=0",
    "--pool",
    "sum",
)


@pytest.fixture
def texts(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    words = (["returns", "array", "value", "shape", "index"], ["raises", "error", "warning", "invalid", "fails"])
    lines = []
    for i in range(120):
        chosen = [*generator.choice(words[i % 2], 2), *generator.choice(["the", "of", "a", "for"], 4)]
        lines.append(json.dumps({"text": " ".join(chosen), "label": ("good", "bad")[i % 2], "pair": i // 2}))
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def sae_folder(tmp_path) -> Path:
    d = load_model("builtin").d_model
    W = torch.randn(48, d, generator=torch.Generator().manual_seed(0))
    sae = SAE(W_enc=W, b_enc=torch.zeros(48), W_dec=W, b_dec=torch.zeros(d), rule=TopKRule(6),
              provenance={"hook": "layers.1", "seed": 0})  # fmt: skip
    return save(sae, tmp_path / "sae")


def test_classify_report_predict(call, texts, sae_folder):
    common = ("classify", "--model", "builtin", "--sae", sae_folder, "--data", texts, "--group", "pair", *QUICK,
              "--arms", "majority,words,dense,sparse,full", "--ks", "2,8", "--save-arm", "SAE sum")  # fmt: skip
    status, out, err = call(*common, "--out", "found", "--missing")
    assert status == 0, err
    assert out.splitlines() == ["majority", "TF-IDF", "dense sum", "SAE sum k=2", "SAE sum k=8", "SAE sum"]
    assert "6 of 6 fits are missing" in err

    status, out, err = call(*common, "--out", "found")
    assert status == 0, err
    assert out.splitlines()[0].split()[:3] == ["arm", "macro-F1", "AUC"]
    assert "dense sum *" in out
    assert "This test set resolves ±" in out  # words of their own: every arm is right
    assert "arms: 6 in" in err
    assert Path("found/classifier/classifier.skops").is_file()
    assert Path("found/classification-best.svg").is_file()

    status, out, err = call(*common, "--out", "found", "--dry-run", "--json")
    assert (status, json.loads(out)) == (0, {"cells": 6, "missing": []})
    status, out, err = call(*common, "--out", "found", "--json")
    assert status == 0
    result = json.loads(out)
    assert {"name", "macro_f1", "auc", "difference", "verdict"} <= set(result["arms"][0])

    assert call("report", "found")[0] == 0
    assert "Classification: texts" in Path("found/report.html").read_text()

    status, out, err = call("predict", "found", "raises an error", "returns the array")
    assert status == 0, err
    assert [line.split("\t")[0] for line in out.splitlines()] == ["bad", "good"]
    status, out, err = call("predict", "found/classifier", "raises an error", "--explain", "--json")
    assert json.loads(out)["predictions"][0]["predicted"] == "bad"
    assert json.loads(out)["predictions"][0]["reasons"][0]["tokens"]
    assert 0 < json.loads(out)["predictions"][0]["sparse"]["shown_fraction"] <= 1
    status, out, err = call("predict", "found", "raises an error", "--out", "found")
    assert (status, "--out must come with --explain" in err) == (2, True)
    status, out, err = call("predict", "found", "raises an error", "--explain", "--out", "found")
    assert status == 0, err
    assert call("report", "found")[0] == 0
    page = Path("found/report.html").read_text()
    assert "Which latents decided" in page
    assert "Which latents speak for each class" in page
    status, out, err = call("predict", "found", "raises an error", "--explain")
    assert "intercept" in out
    assert "latents shown carry" in out
    assert "by the sparse arm, of" in out
    status, out, err = call("predict", "found", "--data", texts, "--json")
    assert len(json.loads(out)["predictions"]) == 120
    status, out, err = call("predict", "found")
    assert "\nbad\n" in out
    assert "minus that of all latents" in out
    assert json.loads(call("predict", "found", "--json")[1])["kind"] == "classifier"

    assert call(*common, "--seed", 1, "--save-arm", "none", "--out", "again")[0] == 0
    assert not Path("again/classifier").exists()
    status, out, err = call("classify", "found", "again", "--summary", "--out", "both")
    assert status == 0, err
    assert "SAE, best by inner folds" in out
    assert json.loads(Path("both/summary.json").read_text())["sets"] == ["found", "again"]
    assert json.loads(call("classify", "found", "again", "--summary", "--json")[1])["kind"] == "classification_summary"


def test_both_commands_give_the_same_numbers(call, texts, sae_folder):
    common = ("--model", "builtin", "--sae", sae_folder, "--data", texts, "--group", "pair",
              "--set", "budget.C=[1.0]", "--arms", "majority,words,dense,sae,binarized")  # fmt: skip
    arms = {}
    for command in ("classify", "transfer"):
        status, out, err = call(command, *common, "--json")
        assert status == 0, err
        arms[command] = {arm["name"]: arm for arm in json.loads(out)["arms"]}
    assert list(arms["classify"]) == list(arms["transfer"])
    for name, arm in arms["classify"].items():
        for key in ("name", "macro_f1", "auc", "difference", "verdict"):
            assert arm[key] == arms["transfer"][name][key]


def test_bad_calls(call, texts, sae_folder):
    for arguments, message in (
        (("--model", "builtin"), "`--sae` and `--data`"),
        (("--model", "builtin", "--sae", sae_folder, "--data", texts, "--arms", "spares"), "Did you mean"),
        (("--model", "builtin", "--sae", sae_folder, "--data", texts, "--ks", "1,x"), "--ks must be whole numbers"),
        (
            ("--model", "builtin", "--sae", sae_folder, "--data", texts, "--save-arm", "x", *QUICK),
            "--save-arm must name",
        ),
        (
            ("--model", "builtin", "--sae", sae_folder, "--data", texts, "--save-arm", "SAE sum tree", *QUICK),
            "must name a linear probe",
        ),
        (("--summary", "nowhere"), "at least two results; got 0"),
    ):
        status, out, err = call("classify", *arguments)
        assert (status, out) == (2, ""), err
        assert message in err or message.replace(" and ", ", ") in err
    assert call("predict", "nowhere", "x")[0] == 2
    status, out, err = call("predict", "nowhere", "x", "--data", texts)
    assert status == 2
    assert "at most one of TEXT and --data" in err


def test_rare_classes_can_be_left_out(call, texts, sae_folder):
    with texts.open("a") as file:
        file.write('\n{"text": "something else", "label": "odd", "pair": 99}')
    common = ("classify", "--model", "builtin", "--sae", sae_folder, "--data", texts, *QUICK, "--arms", "words,dense")
    status, out, err = call(*common)
    assert (status, out) == (2, "")
    assert "(--min-rows N)" in err
    status, out, err = call(*common, "--min-rows", 5)
    assert status == 0, err
    assert "1 of 3 classes have fewer than 5 rows and were left out, 1 of 121 rows: `odd`" in " ".join(out.split())
