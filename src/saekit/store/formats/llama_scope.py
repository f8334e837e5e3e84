"""Llama Scope: the old layout (``hyperparams.json``, ``checkpoints/final.safetensors``) and the R1 distill's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import Rule, TopKRule
from ..listing import Listing
from .canonical import (
    Stated,
    agree,
    build,
    latents_first,
    need,
    only,
    place,
    root_scale,
    threshold_rule,
    topk_rule,
)

NAME, LIBRARY = "llama_scope", "OpenMOSS/Language-Model-SAEs (2024)"
_OLD = ("hyperparams.json", "checkpoints/final.safetensors")
_R1 = ("config.json", "sae_weights.safetensors")
_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    if listing.has(*_OLD):
        return True
    return listing.has(*_R1) and {"encoder.weight", "log_jumprelu_threshold"} <= listing.shapes(_R1[1]).keys()


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    config, weights = _OLD if listing.has(*_OLD) else _R1
    return canonical(listing.tensors(weights), listing.json(config), stated, listing.address)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated, address: str = "") -> SAE:
    """Return the SAE of Llama Scope's tensors. ``s = sqrt(d) / dataset_average_activation_norm.in``.

    The library of the release (OpenMOSS at f0058a58, ``sae.py``) folds the scale on load: ``encoder.bias /= s``,
    ``decoder.bias /= s_out``, ``decoder.weight *= s / s_out``, then moves the decoder norms into the encoder and
    compares the threshold of the file, unchanged, with that pre-activation. So, on raw rows::

        pre   = x @ encoder.weight.T + encoder.bias / s
        codes = relu(pre) where pre * ‖W_dec_i‖ > threshold
    """
    log = "log_jumprelu_threshold" in tensors
    need(tensors, _NAMES, "the weights")
    only(tensors, (*_NAMES, "log_jumprelu_threshold"), "the weights")
    b_enc, b_dec = tensors["encoder.bias"], tensors["decoder.bias"]
    n, d_in = len(b_enc), tensors["encoder.weight"].numel() // max(len(b_enc), 1)
    agree("the configuration", d_model=(config.get("d_model"), d_in), d_sae=(config.get("d_sae"), n))
    s_in, s_out = _scales(config, d_in)
    W_enc = latents_first(tensors["encoder.weight"], "encoder.weight", n_latents=n, width=d_in,
                          documented="latents_first", stated=stated)  # fmt: skip
    W_dec = latents_first(tensors["decoder.weight"], "decoder.weight", n_latents=n, width=len(b_dec),
                          documented="width_first", stated=stated)  # fmt: skip
    W_dec = W_dec * (s_in / s_out)
    norms = W_dec.float().norm(dim=1) if config.get("sparsity_include_decoder_norm", True) else torch.ones(n)
    norms = norms.clamp(min=1e-30)  # a latent that writes nothing never fires
    if log:
        rule: Rule = threshold_rule(tensors["log_jumprelu_threshold"].float().exp() / norms, n)
    else:
        rule = _rule(config, norms, n, stated)
    return build(W_enc, b_enc / s_in, W_dec, b_dec / s_out, rule, provenance=_place(config, address))


def _scales(config: Mapping[str, Any], d_in: int) -> tuple[float, float]:
    norm = config.get("dataset_average_activation_norm")
    if not isinstance(norm, dict) or config.get("norm_activation", "dataset-wise") == "inference":
        return 1.0, 1.0
    where = "the configuration: `dataset_average_activation_norm`"
    s_in = root_scale(norm.get("in"), d_in, where)
    return s_in, root_scale(norm["out"], d_in, where) if norm.get("out") is not None else s_in


def _rule(config: Mapping[str, Any], norms: Tensor, n: int, stated: Stated) -> Rule:
    function = str(config.get("act_fn", "jumprelu")).lower()
    if function == "topk":
        rank = None if bool((norms == 1).all()) else norms
        return TopKRule(topk_rule(config.get("top_k"), stated, what="the configuration").k, rank)
    if function not in ("jumprelu", "relu"):
        raise FormatError(f"the configuration: `act_fn` must be jumprelu, relu or topk; got {function!r}.")
    threshold = config.get("jump_relu_threshold", 0.0) if function == "jumprelu" else 0.0
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise FormatError(f"the configuration: `jump_relu_threshold` must be a number; got {threshold!r}.")
    return threshold_rule(float(threshold) / norms, n)


def _place(config: Mapping[str, Any], address: str) -> dict[str, Any]:
    hook, out = config.get("hook_point_in"), config.get("hook_point_out")
    short = re.search(r"L(\d+)([RAM])-\d+x", address)
    if hook is None and short:
        hook = f"blocks.{short[1]}.{ {'R': 'hook_resid_post', 'A': 'hook_attn_out', 'M': 'hook_mlp_out'}[short[2]] }"
    model = "meta-llama/Llama-3.1-8B" if "Llama3_1-8B-Base" in address else config.get("model_name")
    return place(hook=hook, hook_out=out, model=model, transcoder=True if out not in (None, hook) else None)
