"""`saekit actions` and `saekit transfer` from end to end, with the page that shows them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SAE
from saekit.classification.transfer_result import Transfer
from saekit.sae.rules import TopKRule
from saekit.store.native import save

QUICK = (
    "--set",
    "C=[1.0]",
)


@pytest.fixture
def saes(tmp_path) -> list[Path]:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(48, 192, generator=g)
    one = SAE(W, torch.zeros(48), W, torch.zeros(192), TopKRule(4), provenance={"hook": "layers.1", "seed": 0})
    return [save(one, tmp_path / "a"), save(one.permute(torch.randperm(48, generator=g)), tmp_path / "b")]


@pytest.fixture
def texts(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    words = {"code": ["array", "index", "returns", "value"], "talk": ["please", "hello", "thanks", "maybe"]}
    lines = []
    for lang in ("en", "fr"):
        for i in range(60):
            label = ("code", "talk")[i % 2]
            said = " ".join(generator.choice(words[label], 4)) + f" {generator.integers(10**6)}"
            lines.append({"text": said, "label": label, "lang": lang, "item": i})
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_transfer_between_languages(call, saes, texts):
    given = ("transfer", "--model", "builtin", "--sae", saes[0], "--data", texts, "--across", "lang", *QUICK)
    status, out, err = call(*given, "--out", "found")
    assert status == 0, err
    assert out.splitlines()[0].split()[:2] == ["native", "F1"]
    assert "AUC of `SAE sum`; * can be told from chance" in out
    assert "pairs of different langs" in out
    assert "arms: 12 in" in err
    assert "wrote found/transfer.json" in err
    assert Path("found/transfer-TF-IDF.svg").read_text().startswith("<svg")
    assert Path("found/transfer-SAE-sum.png").read_bytes()[:4] == b"\x89PNG"
    assert list(Path("found/fits").glob("*.safetensors"))
    result = Transfer.load("found/transfer.json")
    assert result.cell("words", "en", "fr").chance == "above chance"

    status, again, err = call(*given, "--out", "found", "--json")
    assert status == 0, err
    assert json.loads(again) == result.to_json()

    status, out, err = call("report", "found")
    assert status == 0, err
    page = Path("found/report.html").read_text()
    assert "Transfer across `lang`" in page
    assert "tested on the column" in page
    assert page.count('<figure class="chart">') == 5
    assert page.count("AUC is 1 throughout.") + page.count('class="drawn wide"') == 5


def test_transfer_between_saes(call, saes, texts):
    status, out, err = call(
        "transfer", "--model", "builtin", "--sae", saes[0], "--to", saes[1], "--data", texts, *QUICK, "--json"
    )
    assert status == 0, err
    found = Transfer.from_json(json.loads(out))
    assert found.across == "sae"
    assert found.cell("sae", "a", "b").auc == found.cell("sae", "a", "a").auc


def test_several_saes_after_one_option(call, saes, texts):
    status, out, err = call(
        "transfer",
        "--model",
        "builtin",
        "--sae",
        *saes,
        "--data",
        texts,
        "--arms",
        "sae",
        "--pool",
        "sum",
        *QUICK,
        "--json",
    )
    assert status == 0, err
    assert [arm["name"] for arm in json.loads(out)["arms"]] == ["a sum", "b sum"]


def test_actions_and_what_predicts_them(call, saes):
    status, out, err = call("actions", "--model", "builtin", "--questions", 90, "--seed", 1, "--out", "acts")
    assert status == 0, err
    assert "accuracy" in out
    assert "answers chosen by place" in out
    assert "wrote acts/actions.jsonl (90 records" in err
    card = json.loads(Path("acts/actions.json").read_text())
    assert card["accuracy"]["low"] > card["chance"] == 0.25
    assert len(Path("acts/actions.jsonl").read_text().splitlines()) == 90

    status, out, err = call("actions", "--model", "builtin", "--task", "acts/actions.jsonl", "--out", "again", "--json")
    assert status == 0, err
    assert json.loads(out)["accuracy"] == card["accuracy"]

    status, out, err = call(
        "transfer", "--model", "builtin", "--sae", saes[0], "--data", "acts/actions.jsonl", "--text", "said",
        "--label", "correct", "--group", "document", *QUICK, "--arms", "majority,words,dense,full", "--out", "acts",
    )  # fmt: skip
    assert status == 0, err
    assert "majority" in out
    status, out, err = call("report", "acts", "--json")
    assert sorted(json.loads(out)["results"]) == ["actions", "transfer"]
    page = Path("acts/report.html").read_text()
    assert "What a model did on a task" in page
    assert "Classification" in page


def test_images_from_the_command_line(call, tmp_path):
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from saekit.models.quiet import quiet_transformers

    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=1,
    )  # fmt: skip
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTModel(config).save_pretrained("vit")
        size = {"height": 8, "width": 8}
        ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained("vit")
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 2
    pixels = generator.integers(0, 60, (80, 8, 8), np.uint8) + (labels * 150).astype(np.uint8)[:, None, None]
    np.savez("images.npz", images=pixels, label=labels)
    status, out, err = call("capture", "--model", "vit", "--images", "images.npz", "--layer", 1, "--out", "rows")
    assert status == 0, err
    assert "images: 80 in" in err
    status, out, err = call(
        "train", "--rows", "rows", "--arch", "topk", "--latents", 24, "--k", 4, "--set", "batch_rows=64", "--out", "run"
    )
    assert status == 0, err
    status, out, err = call("evaluate", "run", "--rows", "rows", "--json")
    assert json.loads(out)["entries"][0]["metrics"]["fvu"]["value"] < 1
    status, out, err = call("capture", "--model", "vit", "--images", "x.npz", "--tokens", 9, "--layer", 1, "--out", "r")
    assert (status, "--tokens is for texts; --images is given" in err) == (2, True)
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    save(SAE(W, torch.zeros(24), W, torch.zeros(16), TopKRule(4)), tmp_path / "sae")
    images = ("--model", "vit", "--sae", "sae", "--layer", 1, "--images", "images.npz", "--pool", "sum")
    kinds = (
        "--arms",
        "majority,pixels,dense,sae,binarized",
        "--set",
        "budget.C=[1.0]",
    )
    status, out, err = call("transfer", *images, *kinds, "--json")
    assert status == 0, err
    arms = {arm["name"]: arm for arm in json.loads(out)["arms"]}
    assert list(arms) == ["majority", "pixels", "dense sum", "SAE sum binarized", "SAE sum"]
    assert arms["pixels"]["auc"]["value"] == 1
    status, out, err = call("classify", *images, *kinds, "--out", "found", "--json")
    assert status == 0, err
    assert [arm["macro_f1"] for arm in json.loads(out)["arms"]] == [arm["macro_f1"] for arm in arms.values()]
    assert call("report", "found")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transfer", "--data", "x.csv"], "`--model` must be given"),
        (["transfer", "--model", "builtin"], "exactly one of --data and --images must be given"),
        (["transfer", "--model", "m", "--data", "d", "--sae", "a", "--to", "b", "--across", "c"], "at most one"),
        (["transfer", "--model", "m", "--data", "d", "--to", "b"], "--sae must be given with --to"),
        (["transfer", "--model", "m", "--data", "d", "--sae", "a", "--set", "by=documents"], "`by` needs --to"),
        (["transfer", "--model", "m", "--data", "d", "--sae", "a", "--set", "acros=lang"], "Did you mean `across`"),
        (["actions", "--model", "builtin"], "`--out` must be given"),
        (["actions", "--model", "builtin", "--out", "o", "--normalize", "words"], "`normalize` must be one of"),
    ],
)  # fmt: skip
def test_wrong_calls(call, arguments, message):
    status, out, err = call(*arguments)
    assert status == 2
    assert message in err
    assert out == ""
