"""A true SAE fits; each way to misread one is found out, and named."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch

import saekit as sk
from saekit.errors import ConfigError, ShapeError
from saekit.evaluation.verification import Verification, verify
from saekit.inputs.texts import read_texts
from saekit.rows.first_use import L0_FACTOR
from saekit.sae.scaling import Scaling

TOKENS = 500


@pytest.fixture(scope="module")
def lm():
    return sk.load_model("builtin")


@pytest.fixture(scope="module")
def texts():
    return list(islice(read_texts("builtin"), 60))


@pytest.fixture(scope="module")
def sae(lm, texts):
    """Square, so that its matrices can be taken the wrong way round."""
    rows = sk.capture(lm, texts, layer=2, progress=False)
    return sk.train(sk.TopK(n_latents=192, k=12), rows, tokens=60_000, progress=False)[0]


@pytest.fixture
def found(lm, texts):
    def verified(sae, **where):
        return verify(sae, lm, texts, tokens=TOKENS, progress=False, **where)

    return verified


def test_true_sae_fits(sae, found):
    result = found(sae)
    assert result.fits
    assert result.hook == "layers.2"
    assert result.likely_causes == result.warnings == []
    assert result.claimed == {"l0": 12.0}
    assert result.fvu.value < 1
    assert "at least 40 documents" in result.fvu.reason
    assert Verification.from_json(json.loads(json.dumps(result.to_json()))).to_json() == result.to_json()
    assert "fits at layers.2" in repr(result)


WRONG = {
    "the encoder transposed": lambda sae: sae.replace(W_enc=sae.W_enc.T.contiguous()),
    "the decoder transposed": lambda sae: sae.replace(W_dec=sae.W_dec.T.contiguous()),
    "encoder and decoder transposed": lambda sae: sae.replace(
        W_enc=sae.W_enc.T.contiguous(), W_dec=sae.W_dec.T.contiguous()
    ),
    "rows scaled to a mean norm of sqrt(d)": lambda sae: sae.replace(scaling=Scaling()),
    "decoder rows of length 1": lambda sae: sae.replace(W_dec=sae.W_dec * torch.linspace(0.1, 3, 192)[:, None]),
    "nothing subtracted before the encoder": lambda sae: sae.replace(b_pre=sae.b_pre + 3.0, b_enc=sae.b_enc),
    "rows of layers.2 instead of layers.1": lambda sae: sae.replace(
        provenance={**sae.provenance, "hook": "layers.1", "layer": 1}
    ),
    "rows of layers.2 instead of layers.0.mlp": lambda sae: sae.replace(
        provenance={**sae.provenance, "hook": "layers.0.mlp", "layer": 0}
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_misreadings_are_named(what, sae, found):
    result = found(WRONG[what](sae))
    assert not result.fits
    assert result.warnings
    assert what.split(",")[0] in " · ".join(cause.what for cause in result.likely_causes)
    assert result.likely_causes[0].fvu < 0.9 * result.fvu.value


def test_sae_that_states_no_place_is_tried_everywhere(sae, found):
    result = found(sae.replace(provenance={}))
    assert result.fits
    assert result.hook == "layers.2"
    assert [warning.code for warning in result.warnings] == ["place_not_stated"]


def test_claim_that_is_off_is_a_warning(sae, found):
    claims = {"claimed": {"l0": 12 * L0_FACTOR * 1.1}}
    result = found(sae.replace(provenance={**sae.provenance, **claims}))
    assert not result.fits
    assert [warning.code for warning in result.warnings] == ["l0_off"]


def test_sae_of_another_width_or_a_transcoder_without_a_place_is_refused(found):
    W = torch.ones(32, 12)
    sae = sk.SAE(W, torch.zeros(32), W, torch.zeros(12), sk.sae.rules.ReLURule())
    with pytest.raises(ConfigError, match="rows of width 12, and no layer"):
        found(sae)
    with pytest.raises(ShapeError, match="must have width 12; they have 192"):
        found(sae, layer=1)
    with pytest.raises(ConfigError, match="`target` must say which rows the SAE predicts"):
        found(sae.replace(provenance={"transcoder": True}), layer=1)
    with pytest.raises(ConfigError, match="must say which rows a transcoder reads"):
        found(sae.replace(provenance={"hook_out": "layers.1.mlp"}))
