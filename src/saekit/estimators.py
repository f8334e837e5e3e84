"""scikit-learn classes: features of an SAE, hidden states, binarization and selection of latents.

::

    clf = make_pipeline(SAEFeatures("builtin", sae, layer=2, pool="sum"), Binarize(1.0), LogisticRegression())
    clf.fit(texts, labels)

Constructor arguments are stored as they are and nothing is loaded before `fit` or `transform`. Cloning an estimator (as
every cross-validation does) shares the SAE and the model. In cross-validation give `cache=`: the model then runs once
over each text.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.feature_selection import SelectorMixin
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from .errors import ConfigError, DataError, ModelError, ShapeError, did_you_mean, listed

SCORES = ("mean_difference", "mean_difference_nonzero", "auc", "chi2", "l1", "random")
"""How `SelectLatents` can rate latents by itself."""

TRUSTED = tuple(f"saekit.estimators.{name}" for name in ("Binarize", "HiddenStates", "SAEFeatures", "SelectLatents"))
"""What `skops.io.loads` must be told to trust (``trusted=[...]``) to read these classes from a file."""


# ------------------------------------------------------------------------------------------------------- binarization


class Binarize(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """1 where a feature is above its threshold, else 0; sparse in, sparse out.

    ::

        relative None:        t_j = threshold
        relative "max":       t_j = threshold · max_i x_ij          over the rows of fit
        relative "quantile":  t_j = quantile_threshold {x_ij > 0}   over the rows of fit, linear interpolation

    Parameters
    ----------
    threshold
        A number in the units of the features, or a share of 0 to 1 with `relative`.
    compare
        ``">"`` or ``">="``. The two differ for counts: published rules are ``x > 1`` and ``x >= 1``.
    relative
        Fit one threshold per column, which does not depend on the scale of the SAE: None, ``"max"`` or ``"quantile"``.
        A column without a positive value in the rows of fit is 0 everywhere.

    Attributes
    ----------
    thresholds_ : ndarray ``[n_features]``
        Threshold of each column.

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
        if self.relative is None:
            self.thresholds_ = np.full(X.shape[1], float(self.threshold))
            return self
        column, value, _ = _entries(X)
        column, value = column[value > 0], value[value > 0]
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
        """Zeros and ones in the number type of `X`; CSR without stored zeros when `X` is sparse."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr"], dtype=[np.float64, np.float32], reset=False)
        above = np.greater if self.compare == ">" else np.greater_equal
        if not scipy.sparse.issparse(X):
            return above(X, self.thresholds_[None, :]).astype(X.dtype)
        kept = above(X.data, self.thresholds_[X.indices])
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
                f"Binarize: with relative={self.relative!r}, `threshold` must be a share of 0 to 1; got {t!r}."
            )
        if self.relative is not None and t == 1 and self.compare == ">":
            raise ConfigError(
                f"Binarize: with relative={self.relative!r} and compare='>', `threshold` must be below 1, or nothing "
                "in the rows of fit is above it; got 1. Give a share such as 0.2."
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


# ---------------------------------------------------------------------------------------------------------- selection


class SelectLatents(SelectorMixin, BaseEstimator):
    """Keep the k columns with the highest scores; sparse in, sparse out, never made dense.

    With n_c rows of class c, of which the others are the rest, and x_j the column of latent j::

        mean_difference          |mean(x_j | c) − mean(x_j | rest)|
        mean_difference_nonzero  the same divided by the mean of the column's nonzero entries
        auc                      max(AUC, 1 − AUC) of x_j as a score for c; ties (most are zeros) by mid-rank
        chi2                     the chi-squared statistic of the sums per class, for all classes together
        l1                       how early the latent enters the L1 path of a logistic regression for c, on columns
                                 divided by their largest entry; those it does not reach by the gradient at its end
        random                   a permutation drawn from `seed`

    With more than two classes, a score is the largest over the classes against the rest. Equal scores go to the lower
    column, so that the choice is the same on every machine.

    Parameters
    ----------
    k
        Columns to keep; all (with a warning) when there are fewer. ``"all"`` keeps all.
    by
        One of the scores above, or any name beside `scores`.
    scores
        Scores that were computed elsewhere, ``[n_features]``, the higher the better: stability, importance. Labels are
        then not used.
    seed
        For ``"random"``, and for the solver of ``"l1"``.

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

    def __init__(self, k: int | str = 16, *, by: str = "mean_difference", scores: Any = None, seed: int = 0) -> None:
        self.k = k
        self.by = by
        self.scores = scores
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> SelectLatents:
        """Rate the columns of `X` for the labels `y` and keep the best."""
        self._check()
        labelled = self.scores is None and self.by != "random"
        if labelled and y is not None:
            check_labels(y)
            X, y = validate_data(self, X, y, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32])
        elif labelled:
            raise DataError(
                f"SelectLatents: by={self.by!r} requires y to be passed, but the target y is None. Pass the labels."
            )
        else:
            X = validate_data(self, X, accept_sparse=["csr", "csc"], dtype=[np.float64, np.float32])
        self.pvalues_ = None
        if self.scores is not None:
            self.scores_ = self._given(X.shape[1])
        elif self.by == "random":
            self.scores_ = np.random.default_rng(self.seed).permutation(X.shape[1]).astype(float)
        else:
            self.classes_, label = np.unique(y, return_inverse=True)
            self.scores_, self.pvalues_ = rate_latents(
                X, label, len(self.classes_), self.by, self.seed, self._wanted(X)
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
        if self.scores is None and self.by not in SCORES:
            raise ConfigError(
                f"SelectLatents: `by` must be one of {listed(SCORES, 12)}, or `scores` be given beside it; "
                f"got {self.by!r}. {did_you_mean(str(self.by), SCORES)}"
            )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = self.by == "chi2" and self.scores is None
        tags.target_tags.required = self.scores is None and self.by != "random"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def check_labels(y: Any) -> None:
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
    if labels.dtype.kind == "f":
        missing = np.isnan(labels)
    elif labels.dtype == object:
        missing = np.array([label is None or label != label for label in labels], bool)
    else:
        missing = np.zeros(len(labels), bool)
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


def _entries(X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column, value (float64) and row of every entry that is not zero."""
    X = scipy.sparse.coo_array(X)
    kept = X.data != 0
    row, column = X.coords
    return column[kept].astype(np.int64), X.data[kept].astype(np.float64), row[kept].astype(np.int64)


def rate_latents(
    X: Any, label: np.ndarray, n_classes: int, by: str, seed: int = 0, wanted: int = 16
) -> tuple[np.ndarray, np.ndarray | None]:
    """Score of every column for the classes; see `SelectLatents`.

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
        mean = np.abs(total) / np.maximum(count, 1)
        best = np.divide(best, mean, out=np.zeros(n_features), where=mean > 0)
    return best, None


def _class_sums(
    column: np.ndarray, value: np.ndarray, label: np.ndarray, n_classes: int, n_features: int
) -> np.ndarray:
    """Sum of `value` for each class and column, ``[n_classes, n_features]``."""
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
    """``max(AUC, 1 - AUC)`` of every column by mid-ranks; only entries that are not zero are sorted.

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
    """How early each column enters an L1 path: steps left at entry, plus its share of the coefficients there.

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


# ----------------------------------------------------------------------------------------------------------- features


class _Features(TransformerMixin, BaseEstimator):
    """What both kinds of features share: settings checked early, clones that share, states that can be stored."""

    def fit(self, X: Any, y: Any = None) -> Any:
        """Check the settings and the kind of `X`; nothing is learned, `y` is not used, and the model does not run."""
        if self.model is None:
            X = validate_data(self, X, dtype=[np.float32, np.float64])
            self._check_width(X.shape[1])
            return self
        self._ask()
        if not _are_images(self.model, X):
            from .data.pool import check_texts, language_origin

            check_texts(_as_texts(X))
            self.model_digest_ = language_origin(self.model).digest
        return self

    def _ask(self) -> Any:
        raise NotImplementedError

    def _check_width(self, width: int) -> None:
        raise NotImplementedError

    def _pooled(self, X: Any) -> Any:
        """Features of texts, images or rows."""
        ask = self._ask()
        settings: Any = self
        if settings.model is None:
            return self._pooled_rows(X, ask)
        if _are_images(settings.model, X):
            from .data.vision import pool_images

            if settings.cache is not None or settings.max_tokens is not None:
                raise ConfigError(
                    "`cache` and `max_tokens` are for texts; images are neither kept nor cut. Leave them out."
                )
            (found,) = pool_images(
                _loaded_vision(settings.model), X, [ask], skip_special=settings.skip_special, empty=settings.empty
            )
        else:
            from .data.pool import pool_texts

            self._check_model()
            (found,) = pool_texts(
                settings.model, _as_texts(X), [ask], max_tokens=settings.max_tokens, cache=settings.cache,
                batch_tokens=settings.batch_tokens, skip_special=settings.skip_special, empty=settings.empty,
            )  # fmt: skip
        return found[settings.pool]

    def _pooled_rows(self, X: Any, ask: Any) -> Any:
        """Every row of an array as a document of its own."""
        import torch

        from .data.pool import pool_batches

        if hasattr(self, "n_features_in_"):
            X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        else:
            X = check_array(X, dtype=[np.float32, np.float64])
        self._check_width(X.shape[1])
        blocks = range(0, len(X), _ROWS_AT_ONCE)
        batches = (
            (
                {ask.place: torch.from_numpy(np.array(X[i : i + _ROWS_AT_ONCE]))},
                torch.arange(i, min(i + _ROWS_AT_ONCE, len(X))),
            )
            for i in blocks
        )
        (found,) = pool_batches(batches, len(X), [ask], what="rows")
        return found[ask.pools[0]]

    def _check_model(self) -> None:
        """Refuse another model than the one of `fit`, as there may be one after loading from a file."""
        fitted = getattr(self, "model_digest_", None)
        if fitted is None:
            return
        from .data.pool import language_origin

        now = language_origin(self.model).digest
        if now != fitted:
            raise ModelError(
                f"the model must be the one of fit ({fitted[:19]}…); `{self.model}` is {now[:19]}…. "
                "Give that model with set_params(model=…), or fit again."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Plain values and numpy arrays only, so that pickle, joblib and skops can store them.

        A path stays a path. An SAE that was given as a value goes along as arrays. A model that was given as a value is
        replaced by the folder or hub name it came from.
        """
        from .sae import SAE

        state = dict(super().__getstate__())
        for name, value in state.items():
            if isinstance(value, SAE):
                state[name] = _state_of(value)
            elif isinstance(value, os.PathLike):
                state[name] = os.fspath(value)
            elif name == "model" and value is not None and not isinstance(value, str):
                part = getattr(value, "tokenizer", None) or getattr(value, "processor", None)
                state[name] = str(getattr(part, "name_or_path", "") or "") or value.name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(
            {
                name: _sae_of(value) if isinstance(value, dict) and _STATE in value else value
                for name, value in state.items()
            }
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.string = self.model is not None
        tags.input_tags.two_d_array = self.model is None
        tags.no_validation = self.model is not None
        tags.transformer_tags.preserves_dtype = []
        return tags


class SAEFeatures(_Features):
    """An SAE's codes, pooled over the tokens of each text (or the patches of each image); CSR float32.

    Parameters
    ----------
    model
        The language model: ``"builtin"``, a folder, a hub name or a `LanguageModel`; for images a vision model; None
        when `transform` gets activations, an array ``[n, d_in]`` of which each row is a document.
    sae
        An `SAE`, or the path of one (a folder, or ``hf:owner/name/folder``).
    layer, hook
        Where the SAE reads; see `saekit.capture`. Neither: where it was trained, as its provenance says.
    pool
        ``"sum"``, ``"mean"``, ``"max"``, ``"last"``, ``"first"``; ``"count"`` (tokens where the latent fired);
        ``"top5"`` (tokens where it was among the 5 largest). See `saekit.data.pool.pool_batches`.
    max_tokens
        Read this many tokens of a text at most; None: all, long texts in windows.
    cache
        Folder in which pooled rows are kept by text, so that each text is run once over all folds, fits and processes.
    batch_tokens
        Tokens in one forward pass; None: the usual number.
    skip_special
        Leave out tokens that the tokenizer adds: BOS, CLS, SEP.
    empty
        What to do about texts without tokens: ``"refuse"``, or a ``"zero"`` row.

    Attributes
    ----------
    model_digest_ : str
        Digest of the language model of `fit`; after loading from a file another model is refused.
    n_features_in_ : int
        Width of the rows, without a model.

    Notes
    -----
    `fit` learns nothing: `transform` works without it. A clone shares the SAE and the model. The model of a name is
    loaded at the first text that is not in the cache; the last one stays loaded. pickle, joblib and skops store an SAE
    given as a value with the estimator, one given by its path as the path; a model always as its folder or name.
    `set_output(transform="pandas")` is refused: a data frame cannot hold sparse features.

    Examples
    --------
    ::

        clf = make_pipeline(SAEFeatures("builtin", sae, layer=2), Binarize(1.0), LogisticRegression())
        clf.fit(texts, labels)
    """

    def __init__(
        self,
        model: Any,
        sae: Any,
        *,
        layer: int | None = None,
        hook: str | None = None,
        pool: str = "sum",
        max_tokens: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        batch_tokens: int | None = None,
        skip_special: bool = True,
        empty: str = "refuse",
    ) -> None:
        self.model = model
        self.sae = sae
        self.layer = layer
        self.hook = hook
        self.pool = pool
        self.max_tokens = max_tokens
        self.cache = cache
        self.batch_tokens = batch_tokens
        self.skip_special = skip_special
        self.empty = empty

    def transform(self, X: Any) -> Any:
        """Pooled codes ``[n, n_latents]`` of texts, images or rows, as ``scipy.sparse.csr_matrix``.

        Raises
        ------
        DataError, ConfigError, ShapeError, ModelError, OfflineError
            As `saekit.data.pool.pool_texts`.
        """
        from sklearn.utils._set_output import _get_output_config

        if _get_output_config("transform", self)["dense"] != "default":
            raise ConfigError(
                "Pandas output does not support sparse data, which SAEFeatures gives. Leave set_output as it is; "
                "get_feature_names_out() names the columns."
            )
        return self._pooled(X)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``sae_00012`` for latent 12; names sort as latents do."""
        return _names("sae", self._sae().n_latents)

    def _sae(self) -> Any:
        from .sae import SAE

        if isinstance(self.sae, SAE):
            return self.sae
        if not isinstance(self.sae, str | os.PathLike):
            raise ConfigError(
                f"SAEFeatures: `sae` must be an SAE or the path of one; got {type(self.sae).__name__}. "
                "One SAE per SAEFeatures; make a FeatureUnion of several."
            )
        return _loaded_sae(os.fspath(self.sae), _stamp(os.fspath(self.sae)))

    def _ask(self) -> Any:
        from .data.pool import Ask

        if self.model is None:
            return Ask((self.pool,), self._sae(), hook="rows")
        ask = Ask((self.pool,), self._sae(), self.layer, self.hook)
        _ = ask.place  # says what is missing
        return ask

    def _check_width(self, width: int) -> None:
        d_in = self._sae().d_in
        if width != d_in:
            raise ShapeError(
                f"SAEFeatures: rows must have width d_in={d_in} of the SAE; got {width}. "
                "Was it trained on another model?"
            )


class HiddenStates(_Features):
    """Hidden states, pooled over the tokens of each text (or the patches of each image); dense float32.

    The arm that an SAE has to beat, under the same pooling.

    Parameters
    ----------
    model
        As for `SAEFeatures`, but never None.
    layer, hook
        Where the states are taken; one of them is needed.
    pool
        ``"mean"``, ``"sum"``, ``"max"``, ``"last"`` or ``"first"``.
    max_tokens, cache, batch_tokens, skip_special, empty
        As for `SAEFeatures`.

    Attributes
    ----------
    model_digest_ : str
        Digest of the language model of `fit`.
    """

    def __init__(
        self,
        model: Any,
        *,
        layer: int | None = None,
        hook: str | None = None,
        pool: str = "mean",
        max_tokens: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        batch_tokens: int | None = None,
        skip_special: bool = True,
        empty: str = "refuse",
    ) -> None:
        self.model = model
        self.layer = layer
        self.hook = hook
        self.pool = pool
        self.max_tokens = max_tokens
        self.cache = cache
        self.batch_tokens = batch_tokens
        self.skip_special = skip_special
        self.empty = empty

    def transform(self, X: Any) -> np.ndarray:
        """Pooled states ``[n, d]`` of texts or images.

        Raises
        ------
        DataError, ConfigError, ModelError, OfflineError
            As `saekit.data.pool.pool_texts`.
        """
        return self._pooled(X)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``hidden_012`` for dimension 12. Loads the model, and runs it on one word where its width is not known."""
        from .data.model import LanguageModel
        from .data.pool import language_origin, pool_texts

        ask = self._ask()
        model = self.model
        if not isinstance(model, LanguageModel) and _are_images(model, None):
            return _names("hidden", model.d_model)
        model = language_origin(model).load()
        (found,) = pool_texts(model, ["a"], [ask], skip_special=False)
        return _names("hidden", found[self.pool].shape[1])

    def _ask(self) -> Any:
        from .data.pool import Ask

        if self.model is None:
            raise ConfigError("HiddenStates: `model` must be a model; got None. Rows are hidden states already.")
        ask = Ask((self.pool,), None, self.layer, self.hook)
        _ = ask.place  # says what is missing
        return ask

    def _check_width(self, width: int) -> None:
        self._ask()


_ROWS_AT_ONCE = 4096
_STATE = "saekit_sae"  # marks the stored form of an SAE in the state of an estimator


def _names(prefix: str, n: int) -> np.ndarray:
    return np.array([f"{prefix}_{i:0{len(str(max(n - 1, 0)))}d}" for i in range(n)], dtype=object)


def _as_texts(X: Any) -> Any:
    """Texts from a list, an array, or the one column of a table."""
    if isinstance(X, str):
        return X
    if hasattr(X, "to_numpy"):
        X = X.to_numpy()
    if isinstance(X, np.ndarray):
        if X.ndim == 2 and X.shape[1] == 1:
            X = X[:, 0]
        if X.ndim != 1:
            raise DataError(
                f"texts must be one column; got an array of shape {X.shape}. Without a model (model=None) rows of "
                "activations can be given."
            )
    return X


def _are_images(model: Any, X: Any) -> bool:
    """Whether the model looks at images, or `X` are some."""
    from .data.images import Images
    from .data.vision import VisionModel

    if isinstance(model, VisionModel) or isinstance(X, Images):
        return True
    return isinstance(X, list | tuple) and len(X) > 0 and hasattr(X[0], "getbbox")  # of PIL


@functools.lru_cache(maxsize=1)
def _loaded_vision_model(name: str) -> Any:
    from .data.vision import load_vision_model

    return load_vision_model(name)


def _loaded_vision(model: Any) -> Any:
    return _loaded_vision_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else model


@functools.lru_cache(maxsize=8)
def _loaded_sae(path: str, stamp: tuple[Any, ...]) -> Any:
    """The SAE of that path; the last ones stay loaded, for the clones that cross-validation makes."""
    from .store import load

    return load(path)


def _stamp(path: str) -> tuple[Any, ...]:
    """Sizes and times of the files of an SAE's folder: when they are as before, so is the SAE."""
    folder = Path(path).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())


def _state_of(sae: Any) -> dict[str, Any]:
    """An SAE as plain values and numpy arrays."""
    scores = getattr(sae, "scores", None) or {}
    tensors = {**sae.tensors(), **{f"scores.{name}": value for name, value in scores.items()}}
    facts = {
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "scaling": sae.scaling.settings(),
        "provenance": sae.provenance,
        "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        "shapes": {name: list(t.shape) for name, t in tensors.items()},
    }
    arrays = {name: np.frombuffer(_bytes_of(t), np.uint8) for name, t in tensors.items()}
    return {_STATE: 1, "facts": json.dumps(facts), "tensors": arrays}


def _bytes_of(tensor: Any) -> bytes:
    import torch

    # numpy has no bfloat16, bytes have every type
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _sae_of(state: dict[str, Any]) -> Any:
    """The SAE that `_state_of` took apart."""
    import torch

    from .sae import SAE, Scaling
    from .sae.rules import RULES

    facts = json.loads(state["facts"])
    tensors = {
        name: torch.from_numpy(np.array(array))
        .view(getattr(torch, facts["dtypes"][name]))
        .reshape(facts["shapes"][name])
        for name, array in state["tensors"].items()
    }

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    settings = facts["rule"]
    own: dict[str, Any] = {name: t for name, t in tensors.items() if "." not in name}
    if part("scores."):
        own["scores"] = part("scores.")
    return SAE(
        **own,
        rule=RULES[settings.pop("name")](**settings, **part("rule.")),
        scaling=Scaling(**facts["scaling"], **part("scaling.")),
        provenance=facts["provenance"],
    )
