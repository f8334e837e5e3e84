"""Llamascopium (OpenMOSS Language-Model-SAEs 2): ``config.json`` with ``sae_type`` and weights ``W_E``, ``W_D``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import Rule, TopKRule
from ...sae.scaling import Scaling
from ..listing import Listing
from .canonical import (
    Stated,
    agree,
    build,
    latents_first,
    need,
    only,
    place,
    root_scale,
    threshold_rule,
    topk_rule,
)

NAME, LIBRARY = "llamascopium", "llamascopium"
_CONFIG, _WEIGHTS = "config.json", ("sae_weights.safetensors", "sae_weights.pt")
_LOG, _NORM = "activation_function.log_jumprelu_threshold", "dataset_average_activation_norm."


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    return (
        listing.has(_CONFIG)
        and any(listing.has(name) for name in _WEIGHTS)
        and {"sae_type", "hook_point_in"} <= listing.json(_CONFIG).keys()
    )


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    config = listing.json(_CONFIG)
    if config.get("sae_type") != "sae":
        raise FormatError(
            f"{_CONFIG}: `sae_type` must be sae for saekit; it is {config.get('sae_type')!r}: crosscoders, cross-layer "
            "transcoders, Lorsa and MOLT read more than one row or write to more than one place."
        )
    name = next(name for name in _WEIGHTS if listing.has(name))
    tensors = {key.removeprefix("sae."): t for key, t in listing.tensors(name).items()}  # a .pt nests them in "sae"
    return canonical(tensors, config, stated)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE or transcoder of Llamascopium's tensors.

    ::

        pre   = (x * s_in) @ W_E + b_E
        codes = act(pre * ‖W_D_i‖) / ‖W_D_i‖        (without sparsity_include_decoder_norm: act(pre))
        x_hat = (codes @ W_D + b_D) / s_out

    The scales (norm_activation: dataset-wise) are folded: ``b_E /= s_in``, ``b_D /= s_out``, ``W_D *= s_in / s_out``,
    and the thresholds with them. Source: ``sparse_dictionary.py`` of llamascopium 2.0.0b34.
    """
    if config.get("use_glu_encoder"):
        raise FormatError(f"{_CONFIG}: `use_glu_encoder` multiplies two encoders; saekit's SAE has one.")
    names = ("W_E", "b_E", "W_D")
    need(tensors, names, "the weights")
    only({name: t for name, t in tensors.items() if not name.startswith(_NORM)}, (*names, "b_D", _LOG), "the weights")
    b_enc, W_D = tensors["b_E"], tensors["W_D"]
    n = len(b_enc)
    d_in, d_out = tensors["W_E"].numel() // max(n, 1), W_D.numel() // max(n, 1)
    agree(_CONFIG, d_model=(config.get("d_model"), d_in))
    W_enc = latents_first(tensors["W_E"], "W_E", n_latents=n, width=d_in, documented="width_first", stated=stated)
    W_dec = latents_first(W_D, "W_D", n_latents=n, width=d_out, documented="latents_first", stated=stated)
    b_dec = tensors.get("b_D", b_enc.new_zeros(d_out))
    s_in, s_out, scaling = _scales(tensors, config, d_in)
    norms = W_dec.norm(dim=1) if config.get("sparsity_include_decoder_norm", True) else None
    return build(
        W_enc,
        b_enc / s_in,
        W_dec * (s_in / s_out),
        b_dec / s_out,
        _rule(tensors, config, norms, s_in, stated),
        scaling=scaling,
        provenance=_place(config),
    )


def _scales(tensors: Mapping[str, Tensor], config: Mapping[str, Any], d_in: int) -> tuple[float, float, Scaling]:
    """Return the factors of rows and of targets. The norms are in every file; in most they mean nothing."""
    kind = config.get("norm_activation", "inference")
    hook_in, hook_out = config.get("hook_point_in"), config.get("hook_point_out") or config.get("hook_point_in")
    if kind == "inference":
        return 1.0, 1.0, Scaling()
    if kind == "token-wise" and hook_in == hook_out:
        return 1.0, 1.0, Scaling("row_norm")
    if kind != "dataset-wise":
        raise FormatError(
            f"{_CONFIG}: norm_activation={kind!r} cannot be computed from a row alone; saekit reads inference, "
            "dataset-wise and, for SAEs that are no transcoders, token-wise."
        )
    norm_in, norm_out = (tensors.get(f"{_NORM}{hook}") for hook in (hook_in, hook_out))
    return (
        root_scale(norm_in, d_in, f"`{_NORM}{hook_in}`"),
        root_scale(norm_out, d_in, f"`{_NORM}{hook_out}`"),
        Scaling(),
    )


def _rule(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], norms: Tensor | None, s_in: float, stated: Stated
) -> Rule:
    function = str(config.get("act_fn", "relu")).lower()
    n = len(tensors["b_E"])
    if function == "relu":
        return threshold_rule(tensors["b_E"].new_zeros(1), n)
    if function == "topk":
        return TopKRule(topk_rule(config.get("top_k"), stated, what=_CONFIG).k, norms)
    if function == "jumprelu":
        need(tensors, (_LOG,), "the weights")
        threshold = tensors[_LOG].exp()
        # A latent that writes nothing has a norm of 0; it never fires.
        return threshold_rule(threshold / s_in / (1 if norms is None else norms.clamp(min=1e-30)), n)
    raise FormatError(
        f"{_CONFIG}: act_fn={function!r} depends on the batch and the file has no threshold for single rows; "
        "saekit reads relu, topk and jumprelu."
    )


def _place(config: Mapping[str, Any]) -> dict[str, Any]:
    hook, out = config.get("hook_point_in"), config.get("hook_point_out")
    return place(hook=hook, hook_out=out, transcoder=True if out not in (None, hook) else None,
                 model=config.get("model_name"))  # fmt: skip
