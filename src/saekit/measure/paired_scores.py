"""How good predictions are: metrics of all resamples of the test rows at once, paired between arms.

Nothing is fitted again: a resample is a vector of row weights, every metric is a function of weighted counts, and all
resamples of one metric are a product of matrices. Arms scored with the same `PairedBootstrap` share its resamples, so
the difference of two is a paired one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError, DataError
from .bootstrap import LEVEL, Estimate
from .results import Measured

DRAWS = 2000
"""Resamples of the test rows by default."""

MARGIN = 0.01
"""Differences of macro-F1 smaller than this count as none, by default. Unit: macro-F1."""

VERDICTS = ("better", "equivalent", "worse", "undecided")

METRIC_NAMES = ("macro_f1", "auc", "balanced_accuracy", "accuracy", "brier")

MANY_CLASSES = 10
"""With more classes than this, AUC is computed on fewer resamples."""

AUC_DRAWS = 500
"""Resamples of AUC with many classes: it is a mean over classes, and each costs a product of matrices."""

_CHUNK_NUMBERS = 2**21  # weights converted at a time
_FEW_CLASSES = 4  # up to here sorting is faster than a product of matrices


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier said about test rows.

    Parameters
    ----------
    probabilities
        ``float32 [n, n_classes]``; column c belongs to class code c.
    labels
        ``int64 [n]`` predicted class codes; by default the most probable class, the first of equals.
    """

    probabilities: np.ndarray
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.labels):
            object.__setattr__(self, "labels", self.probabilities.argmax(1))


@dataclass(frozen=True, eq=False)
class PairedBootstrap:
    """Resamples of test rows, stratified by class (and fold), or of whole groups.

    Parameters
    ----------
    y
        ``int64 [n]`` true class codes.
    folds
        ``int64 [n]`` which classifier scored a row; AUC compares rows of one fold only.
    counts
        ``uint16 [draws, n]`` how often each row is drawn.
    unit
        Resampling unit: ``rows`` or ``groups``.
    """

    y: np.ndarray
    folds: np.ndarray
    counts: np.ndarray
    unit: str

    @classmethod
    def over(
        cls,
        y: np.ndarray,
        *,
        groups: np.ndarray | None = None,
        folds: np.ndarray | None = None,
        draws: int = DRAWS,
        seed: int = 0,
    ) -> PairedBootstrap:
        """Draw the resamples.

        Parameters
        ----------
        y
            True class codes ``[n]``.
        groups
            Rows of one group are drawn together. Groups that hold the same classes in the same folds are one stratum;
            strata of a single group are drawn together.
        folds
            See the class.
        draws
            Number of resamples; 0 for no intervals.
        seed
            Random seed of a separate generator: the same seed over the same rows gives the same resamples.
        """
        y = np.asarray(y, dtype=np.int64)
        folds = np.zeros(len(y), np.int64) if folds is None else np.asarray(folds, dtype=np.int64)
        generator = np.random.Generator(np.random.PCG64(seed))
        unit_of = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1].ravel()
        drawn = np.zeros((draws, int(unit_of.max(initial=-1)) + 1), np.uint16)
        for members in _strata(y, folds, unit_of):
            even = np.full(len(members), 1 / len(members))
            drawn[:, members] = generator.multinomial(len(members), even, size=draws)
        return cls(y, folds, drawn[:, unit_of], "rows" if groups is None else "groups")

    @property
    def draws(self) -> int:
        """Number of resamples."""
        return len(self.counts)

    def weights(self) -> Iterator[np.ndarray]:
        """Return the rows as they are (weights 1), then the resamples, ``float32 [some, n]`` at a time."""
        yield np.ones((1, len(self.y)), np.float32)
        step = max(_CHUNK_NUMBERS // max(len(self.y), 1), 16)
        for start in range(0, self.draws, step):
            yield self.counts[start : start + step].astype(np.float32)


def _strata(y: np.ndarray, folds: np.ndarray, unit_of: np.ndarray) -> list[np.ndarray]:
    """Units (rows or groups) that are drawn among each other."""
    n_units = int(unit_of.max(initial=-1)) + 1
    signs: list[set[tuple[int, int]]] = [set() for _ in range(n_units)]
    for unit, fold, label in zip(unit_of.tolist(), folds.tolist(), y.tolist()):
        signs[unit].add((fold, label))
    strata: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for unit, sign in enumerate(signs):
        strata.setdefault(tuple(sorted(sign)), []).append(unit)
    lonely = [members[0] for members in strata.values() if len(members) == 1]
    together = [members for members in strata.values() if len(members) > 1]
    return [np.array(members) for members in (*together, lonely) if members]


@dataclass(frozen=True, eq=False)
class Scores:
    """Metrics of one classifier with their resamples.

    ``macro_f1``: mean over classes of ``2 tp / (true + predicted)``; ``auc``: area under the ROC curve with ties as
    halves, for more than two classes the mean of one against the rest, in several folds the mean over folds;
    ``balanced_accuracy``: mean over classes of ``tp / true``; ``accuracy``; ``brier``: mean squared error of the
    probabilities, summed over classes (for two classes, of one). Classes without rows in the test set, or in a
    resample, do not count.
    """

    estimates: Mapping[str, Estimate]

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def measured(self, name: str) -> Measured:
        """One metric with its interval."""
        most = 2.0 if name == "brier" else 1.0
        return self.estimates[name].measured(_UNITS.get(name, "fraction"), least=0.0, most=most)

    def difference(self, other: Scores, name: str = "macro_f1") -> Measured:
        """Minus `other`, over the same resamples; exactly 0 for equal predictions."""
        return self[name].minus(other[name]).measured(_UNITS.get(name, "fraction"), least=-1.0, most=1.0)

    def p_value(self, other: Scores, name: str = "macro_f1") -> float:
        """Two-sided bootstrap p-value of no difference, in ``(0, 1]``; NaN without resamples."""
        draws = self[name].minus(other[name]).draws
        if draws is None or not len(draws):
            return math.nan
        smaller = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
        return min(1.0, 2 * (1 + smaller) / (1 + len(draws)))


_UNITS = {"auc": "area", "brier": "squared error"}


def score(predictions: Predictions, bootstrap: PairedBootstrap, names: Sequence[str] = METRIC_NAMES) -> Scores:
    """Score predictions of the rows of `bootstrap`.

    Parameters
    ----------
    predictions
        One row per test row.
    bootstrap
        The true classes and the resamples.
    names
        Metrics to compute.

    Raises
    ------
    DataError
        Another number of rows, or probabilities that are not finite.
    """
    y, probabilities = bootstrap.y, np.asarray(predictions.probabilities, dtype=np.float64)
    _check_predictions(predictions, len(y))
    n_classes = probabilities.shape[1]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    counted = _Counted(y, np.asarray(predictions.labels), probabilities, n_classes)
    areas = _areas(y, probabilities, bootstrap.folds) if "auc" in found else []
    for weights in bootstrap.weights():
        for name, values in counted(weights).items():
            if name in found:
                found[name].append(values)
        if areas:
            room = (1 + AUC_DRAWS if n_classes > MANY_CLASSES else 1 + bootstrap.draws) - sum(map(len, found["auc"]))
            if room > 0:
                found["auc"].append(_mean_area(areas, weights[:room]))
        elif "auc" in found:
            found["auc"].append(np.full(len(weights), math.nan))
    return Scores({name: _estimate(np.concatenate(values), name) for name, values in found.items()})


def _check_predictions(predictions: Predictions, n_rows: int) -> None:
    """Refuse predictions of another number of rows, or probabilities that are not finite."""
    if len(predictions.probabilities) != n_rows or len(predictions.labels) != n_rows:
        raise DataError(f"predictions must be of the {n_rows} test rows; got {len(predictions.probabilities)}.")
    if not np.isfinite(predictions.probabilities).all():
        raise DataError("predicted probabilities must be finite; some are NaN or infinite. Did the fit converge?")


def _estimate(values: np.ndarray, name: str) -> Estimate:
    value, draws = float(values[0]), values[1:]
    if math.isnan(value):
        return Estimate(value, None, "undefined: it needs two classes in the test set")
    if not len(draws):
        return Estimate(value, None, "no interval asked for")
    if np.isnan(draws).any():
        return Estimate(value, None, f"no interval: {name} is undefined in some resamples")
    return Estimate(value, draws)


class _Counted:
    """Metrics that are functions of weighted counts."""

    def __init__(self, y: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, n_classes: int) -> None:
        import scipy.sparse

        rows = np.arange(len(y))
        hit = labels == y
        columns = np.concatenate([y[hit], labels + n_classes, y + 2 * n_classes])
        places = np.concatenate([rows[hit], rows, rows])
        shape = (len(y), 3 * n_classes)
        ones = np.ones(len(columns), np.float32)
        self.marks = scipy.sparse.csr_array((ones, (places, columns)), shape=shape)
        error = ((probabilities - np.eye(n_classes)[y]) ** 2).sum(1)
        self.error = error / 2 if n_classes == 2 else error
        self.n_classes = n_classes

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every metric of each row of weights."""
        K = self.n_classes
        counts = np.asarray(self.marks.T @ weights.T, dtype=np.float64).T
        hits, predicted, true = counts[:, :K], counts[:, K : 2 * K], counts[:, 2 * K :]
        present = true > 0
        total = weights.sum(1, dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            f1 = np.where(present, 2 * hits / (true + predicted), 0.0)
            recall = np.where(present, hits / true, 0.0)
            return {
                "macro_f1": f1.sum(1) / present.sum(1),
                "balanced_accuracy": recall.sum(1) / present.sum(1),
                "accuracy": hits.sum(1) / total,
                "brier": (weights @ self.error) / total,
            }


@dataclass(frozen=True, eq=False)
class _Area:
    """AUC of one class against the rest in one fold, prepared for many weights."""

    rows: np.ndarray | None  # None: all of them, as they come
    positive: np.ndarray
    starts: np.ndarray | None
    above: np.ndarray | None

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """``[draws]``; NaN where a resample lacks either side."""
        if self.above is not None:
            mine = weights if self.rows is None else weights[:, self.rows]
            positives = mine[:, self.positive]
            total = positives.sum(1, dtype=np.float64)
            rest = mine.sum(1, dtype=np.float64) - total
            wins = np.einsum("bj,bj->b", positives @ self.above, mine, dtype=np.float64)
        else:
            assert self.starts is not None
            mine = weights[:, self.rows].astype(np.float64)
            here = mine * self.positive
            gained = np.add.reduceat(here, self.starts, axis=1)
            passed = np.add.reduceat(mine - here, self.starts, axis=1)
            total, rest = gained.sum(1), passed.sum(1)
            wins = (gained * (np.cumsum(passed, axis=1) - passed / 2)).sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return wins / (total * rest)


def _areas(y: np.ndarray, probabilities: np.ndarray, folds: np.ndarray) -> list[list[_Area]]:
    """Per fold, the classes that have rows and rows of other classes."""
    n_classes = probabilities.shape[1]
    classes = [1] if n_classes == 2 else range(n_classes)
    found = []
    for fold in np.unique(folds):
        rows = np.flatnonzero(folds == fold)
        areas = []
        for c in classes:
            positive = y[rows] == c
            if not positive.any() or positive.all():
                continue
            values = probabilities[rows, c]
            if n_classes > _FEW_CLASSES:
                own = values[positive][:, None]
                above = (own > values).astype(np.float32) + np.float32(0.5) * (own == values)
                above[:, positive] = 0
                areas.append(_Area(None if len(rows) == len(y) else rows, positive, None, above.astype(np.float32)))
            else:
                order = np.argsort(values, kind="stable")
                ordered = values[order]
                starts = np.concatenate([[0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])
                areas.append(_Area(rows[order], positive[order], starts, None))
        if areas:
            found.append(areas)
    return found


def _mean_area(areas: list[list[_Area]], weights: np.ndarray) -> np.ndarray:
    """Mean over classes, then over folds; what a resample lacks does not count."""

    def mean(values: list[np.ndarray]) -> np.ndarray:
        stacked = np.stack(values)
        defined = ~np.isnan(stacked)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(defined, stacked, 0.0).sum(0) / defined.sum(0)

    return mean([mean([area(weights) for area in fold]) for fold in areas])


# ---------------------------------------------------------------------------------------------------------- verdicts


def verdict(difference: Measured, margin: float = MARGIN) -> str:
    """Return the verdict of an interval of a difference for a margin around 0 (a region of practical equivalence).

    ``better``: the whole interval lies above `margin`; ``worse``: below ``-margin``; ``equivalent``: within
    ``[-margin, margin]``; ``undecided``: anything else, and where there is no interval.

    >>> verdict(Measured(0.03, 0.02, 0.04)), verdict(Measured(0.0, -0.004, 0.004)), verdict(Measured(0.0, -0.1, 0.1))
    ('better', 'equivalent', 'undecided')

    Raises
    ------
    ConfigError
        A negative margin.
    """
    if not margin >= 0:
        raise ConfigError(f"`margin` must be a difference of macro-F1 from 0; got {margin}.")
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > margin:
        return "better"
    if difference.high < -margin:
        return "worse"
    return "equivalent" if -margin <= difference.low and difference.high <= margin else "undecided"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of any false rejection stays below the level. NaN stays NaN.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(values))
    adjusted = np.full(len(values), math.nan)
    largest = 0.0
    for place, index in enumerate(known[np.argsort(values[known], kind="stable")]):
        largest = max(largest, min(1.0, (len(known) - place) * values[index]))
        adjusted[index] = largest
    return [float(value) for value in adjusted]


def corrected_t(differences: Sequence[float], n_train: int, n_test: int) -> tuple[float, float]:
    """Nadeau and Bengio's t for differences over folds whose training sets overlap, and its p-value.

    ``t = mean(d) / sqrt((1 / r + n_test / n_train) var(d))`` with ``r - 1`` degrees of freedom. Equal differences of 0
    give ``(0, 1)``; fewer than two folds give NaN.
    """
    from scipy.special import stdtr

    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        return math.nan, math.nan
    spread = math.sqrt((1 / len(d) + n_test / n_train) * float(d.var(ddof=1)))
    if spread == 0:
        return (0.0, 1.0) if d.mean() == 0 else (math.copysign(math.inf, d.mean()), 0.0)
    t = float(d.mean()) / spread
    return t, float(2 * stdtr(len(d) - 1, -abs(t)))


def chance_interval(scores: Sequence[Scores], level: float = LEVEL) -> Measured:
    """Mean AUC of classifiers that learned permuted labels, with its interval; chance is 0.5."""
    parts = [each["auc"] for each in scores]
    value = float(np.mean([part.value for part in parts]))
    drawn = [part.draws for part in parts if part.draws is not None]
    if len(drawn) < len(parts):
        return Measured(value, None, None, "area", parts[0].reason or "no interval in some shuffle")
    draws = np.mean(drawn, axis=0)  # independent: every shuffle has its own resamples
    return Estimate(value, draws).measured("area", level, least=0.0, most=1.0)
