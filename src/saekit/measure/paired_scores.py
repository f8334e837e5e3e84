"""How good predictions are: metrics of the test rows without each row or group at once, paired between arms.

Nothing is fitted again: every metric is a function of weighted counts, and all metrics without some rows are a product
of matrices. Arms scored on the same `HeldOut` leave out the same rows, so the difference of two is a paired one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import DataError
from .intervals import LEVEL, Estimate, Sample, effective_number, why_no_interval
from .results import Measured

METRIC_NAMES = ("macro_f1", "auc", "balanced_accuracy", "accuracy", "brier")

MOST_PARTS = 509
"""Groups or rows are left out one at a time; more than this many are joined to as many parts."""

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
class HeldOut:
    """Test rows, and the parts of them that are left out in turn: groups, else rows.

    Parameters
    ----------
    y
        ``int64 [n]`` true class codes.
    folds
        ``int64 [n]`` which classifier scored a row; AUC compares rows of one fold only.
    part
        ``int64 [n]`` the part that a row is in.
    sample
        The parts.
    n_groups
        Number of groups (or rows) behind them.
    effective_groups
        Kish's effective number of those.
    unit
        ``rows`` or ``groups``.
    """

    y: np.ndarray
    folds: np.ndarray
    part: np.ndarray
    sample: Sample
    n_groups: int
    effective_groups: float
    unit: str

    @classmethod
    def over(
        cls,
        y: np.ndarray,
        *,
        groups: np.ndarray | None = None,
        folds: np.ndarray | None = None,
        names: Sequence[str] | None = None,
        intervals: bool = True,
    ) -> HeldOut:
        """Return the test rows with their parts.

        Parameters
        ----------
        y
            True class codes ``[n]``.
        groups
            ``[n]`` rows of one group are left out together.
        folds
            See the class.
        names
            ``[n]`` names of the rows, for samples that have groups or rows in common with others.
        intervals
            Whether intervals are asked for.
        """
        y = np.asarray(y, dtype=np.int64)
        folds = np.zeros(len(y), np.int64) if folds is None else np.asarray(folds, dtype=np.int64)
        own = [str(row) for row in range(len(y))] if names is None else [str(name) for name in names]
        unit_names = own if groups is None else [str(group) for group in groups]
        units, unit_of = np.unique(unit_names, return_inverse=True)
        if groups is None:
            units, unit_of = np.array(own), np.arange(len(y))
        part, labels = _parts(units, unit_of.ravel(), folds * (int(y.max(initial=0)) + 1) + y, groups is None)
        sizes = np.bincount(part, minlength=len(labels)).astype(np.float64)
        per_unit = np.bincount(unit_of.ravel())
        what = "rows" if groups is None else "groups"
        reason = why_no_interval(per_unit, f"test {what}") if intervals else "no interval asked for"
        shared = tuple(labels) if groups is not None or names is not None else None
        sample = Sample(sizes, None, reason, shared)
        return cls(y, folds, part, sample, len(per_unit), effective_number(per_unit), what)

    def weights(self) -> Iterator[np.ndarray]:
        """Return the rows as they are (weights 1), then without each part, ``float32 [some, n]`` at a time."""
        yield np.ones((1, len(self.y)), np.float32)
        if self.sample.reason is not None:
            return
        n, step = len(self.sample.sizes), max(_CHUNK_NUMBERS // max(len(self.y), 1), 16)
        for start in range(0, n, step):
            yield (self.part != np.arange(start, min(start + step, n))[:, None]).astype(np.float32)


def _parts(units: np.ndarray, unit_of: np.ndarray, stratum: np.ndarray, is_rows: bool) -> tuple[np.ndarray, list[str]]:
    """Return the part of each row and the names of the parts, at most `MOST_PARTS`.

    Rows are dealt out by fold and class, so that every part has its fraction of each; groups by their names.
    """
    if len(units) <= MOST_PARTS:
        return unit_of, units.tolist()
    order = np.argsort(stratum, kind="stable") if is_rows else np.arange(len(units))
    dealt = np.empty(len(units), np.int64)
    dealt[order] = np.arange(len(units)) % MOST_PARTS
    mark = hashlib.sha256("\0".join(units.tolist()).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return dealt[unit_of], [f"{mark}:{part}" for part in range(MOST_PARTS)]


@dataclass(frozen=True, eq=False)
class Scores:
    """Metrics of one classifier, with and without each part of the test rows.

    ``macro_f1``: mean over classes of ``2 tp / (true + predicted)``; ``auc``: area under the ROC curve with ties as
    halves, for more than two classes the mean of one against the rest, in several folds the mean over folds;
    ``balanced_accuracy``: mean over classes of ``tp / true``; ``accuracy``; ``brier``: mean squared error of the
    probabilities, summed over classes (for two classes, of one). Classes without rows in the test set, or in what is
    left of it, do not count.
    """

    estimates: Mapping[str, Estimate]

    def __getitem__(self, name: str) -> Estimate:
        return self.estimates[name]

    def measured(self, name: str) -> Measured:
        """One metric with its interval."""
        most = 2.0 if name == "brier" else 1.0
        return self.estimates[name].measured(_UNITS.get(name, "fraction"), least=0.0, most=most)

    def gap(self, other: Scores, name: str = "macro_f1") -> Estimate:
        """Minus `other`, without the same parts."""
        return self[name].minus(other[name])

    def difference(self, other: Scores, name: str = "macro_f1") -> Measured:
        """Minus `other`, with its interval; exactly 0 for equal predictions."""
        return self.gap(other, name).measured(_UNITS.get(name, "fraction"), least=-1.0, most=1.0)

    def p_value(self, other: Scores, name: str = "macro_f1") -> float:
        """Two-sided p-value of no difference; NaN without an interval."""
        return self.gap(other, name).p_value()


_UNITS = {"auc": "area", "brier": "squared error"}


def score(predictions: Predictions, held_out: HeldOut, names: Sequence[str] = METRIC_NAMES) -> Scores:
    """Score predictions of test rows.

    Parameters
    ----------
    predictions
        One row per test row.
    held_out
        The true classes and the parts of the rows.
    names
        Metrics to compute.

    Raises
    ------
    DataError
        Another number of rows, or probabilities that are not finite.
    """
    y, probabilities = held_out.y, np.asarray(predictions.probabilities, dtype=np.float64)
    _check_predictions(predictions, len(y))
    n_classes = probabilities.shape[1]
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    counted = _Counted(y, np.asarray(predictions.labels), probabilities, n_classes)
    areas = _areas(y, probabilities, held_out.folds) if "auc" in found else []
    for weights in held_out.weights():
        for name, values in counted(weights).items():
            if name in found:
                found[name].append(values)
        if "auc" in found:
            found["auc"].append(_mean_area(areas, weights) if areas else np.full(len(weights), math.nan))
    return Scores({name: _estimate(np.concatenate(values), held_out, name) for name, values in found.items()})


def _check_predictions(predictions: Predictions, n_rows: int) -> None:
    """Refuse predictions of another number of rows, or probabilities that are not finite."""
    if len(predictions.probabilities) != n_rows or len(predictions.labels) != n_rows:
        raise DataError(f"predictions must be of the {n_rows} test rows; got {len(predictions.probabilities)}.")
    if not np.isfinite(predictions.probabilities).all():
        raise DataError("predicted probabilities must be finite; some are NaN or infinite. Did the fit converge?")


def _estimate(values: np.ndarray, held_out: HeldOut, name: str) -> Estimate:
    value, left_out, sample = float(values[0]), values[1:], held_out.sample
    if math.isnan(value):
        return Estimate(value, reason="undefined: it needs two classes in the test set")
    if not len(left_out):
        return Estimate(value, reason=sample.reason)
    if np.isnan(left_out).any():
        return Estimate(value, reason=f"no interval: {name} is undefined without some of the test {held_out.unit}")
    return Estimate(value, left_out, sample, counts=held_out.effective_groups)


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
        """``[n]``; NaN where either side is missing."""
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
    """Mean over classes, then over folds; what is missing does not count."""

    def mean(values: list[np.ndarray]) -> np.ndarray:
        stacked = np.stack(values)
        defined = ~np.isnan(stacked)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(defined, stacked, 0.0).sum(0) / defined.sum(0)

    return mean([mean([area(weights) for area in fold]) for fold in areas])


def macro_f1_of(y: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the macro-F1 of predicted labels under each row of weights.

    Parameters
    ----------
    y, labels
        ``[n]`` true and predicted class codes.
    weights
        ``float32 [n_weights, n]``.
    """
    n_classes = int(max(y.max(), labels.max())) + 1
    return _Counted(y, labels, np.zeros((len(y), n_classes)), n_classes)(weights)["macro_f1"]


def auc_of(y: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the AUC of values for the second of two classes under each row of weights.

    Parameters
    ----------
    y, values
        ``[n]`` class codes 0 and 1, and what is larger for 1.
    weights
        ``float32 [n_weights, n]``.
    """
    areas = _areas(y, np.stack([-values, values], axis=1), np.zeros(len(y), np.int64))
    return _mean_area(areas, weights) if areas else np.full(len(weights), math.nan)


def chance_test(
    guesses: Sequence[Predictions], held_out: Sequence[HeldOut], permutations: int = 999, *, seed: int = 0
) -> tuple[Measured, float]:
    """Return the mean AUC of classifiers that learned permuted labels, and the p-value of chance, which is 0.5.

    Labels of the test rows that are permuted too know nothing of the predictions, so that every order of them is as
    likely as the one at hand: the AUC is compared with that of other orders, which is exact however few rows a
    classifier tells apart. Folds are tested one by one, and corrected for their number (Bonferroni): each classifier
    learned the labels that the others are tested on, so that where one feature dominates all err to the same side. The
    interval is the AUC minus what the middle 95% of those differ from 0.5, mean over folds.

    Parameters
    ----------
    guesses, held_out
        For each control what its classifier said, and the test rows with its permuted labels.
    permutations
        Number of orders; the smallest p-value is 1 / (permutations + 1).
    seed
        Random seed of the orders.

    Returns
    -------
    auc, p
        NaN without intervals.
    """
    plain = [replace(rows, sample=replace(rows.sample, reason="no interval asked for")) for rows in held_out]
    value = float(np.mean([score(guess, rows, ("auc",))["auc"].value for guess, rows in zip(guesses, plain)]))
    why_none = next((rows.sample.reason for rows in held_out if rows.sample.reason), None)
    if why_none or math.isnan(value):
        return Measured(
            value, None, None, "area", why_none or "undefined: it needs two classes in the test set"
        ), math.nan
    generator = np.random.Generator(np.random.PCG64([seed, 37]))
    pairs = [_permuted_areas(g, rows, permutations, generator) for g, rows in zip(guesses, held_out)]
    areas, null = (np.mean([pair[part] for pair in pairs], axis=0) for part in range(2))
    beyond = (np.abs(null - 0.5) >= np.abs(areas - 0.5)[:, None] - 1e-12).sum(1)
    p = min(1.0, len(areas) * (1 + int(beyond.min())) / (permutations + 1))
    low, high = np.quantile(null - 0.5, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1).mean(1)
    return Measured(value, max(0.0, value - float(high)), min(1.0, value - float(low)), "area"), p


def _permuted_areas(
    guess: Predictions, held_out: HeldOut, n: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the AUC in each fold, ``[n_folds]``, and for `n` random orders of its labels, ``[n_folds, n]``."""
    from scipy.stats import rankdata

    areas, found = [], []
    for fold in np.unique(held_out.folds):
        rows = np.flatnonzero(held_out.folds == fold)
        y, said = held_out.y[rows], guess.probabilities[rows]
        counts = np.bincount(y, minlength=said.shape[1])
        classes = [c for c in ([1] if said.shape[1] == 2 else range(said.shape[1])) if 0 < counts[c] < len(y)]
        if not classes:
            continue
        gains = np.zeros_like(said, dtype=np.float64)  # what a row adds to the mean AUC if it is of a class
        for c in classes:
            gains[:, c] = (rankdata(said[:, c]) - (counts[c] + 1) / 2) / (counts[c] * (len(y) - counts[c]))
        step = max(_CHUNK_NUMBERS // len(y), 1)
        orders = (generator.permuted(np.tile(y, (min(step, n - at), 1)), axis=1) for at in range(0, n, step))
        found.append(np.concatenate([gains[np.arange(len(y)), order].sum(1) for order in orders]) / len(classes))
        areas.append(gains[np.arange(len(y)), y].sum() / len(classes))
    return np.array(areas), np.array(found)
