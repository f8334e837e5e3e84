"""Matching pursuit on an SAE's decoder: against scikit-learn and plain loops, and where the encoder is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp

from saekit import evaluate
from saekit.errors import ConfigError
from saekit.evaluation import pursuit
from saekit.evaluation.pursuit import PURSUIT, against_pursuit, pursue
from saekit.evaluation.result import Evaluation
from saekit.evaluation.settings import EvaluationSettings
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sae.scaling import Scaling


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sae_of(W: torch.Tensor, k: int, sign: str = "positive", **parts) -> SAE:
    n, d = W.shape
    return SAE(
        W_enc=W, b_enc=torch.zeros(n), W_dec=W, b_dec=parts.pop("b_dec", torch.zeros(d)),
        rule=TopKRule(k, sign=sign), **parts,
    )  # fmt: skip


def test_signed_codes_are_those_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(pursuit, "GATHERED_NUMBERS", 700)  # several blocks
    W, x = randn(40, 12), randn(30, 12, seed=1)
    found = pursue(sae_of(W, 4, sign="magnitude"), x, torch.full((30,), 4)).to_dense()
    unit = (W / W.norm(dim=1, keepdim=True)).double().numpy()
    expected = orthogonal_mp(unit.T, x.double().numpy().T, n_nonzero_coefs=4).T / W.norm(dim=1).numpy()
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)


def test_of_orthogonal_atoms_it_takes_the_largest_positive_products():
    W = torch.linalg.qr(randn(12, 12))[0] * 2
    x = randn(50, 12, seed=1)
    wanted = torch.arange(50) % 5
    found = pursue(sae_of(W, 4), x, wanted).to_dense()
    products = (x @ W.T / 4).relu()
    for row in range(50):
        top = products[row].topk(int(wanted[row])).indices
        expected = torch.zeros(12)
        expected[top] = products[row, top]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-4)


def test_codes_are_not_negative_and_never_more_than_wanted():
    codes = pursue(sae_of(randn(60, 10), 5), randn(80, 10, seed=1), torch.full((80,), 5))
    assert (codes.values > 0).all()
    assert int(codes.offsets.diff().max()) <= 5
    nothing = pursue(sae_of(randn(60, 10), 5), randn(3, 10), torch.zeros(3, dtype=torch.int64))
    assert len(nothing.values) == 0


def test_sizes_below_0_are_dropped_and_the_others_fitted_once_more():
    atoms = torch.nn.functional.normalize(randn(200, 3, 6), dim=2)
    u, used = randn(200, 6, seed=1), torch.ones(200, 3, dtype=torch.bool)
    found = pursuit._fitted(u, atoms, used, signed=False)
    for row in range(200):
        first = np.linalg.lstsq(atoms[row].T.numpy(), u[row].numpy(), rcond=None)[0]
        kept = np.flatnonzero(first > 0)
        expected = np.zeros(3)
        expected[kept] = np.linalg.lstsq(atoms[row][kept].T.numpy(), u[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[row].numpy(), expected.clip(0), atol=1e-3)


def test_bias_and_scale_count():
    W, shift = torch.linalg.qr(randn(12, 12))[0], randn(12, seed=5)
    sae = sae_of(W, 3, b_dec=shift, b_pre=shift, scaling=Scaling("scalar", scale=torch.tensor(2.0)))
    x = randn(40, 12, seed=2)
    found = pursue(sae, x, torch.full((40,), 3))
    own = sae.encode(x)  # its atoms are orthonormal: nothing is better
    torch.testing.assert_close(found.to_dense(), own.to_dense(), atol=1e-5, rtol=1e-4)
    result = against_pursuit(sae, ArrayRows(x), 40)
    assert set(result) == set(PURSUIT)
    assert result["jaccard"].value == 1
    assert result["code_r2"].value == pytest.approx(1)
    assert result["fvu_gap"].value == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("n", [39, 40])
def test_there_is_an_interval_from_forty_documents_on(n):
    sae, x = sae_of(randn(48, 24), 3), randn(80, 24, seed=1)
    result = against_pursuit(sae, ArrayRows(x, document=torch.arange(80) % n), 80)
    for name in ("fvu_encoder", "fvu_pursuit", "fvu_gap", "jaccard"):
        assert (result[name].low is not None) == (n == 40), name
        assert n == 40 or "at least 40 documents" in result[name].reason


def test_a_poor_encoder_is_told_from_a_poor_dictionary(tmp_path):
    W = torch.nn.functional.normalize(randn(48, 24))
    z = randn(3000, 48, seed=1).relu() * (torch.rand(3000, 48, generator=torch.Generator().manual_seed(2)) < 0.06)
    rows = ArrayRows(z @ W)
    good, poor = sae_of(W, 3), sae_of(W, 3).replace(W_enc=W + 0.3 * randn(48, 24, seed=3))
    result = evaluate([good, poor], rows, settings=EvaluationSettings(pursuit_rows=1500, controls=False))
    one, other = (entry.pursuit for entry in result.entries)
    assert other["fvu_gap"].value > one["fvu_gap"].value > 0
    assert other["jaccard"].value < one["jaccard"].value < 1
    assert other["fvu_gap"].low > 0
    assert result.pursuit_table()[0][0] == "matching pursuit"
    result.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == result
    with pytest.raises(ConfigError, match="has a skip path"):
        evaluate(good.replace(W_skip=torch.zeros(24, 24)), rows, settings=EvaluationSettings(pursuit_rows=100))
    with pytest.raises(ConfigError, match="`pursuit_rows`"):
        EvaluationSettings(pursuit_rows=-1)
