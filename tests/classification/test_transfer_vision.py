"""Features of image patches classify images: a small ViT trained here on digits, an SAE trained on its patches."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    import sympy  # noqa: F401

import numpy as np
import pytest
import torch
import transformers
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fixtures.flat_settings import asked
from saekit import SAEFeatures, TopK, classify, load_model, read_images, train, transfer
from saekit.classification.settings import Budget
from saekit.classification.transfer import held_out
from saekit.classification.transfer_result import Transfer
from saekit.errors import ConfigError
from saekit.inputs.settings import Split
from saekit.models.quiet import quiet_transformers
from saekit.rows.capture import capture
from saekit.training.settings import TrainSettings

QUICK = Budget(C=(0.1, 1.0, 10.0), widen=0)


def run(data, *, model, sae=(), across=None, out=None, **flat) -> Transfer:
    return transfer(sae, model=model, data=data, across=across, out=out, **asked(**flat))


@pytest.fixture(scope="module")
def digits():
    """1,797 digits of 8 × 8 pixels; the first 900 train the ViT and the SAE, the others are classified."""
    found = load_digits()
    pixels = np.rint(found.images * 255 / 16).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    return pixels[order], found.target[order]


@pytest.fixture(scope="module")
def vit(digits, tmp_path_factory):
    """A ViT of two blocks, trained for some seconds."""
    pixels, labels = (torch.from_numpy(part[:900]) for part in digits)
    x = ((pixels.float() / 255 - 0.5) / 0.5)[:, None]
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vit") / "digits-vit"
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTForImageClassification(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(25):
            for part in torch.randperm(900).split(64):
                loss = torch.nn.functional.cross_entropy(model(x[part]).logits, labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.save_pretrained(folder)
        size = {"height": 8, "width": 8}
        ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def sae(vit, digits):
    rows = capture(vit, digits[0][:900], layer=1)
    (trained,) = train(TopK(n_latents=128, k=8), rows, seeds=[0], tokens=60_000, settings=TrainSettings(batch_rows=512))
    return trained


def test_digits_from_sae_patch_features(vit, sae, digits):
    pixels, labels = (part[900:] for part in digits)
    images = read_images(pixels).with_columns(label=labels)
    kinds = ("sae", "binarized", "dense", "pixels", "majority")
    asked_for = {"budget": QUICK, "pools": ("sum",), "shuffles": 0}
    found = run(images, model=vit, sae=sae, arms=kinds, **asked_for)
    assert [arm.name for arm in found.arms] == ["majority", "pixels", "dense sum", "SAE sum binarized", "SAE sum"]
    assert found.arm("sae").macro_f1.low > 0.7
    assert found.arm("sae").macro_f1.low > found.arm("majority").macro_f1.high
    assert found.arm("dense").macro_f1.value > 0.7
    assert found.arm("pixels").pool == ""
    assert found.saes[0]["provenance"]["hook"] == "layers.1"
    assert found.values[0].n_test == pytest.approx(897 / 4, abs=20)
    with pytest.raises(ConfigError, match="the arm `words` needs texts"):
        run(images, model=vit, sae=sae, arms=["words"], budget=QUICK)


def test_images_are_classified_like_texts(vit, sae, digits, tmp_path):
    pixels, labels = digits[0][900:1100], digits[1][900:1100] % 2
    images = read_images(pixels).with_columns(label=labels)
    budget = Budget(C=(1.0,), depths=(3,), thresholds=(0.0,))
    how = asked(budget=budget, ks=(4,), control_ks=(4,), pools=("sum",), search_pools=("min",), probes=("logistic",))
    found = classify(sae, model=vit, data=images, **how, out=tmp_path)
    names = [arm.name for arm in found.arms]
    assert names[:4] == ["majority", "pixels", "strongest pixels", "dense sum"]
    for name in (
        "strongest SAE",
        "random sum",
        "untrained sum k=4",
        "SAE sum matched k=4",
        "SAE sum k=4",
        "SAE sum binarized tree",
    ):
        assert name in names
    assert found.arm("SAE sum").auc.value > 0.8
    assert found.arm("random sum").about["hook"] == "layers.1"
    assert (tmp_path / "classification.json").is_file()
    assert not (tmp_path / "classifier").exists()  # classifiers explain themselves by tokens
    moved = transfer(sae, model=vit, data=images, **how)
    for arm in moved.arms:
        other = found.arm(arm.name)
        assert (arm.macro_f1, arm.difference, arm.verdict) == (other.macro_f1, other.difference, other.verdict)


def test_images_in_a_pipeline(vit, sae, digits):
    images = read_images(digits[0])
    clf = make_pipeline(SAEFeatures(vit, sae, pool="sum"), MaxAbsScaler(), LogisticRegression(C=10.0, max_iter=500))
    clf.fit(images[:900], digits[1][:900])
    assert clf.score(images[900:], digits[1][900:]) > 0.75


def test_domains_of_images(vit, sae, digits):
    """Digits and their negatives: what is learned on the one is worth less on the other."""
    pixels, labels = digits[0][900:1400], digits[1][900:1400] % 2
    kinds = ["plain"] * 500 + ["negative"] * 500
    images = read_images(np.concatenate([pixels, 255 - pixels])).with_columns(label=np.tile(labels, 2), kind=kinds)
    found = run(images, model=vit, sae=sae, across="kind", budget=QUICK)
    assert found.cell("pixels", "plain", "negative").chance != "above chance"
    assert found.cell("sae", "plain", "plain").chance == "above chance"
    assert found.arm("sae").drop.low > 0


def test_equal_images_stay_on_one_side(vit, digits):
    """Labels that say nothing but the image: only a leak could tell them."""
    pixels = digits[0][900:1000]
    labels = np.random.default_rng(0).integers(0, 2, 100)
    images = read_images(np.concatenate([pixels] * 3)).with_columns(label=np.tile(labels, 3))
    out = held_out(images).reshape(3, 100)
    assert (out == out[0]).all()
    assert 15 <= out[0].sum() <= 35
    found = run(images, model=vit, arms=["pixels"], budget=QUICK)
    assert found.values[0].n_test == out.sum()
    assert found.arm("pixels").auc.value < 0.8
    assert any("200 images occur before" in each.message for each in found.warnings)


def test_held_out_images_are_those_that_judge(vit, digits):
    images = read_images(digits[0][900:1000]).with_columns(label=digits[1][900:1000] % 2, series=np.arange(100) // 5)
    out = held_out(images, split=Split(group="series", test_share=0.5))
    assert set(np.unique(out.reshape(20, 5).sum(1))) == {0, 5}
    found = run(images, model=vit, arms=["majority"], group="series", test_share=0.5, intervals=False)
    assert found.values[0].n_test == out.sum()
    with pytest.raises(ConfigError, match="`prompt` is what a vision-language model reads"):
        run([{"text": str(i), "label": i % 2} for i in range(40)], model="builtin", arms=["majority"], prompt="<image>")
