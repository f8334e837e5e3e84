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
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import combinations, groupby
from typing import Any

import numpy as np

from ..errors import ConfigError, InputError
from ..inputs.split import INNER, balanced_folds, check_folds, draw_rows
from ..measure.paired_scores import Predictions
from .arms import Arm
from .choices import likeliest, resampled_rows, scores_again
from .probes import PROBES, WIDE, WIDEST, Grid, at_the_edge, fit_probe
from .settings import Budget
from .solvers import Rows, leading, narrowed, widen

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
        Macro-F1 (or AUC) of the chosen settings, mean over the inner folds.
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
    labels
        ``int64 [n]`` class that the inner folds said of every training row at the chosen settings, from fits that had
        not seen it; chosen by AUC ``float32 [n]`` its rank within its fold, 0 to 1. None where nothing was chosen.
    finalists
        What could have been chosen instead (another hyperparameter, in a search another arm or a vote), fitted, best
        first; a vote may have a higher score than the arm.
    voters
        Arms of a vote, fitted, whose class probabilities are averaged; empty for an arm.
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
    labels: np.ndarray | None = None
    finalists: tuple[Fitted, ...] = ()
    voters: tuple[Fitted, ...] = ()


def fit_arm(
    arm: Arm,
    X: Any,
    y: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    budget: Budget | None = None,
    chosen: Mapping[str, Any] | None = None,
    metric: str = "macro_f1",
) -> Fitted:
    """Choose the settings of an arm within the training rows, and fit it on all of them.

    Parameters
    ----------
    arm
        What to fit.
    X
        Training rows: a CSR matrix, an array ``[n, d]``, or for the arm of words an array of texts; for a search these
        by the `features` of its candidates.
    y
        ``int64 [n]`` class codes.
    groups
        ``[n]``; rows of one group stay in one inner fold.
    budget
        What it may spend.
    chosen
        Settings to use instead of choosing any.
    metric
        What the inner folds choose by: ``macro_f1``, or ``auc`` for two classes.

    Raises
    ------
    DataError
        One class, NaN, fewer rows of a class (or groups) than inner folds, another number of rows than labels.
    """
    with _one_thread():
        return _fit_arm(arm, X, y, groups, budget or Budget(), chosen, metric)


def _fit_arm(
    arm: Arm,
    X: Any,
    y: np.ndarray,
    groups: np.ndarray | None,
    budget: Budget,
    chosen: Mapping[str, Any] | None,
    metric: str,
) -> Fitted:
    y = np.asarray(y, dtype=np.int64)
    if arm.candidates and chosen is None:
        return search_arm(arm, X, y, groups, budget, metric)
    if arm.candidates:
        assert chosen is not None
        settings = dict(chosen)
        found = arm.candidate(settings.pop("arm"))
        return _fit_arm(found, X[found.features], y, groups, budget, settings, metric)
    since = time.perf_counter()
    X = as_matrix(X, arm)
    _check_rows(arm, X, y)
    if chosen is not None or arm.probe == "majority":
        fitted = refit_arm(arm, X, y, Tuned(dict(chosen or {})), budget)
    else:
        tuned = tune_arm(arm, X, y, inner_folds(y, groups, budget), budget, metric=metric)
        fitted = _fit_likeliest([(arm, tuned)], {arm.features: X}, y, groups, budget, metric)
    return replace(fitted, seconds=time.perf_counter() - since)


def _fit_likeliest(
    tuned: Sequence[tuple[Arm, Tuned]],
    matrices: Mapping[str, Any],
    y: np.ndarray,
    groups: np.ndarray | None,
    budget: Budget,
    metric: str,
    votes: Sequence[Vote] = (),
) -> Fitted:
    """Return the arm with the highest score in the inner folds, fitted, with what could have been chosen instead.

    That is the best vote, and what is chosen most often when training rows (groups) are resampled: other arms, other
    values of the hyperparameter, between which the inner folds often hardly tell while test rows do, and votes. Where a
    vote is the best choice, the arm has the notes of all that vote.
    """
    options = [(arm, each) for arm, found in tuned for each in (found, *found.others)]
    options.sort(key=lambda pair: -pair[1].score)  # stable: the first of equals
    scores = [each.score for _, each in options] + [each.score for each in votes]
    best = int(np.argmax(scores))
    kept = {0, best}
    if budget.finalists > 1:
        said = [each.labels for _, each in options if each.labels is not None] + [each.labels for each in votes]
        weights = resampled_rows(groups, len(y), (_seed(budget), 37))
        kept |= set(likeliest(scores_again(y, scores, said, weights, metric), budget.finalists))
    ready: dict[tuple[Any, ...], Ready] = {}
    places = {id(each): at for at, (_, each) in enumerate(options)}

    @cache
    def fitted(at: int) -> Fitted:
        if at >= len(options):
            vote = votes[at - len(options)]
            return vote.of([fitted(places[id(each)]) for _, each in vote.voters])
        arm, each = options[at]
        X = matrices[arm.features]
        if arm.representation not in ready:
            ready[arm.representation] = _ready(arm, X, y, each.chosen, budget)
        return refit_arm(arm, X, y, each, budget, ready[arm.representation])

    finalists = tuple(fitted(at) for at in sorted(kept - {0}, key=lambda at: -scores[at]))
    told = (fitted(0), *fitted(best).voters)
    notes = tuple(dict.fromkeys(note for each in told for note in each.notes))
    return replace(fitted(0), finalists=finalists, notes=notes, converged=all(each.converged for each in told))


def fit_smallest(
    arms: Sequence[Arm], X: Any, y: np.ndarray, *, groups: np.ndarray | None, budget: Budget, margin: float
) -> tuple[Fitted, dict[str, float]]:
    """Fit the first of several arms that comes within a margin of the best of them, by inner cross-validation.

    Parameters
    ----------
    arms
        Arms of one matrix, in the order of preference.
    X, y, groups, budget
        As for `fit_arm`.
    margin
        Macro-F1 that may be lost.

    Returns
    -------
    fitted, inner
        The arm, and the mean macro-F1 in the inner folds of all, by name.
    """
    with _one_thread():
        X, y = as_matrix(X, arms[0]), np.asarray(y, dtype=np.int64)
        _check_rows(arms[0], X, y)
        folds = inner_folds(y, groups, budget)
        tuned = {each.name: tune_arm(each, X, y, folds, budget) for each in arms}
        inner = {name: each.score for name, each in tuned.items()}
        best = max(inner.values())
        found = next(each for each in arms if inner[each.name] >= best - margin)
        return refit_arm(found, X, y, tuned[found.name], budget), inner


def refit_arm(arm: Arm, X: Any, y: np.ndarray, tuned: Tuned, budget: Budget, ready: Ready | None = None) -> Fitted:
    """Fit an arm on all training rows with settings that are known, and steps where they are fitted already."""
    from sklearn.pipeline import Pipeline

    probe, notes = PROBES[arm.probe], list(tuned.notes)
    if tuned.decisions is not None:
        from .sklearn_steps import slope_of

        tuned = replace(tuned, chosen={**tuned.chosen, "slope": slope_of(tuned.decisions, _columns_of(y))})
    found = _ready(arm, X, y, tuned.chosen, budget) if ready is None else ready
    steps, notes = list(found.steps), [*notes, *found.warned]
    value = tuned.chosen.get(probe.setting)
    if probe.is_warm:
        classifier, converged = fit_probe(arm.probe, found.narrowed.X, y, value, budget)
        widen(classifier, found.narrowed, found.rows)
    else:
        more, A = found.reduced if arm.probe == "lda" else ([], found.rows.X)
        steps += more
        classifier, converged = fit_probe(arm.probe, A, y, value, budget)
    if not converged:
        notes.append(f"the fit had not converged after {budget.max_iter} iterations ({probe.setting} = {value:g})")
    if probe.is_margin:
        from .sklearn_steps import Margins

        classifier = Margins(classifier, tuned.chosen.get("slope", 1.0))
    selected = _selected(steps)
    dead = _dead_columns(steps, X, selected or ())
    if dead:
        notes.append(f"{dead} of the {len(selected or ())} selected columns are 0 in every training row")
    return Fitted(
        arm, Pipeline([*steps, ("classify", classifier)]), tuned.chosen, tuned.score, selected,
        _agreement(tuned.selections, X.shape[1] if selected else 0), converged, tuple(notes), 0.0, tuned.labels,
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
    if fitted.voters:
        return Predictions(np.mean([predict_arm(each, X, n_classes).probabilities for each in fitted.voters], axis=0))
    if isinstance(X, Mapping):
        X = X[fitted.arm.features]
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
    """Training and validation rows of the inner folds: stratified by class; groups of any size are kept whole and dealt
    out as the outer split deals them out.

    Raises
    ------
    DataError
        A class has fewer rows (or groups) than there are folds.
    """
    check_folds(y, groups, budget.inner, INNER.format(budget.inner))
    if groups is not None:
        fold = balanced_folds(groups, y, np.full(budget.inner, 1 / budget.inner), _seed(budget))
        return [(np.flatnonzero(fold != part), np.flatnonzero(fold == part)) for part in range(budget.inner)]
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(budget.inner, shuffle=True, random_state=_seed(budget))
    return list(splitter.split(np.zeros(len(y)), y))


def _seed(budget: Budget) -> int:
    return budget.seed or 0


# ------------------------------------------------------------------------------------------------------- the fitting


Folds = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Tuned:
    """Settings that the inner folds chose."""

    chosen: dict[str, Any]
    score: float = math.nan
    """Mean macro-F1 or AUC over the inner folds."""
    selections: list[tuple[int, ...]] = field(default_factory=list)
    labels: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    decisions: np.ndarray | None = None
    """``[n, n_classes]`` decision values of the training rows, of a probe without probabilities."""
    probabilities: np.ndarray | None = None
    """``[n, n_classes]`` of the training rows, where they were asked for."""
    others: tuple[Tuned, ...] = ()
    """The other values of the hyperparameter that were tried, likewise."""


def named(tuned: Tuned, arm: str) -> Tuned:
    """Return settings, also those that were not chosen, with the name of the candidate that they are of."""
    others = tuple(named(each, arm) for each in tuned.others)
    return replace(tuned, chosen={"arm": arm, **tuned.chosen}, others=others)


def tune_arm(
    arm: Arm,
    X: Any,
    y: np.ndarray,
    folds: Folds,
    budget: Budget,
    shared: Sequence[_Fold] | None = None,
    metric: str = "macro_f1",
    *,
    votes: bool = False,
) -> Tuned:
    """Return the settings with the highest mean score over the inner folds, the first of equals.

    Parameters
    ----------
    arm, y, budget
        As for `fit_arm`.
    X
        From `as_matrix`.
    folds
        From `inner_folds`.
    shared
        Rows of these folds with the steps of the arm, where another arm of its representation has fitted them.
    metric
        As for `fit_arm`.
    votes
        Keep the probabilities of the chosen settings.
    """
    probe = PROBES[arm.probe]
    settings = _threshold(arm, X, y, folds, budget, metric) if "binarize" in arm.steps else {}
    within = _Inner(arm, y, shared or _fitted_folds(arm, X, y, folds, settings, budget), budget, metric, votes)
    grid = Grid(probe, budget)
    for value in probe.values(budget):
        grid.scores[value] = within.score(value)
        if grid.is_past:
            break
    while (value := grid.wider()) is not None:
        grid.scores[value] = within.score(value)
    notes = []
    if grid.edge:
        notes.append(at_the_edge(probe, grid.best, list(grid.scores), grid.edge))
    if within.failed:
        n_fits = len(grid.scores) * len(folds)
        notes.append(f"{within.failed} of {n_fits} inner fits stopped at {budget.max_iter} iterations")

    def tuned(value: Any) -> Tuned:
        chosen = {**settings, probe.setting: value}
        labels, decisions = within.labels[value], within.decisions.get(value)
        return Tuned(chosen, grid.scores[value], within.selections, labels, tuple(notes), decisions)

    others = tuple(tuned(value) for value in sorted(grid.scores) if value != grid.best)
    return replace(tuned(grid.best), others=others, probabilities=within.probabilities(grid.best) if votes else None)


def _threshold(arm: Arm, X: Any, y: np.ndarray, folds: Folds, budget: Budget, metric: str) -> dict[str, Any]:
    """Return the threshold with the highest score at the middle value of the probe."""
    values, scores = PROBES[arm.probe].values(budget), [0.0]
    if len(budget.thresholds) > 1:
        fitted = (_fitted_folds(arm, X, y, folds, {"threshold": each}, budget) for each in budget.thresholds)
        scores = [_Inner(arm, y, each, budget, metric).score(values[len(values) // 2]) for each in fitted]
    return {"threshold": budget.thresholds[int(np.argmax(scores))]}


@dataclass(frozen=True, eq=False)
class _Fold:
    """An inner fold with the steps of a representation, fitted on its training rows."""

    train: np.ndarray
    validate: np.ndarray
    rows: Rows
    """Its training rows behind the steps; the others are its validation rows."""
    selected: tuple[int, ...] | None
    seed: int

    @cached_property
    def narrowed(self) -> Rows:
        """Both on fewer columns, for a probe with a penalty on the length of its weights; as exact as they came."""
        found = narrowed(self.rows)
        dtype = self.rows.X.dtype
        return Rows(found.X.astype(dtype, copy=False), found.others.astype(dtype, copy=False))

    @cached_property
    def reduced(self) -> Rows:
        """Both on the columns that linear discriminant analysis takes."""
        step = _reduction(self.rows.X, self.seed)
        if step is None:
            return self.rows
        found = leading(self.rows, step.n_components)
        return found or Rows(step.fit_transform(self.rows.X), step.transform(self.rows.others))


def _fitted_folds(
    arm: Arm, X: Any, y: np.ndarray, folds: Folds, settings: Mapping[str, Any], budget: Budget
) -> list[_Fold]:
    """Fit the steps of an arm within every inner fold."""
    found = []
    for train, validate in folds:
        steps, A, _ = _fit_steps(arm, X[train], y[train], settings, budget)
        rows = Rows(A, _transform(steps, X[validate]))
        found.append(_Fold(train, validate, rows, _selected(steps), _seed(budget)))
    return found


class _Inner:
    """The inner folds of an arm, on which values of a hyperparameter are tried."""

    def __init__(
        self, arm: Arm, y: np.ndarray, folds: Sequence[_Fold], budget: Budget, metric: str, votes: bool = False
    ) -> None:
        self.is_auc, self.votes = metric == "auc", votes
        self.probe, self.name, self.y, self.rows, self.budget = PROBES[arm.probe], arm.probe, y, folds, budget
        self.selections = [fold.selected for fold in folds if fold.selected is not None]
        self.folds = [self._columns(fold) for fold in folds]
        solver = self.probe.solver
        self.solvers = [None if solver is None else solver(A, y[fold.train]) for A, fold in zip(self.folds, folds)]
        self.failed, self.largest = 0, None
        self.models: list[Any] = [None] * len(folds)
        self.labels: dict[Any, np.ndarray] = {}
        self.decisions: dict[Any, np.ndarray] = {}
        self.said: dict[Any, np.ndarray] = {}

    def _columns(self, fold: _Fold) -> Rows:
        if self.name == "lda":
            return fold.reduced
        return fold.narrowed if self.probe.is_warm else fold.rows

    def score(self, value: Any) -> float:
        """Return the mean score of a value; larger values go on from the fits of smaller ones."""
        from .sklearn_steps import decision_values

        is_larger = self.largest is None or value > self.largest
        scores, labels = [], np.zeros(len(self.y), np.float32 if self.is_auc else np.int64)
        if self.probe.is_margin:
            self.decisions[value] = np.zeros((len(self.y), len(np.unique(self.y))))
        elif self.votes:
            self.said[value] = np.zeros((len(self.y), len(np.unique(self.y))), np.float32)
        for at, (columns, rows) in enumerate(zip(self.folds, self.rows)):
            model, B = self._fitted(at, value, self.models[at] if is_larger else None), columns.others
            labels[rows.validate] = _ranks(model, B) if self.is_auc else model.predict(B)
            scores.append((_auc if self.is_auc else _macro_f1)(self.y[rows.validate], labels[rows.validate]))
            if self.probe.is_margin:
                self._keep(self.decisions[value], rows.validate, model, decision_values(model, B))
            elif self.votes:
                self._keep(self.said[value], rows.validate, model, _probabilities(model, B))
            if is_larger:
                self.models[at] = model
        self.largest = value if is_larger else self.largest
        self.labels[value] = labels
        return float(np.mean(scores))

    def _keep(self, kept: np.ndarray, rows: np.ndarray, model: Any, said: np.ndarray) -> None:
        """Keep what a model says about rows; of a class that it has not seen, groups allowing no better, less than of
        any other.
        """
        if self.probe.is_margin:
            kept[rows] = said.min(axis=1, keepdims=True) - 1
        kept[np.ix_(rows, np.searchsorted(np.unique(self.y), model.classes_))] = said

    def probabilities(self, value: Any) -> np.ndarray:
        """Return what a value says about the training rows, ``[n, n_classes]``."""
        if value in self.said:
            return self.said[value]
        from .sklearn_steps import probabilities_of, slope_of

        decisions = self.decisions[value]
        return probabilities_of(decisions, slope_of(decisions, _columns_of(self.y)))

    def _fitted(self, at: int, value: Any, start: Any) -> Any:
        solver = self.solvers[at]
        if solver is not None:
            return solver(value)
        y = self.y[self.rows[at].train]
        model, converged = fit_probe(self.name, self.folds[at].X, y, value, self.budget, start=start)
        self.failed += not converged
        return model


def _columns_of(y: np.ndarray) -> np.ndarray:
    """Return the columns of decision values that class codes have."""
    return np.asarray(np.unique(y, return_inverse=True)[1])


Steps = tuple[list[tuple[str, Any]], Any, list[str]]
"""Fitted steps, the rows that they were fitted on behind them, and what they warned of."""


def _fit_steps(arm: Arm, X: Any, y: np.ndarray, settings: Mapping[str, Any], budget: Budget) -> Steps:
    """Fit the steps before the classifier on rows."""
    steps, notes = [], []
    for name, step in _steps(arm, X, settings, budget):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            X = step.fit_transform(X, y)
        notes += [f"{name}: {str(each.message).splitlines()[0]}" for each in caught]
        steps.append((name, step))
    return steps, X, notes


@dataclass(frozen=True, eq=False)
class Ready:
    """All training rows behind the steps of a representation, for every probe that is fitted on them."""

    steps: list[tuple[str, Any]]
    """Fitted."""
    rows: Rows
    warned: list[str]
    seed: int

    @cached_property
    def narrowed(self) -> Rows:
        """The rows on fewer columns, for a probe with a penalty on the length of its weights."""
        return narrowed(self.rows)

    @cached_property
    def reduced(self) -> tuple[list[tuple[str, Any]], Any]:
        """The step that puts the rows on the columns that linear discriminant analysis takes, if any, and these."""
        step = _reduction(self.rows.X, self.seed)
        return ([], self.rows.X) if step is None else ([("reduce", step)], fit_reduction(step, self.rows))


def _ready(arm: Arm, X: Any, y: np.ndarray, settings: Mapping[str, Any], budget: Budget) -> Ready:
    steps, A, warned = _fit_steps(arm, X, y, settings, budget)
    return Ready(steps, Rows(A), warned, _seed(budget))


def fit_reduction(step: Any, rows: Rows) -> Any:
    """Fit a reduction from products of the rows where there are few enough, else by its own means; return the rows."""
    X, found = rows.X, leading(rows, step.n_components)
    if found is None:
        return step.fit_transform(X)
    A = found.X
    lengths = np.linalg.norm(A, axis=0)
    step.components_, step.n_features_in_ = np.asarray(X.T @ (A / lengths**2), dtype=X.dtype).T, X.shape[1]
    step.singular_values_, step.explained_variance_ = lengths, A.var(axis=0)
    return A.astype(X.dtype)


def _reduction(X: Any, seed: int) -> Any:
    """Return the step that puts sparse or wide rows on few columns for linear discriminant analysis; None of others."""
    import scipy.sparse
    from sklearn.decomposition import TruncatedSVD

    if not scipy.sparse.issparse(X) and X.shape[1] <= WIDEST:
        return None
    return TruncatedSVD(max(1, min(WIDE, X.shape[0] - 1, X.shape[1] - 1)), random_state=seed)


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
    if arm.probe in ("majority", "tree") or arm.features == "texts":
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
    if name == "characters":
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(
            analyzer="char_wb", ngram_range=(2, 4), max_features=MAX_WORDS, sublinear_tf=True, dtype=np.float32
        )
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


def _macro_f1(y: np.ndarray, predicted: np.ndarray) -> float:
    """Macro-F1 over the classes in `y`."""
    n = int(max(y.max(), predicted.max())) + 1
    hits = np.bincount(y[y == predicted], minlength=n)
    true, said = np.bincount(y, minlength=n), np.bincount(predicted, minlength=n)
    here = true > 0
    return float((2 * hits[here] / (true + said)[here]).mean())


def _probabilities(model: Any, X: Any) -> np.ndarray:
    """Return class probabilities, also of a linear discriminant that was solved for."""
    from .sklearn_steps import decision_values, probabilities_of

    return model.predict_proba(X) if hasattr(model, "predict_proba") else probabilities_of(decision_values(model, X), 1)


def _ranks(model: Any, X: Any) -> np.ndarray:
    """Return the mid-rank of every row by what a classifier of two classes says of the second, between 0 and 1."""
    from scipy.stats import rankdata

    from .sklearn_steps import decision_values

    said = decision_values(model, X) if hasattr(model, "decision_function") else model.predict_proba(X)
    return np.asarray((rankdata(said[:, 1] - said[:, 0]) - 0.5) / len(said))


def _auc(y: np.ndarray, ranks: np.ndarray) -> float:
    """AUC from mid-ranks between 0 and 1, larger for class 1; 0.5 where a fold of few groups holds one class only."""
    second = y == 1
    n, m = len(y), int(second.sum())
    if m in (0, n):
        return 0.5
    return float((n * ranks[second].sum(dtype=np.float64) - m * m / 2) / (m * (n - m)))


# ---------------------------------------------------------------------------------------------------------- a search


def search_arm(
    arm: Arm, X: Mapping[str, Any], y: np.ndarray, groups: np.ndarray | None, budget: Budget, metric: str
) -> Fitted:
    """Return the candidate with the highest score in the inner folds, fitted, with what could have been chosen instead:
    other candidates, and votes of several.

    First every representation (pooling, components) stands with a ridge classifier on a sample of the training rows;
    the best `Budget.keep` go on. All their probes are then tuned on all training rows, and `Budget.finalists` choices
    are fitted.
    """
    since = time.perf_counter()
    matrices = {each.features: as_matrix(X[each.features], each) for each in arm.candidates}
    for each in arm.candidates:
        _check_rows(each, matrices[each.features], y)
    kept = _screened(arm.candidates, matrices, y, groups, budget, metric)
    folds = inner_folds(y, groups, budget)
    tuned = []
    for _, same in groupby(kept, key=lambda each: each.representation):
        first, *others = same
        shared = _fitted_folds(first, matrices[first.features], y, folds, {}, budget)
        for each in (first, *others):
            found = tune_arm(each, matrices[each.features], y, folds, budget, shared, metric, votes=arm.voters > 1)
            tuned.append((each, named(found, each.name)))
    votes = _votes(tuned, y, folds, arm.voters, metric)
    fitted = _fit_likeliest(tuned, matrices, y, groups, budget, metric, votes)
    return replace(fitted, seconds=time.perf_counter() - since)


@dataclass(frozen=True, eq=False)
class Vote:
    """Several arms, each at its chosen settings, whose class probabilities are averaged."""

    voters: tuple[tuple[Arm, Tuned], ...]
    score: float
    """Mean macro-F1 or AUC over the inner folds."""
    labels: np.ndarray
    """What the inner folds say about the training rows, as of an arm."""

    @property
    def name(self) -> str:
        """``mean, lda & ridge & max, lda``: a representation is named once."""
        words: list[str] = []
        before = ""
        for arm, _ in self.voters:
            representation = arm.name.removesuffix(f", {arm.probe}")
            words.append(arm.probe if representation == before else arm.name)
            before = representation
        return " & ".join(words)

    def of(self, voters: Sequence[Fitted]) -> Fitted:
        """Return the vote with its arms fitted."""
        return Fitted(
            voters[0].arm, None, {"arm": self.name}, self.score, None, None, True, (), 0.0, self.labels,
            voters=tuple(voters),
        )  # fmt: skip


def _votes(tuned: Sequence[tuple[Arm, Tuned]], y: np.ndarray, folds: Folds, most: int, metric: str) -> list[Vote]:
    """Return the votes of 2 to `most` arms: the best one, joined by that with which the vote scores highest, and so on.

    Ensemble selection (Caruana et al. 2004) without repetition.
    """
    left = list(tuned)
    joined = [left.pop(max(range(len(left)), key=lambda at: left[at][1].score))]
    found = []
    while left and len(joined) < most:
        tried = [_vote([*joined, each], y, folds, metric) for each in left]
        best = max(range(len(left)), key=lambda at: tried[at].score)
        joined.append(left.pop(best))
        found.append(tried[best])
    return found


def _vote(voters: Sequence[tuple[Arm, Tuned]], y: np.ndarray, folds: Folds, metric: str) -> Vote:
    from scipy.stats import rankdata

    said = np.mean([np.asarray(tuned.probabilities) for _, tuned in voters], axis=0)
    if metric == "macro_f1":
        labels = np.unique(y)[said.argmax(1)]
        scores = [_macro_f1(y[rows], labels[rows]) for _, rows in folds]
    else:
        labels = np.zeros(len(y), np.float32)
        for _, rows in folds:
            labels[rows] = (rankdata(said[rows, 1]) - 0.5) / len(rows)
        scores = [_auc(y[rows], labels[rows]) for _, rows in folds]
    return Vote(tuple(voters), float(np.mean(scores)), labels)


def _screened(
    candidates: Sequence[Arm],
    X: Mapping[str, Any],
    y: np.ndarray,
    groups: np.ndarray | None,
    budget: Budget,
    metric: str,
) -> list[Arm]:
    """Return the candidates of the most promising representations."""
    first = {each.representation: each for each in reversed(candidates)}
    if budget.keep is None or len(first) <= budget.keep:
        return list(candidates)
    rows, folds = _screening_rows(y, groups, budget)
    few = replace(budget, widen=0)
    scores = {
        key: tune_arm(replace(each, probe="ridge"), X[each.features][rows], y[rows], folds, few, metric=metric).score
        for key, each in sorted(first.items(), key=lambda pair: candidates.index(pair[1]))
    }
    best = sorted(scores, key=lambda key: -scores[key])[: budget.keep]
    return [each for each in candidates if each.representation in best]


def _screening_rows(y: np.ndarray, groups: np.ndarray | None, budget: Budget) -> tuple[np.ndarray, Folds]:
    """Return the rows that representations are screened on, and inner folds of them."""
    keys = [str(row) for row in range(len(y))] if groups is None else [str(group) for group in groups]
    rows = draw_rows(keys, y, budget.screen_rows, is_grouped=groups is not None, seed=_seed(budget))
    try:
        return rows, inner_folds(y[rows], None if groups is None else groups[rows], budget)
    except InputError:  # a rare class is not in the sample often enough
        return np.arange(len(y)), inner_folds(y, groups, budget)


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
