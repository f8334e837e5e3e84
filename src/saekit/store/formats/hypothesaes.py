"""HypotheSAEs: one ``.pt`` with ``config`` and ``state_dict`` (``input_bias``, ``neuron_bias``); SAEs of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import FormatError
from ...sae.model import SAE
from ...sae.rules import Rule
from ..listing import Listing, tensors_in
from .canonical import Stated, agree, build, latents_first, need, only, place, threshold_rule, topk_rule
from .single_file import only_pickled

NAME, LIBRARY = "hypothesaes", "hypothesaes"
_NAMES = ("encoder.weight", "decoder.weight", "input_bias", "neuron_bias")


def matches(listing: Listing) -> bool:
    """Return whether the files are those of this format."""
    name = only_pickled(listing)
    return name is not None and {"state_dict.input_bias", "state_dict.neuron_bias"} <= listing.shapes(name).keys()


def read(listing: Listing, stated: Stated) -> SAE:
    """Return the SAE."""
    name = only_pickled(listing)
    assert name is not None  # `matches` saw it
    stored = listing.stored(name)
    config = stored.get("config")
    if not isinstance(config, Mapping):
        raise FormatError("the file must hold `config` beside `state_dict`; it does not.")
    return canonical(tensors_in(stored["state_dict"]), config, stated)


def canonical(tensors: Mapping[str, Tensor], config: Mapping[str, Any], stated: Stated) -> SAE:
    """Return the SAE: TopK, or the threshold of BatchTopK.

    ::

        pre   = (x - input_bias) @ encoder.weight.T + neuron_bias
        x_hat = codes @ decoder.weight.T + input_bias

    Source: ``sae.py`` of hypothesaes 2.0.1.
    """
    need(tensors, _NAMES, "the file")
    only(tensors, (*_NAMES, "threshold", "steps_since_activation"), "the file")
    b_enc, b_dec = tensors["neuron_bias"], tensors["input_bias"]
    n, d = len(b_enc), len(b_dec)
    agree("config", input_dim=(config.get("input_dim"), d), m_total_neurons=(config.get("m_total_neurons"), n))
    return build(
        latents_first(tensors["encoder.weight"], "encoder.weight", n_latents=n, width=d,
                      documented="latents_first", stated=stated),
        b_enc,
        latents_first(tensors["decoder.weight"], "decoder.weight", n_latents=n, width=d,
                      documented="width_first", stated=stated),
        b_dec,
        _rule(tensors, config, n, stated),
        b_pre=b_dec,
        provenance=place(),
    )  # fmt: skip


def _rule(tensors: Mapping[str, Tensor], config: Mapping[str, Any], n: int, stated: Stated) -> Rule:
    if not config.get("use_batch_topk"):
        return topk_rule(config.get("k_active_neurons"), stated, what="config")
    if "threshold" not in tensors:
        raise FormatError("the file says use_batch_topk and has no `threshold`: its codes would depend on the batch.")
    return threshold_rule(tensors["threshold"], n)
