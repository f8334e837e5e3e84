"""Against a known dictionary: the dictionary itself scores 1, a random one about chance, the formulas by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import f1_score

from saekit import evaluate
from saekit.errors import ConfigError
from saekit.evaluation.result import Evaluation
from saekit.evaluation.settings import EvaluationSettings
from saekit.evaluation.truth import TRUTH, _best_threshold, against_truth, probe_f1
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.model import SAE
from saekit.sae.rules import JumpReLURule, TopKRule

ROWS = SyntheticRows(d_in=64, n_features=48, l0=3, parting=200, noise=0.0, n_rows=4096)


def sae_of(W, threshold=None, k=4):
    n, d = W.shape
    rule = TopKRule(k) if threshold is None else JumpReLURule(torch.full((n,), threshold))
    return SAE(W_enc=W, b_enc=torch.zeros(n), W_dec=W, b_dec=torch.zeros(d), rule=rule)


def test_the_dictionary_itself_finds_everything():
    order = torch.arange(47, -1, -1)
    found = against_truth(sae_of(ROWS.dictionary[order], threshold=0.4), ROWS)
    assert set(found) == set(TRUTH) - {"absorbed"}  # which needs trees
    assert found["mcc"].value == pytest.approx(1, abs=1e-6)
    assert found["recovered"].value == found["unique"].value == 1
    assert found["f1"].value == pytest.approx(found["f1_matched"].value)
    assert found["f1"].value > 0.95
    assert found["f1_probe"].value > 0.95
    assert found["f1_ceiling"].value > 0.99


def test_directions_of_signed_codes_may_point_either_way():
    signs = torch.tensor([1.0, -1.0] * 24)[:, None]
    turned = sae_of(signs * ROWS.dictionary)
    assert against_truth(turned, ROWS)["mcc"].value < 0.8
    found = against_truth(turned.replace(rule=TopKRule(4, sign="magnitude")), ROWS)
    assert found["mcc"].value == pytest.approx(1, abs=1e-6)


def test_formulas_by_hand():
    W = torch.nn.functional.normalize(torch.randn(60, 64, generator=torch.Generator().manual_seed(1)))
    W[:20] = ROWS.dictionary[20:40]
    W[20] = -ROWS.dictionary[0]
    sae = sae_of(W, k=6)
    found = against_truth(sae, ROWS)
    cosine = W @ ROWS.dictionary.T
    latent, feature = linear_sum_assignment(cosine.numpy(), maximize=True)
    assert found["mcc"].value == pytest.approx(float(cosine[latent, feature].mean()), abs=1e-5)
    assert found["recovered"].value == pytest.approx(float((cosine[latent, feature] > 0.8).sum()) / 48)
    codes = sae.encode(ROWS.rows(0, 4096)).to_dense() != 0
    truth = ROWS.codes(0, 4096) > 0
    closest = cosine.abs().argmax(1)
    alive = codes.any(0)
    f1 = [f1_score(truth[:, closest[j]], codes[:, j]) for j in range(60) if alive[j]]
    assert found["f1"].value == pytest.approx(np.mean(f1), abs=1e-6)
    assert found["unique"].value == pytest.approx(len(set(closest[alive].tolist())) / int(alive.sum()))
    partner = dict(zip(feature.tolist(), latent.tolist(), strict=True))
    matched = [f1_score(truth[:, i], codes[:, partner[i]]) for i in range(48) if truth[:, i].any()]
    assert found["f1_matched"].value == pytest.approx(np.mean(matched), abs=1e-6)


def test_the_threshold_of_the_probe_is_the_best_one():
    scores, labels = np.array([0.1, 0.9, 0.4, 0.7]), np.array([0.0, 1, 0, 1])
    assert 0.4 < _best_threshold(scores, labels) < 0.7
    assert _best_threshold(scores, np.ones(4)) < 0.1
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    fires = torch.rand(2000, 3, generator=torch.Generator().manual_seed(1)) < 0.1
    assert probe_f1(noise, fires).value < 0.3  # rows that say nothing
    assert np.isnan(probe_f1(noise, torch.zeros(2000, 3, dtype=torch.bool)).value)


def test_the_ceiling_is_what_the_true_dictionary_reaches_where_features_interfere():
    rows = SyntheticRows(d_in=24, n_features=64, l0=4, noise=0.0, n_rows=1024)
    found = against_truth(sae_of(rows.dictionary, threshold=0.4), rows)
    assert max(found["f1_probe"].value, found["f1"].value) < 0.7
    assert found["f1_ceiling"].value > 0.9


def test_a_parent_whose_latent_is_silent_with_its_children_is_absorbed():
    rows = SyntheticRows(
        d_in=64, n_features=32, l0=3, power=1.0, trees=4, branching=2, depth=2, parting=200, n_rows=2048
    )
    plain = sae_of(rows.dictionary, threshold=0.3)
    assert against_truth(plain, rows)["absorbed"].value == pytest.approx(0, abs=0.1)
    # the parent's latent is told to stay silent where a child's direction is there, which writes the parent as well
    W_enc = rows.dictionary.clone()
    for child in (rows.parent >= 0).nonzero().flatten().tolist():
        W_enc[rows.parent[child]] -= 5 * rows.dictionary[child]
    found = against_truth(plain.replace(W_enc=W_enc), rows)["absorbed"]
    assert found.value > 0.6
    lost = plain.replace(W_dec=torch.eye(64)[:32])
    assert np.isnan(against_truth(lost, rows)["absorbed"].value)


def test_in_an_evaluation_and_its_file(tmp_path):
    settings = EvaluationSettings(truth=True, controls=False)
    result = evaluate([sae_of(ROWS.dictionary), sae_of(ROWS.dictionary[:40])], ROWS, settings=settings)
    assert result.entries[0].truth == against_truth(sae_of(ROWS.dictionary), ROWS)
    assert result.truth_table()[0] == ["known dictionary", *(name for name in TRUTH if name != "absorbed")]
    assert result.entries[1].truth["recovered"].value == pytest.approx(40 / 48)
    result.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == result
    assert evaluate(sae_of(ROWS.dictionary), ROWS, settings=EvaluationSettings(controls=False)).truth_table() == []


def test_rows_without_a_dictionary_are_refused():
    with pytest.raises(ConfigError, match=r"evaluate: `truth` needs rows with a known dictionary.*--rows synthetic:"):
        evaluate(sae_of(ROWS.dictionary), ROWS.rows(0, 100), settings=EvaluationSettings(truth=True))
