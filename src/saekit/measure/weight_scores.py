"""Scores of latents that need no rows: the weights alone say how stable a latent will be."""

from __future__ import annotations

from torch import Tensor

from ..sae.model import SAE

WEIGHT_SCORES = {
    "alignment_self": "cosine of the latent's encoder row and decoder row",
    "encoder_norm": "||encoder row|| * ||decoder row||: its encoder's length with decoder rows of length 1",
}
"""Scores by name, with their formula. Latents that read what they write are found again by other seeds more often;
every comparison states how well that holds (`Comparison.predictors`)."""


def weight_scores(sae: SAE) -> dict[str, Tensor]:
    """Return the scores that the weights of an SAE give, by name: ``float64 [n_latents]``.

    A transcoder, which reads one space and writes another, has no `alignment_self`. The cosine with a row of length 0
    is 0.

    >>> import torch
    >>> from saekit.sae.rules import ReLURule
    >>> one = torch.eye(2)
    >>> sae = SAE(W_enc=torch.tensor([[2.0, 0], [3, 4]]), b_enc=one[0], W_dec=one, b_dec=one[0], rule=ReLURule())
    >>> {name: score.tolist() for name, score in weight_scores(sae).items()}
    {'alignment_self': [1.0, 0.8], 'encoder_norm': [2.0, 5.0]}
    """
    encoder, decoder = (W.detach().double().cpu() for W in (sae.W_enc, sae.W_dec))
    norms = encoder.norm(dim=1) * decoder.norm(dim=1)
    scores = {"encoder_norm": norms}
    if not sae.is_transcoder:
        scores["alignment_self"] = (encoder * decoder).sum(1) / norms.clamp_min(1e-300)
    return {name: scores[name] for name in WEIGHT_SCORES if name in scores}
