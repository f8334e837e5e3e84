"""Scores of latents from weights alone, and where they can be used."""

from __future__ import annotations

import pytest
import torch

from saekit import rank
from saekit.errors import ConfigError
from saekit.measure.weight_scores import WEIGHT_SCORES, weight_scores
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule


def _sae(d_out: int = 5, **provenance) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(12, 5, generator=generator), torch.randn(12, d_out, generator=generator)
    return SAE(
        W_enc=W_enc, b_enc=torch.zeros(12), W_dec=W_dec, b_dec=torch.zeros(d_out), rule=ReLURule(),
        provenance=provenance,
    )  # fmt: skip


def test_they_do_not_depend_on_how_lengths_are_shared_between_encoder_and_decoder():
    sae = _sae()
    found, folded = weight_scores(sae), weight_scores(sae.fold_norms())
    for name in WEIGHT_SCORES:
        assert torch.allclose(found[name], folded[name], atol=1e-6)
    assert torch.allclose(found["alignment_self"].float(), torch.cosine_similarity(sae.W_enc, sae.W_dec), atol=1e-6)
    dead = sae.replace(W_enc=torch.zeros_like(sae.W_enc))
    assert weight_scores(dead)["alignment_self"].tolist() == [0] * 12


@pytest.mark.parametrize("by", list(WEIGHT_SCORES))
def test_rank_needs_no_rows(by):
    sae = _sae()
    ranked = rank(sae, by=by)
    assert torch.equal(ranked.scores[by], weight_scores(sae)[by].float().sort(descending=True).values)
    assert torch.allclose(weight_scores(ranked)[by].float(), ranked.scores[by])
    assert ranked.provenance["ranking"]["formula"] == WEIGHT_SCORES[by]


def test_a_transcoder_has_no_alignment():
    for transcoder in (_sae(d_out=4), _sae(hook="layers.1.mlp.input", hook_out="layers.1.mlp")):
        assert set(weight_scores(transcoder)) == {"encoder_norm"}
        with pytest.raises(ConfigError, match=r"rank: `alignment_self` compares what a latent reads.*transcoder"):
            rank(transcoder, by="alignment_self")
        rank(transcoder, by="encoder_norm")
