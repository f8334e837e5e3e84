"""e2e_sae (Apollo): ``samples_N.pt``, the SAEs of several positions in one state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ...errors import ConfigError, listed
from ...sae.model import SAE
from ...sae.rules import ReLURule
from ..listing import Listing
from .canonical import Stated, build, latents_first, need, only, place
from .single_file import only_pickled

NAME, LIBRARY = "e2e_sae", "ApolloResearch/e2e_sae"
_ENCODER = ".encoder.0.weight"


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = only_pickled(listing)
    return name is not None and any(key.endswith(_ENCODER) for key in listing.shapes(name))


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE; refuse a file that holds several."""
    name = only_pickled(listing)
    assert name is not None  # `matches` saw it
    return canonical(listing.tensors(name), stated)


def canonical(tensors: Mapping[str, Tensor], stated: Stated) -> SAE:
    """Return the SAE: ``codes = relu(x @ enc.T + b)``, ``x_hat = codes @ normalize(dec, columns).T + bias``.

    Raises
    ------
    ConfigError
        The file holds the SAEs of several positions.
    """
    positions = sorted(key.removesuffix(_ENCODER) for key in tensors if key.endswith(_ENCODER))
    if len(positions) != 1:
        raise ConfigError(f"the file holds {len(positions)} SAEs, of {listed(positions)}; saekit reads a file of one.")
    prefix = f"{positions[0]}."
    own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    names = ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias")
    need(own, names, "the file")
    only(own, names, "the file")
    only(tensors, tuple(f"{prefix}{name}" for name in names), "the file")
    b_enc, b_dec = own["encoder.0.bias"], own["decoder.bias"]
    n, d = len(b_enc), len(b_dec)
    W_enc = latents_first(own["encoder.0.weight"], "encoder.0.weight", n_latents=n, width=d,
                          documented="latents_first", stated=stated)  # fmt: skip
    W_dec = latents_first(own["decoder.weight"], "decoder.weight", n_latents=n, width=d,
                          documented="width_first", stated=stated)  # fmt: skip
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    hook = re.sub(r"-", ".", positions[0])
    return build(W_enc, b_enc, W_dec, b_dec, ReLURule(), provenance=place(hook=hook))
