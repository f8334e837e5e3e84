"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors`` with ``encoder.weight``; SAEs, transcoders, skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import GroupMaxRule, Rule
from ..listing import Listing
from .canonical import Stated, agree, build, hook_of, latents_first, need, only, place, topk_rule

NAME, LIBRARY = "sparsify", "eai-sparsify"
_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    return (
        listing.has(_CONFIG, _WEIGHTS)
        and "sae_type" not in listing.json(_CONFIG)  # latent-sae, a fork
        and "encoder.weight" in listing.shapes(_WEIGHTS)
    )


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    # Folders are named by the hookpoint: `…/layers.10.mlp`, or `…/layers.10/seed1`.
    parts = [part for part in listing.address.replace("@", "/").split("/") if not part.startswith("seed")]
    hook = next((part for part in reversed(parts) if hook_of(part) is not None), None)
    return canonical(listing.tensors(_WEIGHTS), listing.json(_CONFIG), stated, hook)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated, hook: str | None = None) -> SAE:
    """Return the SAE of sparsify's tensors.

    ::

        pre   = (x - b_dec) @ encoder.weight.T + encoder.bias        (a transcoder subtracts nothing)
        codes = relu(topk(pre, k))  or  the largest of each of k contiguous groups (groupmax)
        x_hat = codes @ W_dec + b_dec [+ x @ W_skip.T]

    Source: ``sparsify/sparse_coder.py`` of eai-sparsify 1.3.3.
    """
    need(tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), _WEIGHTS)
    only(tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec", "W_skip"), _WEIGHTS)
    b_enc, b_dec = tensors["encoder.bias"], tensors["b_dec"]
    n, d_in = len(b_enc), tensors["encoder.weight"].shape[1]
    agree(_CONFIG, d_in=(config.get("d_in"), d_in), num_latents=(config.get("num_latents") or None, n))
    transcode = bool(config.get("transcode", False))
    skip = tensors.get("W_skip")
    return build(
        latents_first(tensors["encoder.weight"], "encoder.weight", n_latents=n, width=d_in,
                      documented="latents_first", stated=stated),
        b_enc,
        latents_first(tensors["W_dec"], "W_dec", n_latents=n, width=len(b_dec),
                      documented="latents_first", stated=stated),
        b_dec,
        _rule(config, stated),
        b_pre=None if transcode else b_dec,
        W_skip=None if skip is None else skip.T,
        provenance=_place(hook, transcode),
    )  # fmt: skip


def _place(hook: str | None, transcode: bool) -> dict[str, Any]:
    """Return where the SAE belongs: a transcoder reads what the module is given, and predicts what it returns."""
    if not transcode or hook is None:
        return place(hook=hook, transcoder=transcode or None)
    return place(hook=f"{hook}.input", hook_out=hook, transcoder=True)


def _rule(config: Mapping[str, Any], stated: Stated) -> Rule:
    activation = config.get("activation", "topk")  # absent in old files
    topk = topk_rule(config.get("k"), stated, what=_CONFIG)
    if activation == "groupmax":
        return GroupMaxRule(topk.k)
    if activation != "topk":
        raise FormatError(f"{_CONFIG}: `activation` must be topk or groupmax; got {activation!r}.")
    return topk
