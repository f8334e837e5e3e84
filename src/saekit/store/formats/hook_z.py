"""connor_rob's attention SAEs of gpt2-small: ``NAME.pt`` and ``NAME_cfg.json`` with ``act_size`` and ``dict_size``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from ...sae.model import SAE
from ...sae.rules import ReLURule
from ..listing import Listing
from .canonical import Stated, agree, build, latents_first, need, only, place
from .single_file import only_pickled

NAME, LIBRARY = "hook_z", "ckkissane/attn-saes-gpt2-small-all-layers"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = only_pickled(listing)
    return (
        name is not None
        and listing.has(_config(name))
        and {"act_size", "dict_size"} <= listing.json(_config(name)).keys()
    )


def _config(weights: str) -> str:
    return f"{PurePosixPath(weights).stem}_cfg.json"


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = only_pickled(listing)
    assert name is not None  # `matches` saw it
    return canonical(listing.tensors(name), listing.json(_config(name)), stated)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE: ``codes = relu((x - b_dec) @ W_enc + b_enc)``, ``x_hat = codes @ W_dec + b_dec``.

    A row is the output of all heads, flattened, before the output projection.
    """
    need(tensors, _NAMES, "the file")
    only(tensors, _NAMES, "the file")
    b_enc, b_dec = tensors["b_enc"], tensors["b_dec"]
    n, d = len(b_enc), len(b_dec)
    agree("the configuration", act_size=(config.get("act_size"), d), dict_size=(config.get("dict_size"), n))
    W_enc = latents_first(tensors["W_enc"], "W_enc", n_latents=n, width=d, documented="width_first", stated=stated)
    W_dec = latents_first(tensors["W_dec"], "W_dec", n_latents=n, width=d, documented="latents_first", stated=stated)
    provenance = place(hook=config.get("act_name"), model=config.get("model_name", "gpt2"))
    return build(W_enc, b_enc, W_dec, b_dec, ReLURule(), b_pre=b_dec, provenance=provenance)
