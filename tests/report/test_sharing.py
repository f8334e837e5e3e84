"""Pushing a folder to the hub: what goes there, what never does, and that it can be loaded again."""

from __future__ import annotations

import json
import re

import pytest
import torch

import saekit as sk
from fixtures.hub import hub as hub
from fixtures.hub import point_to as point_to
from fixtures.known_saes import oracle as oracle
from fixtures.known_saes import rows as rows
from fixtures.known_saes import synthetic as synthetic
from saekit.errors import ConfigError, FormatError, ModelError, OfflineError
from saekit.evaluation.result import Evaluation
from saekit.evaluation.settings import EvaluationSettings
from saekit.files import dump_json, seal
from saekit.places import without_local_paths
from saekit.report.sharing import pack, push
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.store.exports import export

# The hub's own library calls its HTTP library in an old way when it uploads large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "/home/somebody/private"
KNOWN = {
    "model": f"{SECRET}/models/gemma",
    "model_path": f"{SECRET}/models/gemma",
    "rows_path": f"{SECRET}/rows",
    "hook": "layers.1",
    "seed": 3,
    "note": f"started from `{SECRET}/old run/sae`, see file://{SECRET}/log and C:\\Users\\somebody\\x",
    "sizes_of": [{"path": f"{SECRET}/rows"}],
}


@pytest.fixture
def folder(tmp_path, oracle, rows):
    """An SAE with results about it and about another, and with files that are nobody's business."""
    sae = oracle.replace(provenance=KNOWN)
    place = tmp_path / "sae"
    sae.save(place)
    settings = EvaluationSettings(max_rows=600)
    sk.evaluate(place, rows.numpy(), settings=settings).save(place / "evaluation.json")
    sk.evaluate(oracle.take(20), rows.numpy(), settings=settings).save(place / "stale.json")
    for name in ("notes.txt", ".env", "report.html", "log.jsonl", "checkpoints/step-1.safetensors", "run.json"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("{}")
    return place


def test_what_is_pushed_loads_again_with_equal_codes(hub, folder, rows):
    url = push(folder, "hf:me/my-sae", message="first")
    assert url.startswith(hub.address)
    there = hub.repositories["me/my-sae"]
    assert set(there.branches["main"]) == {"README.md", "sae.json", "sae.safetensors", "evaluation.json"}
    assert there.titles == ["first"]
    assert not there.private
    mine, again = SAE.load(folder), SAE.load("hf:me/my-sae")
    assert torch.equal(again.encode(rows).to_dense(), mine.encode(rows).to_dense())
    assert again.digest() == mine.digest()
    assert SAE.from_pretrained("me/my-sae").digest() == mine.digest()
    part = SAE.load("hf:me/my-sae", latents=8)
    assert torch.equal(part.W_enc, mine.W_enc[:8])


def test_nothing_of_this_machine_leaves_it(hub, folder):
    push(folder, "hf:me/my-sae")
    for name, content in hub.repositories["me/my-sae"].branches["main"].items():
        assert b"somebody" not in content, name
    known = SAE.load("hf:me/my-sae").provenance
    assert known["model"] == "gemma"
    assert known["hook"] == "layers.1"
    assert "rows_path" not in known


def test_a_home_folder_that_is_left_is_refused(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    described = json.loads((folder / "sae.json").read_text())
    described["provenance"]["note"] = "build/home/somebody/x"  # no beginning of a path that one would recognize
    (folder / "sae.json").write_text(dump_json(seal(described)))
    with pytest.raises(FormatError, match="still holds `/home/somebody`"):
        pack(folder, "hf:me/my-sae")


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("/a/b c/d", "d"),
        ("rows of `/a/b`, and ~/x/y; 3 nats/token", "rows of `b`, and y; 3 nats/token"),
        ("https://host/a/b and owner/name/folder", "https://host/a/b and owner/name/folder"),
        ("hf:owner/name", "hf:owner/name"),
        ("\\\\server\\share\\x", "x"),
        ("a / b", "a / b"),
        ("saved to=/a/b", "saved to=b"),
    ],
)
def test_paths_in_texts(text, bare):
    assert without_local_paths({"x": [text]}) == {"x": [bare]}


def test_the_card_says_what_was_measured_and_what_was_not(folder):
    parcel = pack(folder, "hf:me/my-sae@v2")
    measured = Evaluation.load(folder / "evaluation.json").metrics.fvu
    header, _, text = parcel.card.removeprefix("---\n").partition("---")
    assert "library_name: saekit" in header
    assert "- topk" in header
    assert "base_model" not in header  # a model of a local folder is no model of the hub
    assert "## Fidelity" in text
    assert str(measured).replace("[", "\\[").replace("]", "\\]") in text
    assert "sae − pca |" in text
    assert re.search(r"sae − untrained \| -0\.\d+ .* \| better \|", text)
    left = text.partition("## Not measured")[2]
    assert "Stability" in left
    assert "Classification" in left
    assert "Fidelity" not in left
    assert parcel.left_out == ["stale.json"]
    assert "hf:me/my-sae@v2" in text


def test_the_code_of_the_card_runs(hub, folder):
    push(folder, "hf:me/local")
    builtin = SAE(
        W_enc=torch.eye(32, 192), b_enc=torch.zeros(32), W_dec=torch.eye(32, 192), b_dec=torch.zeros(192),
        rule=TopKRule(2), provenance={"model": "builtin", "layer": 2, "hook": "layers.2"},
    )  # fmt: skip
    assert builtin.push_to_hub("me/builtin").startswith(hub.address)
    for name, width in (("local", 24), ("builtin", 192)):
        text = hub.repositories[f"me/{name}"].branches["main"]["README.md"].decode()
        names: dict = {}
        with torch.random.fork_rng():
            exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
        assert names["x"].shape[1] == width
        assert len(names["codes"]) == len(names["x"])
    assert "layers.2" in text


def test_a_folder_of_several_and_a_branch(hub, tmp_path, oracle):
    for name in ("a", "b"):
        oracle.save(tmp_path / "run" / name)
    push(tmp_path / "run", "hf:me/run@v1", private=True)
    there = hub.repositories["me/run"]
    assert there.private
    assert there.branches["main"] == {}
    assert set(there.branches["v1"]) == {"README.md", *(f"{a}/sae.{b}" for a in "ab" for b in ("json", "safetensors"))}
    assert SAE.load("hf:me/run/b@v1").digest() == oracle.digest()


def test_what_cannot_be_pushed(tmp_path, oracle, hub, folder, monkeypatch):
    export(oracle, tmp_path / "foreign", "saelens")
    with pytest.raises(ConfigError, match=r"it is saelens\. Convert it first: saekit convert"):
        pack(tmp_path / "foreign", "hf:me/x")
    with pytest.raises(ConfigError, match="does not exist"):
        pack(tmp_path / "nowhere", "hf:me/x")
    with pytest.raises(ConfigError, match="must look like `hf:owner/name`"):
        pack(folder, "me/x")
    with pytest.raises(ConfigError, match="whole repository, `hf:me/x`"):
        pack(folder, "hf:me/x/inside")
    hub.add("me/model", {"README.md": b"mine", "model.safetensors": b""})
    with pytest.raises(ConfigError, match=r"`me/model` exists and holds something else: `README.md`, `model.saf"):
        push(folder, "hf:me/model")
    push(folder, "hf:me/public")
    push(folder, "hf:me/public")  # again: a commit with nothing new
    with pytest.raises(ConfigError, match="exists and is public"):
        push(folder, "hf:me/public", private=True)
    with pytest.raises(ModelError, match="may not write to `you/x`"):
        push(folder, "hf:you/x")
    hub.add("you/saes", {"sae.json": b"{}"})
    with pytest.raises(ModelError, match="may not write to `you/saes`"):
        push(folder, "hf:you/saes")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match="no valid token"):
        push(folder, "hf:me/new")
    (folder / "sae.safetensors").write_bytes((folder / "sae.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(FormatError, match="altered"):
        push(folder, "hf:me/public")


def test_without_network(folder, point_to, monkeypatch):
    import socket

    with pytest.raises(OfflineError, match=r"HF_HUB_OFFLINE is set.*Nothing was committed"):
        push(folder, "hf:me/x")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_to(port)
    with pytest.raises(OfflineError, match="Nothing was committed"):
        push(folder, "hf:me/x")
