"""Scores of resamples: equal to scoring the resampled rows themselves, paired, and read the same way everywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, roc_auc_score

from saekit.errors import ConfigError, DataError
from saekit.measure.paired_scores import (
    PairedBootstrap,
    Predictions,
    chance_interval,
    corrected_t,
    holm,
    score,
    verdict,
)
from saekit.measure.results import Measured


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
def test_resamples_equal_scoring_the_resampled_rows(n_classes, by_group):
    y, p = sample(120, n_classes)
    groups = np.arange(120) // 4 if by_group else None
    bootstrap = PairedBootstrap.over(y, groups=groups, draws=6, seed=3)
    found = score(Predictions(p), bootstrap)
    labels = p.argmax(1)
    for name, value in reference(y, p, labels).items():
        assert found[name].value == pytest.approx(value, abs=1e-12)
    for draw in range(6):
        rows = np.repeat(np.arange(120), bootstrap.counts[draw])
        for name, value in reference(y[rows], p[rows], labels[rows]).items():
            draws = found[name].draws
            assert draws is not None
            assert draws[draw] == pytest.approx(value, abs=1e-6), name


def test_resamples_keep_class_counts_and_whole_groups():
    y, _ = sample(90, 3)
    bootstrap = PairedBootstrap.over(y, draws=20)
    for c in range(3):
        assert (bootstrap.counts[:, y == c].sum(1) == (y == c).sum()).all()
    pairs = np.repeat(np.arange(45), 2)
    y = np.tile([0, 1], 45)
    paired = PairedBootstrap.over(y, groups=pairs, draws=20)
    assert (paired.counts[:, ::2] == paired.counts[:, 1::2]).all()
    assert paired.unit == "groups"


def test_auc_compares_rows_of_one_fold_only():
    y = np.array([0, 1, 0, 1])
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.2, 0.8], [0.1, 0.9]])
    together = score(Predictions(p), PairedBootstrap.over(y, draws=0))
    apart = score(Predictions(p), PairedBootstrap.over(y, folds=np.array([0, 0, 1, 1]), draws=0))
    assert together["auc"].value == 0.75
    assert apart["auc"].value == 1.0
    assert apart.measured("auc").reason == "no interval asked for"


def test_order_of_the_rows_changes_nothing_but_the_draws():
    y, p = sample(200, 4)
    order = np.random.default_rng(1).permutation(200)
    one = score(Predictions(p), PairedBootstrap.over(y, draws=400))
    other = score(Predictions(p[order]), PairedBootstrap.over(y[order], draws=400))
    for name in ("macro_f1", "auc", "balanced_accuracy", "accuracy", "brier"):
        assert one[name].value == pytest.approx(other[name].value, abs=1e-12)
        widths = [m.high - m.low for m in (one.measured(name), other.measured(name))]  # type: ignore[operator]
        assert widths[0] == pytest.approx(widths[1], rel=0.25)


def test_equal_predictions_differ_by_exactly_nothing():
    y, p = sample(150, 5)
    bootstrap = PairedBootstrap.over(y, draws=50)
    one, same = score(Predictions(p), bootstrap), score(Predictions(p.copy()), bootstrap)
    difference = one.difference(same)
    assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert verdict(difference, 0.0) == "equivalent"
    assert one.p_value(same) == 1.0


def test_paired_intervals_are_narrower_than_apart_and_cover():
    """Two arms that fail on the same rows: the difference is known far better than either score."""
    y, p = sample(400, 2, signal=0.3)
    q = p.copy()
    q[:8] = q[:8, ::-1]
    bootstrap = PairedBootstrap.over(y, draws=300)
    one, other = score(Predictions(p), bootstrap), score(Predictions(q), bootstrap)
    difference, alone = one.difference(other), one.measured("macro_f1")
    assert difference.high - difference.low < 0.6 * (alone.high - alone.low)  # type: ignore[operator]
    assert difference.low <= difference.value <= difference.high  # type: ignore[operator]


ends = st.floats(-1, 1)


@settings(max_examples=200, deadline=None)
@given(ends, ends, st.floats(0, 0.5))
def test_a_verdict_says_where_the_interval_lies(a, b, margin):
    low, high = min(a, b), max(a, b)
    said = verdict(Measured((low + high) / 2, low, high), margin)
    assert (said == "better") == (low > margin)
    assert (said == "worse") == (high < -margin)
    assert (said == "equivalent") == (low >= -margin and high <= margin)
    # the other way round: better becomes worse, the rest stays
    flipped = verdict(Measured(-(low + high) / 2, -high, -low), margin)
    assert flipped == {"better": "worse", "worse": "better"}.get(said, said)


def test_no_interval_decides_nothing():
    assert verdict(Measured(0.5)) == "undecided"
    with pytest.raises(ConfigError, match="`margin` must be"):
        verdict(Measured(0.0), -0.1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_monotone_and_between_raw_and_bonferroni(values):
    adjusted = holm(values)
    order = np.argsort(values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()
    assert all(p <= q <= min(1.0, p * len(values)) + 1e-12 for p, q in zip(values, adjusted))


def test_holm_leaves_out_what_is_not_known():
    assert holm([0.01, math.nan, 0.04])[::2] == [0.02, 0.04]
    assert math.isnan(holm([math.nan])[0])


def test_corrected_t():
    d = [0.02, 0.03, 0.01, 0.04, 0.02]
    t, p = corrected_t(d, 80, 20)
    assert t == pytest.approx(np.mean(d) / math.sqrt((1 / 5 + 20 / 80) * np.var(d, ddof=1)))
    assert 0 < p < 0.1
    assert corrected_t([0.0, 0.0], 8, 2) == (0.0, 1.0)
    assert corrected_t([0.1, 0.1], 8, 2) == (math.inf, 0.0)
    assert all(math.isnan(each) for each in corrected_t([0.1], 8, 2))


def test_more_shuffles_are_closer_to_chance():
    y, _ = sample(200, 2)
    scores = []
    for seed in range(4):
        noise = np.random.default_rng(seed).random(200)
        scores.append(score(Predictions(np.stack([1 - noise, noise], 1)), PairedBootstrap.over(y, seed=seed), ("auc",)))
    one, four = chance_interval(scores[:1]), chance_interval(scores)
    assert four.high - four.low == pytest.approx((one.high - one.low) / 2, rel=0.25)  # type: ignore[operator]


def test_bad_predictions():
    y, p = sample(20, 2)
    bootstrap = PairedBootstrap.over(y, draws=2)
    with pytest.raises(DataError, match="must be of the 20 test rows"):
        score(Predictions(p[:10]), bootstrap)
    p[3, 0] = math.nan
    with pytest.raises(DataError, match="must be finite"):
        score(Predictions(p, p.argmax(1)), bootstrap)
    lonely = score(Predictions(sample(20, 2)[1]), PairedBootstrap.over(np.zeros(20, int), draws=2))
    assert math.isnan(lonely["auc"].value)
