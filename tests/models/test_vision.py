"""Vision models and vision-language models: which they are, what is known about them, and which cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from fixtures.tiny_models import _tokenizer
from fixtures.tiny_vision import PIXELS, VISION, made
from saekit import load_model
from saekit.errors import ConfigError, ModelError
from saekit.inputs.images import read_images
from saekit.models.language import LanguageModel
from saekit.models.loading import load_language_model, load_vision_model
from saekit.models.vision import VisionModel
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings


@pytest.mark.parametrize("kind", ["vit", "dino", "clip", "siglip"])
def test_the_config_tells_that_a_model_looks_at_images(vision_folders, kind):
    model = load_model(vision_folders[kind])
    assert isinstance(model, VisionModel)
    assert (model.name, model.d_model, model.channels) == (kind, 16, 3)
    assert not model.is_language_model


def test_a_vision_language_model_can_be_loaded_for_its_language(llava):
    seeing, reading = load_model(llava), load_model(llava, vision=False)
    assert isinstance(seeing, VisionModel)
    assert seeing.is_language_model
    assert isinstance(reading, LanguageModel)
    assert seeing.d_model == reading.d_model == 24


def test_a_vision_model_is_no_language_model(vision_folders):
    with pytest.raises(ConfigError, match="a language model must be given; `vit` was loaded as a vision model"):
        load_language_model(load_model(vision_folders["vit"]))


def test_models_of_the_other_kind(vision_folders):
    with pytest.raises(ModelError, match=r"must be a model that looks at images; its config.json describes a `llama`"):
        load_vision_model("builtin")
    with pytest.raises(ConfigError, match="`builtin` was loaded as a language model"):
        load_vision_model(load_model("builtin"))
    vision = load_vision_model(vision_folders["vit"])
    assert load_vision_model(vision) is vision


def test_weights_that_are_missing(vision_folders, tmp_path):
    from safetensors.torch import load_file, save_file

    whole = load_file(vision_folders["vit"] / "model.safetensors")
    for file in vision_folders["vit"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    name = next(name for name in whole if "layer" in name)
    save_file({k: v for k, v in whole.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="must be complete"):
        load_vision_model(tmp_path)
    config = json.loads((vision_folders["vit"] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((vision_folders["vit"] / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"patch_size": 8}))
    with pytest.raises(ModelError):
        load_vision_model(tmp_path)


def test_a_processor_that_does_not_fit(vision_folders):
    vision = load_vision_model(vision_folders["vit"])
    vision.processor.image_mean = [0.5] * 7
    images = list(read_images(PIXELS))
    with pytest.raises(ModelError, match="the processor of `vit` cannot take these images"):
        vision.inputs(images)


def test_folders_and_settings_that_cannot_work(vision_folders, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vision_model(made(tmp_path / "bare", lambda: transformers.ViTModel(transformers.ViTConfig(**VISION))))
    with pytest.raises(ConfigError, match="`device` and `device_map` exclude each other"):
        load_vision_model(vision_folders["vit"], device="cpu", device_map="auto")


def test_texts_go_to_the_text_tower(vision_folders, tmp_path):
    """Of a model of the CLIP kind; the other tower would need images."""
    shutil.copytree(vision_folders["clip"], tmp_path / "clip")
    tokenizer = _tokenizer("bert")
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(tmp_path / "clip")
    lm = load_model(tmp_path / "clip", vision=False)
    text = "the cat sat on"
    rows = capture(tmp_path / "clip", [text], layer=0, settings=CaptureSettings(outliers=None))
    with torch.no_grad():
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        states = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(rows.x, states[1][0, 1:-1])


def test_what_reads_neither_texts_nor_what_is_given_is_refused_with_the_reason(tmp_path):
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.WhisperConfig(
        **sizes, vocab_size=40, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    made(tmp_path / "whisper", lambda: transformers.WhisperModel(config), _tokenizer("bert"))
    with pytest.raises(ModelError, match="`whisper` must read texts; `WhisperEncoder` takes `input_features`"):
        load_model(tmp_path / "whisper")
    config = transformers.XmodConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, pad_token_id=0,
    )  # fmt: skip
    made(tmp_path / "xmod", lambda: transformers.XmodModel(config), _tokenizer("bert"))
    lm = load_model(tmp_path / "xmod")
    with pytest.raises(ModelError, match=r"its forward pass fails: .*set_default_language.*on the `\.model`"):
        capture(lm, ["the cat", "a dog"], layer=0)
    lm.model.set_default_language("en_XX")
    assert capture(lm, ["the cat", "a dog"], layer=0).n_rows == 4
