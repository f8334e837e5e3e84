"""Gemma Scope (Gemma 2): ``params.npz`` with ``W_enc`` or ``w_enc``; layer, width and L0 in the path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any

from torch import Tensor

from ...sae.model import SAE
from ..listing import Listing
from .canonical import Stated, build, latents_first, need, only, place, threshold_rule

NAME, LIBRARY = "gemma_scope", "google-deepmind/gemma-scope"
_WEIGHTS = "params.npz"
_SPELLINGS = {"wenc": "W_enc", "we": "W_enc", "wdec": "W_dec", "wd": "W_dec", "benc": "b_enc", "be": "b_enc",
              "bdec": "b_dec", "bd": "b_dec", "threshold": "threshold"}  # fmt: skip


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    names = [name for name in listing.weights() if name.endswith(".npz")]
    return len(names) == 1 and {"W_enc", "W_dec"} <= {_canonical_name(name) for name in listing.shapes(names[0])}


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = next(name for name in listing.weights() if name.endswith(".npz"))
    return canonical(listing.tensors(name), listing.address, stated)


def _canonical_name(name: str) -> str:
    return _SPELLINGS.get(name.lower().replace("_", ""), name)


def canonical(tensors: Mapping[str, Tensor], address: str, stated: Stated) -> SAE:
    """Return the SAE of Gemma Scope's arrays; without a threshold (early transcoders) it is a ReLU SAE.

    ::

        pre   = x @ W_enc + b_enc;   codes = relu(pre) where pre > threshold;   x_hat = codes @ W_dec + b_dec

    SAEs of embeddings were trained on rows times sqrt(d) and are used on rows that are not: ``W_enc /= sqrt(d)``,
    ``W_dec *= sqrt(d)``.
    Source: the release's tutorial; ``gemma_2_sae_huggingface_loader`` of sae-lens 6.54.12.
    """
    named = {_canonical_name(name): tensor for name, tensor in tensors.items()}
    need(named, ("W_enc", "W_dec", "b_enc", "b_dec"), _WEIGHTS)
    only(named, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"), _WEIGHTS)
    b_enc, b_dec = named["b_enc"], named["b_dec"]
    n, d_in = len(b_enc), named["W_enc"].numel() // len(b_enc)
    W_enc = latents_first(named["W_enc"], "W_enc", n_latents=n, width=d_in, documented="width_first", stated=stated)
    W_dec = latents_first(
        named["W_dec"], "W_dec", n_latents=n, width=len(b_dec), documented="latents_first", stated=stated
    )
    if "embedding" in address:
        W_enc, W_dec = W_enc / sqrt(d_in), W_dec * sqrt(d_in)
    threshold = named.get("threshold", b_enc.new_zeros(1))
    return build(W_enc, b_enc, W_dec, b_dec, threshold_rule(threshold, n), provenance=_place(address))


def _place(address: str) -> dict[str, Any]:
    """Return what the path says, as in ``…/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82``."""
    release = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", address)
    layer = re.search(r"layer_(\d+)", address)
    l0 = re.search(r"average_l0_(\d+)", address)
    facts: dict[str, Any] = {"claimed": {"l0": int(l0[1])} if l0 else None}
    if not release:
        return place(hook=f"layers.{layer[1]}.unknown" if layer else None, **facts)
    size, tuned, kind = release.groups()
    facts["model"] = f"google/gemma-2-{size}{'-it' if tuned == 'it' else ''}"
    if not layer:
        return place(**facts)
    words = {
        "res": "hook_resid_post",
        "mlp": "hook_mlp_out",
        "att": "attn.hook_z",
        "transcoders": "ln2.hook_normalized",
    }
    out = f"blocks.{layer[1]}.hook_mlp_out" if kind == "transcoders" else None
    return place(
        hook=f"blocks.{layer[1]}.{words[kind]}", hook_out=out, transcoder=kind == "transcoders" or None, **facts
    )
