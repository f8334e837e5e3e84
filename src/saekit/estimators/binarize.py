"""Binarize codes for scikit-learn: 1 where a latent is above a threshold."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from ..errors import ConfigError, did_you_mean
from ..settings import suggest_keywords
from .select import _entries

# ------------------------------------------------------------------------------------------------------- binarization


@suggest_keywords
class Binarize(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """1 where a feature is above its threshold, else 0; sparse in, sparse out.

    ::

        relative None:        t_j = threshold
        relative "max":       t_j = threshold · max_i x_ij          over the rows of fit
        relative "quantile":  t_j = quantile_threshold {x_ij > 0}   over the rows of fit, linear interpolation

    With `relative`, a column that has a negative value in the rows of fit (latents selected by magnitude have) is
    taken by its size: both the threshold and the comparison are of ``|x_ij|``. Else negative values are never 1.

    Parameters
    ----------
    threshold
        A number in the units of the features, or a fraction of 0 to 1 with `relative`.
    compare
        ``">"`` or ``">="``. The two differ for counts: published rules are ``x > 1`` and ``x >= 1``.
    relative
        Fit one threshold per column, which does not depend on the scale of the SAE: None, ``"max"`` or ``"quantile"``.
        A column that is 0 in all rows of fit is 0 everywhere.

    Attributes
    ----------
    thresholds_ : ndarray ``[n_features]``
        Threshold of each column.
    by_magnitude_ : ndarray ``bool [n_features]``
        Whether the column is compared by its size.

    Raises
    ------
    ConfigError
        A setting is out of range, or zeros would become ones (which would fill a sparse matrix).
    """

    def __init__(self, threshold: float = 1.0, *, compare: str = ">", relative: str | None = None) -> None:
        self.threshold = threshold
        self.compare = compare
        self.relative = relative

    def fit(self, X: Any, y: Any = None) -> Binarize:
        """Find the thresholds from the rows of `X`; `y` is not used."""
        self._check()
        X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32])
        self.by_magnitude_ = np.zeros(X.shape[1], dtype=bool)
        if self.relative is None:
            self.thresholds_ = np.full(X.shape[1], float(self.threshold))
            return self
        column, value, _ = _entries(X)
        self.by_magnitude_[column[value < 0]] = True
        column, value = column[value != 0], np.abs(value[value != 0])
        self.thresholds_ = np.full(X.shape[1], np.inf)
        if self.relative == "max":
            largest = np.zeros(X.shape[1])
            np.maximum.at(largest, column, value)
            fired = largest > 0
            self.thresholds_[fired] = self.threshold * largest[fired]
        else:
            order = np.lexsort((value, column))
            value = value[order]
            count = np.bincount(column, minlength=X.shape[1])
            fired = count > 0
            at = (np.cumsum(count) - count)[fired] + (count[fired] - 1) * float(self.threshold)
            low, high = value[np.floor(at).astype(np.int64)], value[np.ceil(at).astype(np.int64)]
            self.thresholds_[fired] = low + (high - low) * (at - np.floor(at))
        return self

    def transform(self, X: Any) -> Any:
        """Return zeros and ones in the dtype of `X`; CSR without stored zeros when `X` is sparse."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr"], dtype=[np.float64, np.float32], reset=False)
        above = np.greater if self.compare == ">" else np.greater_equal
        by_magnitude = getattr(self, "by_magnitude_", np.zeros(X.shape[1], dtype=bool))  # older files have none
        if not scipy.sparse.issparse(X):
            return above(np.where(by_magnitude, np.abs(X), X), self.thresholds_[None, :]).astype(X.dtype)
        value = np.where(by_magnitude[X.indices], np.abs(X.data), X.data)
        kept = above(value, self.thresholds_[X.indices])
        ends = np.concatenate([[0], np.cumsum(kept)])
        arrays = (np.ones(int(ends[-1]), X.dtype), X.indices[kept], ends[X.indptr].astype(X.indptr.dtype))
        return type(X)(arrays, shape=X.shape)

    def _check(self) -> None:
        if self.compare not in (">", ">="):
            raise ConfigError(f"Binarize: `compare` must be `>` or `>=`; got {self.compare!r}.")
        if self.relative not in (None, "max", "quantile"):
            raise ConfigError(
                f"Binarize: `relative` must be None, `max` or `quantile`; got {self.relative!r}. "
                f"{did_you_mean(str(self.relative), ['max', 'quantile'])}"
            )
        t = self.threshold
        if isinstance(t, bool) or not isinstance(t, int | float | np.number) or not np.isfinite(t):
            raise ConfigError(f"Binarize: `threshold` must be a finite number; got {t!r}.")
        if self.relative is not None and not 0 <= t <= 1:
            raise ConfigError(
                f"Binarize: with relative={self.relative!r}, `threshold` must be a fraction of 0 to 1; got {t!r}."
            )
        if self.relative is not None and t == 1 and self.compare == ">":
            raise ConfigError(
                f"Binarize: with relative={self.relative!r} and compare='>', `threshold` must be below 1, or nothing "
                "in the rows of fit is above it; got 1. Give a fraction such as 0.2."
            )
        fills = t < 0 or (t == 0 and self.compare == ">=" and self.relative != "quantile")
        if fills:
            raise ConfigError(
                f"Binarize: zeros must stay zeros, or a sparse matrix would fill up; `0 {self.compare} {t!r}` is true. "
                "Give a positive threshold, or compare='>' with 0."
            )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
