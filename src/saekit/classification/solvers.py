"""Fits of one probe at many values of its hyperparameter, with what they share computed once.

Inner folds try every value of a grid on the same rows. A ridge classifier needs the product of the rows with themselves
once and a factorization for each penalty; linear discriminant analysis needs the covariance once, which shrinks towards
a multiple of the identity. Both are the solutions that scikit-learn's `RidgeClassifier` and
`LinearDiscriminantAnalysis` find, which the last fit on all training rows uses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

BLOCK = 2048
"""Columns of sparse rows that are dense at a time."""
OFTEN = 1 / 15
"""Fraction of the rows from which a column is multiplied as a dense one: a product of two sparse entries takes about
15^2 times what one of two dense entries takes."""
EXACT_ROWS = 1000
"""Rows up to which leading directions are exact; of more a random subspace is turned towards them, `TURNS` times."""
TURNS, SPARE = 3, 64
"""Times that a random subspace is multiplied by the products of the rows, and its dimensions beyond those asked for."""
SPARSE_COST = 10
"""Times that a product with a sparse entry takes what one with a dense entry takes."""
SOLVED_ROWS = 6000
"""Rows or columns, whichever are fewer, up to which systems are solved."""
SOLVED_ENTRIES = 2**27
"""Entries of rows up to which they are made dense."""


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear classifier that was solved for; `decision_function` and `predict` as in scikit-learn."""

    classes_: np.ndarray
    coef: np.ndarray
    """``[d, n_outputs]``: one output for each class, or a single one for the second of two."""
    intercept: np.ndarray

    def decision_function(self, X: Any) -> np.ndarray:
        """Return decision values ``[n, n_outputs]``; ``[n]`` for a single output."""
        found = np.asarray(X @ self.coef) + self.intercept
        return found[:, 0] if found.shape[1] == 1 else found

    def predict(self, X: Any) -> np.ndarray:
        """Return class codes."""
        found = self.decision_function(X)
        return self.classes_[(found > 0).astype(np.int64) if found.ndim == 1 else found.argmax(1)]


Solver = Callable[[Any], Linear]
"""From a value of the hyperparameter to the fitted classifier."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that several probes are fitted on, with others that they are tried on."""

    X: Any
    """``[n, d]``, dense or sparse."""
    others: Any = None
    """``[m, d]``, likewise."""

    @cached_property
    def gram(self) -> np.ndarray:
        """``X @ X.T`` in float64, once."""
        return _products(self.X, self.X)

    @cached_property
    def between(self) -> np.ndarray:
        """``others @ X.T`` in float64, once."""
        return _products(self.others, self.X)


def _products(one: Any, other: Any) -> np.ndarray:
    """Return ``one @ other.T`` in float64; of sparse rows by dense blocks of the columns that are often active."""
    if not hasattr(other, "tocsc"):
        A = np.asarray(one, dtype=np.float64)
        return A @ (A if one is other else np.asarray(other, dtype=np.float64)).T
    right = other.tocsc().astype(np.float64)
    left = right if one is other else one.tocsc().astype(np.float64)
    is_often = np.diff(right.indptr) > OFTEN * right.shape[0]
    found = np.asarray((left[:, ~is_often].tocsr() @ right[:, ~is_often].tocsr().T).toarray())
    often = np.flatnonzero(is_often)
    for start in range(0, len(often), BLOCK):
        columns = often[start : start + BLOCK]
        B = right[:, columns].toarray()
        found += (B if one is other else left[:, columns].toarray()) @ B.T
    return found


def ridge(rows: Rows, y: np.ndarray) -> Solver | None:
    """Return the solver of a ridge classifier with balanced classes, as `RidgeClassifier` fits it.

    None where there are too many rows to solve for.

    Parameters
    ----------
    rows
        Training rows.
    y
        ``[n]`` class codes.
    """
    X, (n, d) = rows.X, rows.X.shape
    if min(n, d) > SOLVED_ROWS or (d <= n and n * d > SOLVED_ENTRIES):
        return None
    classes, columns = np.unique(y, return_inverse=True)
    counts = np.bincount(columns)
    weights = (len(y) / (len(classes) * counts))[columns]
    Y = np.where(columns[:, None] == np.arange(len(classes)), 1.0, -1.0)
    Y = Y[:, 1:] if len(classes) == 2 else Y
    offset = weights @ Y / weights.sum()
    mean = np.asarray(X.T @ (weights / weights.sum())).ravel()
    root = np.sqrt(weights)
    targets = root[:, None] * (Y - offset)
    if d > n:
        solve = _dual(rows, mean, root, targets)
    else:
        solve = _primal(X, mean, weights, targets * root[:, None])

    def fit(alpha: float) -> Linear:
        coef = solve(alpha)
        return Linear(classes, coef, offset - mean @ coef)

    return fit


def _dual(rows: Rows, mean: np.ndarray, root: np.ndarray, targets: np.ndarray) -> Callable[[float], np.ndarray]:
    X = rows.X
    across = np.asarray(X @ mean).ravel()
    K = rows.gram - across[:, None] - across + mean @ mean
    K *= root[:, None] * root

    def solve(alpha: float) -> np.ndarray:
        dual = root[:, None] * _solved(K, alpha, targets)
        return np.asarray(X.T @ dual) - mean[:, None] * dual.sum(0)

    return solve


def _primal(X: Any, mean: np.ndarray, weights: np.ndarray, targets: np.ndarray) -> Callable[[float], np.ndarray]:
    centered = (X.toarray() if hasattr(X, "toarray") else X) - mean
    G = centered.T @ (centered * weights[:, None])
    right = centered.T @ targets
    return lambda alpha: _solved(G, alpha, right)


def _solved(A: np.ndarray, alpha: float, right: np.ndarray) -> np.ndarray:
    """Return the solution with `alpha` added to the diagonal."""
    from scipy.linalg import LinAlgError, lstsq, solve

    shifted = A.copy()
    shifted.flat[:: len(A) + 1] += alpha
    try:
        return np.asarray(solve(shifted, right, assume_a="pos"))
    except LinAlgError:
        return np.asarray(lstsq(shifted, right)[0])


def discriminant(rows: Rows, y: np.ndarray) -> Solver:
    """Return the solver of linear discriminant analysis at a shrinkage, as `LinearDiscriminantAnalysis` fits it.

    Parameters
    ----------
    rows
        Training rows, dense.
    y
        ``[n]`` class codes.
    """
    classes, columns = np.unique(y, return_inverse=True)
    priors = np.bincount(columns) / len(y)
    X = np.asarray(rows.X, dtype=np.float64)
    means = np.stack([X[columns == each].mean(0) for each in range(len(classes))])
    centered = X - means[columns]
    covariance = centered.T @ centered / len(X)
    middle = float(np.trace(covariance)) / len(covariance)

    def fit(shrinkage: float) -> Linear:
        coef = _solved((1 - shrinkage) * covariance, shrinkage * middle, means.T)
        return Linear(classes, coef, np.log(priors) - 0.5 * (means.T * coef).sum(0))

    return fit


def narrowed(rows: Rows) -> Rows:
    """Return rows and the others on fewer columns, with the same inner products with the first.

    What a penalty on the length of the weights chooses does not change: its weights are sums of the first rows. Rows
    that are no wider than many, or so sparse that nothing is gained, stay as they are.
    """
    from scipy.linalg import LinAlgError, cholesky, solve_triangular

    A, (n, d) = rows.X, rows.X.shape
    if n >= d or n > SOLVED_ROWS or (hasattr(A, "nnz") and n * n >= SPARSE_COST * A.nnz):
        return rows
    K = rows.gram.copy()
    K.flat[:: n + 1] += 1e-10 * max(float(np.trace(K)) / n, 1e-300)
    try:
        lower = cholesky(K, lower=True)
    except LinAlgError:
        return rows
    others = None if rows.others is None else solve_triangular(lower, rows.between.T, lower=True).T
    return Rows(lower, others)


def widen(model: Any, few: Rows, rows: Rows) -> None:
    """Let a classifier that was fitted on `narrowed` rows, `few`, say the same of the rows themselves."""
    from scipy.linalg import solve_triangular

    if few is rows:
        return
    dual = solve_triangular(few.X, model.coef_.T, lower=True, trans="T")
    model.coef_ = np.ascontiguousarray((rows.X.T @ dual).T, dtype=rows.X.dtype)
    model.n_features_in_ = rows.X.shape[1]


def leading(rows: Rows, k: int) -> Rows | None:
    """Return rows and the others on the `k` leading right singular vectors of the first.

    None where there are too many rows and columns to solve for.
    """
    A, (n, d) = rows.X, rows.X.shape
    if min(n, d) > SOLVED_ROWS:
        return None
    if n > d:
        V = _singular(_products(_turned(A), _turned(A)), k)[1]
        return Rows(np.asarray(A @ V), None if rows.others is None else np.asarray(rows.others @ V))
    lengths, U = _singular(rows.gram, k)
    return Rows(U * lengths, None if rows.others is None else rows.between @ (U / lengths))


def _turned(A: Any) -> Any:
    return A.T.tocsr() if hasattr(A, "tocsr") else np.ascontiguousarray(np.asarray(A).T)


def _singular(K: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return up to `k` square roots of the largest eigenvalues of a matrix of products, largest first, and vectors."""
    values, U = _largest(K, min(k, len(K)))
    is_there = (values > 1e-10 * values[-1])[::-1]
    return np.sqrt(values[::-1][is_there]), U[:, ::-1][:, is_there]


def _largest(K: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `k` largest eigenvalues of a symmetric matrix, increasing, with their vectors as columns."""
    from scipy.linalg import eigh, qr

    n = len(K)
    if n <= EXACT_ROWS:
        values, vectors = eigh(K, subset_by_index=[n - k, n - 1])
        return np.asarray(values), np.asarray(vectors)
    Q = np.random.Generator(np.random.PCG64(0)).normal(size=(n, min(k + SPARE, n)))
    for _ in range(TURNS):
        Q = qr(K @ Q, mode="economic", overwrite_a=True)[0]
    values, vectors = np.linalg.eigh(Q.T @ (K @ Q))
    return values[-k:], Q @ vectors[:, -k:]
