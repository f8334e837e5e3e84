"""The numbers of a card are what numpy makes of plain activations, in float64, without a line of the room's code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from saekit import SAE
from saekit.explanation.halves import is_labelling
from saekit.explanation.run import explain
from saekit.explanation.settings import ExplainSettings
from saekit.sae.rules import JumpReLURule, ReLURule, TopKRule

N, WIDTH = 14, 16
RULES = {
    "relu": ReLURule(),
    "jumprelu": JumpReLURule(torch.full((N,), 1.5)),
    "topk": TopKRule(2),
    "signed": TopKRule(2, sign="magnitude"),
}


def _codes(sae: SAE, x: np.ndarray, name: str) -> np.ndarray:
    W, b = sae.W_enc.double().numpy(), sae.b_enc.double().numpy()
    pre = x @ W.T + b
    if name == "relu":
        return np.maximum(pre, 0)
    if name == "jumprelu":
        return np.where(pre > 1.5, pre, 0)
    size = np.abs(pre) if name == "signed" else pre
    kept = size >= np.sort(size, 1)[:, -2:-1]
    return np.where(kept & ((pre > 0) | (name == "signed")), pre, 0)


@pytest.mark.parametrize("name", list(RULES))
def test_a_card_is_what_numpy_says(models, corpus, name):
    lm = models["gpt2"]
    generator = torch.Generator().manual_seed(2)
    W, b, D = (torch.randn(N, n, generator=generator) for n in (WIDTH, 1, WIDTH))
    sae = SAE(W, b[:, 0] / 2, D, torch.zeros(WIDTH), RULES[name], provenance={"hook": "layers.1", "context": 24})
    settings = ExplainSettings(tokens=2000, top=4, sample=10, window=7, neighbours=3, controls=("shuffled",))
    found = explain(sae, lm, corpus, settings=settings, progress=False)
    rows, ids, document = [], [], []
    hooked: list[torch.Tensor] = []
    handle = lm.model.transformer.h[1].register_forward_hook(
        lambda module, args, output: hooked.append((output[0] if isinstance(output, tuple) else output)[0])
    )
    for number, text in enumerate(corpus):
        token = lm.tokenizer(text)["input_ids"]
        with torch.no_grad():
            lm.model(torch.tensor([token]))
        rows.append(hooked.pop().double().numpy())
        ids += token
        document += [number] * len(token)
    handle.remove()
    ids, document, z = np.array(ids), np.array(document), _codes(sae, np.concatenate(rows), name)
    labelling = np.array([is_labelling(d) for d in range(len(corpus))])[document]
    unit = sae.W_dec.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert found.data["tokens"] == len(ids)
    assert found.data["repeated_tokens"] == 0
    assert [card.latent for card in found.cards] == np.flatnonzero((z != 0).any(0)).tolist()
    for card in found.cards:
        _check(card, z, ids, document, labelling, lm)
        cosine = unit @ unit[card.latent]
        cosine[card.latent] = -2
        assert [each["latent"] for each in card.neighbours] == np.argsort(-cosine)[:3].tolist()
        fired = z != 0
        jaccard = {j: (fired[:, card.latent] & fired[:, j]).sum() / (fired[:, card.latent] | fired[:, j]).sum()
                   for j in range(N) if j != card.latent and fired[:, j].any()}  # fmt: skip
        best = sorted((v for v in jaccard.values() if v), reverse=True)[:3]
        assert [each["jaccard"] for each in card.coactive] == pytest.approx(best, abs=1e-4)


def _check(card, z, ids, document, labelling, lm) -> None:
    mine = z[:, card.latent]
    size, fired = np.abs(mine), mine != 0
    values = size[fired]
    assert card.density == pytest.approx(fired.mean())
    assert (card.maximum, card.mean) == pytest.approx((values.max(), values.mean()), rel=1e-5)
    counts = {}
    for v in values:
        low = 2.0 ** (math.floor(math.log2(v) * 4) / 4)
        counts[low] = counts.get(low, 0) + 1
    assert card.histogram == [[pytest.approx(low), n] for low, n in sorted(counts.items())]
    strongest = {int(d): int(np.flatnonzero(document == d)[size[document == d].argmax()]) for d in set(document[fired])}
    tops = sorted(strongest.values(), key=lambda at: -size[at])[:4]
    assert [each.document for each in card.top] == document[tops].tolist()
    assert [each.codes[each.peak] for each in card.top] == pytest.approx(mine[tops], abs=1e-4)
    quantiles = []
    for each in card.sample:
        peak = each.codes[each.peak]
        assert np.abs(mine - peak).min() < 1e-4
        assert each.quantile == pytest.approx((values < abs(peak) - 2e-5).mean(), abs=1e-4)
        quantiles.append(each.quantile)
    assert len(quantiles) == min(10, len(values)) or len(values) < 20
    if len(values) >= 20 and len(np.unique(values.round(3))) > 0.9 * len(values):  # equal codes have one quantile
        assert (np.histogram(quantiles, 5, (0, 1))[0] >= 1).all()
    learned = fired & labelling
    if learned.any():
        mass = np.bincount(ids[learned], size[learned])
        p = mass[mass > 0] / mass.sum()
        effective = size[learned].sum() ** 2 / (size[learned] ** 2).sum()
        assert card.purity == pytest.approx(p.max(), rel=1e-5)
        seen = math.log(len(set(ids[labelling])))
        entropy = min(-(p * np.log(p)).sum() + (len(p) - 1) / (2 * effective), seen)
        assert card.scores["entropy"] == pytest.approx(entropy, rel=1e-4)
    if card.label_kind == "token" and card.detection is not None:
        rate = np.zeros(ids.max() + 1)
        for token in set(ids[learned]):
            here = labelling & (ids == token)
            rate[token] = ((here & fired).sum() + learned.sum() / labelling.sum()) / (here.sum() + 1)
        named = np.argsort(-rate, kind="stable")[:3]
        score = np.where(np.isin(ids, named), rate[ids], 0)
        expected = roc_auc_score(fired[~labelling], score[~labelling])
        assert card.detection == pytest.approx(expected, abs=1e-6)
