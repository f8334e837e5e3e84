"""Select latents for scikit-learn, by class differences, chi-squared, AUC or an L1 path."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator
from sklearn.feature_selection import SelectorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from ..errors import ConfigError, DataError, listed, nearest
from ..settings import suggest_keywords

SCORES = ("mean_difference", "mean_difference_nonzero", "auc", "chi2", "l1", "random")
"""How `SelectLatents` can rate latents by itself."""


# ---------------------------------------------------------------------------------------------------------- selection


@suggest_keywords
class SelectLatents(SelectorMixin, BaseEstimator):
    """Keep the k columns with the highest scores; sparse in, sparse out, never made dense.

    With n_c rows of class c, of which the others are the rest, and x_j the column of latent j::

        mean_difference          |mean(x_j | c) − mean(x_j | rest)|
        mean_difference_nonzero  the same divided by the mean magnitude of the column's nonzero entries
        auc                      max(AUC, 1 − AUC) of x_j as a score for c; ties (most are zeros) by mid-rank
        chi2                     the chi-squared statistic of the sums per class, for all classes together
        l1                       how early the latent enters the L1 path of a logistic regression for c, on columns
                                 divided by their largest entry; those it does not reach by the gradient at its end
        random                   a random permutation, from `random_state`

    With more than two classes, a score is the largest over the classes against the rest. Equal scores go to the lower
    column, so that the choice is the same on every machine.

    Parameters
    ----------
    k
        Columns to keep; all (with a warning) when there are fewer. ``"all"`` keeps all.
    scoring
        One of the scores above; any name with `scores`.
    scores
        Scores that were computed elsewhere, ``[n_features]``, the higher the better: stability, importance. Labels are
        then not used.
    random_state
        Random seed for ``"random"`` and for the solver of ``"l1"``, a whole number.

    Attributes
    ----------
    scores_ : ndarray ``[n_features]``
    pvalues_ : ndarray ``[n_features]`` or None
        With ``"chi2"``, not corrected for the number of columns.
    order_ : ndarray ``[k]``
        The columns kept, best first.
    classes_ : ndarray
        The labels, where they were used.

    Raises
    ------
    ConfigError
        A setting is unknown or out of range.
    DataError
        Labels are missing (NaN, None), continuous, or of one class only; ``"chi2"`` meets a negative number.
    """

    def __init__(
        self, k: int | str = 16, *, scoring: str = "mean_difference", scores: object = None, random_state: int = 0
    ) -> None:
        self.k = k
        self.scoring = scoring
        self.scores = scores
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> SelectLatents:
        """Rate the columns of `X` for the labels `y` and keep the best."""
        self._check()
        labelled = self.scores is None and self.scoring != "random"
        if labelled and y is not None:
            check_labels(y)
            X, y = validate_data(self, X, y, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32])
        elif labelled:
            raise DataError(
                f"SelectLatents: scoring={self.scoring!r} requires y to be passed, but the target y is None. Pass "
                "the labels."
            )
        else:
            X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32])
        self.pvalues_ = None
        if self.scores is not None:
            self.scores_ = self._given(X.shape[1])
        elif self.scoring == "random":
            self.scores_ = np.random.default_rng(self.random_state).permutation(X.shape[1]).astype(float)
        else:
            self.classes_, label = np.unique(y, return_inverse=True)
            self.scores_, self.pvalues_ = rate_latents(
                X, label, len(self.classes_), self.scoring, self.random_state, self._wanted(X)
            )
        self.order_ = np.argsort(-self.scores_, kind="stable")[: self._wanted(X)]
        if self.k != "all" and self.k > X.shape[1]:
            warnings.warn(
                f"SelectLatents: k={self.k} is more than the {X.shape[1]} columns; all are kept. Lower k.", stacklevel=2
            )
        return self

    def _wanted(self, X: Any) -> int:
        return X.shape[1] if self.k == "all" else min(int(self.k), X.shape[1])

    def _get_support_mask(self) -> np.ndarray:
        check_is_fitted(self)
        mask = np.zeros(len(self.scores_), bool)
        mask[self.order_] = True
        return mask

    def _given(self, n_features: int) -> np.ndarray:
        scores = np.array(self.scores, np.float64)
        if scores.shape != (n_features,) or np.isnan(scores).any():
            raise ConfigError(
                f"SelectLatents: `scores` must be {n_features} numbers, one per column, none NaN; got shape "
                f"{scores.shape} with {int(np.isnan(scores).sum())} NaN. Are they of this SAE?"
            )
        return scores

    def _check(self) -> None:
        k = self.k
        if k != "all" and (isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1):
            raise ConfigError(f"SelectLatents: `k` must be a positive integer or `all`; got {k!r}.")
        if self.scores is None and self.scoring not in SCORES:
            raise ConfigError(
                f"SelectLatents: `scoring` must be one of {listed(SCORES, 12)}, or `scores` must be given; "
                f"got {self.scoring!r}.{nearest(self.scoring, SCORES)}"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        old = {"by": "scoring", "seed": "random_state"}  # names in files of 0.1
        super().__setstate__({old.get(name, name): value for name, value in state.items()})

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = self.scoring == "chi2" and self.scores is None
        tags.target_tags.required = self.scores is None and self.scoring != "random"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def check_labels(y: object) -> None:
    """Refuse labels that no classification can use.

    Raises
    ------
    DataError
        A label is missing, all are equal, or they are continuous numbers.
    """
    from sklearn.utils.multiclass import type_of_target

    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels.ravel()
    if labels.ndim != 1:
        raise DataError(f"labels y must be one per row; got an array of shape {labels.shape}. y should be a 1d array.")
    if not len(labels):
        raise DataError("there must be at least one row with a label; got none.")
    missing = _missing(labels)
    if missing.any():
        rows = np.flatnonzero(missing).tolist()
        raise DataError(
            f"every row must have a label; {len(rows)} of {len(labels)} are NaN or None: rows {listed(rows, 8)}. "
            "Remove these rows."
        )
    if type_of_target(labels) not in ("binary", "multiclass"):
        raise DataError(
            f"labels must be classes; got {type_of_target(labels)} values. Unknown label type: make classes of them."
        )
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"labels must have at least two classes; all {len(labels)} rows are of one class, {labels[0]!r}. "
            "Is this the right column?"
        )


def _missing(labels: np.ndarray) -> np.ndarray:
    """Return which labels are NaN or None."""
    if labels.dtype.kind == "f":
        return np.isnan(labels)
    if labels.dtype == object:
        return np.array([label is None or label != label for label in labels], bool)
    return np.zeros(len(labels), bool)


def _entries(X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return column, value (float64) and row of every entry that is not zero."""
    X = scipy.sparse.coo_array(X)
    kept = X.data != 0
    row, column = X.coords
    return column[kept].astype(np.int64), X.data[kept].astype(np.float64), row[kept].astype(np.int64)


def rate_latents(
    X: Any, label: np.ndarray, n_classes: int, by: str, seed: int = 0, wanted: int = 16
) -> tuple[np.ndarray, np.ndarray | None]:
    """Score every column for the classes; see `SelectLatents`.

    Parameters
    ----------
    X
        Features ``[n, n_features]``, sparse or not.
    label
        Class of each row, ``0 .. n_classes - 1``; every class has a row.
    n_classes
        Number of classes.
    by
        One of `SCORES` but ``"random"``.
    seed, wanted
        For ``"l1"``: seed of the solver, and how many columns the path must reach.

    Returns
    -------
    scores : ndarray ``[n_features]``
    pvalues : ndarray ``[n_features]`` or None
        For ``"chi2"`` only.
    """
    column, value, row = _entries(X)
    n_features = X.shape[1]
    size = np.bincount(label, minlength=n_classes).astype(np.float64)
    if by == "l1":
        return _l1_path(X, label, n_classes, seed, wanted), None
    if by == "auc":
        return _auc(column, value, label[row], size, n_features), None
    sums = _class_sums(column, value, label[row], n_classes, n_features)
    if by == "chi2":
        return _chi2(value, sums, size)
    total = sums.sum(axis=0)
    rest = size.sum() - size
    best = np.zeros(n_features)
    for c in range(n_classes if n_classes > 2 else 1):
        np.maximum(best, np.abs(sums[c] / size[c] - (total - sums[c]) / rest[c]), out=best)
    if by == "mean_difference_nonzero":
        count = np.bincount(column, minlength=n_features)
        mean = np.bincount(column, np.abs(value), minlength=n_features) / np.maximum(count, 1)
        best = np.divide(best, mean, out=np.zeros(n_features), where=mean > 0)
    return best, None


def _class_sums(
    column: np.ndarray, value: np.ndarray, label: np.ndarray, n_classes: int, n_features: int
) -> np.ndarray:
    """Sum `value` for each class and column: ``[n_classes, n_features]``."""
    key = label * n_features + column
    return np.bincount(key, value, minlength=n_classes * n_features).reshape(n_classes, n_features)


def _chi2(value: np.ndarray, sums: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import chi2

    if (value < 0).any():
        raise DataError(
            "chi2 needs features that are not negative; got Negative values in data. Select by mean_difference or auc."
        )
    expected = np.outer(size / size.sum(), sums.sum(axis=0))
    terms = np.divide((sums - expected) ** 2, expected, out=np.zeros_like(expected), where=expected > 0)
    scores = terms.sum(axis=0)
    return scores, chi2.sf(scores, len(size) - 1)


def _auc(column: np.ndarray, value: np.ndarray, label: np.ndarray, size: np.ndarray, n_features: int) -> np.ndarray:
    """Compute ``max(AUC, 1 - AUC)`` of every column by mid-ranks; only entries that are not zero are sorted.

    The zeros of a column are one block of ties between its negative and its positive entries: their common rank follows
    from counting.
    """
    n, n_classes = size.sum(), len(size)
    count = np.bincount(column, minlength=n_features)
    negative = np.bincount(column[value < 0], minlength=n_features)
    zeros = n - count
    order = np.lexsort((value, column))
    column, value, label = column[order], value[order], label[order]
    starts = np.cumsum(count) - count
    # runs of equal values within a column share the mean of their places
    first = np.ones(len(value), bool)
    first[1:] = (column[1:] != column[:-1]) | (value[1:] != value[:-1])
    run = np.cumsum(first) - 1
    begin = np.flatnonzero(first)
    length = np.diff(np.append(begin, len(value)))
    rank = (begin + (length + 1) / 2)[run] - starts[column] + np.where(value > 0, zeros[column], 0)
    ranks = _class_sums(column, rank, label, n_classes, n_features)
    stored = _class_sums(column, np.ones(len(value)), label, n_classes, n_features)
    best = np.zeros(n_features)
    for c in range(n_classes if n_classes > 2 else 1):
        total = ranks[c] + (size[c] - stored[c]) * (negative + (zeros + 1) / 2)
        auc = (total - size[c] * (size[c] + 1) / 2) / (size[c] * (n - size[c]))
        np.maximum(best, np.maximum(auc, 1 - auc), out=best)
    return best


_L1_STEPS = 12  # strengths on the path, a factor of 1.5 apart; it ends when enough columns are in


def _l1_path(X: Any, label: np.ndarray, n_classes: int, seed: int, wanted: int) -> np.ndarray:
    """Score how early each column enters an L1 path: steps left at entry, plus its fraction of the coefficients there.

    Columns that the path does not reach come behind, by the gradient of the loss at its end: what would enter next.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MaxAbsScaler
    from sklearn.svm import l1_min_c

    scaled = MaxAbsScaler().fit_transform(scipy.sparse.csr_matrix(X, dtype=np.float64))
    best = np.zeros(X.shape[1])
    for c in range(n_classes if n_classes > 2 else 1):
        target = (label == (c if n_classes > 2 else 1)).astype(np.int64)
        lowest = l1_min_c(scaled, target, loss="log")
        score = np.zeros(X.shape[1])
        for step in range(_L1_STEPS):
            model = LogisticRegression(
                C=lowest * 1.5 ** (step + 1), l1_ratio=1.0, solver="liblinear", max_iter=1000, random_state=seed
            ).fit(scaled, target)
            size = np.abs(model.coef_[0])
            entered = (size > 0) & (score == 0)
            score[entered] = _L1_STEPS - step + size[entered] / (size.max() or 1.0)
            if (score > 0).sum() >= wanted:
                break
        gradient = np.abs(scaled.T @ (target - model.predict_proba(scaled)[:, 1]))
        behind = score == 0
        score[behind] = 0.999 * gradient[behind] / (gradient.max() or 1.0)  # below 1, where entered ones begin
        np.maximum(best, score, out=best)
    return best
