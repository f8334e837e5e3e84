"""Streamed principal components."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import PCA as Reference

from saekit.errors import ConfigError, DataError, ShapeError
from saekit.measure.accumulators import fvu
from saekit.measure.pca import Covariance


def rows(n: int = 200, d: int = 6) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x @ torch.diag(torch.arange(1.0, d + 1, dtype=torch.float64)) + 30


def fitted(x: torch.Tensor, batch: int = 33) -> Covariance:
    covariance = Covariance(x.shape[1])
    for part in x.split(batch):
        covariance.update(part)
    return covariance


def test_first_component_has_the_largest_variance():
    pca = fitted(rows()).compute()
    projected = (rows() - rows().mean(0)) @ pca.components.double().T
    variances = projected.var(0, unbiased=False)
    assert variances.argmax() == 0
    torch.testing.assert_close(variances, pca.variance, rtol=1e-5, atol=1e-5)


def test_fvu_of_pca_is_one_minus_the_explained_ratio():
    x = rows()
    reference = Reference(n_components=3).fit(x.numpy())
    got = fvu(x, fitted(x).compute(3).reconstruct(x).double())
    assert got == pytest.approx(1 - reference.explained_variance_ratio_.sum(), rel=1e-5)


def test_all_components_reconstruct_and_none_gives_the_mean():
    x = rows()
    assert fvu(x, fitted(x).compute().reconstruct(x)) < 1e-10
    assert fvu(x, fitted(x).compute(0).reconstruct(x)) == pytest.approx(1)
    assert fitted(x).compute().take(2).components.shape == (2, 6)


def test_batching_and_merging_change_nothing():
    x = rows()
    one, a, b = fitted(x, 200), fitted(x[:70], 9), fitted(x[70:], 50)
    a.merge(b)
    a.merge(Covariance(6))
    assert a.n_rows == one.n_rows == 200
    torch.testing.assert_close(a.mean, one.mean)
    torch.testing.assert_close(a.compute().components, one.compute().components)


def test_refusals():
    with pytest.raises(DataError, match="at least 2 rows"):
        Covariance(3).compute()
    with pytest.raises(ConfigError, match="between 0 and the width 6"):
        fitted(rows()).compute(7)
    with pytest.raises(ShapeError, match="rows must have shape"):
        Covariance(3).update(torch.ones(2, 4))
