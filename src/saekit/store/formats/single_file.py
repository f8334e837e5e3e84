"""Releases of one file with two linear layers: Goodfire, DeepSeek-R1 (qresearch), and bare state dicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, FormatError
from ...sae.model import SAE
from ...sae.rules import ReLURule
from ...sae.scaling import Scaling
from ..listing import PICKLED, Listing, tensors_in
from .canonical import Stated, agree, build, latents_first, need, place, topk_rule

NAME, LIBRARY = "single_file", "Goodfire, qresearch (DeepSeek-R1), and state dicts of two linear layers"


@dataclass(frozen=True)
class _Layout:
    encoder: str
    decoder: str


_GOODFIRE = _Layout("encoder_linear", "decoder_linear")
_PLAIN = _Layout("encoder", "decoder")


def only_pickled(listing: Listing) -> str | None:
    """Return the one file of ``torch.save`` that an address means; None when there is none, or several."""
    names = [name for name in listing.weights() if name.endswith(PICKLED)]
    return names[0] if len(names) == 1 else None


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = only_pickled(listing)
    if name is None:
        return False
    names = _flat(listing.stored(name)).keys()
    return any(_names(layout) == names for layout in (_GOODFIRE, _PLAIN))


def _names(layout: _Layout) -> set[str]:
    return {f"{part}.{kind}" for part in (layout.encoder, layout.decoder) for kind in ("weight", "bias")}


def _flat(stored: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which may stand under a key of its own."""
    inner = next((stored[key] for key in ("state_dict", "model_state_dict") if isinstance(stored, Mapping)
                  and isinstance(stored.get(key), Mapping)), stored)  # fmt: skip
    return tensors_in(inner)


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = only_pickled(listing)
    assert name is not None  # `matches` saw it
    stored = listing.stored(name)
    config = stored.get("config", {}) if isinstance(stored, Mapping) else {}
    centre = stored.get("mean") if isinstance(stored, Mapping) and "state_dict" in stored else None
    return canonical(_flat(stored), config if isinstance(config, Mapping) else {}, stated, listing.address, centre)


def canonical(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated, address: str = "", centre: Any = None
) -> SAE:
    """Return the SAE of two linear layers: ``relu(x @ enc.T + b_enc) @ dec.T + b_dec``, or TopK where a `k` is known.

    A ``mean`` next to the state dict is read as the centre of the rows: subtracted before the encoder, added after the
    decoder. Nothing is known about such files beyond their tensors, so one that says neither its k nor its release
    is read only when the caller names this format.

    Raises
    ------
    ConfigError
        Nothing says which rule the codes follow.
    """
    layout = _GOODFIRE if "encoder_linear.weight" in tensors else _PLAIN
    need(tensors, tuple(sorted(_names(layout))), "the file")
    extra = sorted(tensors.keys() - _names(layout))
    if extra:
        raise FormatError(f"the file holds `{extra[0]}` besides two linear layers; saekit does not know its meaning.")
    b_enc, b_dec = tensors[f"{layout.encoder}.bias"], tensors[f"{layout.decoder}.bias"]
    n, d = len(b_enc), len(b_dec)
    agree("the file's config", d_in=(config.get("d_in"), d), d_sae=(config.get("d_sae"), n))
    k = config.get("k")
    released = layout is _GOODFIRE or "deepseek" in address.lower()
    if k is None and stated.k is None and not released and stated.format != NAME:
        raise ConfigError(
            f"`{address}` holds two linear layers and nothing that says which latents fire. State it: "
            f'SAE.load(…, k=64) for TopK, or format="{NAME}" for ReLU.'
        )
    return build(
        latents_first(tensors[f"{layout.encoder}.weight"], "encoder.weight", n_latents=n, width=d,
                      documented="latents_first", stated=stated),
        b_enc,
        latents_first(tensors[f"{layout.decoder}.weight"], "decoder.weight", n_latents=n, width=d,
                      documented="width_first", stated=stated),
        b_dec,
        ReLURule() if k is None and stated.k is None else topk_rule(k, stated, what="the file"),
        scaling=_centring(centre, d),
        provenance=_place(address, layout),
    )  # fmt: skip


def _centring(centre: Any, d: int) -> Scaling:
    if centre is None:
        return Scaling()
    if not isinstance(centre, Tensor) or centre.numel() != d or not centre.dtype.is_floating_point:
        raise FormatError(f"the file's `mean` must be {d} numbers; it is not.")
    return Scaling("standardize", mean=centre.reshape(d), scale=torch.ones(d, dtype=centre.dtype))


def _place(address: str, layout: _Layout) -> dict[str, Any]:
    """Return what the names of the files of known releases say."""
    layer = re.search(r"(?:^|[-_/])l(\d+)(?:[-_.]|$)", address)
    model = re.search(r"(Llama-3\.\d-\d+B(?:-Instruct)?|DeepSeek-R1-Distill-[\w.-]+?)(?=-SAE|/|$)", address)
    owner = {"L": "meta-llama/", "D": "deepseek-ai/"}[model[1][0]] if model else ""
    return place(hook=f"layers.{layer[1]}" if layer else None, model=f"{owner}{model[1]}" if model else None)
