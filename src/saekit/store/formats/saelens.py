"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, before version 6 and since; every class of inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import FormatError
from ...sae.freeze import freeze_gated
from ...sae.model import SAE
from ...sae.rules import ReLURule, Rule
from ...sae.scaling import Scaling
from ..listing import Listing
from .canonical import Stated, agree, build, latents_first, mapping, need, only, place, threshold_rule, topk_rule

NAME, LIBRARY = "saelens", "sae-lens"
_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"

_RENAMED = {
    "hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}  # fmt: skip
_PLACE = (
    "model_name", "hook_name", "hook_name_out", "hook_head_index", "hook_layer", "context_size", "prepend_bos",
    "dataset_path", "sae_lens_version", "neuronpedia_id",
)  # fmt: skip
_TENSORS = {
    "standard": (), "topk": (), "abstopk": (), "jumprelu": ("threshold",),
    "gated": ("b_gate", "b_mag", "r_mag"), "transcoder": (), "skip_transcoder": ("W_skip",),
    "jumprelu_transcoder": ("threshold",), "jumprelu_skip_transcoder": ("threshold", "W_skip"),
}  # fmt: skip
_TRAINING = "it is a training class: its codes depend on the batch. Export it with save_inference_model"
_UNREAD = {
    "temporal": "its codes of a token depend on the tokens before it",
    "matching_pursuit": "it encodes by matching pursuit, step by step, not by one product and a rule",
    "batchtopk": _TRAINING,
    "matryoshka_batchtopk": _TRAINING,
}


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    return listing.has(_CONFIG, _WEIGHTS)


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    return canonical(listing.tensors(_WEIGHTS), listing.json(_CONFIG), stated)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as version 6 writes it: flat, with the defaults of the version that wrote it."""
    nested = mapping(config, "metadata")
    flat = {_RENAMED.get(key, key): value for key, value in {**config, **nested}.items() if key != "metadata"}
    if _is_version_6(config):
        return {"apply_b_dec_to_input": True, "normalize_activations": "none", **flat}
    return _upgraded(flat)


def _upgraded(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a flat configuration of before version 6 as version 6 writes it."""
    hook_z = "hook_z" if "hook_z" in str(flat.get("hook_name", "")) else "none"
    old = {"architecture": "standard", "activation_fn": "relu", "apply_b_dec_to_input": True, "prepend_bos": True,
           "normalize_activations": "none", "reshape_activations": hook_z, **flat}  # fmt: skip
    if isinstance(old["normalize_activations"], bool):
        old["normalize_activations"] = "expected_average_only_in" if old["normalize_activations"] else "none"
    function = str(old["activation_fn"])
    if old["architecture"] == "standard" and function.startswith("topk"):
        old["architecture"] = "topk"
        old["k"] = mapping(old, "activation_fn_kwargs").get("k", old.get("k"))
    elif function not in ("relu", "topk") and old["architecture"] == "standard":
        raise FormatError(f"{_CONFIG}: saekit reads the activation functions relu and topk; it is {function!r}.")
    return old


def _is_version_6(config: Mapping[str, Any]) -> bool:
    nested = mapping(config, "metadata")
    version = str(config.get("sae_lens_version") or nested.get("sae_lens_version") or "0")
    major = version.split(".")[0]
    return major.isdigit() and int(major) >= 6


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE of SAELens' tensors.

    ::

        x'    = normalize(x) - b_dec     (apply_b_dec_to_input; none, layer_norm or constant_norm_rescale)
        pre   = x' @ W_enc + b_enc
        codes = relu | topk | abstopk | jumprelu | gated
        x_hat = undo(codes @ W_dec + b_dec [+ x @ W_skip.T])

    With ``rescale_acts_by_decoder_norm`` a TopK code is ``pre * ‖W_dec_i‖`` and the decoder divides by the norm.
    Source: ``sae_lens/saes`` of sae-lens 6.54.12.
    """
    says = settings_of(config)
    architecture = str(says.get("architecture", "standard"))
    if architecture in _UNREAD:
        raise FormatError(
            f"{_CONFIG}: an SAE of architecture `{architecture}` cannot be read: {_UNREAD[architecture]}."
        )
    if architecture not in _TENSORS:
        raise FormatError(f"{_CONFIG}: saekit does not know the architecture `{architecture}` of SAELens.")
    tensors = _without_scaling_factor(tensors, says)
    own = _TENSORS[architecture]
    names = ("W_enc", "W_dec", "b_dec", *(("b_enc",) if architecture != "gated" else ()), *own)
    need(tensors, names, _WEIGHTS)
    only(tensors, names, _WEIGHTS)
    sae = _from_parts(tensors, says, architecture, stated)
    if architecture in ("topk", "abstopk") and says.get("rescale_acts_by_decoder_norm"):
        return sae.fold_norms().replace(rule=sae.rule)  # chosen by the folded pre-activation, not as before the fold
    return sae


def _from_parts(tensors: Mapping[str, Tensor], says: Mapping[str, Any], architecture: str, stated: Stated) -> SAE:
    bias = tensors["b_gate" if architecture == "gated" else "b_enc"]
    n, b_dec = len(bias), tensors["b_dec"]
    is_transcoder = architecture.endswith("transcoder")
    d_in = says.get("d_in") if is_transcoder else len(b_dec)
    if not isinstance(d_in, int):
        d_in = tensors["W_enc"].numel() // n
    agree(_CONFIG, d_in=(says.get("d_in"), d_in), d_sae=(says.get("d_sae"), n),
          d_out=(says.get("d_out") if is_transcoder else None, len(b_dec)))  # fmt: skip
    W_enc = latents_first(tensors["W_enc"], "W_enc", n_latents=n, width=d_in, documented="width_first", stated=stated)
    W_dec = latents_first(
        tensors["W_dec"], "W_dec", n_latents=n, width=len(b_dec), documented="latents_first", stated=stated
    )
    skip = tensors.get("W_skip")
    fields: dict[str, Any] = {
        "b_pre": b_dec if says["apply_b_dec_to_input"] and not is_transcoder else None,
        "W_skip": None if skip is None else skip.T,
        "scaling": _scaling(says),
        "provenance": _place(says, is_transcoder),
    }
    if architecture == "gated":
        sae = freeze_gated(W_gate=W_enc, b_gate=tensors["b_gate"], r_mag=tensors["r_mag"], b_mag=tensors["b_mag"],
                           W_dec=W_dec, b_dec=b_dec, **fields)  # fmt: skip
        return build(sae.W_enc, sae.b_enc, W_dec, b_dec, sae.rule, **fields)
    return build(W_enc, bias, W_dec, b_dec, _rule(tensors, says, architecture, n, stated), **fields)


def _rule(tensors: Mapping[str, Tensor], says: Mapping[str, Any], architecture: str, n: int, stated: Stated) -> Rule:
    if architecture.startswith("jumprelu"):
        return threshold_rule(tensors["threshold"], n)
    if architecture == "topk":
        return topk_rule(says.get("k"), stated, what=_CONFIG)
    if architecture == "abstopk":
        return topk_rule(says.get("k"), stated, what=_CONFIG, sign="magnitude")
    return ReLURule()


def _scaling(says: Mapping[str, Any]) -> Scaling:
    kind = says["normalize_activations"]
    if kind in ("none", None):
        return Scaling()
    if kind == "layer_norm":
        return Scaling("layer_norm", eps=1e-5)
    if kind == "constant_norm_rescale":
        return Scaling("row_norm")
    if kind in ("expected_average_only_in", "constant_scalar_rescale"):
        factor = says.get("activation_normalization_factor") or says.get("norm_scaling_factor")
        if isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0:
            return Scaling("scalar", torch.tensor(float(factor)))
        raise FormatError(
            f"{_CONFIG} says normalize_activations={kind!r}: the rows were multiplied by one factor that is not in "
            "the file. Fold it in with the library that wrote the file, or add `norm_scaling_factor` to the file."
        )
    if kind == "covariance_whitening":
        raise FormatError(
            f"{_CONFIG} says normalize_activations='covariance_whitening': the rows were multiplied by a matrix "
            "that is not folded into the weights. Fold it in with sae-lens, save the SAE, and read that."
        )
    raise FormatError(f"{_CONFIG}: saekit does not know normalize_activations={kind!r}; it must be folded first.")


def _without_scaling_factor(tensors: Mapping[str, Tensor], says: Mapping[str, Any]) -> dict[str, Tensor]:
    """Drop a `scaling_factor` of ones; one that does something would be lost by today's SAELens too."""
    factor = tensors.get("scaling_factor")
    if factor is not None and not bool((factor == 1).all()):
        raise FormatError(
            f"`{_WEIGHTS}` has a `scaling_factor` (finetuning_scaling_factor) that is not 1. Versions of SAELens "
            "disagree on what it multiplies; fold it into W_dec with the version that wrote the file."
        )
    return {name: t for name, t in tensors.items() if name != "scaling_factor"}


def _place(says: Mapping[str, Any], is_transcoder: bool) -> dict[str, Any]:
    known = {key: says[key] for key in _PLACE if says.get(key) is not None}
    return place(
        hook=known.get("hook_name"),
        hook_out=known.get("hook_name_out"),
        model=known.get("model_name"),
        context=known.get("context_size"),
        prepend_bos=known.get("prepend_bos"),
        data=known.get("dataset_path"),
        head=known.get("hook_head_index"),
        library_version=known.get("sae_lens_version"),
        transcoder=is_transcoder or None,
    )
