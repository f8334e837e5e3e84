"""sentence-transformers' SparseAutoEncoder (CSR): ``config.json`` and ``model.safetensors`` of one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.scaling import Scaling
from ..listing import Listing
from .canonical import Stated, agree, build, latents_first, need, only, place, topk_rule

NAME, LIBRARY = "sentence_transformers", "sentence-transformers"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_TIED = ("decoder.linear.weight", "decoder.weight")


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format: the folder of the module, inside the encoder's."""
    return listing.has(_CONFIG, _WEIGHTS) and {"pre_bias", "latent_bias"} <= listing.shapes(_WEIGHTS).keys()


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    return canonical(listing.tensors(_WEIGHTS), listing.json(_CONFIG), stated)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE of embeddings; its decoder is the encoder's matrix.

    ::

        x1    = (x - mean(x)) / (std(x) + 1e-5) per row, if normalize; undone on the output
        codes = relu(topk((x1 - pre_bias) @ W.T + latent_bias, k));   x_hat = codes @ W + pre_bias

    Source: ``SparseAutoEncoder.py`` of sentence-transformers 6.2.0.
    """
    tied = [name for name in ("encoder.weight", *_TIED) if name in tensors]
    if not tied:
        raise FormatError(f"`{_WEIGHTS}` must hold `encoder.weight` or `decoder.linear.weight`; it holds neither.")
    need(tensors, ("pre_bias", "latent_bias"), _WEIGHTS)
    only(tensors, (*tied, "pre_bias", "latent_bias", "stats_last_nonzero"), _WEIGHTS)
    b_enc, b_dec = tensors["latent_bias"], tensors["pre_bias"]
    n, d = len(b_enc), len(b_dec)
    agree(_CONFIG, input_dim=(config.get("input_dim"), d), hidden_dim=(config.get("hidden_dim"), n))
    W = latents_first(tensors[tied[0]], tied[0], n_latents=n, width=d,
                      documented="latents_first" if tied[0] == "encoder.weight" else None, stated=stated)  # fmt: skip
    return build(
        W,
        b_enc,
        W,
        b_dec,
        topk_rule(config.get("k"), stated, what=_CONFIG),
        b_pre=b_dec,
        scaling=Scaling("layer_norm", eps=1e-5) if config.get("normalize") else Scaling(),
        provenance=place(),
    )
