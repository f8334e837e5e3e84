"""Rows from images: patches of vision models, image tokens of vision-language models, independent of batching."""

from __future__ import annotations

import json
import warnings

with warnings.catch_warnings():
    import sympy  # noqa: F401

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from saekit.errors import ConfigError, DataError, ModelError
from saekit.inputs.images import read_images
from saekit.models.language import load_model
from saekit.models.quiet import quiet_transformers
from saekit.models.vision import load_vision_model
from saekit.rows.capture_images import capture_images, patch_batches, pool_images
from saekit.rows.pooling import Ask
from saekit.rows.shards import ShardRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

SIZE = {"height": 8, "width": 8}
VISION = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8,
    "patch_size": 2,
}  # fmt: skip
PIXELS = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)


def made(folder: Path, build, *parts) -> Path:
    """A random model and its processors in a folder, as transformers writes them."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
        for part in parts:
            part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    plain = ViTImageProcessorPil(size=SIZE)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=SIZE)
    t = transformers
    text = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 20,
    }  # fmt: skip
    return {
        "vit": made(root / "vit", lambda: t.ViTModel(t.ViTConfig(**VISION)), plain),
        "dino": made(
            root / "dino",
            lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)),
            plain,
        ),
        "clip": made(
            root / "clip",
            lambda: t.CLIPModel(t.CLIPConfig(text_config={**text, "max_position_embeddings": 8}, vision_config=VISION)),
            clip,
        ),
        "siglip": made(
            root / "siglip",
            lambda: t.SiglipModel(t.SiglipConfig(text_config=text, vision_config=VISION)),
            plain,
        ),
    }


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A tiny LLaVA: 16 image tokens of a CLIP tower between the words of a small Llama."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": 4, "what": 5, "is": 6, "this": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=SIZE), fast, patch_size=2,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={
            "model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "intermediate_size": 32, "vocab_size": 10, "max_position_embeddings": 64,
        },
        image_token_index=4,
        vision_feature_layer=-1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llava") / "tiny-llava"
    return made(folder, lambda: transformers.LlavaForConditionalGeneration(config), processor)


@pytest.mark.parametrize(("kind", "n_special"), [("vit", 1), ("dino", 4), ("clip", 1), ("siglip", 0)])
def test_rows_are_the_patches_of_the_hidden_states(folders, kind, n_special):
    vision = load_vision_model(folders[kind])
    rows = capture_images(vision, PIXELS, layer=1, outliers=None)
    with torch.no_grad():
        states = vision.model(**vision.inputs(list(read_images(PIXELS))), output_hidden_states=True).hidden_states[2]
    assert states.shape == (9, n_special + 16, 16)
    assert torch.allclose(rows.x, states[:, n_special:].reshape(-1, 16), atol=1e-5)
    assert rows.document.tolist() == [i for i in range(9) for _ in range(16)]
    assert rows.position.tolist() == list(range(16)) * 9
    assert rows.info["filters"]["special"] == {"skipped": True, "per_image": n_special}
    assert vision.d_model == rows.d_in == 16
    everything = capture_images(vision, PIXELS, layer=1, outliers=None, skip_special=False)
    assert torch.allclose(everything.x, states.reshape(-1, 16), atol=1e-5)
    assert everything.position[: n_special + 1].tolist() == [-1] * n_special + [0]
    json.dumps(rows.info, allow_nan=False)


def test_image_tokens_of_a_vision_language_model(llava):
    vision = load_vision_model(llava)
    assert vision.is_language_model
    assert vision.d_model == 24
    rows = capture_images(vision, PIXELS, layer=0, outliers=None)
    inputs = vision.inputs(list(read_images(PIXELS)))
    assert inputs["input_ids"].tolist() == [[1] + [4] * 16] * 9  # BOS, then nothing but the image
    with torch.no_grad():
        states = vision.model(**inputs, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(rows.x, states[:, 1:].reshape(-1, 24), atol=1e-5)
    assert rows.position.tolist() == list(range(16)) * 9
    asked = capture_images(vision, PIXELS, layer=0, outliers=None, prompt="<image> what is this")
    assert torch.allclose(asked.x, rows.x, atol=1e-5)  # causal: what follows the image does not reach it
    whole = capture_images(vision, PIXELS, layer=0, outliers=None, prompt="<image> what", skip_special=False)
    assert whole.n_rows == 9 * 18
    with pytest.raises(ModelError, match="Does the prompt contain the place of the image"):
        capture_images(vision, PIXELS, layer=0, prompt="what is this")


def test_batching_does_not_matter(folders, llava):
    for folder in (folders["vit"], llava):
        one = capture_images(folder, PIXELS, layer=1, batch_images=1)
        for size in (2, 4, None):
            other = capture_images(folder, PIXELS, layer=1, batch_images=size)
            assert torch.allclose(one.x, other.x, atol=1e-5)
            assert torch.equal(one.document, other.document)
            assert torch.equal(one.position, other.position)


def test_a_folder_of_rows_is_the_rows(folders, tmp_path):
    ticks = []
    kept = capture_images(
        folders["vit"], PIXELS, layer=[0, 2], out=tmp_path, shard_rows=50, progress=lambda *counts: ticks.append(counts)
    )
    memory = capture_images(folders["vit"], PIXELS, layer=[0, 2])
    assert set(kept) == set(memory) == {"layers.0", "layers.2"}
    assert ticks == [(9, 9)]
    for name, source in kept.items():
        assert isinstance(source, ShardRows)
        (batch,) = source.batches(1000)
        assert torch.equal(batch.x, memory[name].x)
        assert torch.equal(batch.document, memory[name].document)
    again = capture_images(folders["vit"], PIXELS, layer=[0, 2], out=tmp_path, shard_rows=50)
    assert again["layers.0"].info == kept["layers.0"].info
    with pytest.raises(ConfigError, match="holds rows of another capture; they differ in `data_digest`"):
        capture_images(folders["vit"], PIXELS[1:], layer=[0, 2], out=tmp_path, shard_rows=50)


def test_an_interrupted_capture_goes_on(folders, tmp_path):
    many = np.random.default_rng(1).integers(0, 256, (150, 8, 8, 3), np.uint8)

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done >= 128:
            raise Stopped

    with pytest.raises(Stopped):
        capture_images(folders["vit"], many, layer=1, out=tmp_path / "a", shard_rows=300, progress=stop)
    resumed = capture_images(folders["vit"], many, layer=1, out=tmp_path / "a", shard_rows=300)
    whole = capture_images(folders["vit"], many, layer=1, out=tmp_path / "b", shard_rows=300)
    assert resumed.info == whole.info
    assert resumed.n_rows == 150 * 16


def test_outliers_are_left_out_and_counted(folders):
    rows = capture_images(folders["vit"], PIXELS, layer=1, outliers=1.05)
    found = rows.info["filters"]["outliers"]
    assert 0 < found["n"] < 9 * 16
    assert rows.n_rows == 9 * 16 - found["n"]
    assert float(rows.x.norm(dim=1).max()) <= found["limit"]


def test_images_keep_their_documents_in_patch_batches(folders):
    vision = load_vision_model(folders["vit"])
    from saekit.models.hooks import find_hook

    hooks = [find_hook(vision.model, layer=layer) for layer in (0, 1)]
    batches = list(patch_batches(vision, read_images(PIXELS), hooks, batch_images=4, first=2))
    assert torch.cat([batch.document for batch in batches]).tolist() == [i for i in range(2, 9) for _ in range(16)]
    assert all(len(batch.x) == 2 and len(batch.x[0]) == len(batch.document) for batch in batches)


@pytest.mark.parametrize("size", [1, 4, None])
def test_pooled_images_are_the_pooled_rows(folders, llava, size):
    """An SAE of a language model's hidden states reads the image tokens of a vision-language model alike."""
    for folder, width in ((folders["vit"], 16), (llava, 24)):
        vision = load_vision_model(folder)
        W = torch.randn(40, width, generator=torch.Generator().manual_seed(0))
        sae = SAE(W, torch.zeros(40), W, torch.zeros(width), TopKRule(4))
        asks = [Ask(("sum", "max", "count"), sae, layer=1), Ask(("mean",), layer=0)]
        pooled, dense = pool_images(vision, PIXELS, asks, batch_images=size)
        rows = capture_images(vision, PIXELS, layer=[0, 1], outliers=None)
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
    rows = capture_images(vision, grey, layer=0, outliers=None)
    colour = capture_images(vision, np.repeat(grey[..., None], 3, axis=-1), layer=0, outliers=None)
    assert torch.allclose(rows.x, colour.x, atol=1e-5)


def test_what_is_refused(folders, tmp_path):
    with pytest.raises(ConfigError, match="exactly one of `layer` and `hook` must be given"):
        capture_images(folders["vit"], PIXELS)
    with pytest.raises(ConfigError, match="hooks must differ"):
        capture_images(folders["vit"], PIXELS, layer=[1, 1])
    with pytest.raises(ConfigError, match="`batch_images` must be a positive integer; got 0"):
        capture_images(folders["vit"], PIXELS, layer=1, batch_images=0)
    with pytest.raises(ConfigError, match="`outliers` must be above 1"):
        capture_images(folders["vit"], PIXELS, layer=1, outliers=0.5)
    with pytest.raises(ConfigError, match="`special` must leave a patch of 17 tokens; got 17"):
        capture_images(folders["vit"], PIXELS, layer=1, special=17)
    with pytest.raises(ModelError, match="`layer` must lie between 0 and 2"):
        capture_images(folders["vit"], PIXELS, layer=3)
    with pytest.raises(DataError, match="must hold images"):
        capture_images(folders["vit"], PIXELS[0, :, :, 0], layer=1)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vision_model(made(tmp_path / "bare", lambda: transformers.ViTModel(transformers.ViTConfig(**VISION))))
    with pytest.raises(ConfigError, match="`device` and `device_map` exclude each other"):
        load_vision_model(folders["vit"], device="cpu", device_map="auto")


def test_models_of_the_other_kind(folders):
    with pytest.raises(ModelError, match=r"must be a model that looks at images; its config.json describes a `llama`"):
        load_vision_model("builtin")
    with pytest.raises(ConfigError, match="`builtin` was loaded as a language model"):
        load_vision_model(load_model("builtin"))
    vision = load_vision_model(folders["vit"])
    assert load_vision_model(vision) is vision


def test_weights_that_are_missing(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    whole = load_file(folders["vit"] / "model.safetensors")
    for file in folders["vit"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = next(name for name in whole if "layer" in name)
    save_file({k: v for k, v in whole.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="must be complete"):
        load_vision_model(tmp_path)
    config = json.loads((folders["vit"] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folders["vit"] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 8}))
    with pytest.raises(ModelError):
        load_vision_model(tmp_path)


def test_tokens_that_nobody_can_name(folders, tmp_path):
    """A model with more tokens than patches, CLS and registers: they must be said."""
    vision = load_vision_model(folders["dino"])
    vision.model.config.num_register_tokens = 0
    with pytest.raises(ModelError, match="it must be clear which tokens of `dino` are patches; it has 4 beside them"):
        capture_images(vision, PIXELS, layer=1)
    rows = capture_images(vision, PIXELS, layer=1, special=4)
    assert rows.n_rows == 9 * 16


def test_a_processor_that_does_not_fit(folders):
    vision = load_vision_model(folders["vit"])
    vision.processor.image_mean = [0.5] * 7
    with pytest.raises(ModelError, match="the processor of `vit` cannot take these images"):
        capture_images(vision, PIXELS, layer=1)
