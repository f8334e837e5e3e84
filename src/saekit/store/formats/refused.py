"""Files that saekit recognizes and does not read: no SAE of one row, or code instead of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..listing import Listing

_BY_TENSOR = (
    (r"(^|\.)code_normalization_id$", "a crosscoder (science-of-finetuning)", "it reads the rows of several models"),
    (r"^attn_layers\.", "a temporal SAE", "its codes of a token depend on the tokens before it"),
    (r"^lookup\.W_lookup", "a tokenized SAE", "its reconstruction adds a vector looked up by the token's id"),
    (r"^encoder_module\.|^theta_manager\.", "a cross-layer transcoder (crosslayer-coding)", "it writes to many layers"),
    (r"^W_(enc|dec)_\d+$", "a cross-layer transcoder (mntss)", "it writes to many layers"),
    (r"^post_enc|^W_decs\.", "a cross-layer transcoder (clt-training)", "it writes to many layers"),
    (r"^dictionary\._weights$", "overcomplete's dictionary",
     "its encoder is a module of its own, and a BatchTopK threshold is not in the file"),
    (r"^W_enc_DF$", "a sieve checkpoint (tilde)", "its layout is documented nowhere"),
)  # fmt: skip


def recognized(listing: Listing) -> tuple[str, str] | None:
    """Return what the files are and why saekit does not read them; None when they are nothing known.

    Reads headers; a file that cannot be read without unpickling raises its own error there.
    """
    if listing.has("cfg.json", "cc_weights.pt"):
        return "a crosscoder (ckkissane)", "it reads the rows of two models"
    if listing.has("conf.yaml", "latest_ckpt.safetensors"):
        return "a temporal SAE", "its codes of a token depend on the tokens before it"
    if any(re.fullmatch(r"W_(enc|dec)_\d+\.safetensors", name) for name in listing.names):
        return "a cross-layer transcoder (mntss)", "it writes to many layers"
    names = listing.weights()
    return None if len(names) != 1 else _by_shapes(listing.shapes(names[0]))


def _by_shapes(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """Return the same of the names and shapes of a file's tensors."""
    for pattern, what, why in _BY_TENSOR:
        if any(re.search(pattern, name) for name in shapes):
            return what, why
    encoders = [
        shape for name, shape in shapes.items() if re.fullmatch(r"(_orig_mod\.)?(W_enc|W_E|encoder\.weight)", name)
    ]
    if any(len(shape) == 3 for shape in encoders):
        return "a crosscoder or cross-layer transcoder", "its encoder has an axis of layers or models"
    return None
