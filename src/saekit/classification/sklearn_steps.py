"""scikit-learn steps that only arms of a classification need."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.feature_selection import SelectorMixin
from sklearn.utils.validation import check_is_fitted, validate_data


class DensityMatched(SelectorMixin, BaseEstimator):
    """Random columns that are active in as many rows as the k best ones: the baseline of a selection.

    Parameters
    ----------
    k
        Columns to keep.
    by, scores
        How the best are ranked, as in `SelectLatents`.
    seed
        Random seed of the choice.
    """

    def __init__(self, k: int = 16, *, by: str = "mean_difference", scores: Any = None, seed: int = 0) -> None:
        self.k = k
        self.by = by
        self.scores = scores
        self.seed = seed

    def fit(self, X: Any, y: Any) -> DensityMatched:
        """Rank the columns, then draw a partner for each of the k best among the others."""
        import scipy.sparse

        from ..estimators.select import SelectLatents

        X = validate_data(self, X, accept_sparse="csr")
        best = SelectLatents(self.k, scoring=self.by, scores=self.scores, random_state=self.seed).fit(X, y)
        chosen = np.flatnonzero(best.get_support())
        fires = np.asarray(np.diff(X.tocsc().indptr) if scipy.sparse.issparse(X) else (X != 0).sum(0), dtype=float)
        self.support_ = np.zeros(X.shape[1], bool)
        self.support_[density_partners(fires, chosen, seed=self.seed)] = True
        return self

    def _get_support_mask(self) -> np.ndarray:
        check_is_fitted(self, "support_")
        return self.support_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.target_tags.required = True
        return tags


def density_partners(density: np.ndarray, chosen: np.ndarray, *, seed: int = 0, near: int = 8) -> np.ndarray:
    """For each chosen column another one, not chosen and not used twice, of nearly its density.

    Parameters
    ----------
    density
        How often each column is active, ``[n_columns]``.
    chosen
        Columns to find partners for.
    seed
        Random seed of the choice among the `near` columns that are nearest in density.

    Returns
    -------
    numpy.ndarray
        One partner for each, in the order of `chosen`; fewer where the columns run out.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    free = np.ones(len(density), bool)
    free[chosen] = False
    partners = []
    for column in np.asarray(chosen):
        others = np.flatnonzero(free)
        if not len(others):
            break
        gap = np.abs(density[others] - density[column])
        nearest = others[np.argsort(gap, kind="stable")[:near]]
        partner = int(generator.choice(nearest))
        free[partner] = False
        partners.append(partner)
    return np.array(partners, np.int64)


class MeanDifference(TransformerMixin, BaseEstimator):
    """Rows projected on the difference of class means: one direction for two classes, else one against the rest each.

    Attributes
    ----------
    directions_
        ``[n_directions, d]`` unit rows: mean of the class minus mean of the others.
    """

    def fit(self, X: Any, y: Any) -> MeanDifference:
        """Compute the directions."""
        X, y = validate_data(self, X, y)
        classes = np.unique(y)
        classes = classes[1:] if len(classes) == 2 else classes
        rows = [X[y == c].mean(0) - X[y != c].mean(0) for c in classes]
        directions = np.stack(rows)
        self.directions_ = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
        return self

    def transform(self, X: Any) -> Any:
        """Project rows: ``[n, n_directions]``."""
        check_is_fitted(self, "directions_")
        X = validate_data(self, X, reset=False)
        return X @ self.directions_.T

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


class Margins(ClassifierMixin, BaseEstimator):
    """A classifier that has decision values only, with the softmax of `slope` times these as probabilities.

    Parameters
    ----------
    classifier
        With ``decision_function``; may be fitted.
    slope
        From `slope_of`.
    """

    def __init__(self, classifier: Any, slope: float = 1.0) -> None:
        self.classifier = classifier
        self.slope = slope

    def fit(self, X: Any, y: Any) -> Margins:
        """Fit the classifier."""
        self.classifier.fit(X, y)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self.classifier, "classes_")

    @property
    def classes_(self) -> Any:
        """Class codes."""
        return self.classifier.classes_

    def predict(self, X: Any) -> Any:
        """Return the class codes of the largest decision values."""
        return self.classifier.predict(X)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities ``[n, n_classes]``."""
        return probabilities_of(decision_values(self.classifier, X), self.slope)


def decision_values(classifier: Any, X: Any) -> np.ndarray:
    """Return decision values ``[n, n_classes]``; of two classes the first has 0."""
    found = np.asarray(classifier.decision_function(X), dtype=np.float64)
    return np.stack([np.zeros(len(found)), found], axis=1) if found.ndim == 1 else found


def probabilities_of(decisions: np.ndarray, slope: float) -> np.ndarray:
    """Return the softmax of decision values times a slope."""
    from scipy.special import softmax

    return np.asarray(softmax(slope * decisions, axis=1))


def slope_of(decisions: np.ndarray, y: np.ndarray) -> float:
    """Return the slope at which decision values of rows that were not learned from predict their classes best.

    Parameters
    ----------
    decisions
        ``[n, n_classes]``.
    y
        ``[n]`` columns of the true classes.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_slope: float) -> float:
        return -float(log_softmax(np.exp(log_slope) * decisions, axis=1)[np.arange(len(y)), y].mean())

    return float(f"{np.exp(minimize_scalar(loss, bounds=(-5.0, 7.0), method='bounded').x):.4g}")
