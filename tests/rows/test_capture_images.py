"""Rows from images: patches of vision models, image tokens of vision-language models, independent of batching."""

from __future__ import annotations

import json
import warnings

with warnings.catch_warnings():
    import sympy  # noqa: F401


import numpy as np
import pytest
import torch
import transformers
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fixtures.tiny_vision import PIXELS, SIZE, VISION, made
from saekit.errors import ConfigError, DataError, ModelError
from saekit.inputs.images import read_images
from saekit.models.loading import load_model, load_vision_model
from saekit.places import without_locations
from saekit.rows.capture import capture
from saekit.rows.capture_images import patch_batches, pool_images
from saekit.rows.pooling import Ask
from saekit.rows.settings import CaptureSettings, PatchSettings, PoolingSettings
from saekit.rows.shards import ShardRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule


@pytest.mark.parametrize(("kind", "n_special"), [("vit", 1), ("dino", 4), ("clip", 1), ("siglip", 0)])
def test_rows_are_the_patches_of_the_hidden_states(vision_folders, kind, n_special):
    vision = load_vision_model(vision_folders[kind])
    rows = capture(vision, PIXELS, layer=1, settings=CaptureSettings(outliers=None))
    with torch.no_grad():
        states = vision.model(**vision.inputs(list(read_images(PIXELS))), output_hidden_states=True).hidden_states[2]
    assert states.shape == (9, n_special + 16, 16)
    assert torch.allclose(rows.x, states[:, n_special:].reshape(-1, 16), atol=1e-5)
    assert rows.document.tolist() == [i for i in range(9) for _ in range(16)]
    assert rows.position.tolist() == list(range(16)) * 9
    assert rows.info["filters"]["special"] == {"skipped": True, "per_image": n_special}
    assert vision.d_model == rows.d_in == 16
    everything = capture(vision, PIXELS, layer=1, settings=CaptureSettings(outliers=None, skip_special=False))
    assert torch.allclose(everything.x, states.reshape(-1, 16), atol=1e-5)
    assert everything.position[: n_special + 1].tolist() == [-1] * n_special + [0]
    json.dumps(rows.info, allow_nan=False)


def test_image_tokens_of_a_vision_language_model(llava):
    vision = load_vision_model(llava)
    assert vision.is_language_model
    assert vision.d_model == 24
    rows = capture(vision, PIXELS, layer=0, settings=CaptureSettings(outliers=None))
    inputs = vision.inputs(list(read_images(PIXELS)))
    assert inputs["input_ids"].tolist() == [[1] + [4] * 16] * 9  # BOS, then nothing but the image
    with torch.no_grad():
        states = vision.model(**inputs, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(rows.x, states[:, 1:].reshape(-1, 24), atol=1e-5)
    assert rows.position.tolist() == list(range(16)) * 9
    asked = capture(vision, PIXELS, layer=0, settings=CaptureSettings(outliers=None, prompt="<image> what is this"))
    assert torch.allclose(asked.x, rows.x, atol=1e-5)  # causal: what follows the image does not reach it
    whole = capture(
        vision, PIXELS, layer=0, settings=CaptureSettings(outliers=None, prompt="<image> what", skip_special=False)
    )
    assert whole.n_rows == 9 * 18
    with pytest.raises(ModelError, match="Does the prompt contain the image token"):
        capture(vision, PIXELS, layer=0, settings=CaptureSettings(prompt="what is this"))


def test_batching_does_not_matter(vision_folders, llava):
    for folder in (vision_folders["vit"], llava):
        one = capture(folder, PIXELS, layer=1, settings=CaptureSettings(batch_images=1))
        for size in (2, 4, None):
            other = capture(folder, PIXELS, layer=1, settings=CaptureSettings(batch_images=size))
            assert torch.allclose(one.x, other.x, atol=1e-5)
            assert torch.equal(one.document, other.document)
            assert torch.equal(one.position, other.position)


def test_a_folder_of_rows_is_the_rows(vision_folders, tmp_path):
    ticks = []
    kept = capture(
        vision_folders["vit"],
        PIXELS,
        layer=[0, 2],
        out=tmp_path,
        progress=lambda *counts: ticks.append(counts),
        settings=CaptureSettings(shard_rows=50),
    )
    memory = capture(vision_folders["vit"], PIXELS, layer=[0, 2])
    assert set(kept) == set(memory) == {"layers.0", "layers.2"}
    assert ticks == [("images", 9, 9)]
    for name, source in kept.items():
        assert isinstance(source, ShardRows)
        (batch,) = source.batches(1000)
        assert torch.equal(batch.x, memory[name].x)
        assert torch.equal(batch.document, memory[name].document)
    again = capture(vision_folders["vit"], PIXELS, layer=[0, 2], out=tmp_path, settings=CaptureSettings(shard_rows=50))
    assert again["layers.0"].info == kept["layers.0"].info
    with pytest.raises(
        ConfigError, match=r"holds rows of another capture: `data_digest` was .*; `n_images` was 9, now 8"
    ):
        capture(vision_folders["vit"], PIXELS[1:], layer=[0, 2], out=tmp_path, settings=CaptureSettings(shard_rows=50))


def test_an_interrupted_capture_goes_on(vision_folders, tmp_path):
    many = np.random.default_rng(1).integers(0, 256, (150, 8, 8, 3), np.uint8)

    class Stopped(Exception):
        pass

    def stop(stage, done, total=None, note=""):
        if done >= 128:
            raise Stopped

    with pytest.raises(Stopped):
        capture(
            vision_folders["vit"],
            many,
            layer=1,
            out=tmp_path / "a",
            progress=stop,
            settings=CaptureSettings(shard_rows=300),
        )
    resumed = capture(
        vision_folders["vit"], many, layer=1, out=tmp_path / "a", settings=CaptureSettings(shard_rows=300)
    )
    whole = capture(vision_folders["vit"], many, layer=1, out=tmp_path / "b", settings=CaptureSettings(shard_rows=300))
    assert without_locations(resumed.info) == without_locations(whole.info)
    assert resumed.n_rows == 150 * 16


def test_outliers_are_left_out_and_counted(vision_folders):
    rows = capture(vision_folders["vit"], PIXELS, layer=1, settings=CaptureSettings(outliers=1.05))
    found = rows.info["filters"]["outliers"]
    assert 0 < found["n"] < 9 * 16
    assert rows.n_rows == 9 * 16 - found["n"]
    assert float(rows.x.norm(dim=1).max()) <= found["limit"]


def test_images_keep_their_documents_in_patch_batches(vision_folders):
    vision = load_vision_model(vision_folders["vit"])
    from saekit.models.hooks import find_hook

    hooks = [find_hook(vision.model, layer=layer) for layer in (0, 1)]
    batches = list(patch_batches(vision, read_images(PIXELS), hooks, first=2, settings=PatchSettings(batch_images=4)))
    assert torch.cat([batch.document for batch in batches]).tolist() == [i for i in range(2, 9) for _ in range(16)]
    assert all(len(batch.x) == 2 and len(batch.x[0]) == len(batch.document) for batch in batches)


@pytest.mark.parametrize("size", [1, 4, None])
def test_pooled_images_are_the_pooled_rows(vision_folders, llava, size):
    """An SAE of a language model's hidden states reads the image tokens of a vision-language model alike."""
    for folder, width in ((vision_folders["vit"], 16), (llava, 24)):
        vision = load_vision_model(folder)
        W = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
        sae = SAE(W, torch.zeros(40), W, torch.zeros(width), TopKRule(4))
        asks = [Ask(("sum", "max", "count"), sae, layer=1), Ask(("mean",), layer=0)]
        pooled, dense = pool_images(vision, PIXELS, asks, settings=PoolingSettings(batch_images=size))
        rows = capture(vision, PIXELS, layer=[0, 1], settings=CaptureSettings(outliers=None))
        z = sae.encode(rows["layers.1"].x).to_dense().reshape(9, 16, 40)
        for name, expected in (("sum", z.sum(1)), ("max", z.amax(1)), ("count", (z > 0).sum(1).float())):
            assert np.allclose(pooled[name].toarray(), expected.numpy(), atol=1e-4)
        assert np.allclose(dense["mean"], rows["layers.0"].x.reshape(9, 16, -1).mean(1).numpy(), atol=1e-5)


def test_grey_images(tmp_path):
    config = transformers.ViTConfig(**VISION, num_channels=1)
    processor = ViTImageProcessorPil(size=SIZE, image_mean=[0.5], image_std=[0.5])
    folder = made(tmp_path / "grey", lambda: transformers.ViTModel(config), processor)
    vision = load_vision_model(folder)
    assert vision.channels == 1
    grey = PIXELS[..., 0]
    rows = capture(vision, grey, layer=0, settings=CaptureSettings(outliers=None))
    colour = capture(vision, np.repeat(grey[..., None], 3, axis=-1), layer=0, settings=CaptureSettings(outliers=None))
    assert torch.allclose(rows.x, colour.x, atol=1e-5)


def test_what_is_refused(vision_folders, tmp_path):
    with pytest.raises(ConfigError, match="exactly one of `layer` and `hook` must be given"):
        capture(vision_folders["vit"], PIXELS)
    with pytest.raises(ConfigError, match="hooks must differ"):
        capture(vision_folders["vit"], PIXELS, layer=[1, 1])
    with pytest.raises(ConfigError, match="`batch_images` must be a whole number from 1; got 0"):
        capture(vision_folders["vit"], PIXELS, layer=1, settings=CaptureSettings(batch_images=0))
    with pytest.raises(ConfigError, match="`outliers` must be above 1"):
        capture(vision_folders["vit"], PIXELS, layer=1, settings=CaptureSettings(outliers=0.5))
    with pytest.raises(ConfigError, match="`special` must leave a patch of 17 tokens; got 17"):
        capture(vision_folders["vit"], PIXELS, layer=1, settings=CaptureSettings(special=17))
    with pytest.raises(ModelError, match="`layer` must lie between 0 and 2"):
        capture(vision_folders["vit"], PIXELS, layer=3)
    with pytest.raises(DataError, match="must hold images"):
        capture(vision_folders["vit"], PIXELS[0, :, :, 0], layer=1)


def test_which_tokens_are_patches_is_measured_and_otherwise_must_be_said(vision_folders, monkeypatch):
    vision = load_vision_model(vision_folders["dino"])
    named = capture(vision, PIXELS, layer=1)
    vision.model.config.num_register_tokens = 0  # the config says one token beside the patches, the model adds four
    assert torch.equal(capture(vision, PIXELS, layer=1).x, named.x)
    monkeypatch.setattr("saekit.rows.capture_images.other_tokens", lambda _: None)
    with pytest.raises(ModelError, match="it must be clear which tokens of `dino` are patches; it has 4 others"):
        capture(vision, PIXELS, layer=1)
    rows = capture(vision, PIXELS, layer=1, settings=CaptureSettings(special=4))
    assert torch.equal(rows.x, named.x)


@pytest.mark.parametrize("special", [None, 1])
def test_tokens_behind_the_patches_are_none(tmp_path, special):
    """YOLOS: CLS, patches, detection tokens; positions are added between its blocks."""
    config = transformers.YolosConfig(**{**VISION, "image_size": [8, 8]}, num_detection_tokens=5)
    folder = made(tmp_path / "yolos", lambda: transformers.YolosModel(config), ViTImageProcessorPil(size=SIZE))
    vision = load_vision_model(folder)
    rows = capture(vision, PIXELS, layer=1, settings=CaptureSettings(special=special, outliers=None))
    with torch.no_grad():
        states = vision.model(**vision.inputs(read_images(PIXELS)), output_hidden_states=True).hidden_states
    seen = []
    handle = vision.model.get_submodule("encoder.layer.1").register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        vision.model(**vision.inputs(read_images(PIXELS)))
    handle.remove()
    block = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert states[0].shape[1] == 1 + 16 + 5
    torch.testing.assert_close(rows.x, block[:, 1:17].reshape(-1, 16))
    assert rows.position.reshape(9, 16).tolist() == [list(range(16))] * 9


def test_the_data_or_else_the_model_decide_what_is_read(vision_folders, llava, tmp_path):
    """A vision-language model reads texts that are texts, and looks at images that are images."""
    words = capture(llava, ["what is this", "this is what"], layer=0, settings=CaptureSettings(outliers=None))
    assert words.n_rows == 6
    assert words.info["data_text"] == "text"
    listed = capture(llava, list(read_images(PIXELS)), layer=0)
    assert listed.info["n_images"] == len(PIXELS)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(read_images(PIXELS)):
        image.save(folder / f"{i}.png")
    assert torch.equal(
        next(capture(vision_folders["vit"], folder, layer=0).batches(1000)).x,
        next(capture(vision_folders["vit"], PIXELS, layer=0).batches(1000)).x,
    )


def test_images_up_to_a_number_of_rows(vision_folders):
    rows = capture(vision_folders["vit"], PIXELS, layer=0, tokens=40)
    assert rows.n_rows == 40
    assert rows.info["tokens"] == 40


def test_what_is_for_data_of_the_other_kind_is_refused(vision_folders):
    with pytest.raises(ConfigError, match="`context`, `text` must be left out: for texts, and these are images"):
        capture(vision_folders["vit"], PIXELS, layer=0, text="body", settings=CaptureSettings(context=8))
    with pytest.raises(ConfigError, match="`prompt` must be left out: for images, and these are texts"):
        capture("builtin", ["a text"], layer=0, settings=CaptureSettings(prompt="<image>"))
    with pytest.raises(ConfigError, match="a vision model must be given; `builtin` was loaded as a language model"):
        capture(load_model("builtin"), PIXELS, layer=0)
    with pytest.raises(ConfigError, match="a language model must be given; `vit` was loaded as a vision model"):
        capture(load_model(vision_folders["vit"]), ["a text"], layer=0)


def test_a_setting_given_as_an_argument_is_told_its_place(vision_folders):
    with pytest.raises(TypeError, match=r"unknown argument `outliers`. Pass settings=CaptureSettings\(outliers=…\)"):
        capture(vision_folders["vit"], PIXELS, layer=0, outliers=None)


def test_padding_between_images_of_unequal_sizes_never_becomes_a_row(tmp_path):
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**sizes, "patch_size": 4, "num_patches": 25}
    config = transformers.Siglip2Config(vision_config=vision, text_config={**sizes, "vocab_size": 20})
    processor = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=25)
    made(tmp_path / "siglip2", lambda: transformers.Siglip2Model(config), processor)
    wide = np.random.default_rng(0).integers(0, 256, (2, 8, 24, 3), np.uint8)  # three times as wide as high: 3 x 8
    for skip_special in (True, False):
        rows = capture(tmp_path / "siglip2", wide, layer=0, settings=CaptureSettings(skip_special=skip_special))
        assert rows.position.tolist() == [*range(24), *range(24)]
