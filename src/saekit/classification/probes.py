"""Probes as data: which classifiers stand at the end of an arm, their hyperparameter, and the grid of its values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .settings import Budget
from .solvers import Rows, Solver, discriminant, ridge

SOLVED_DENSE = 4096
"""Columns up to which sparse rows are made dense for a ridge classifier."""
PATIENCE = 2
"""Values of a grid in a row with lower scores than the best one before them, after which no larger one is tried."""


@dataclass(frozen=True)
class Probe:
    """One kind of classifier.

    Parameters
    ----------
    setting
        Its hyperparameter, as results name it; empty for none.
    grid
        Field of `Budget` with the values to try.
    make
        From a value and the budget to an unfitted classifier.
    limits
        Least and largest value that make sense: an end of the grid there is no doubt.
    is_warm
        Whether a fitted one can go on from one value to the next.
    is_margin
        Whether it has decision values and no probabilities; see `Margins`.
    solver
        From rows and class codes to the solver of all values; None where each value is fitted by itself.
    """

    setting: str
    grid: str
    make: Callable[[Any, Budget], Any]
    limits: tuple[float, float] = (0.0, math.inf)
    is_warm: bool = False
    is_margin: bool = False
    solver: Callable[[Rows, np.ndarray], Solver | None] | None = None

    def values(self, budget: Budget) -> tuple[Any, ...]:
        """Return the values to try first, increasing."""
        return tuple(getattr(budget, self.grid)) if self.grid else ()


def _majority(value: Any, budget: Budget) -> Any:
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="prior")


def _logistic(value: float, budget: Budget, weights: str | None = None) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        C=value, tol=budget.tolerance, max_iter=budget.max_iter, warm_start=True, class_weight=weights
    )


def _balanced(value: float, budget: Budget) -> Any:
    return _logistic(value, budget, "balanced")


def _lda(value: float, budget: Budget) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=value)


def _ridge(value: float, budget: Budget) -> Any:
    from sklearn.linear_model import RidgeClassifier

    return RidgeClassifier(value, class_weight="balanced")


def _svm(value: float, budget: Budget) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(C=value, class_weight="balanced", dual="auto", random_state=budget.seed or 0)


def _tree(value: int, budget: Budget) -> Any:
    from sklearn.tree import DecisionTreeClassifier

    return DecisionTreeClassifier(max_depth=value, class_weight="balanced", random_state=budget.seed or 0)


PROBES = {
    "majority": Probe("", "", _majority),
    "logistic": Probe("C", "C", _logistic, is_warm=True),
    "balanced": Probe("C", "C", _balanced, is_warm=True),
    "lda": Probe("shrinkage", "shrinkages", _lda, (0.0, 1.0), solver=discriminant),
    "ridge": Probe("alpha", "alphas", _ridge, is_margin=True, solver=ridge),
    "svm": Probe("C", "C", _svm, is_margin=True),
    "tree": Probe("depth", "depths", _tree, (1, math.inf)),
}
"""Probes by name."""

WIDE, WIDEST = 512, 2048
"""Columns that linear discriminant analysis takes: sparse rows, and dense ones of more than `WIDEST` columns, are put
on up to `WIDE` singular vectors first."""


def fit_probe(name: str, X: Any, y: np.ndarray, value: Any, budget: Budget, *, start: Any = None) -> tuple[Any, bool]:
    """Fit a classifier on transformed rows; also return whether it converged.

    Parameters
    ----------
    name
        One of `PROBES`.
    X, y
        Rows and class codes.
    value
        Value of its hyperparameter.
    budget
        Tolerance, iterations, seed.
    start
        A fitted one of another value to go on from.
    """
    import scipy.sparse
    from sklearn.exceptions import ConvergenceWarning

    probe = PROBES[name]
    if name == "ridge" and scipy.sparse.issparse(X) and X.shape[1] <= SOLVED_DENSE:
        X = X.toarray()  # one factorization for all classes, where sparse solvers iterate for each
    model = probe.make(value, budget) if start is None or not probe.is_warm else start
    if probe.is_warm:
        model.set_params(**{probe.setting: value})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, y)
    return model, not any(issubclass(each.category, ConvergenceWarning) for each in caught)


class Grid:
    """Values of a hyperparameter with their scores: it grows where the best one is strictly at an end, and ends where
    `PATIENCE` values in a row, each larger than the best one, have a lower score.
    """

    def __init__(self, probe: Probe, budget: Budget) -> None:
        self.probe = probe
        self.values: list[Any] = list(probe.values(budget))
        self.scores: dict[Any, float] = {}
        self.left = {-1: budget.widen, 1: budget.widen} if len(self.values) > 1 else {-1: 0, 1: 0}

    @property
    def best(self) -> Any:
        """The value with the highest score, the smallest of equals."""
        return max(sorted(self.scores), key=lambda value: self.scores[value])

    @property
    def is_past(self) -> bool:
        """Whether larger values would only lead away from the best one."""
        later = [value for value in self.scores if value > self.best]
        return len(later) >= PATIENCE and all(self.scores[value] < self.scores[self.best] for value in later)

    @property
    def edge(self) -> int:
        """The end that the best value is strictly at and that is no limit: -1 the lower, 1 the upper, 0 none."""
        ordered = sorted(self.scores)
        if len(ordered) < 2 or self.best in self.probe.limits:
            return 0
        if self.best == ordered[-1]:
            return 1
        return -1 if self.best == ordered[0] and self.scores[ordered[0]] > self.scores[ordered[1]] else 0

    def wider(self) -> Any | None:
        """Return the next value beyond the end where the best one is; None where there is none to try."""
        edge = self.edge
        if not edge or not self.left[edge]:
            return None
        ordered = sorted(self.scores)
        last, before = (ordered[-1], ordered[-2]) if edge == 1 else (ordered[0], ordered[1])
        new = last + (last - before) if isinstance(last, int) else float(f"{last * (last / before):.6g}")
        new = min(max(new, self.probe.limits[0]), self.probe.limits[1])
        self.left[edge] -= 1
        return new


def at_the_edge(probe: Probe, value: Any, tried: Sequence[Any], edge: int) -> str:
    """Return the note that the best value of a hyperparameter is at the end of its grid."""
    end = "largest" if edge == 1 else "smallest"
    return f"{probe.setting} = {value:g} was chosen, the {end} of the {len(tried)} values tried: {EDGE}"


EDGE = "a wider grid may give more"
"""What every note on a value at the end of its grid ends with."""
