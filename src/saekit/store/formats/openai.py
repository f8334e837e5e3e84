"""openai/sparse_autoencoder: one ``.pt`` with ``pre_bias``, ``latent_bias`` and what the activation is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import ReLURule, Rule
from ...sae.scaling import Scaling
from ..listing import Listing, tensors_in
from .canonical import Stated, build, latents_first, need, only, place, topk_rule
from .single_file import only_pickled

NAME, LIBRARY = "openai", "openai/sparse_autoencoder"
_NEEDED = ("pre_bias", "encoder.weight", "latent_bias", "decoder.weight")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_SITES = {"resid_post_mlp": "hook_resid_post", "resid_delta_mlp": "hook_mlp_out", "resid_delta_attn": "hook_attn_out",
          "resid_post_attn": "hook_resid_mid", "mlp_post_act": "mlp.hook_post"}  # fmt: skip


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = only_pickled(listing)
    return name is not None and {"pre_bias", "latent_bias"} <= listing.shapes(name).keys()


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = only_pickled(listing)
    assert name is not None  # `matches` saw it
    stored = listing.stored(name)
    return canonical(tensors_in(stored), stored, stated, listing.address)


def canonical(tensors: Mapping[str, Tensor], stored: Mapping[str, Any], stated: Stated, address: str = "") -> SAE:
    """Return the SAE of the file's tensors.

    ::

        x1    = (x - mean(x)) / (std(x) + 1e-5) per row, for TopK; undone on the output
        pre   = (x1 - pre_bias) @ encoder.weight.T + latent_bias;   codes = relu(topk(pre, k)) or relu(pre)
        x_hat = codes @ decoder.weight.T + pre_bias

    Source: ``sparse_autoencoder/model.py``.
    """
    need(tensors, _NEEDED, "the file")
    only(tensors, (*_NEEDED, *_STATISTICS), "the file")
    b_enc, b_dec = tensors["latent_bias"], tensors["pre_bias"]
    n, d = len(b_enc), len(b_dec)
    rule, scaling = _rule(stored, stated)
    return build(
        latents_first(tensors["encoder.weight"], "encoder.weight", n_latents=n, width=d,
                      documented="latents_first", stated=stated),
        b_enc,
        latents_first(tensors["decoder.weight"], "decoder.weight", n_latents=n, width=d,
                      documented="width_first", stated=stated),
        b_dec,
        rule,
        b_pre=b_dec,
        scaling=scaling,
        provenance=_place(address),
    )  # fmt: skip


def _rule(stored: Mapping[str, Any], stated: Stated) -> tuple[Rule, Scaling]:
    activation = stored.get("activation")
    state = stored.get("activation_state_dict")
    if activation == "TopK" or (activation is None and stated.k is not None):
        k = state.get("k") if isinstance(state, Mapping) else None
        return topk_rule(k, stated, what="the file"), Scaling("layer_norm", eps=1e-5)
    if activation == "ReLU":
        return ReLURule(), Scaling()
    raise FormatError(
        f"the file must say its `activation`, TopK or ReLU; it says {activation!r}. A state dict alone has lost it: "
        "state k for a TopK SAE, SAE.load(…, k=32)."
    )


def _place(address: str) -> dict[str, Any]:
    """Return what a path like ``gpt2-small/resid_post_mlp_v5_32k/autoencoders/6.pt`` says."""
    found = re.search(r"gpt2-small/([a-z_]+?)(?:_v\d\w*)?/autoencoders/(\d+)\.pt", address)
    if not found or found[1] not in _SITES:
        return place()
    return place(hook=f"blocks.{found[2]}.{_SITES[found[1]]}", model="gpt2")
