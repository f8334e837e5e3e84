"""BatchTopK and matryoshka_sae (bartbussmann): ``sae.pt`` and a ``config.json`` whose values are strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import ReLURule, Rule
from ...sae.scaling import Scaling
from ..listing import Listing
from .canonical import Stated, agree, build, latents_first, need, only, place, threshold_rule, topk_rule

NAME, LIBRARY = "batchtopk", "bartbussmann/BatchTopK"
_CONFIG, _WEIGHTS = "config.json", "sae.pt"
_LOG = "jumprelu.log_threshold"


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    return listing.has(_CONFIG, _WEIGHTS) and {"dict_size", "act_size"} <= listing.json(_CONFIG).keys()


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    return canonical(listing.tensors(_WEIGHTS), listing.json(_CONFIG), stated)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE of the repository's tensors.

    ::

        x1    = (x - mean(x)) / (std(x) + 1e-5)  per row, if input_unit_norm; undone on the output
        pre   = (x1 - b_dec) @ W_enc             (b_enc is declared and unused, except by vanilla and jumprelu)

    BatchTopK SAEs of this repository have no threshold for single rows; state `k` to keep the k largest of each row, or
    find it on rows: `saekit.sae.freeze.calibrate_batchtopk`.
    Source: ``sae.py`` of bartbussmann/BatchTopK and matryoshka_sae.
    """
    kind = str(config.get("sae_type", "topk")).lower()
    need(tensors, ("W_enc", "W_dec", "b_dec"), _WEIGHTS)
    only(tensors, ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", _LOG), _WEIGHTS)
    d = len(tensors["b_dec"])
    n = tensors["W_enc"].numel() // max(d, 1)
    agree(_CONFIG, act_size=(_number(config.get("act_size")), d), dict_size=(_number(config.get("dict_size")), n))
    uses_bias = kind in ("vanilla", "jumprelu") and "b_enc" in tensors
    b_enc = tensors["b_enc"] if uses_bias else tensors["b_dec"].new_zeros(n)
    b_dec = tensors["b_dec"]
    unit = str(config.get("input_unit_norm", False)).lower() == "true"
    return build(
        latents_first(tensors["W_enc"], "W_enc", n_latents=n, width=d, documented="width_first", stated=stated),
        b_enc,
        latents_first(tensors["W_dec"], "W_dec", n_latents=n, width=d, documented="latents_first", stated=stated),
        b_dec,
        _rule(tensors, config, kind, n, stated),
        b_pre=b_dec,
        scaling=Scaling("layer_norm", eps=1e-5) if unit else Scaling(),
        provenance=place(hook=_text(config.get("hook_point")), model=_text(config.get("model_name")),
                         context=_number(config.get("seq_len")), data=_text(config.get("dataset_path"))),
    )  # fmt: skip


def _rule(tensors: Mapping[str, Tensor], config: Mapping[str, Any], kind: str, n: int, stated: Stated) -> Rule:
    if kind == "vanilla":
        return ReLURule()
    if kind == "jumprelu":
        need(tensors, (_LOG,), _WEIGHTS)
        return threshold_rule(tensors[_LOG].exp(), n)
    if kind == "topk":
        return topk_rule(config.get("top_k"), stated, what=_CONFIG)
    if "threshold" in tensors and float(tensors["threshold"].reshape(-1)[0]) > 0:
        return threshold_rule(tensors["threshold"], n)
    if stated.k is None:
        raise FormatError(
            f"`{_WEIGHTS}`: an SAE of type {kind!r} chooses over the batch, and the file has no threshold for rows. "
            f"State k to keep the k largest of each row, SAE.load(…, k={_number(config.get('top_k')) or 64}); "
            "saekit.sae.freeze.calibrate_batchtopk then finds the threshold on rows of the training."
        )
    return topk_rule(None, stated, what=_CONFIG)


def _number(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isdigit() and len(text) < 12 else None


def _text(value: Any) -> str | None:
    return None if value is None or str(value) in ("", "None") else str(value)
