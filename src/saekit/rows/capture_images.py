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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from ..files import digest_bytes, locked_folder
from ..inputs.images import Images, read_images
from ..models.hooks import Hook, Site, activations, find_hook
from ..models.loading import load_vision_model
from ..models.pretrained import DTYPES, as_dtype
from ..models.vision import VisionModel
from .capture import Progress, _Sink
from .outliers import CALIBRATION_TOKENS, OUTLIER_TIMES, OutlierFilter
from .pooling import Ask, Empty, pool_batches
from .shards import ShardWriter
from .source import Columns, check_finite
from .tokens import _batch_tokens

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
    skip_special: bool = True,
    special: int | None = None,
    prompt: str | None = None,
    batch_images: int | None = None,
    first: int = 0,
    last: int | None = None,
) -> Iterator[PatchBatch]:
    """Run a model over images and give one row per patch, at several hooks in one pass.

    Parameters
    ----------
    model, images, hooks
        What runs over what, and where the rows are taken.
    skip_special
        Leave out what the model adds: CLS, registers, the tokens around an image.
    special
        Tokens before the patches of a vision model; None: those that there are beyond the patches. Unit: tokens.
    prompt
        Text with the image, of a vision-language model; None: the image alone.
    batch_images
        Images in one forward pass; None: by the number of patches. Rows do not depend on it beyond rounding.
    first, last
        Range of the images.

    Raises
    ------
    ModelError
        It is not clear which tokens are patches, or the processor cannot take the images.
    """
    last = len(images) if last is None else last
    size = 1 if batch_images is None else batch_images
    while first < last:
        chosen = range(first, min(first + size, last))
        inputs = model.inputs([images[i] for i in chosen], prompt)
        hidden = activations(model.model, hooks, inputs)
        patch, position = _patches(model, inputs, hidden[0].shape[1], special)
        for other in hidden[1:]:
            if other.shape[1] != hidden[0].shape[1]:
                raise ModelError(
                    f"hooks read together must see the same tokens; they see {[x.shape[1] for x in hidden]}. "
                    "Capture them one by one."
                )
        there = inputs.get("attention_mask")
        everything = torch.ones_like(patch) if there is None else there > 0
        kept = patch if skip_special else everything
        document = torch.arange(chosen.start, chosen.stop, device=kept.device)[:, None].expand_as(kept)
        yield PatchBatch(
            [x[kept] for x in hidden], document[kept].cpu(), position[kept].cpu(), int((everything & ~patch)[0].sum())
        )
        first = chosen.stop
        if batch_images is None:
            size = max(1, _batch_tokens(model) // hidden[0].shape[1])  # type: ignore[arg-type]


def _patches(model: VisionModel, inputs: Mapping[str, Any], length: int, special: int | None) -> tuple[Tensor, Tensor]:
    """Which tokens ``[batch, length]`` are patches, and their numbers (int32; -1 for all others)."""
    if model.is_language_model:
        kept = inputs["input_ids"] == model.image_token
        if not bool(kept.any(1).all()):
            raise ModelError(
                f"every input of `{model.name}` must hold image tokens ({model.image_token}); some hold none. Does the "
                "prompt contain the place of the image?"
            )
    else:
        before = _n_special(model, inputs["pixel_values"], length) if special is None else special
        if not 0 <= before < length:
            raise ConfigError(f"`special` must leave a patch of {length} tokens; got {before}.")
        batch = inputs["pixel_values"].shape[0]
        kept = (torch.arange(length, device=inputs["pixel_values"].device) >= before)[None].expand(batch, length)
    position = torch.where(kept, kept.cumsum(1) - 1, -1)
    return kept, position.to(torch.int32)


def _n_special(model: VisionModel, pixels: Tensor, length: int) -> int:
    """Tokens beyond the patches: CLS, distillation token, registers. All known vision models put them first."""
    config: Any = model.model.config
    size = getattr(config, "patch_size", None)
    if not isinstance(size, int | list | tuple):
        return 0
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    beyond = length - (pixels.shape[-2] // height) * (pixels.shape[-1] // width)
    most = 2 + max(int(getattr(config, "num_register_tokens", 0) or 0), 0)
    if beyond > most:
        raise ModelError(
            f"it must be clear which tokens of `{model.name}` are patches; it has {beyond} beside them, {most} at most "
            "are known. Say how many come before the patches (special=…)."
        )
    return max(beyond, 0)  # fewer tokens than patches: a model that merges them, without CLS


def pool_images(
    model: str | os.PathLike[str] | VisionModel,
    images: Any,
    asks: Sequence[Ask],
    *,
    skip_special: bool = True,
    special: int | None = None,
    prompt: str | None = None,
    batch_images: int | None = None,
    empty: Empty = "refuse",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run a vision model over images once and pool, per image, what every ask wants over its patches.

    Parameters
    ----------
    model, images
        See `capture_images`. No patch is left out for its norm: all count.
    asks
        What is wanted; see `saekit.rows.pooling.pool_batches`. ``first`` and ``last`` are the first and the last patch.
    skip_special, special, prompt, batch_images
        See `capture_images`.
    empty
        What to do about images without rows.
    progress
        Called with images done and images wanted.

    Returns
    -------
    list of dict
        For each ask, pooling -> float32 matrix with one row per image: CSR for an SAE, dense for hidden states.

    Raises
    ------
    ModelError, OfflineError, DataError, FormatError, ConfigError, ShapeError
        As `capture_images` and `pool_batches`.
    """
    vision = load_vision_model(model)
    found = read_images(images)
    hooks = {ask.place: find_hook(vision.model, ask.place) for ask in asks}

    def batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        how: dict[str, Any] = {"skip_special": skip_special, "special": special, "prompt": prompt}
        for batch in patch_batches(vision, found, list(hooks.values()), **how, batch_images=batch_images):
            yield dict(zip(hooks, batch.x)), batch.document
            if progress is not None:
                progress(int(batch.document[-1]) + 1, len(found))

    return pool_batches(batches(), len(found), asks, empty=empty, what="images")


def capture_images(
    model: str | os.PathLike[str] | VisionModel,
    images: Any,
    *,
    layer: int | Sequence[int] | None = None,
    hook: str | Hook | Sequence[str | Hook] | None = None,
    site: Site = "resid",
    out: str | os.PathLike[str] | None = None,
    image: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    skip_special: bool = True,
    special: int | None = None,
    prompt: str | None = None,
    outliers: float | None = OUTLIER_TIMES,
    dtype: str | torch.dtype | None = None,
    batch_images: int | None = None,
    model_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    shard_rows: int | None = None,
    progress: Progress | None = None,
) -> Any:
    """Run a vision or vision-language model over images and keep one row per patch or image token.

    Parameters
    ----------
    model
        A folder, a hub name, or a `VisionModel`; see `load_vision_model`.
    images
        A folder, a file, a hub data set, an array, `Images`; see `read_images`.
    layer
        Number of a block, from 0: the residual stream after it, of the language part of a vision-language model. A list
        of layers gives a dictionary of sources.
    hook
        Instead of `layer`: a short name such as ``"layers.2.mlp"``, or the path of any module; or a list.
    site
        With `layer`: ``"resid"``, ``"mlp"`` or ``"attn"``.
    out
        Folder for the rows; None: keep them in memory. Run again after an interruption it goes on where it stopped.
    image, split, limit
        Which images; see `read_images`.
    skip_special
        Leave out what the model adds: CLS, registers, the tokens around an image.
    special
        Tokens before the patches of a vision model; None: found by counting.
    prompt
        Text with the image, of a vision-language model, its place included; None: the image alone.
    outliers
        Leave out patches whose norm is above this many times the median; None: keep them.
    dtype
        Number type of the rows; None: that of the model.
    batch_images
        Images in one forward pass; None: by their patches.
    model_dtype, device, device_map
        How the model is loaded.
    shard_rows
        Rows in a file; None: about 64 MiB.
    progress
        Called with images done and images wanted.

    Returns
    -------
    Source
        `ArrayRows`, or `ShardRows` with `out`; for several hooks a dictionary. ``document`` is the number of the image,
        ``position`` that of the patch.

    Raises
    ------
    ModelError, OfflineError
        The model or the hook cannot be had.
    DataError, FormatError
        The images cannot be read.
    ConfigError
        A setting cannot work, or `out` holds another capture.
    BusyError
        Another run writes to `out`.
    """
    for name, value in (("batch_images", batch_images), ("shard_rows", shard_rows)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(f"`{name}` must be a positive integer; got {value!r}.")
    if outliers is not None and not outliers > 1:
        raise ConfigError(f"`outliers` must be above 1 (times the median norm), or None to keep all; got {outliers!r}.")
    row_type = as_dtype(dtype)
    vision = load_vision_model(model, dtype=model_dtype, device=device, device_map=device_map)
    hooks, several = _hooks(vision.model, layer, hook, site)
    found = read_images(images, image=image, split=split, limit=limit)
    settings = _Looking(
        vision, found, hooks, several, row_type or (vision.dtype if vision.dtype in DTYPES.values() else torch.float32),
        {"skip_special": skip_special, "special": special, "prompt": prompt, "batch_images": batch_images}, outliers,
    )  # fmt: skip
    if out is None:
        return _capture(settings, None, shard_rows, progress)
    with locked_folder(out):
        return _capture(settings, Path(out), shard_rows, progress)


def _hooks(model: nn.Module, layer: Any, hook: Any, site: Site) -> tuple[tuple[Hook, ...], bool]:
    if (layer is None) == (hook is None):
        raise ConfigError(f"exactly one of `layer` and `hook` must be given; got layer={layer!r} and hook={hook!r}.")
    places = layer if hook is None else hook
    several = isinstance(places, list | tuple)
    found = tuple(
        find_hook(model, layer=place, site=site) if hook is None else find_hook(model, place)
        for place in (places if several else [places])
    )
    if not found or len({each.name for each in found}) < len(found):
        raise ConfigError(f"hooks must differ, and there must be one at least; got {places!r}.")
    return found, several


@dataclass(frozen=True)
class _Looking:
    """A capture of images with everything looked up and checked."""

    model: VisionModel
    images: Images
    hooks: tuple[Hook, ...]
    several: bool
    dtype: torch.dtype
    how: dict[str, Any]
    outliers: float | None

    def run(self, first: int, last: int) -> list[Columns]:
        """Rows of a range of images at every hook."""
        batches = list(patch_batches(self.model, self.images, self.hooks, **self.how, first=first, last=last))
        document = torch.cat([batch.document for batch in batches])
        position = torch.cat([batch.position for batch in batches])
        parts = zip(*(batch.x for batch in batches))
        return [Columns(torch.cat([x.to("cpu", self.dtype) for x in xs]), None, document, position) for xs in parts]

    def info(self, hook: Hook) -> dict[str, Any]:
        """What is recorded with the rows of a hook."""
        from importlib.metadata import version

        processor = getattr(self.model.processor, "image_processor", self.model.processor)
        return {
            **self.model.info,
            "hook": hook.name,
            "module": hook.path,
            "layer": hook.layer,
            "data": self.images.info["name"],
            "data_split": self.images.info.get("split"),
            "data_digest": self.images.digest,
            "n_images": len(self.images),
            **{key: value for key, value in self.how.items() if key != "batch_images"},
            "image_token": self.model.image_token,
            "processor": type(processor).__name__,
            "processor_digest": digest_bytes(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()),
            "versions": {name: version(name) for name in ("torch", "transformers", "pillow")},
        }


def _capture(looking: _Looking, out: Path | None, shard_rows: int | None, progress: Progress | None) -> Any:
    images = looking.images
    sinks = []
    measured, n_special = _measure(looking)
    for hook, (d_in, keep) in zip(looking.hooks, measured):
        writer = None
        if out is not None:
            fingerprint = {**looking.info(hook), "outliers": looking.outliers}
            folder = out / hook.name if looking.several else out
            writer = ShardWriter.open(folder, d_in, looking.dtype, fingerprint, shard_rows=shard_rows)
        sinks.append(_Sink(None, keep, writer))
    for number, first in enumerate(range(0, len(images), _GROUP_IMAGES)):
        last = min(first + _GROUP_IMAGES, len(images))
        if any(not sink.is_done and number >= sink.group for sink in sinks):
            for sink, rows in zip(sinks, looking.run(first, last)):
                sink.take(number, rows)
        if progress is not None:
            progress(last, len(images))
    sources = {}
    for hook, sink in zip(looking.hooks, sinks):
        outliers = None if sink.keep is None else {**sink.keep.info(), "n": sink.n_outliers}
        filters = {"special": {"skipped": looking.how["skip_special"], "per_image": n_special}, "outliers": outliers}
        sources[hook.name] = sink.finish({**looking.info(hook), "filters": filters})
    return sources if looking.several else sources[looking.hooks[0].name]


def _measure(looking: _Looking) -> tuple[list[tuple[int, OutlierFilter | None]], int]:
    """Width and outlier filter of every hook, from a sample of the images; tokens of an image that are no patches."""
    first = next(patch_batches(looking.model, looking.images, looking.hooks, **looking.how, last=1))
    n_images = min(len(looking.images), -(-CALIBRATION_TOKENS // max(len(first.document), 1)))
    # spread over all images: files are often sorted by class
    places = [len(looking.images) * i // n_images for i in range(n_images)]
    sample = _Looking(
        looking.model, looking.images.pick(places), looking.hooks, looking.several, looking.dtype, looking.how, None
    )
    measured = []
    for rows in sample.run(0, n_images):
        x = rows.x.float()
        check_finite(x, 0, "the capture")
        keep = (
            None if looking.outliers is None else OutlierFilter(looking.outliers, float(x.norm(dim=1).median()), len(x))
        )
        measured.append((x.shape[1], keep))
    return measured, first.n_special
