"""Scores without some of the rows: equal to scoring the rest itself, paired between classifiers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, roc_auc_score

from saekit.errors import DataError
from saekit.measure.paired_scores import MOST_PARTS, HeldOut, Predictions, auc_of, chance_test, score
from saekit.measure.verdicts import verdict


def sample(n: int, n_classes: int, seed: int = 0, *, signal: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Class codes, every class there, and probabilities with ties."""
    generator = np.random.default_rng(seed)
    y = np.concatenate([np.arange(n_classes), generator.integers(0, n_classes, n - n_classes)])
    p = generator.dirichlet(np.ones(n_classes), n) + signal * np.eye(n_classes)[y]
    p = (p / p.sum(1, keepdims=True)).round(2) + 1e-3
    return y, p / p.sum(1, keepdims=True)


def reference(y: np.ndarray, p: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The same metrics by scikit-learn, of rows that are really there."""
    n_classes = p.shape[1]
    present = np.unique(y)
    error = ((p - np.eye(n_classes)[y]) ** 2).sum(1)
    areas = [roc_auc_score(y == c, p[:, c]) for c in ([1] if n_classes == 2 else present)]
    return {
        "macro_f1": f1_score(y, labels, labels=present, average="macro", zero_division=0),
        "auc": float(np.mean(areas)),
        "balanced_accuracy": float(np.mean([(labels[y == c] == c).mean() for c in present])),
        "accuracy": accuracy_score(y, labels),
        "brier": brier_score_loss(y, p[:, 1]) if n_classes == 2 else float(error.mean()),
    }


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("by_group", [False, True])
def test_what_is_left_out_equals_scoring_the_rest(n_classes, by_group):
    y, p = sample(120, n_classes)
    groups = np.arange(120) // 4 if by_group else None
    held_out = HeldOut.over(y, groups=groups)
    found = score(Predictions(p), held_out)
    labels = p.argmax(1)
    for name, value in reference(y, p, labels).items():
        assert found[name].value == pytest.approx(value, abs=1e-12)
    for part in range(0, len(held_out.sample.sizes), 7):
        rows = np.flatnonzero(held_out.part != part)
        for name, value in reference(y[rows], p[rows], labels[rows]).items():
            left_out = found[name].left_out
            assert left_out is not None
            assert left_out[part] == pytest.approx(value, abs=1e-6), name


def test_many_rows_are_left_out_in_parts_that_keep_the_classes():
    y, _ = sample(3000, 3)
    held_out = HeldOut.over(y)
    assert len(held_out.sample.sizes) == MOST_PARTS
    assert held_out.n_groups == 3000
    for c in range(3):
        assert np.ptp(np.bincount(held_out.part[y == c], minlength=MOST_PARTS)) <= 1
    grouped = HeldOut.over(y, groups=np.repeat(np.arange(1500), 2))
    assert (grouped.part[::2] == grouped.part[1::2]).all()
    assert (grouped.unit, grouped.n_groups) == ("groups", 1500)


def test_few_heavy_groups_are_counted_as_what_they_tell():
    y, p = sample(400, 2)
    held_out = HeldOut.over(y, groups=np.concatenate([np.zeros(300, int), np.arange(100) // 10 + 1]))
    assert held_out.n_groups == 11
    assert held_out.effective_groups == pytest.approx(400**2 / (300**2 + 10 * 100))
    measured = score(Predictions(p), held_out).measured("macro_f1")
    assert measured.low is None
    assert "11 tell as much as 1.8 of equal size" in measured.reason


def test_auc_compares_rows_of_one_fold_only():
    y = np.array([0, 1, 0, 1])
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]])
    together = score(Predictions(p), HeldOut.over(y, intervals=False))
    apart = score(Predictions(p), HeldOut.over(y, folds=np.array([0, 0, 1, 1]), intervals=False))
    assert together["auc"].value == 0.75
    assert apart["auc"].value == 1.0
    assert apart.measured("auc").reason == "no interval asked for"


def test_order_of_the_rows_changes_nothing():
    y, p = sample(200, 4)
    order = np.random.default_rng(1).permutation(200)
    one = score(Predictions(p), HeldOut.over(y))
    other = score(Predictions(p[order]), HeldOut.over(y[order]))
    for name in ("macro_f1", "auc", "balanced_accuracy", "accuracy", "brier"):
        assert one[name].value == pytest.approx(other[name].value, abs=1e-12)
        assert one.measured(name).low == pytest.approx(other.measured(name).low, abs=1e-6)


def test_equal_predictions_differ_by_nothing_as_far_as_the_rows_tell():
    """The same classifier differs by exactly nothing; another one that agrees on 150 rows may differ on others."""
    y, p = sample(150, 5)
    held_out = HeldOut.over(y)
    one, same = score(Predictions(p), held_out), score(Predictions(p.copy()), held_out)
    alone, difference = one.difference(one), one.difference(same)
    assert (alone.value, alone.low, alone.high) == (0.0, 0.0, 0.0)
    assert verdict(alone, 0.0) == "equivalent"
    reach = 1 - 0.025 ** (1 / 150)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.0, -reach, reach))
    assert one.p_value(same) == 1.0


def test_paired_intervals_are_narrower_than_apart_and_cover():
    """Two arms that fail on the same rows: the difference is known far better than either score."""
    y, p = sample(400, 2, signal=0.3)
    q = p.copy()
    q[:8] = q[:8, ::-1]
    held_out = HeldOut.over(y)
    one, other = score(Predictions(p), held_out), score(Predictions(q), held_out)
    difference, alone = one.difference(other), one.measured("macro_f1")
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)  # type: ignore[operator]
    assert difference.low <= difference.value <= difference.high  # type: ignore[operator]


def test_more_shuffles_are_closer_to_chance():
    y, _ = sample(200, 2)
    guesses = []
    for seed in range(4):
        noise = np.random.default_rng(seed).random(200)
        guesses.append(Predictions(np.stack([1 - noise, noise], 1)))
    one, four = (chance_test(some, [HeldOut.over(y)] * len(some))[0] for some in (guesses[:1], guesses))
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.25)  # type: ignore[operator]


@pytest.mark.parametrize("n_classes", [2, 3])
def test_chance_is_what_every_order_of_the_labels_gives(n_classes):
    """Six rows in two folds, one with ties: all orders of the labels of each, one by one, against random ones."""
    y, folds = np.array([0, 1, n_classes - 1, 1, 0, n_classes - 1]), np.array([0, 0, 0, 1, 1, 1])
    p = np.random.default_rng(0).random((6, n_classes)).round(1)
    p[3:] = p[3]
    p[5] += 0.5

    def area(rows: slice, labels: np.ndarray) -> float:
        return score(Predictions(p[rows]), HeldOut.over(labels, intervals=False), ("auc",))["auc"].value

    exact, spreads, values = [], [], []
    for rows in (slice(0, 3), slice(3, 6)):
        areas = np.array([area(rows, each) for each in permutations(y[rows])])
        assert areas.mean() == pytest.approx(0.5)
        values.append(area(rows, y[rows]))
        exact.append((np.abs(areas - 0.5) >= abs(values[-1] - 0.5) - 1e-9).mean())
        spreads.append(np.quantile(areas, [0.975, 0.025]))
    auc, found = chance_test([Predictions(p)], [HeldOut.over(y, folds=folds)], 4000)
    assert auc.value == pytest.approx(np.mean(values))
    assert found == pytest.approx(min(1, 2 * min(exact)), abs=0.04)
    assert (auc.low, auc.high) == pytest.approx(np.clip(auc.value + 0.5 - np.mean(spreads, 0), 0, 1), abs=0.02)


def permutations(y: np.ndarray) -> list[np.ndarray]:
    return [y[list(order)] for order in itertools.permutations(range(len(y)))]


def test_without_intervals_there_is_no_test_of_chance():
    y, p = sample(50, 2)
    auc, found = chance_test([Predictions(p)], [HeldOut.over(y, intervals=False)])
    assert (auc.low, auc.reason) == (None, "no interval asked for")
    assert math.isnan(found)


def test_weighted_auc_is_that_of_rows_as_often_as_they_count():
    generator = np.random.default_rng(3)
    y, values = np.arange(40) % 2, generator.random(40).round(1)
    weights = generator.integers(0, 3, (4, 40)).astype(np.float32)
    found = auc_of(y, values, weights)
    for each, auc in zip(weights.astype(int), found):
        assert auc == pytest.approx(roc_auc_score(np.repeat(y, each), np.repeat(values, each)))


def test_bad_predictions():
    y, p = sample(20, 2)
    held_out = HeldOut.over(y)
    with pytest.raises(DataError, match="must be of the 20 test rows"):
        score(Predictions(p[:10]), held_out)
    p[3, 0] = math.nan
    with pytest.raises(DataError, match="must be finite"):
        score(Predictions(p, p.argmax(1)), held_out)
    lonely = score(Predictions(sample(20, 2)[1]), HeldOut.over(np.zeros(20, int)))
    assert math.isnan(lonely["auc"].value)


def test_folds_where_one_feature_dominates_are_at_chance_as_often_as_said():
    """The classifier of a fold learned the labels of the others, which all err to the same side with it."""
    generator, found = np.random.default_rng(0), []
    fold, y = np.arange(160) % 5, np.zeros(160, np.int64)
    for _ in range(100):
        x, said = generator.random(160) < 0.5, np.zeros(160)
        for part in range(5):
            y[fold == part] = generator.permutation(np.arange(32) % 2)
        for part in range(5):
            learned = fold != part
            said[~learned] = (x[learned & (y == 1)].mean() - x[learned & (y == 0)].mean()) * x[~learned]
        p = 1 / (1 + np.exp(-said))
        order = np.argsort(fold, kind="stable")
        guess = Predictions(np.stack([1 - p, p], 1)[order].astype(np.float32))
        found.append(chance_test([guess], [HeldOut.over(y[order], folds=fold[order])], 199)[1])
    assert (np.array(found) < 0.2).sum() <= 28
