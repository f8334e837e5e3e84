"""Vision models and vision-language models as they are in transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError, listed
from .language import LanguageModel, _as_device, _width, accepts, as_dtype, digest_of, dtype_name, find_model
from .quiet import quiet_transformers

_HEADS = ("pooler", "classifier", "lm_head", "head", "logit")  # parts that no row comes from


@dataclass(frozen=True, eq=False)
class VisionModel:
    """A transformers model that looks at images, with its processor."""

    model: nn.Module = field(repr=False)
    """The model, in eval mode, on its device; the vision part alone of a model of the CLIP kind."""
    processor: Any = field(repr=False)
    """Its image processor; the processor for image and text of a vision-language model."""
    name: str
    """The name it was asked for by: a hub name, or the last part of a path."""
    digest: str
    """SHA-256 over config and weight files, or over the hub revision when no local files are known."""
    d_model: int
    """Width of the residual stream: of the language part of a vision-language model."""
    channels: int
    """Channels of its images: 3, or 1 for grey ones."""
    image_token: int | None
    """Id of the token that stands for a piece of an image, of a vision-language model; else None."""
    revision: str | None = None
    """Commit of a hub model."""

    @property
    def device(self) -> torch.device:
        """Where its inputs must be."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Number type of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def is_language_model(self) -> bool:
        """True for a vision-language model: then rows are those of its image tokens."""
        return self.image_token is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> VisionModel:
        return self  # a value needs no copies: clones of an estimator share it

    @property
    def info(self) -> dict[str, Any]:
        """Name, digest, revision and number type, as plain JSON."""
        return {
            "model": self.name,
            "model_digest": self.digest,
            "model_revision": self.revision,
            "model_dtype": dtype_name(self.dtype),
        }

    def inputs(self, images: Sequence[Any], prompt: str | None = None) -> dict[str, Any]:
        """Arguments of the forward for a batch of PIL images.

        Parameters
        ----------
        images
            The images.
        prompt
            Text around the image, of a vision-language model; None: the image alone.

        Raises
        ------
        ModelError
            The processor cannot take them.
        """
        pixels = [image.convert("L" if self.channels == 1 else "RGB") for image in images]
        text = {"text": [prompt or _image_prompt(self.processor)] * len(pixels), "padding": True}
        try:
            with quiet_transformers():
                found = self.processor(images=pixels, return_tensors="pt", **(text if self.is_language_model else {}))
        except Exception as error:  # processors raise whatever their libraries do
            message = " ".join(str(error).split())[:200].rstrip(".")
            hint = f"The model takes {self.channels} channel(s); is its preprocessor_config.json complete?"
            if self.is_language_model:
                hint = "Does the prompt contain the place of the image?"
            raise ModelError(f"the processor of `{self.name}` cannot take these images: {message}. {hint}") from error
        inputs: dict[str, Any] = {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in found.items()
            if isinstance(value, Tensor)
        }
        if self.is_language_model and accepts(self.model, "use_cache"):
            inputs["use_cache"] = False
        return inputs


def load_vision_model(
    model: str | os.PathLike[str] | VisionModel,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
) -> VisionModel:
    """Load a vision model (ViT, DINO, CLIP, SigLIP, …) or a vision-language model (LLaVA, PaliGemma, …).

    Parameters
    ----------
    model
        A folder in the layout of ``save_pretrained``, or a hub name ``owner/name``. A `VisionModel` is returned as it
        is.
    dtype, device, device_map
        As for `load_model`.

    Returns
    -------
    VisionModel
        In eval mode, with gradients of its parameters switched off. Of a model of the CLIP kind, the vision part.

    Raises
    ------
    OfflineError
        The model would have to be downloaded and the hub cannot be reached.
    ModelError
        There is no such model, it does not look at images, its files are damaged or incomplete.
    ConfigError
        A setting cannot work.
    """
    if isinstance(model, VisionModel):
        return model
    if isinstance(model, LanguageModel):
        raise ConfigError(
            f"a vision model must be given; `{model.name}` was loaded as a language model. Give its name."
        )
    number_type = as_dtype(dtype)
    if device is not None and device_map is not None:
        raise ConfigError("`device` and `device_map` exclude each other; got both. Give one of them.")
    place = _as_device(device)
    name = os.fspath(model)
    folder, revision, local = find_model(name)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        loaded, processor, image_token = _load(name, folder, revision, local, number_type, device_map)
    if device_map is None:
        loaded = loaded.to(place)
    loaded = loaded.eval().requires_grad_(False)
    config: Any = loaded.config
    vision = getattr(config, "vision_config", None) or config
    return VisionModel(
        model=loaded,
        processor=processor,
        name=Path(name).expanduser().resolve().name if local and Path(name).exists() else name,
        digest=digest_of(folder, revision),
        d_model=_width(config.get_text_config() if image_token is not None else config, loaded),
        channels=1 if getattr(vision, "num_channels", 3) == 1 else 3,
        image_token=image_token,
        revision=revision,
    )


def _load(
    name: str, folder: str, revision: str | None, local: bool, dtype: torch.dtype | None, device_map: Any
) -> tuple[nn.Module, Any, int | None]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"local_files_only": local}
    if revision is not None and not local:
        options["revision"] = revision
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        tokens = [getattr(config, key, None) for key in ("image_token_id", "image_token_index")]
        image_token = next((int(token) for token in tokens if token is not None), None)
        if image_token is None and not _sees(config):
            raise ModelError(
                f"`{name}` must be a model that looks at images; its config.json describes a `{config.model_type}`, "
                "which reads text. Use it with texts (saekit.load_model), or give another model."
            )
        # torchvision is often not there, and what it computes differs a little from PIL
        kind: Any = AutoImageProcessor if image_token is None else AutoProcessor
        processor = kind.from_pretrained(folder, backend="pil", **options)
        loader: Any = AutoModel if image_token is None else AutoModelForImageTextToText
        model, report = loader.from_pretrained(
            folder, dtype="auto" if dtype is None else dtype, device_map=device_map, output_loading_info=True, **options
        )
    except ModelError:
        raise
    except Exception as error:
        # transformers raises OSError, ValueError, KeyError, SafetensorError, ImportError ... for files that do not fit
        message = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"the vision model `{name}` cannot be loaded: {message} Check that the folder is complete: config.json, "
            "preprocessor_config.json and weights as safetensors."
        ) from error
    missing = [key for key in report["missing_keys"] if not any(part in key for part in _HEADS)]
    if missing:
        raise ModelError(
            f"the weights of `{name}` must be complete; {listed(missing)} are missing and would be random numbers. "
            "Are these files of the model that config.json describes?"
        )
    if image_token is None and isinstance(getattr(model, "vision_model", None), nn.Module):
        model = model.vision_model  # of CLIP and its kind
    return model, processor, image_token


def _sees(config: Any) -> bool:
    """Whether a config speaks of images."""
    return any(hasattr(config, name) for name in ("vision_config", "num_channels", "patch_size", "image_size"))


def _image_prompt(processor: Any) -> str:
    """The shortest text that a processor turns into the tokens of one image."""
    return str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or "<image>")
