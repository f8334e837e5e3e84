"""Gemma Scope 2 (Gemma 3): ``params.safetensors`` with lower-case names; SAEs, transcoders, affine skip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ..listing import Listing
from .canonical import Stated, agree, build, latents_first, need, only, place, threshold_rule

NAME, LIBRARY = "gemma_scope_2", "google-deepmind/gemma-scope-2"
_CONFIG, _WEIGHTS = "config.json", "params.safetensors"


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format; its configuration may be missing."""
    return listing.has(_WEIGHTS) and {"w_enc", "w_dec"} <= listing.shapes(_WEIGHTS).keys()


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    config = listing.json(_CONFIG) if listing.has(_CONFIG) else {}
    return canonical(listing.tensors(_WEIGHTS), config, stated, listing.address)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated, address: str = "") -> SAE:
    """Return the SAE or transcoder of Gemma Scope 2's tensors.

    ::

        pre   = x @ w_enc + b_enc;   codes = relu(pre) where pre > threshold
        x_hat = codes @ w_dec + b_dec [+ x @ affine_skip_connection]

    Source: ``gemma_3_sae_huggingface_loader`` of sae-lens 6.54.12.
    """
    need(tensors, ("w_enc", "w_dec", "b_enc", "b_dec", "threshold"), _WEIGHTS)
    only(tensors, ("w_enc", "w_dec", "b_enc", "b_dec", "threshold", "affine_skip_connection"), _WEIGHTS)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(f"{_CONFIG}: `architecture` must be jump_relu; got {config['architecture']!r}.")
    if tensors["w_dec"].ndim == 3:
        raise FormatError(
            f"`{_WEIGHTS}` is one layer of a cross-layer transcoder: its decoder writes to "
            f"{tensors['w_dec'].shape[1]} layers. saekit reads SAEs and per-layer transcoders."
        )
    b_enc, b_dec = tensors["b_enc"], tensors["b_dec"]
    n, d_in = len(b_enc), tensors["w_enc"].numel() // max(len(b_enc), 1)
    agree(_CONFIG, width=(config.get("width"), n))
    return build(
        latents_first(tensors["w_enc"], "w_enc", n_latents=n, width=d_in, documented="width_first", stated=stated),
        b_enc,
        latents_first(
            tensors["w_dec"], "w_dec", n_latents=n, width=len(b_dec), documented="latents_first", stated=stated
        ),
        b_dec,
        threshold_rule(tensors["threshold"], n),
        W_skip=tensors.get("affine_skip_connection"),
        provenance=_place(config, address),
    )


def _place(config: Mapping[str, Any], address: str) -> dict[str, Any]:
    """Return what the configuration says; without one, what the names of the folders say."""
    hook, out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    folder = re.search(r"(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d+)", address)
    if hook is None and folder:
        kind, layer = folder.groups()
        block = f"model.layers.{layer}"
        hook, out = {
            "resid_post": (f"{block}.output", None),
            "mlp_out": (f"{block}.post_feedforward_layernorm.output", None),
            "attn_out": (f"{block}.self_attn.o_proj.input", None),
            "transcoder": (f"{block}.pre_feedforward_layernorm.output", f"{block}.post_feedforward_layernorm.output"),
        }[kind]
    model = config.get("model_name") or _model(address)
    l0 = config.get("l0")
    claimed = {"l0": l0} if isinstance(l0, int | float) and not isinstance(l0, bool) else None
    transcoder = True if out not in (None, hook) else None
    return place(hook=hook, hook_out=out, model=_corrected(model), claimed=claimed, transcoder=transcoder)


def _model(address: str) -> str | None:
    release = re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)", address)
    return f"google/gemma-3-{release[1]}-{release[2]}" if release else None


def _corrected(model: str | None) -> str | None:
    """Return the hub's name of the model; configurations write ``gemma-v3``, and some leave the owner out."""
    if model is None:
        return None
    model = model.replace("gemma-v3", "gemma-3")
    return model if "/" in model else f"google/{model}"
