"""mlsae (tim-lawson): one TopK SAE for all layers; ``config.json`` and ``model.safetensors`` of the hub mixin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from ...sae.model import SAE
from ...sae.scaling import Scaling
from ..listing import Listing
from .canonical import Stated, agree, build, latents_first, need, only, place, topk_rule

_T = TypeVar("_T")
NAME, LIBRARY = "mlsae", "mlsae"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_NAMES = ("encoder.weight", "decoder.weight", "pre_encoder_bias")


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    return listing.has(_CONFIG, _WEIGHTS) and "pre_encoder_bias" in _own(listing.shapes(_WEIGHTS))


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    return canonical(_own(listing.tensors(_WEIGHTS)), listing.json(_CONFIG), stated)


def _own(tensors: Mapping[str, _T]) -> dict[str, _T]:
    """Return the autoencoder's tensors; the model that it was trained on may stand beside it."""
    inner = {key.removeprefix("autoencoder."): t for key, t in tensors.items() if key.startswith("autoencoder.")}
    return inner or dict(tensors)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE.

    ::

        x1    = (x - mean(x)) / (std(x) + 1e-5) per row (standardize, the default); undone on the output
        codes = relu(topk((x1 - pre_encoder_bias) @ encoder.weight.T, k))
        x_hat = codes @ decoder.weight.T + pre_encoder_bias

    Source: ``mlsae/model/autoencoder.py``.
    """
    need(tensors, _NAMES, _WEIGHTS)
    only(tensors, (*_NAMES, "last_nonzero"), _WEIGHTS)
    b_dec = tensors["pre_encoder_bias"]
    d = len(b_dec)
    n = tensors["encoder.weight"].numel() // max(d, 1)
    agree(_CONFIG, n_inputs=(config.get("n_inputs"), d), n_latents=(config.get("n_latents"), n))
    return build(
        latents_first(tensors["encoder.weight"], "encoder.weight", n_latents=n, width=d,
                      documented="latents_first", stated=stated),
        b_dec.new_zeros(n),
        latents_first(tensors["decoder.weight"], "decoder.weight", n_latents=n, width=d,
                      documented="width_first", stated=stated),
        b_dec,
        topk_rule(config.get("k"), stated, what=_CONFIG),
        b_pre=b_dec,
        scaling=Scaling("layer_norm", eps=1e-5) if config.get("standardize", True) else Scaling(),
        provenance=place(model=config.get("model_name")),
    )  # fmt: skip
