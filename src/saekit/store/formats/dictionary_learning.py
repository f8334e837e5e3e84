"""dictionary_learning (saprmarks): ``ae.pt`` and ``config.json`` with ``trainer.dict_class``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.freeze import freeze_gated
from ...sae.model import SAE
from ...sae.rules import ReLURule, Rule
from ..listing import Listing
from .canonical import (
    Layout,
    Stated,
    agree,
    build,
    latents_first,
    mapping,
    need,
    only,
    place,
    threshold_rule,
    topk_rule,
)

NAME, LIBRARY = "dictionary_learning", "dictionary-learning"
_CONFIG, _WEIGHTS = "config.json", "ae.pt"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")
_TENSORS: dict[str, tuple[str, ...]] = {
    "AutoEncoder": ("bias", *_LINEAR),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "GatedAutoEncoder": ("decoder_bias", "r_mag", "gate_bias", "mag_bias", "encoder.weight", "decoder.weight"),
    "JumpReluAutoEncoder": (*_MATRICES, "threshold"),
    "AutoEncoderTopK": ("b_dec", *_LINEAR, "k"),
    "BatchTopKSAE": ("b_dec", *_LINEAR, "k", "threshold"),
    "MatryoshkaBatchTopKSAE": (*_MATRICES, "k", "threshold", "group_sizes"),
}
_OPTIONAL = {"AutoEncoderTopK": ("threshold",), "MatryoshkaBatchTopKSAE": ("k", "group_sizes"), "BatchTopKSAE": ("k",)}


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    return listing.has(_CONFIG) and _weights(listing) is not None and "dict_class" in _trainer(listing.json(_CONFIG))


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = _weights(listing)
    assert name is not None  # `matches` saw it
    return canonical(listing.tensors(name), listing.json(_CONFIG), stated)


def _weights(listing: Listing) -> str | None:
    return _WEIGHTS if listing.has(_WEIGHTS) else None


def _trainer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(config, "trainer")


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE of one of dictionary_learning's classes.

    Activations were scaled to unit mean square in training, and the biases and thresholds scaled back when the file was
    written, so nothing is left to undo. BatchTopK and Matryoshka encode by their threshold; one that was never set
    (-1) would let every positive latent fire, so it is refused unless `k` is stated. Source: ``dictionary.py`` and
    ``trainers/`` of dictionary-learning 0.1.0.
    """
    trainer = _trainer(config)
    kind = str(trainer.get("dict_class"))
    if kind not in _TENSORS:
        raise FormatError(f"{_CONFIG}: saekit does not know dict_class={kind!r}; it reads {', '.join(_TENSORS)}.")
    named = _renamed(tensors, kind)
    optional = _OPTIONAL.get(kind, ())
    need(named, tuple(name for name in _TENSORS[kind] if name not in optional), f"a {kind}")
    only(named, (*_TENSORS[kind], *optional), f"a {kind}")
    width_first = kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
    encoder, decoder = ("W_enc", "W_dec") if width_first else ("encoder.weight", "decoder.weight")
    b_enc = named[{"GatedAutoEncoder": "gate_bias"}.get(kind, "b_enc" if width_first else "encoder.bias")]
    b_dec = named[{"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
                  .get(kind, "b_dec")]  # fmt: skip
    n, d = len(b_enc), len(b_dec)
    agree(_CONFIG, activation_dim=(trainer.get("activation_dim"), d), dict_size=(trainer.get("dict_size"), n))
    layouts: tuple[Layout, Layout] = (
        ("width_first", "latents_first") if width_first else ("latents_first", "width_first")
    )
    W_enc = latents_first(named[encoder], encoder, n_latents=n, width=d, documented=layouts[0], stated=stated)
    W_dec = latents_first(named[decoder], decoder, n_latents=n, width=d, documented=layouts[1], stated=stated)
    b_pre = None if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else b_dec
    if kind == "GatedAutoEncoder":
        sae = freeze_gated(W_gate=W_enc, b_gate=b_enc, r_mag=named["r_mag"], b_mag=named["mag_bias"],
                           W_dec=W_dec, b_dec=b_dec)  # fmt: skip
        W_enc, b_enc, rule = sae.W_enc, sae.b_enc, sae.rule
    else:
        rule = _rule(named, kind, n, stated)
    return build(W_enc, b_enc, W_dec, b_dec, rule, b_pre=b_pre, provenance=_place(trainer, config))


def _renamed(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Return the tensors under the class's own names; some releases call the decoder bias otherwise."""
    named = dict(tensors)
    for wanted in ("b_dec", "bias"):
        if wanted in _TENSORS[kind] and wanted not in named:
            found = next((name for name in ("b_dec", "bias", "decoder_bias") if name in named), None)
            if found is not None:
                named[wanted] = named.pop(found)
    return named


def _rule(named: Mapping[str, Tensor], kind: str, n: int, stated: Stated) -> Rule:
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return ReLURule()
    if kind == "AutoEncoderTopK":
        return topk_rule(named["k"], stated, what=f"a {kind}")
    threshold = named["threshold"]
    if kind != "JumpReluAutoEncoder" and bool((threshold < 0).all()):
        if stated.k is None:
            raise FormatError(
                f"`{_WEIGHTS}`: the threshold of this {kind} was never set ({float(threshold.flatten()[0]):g}), so "
                "every positive latent would fire. State k to keep the k largest of each row: SAE.load(…, k=64)."
            )
        return topk_rule(None, stated, what=f"a {kind}")
    return threshold_rule(threshold, n)


def _place(trainer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    buffer = mapping(config, "buffer")
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    hook = name if "." in name else None if layer is None else f"blocks.{layer}.{_site(name)}"
    return place(hook=hook, model=trainer.get("lm_name"), context=buffer.get("ctx_len"), seed=trainer.get("seed"))


def _site(name: str) -> str:
    """Return SAELens' word for a submodule like ``resid_post_layer_8``."""
    return next((f"hook_{site}" for site in ("resid_post", "resid_pre", "mlp_out", "attn_out") if site in name),
                name or "hook_resid_post")  # fmt: skip
