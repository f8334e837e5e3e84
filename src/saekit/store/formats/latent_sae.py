"""latent-sae: ``cfg.json`` with ``sae_type`` and ``sae.safetensors``; SAEs of sentence embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import Rule, TopKRule
from ...sae.scaling import Scaling
from ..listing import Listing
from .canonical import Stated, agree, build, latents_first, need, only, place, threshold_rule, topk_rule

NAME, LIBRARY = "latent_sae", "latentsae"
_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"
_UNREAD = {
    "gated": "its top-k goes by the gate and its code is a product with a sigmoid, which no rule of saekit is",
    "lista": "it encodes in several steps, with inhibition by the decoder",
    "cosine": "its score is a cosine times a power of the row's norm, not one product",
}


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    return listing.has(_CONFIG, _WEIGHTS) and "sae_type" in listing.json(_CONFIG)


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    return canonical(listing.tensors(_WEIGHTS), listing.json(_CONFIG), stated)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE of one of latent-sae's types whose codes are a product and a rule.

    ::

        u     = x - input_mean                                (mean_center; added back at the end)
        pre   = (u - b_dec) @ encoder.weight.T + encoder.bias
        codes = relu(topk(pre, k)) (topk; matryoshka: the last of its ks) or the k largest |pre|, signed (abstopk);
                relu(topk(pre, m)) where pre > exp(log_threshold), m = jumprelu_max_active (jumprelu);
                relu(topk(pre, k)) where pre >= batchtopk_threshold (batchtopk)
        x_hat = codes @ W_dec + b_dec [+ u @ W_skip.T] + input_mean

    Source: ``sae.py`` of latentsae 0.2.0.
    """
    kind = str(config.get("sae_type", "topk")).split(".")[-1].lower()
    n = len(tensors["encoder.bias"]) if "encoder.bias" in tensors else 0
    if kind in _UNREAD:
        raise FormatError(f"{_CONFIG}: an SAE of type `{kind}` cannot be read: {_UNREAD[kind]}.")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    need(tensors, names, _WEIGHTS)
    only(tensors, (*names, "input_mean", "log_threshold", "batchtopk_threshold", *_SKIPS), _WEIGHTS)
    b_enc, b_dec = tensors["encoder.bias"], tensors["b_dec"]
    d = len(b_dec)
    agree(_CONFIG, d_in=(config.get("d_in"), d), num_latents=(config.get("num_latents") or None, n))
    mean = tensors.get("input_mean")
    return build(
        latents_first(tensors["encoder.weight"], "encoder.weight", n_latents=n, width=d,
                      documented="latents_first", stated=stated),
        b_enc,
        latents_first(tensors["W_dec"], "W_dec", n_latents=n, width=d, documented="latents_first", stated=stated),
        b_dec,
        _rule(tensors, config, kind, n, stated),
        b_pre=b_dec,
        W_skip=_skip(tensors),
        scaling=Scaling() if mean is None else Scaling("standardize", mean=mean, scale=torch.ones_like(mean)),
        provenance=place(),
    )  # fmt: skip


_SKIPS = ("W_skip.weight", "W_skip_down.weight", "W_skip_up.weight")


def _skip(tensors: Mapping[str, Tensor]) -> Tensor | None:
    whole, down, up = (tensors.get(name) for name in _SKIPS)
    if whole is not None:
        return whole.T
    return None if down is None or up is None else (up @ down).T


def _rule(tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str, n: int, stated: Stated) -> Rule:
    if kind == "jumprelu":
        need(tensors, ("log_threshold",), _WEIGHTS)
        return _capped(tensors["log_threshold"].exp(), config.get("jumprelu_max_active", 512), n)
    if kind == "batchtopk":
        need(tensors, ("batchtopk_threshold",), _WEIGHTS)
        threshold = tensors["batchtopk_threshold"]
        below = threshold.float().nextafter(
            threshold.new_full((), -torch.inf).float()
        )  # it fires at the threshold, too
        return _capped(below, config.get("k"), n)
    if kind == "matryoshka":
        ks = [part.strip() for part in str(config.get("matryoshka_ks", "")).split(",") if part.strip()]
        return topk_rule(ks[-1] if ks else None, stated, what=_CONFIG)
    if kind not in ("topk", "abstopk"):
        raise FormatError(f"{_CONFIG}: saekit does not know sae_type={kind!r} of latent-sae.")
    return topk_rule(config.get("k"), stated, what=_CONFIG, sign="magnitude" if kind == "abstopk" else "positive")


def _capped(threshold: Tensor, cap: Any, n: int) -> Rule:
    """Return the rule of thresholds of which at most `cap` latents pass; that of thresholds where all may."""
    rule = threshold_rule(threshold, n)
    k = topk_rule(cap, Stated(), what=_CONFIG).k
    if k >= n:
        return rule
    return TopKRule(k, threshold=rule.tensors().get("threshold"))  # none where the thresholds cut nothing off
