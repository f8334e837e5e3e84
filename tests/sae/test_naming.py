"""What tables call SAEs, and which can be measured together."""

from __future__ import annotations

import math

import pytest
import torch

from saekit.errors import ConfigError, DataError, ShapeError
from saekit.sae.model import SAE
from saekit.sae.naming import as_sae, common_width, name_of, named_saes, shape_of
from saekit.sae.rules import ReLURule, TopKRule


def sae_of(n: int = 6, d: int = 4, rule=None, **provenance) -> SAE:
    W = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    return SAE(
        W_enc=W, b_enc=torch.zeros(n), W_dec=W, b_dec=torch.zeros(d), rule=rule or TopKRule(2), provenance=provenance
    )


@pytest.mark.parametrize(
    ("sae", "name"),
    [
        (sae_of(), "topk-6-k2"),
        (sae_of(rule=ReLURule()), "relu-6"),
        (sae_of(seed=0, config={"arch": "batchtopk", "k": 8}), "batchtopk-6-k8-seed0"),
        (sae_of(seed=1, rows_seen=0), "topk-6-k2-untrained-seed1"),
        (sae_of(config={"control": "frozen-decoder"}), "topk-6-k2-frozen-decoder"),
        (sae_of(consensus={"of": []}), "topk-6-k2-consensus"),
        (sae_of(config="unreadable"), "topk-6-k2"),
    ],
)
def test_names_say_what_is_known(sae, name):
    assert name_of(sae) == name


def test_names_are_unique_and_paths_are_called_by_their_folder(tmp_path):
    sae_of().save(tmp_path / "mine")
    named = named_saes([sae_of(), sae_of(), tmp_path / "mine", str(tmp_path / "mine")], "here")
    assert [name for name, _ in named] == ["topk-6-k2", "topk-6-k2 (2)", "mine", "mine (2)"]
    assert named_saes(sae_of(), "here")[0][0] == "topk-6-k2"
    assert torch.equal(as_sae(tmp_path / "mine").W_dec, sae_of().W_dec)
    with pytest.raises(ConfigError, match="here: at least one SAE must be given"):
        named_saes([], "here")


def test_saes_that_cannot_be_measured_together_are_refused():
    assert common_width([("a", sae_of()), ("b", sae_of(9))], "here") == 4
    with pytest.raises(ShapeError, match="here: all SAEs must have one width; `b` has 5, others 4"):
        common_width([("a", sae_of()), ("b", sae_of(6, 5))], "here")
    transcoder = sae_of().replace(W_dec=torch.ones(6, 3), b_dec=torch.zeros(3))
    with pytest.raises(ShapeError, match="it maps 4 to 3"):
        common_width([("a", transcoder)], "here")
    with pytest.raises(DataError, match="`b_dec` holds NaN"):
        common_width([("a", sae_of().replace(b_dec=torch.full((4,), math.nan)))], "here")


def test_the_shape_is_plain():
    assert shape_of(sae_of()) == {"n_latents": 6, "d_in": 4, "rule": {"name": "topk", "k": 2}}
