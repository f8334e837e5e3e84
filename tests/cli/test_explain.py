"""``saekit explain`` and the card of ``saekit show --latent``."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from fixtures.tiny_models import TEXTS, WORDS, make_model
from saekit import SAE
from saekit.sae.rules import TopKRule
from saekit.store.native import save


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    make_model("llama", folder / "model")
    for name, seed in (("sae", 0), ("other", 1)):
        W = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
        save(SAE(W, torch.zeros(40), W, torch.zeros(16), TopKRule(6), provenance={"hook": "layers.1"}), folder / name)
    lines = (json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(TEXTS * 3))
    (folder / "texts.jsonl").write_text("".join(lines))
    return folder


def test_explain_then_show(call, place):
    arguments = ["--model", place / "model", "--data", place / "texts.jsonl", "--tokens", 800]
    status, _, err = call("show", place / "sae", "--latent", 3)
    assert (status, "saekit explain" in err) == (2, True)
    status, out, err = call("explain", place / "sae", *arguments, "--out", place / "sae")
    assert status == 0, err
    assert "for shuffled codes" in " ".join(out.split())
    assert "tells random apart" in out
    latent = json.loads((place / "sae" / "explanation.json").read_text())["cards"][0]["latent"]
    status, out, err = call("show", place / "sae", "--latent", latent)
    assert status == 0, err
    assert f"latent {latent}:" in out
    assert "⟦" in out
    status, out, err = call("show", place / "sae", "--latent", latent, "--json")
    assert json.loads(out)["latent"] == latent
    shutil.copytree(place / "sae", place / "demo" / "run" / "sae")  # as `saekit demo` leaves it
    (place / "demo" / "run" / "sae" / "explanation.json").rename(place / "demo" / "explanation.json")
    status, out, err = call("show", place / "demo" / "run" / "sae", "--latent", latent)
    assert f"latent {latent}:" in out, err
    status, out, err = call("report", place / "sae")
    assert status == 0, err
    assert "What latents respond to" in (place / "sae" / "report.html").read_text(encoding="utf-8")
    # an explanation of another SAE is not taken for this one's
    status, _, err = call("show", place / "other", "--latent", latent, "--explained", place / "sae")
    assert (status, "there is none" in err) == (2, True)
    status, out, err = call(
        "explain", place / "sae", *arguments, "--latents", "3,4", "--null", place / "other", "--json"
    )
    found = json.loads(out)
    assert [card["latent"] for card in found["cards"]] == [3, 4]
    assert [control["name"] for control in found["controls"]] == ["shuffled", "random", "other"]

    # for other browsers of latents
    for to, file in (("neuronpedia", "upload/batch-0.json"), ("saedashboard", "batch-0.json")):
        folder = place / to
        names = ["--model-id", "tiny", "--source-id", "1-res"]
        status, out, err = call("convert", place / "sae", folder, "--to", to, *names, "--json")
        assert status == 0, err
        about = json.loads(out)
        assert about["latents"] == len(json.loads((folder / file).read_text())["features"])
        assert about["latents"] + len(about["skipped"]) == 40
        status, _, err = call("convert", place / "sae", folder, "--to", to)
        assert (status, "empty folder" in err) == (2, True)
    status, out, err = call("convert", place / "sae" / "explanation.json", place / "np", "--to", "neuronpedia")
    assert status == 0, err
    assert "1-saekit-topk-40 of model written to" in out
    for rest, message in (
        ([place / "model", "--to", "neuronpedia"], "saekit explain --out"),
        ([place / "sae", "--to", "neuronpedia", "--k", 3], "must be given only where an SAE is converted"),
        ([place / "sae", "--model-id", "x"], "must be given only where --to"),
        ([place / "sae", "--to", "neuronpedia", "--source-id", "X"], "source_id"),
    ):
        status, _, err = call("convert", rest[0], place / "never", *rest[1:])
        assert (status, message in err) == (2, True), err
    assert not (place / "never").exists()


@pytest.mark.parametrize(
    "rest",
    [
        ["--latents", "40"],
        ["--latents", "x"],
        ["--tokens", "1"],
        ["--cards", "0"],
        ["--controls", "shufled"],
        ["--groups", "nowhere.json"],
        ["--surprisal", "-1"],
    ],
)
def test_wrong_calls(call, place, rest):
    status, _, err = call("explain", place / "sae", "--model", "no-such-model", "--data", "d.txt", *rest)
    assert status == 2
    assert "no-such-model" not in err


def test_a_judge_tests_the_labels(call, place):
    """The built-in model, which knows too little to be right."""
    generator = np.random.default_rng(0)
    texts = (json.dumps({"text": " ".join(generator.choice(WORDS, 12))}) + "\n" for _ in range(60))
    (place / "various.jsonl").write_text("".join(texts))
    arguments = [place / "sae", "--model", place / "model", "--data", place / "various.jsonl", "--set", "window=4"]
    judged = [*arguments, "--judge", "builtin", "--judge-latents", 3, "--judge-windows", 4, "--out", place / "judged"]
    status, out, err = call("explain", *judged)
    assert status == 0, err
    assert "prompts, about" in err
    assert "under the label of another latent" in " ".join(out.split())
    found = json.loads((place / "judged" / "label_scores.json").read_text())
    del found["seal"]
    assert len(found["scores"]) == 3
    answers = (place / "judged" / "answers.jsonl").read_text()
    status, out, err = call("explain", *judged, "--json")
    assert "is asked 0 prompts" in err
    assert json.loads(out)["label_scores"] == found
    assert (place / "judged" / "answers.jsonl").read_text() == answers
    status, out, err = call("report", place / "judged")
    assert status == 0, err
    assert "Labels, tested by a language model" in (place / "judged" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (["--judge-model", "m"], "Give --judge"),
        (["--explain-with", "builtin"], "Give --judge"),
        (["--judge", "http://localhost:1/v1"], "Give --judge-model"),
        (["--judge", "https://u:p@h/v1", "--judge-model", "m"], "no password"),
        (["--judge", "./no-such-folder"], "no-such-folder"),
        (["--judge", "builtin", "--judge-windows", "1"], "judge_windows"),
    ],
)
def test_wrong_calls_of_a_judge(call, place, rest, message):
    status, _, err = call("explain", place / "sae", "--model", "no-such-model", "--data", "d.txt", *rest)
    assert status == 2
    assert message in err
    assert "no-such-model" not in err
