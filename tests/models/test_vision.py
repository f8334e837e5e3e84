"""Vision models and vision-language models: which they are, what is known about them, and which cannot be loaded."""

from __future__ import annotations

import json

import pytest
import transformers

from fixtures.tiny_vision import PIXELS, VISION, made
from saekit import load_model
from saekit.errors import ConfigError, ModelError
from saekit.inputs.images import read_images
from saekit.models.language import LanguageModel
from saekit.models.loading import load_language_model, load_vision_model
from saekit.models.vision import VisionModel


@pytest.mark.parametrize("kind", ["vit", "dino", "clip", "siglip"])
def test_the_config_tells_that_a_model_looks_at_images(vision_folders, kind):
    model = load_model(vision_folders[kind])
    assert isinstance(model, VisionModel)
    assert (model.name, model.d_model, model.n_layers, model.channels) == (kind, 16, 3, 3)
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
