"""circuit-tracer and mwhanna: per-layer transcoders, ``layer_N.safetensors`` and ``config.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import ReLURule, Rule
from ..listing import Listing
from .canonical import Stated, build, latents_first, need, only, place, threshold_rule, topk_rule

NAME, LIBRARY = "circuit_tracer", "circuit-tracer"
_THRESHOLDS = ("activation_function.threshold", "threshold")
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
_CONFIGS = ("config.yaml", "wandb-config.yaml", "wanb-config.yaml")  # the second is misspelt in some releases


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = _weights(listing)
    return name is not None and set(_NAMES) <= listing.shapes(name).keys()


def _weights(listing: Listing) -> str | None:
    names = [name for name in listing.weights() if re.fullmatch(r"layer_\d+\.safetensors", name)]
    return names[0] if len(names) == 1 else None


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the transcoder."""
    name = _weights(listing)
    assert name is not None  # `matches` saw it
    config: dict[str, Any] = {}
    for each in _CONFIGS:
        if listing.has(each):
            config |= listing.yaml(each)
    return canonical(listing.tensors(name), config, stated, layer=int(name.removeprefix("layer_").split(".")[0]))


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated, layer: int) -> SAE:
    """Return the transcoder.

    ::

        pre   = x @ W_enc.T + b_enc
        codes = relu(pre), relu(pre) where pre > threshold, or the k largest with their sign (TopK there has no ReLU)
        y     = codes @ W_dec + b_dec [+ x @ W_skip.T]

    Older ReLU files hold ``W_dec`` transposed; the bias decides, and a square one needs `orientation`. Source:
    ``single_layer_transcoder.py`` of circuit-tracer 0.5.0 and @4bb8c0e.
    """
    need(tensors, _NAMES, f"layer_{layer}.safetensors")
    only(tensors, (*_NAMES, *_THRESHOLDS, "W_skip", "k"), f"layer_{layer}.safetensors")
    b_enc, b_dec = tensors["b_enc"], tensors["b_dec"]
    n, d_in = len(b_enc), tensors["W_enc"].numel() // max(len(b_enc), 1)
    rule = _rule(tensors, config, n, stated)
    skip = tensors.get("W_skip")
    return build(
        latents_first(tensors["W_enc"], "W_enc", n_latents=n, width=d_in, documented="latents_first", stated=stated),
        b_enc,
        latents_first(
            tensors["W_dec"], "W_dec", n_latents=n, width=len(b_dec),
            documented=None if isinstance(rule, ReLURule) else "latents_first", stated=stated,
        ),
        b_dec,
        rule,
        W_skip=None if skip is None else skip.T,
        provenance=_place(config, layer),
    )  # fmt: skip


def _rule(tensors: Mapping[str, Tensor], config: Mapping[str, Any], n: int, stated: Stated) -> Rule:
    threshold = next((tensors[name] for name in _THRESHOLDS if name in tensors), None)
    activation = config.get("activation")
    if threshold is not None:
        return threshold_rule(threshold, n)
    if "k" in tensors or activation == "topk" or stated.k is not None:
        return topk_rule(tensors.get("k", config.get("k")), stated, what="config.yaml", sign="signed")
    if activation not in (None, "relu"):
        raise FormatError(f"config.yaml: saekit does not know activation={activation!r}.")
    return ReLURule()


def _place(config: Mapping[str, Any], layer: int) -> dict[str, Any]:
    words = [config.get(key) for key in ("feature_input_hook", "feature_output_hook")]
    hook, out = (f"blocks.{layer}.{word}" if isinstance(word, str) else None for word in words)
    model = config.get("model_name")
    return place(hook=hook, hook_out=out, model=model if isinstance(model, str) else None, transcoder=True)
