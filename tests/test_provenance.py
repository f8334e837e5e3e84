"""The hook that an SAE belongs to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saekit import SAE
from saekit.errors import ConfigError
from saekit.provenance import known_place, place_of
from saekit.sae.rules import ReLURule


def sae_with(**provenance: Any) -> SAE:
    weights = torch.eye(2)
    zeros = torch.zeros(2)
    return SAE(W_enc=weights, W_dec=weights, b_enc=zeros, b_dec=zeros, rule=ReLURule(), provenance=provenance)


def test_provenance_names_a_hook_or_a_layer_or_nothing() -> None:
    assert known_place(sae_with(hook="layers.3.mlp", layer=3)) == "layers.3.mlp"
    assert known_place(sae_with(layer=0)) == "layers.0"
    assert known_place({"hook": "embed", "layer": None}) == "embed"
    assert known_place(sae_with()) is None
    assert known_place(None) is None


def test_what_is_given_overrides_the_provenance() -> None:
    sae = sae_with(hook="layers.3")
    assert place_of(sae) == "layers.3"
    assert place_of(sae, layer=1) == "layers.1"
    assert place_of(sae, hook="embed") == "embed"


def test_the_first_origin_that_names_a_hook_decides() -> None:
    assert place_of(sae_with(), {"hook": "layers.2"}) == "layers.2"
    assert place_of(sae_with(layer=1), {"hook": "layers.2"}) == "layers.1"


@pytest.mark.parametrize(
    ("origins", "given", "message"),
    [
        ((), {"layer": 1, "hook": "a"}, "compare: at most one of `layer` and `hook` may be given; got layer=1"),
        ((), {}, "compare: `layer` or `hook` must say where the rows come from; got neither. Give layer=2, say."),
        ((sae_with(),), {}, "got neither, and `x` does not say where in the model it belongs. Give layer=2, say."),
        ((), {"layer": True}, "`layer` must be a whole number, 0 for the first block; got True"),
        ((), {"layer": "1"}, "`layer` must be a whole number, 0 for the first block; got '1'"),
    ],
)  # fmt: skip
def test_a_hook_that_is_not_known_or_named_twice_is_refused(origins: Any, given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        place_of(*origins, **given, where="compare", name="`x`")
    assert message in str(caught.value)
