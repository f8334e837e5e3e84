"""saev: ``sae.pt``, a line of JSON (schema, configuration) and then a state dict of ``torch.save``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import ReLURule, Rule
from ..listing import Listing, read_pickled
from .canonical import Stated, agree, build, latents_first, need, only, place, threshold_rule, topk_rule
from .single_file import only_pickled

NAME, LIBRARY = "saev", "saev"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
_MAX_HEADER = 1_000_000  # bytes of the first line


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = only_pickled(listing)
    if name is None:
        return False
    with open(listing.fetch(name), "rb") as stream:
        return stream.read(1) == b"{"


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = only_pickled(listing)
    assert name is not None  # `matches` saw it
    path = listing.fetch(name)
    with open(path, "rb") as stream:
        first = stream.readline(_MAX_HEADER)
        rest = stream.read()
    try:
        header = json.loads(first)
    except (ValueError, RecursionError):
        raise FormatError(f"`{path}` must begin with a line of JSON; it does not.") from None
    if not isinstance(header, dict):
        raise FormatError(f"`{path}` must begin with a JSON object; it is {type(header).__name__}.")
    tensors = read_pickled(io.BytesIO(rest), path)
    if not isinstance(tensors, Mapping):
        raise FormatError(f"`{path}` must hold a state dict; it holds {type(tensors).__name__}.")
    return canonical({k: t for k, t in tensors.items() if isinstance(t, Tensor)}, header, stated)


def canonical(tensors: Mapping[str, Tensor], header: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE: no input bias, no scaling.

    ::

        pre   = x @ W_enc + b_enc
        codes = relu(pre); the k largest with their sign (TopK); relu(pre) where pre > threshold (BatchTopK)
        x_hat = codes @ W_dec + b_dec

    Source: ``saev/nn/modeling.py`` @3d73f1f. Schema 1 exists in two layouts under one number and is refused.
    """
    schema = header.get("schema")
    if schema not in (None, 2, 3, 4, 5):
        raise FormatError(
            f"saev: schema {schema!r} cannot be read: "
            + ("two incompatible layouts bear that number." if schema == 1 else "saekit knows 2 to 5.")
        )
    config = header.get("cfg", header)
    config = config if isinstance(config, Mapping) else {}
    need(tensors, _NAMES, "the file")
    only(tensors, (*_NAMES, "activation.threshold"), "the file")
    b_enc, b_dec = tensors["b_enc"], tensors["b_dec"]
    n, d = len(b_enc), len(b_dec)
    agree("the header", d_model=(config.get("d_model", config.get("d_vit")), d), d_sae=(config.get("d_sae"), n))
    return build(
        latents_first(tensors["W_enc"], "W_enc", n_latents=n, width=d, documented="width_first", stated=stated),
        b_enc,
        latents_first(tensors["W_dec"], "W_dec", n_latents=n, width=d, documented="latents_first", stated=stated),
        b_dec,
        _rule(tensors, config, n, stated),
        provenance=place(library_version=header.get("lib")),
    )


def _rule(tensors: Mapping[str, Tensor], config: Mapping[str, Any], n: int, stated: Stated) -> Rule:
    activation = config.get("activation") or {"cls": "Relu"}
    name = str(activation.get("cls", activation.get("name", ""))).lower() if isinstance(activation, Mapping) else ""
    params = activation.get("params", {}) if isinstance(activation, Mapping) else {}
    if name == "relu":
        return ReLURule()
    if name == "topk":
        return topk_rule(params.get("top_k", params.get("k")), stated, what="the header", sign="signed")
    if name == "batchtopk":
        need(tensors, ("activation.threshold",), "the file")
        return threshold_rule(tensors["activation.threshold"], n)
    raise FormatError(f"saev: saekit reads the activations Relu, TopK and BatchTopK; it is {activation!r}.")
