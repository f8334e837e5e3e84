"""Rows from images: one per patch of a vision model, or per image token of a vision-language model.

A model looks at images through its own image processor (the one that works with PIL, so that torchvision is not
needed). The rows are ordinary rows: the document is the number of the image, the position that of the patch. What the
model adds (CLS, registers, the tokens around an image) is left out by a setting that is recorded with the rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from ..files import digest_bytes
from ..inputs.images import ImageData, Images, read_images
from ..models.hooks import Hook, activations, find_hook, other_tokens
from ..models.loading import load_vision_model
from ..models.vision import VisionModel
from ..places import warn
from ..settings import Progress, silent
from .asks import Ask, warnings_on_pooling
from .document_pools import Pooled, pool_batches
from .outliers import CALIBRATION_TOKENS
from .settings import PatchSettings, PoolingSettings
from .source import Columns
from .tokens import batch_tokens_on

_GROUP_IMAGES = 64  # images between two shards or steps of progress: the grain of resuming


@dataclass(frozen=True)
class PatchBatch:
    """Rows of some images at every hook."""

    x: list[Tensor]
    """Per hook: ``[n, d]`` on the device of the model, images one after another."""
    document: Tensor
    """Number of the image each row belongs to, int64 ``[n]``."""
    position: Tensor
    """Number of the patch in its image, int32 ``[n]``; -1 for what the model adds."""
    n_special: int
    """Tokens of the first image that are no patches."""


def patch_batches(
    model: VisionModel,
    images: Images,
    hooks: Sequence[Hook],
    *,
    settings: PatchSettings = PatchSettings(),
    first: int = 0,
    last: int | None = None,
) -> Iterator[PatchBatch]:
    """Run a model over images and yield one row per patch, at several hooks in one pass.

    Parameters
    ----------
    model, images, hooks
        What runs over what, and where the rows are taken.
    settings
        How the model looks at the images, and which tokens become rows.
    first, last
        Range of the images.

    Raises
    ------
    ModelError
        It is not clear which tokens are patches, or the processor cannot take the images.
    """
    last = len(images) if last is None else last
    size = settings.batch_images or 1
    while first < last:
        chosen = range(first, min(first + size, last))
        inputs = model.inputs([images[i] for i in chosen], settings.prompt)
        hidden = activations(model.model, hooks, inputs)
        patch, position = _patches(model, inputs, hidden[0].shape[1], settings.special)
        _check_same_tokens(hidden)
        everything = _not_padding(inputs, patch.shape, patch.device)
        kept = patch if settings.skip_special else everything
        document = torch.arange(chosen.start, chosen.stop, device=kept.device)[:, None].expand_as(kept)
        yield PatchBatch(
            [x[kept] for x in hidden], document[kept].cpu(), position[kept].cpu(), int((everything & ~patch)[0].sum())
        )
        first = chosen.stop
        if settings.batch_images is None:
            size = max(1, batch_tokens_on(model) // hidden[0].shape[1])


def _not_padding(inputs: Mapping[str, Any], shape: torch.Size, device: torch.device) -> Tensor:
    """Return which tokens are no padding: of the text, or of images with unequal numbers of patches."""
    for name in ("attention_mask", "pixel_attention_mask"):
        mask = inputs.get(name)
        if mask is not None and mask.shape == shape:
            return mask > 0
    return torch.ones(shape, dtype=torch.bool, device=device)


def _check_same_tokens(hidden: Sequence[Tensor]) -> None:
    lengths = [x.shape[1] for x in hidden]
    if len(set(lengths)) > 1:
        raise ModelError(f"hooks read together must see the same tokens; they see {lengths}. Capture them one by one.")


def _patches(model: VisionModel, inputs: Mapping[str, Any], length: int, special: int | None) -> tuple[Tensor, Tensor]:
    """Return which tokens ``[batch, length]`` are patches, and their numbers (int32; -1 for all others)."""
    if model.is_language_model:
        kept = inputs["input_ids"] == model.image_token
        if not bool(kept.any(1).all()):
            raise ModelError(
                f"every input of `{model.name}` must hold image tokens ({model.image_token}); some hold none. Does the "
                "prompt contain the image token?"
            )
    else:
        first, last = _patch_range(model, inputs["pixel_values"], length, special)
        places = torch.arange(length, device=inputs["pixel_values"].device)
        kept = ((places >= first) & (places < last))[None].expand(inputs["pixel_values"].shape[0], length)
        kept = kept & _not_padding(inputs, kept.shape, kept.device)
    position = torch.where(kept, kept.cumsum(1) - 1, -1)
    return kept, position.to(torch.int32)


def _patch_range(model: VisionModel, pixels: Tensor, length: int, special: int | None) -> tuple[int, int]:
    """Return the first token that is a patch, and the end: beside the patches are CLS, registers, detection tokens."""
    n_patches = _n_patches(model, pixels)
    if special is not None:
        if not 0 <= special < length:
            raise ConfigError(f"`special` must leave a patch of {length} tokens; got {special}.")
        return special, length if n_patches is None else min(length, special + n_patches)
    if n_patches is None or length <= n_patches:  # a model that merges patches, without CLS
        return 0, length
    around = other_tokens(model.model)
    if around is not None and length - sum(around) == n_patches:
        return around[0], length - around[1]
    beyond = length - n_patches
    known = 2 + max(int(getattr(model.model.config, "num_register_tokens", 0) or 0), 0)
    if beyond > known:
        raise ModelError(
            f"it must be clear which tokens of `{model.name}` are patches; it has {beyond} others, at most {known} "
            "are known. Say how many come before the patches (special=…)."
        )
    return beyond, length


def _n_patches(model: VisionModel, pixels: Tensor) -> int | None:
    """Return how many patches an image is cut into; None where the config does not say."""
    size = getattr(model.model.config, "patch_size", None)
    if not isinstance(size, int | list | tuple):
        return None
    if pixels.ndim == 3:  # cut already
        return pixels.shape[1]
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    return int((pixels.shape[-2] // height) * (pixels.shape[-1] // width))


def pool_images(
    model: str | os.PathLike[str] | VisionModel,
    images: ImageData,
    asks: Sequence[Ask],
    *,
    settings: PoolingSettings = PoolingSettings(),
    progress: Progress = silent,
) -> list[Pooled]:
    """Run a vision model over images once and pool, per image, what every ask wants over its patches.

    Parameters
    ----------
    model, images
        See `saekit.rows.capture.capture`. No patch is left out for its norm: all count.
    asks
        What is wanted; see `saekit.rows.pooling.pool_batches`. ``first`` and ``last`` are the first and the last patch.
    settings
        How the model looks at the images.
    progress
        Called as ``progress("images", done, total)``.

    Returns
    -------
    list of dict
        For each ask, pooling -> float32 matrix with one row per image: CSR for an SAE, dense for hidden states.

    Raises
    ------
    ModelError, OfflineError, DataError, FormatError, ConfigError, ShapeError
        As `capture` and `pool_batches`.
    """
    vision = load_vision_model(model)
    found = read_images(images)
    filters = {"special": {"skipped": settings.skip_special}, "outliers": None}
    warn(warnings_on_pooling(asks, {**vision.info, "filters": filters}))
    hooks = {ask.place: find_hook(vision.model, ask.place) for ask in asks}

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for batch in patch_batches(vision, found, list(hooks.values()), settings=settings):
            yield dict(zip(hooks, batch.x)), batch.document
            progress("images", int(batch.document[-1]) + 1, len(found))

    return pool_batches(batches(), len(found), asks, empty=settings.empty, what="images")


@dataclass(frozen=True)
class ImageReader:
    """Images in groups of consecutive ones."""

    model: VisionModel
    images: Images
    hooks: tuple[Hook, ...]
    dtype: torch.dtype
    """Number type of the rows."""
    settings: PatchSettings

    unit = "images"

    @property
    def total(self) -> int:
        """Images in all."""
        return len(self.images)

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return -(-len(self.images) // _GROUP_IMAGES)

    def done(self, n_groups: int, n_rows: int) -> int:
        """Return the number of images."""
        return min(n_groups * _GROUP_IMAGES, len(self.images))

    @cached_property
    def first(self) -> PatchBatch:
        """The rows of the first image."""
        return next(patch_batches(self.model, self.images, self.hooks, settings=self.settings, last=1))

    def sample(self) -> list[Columns]:
        """Return rows at every hook from images spread over all: files are often sorted by class."""
        n_images = min(len(self.images), -(-CALIBRATION_TOKENS // max(len(self.first.document), 1)))
        chosen = [len(self.images) * i // n_images for i in range(n_images)]
        return self._rows(self.images.pick(chosen), 0, n_images)

    def rows(self, group: int) -> list[Columns]:
        """Return the rows of a group at every hook."""
        return self._rows(self.images, group * _GROUP_IMAGES, min((group + 1) * _GROUP_IMAGES, len(self.images)))

    def _rows(self, images: Images, first: int, last: int) -> list[Columns]:
        run = patch_batches(self.model, images, self.hooks, settings=self.settings, first=first, last=last)
        batches = list(run)
        document = torch.cat([batch.document for batch in batches])
        position = torch.cat([batch.position for batch in batches])
        parts = zip(*(batch.x for batch in batches))
        return [Columns(torch.cat([x.to("cpu", self.dtype) for x in xs]), None, document, position) for xs in parts]

    def special(self, n_groups: int) -> dict[str, Any]:
        """Return how many tokens of an image are no patches, and whether they were skipped."""
        return {"skipped": self.settings.skip_special, "per_image": self.first.n_special}

    def info(self, hook: Hook) -> dict[str, Any]:
        """Return what is recorded with the rows of a hook: the data, and how they are read."""
        processor = getattr(self.model.processor, "image_processor", self.model.processor)
        return {
            "data": self.images.info["name"],
            "data_split": self.images.info.get("split"),
            **({"data_path": self.images.info["path"]} if "path" in self.images.info else {}),
            "data_digest": self.images.digest,
            "n_images": len(self.images),
            "skip_special": self.settings.skip_special,
            "special": self.settings.special,
            "prompt": self.settings.prompt,
            "image_token": self.model.image_token,
            "processor": type(processor).__name__,
            "processor_digest": digest_bytes(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()),
            "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
        }
