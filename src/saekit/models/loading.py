"""Load transformers models: a folder, a hub name, or the built-in one."""

from __future__ import annotations

import os

import torch

from ..errors import ConfigError
from ..settings import suggest_keywords
from .language import LanguageModel, is_causal_lm, read_language_model
from .pretrained import Placement, find_model, read_config
from .quiet import quiet_transformers
from .randomized import randomize
from .vision import VisionModel, looks_at_images, read_vision_model

Dtype = str | torch.dtype | None
Device = str | torch.device | None


@suggest_keywords
def load_model(
    model: str | os.PathLike[str] | LanguageModel | VisionModel,
    *,
    vision: bool | None = None,
    dtype: Dtype = None,
    device: Device = None,
    device_map: object = None,
) -> LanguageModel | VisionModel:
    """Load a transformers model: a language model with its tokenizer, or a vision model with its processor.

    Parameters
    ----------
    model
        ``"builtin"``, a folder in the layout of ``save_pretrained``, or a hub name ``owner/name``; with
        ``"randomized:"`` (``"randomized-SEED:"``) before it, the same transformer with random weights, see
        `saekit.models.randomized`. A model that is loaded already is returned as it is.
    vision
        Whether the model is to look at images; None: as its config says. A causal language model that can look at
        images too is loaded as a language model unless True.
    dtype
        ``"float32"``, ``"bfloat16"``, ``"float16"`` or a torch dtype; None: as the weights are stored.
    device
        A torch device; None: the GPU where there is one, else the CPU.
    device_map
        Passed to transformers, for models larger than one device (needs accelerate); then `device` must be None.

    Returns
    -------
    LanguageModel or VisionModel
        In eval mode, with gradients of its parameters switched off. Of a model of the CLIP kind, the vision part.

    Raises
    ------
    OfflineError
        The model would have to be downloaded and the hub cannot be reached.
    ModelError
        There is no such model, it is gated, its files are damaged or incomplete, or it does not look at images.
    ConfigError
        A setting cannot work, or a model of the other kind is given.
    """
    if isinstance(model, LanguageModel | VisionModel):
        kind = "vision" if isinstance(model, VisionModel) else "language"
        if vision is not None and vision != (kind == "vision"):
            raise ConfigError(
                f"a {'vision' if vision else 'language'} model must be given; `{model.name}` was loaded as a {kind} "
                "model. Give its name."
            )
        return model
    how = Placement.checked(dtype, device, device_map)
    files = find_model(model)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        config = read_config(files)
        if vision is None:
            vision = looks_at_images(config) and not is_causal_lm(config)
        loaded = read_vision_model(files, config, how) if vision else read_language_model(files, config, how)
    if files.seed is not None:
        randomize(loaded.model, files.seed)
    return loaded


def load_language_model(
    model: str | os.PathLike[str] | LanguageModel,
    *,
    dtype: Dtype = None,
    device: Device = None,
    device_map: object = None,
) -> LanguageModel:
    """Load a language model; see `load_model`."""
    loaded = load_model(model, vision=False, dtype=dtype, device=device, device_map=device_map)
    assert isinstance(loaded, LanguageModel)
    return loaded


def load_vision_model(
    model: str | os.PathLike[str] | VisionModel,
    *,
    dtype: Dtype = None,
    device: Device = None,
    device_map: object = None,
) -> VisionModel:
    """Load a vision or vision-language model; see `load_model`."""
    loaded = load_model(model, vision=True, dtype=dtype, device=device, device_map=device_map)
    assert isinstance(loaded, VisionModel)
    return loaded
