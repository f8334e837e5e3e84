"""Arms of a classification, and how every one of them is fitted: selection inside the folds, one budget for all.

An `Arm` says what stands between a matrix of features and a classifier. `fit_arm` chooses its settings by inner
cross-validation on training rows only (selection, thresholds, components and scaling are fitted within each inner
fold), then fits the whole pipeline once on all training rows. `predict_arm` applies it to test rows.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, did_you_mean, listed
from ..measure.paired_scores import Predictions

KINDS: dict[str, str] = {
    "majority": "the most frequent class, whatever the text",
    "words": "TF-IDF of words and word pairs",
    "last": "hidden state of the last token",
    "dense": "hidden states under every pooling the SAE uses",
    "dense-tree": "the same, shallow decision tree",
    "difference": "difference of class means of the pooled hidden states: one direction per class",
    "pca": "first k principal components of the pooled hidden states",
    "svd": "first k right singular vectors of the pooled hidden states",
    "ica": "k independent components of the pooled hidden states",
    "random": "random directions, TopK: the SAE's width and L0, nothing learned",
    "untrained": "the SAE before training: its width, rule and L0, centred at its bias",
    "frozen": "SAEs given that were trained with a frozen decoder or encoder",
    "full": "all latents",
    "binarized": "all latents, whether they exceed a threshold",
    "sparse": "the k latents that tell the classes apart best",
    "matched": "k random latents, as often active as the k best ones",
    "tree": "all latents, shallow decision tree",
    "binarized-tree": "all latents binarized, shallow decision tree",
}
"""Kinds of arms: what each classifies."""

FAMILIES = ("floor", "words", "dense", "reduced", "control", "sae")

KS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Numbers of latents of the sparse arms."""

CONTROL_KS = (16, 64)
"""Numbers of latents or components at which the costlier controls are made."""

MOST_WORDS = 20_000
"""Words and word pairs of the TF-IDF arm, the most frequent ones."""


@dataclass(frozen=True)
class Budget:
    """What every arm may spend on its settings.

    Parameters
    ----------
    C
        Inverse strengths of the L2 penalty of the logistic regression, increasing.
    depths
        Depths of the decision tree.
    thresholds
        How the binarized arms binarize: a number is absolute, ``median`` is the median of a latent's positive values.
        The threshold is chosen first (at the middle C or depth), then C or depth.
    inner
        Folds of the inner cross-validation.
    max_iter, tolerance
        Of the logistic regression (L-BFGS).
    seed
        Of the inner folds, and of what is random in an arm.
    """

    C: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    depths: tuple[int, ...] = (3, 5, 7, 9)
    thresholds: tuple[float | str, ...] = (0.0, 1.0, "median")
    inner: int = 3
    max_iter: int = 1000
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("C", "depths", "thresholds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.C or any(not c > 0 for c in self.C) or list(self.C) != sorted(set(self.C)):
            raise ConfigError(f"budget: `C` must be increasing positive numbers; got {self.C}.")
        if not self.depths or any(not isinstance(depth, int) or depth < 1 for depth in self.depths):
            raise ConfigError(f"budget: `depths` must be whole numbers from 1; got {self.depths}.")
        if not self.thresholds:
            raise ConfigError("budget: `thresholds` must name at least one; got none.")
        for threshold in self.thresholds:
            if not (threshold == "median" or (isinstance(threshold, int | float) and math.isfinite(threshold))):
                raise ConfigError(f"budget: a threshold must be a number or `median`; got {threshold!r}.")
        if self.inner < 2:
            raise ConfigError(f"budget: `inner` must be at least 2 folds; got {self.inner}.")
        if self.max_iter < 1:
            raise ConfigError(f"budget: `max_iter` must be at least 1; got {self.max_iter}.")


@dataclass(frozen=True)
class Arm:
    """One way to classify.

    Parameters
    ----------
    name
        Unique among arms; what tables call it.
    kind
        One of `KINDS`.
    features
        Name of the matrix that it reads; ``texts`` for the texts themselves.
    probe
        ``logistic``, ``tree`` or ``majority``.
    steps
        What stands before the probe, in order: ``words``, ``binarize``, ``select``, ``match``, ``pca``, ``svd``,
        ``ica``, ``means``.
    k
        Latents or components kept; None for all.
    by
        How ``select`` ranks latents: a name that `SelectLatents` takes, or what `scores` are.
    scores
        One number per latent that was computed elsewhere (stability, importance), the highest are kept; None: rank by
        the labels.
    source, pool
        The SAE (or ``dense``) and the pooling behind the matrix.
    about
        What else tables say about it: layer, latents, ...
    """

    name: str
    kind: str
    features: str = ""
    probe: str = "logistic"
    steps: tuple[str, ...] = ()
    k: int | None = None
    by: str = "mean_difference"
    source: str = ""
    pool: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"an arm must be of a known kind; got `{self.kind}`. {did_you_mean(self.kind, KINDS)}")
        if self.probe not in ("logistic", "tree", "majority"):
            raise ConfigError(f"`probe` must be logistic, tree or majority; got {self.probe!r}.")

    @property
    def family(self) -> str:
        """What it stands for: one of `FAMILIES`."""
        return _FAMILY[self.kind]

    def to_json(self) -> dict[str, Any]:
        """Everything that its result depends on, besides data and budget."""
        plain = asdict(self)
        if plain["scores"] is None:
            del plain["scores"]
        return {**plain, "steps": list(self.steps), "about": dict(self.about)}


_FAMILY = {
    "majority": "floor", "words": "words", "last": "dense", "dense": "dense", "dense-tree": "dense",
    "difference": "reduced", "pca": "reduced", "svd": "reduced", "ica": "reduced", "random": "control",
    "untrained": "control", "frozen": "control", "matched": "control",
    "full": "sae", "binarized": "sae", "sparse": "sae", "tree": "sae", "binarized-tree": "sae",
}  # fmt: skip


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
    if X.shape[0] != len(y):
        raise DataError(f"`{arm.name}`: there must be one label per row; got {X.shape[0]} rows and {len(y)} labels.")
    if len(np.unique(y)) < 2:
        raise DataError(f"`{arm.name}`: training rows must be of at least two classes; they are all of one.")
    notes: list[str] = []
    tuned = _Tuned({}, math.nan, [])
    if chosen is not None:
        tuned = _Tuned(dict(chosen), math.nan, [])
    elif arm.probe != "majority":
        tuned = _tune(arm, X, y, inner_folds(y, groups, budget), budget, notes)
    trained = _train(arm, X, y, tuned.chosen, budget)
    notes += trained.notes
    if chosen is None and arm.probe == "logistic" and len(budget.C) > 1 and tuned.chosen["C"] == budget.C[-1]:
        notes.append(f"C = {budget.C[-1]:g} was chosen, the weakest penalty of the grid: a wider grid may give more")
    selected = _selected(trained.steps)
    if selected is not None:
        dead = _dead_columns(trained.steps, X, selected)
        if dead:
            notes.append(f"{dead} of the {len(selected)} selected columns are 0 in every training row")
    from sklearn.pipeline import Pipeline

    pipeline = Pipeline([*trained.steps, ("classify", trained.classifier)])
    return Fitted(
        arm, pipeline, tuned.chosen, tuned.score, selected, _agreement(tuned.selections, X.shape[1] if selected else 0),
        trained.converged, tuple(notes), time.perf_counter() - since,
    )  # fmt: skip


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
    """What a fitted arm says about rows.

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
    check_folds(y, groups, budget.inner, "inner")
    return _folds(y, groups, budget.inner, budget.seed)


def outer_folds(
    y: np.ndarray, groups: np.ndarray | None, folds: int, seed: int, names: Sequence[str] | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same for the folds that judge arms; `names` of the classes are for messages."""
    check_folds(y, groups, folds, "outer", names)
    return _folds(y, groups, folds, seed)


def _folds(y: np.ndarray, groups: np.ndarray | None, folds: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    if groups is None:
        splitter: Any = StratifiedKFold(folds, shuffle=True, random_state=seed)
        return list(splitter.split(np.zeros(len(y)), y))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return list(splitter.split(np.zeros(len(y)), y, groups))


def check_folds(
    y: np.ndarray, groups: np.ndarray | None, folds: int, which: str, names: Sequence[str] | None = None
) -> None:
    """Refuse folds that a class cannot fill.

    Raises
    ------
    DataError
        See `inner_folds`.
    """
    if len(y) < folds:
        raise DataError(f"there must be at least as many training rows as {which} folds, {folds}; there are {len(y)}.")
    codes, counts = np.unique(y, return_counts=True)
    what = "rows"
    if groups is not None:
        pairs = np.unique(np.stack([y, np.unique(groups, return_inverse=True)[1].ravel()]), axis=1)
        codes, counts = np.unique(pairs[0], return_counts=True)
        what = "groups"
    if counts.min() < folds:
        few = [int(code) for code, count in zip(codes, counts) if count < folds]
        shown = few if names is None else [names[code] for code in few]
        raise DataError(
            f"every class must have at least as many training {what} as there are {which} folds, {folds}; "
            f"{listed(shown)} {'has' if len(few) == 1 else 'have'} fewer. Give more rows, fewer folds, or leave out "
            "the classes that are rare (--min-rows N)."
        )


# ------------------------------------------------------------------------------------------------------- the fitting


@dataclass(frozen=True, eq=False)
class _Tuned:
    chosen: dict[str, Any]
    score: float
    selections: list[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class _Trained:
    steps: list[tuple[str, Any]]
    classifier: Any
    converged: bool
    notes: list[str]


def _tune(
    arm: Arm, X: Any, y: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]], budget: Budget, notes: list[str]
) -> _Tuned:
    """The settings with the largest mean macro-F1 over the inner folds, the first of equals."""
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


def _train(arm: Arm, X: Any, y: np.ndarray, chosen: Mapping[str, Any], budget: Budget) -> _Trained:
    notes: list[str] = []
    steps, A = _fit_steps(arm, X, y, chosen, budget, notes)
    value = chosen.get("C", chosen.get("depth"))
    classifier, converged = _fit_classifier(arm, A, y, value, budget, start=None)
    if not converged:
        notes.append(f"the fit had not converged after {budget.max_iter} iterations (C = {value:g})")
    return _Trained(steps, classifier, converged, notes)


def _fit_steps(
    arm: Arm, X: Any, y: np.ndarray, settings: Mapping[str, Any], budget: Budget, notes: list[str]
) -> tuple[list[tuple[str, Any]], Any]:
    """What stands before the classifier, fitted on rows, and these rows transformed."""
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
    from sklearn.decomposition import PCA, FastICA, TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import MaxAbsScaler, StandardScaler

    from ..estimators.binarize import Binarize
    from ..estimators.select import SelectLatents
    from .sklearn_steps import DensityMatched, MeanDifference

    steps: list[tuple[str, Any]] = []
    most = min(X.shape[0] - 1, X.shape[1]) if X.shape[1] else 0
    k = None if arm.k is None else max(1, min(arm.k, most))
    scores = None if arm.scores is None else np.array(arm.scores)
    for step in arm.steps:
        if step == "words":
            steps.append((step, TfidfVectorizer(ngram_range=(1, 2), max_features=MOST_WORDS, dtype=np.float32)))
        elif step == "binarize":
            threshold = settings["threshold"]
            rule: Any = {"threshold": float(threshold)} if threshold != "median" else _MEDIAN
            steps.append((step, Binarize(**rule)))
        elif step == "select":
            steps.append((step, SelectLatents(k or 1, scoring=arm.by, scores=scores, random_state=budget.seed)))
        elif step == "match":
            steps.append((step, DensityMatched(k or 1, by=arm.by, scores=scores, seed=budget.seed)))
        elif step == "means":
            steps += [("scale", StandardScaler()), (step, MeanDifference())]
        elif step == "pca":
            steps += [("scale", StandardScaler()), (step, PCA(k, random_state=budget.seed))]
        elif step == "svd":
            steps.append((step, TruncatedSVD(max(1, min(k or 1, most - 1)), random_state=budget.seed)))
        elif step == "ica":
            ica = FastICA(k, whiten="unit-variance", max_iter=500, tol=1e-3, random_state=budget.seed)
            steps += [("scale", StandardScaler()), (step, ica)]
        else:
            raise ConfigError(f"an arm's step must be known; got `{step}` in `{arm.name}`.")
    if arm.probe != "logistic" or "words" in arm.steps:
        return steps
    scale = MaxAbsScaler() if scipy.sparse.issparse(X) else StandardScaler()
    return [*steps, ("weigh" if steps and steps[0][0] == "scale" else "scale", scale)]


_MEDIAN = {"threshold": 0.5, "relative": "quantile"}


def _fit_classifier(arm: Arm, X: Any, y: np.ndarray, value: Any, budget: Budget, *, start: Any) -> tuple[Any, bool]:
    """A classifier fitted on transformed rows, and whether it converged; `start` is one to continue from."""
    if arm.probe == "majority":
        from sklearn.dummy import DummyClassifier

        return DummyClassifier(strategy="prior").fit(X, y), True
    if arm.probe == "tree":
        from sklearn.tree import DecisionTreeClassifier

        tree = DecisionTreeClassifier(max_depth=value, class_weight="balanced", random_state=budget.seed)
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
