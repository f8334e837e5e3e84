"""Attribution by gradients and the intervention call speak of one thing: sign and rank agree in the linear limit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from saekit import SAE
from saekit.explanation.attach import attached
from saekit.explanation.edits import Edit
from saekit.inputs.texts import read_texts
from saekit.measure.fidelity import contexts_for, predicted_positions
from saekit.rows.tokens import token_batches
from saekit.sae.rules import ReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.sizes.attribution import attribution
from saekit.sizes.settings import AttributionSettings

N, HOOK, CONTEXT, TOKENS = 24, "layers.1", 24, 200


def _sae(kind: str) -> SAE:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(N, 16, generator=generator, dtype=torch.float64)
    rule = TopKRule(5, sign="magnitude") if kind == "signed" else ReLURule()
    scaling = Scaling("row_norm") if kind == "scaled" else Scaling()
    decoder = torch.randn(N, 16, generator=generator, dtype=torch.float64)
    bias = torch.zeros(N, dtype=torch.float64)
    return SAE(W, bias, decoder, bias[:16], rule, scaling=scaling, provenance={"hook": HOOK})


def _cross_entropy(lm, contexts, sae, edits, keep_error) -> float:
    """Sum over the predicted tokens, in nats."""
    total = 0.0
    for batch in token_batches(lm, contexts):
        predicted = predicted_positions(batch)
        targets = batch.inputs["input_ids"][:, 1:][predicted]
        with (
            torch.no_grad(),
            attached(lm, sae, edits, at=batch.keep, hook=HOOK, keep_error=keep_error, special=True),
        ):
            logits = lm.model(**batch.inputs).logits[:, :-1][predicted]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total


@pytest.mark.parametrize(
    ("model", "kind", "at"),
    [
        ("gpt2", "plain", "activation"),
        ("llama", "signed", "activation"),
        ("neox", "scaled", "activation"),
        ("llama", "plain", "reconstruction"),
    ],
)
def test_attribution_is_ablation_in_the_linear_limit(models, corpus, model, kind, at):
    """What attribution expects of taking a latent away is the slope of taking some of it away, and full ablation agrees
    in sign and rank as far as the model is linear.
    """
    lm, sae, step = models[model], _sae(kind), 1e-3
    lm.model.double()
    try:
        settings = AttributionSettings(at=at, context=CONTEXT)
        found = attribution(sae, lm, corpus, tokens=TOKENS, settings=settings)
        contexts = contexts_for(lm, read_texts(corpus), CONTEXT, TOKENS)

        def cost(latent: int, edit: Edit) -> float:
            return _cross_entropy(lm, contexts, sae, {latent: edit}, at == "activation") / found.n_rows

        fired = torch.nonzero(found.scores["frequency"]).flatten().tolist()
        kept = _cross_entropy(lm, contexts, sae, {}, at == "activation") / found.n_rows
        slope = [(cost(j, Edit.scale(1 - step)) - cost(j, Edit.scale(1 + step))) / (2 * step) for j in fired]
        full = np.array([cost(j, Edit.ablate()) - kept for j in fired])
    finally:
        lm.model.float()
    first = found.scores["cross_entropy"].numpy()[fired]
    assert len(fired) >= 16
    assert slope == pytest.approx(first, rel=1e-2, abs=1e-5)
    assert spearmanr(first, full).statistic > 0.4  # blocks of random weights are far from linear
