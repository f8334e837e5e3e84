"""Qwen Scope: ``layerN.sae.pt`` with ``W_enc`` [n_latents, d] and ``W_dec`` [d, n_latents]; k in the name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...sae.model import SAE
from ..listing import Listing
from .canonical import Stated, build, latents_first, need, only, place, topk_rule
from .single_file import only_pickled

NAME, LIBRARY = "qwen_scope", "Qwen/SAE-Res"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = only_pickled(listing)
    return name is not None and set(_NAMES) == listing.shapes(name).keys()


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = only_pickled(listing)
    assert name is not None  # `matches` saw it
    return canonical(listing.tensors(name), stated, listing.address)


def canonical(tensors: Mapping[str, Tensor], stated: Stated, address: str = "") -> SAE:
    """Return the SAE: ``codes = relu(topk(x @ W_enc.T + b_enc, k))``, ``x_hat = codes @ W_dec.T + b_dec``.

    k is the ``L0_`` of the repository's name, ``Qwen/SAE-Res-<model>-W<N>K-L0_<k>``; a file outside its folder has
    lost it and `k` must be stated. Files with these names and without a configuration exist in both layouts, so a
    square encoder needs `orientation` unless the path is that of the release.
    """
    need(tensors, _NAMES, "the file")
    only(tensors, _NAMES, "the file")
    release = re.search(r"SAE-Res-(?P<model>[\w.-]+?)-W(?P<width>\d+)K-L0_(?P<k>\d+)", address)
    b_enc, b_dec = tensors["b_enc"], tensors["b_dec"]
    n, d = len(b_enc), len(b_dec)
    return build(
        latents_first(tensors["W_enc"], "W_enc", n_latents=n, width=d,
                      documented="latents_first" if release else None, stated=stated),
        b_enc,
        latents_first(tensors["W_dec"], "W_dec", n_latents=n, width=d,
                      documented="width_first" if release else None, stated=_decoder_of(stated)),
        b_dec,
        topk_rule(int(release["k"]) if release else None, stated, what=f"`{address}`"),
        provenance=_place(address, release),
    )  # fmt: skip


def _decoder_of(stated: Stated) -> Stated:
    """Return the caller's layout for the decoder: in these files it is the other way round from the encoder's."""
    other = {"latents_first": "width_first", "width_first": "latents_first", None: None}[stated.orientation]
    return Stated(orientation=other)


def _place(address: str, release: re.Match[str] | None) -> dict[str, Any]:
    layer = re.search(r"layer(\d+)\.sae\.pt", address)
    return place(hook=f"model.layers.{layer[1]}.output" if layer else None,
                 model=f"Qwen/{release['model']}" if release else None,
                 claimed={"l0": int(release["k"])} if release else None)  # fmt: skip
