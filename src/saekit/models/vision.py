"""Vision models and vision-language models as they are in transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import ModelError
from .pretrained import ModelFiles, Placement, PretrainedModel, accepts, read_weights, readable, settle, width
from .probe import fixed_noise
from .quiet import quiet_transformers

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig

_HEADS = ("pooler", "classifier", "lm_head", "head", "logit")  # parts that no row comes from


@dataclass(frozen=True, eq=False, kw_only=True)
class VisionModel(PretrainedModel):
    """A transformers model that reads images, with its processor.

    For a model of the CLIP kind `model` is the vision part alone; `d_model` is the width of the language part of a
    vision-language model.
    """

    processor: Any = field(repr=False)
    """Its image processor; the processor for image and text of a vision-language model."""
    channels: int
    """Channels of its images: 3, or 1 for grey ones."""
    image_token: int | None
    """Id of the token that stands for a piece of an image, of a vision-language model; else None."""

    @property
    def is_language_model(self) -> bool:
        """True for a vision-language model: then rows are those of its image tokens."""
        return self.image_token is not None

    def inputs(self, images: Sequence[Image], prompt: str | None = None) -> dict[str, Any]:
        """Return the arguments of the forward for a batch of images.

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
        found = self._processed([image.convert("L" if self.channels == 1 else "RGB") for image in images], prompt)
        inputs: dict[str, Any] = {
            key: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for key, value in found.items()
            if isinstance(value, Tensor)
        }
        if not self.is_language_model and "pixel_values" in inputs:
            inputs |= fixed_noise(self.model, inputs["pixel_values"])
        if self.is_language_model and accepts(self.model, "use_cache"):
            inputs["use_cache"] = False
        return inputs

    def _processed(self, pixels: list[Image], prompt: str | None) -> Mapping[str, Any]:
        text: dict[str, Any] = {}
        if self.is_language_model:
            text = {"text": [prompt or _image_prompt(self.processor)] * len(pixels), "padding": True}
        try:
            with quiet_transformers():
                found: Mapping[str, Any] = self.processor(images=pixels, return_tensors="pt", **text)
        except Exception as error:  # processors raise whatever their libraries do
            message = " ".join(str(error).split())[:200].rstrip(".")
            hint = f"The model takes {self.channels} channel(s); is its preprocessor_config.json complete?"
            if self.is_language_model:
                hint = "Does the prompt contain the image token?"
            raise ModelError(f"the processor of `{self.name}` cannot take these images: {message}. {hint}") from error
        return found


def read_vision_model(files: ModelFiles, config: PretrainedConfig, how: Placement) -> VisionModel:
    """Read a vision model (ViT, DINO, CLIP, SigLIP, …) or a vision-language model (LLaVA, PaliGemma, …).

    Raises
    ------
    ModelError
        The model does not look at images, or its files are damaged or incomplete.
    """
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    if not looks_at_images(config):
        raise ModelError(
            f"`{files.name}` must be a model that looks at images; its config.json describes a `{config.model_type}`, "
            "which reads text. Use it with texts, or give another model."
        )
    image_token = _image_token(config)
    with readable(files, "preprocessor_config.json"):
        # torchvision is often not there, and what it computes differs a little from PIL
        kind: Any = AutoImageProcessor if image_token is None else AutoProcessor
        processor = kind.from_pretrained(files.folder, backend="pil", **files.options)
        model = read_weights(
            AutoModel if image_token is None else AutoModelForImageTextToText, files, how, _HEADS
        ).model
    if image_token is None and isinstance(getattr(model, "vision_model", None), nn.Module):
        model = model.vision_model  # of CLIP and its kind
    if getattr(model.config, "mask_ratio", None):
        model.config.mask_ratio = 0.0  # a masked autoencoder: all patches are seen, in their order
    vision = getattr(model.config, "vision_config", None) or model.config
    return VisionModel(
        model=settle(model, how),
        processor=processor,
        name=files.short_name,
        digest=files.digest,
        d_model=width(model.config if image_token is None else model.config.get_text_config(), model),
        channels=1 if getattr(vision, "num_channels", 3) == 1 else 3,
        image_token=image_token,
        revision=files.revision,
        path=files.path,
    )


def looks_at_images(config: PretrainedConfig) -> bool:
    """Return whether a config speaks of images."""
    named = ("vision_config", "num_channels", "patch_size", "image_size")
    return _image_token(config) is not None or any(hasattr(config, name) for name in named)


def _image_token(config: PretrainedConfig) -> int | None:
    tokens = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((int(token) for token in tokens if token is not None), None)


def _image_prompt(processor: object) -> str:
    """Return the shortest text that a processor turns into the tokens of one image."""
    return str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", None) or "<image>")
