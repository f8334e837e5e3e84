"""How every arm is fitted: selection inside the folds, one budget for all.

`fit_arm` chooses the hyperparameters of an arm by inner cross-validation on training rows only (selection, thresholds,
components and scaling are fitted within each inner fold), then fits the whole pipeline once on all training rows.
`predict_arm` applies it to test rows.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from ..inputs.split import INNER, check_folds
from ..measure.paired_scores import Predictions
from .arms import Arm
from .settings import Budget

MAX_WORDS = 20_000
"""Words and word pairs of the TF-IDF arm, the most frequent ones."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """An arm, fitted.

    Parameters
    ----------
    arm
        What was fitted.
    pipeline
        A fitted scikit-learn pipeline: matrix (or texts) in, class codes out.
    chosen
        Settings that inner cross-validation chose: ``C`` or ``depth``, ``threshold``.
    inner_score
        Macro-F1 of the chosen settings, mean over the inner folds.
    selected
        Columns that reach the classifier, best first; None where all do.
    stability
        How far the columns selected in the inner folds agree: ``jaccard`` and ``kuncheva`` (0: chance, 1: the same);
        None where nothing is selected.
    converged
        Whether the last fit did.
    notes
        What a reader must know: what did not converge, dead columns among the selected ones, a setting at the end of
        its grid.
    seconds
        Time it took.
    """

    arm: Arm
    pipeline: Any
    chosen: dict[str, Any]
    inner_score: float
    selected: tuple[int, ...] | None
    stability: dict[str, float] | None
    converged: bool
    notes: tuple[str, ...]
    seconds: float


def fit_arm(
    arm: Arm,
    X: Any,
    y: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    budget: Budget | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> Fitted:
    """Choose the settings of an arm within the training rows, and fit it on all of them.

    Parameters
    ----------
    arm
        What to fit.
    X
        Training rows: a CSR matrix, an array ``[n, d]``, or for the arm of words an array of texts.
    y
        ``int64 [n]`` class codes.
    groups
        ``[n]``; rows of one group stay in one inner fold.
    budget
        What it may spend.
    chosen
        Settings to use instead of choosing any.

    Raises
    ------
    DataError
        One class, NaN, fewer rows of a class (or groups) than inner folds, another number of rows than labels.
    """
    with _one_thread():
        return _fit_arm(arm, X, y, groups, budget or Budget(), chosen)


def _fit_arm(
    arm: Arm, X: Any, y: np.ndarray, groups: np.ndarray | None, budget: Budget, chosen: Mapping[str, Any] | None
) -> Fitted:
    since = time.perf_counter()
    y = np.asarray(y, dtype=np.int64)
    X = as_matrix(X, arm)
    _check_rows(arm, X, y)
    notes: list[str] = []
    tuned = _Tuned(dict(chosen or {}), math.nan, [])
    if chosen is None and arm.probe != "majority":
        tuned = _tune(arm, X, y, inner_folds(y, groups, budget), budget, notes)
    steps, A = _fit_steps(arm, X, y, tuned.chosen, budget, notes)
    value = tuned.chosen.get("C", tuned.chosen.get("depth"))
    classifier, converged = _fit_classifier(arm, A, y, value, budget, start=None)
    if not converged:
        notes.append(f"the fit had not converged after {budget.max_iter} iterations (C = {value:g})")
    if chosen is None and "C" in tuned.chosen and (value,) == budget.C[1:][-1:]:
        notes.append(f"C = {value:g} was chosen, the weakest penalty of the grid: a wider grid may give more")
    selected = _selected(steps)
    dead = _dead_columns(steps, X, selected or ())
    if dead:
        notes.append(f"{dead} of the {len(selected or ())} selected columns are 0 in every training row")
    from sklearn.pipeline import Pipeline

    return Fitted(
        arm, Pipeline([*steps, ("classify", classifier)]), tuned.chosen, tuned.score, selected,
        _agreement(tuned.selections, X.shape[1] if selected else 0), converged, tuple(notes),
        time.perf_counter() - since,
    )  # fmt: skip


def _check_rows(arm: Arm, X: Any, y: np.ndarray) -> None:
    if X.shape[0] != len(y):
        raise InputError(f"`{arm.name}`: there must be one label per row; got {X.shape[0]} rows and {len(y)} labels.")
    if len(np.unique(y)) < 2:
        raise InputError(f"`{arm.name}`: training rows must be of at least two classes; they are all of one.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """BLAS on one thread within the block: these products are small, and threads that wait for each other on a machine
    with other work make a fit a hundred times slower.
    """
    from sklearn.utils import parallel

    controller = getattr(parallel, "_get_threadpool_controller", None)
    if controller is None:  # another release of scikit-learn
        yield
        return
    with controller().limit(limits=1):
        yield


def predict_arm(fitted: Fitted, X: Any, n_classes: int) -> Predictions:
    """Predict class probabilities for rows.

    Parameters
    ----------
    fitted
        From `fit_arm`.
    X
        Rows as they were given to `fit_arm`.
    n_classes
        Number of classes; those that the training rows lack get probability 0.
    """
    with _one_thread():
        found = fitted.pipeline.predict_proba(as_matrix(X, fitted.arm))
    probabilities = np.zeros((len(found), n_classes), np.float32)
    probabilities[:, fitted.pipeline.classes_] = found
    return Predictions(probabilities)


def as_matrix(X: Any, arm: Arm) -> Any:
    """Rows as the pipelines take them: CSR float32, contiguous float32, or an array of texts."""
    import scipy.sparse

    if arm.features == "texts":
        texts = np.empty(len(X), dtype=object)
        texts[:] = list(X)
        return texts.reshape(-1, 1) if arm.probe == "majority" else _Texts(texts)
    if scipy.sparse.issparse(X):
        return scipy.sparse.csr_matrix(X, dtype=np.float32)
    return np.ascontiguousarray(X, dtype=np.float32)


class _Texts(Sequence[str]):
    """Texts that can be indexed by rows, and know how many they are, like a matrix."""

    def __init__(self, texts: np.ndarray) -> None:
        self.texts = texts
        self.shape = (len(texts), 0)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, rows: Any) -> Any:
        return self.texts[rows] if isinstance(rows, int | np.integer) else _Texts(self.texts[rows])


def inner_folds(y: np.ndarray, groups: np.ndarray | None, budget: Budget) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and validation rows of the inner folds: stratified by class, groups kept whole.

    Raises
    ------
    DataError
        A class has fewer rows (or groups) than there are folds.
    """
    check_folds(y, groups, budget.inner, INNER.format(budget.inner))
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter: Any = kind(budget.inner, shuffle=True, random_state=_seed(budget))
    return list(splitter.split(np.zeros(len(y)), y, groups))


def _seed(budget: Budget) -> int:
    return budget.seed or 0


# ------------------------------------------------------------------------------------------------------- the fitting


@dataclass(frozen=True, eq=False)
class _Tuned:
    chosen: dict[str, Any]
    score: float
    selections: list[tuple[int, ...]]


def _tune(
    arm: Arm, X: Any, y: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]], budget: Budget, notes: list[str]
) -> _Tuned:
    """Return the settings with the largest mean macro-F1 over the inner folds, the first of equals."""
    grid: Sequence[Any] = budget.C if arm.probe == "logistic" else budget.depths
    name = "C" if arm.probe == "logistic" else "depth"
    settings: dict[str, Any] = {}
    if "binarize" in arm.steps:
        candidates = list(budget.thresholds)
        if len(candidates) > 1:
            middle = grid[len(grid) // 2]
            tried = [_inner(arm, X, y, folds, {"threshold": c}, name, [middle], budget, [])[0][0] for c in candidates]
            candidates = [candidates[int(np.argmax(tried))]]
        settings["threshold"] = candidates[0]
    failed: list[Any] = []
    scores, selections = _inner(arm, X, y, folds, settings, name, grid, budget, failed)
    best = int(np.argmax(scores))
    if failed:
        notes.append(f"{len(failed)} of {len(grid) * len(folds)} inner fits stopped at {budget.max_iter} iterations")
    return _Tuned({**settings, name: grid[best]}, float(scores[best]), selections)


def _inner(
    arm: Arm,
    X: Any,
    y: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    settings: Mapping[str, Any],
    name: str,
    grid: Sequence[Any],
    budget: Budget,
    failed: list[Any],
) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Mean macro-F1 of every value of the grid, and what was selected in each fold."""
    scores = np.zeros((len(folds), len(grid)))
    selections = []
    for fold, (train, validate) in enumerate(folds):
        steps, A = _fit_steps(arm, X[train], y[train], settings, budget, [])
        B = _transform(steps, X[validate])
        selected = _selected(steps)
        if selected is not None:
            selections.append(selected)
        classifier: Any = None
        for place, value in enumerate(grid):
            classifier, converged = _fit_classifier(arm, A, y[train], value, budget, start=classifier)
            if not converged:
                failed.append((fold, value))
            scores[fold, place] = _macro_f1(y[validate], classifier.predict(B))
    return scores.mean(0), selections


def _fit_steps(
    arm: Arm, X: Any, y: np.ndarray, settings: Mapping[str, Any], budget: Budget, notes: list[str]
) -> tuple[list[tuple[str, Any]], Any]:
    """Fit the steps before the classifier on rows; return them and these rows transformed."""
    steps = []
    for name, step in _steps(arm, X, settings, budget):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            X = step.fit_transform(X, y)
        notes += [f"{name}: {str(each.message).splitlines()[0]}" for each in caught]
        steps.append((name, step))
    return steps, X


def _transform(steps: Sequence[tuple[str, Any]], X: Any) -> Any:
    for _, step in steps:
        X = step.transform(X)
    return X


def _steps(arm: Arm, X: Any, settings: Mapping[str, Any], budget: Budget) -> list[tuple[str, Any]]:
    """Unfitted steps of an arm, scaling included."""
    import scipy.sparse
    from sklearn.preprocessing import MaxAbsScaler, StandardScaler

    steps: list[tuple[str, Any]] = []
    for name in arm.steps:
        if name in _SCALED:
            steps.append(("scale", StandardScaler()))
        steps.append((name, _step(name, arm, X, settings, budget)))
    if arm.probe != "logistic" or "words" in arm.steps:
        return steps
    scale = MaxAbsScaler() if scipy.sparse.issparse(X) else StandardScaler()
    return [*steps, ("weigh" if steps and steps[0][0] == "scale" else "scale", scale)]


_SCALED = ("means", "pca", "ica")
"""Steps that stand behind a scaling of the columns."""


def _step(name: str, arm: Arm, X: Any, settings: Mapping[str, Any], budget: Budget) -> Any:
    """One unfitted step."""
    if name == "words":
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(ngram_range=(1, 2), max_features=MAX_WORDS, dtype=np.float32)
    if name == "binarize":
        from ..estimators.binarize import Binarize

        threshold = settings["threshold"]
        return Binarize(**(_MEDIAN if threshold == "median" else {"threshold": float(threshold)}))
    if name == "means":
        from .sklearn_steps import MeanDifference

        return MeanDifference()
    if name in ("select", "match"):
        return _selection(name, arm, X, budget)
    return _components(name, arm, X, budget)


def _most(X: Any) -> int:
    """Return the largest number of columns or components that rows allow."""
    return min(X.shape[0] - 1, X.shape[1]) if X.shape[1] else 0


def _selection(name: str, arm: Arm, X: Any, budget: Budget) -> Any:
    from ..estimators.select import SelectLatents
    from .sklearn_steps import DensityMatched

    k = 1 if arm.k is None else max(1, min(arm.k, _most(X)))
    scores = None if arm.scores is None else np.array(arm.scores)
    if name == "select":
        return SelectLatents(k, scoring=arm.by, scores=scores, random_state=_seed(budget))
    return DensityMatched(k, by=arm.by, scores=scores, seed=_seed(budget))


def _components(name: str, arm: Arm, X: Any, budget: Budget) -> Any:
    from sklearn.decomposition import PCA, FastICA, TruncatedSVD

    k = None if arm.k is None else max(1, min(arm.k, _most(X)))
    if name == "pca":
        return PCA(k, random_state=_seed(budget))
    if name == "svd":
        return TruncatedSVD(max(1, min(k or 1, _most(X) - 1)), random_state=_seed(budget))
    if name == "ica":
        return FastICA(k, whiten="unit-variance", max_iter=500, tol=1e-3, random_state=_seed(budget))
    raise ConfigError(f"an arm's step must be known; got `{name}` in `{arm.name}`.")


_MEDIAN: dict[str, Any] = {"threshold": 0.5, "relative": "quantile"}


def _fit_classifier(arm: Arm, X: Any, y: np.ndarray, value: Any, budget: Budget, *, start: Any) -> tuple[Any, bool]:
    """Fit a classifier on transformed rows; also return whether it converged. `start` is one to continue from."""
    if arm.probe == "majority":
        from sklearn.dummy import DummyClassifier

        return DummyClassifier(strategy="prior").fit(X, y), True
    if arm.probe == "tree":
        from sklearn.tree import DecisionTreeClassifier

        tree = DecisionTreeClassifier(max_depth=value, class_weight="balanced", random_state=_seed(budget))
        return tree.fit(X, y), True
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = start
    if model is None:
        model = LogisticRegression(C=value, tol=budget.tolerance, max_iter=budget.max_iter, warm_start=True)
    model.set_params(C=value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X, y)
    stopped = any(issubclass(each.category, ConvergenceWarning) for each in caught)
    return model, not stopped


def _macro_f1(y: np.ndarray, predicted: np.ndarray) -> float:
    """Macro-F1 over the classes in `y`."""
    n = int(max(y.max(), predicted.max())) + 1
    hits = np.bincount(y[y == predicted], minlength=n)
    true, said = np.bincount(y, minlength=n), np.bincount(predicted, minlength=n)
    here = true > 0
    return float((2 * hits[here] / (true + said)[here]).mean())


# -------------------------------------------------------------------------------------------------------- selections


def _selected(steps: Sequence[tuple[str, Any]]) -> tuple[int, ...] | None:
    """Columns that a fitted selection keeps, best first."""
    for _, step in steps:
        if hasattr(step, "get_support"):
            kept = np.flatnonzero(step.get_support())
            scores = getattr(step, "scores_", None)
            if scores is not None:
                kept = kept[np.argsort(-np.nan_to_num(np.asarray(scores)[kept]), kind="stable")]
            return tuple(int(column) for column in kept)
    return None


def _dead_columns(steps: Sequence[tuple[str, Any]], X: Any, selected: Sequence[int]) -> int:
    """How many of the selected columns are 0 in every row that the selection saw."""
    import scipy.sparse

    if not selected:
        return 0
    for _, step in steps:
        if hasattr(step, "get_support"):
            break
        X = step.transform(X)
    part = X[:, list(selected)]
    fires = np.diff(part.tocsc().indptr) if scipy.sparse.issparse(part) else (part != 0).sum(0)
    return int((np.asarray(fires) == 0).sum())


def _agreement(selections: Sequence[Sequence[int]], n_columns: int) -> dict[str, float] | None:
    if len(selections) < 2 or not n_columns:
        return None
    return selection_stability(selections, n_columns)


def selection_stability(selections: Sequence[Sequence[int]], n_columns: int) -> dict[str, float]:
    """How far selections agree, mean over their pairs.

    ``jaccard``: shared over joint columns. ``kuncheva``: ``(r F - k^2) / (k (F - k))`` for r shared of k selected among
    F columns, 0 for what chance shares and 1 for the same; 1 where k = F.
    """
    jaccard, kuncheva = [], []
    for one, other in combinations([frozenset(each) for each in selections], 2):
        shared, k = len(one & other), max(len(one), len(other), 1)
        jaccard.append(shared / max(len(one | other), 1))
        kuncheva.append((shared * n_columns - k * k) / (k * (n_columns - k)) if k < n_columns else 1.0)
    return {"jaccard": float(np.mean(jaccard)), "kuncheva": float(np.mean(kuncheva))}
