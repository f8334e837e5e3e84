"""``saekit steer``: edits of the command line, texts, effects; wrong calls are refused before the model is loaded."""

from __future__ import annotations

import json

import pytest
import torch

from fixtures.tiny_models import TEXTS, make_model
from saekit import SAE
from saekit.cli.steer import _edits
from saekit.errors import ConfigError
from saekit.sae.rules import TopKRule
from saekit.store.native import save


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steer")
    make_model("llama", folder / "model")
    W = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    save(SAE(W, torch.zeros(40), W, torch.zeros(16), TopKRule(6), provenance={"hook": "layers.1"}), folder / "sae")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i, text in enumerate(TEXTS * 4))
    )
    return folder


def test_texts(call, place):
    status, out, err = call(
        "steer", place / "sae", "--model", place / "model", "--latent", 3, "--strength", 9, "--edit", "5=ablate",
        "--new-tokens", 5, "--controls", 2, "--out", place / "out", "the cat sat",
    )  # fmt: skip
    assert status == 0, err
    assert "edited:" in out
    assert "control 2" in out
    found = json.loads((place / "out" / "steered.json").read_text())
    assert found["edits"] == {"3": "set 9", "5": "ablate"}
    assert len(found["prompts"][0]["controls"]) == 2
    status, out, err = call("report", place / "out")
    assert status == 0, err


def test_effects(call, place):
    arguments = ["--set", "effect.tokens=800", "--set", "effect.controls=2", "--set", "effect.doses=[1.0]"]
    status, out, err = call(
        "steer", place / "sae", "--model", place / "model", "--data", place / "texts.jsonl", "--latent", "3,7",
        "--json", *arguments,
    )  # fmt: skip
    assert status == 0, err
    assert [each["latent"] for each in json.loads(out)["effects"]] == [3, 7]
    assert {"value", "low", "high", "unit"} <= set(json.loads(out)["effects"][0]["kl"])


@pytest.mark.parametrize(
    "rest",
    [
        ["text"],
        ["--latent", 3, "text"],
        ["--strength", 3, "text"],
        ["--latent", 3, "--strength", 1],
        ["--edit", "3", "text"],
        ["--edit", "x=3", "text"],
        ["--edit", "3=nan", "text"],
        ["--edit", "3=1", "--edit", "3=2", "text"],
        ["--latent", 40, "--strength", 1, "text"],
        ["--data", "d.txt"],
        ["--data", "d.txt", "--latent", 3, "text"],
        ["--latent", 3, "--strength", 1, "--at", "first", "text"],
    ],
)
def test_wrong_calls(call, place, rest):
    status, _, err = call("steer", place / "sae", "--model", "no-such-model", *rest)
    assert status == 2
    assert "no-such-model" not in err


def test_edits_of_the_command_line():
    assert _edits([3, 4], 2.0, ["5=+1", "6=0..2"]) == {3: 2.0, 4: 2.0, 5: "+1", 6: "0..2"}
    with pytest.raises(ConfigError):
        _edits([], None, [])
