"""Binarization and selection of columns: laws, references, leaks, and what they refuse."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.feature_selection import chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from saekit import Binarize, SelectLatents
from saekit.errors import ConfigError, DataError
from saekit.estimators.select import SCORES, rate_latents

ESTIMATORS = [
    Binarize(),
    Binarize(0.5, relative="max"),
    Binarize(0.5, compare=">=", relative="quantile"),
    *[SelectLatents(1, scoring=by) for by in SCORES],
]


@parametrize_with_checks(ESTIMATORS)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    """No check is expected to fail."""
    state = np.random.get_state()  # one check draws from it
    try:
        check(estimator)
    finally:
        np.random.set_state(state)


def numbers(draw: Any, *, signed: bool) -> np.ndarray:
    n, d = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    x = rng.integers(-2 if signed else 1, 4, (n, d)) * (rng.random((n, d)) < draw(st.sampled_from([0.2, 0.6, 1.0])))
    return x.astype(np.float64)


@st.composite
def features(draw: Any) -> np.ndarray:
    """Few rows with many zeros and many ties."""
    return numbers(draw, signed=False)


@st.composite
def labelled(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    x = numbers(draw, signed=True)
    n_classes = draw(st.integers(2, min(3, len(x))))
    label = np.random.default_rng(draw(st.integers(0, 10_000))).integers(0, n_classes, len(x))
    label[:n_classes] = np.arange(n_classes)  # every class has a row
    return x, label


def sparse_with_zeros(x: np.ndarray) -> sp.csr_matrix:
    """The array with all of its zeros stored."""
    n, d = x.shape
    indices, offsets = np.tile(np.arange(d, dtype=np.int32), n), np.arange(0, n * d + 1, d, dtype=np.int32)
    return sp.csr_matrix((x.ravel().copy(), indices, offsets), shape=(n, d))


# -------------------------------------------------------------------------------------------------------- Binarize


@given(features(), st.sampled_from([">", ">="]), st.sampled_from([0.5, 1.0, 2.0]))
def test_binarized_is_the_comparison_and_stays_sparse(x: np.ndarray, compare: str, threshold: float) -> None:
    expected = x > threshold if compare == ">" else x >= threshold
    step = Binarize(threshold, compare=compare)
    assert (step.fit_transform(x) == expected).all()
    for given_sparse in (sp.csr_matrix(x), sparse_with_zeros(x), sp.csr_array(x)):
        before = given_sparse.copy()
        found = step.fit_transform(given_sparse)
        assert type(found) is type(given_sparse)
        assert (found.toarray() == expected).all()
        assert found.nnz == expected.sum()
        assert (before != given_sparse).nnz == 0
    assert step.fit_transform(sp.csr_matrix(x, dtype=np.float32)).dtype == np.float32


@given(features(), st.sampled_from(["max", "quantile"]), st.sampled_from([0.1, 0.5, 0.9]))
def test_relative_thresholds_are_those_of_the_columns(x: np.ndarray, relative: str, share: float) -> None:
    step = Binarize(share, relative=relative).fit(sp.csr_matrix(x))
    for j, column in enumerate(x.T):
        positive = column[column > 0]
        if not len(positive):
            assert step.thresholds_[j] == np.inf
        else:
            expected = share * positive.max() if relative == "max" else np.quantile(positive, share)
            assert step.thresholds_[j] == pytest.approx(expected, rel=1e-12)
    # the scale of a column, which differs from SAE to SAE, does not matter
    scale = np.arange(1, x.shape[1] + 1) * 4.0
    scaled = Binarize(share, relative=relative).fit_transform(sp.csr_matrix(x * scale))
    assert (scaled.toarray() == step.transform(sp.csr_matrix(x)).toarray()).all()


@given(features(), st.sampled_from(["max", "quantile"]), st.sampled_from([0.1, 0.5, 0.9]))
def test_columns_with_negative_values_are_taken_by_their_size(x: np.ndarray, relative: str, share: float) -> None:
    rng = np.random.default_rng(len(x))
    signed = x * rng.choice([-1.0, 1.0], x.shape)
    for given_as in (np.asarray, sp.csr_matrix, sparse_with_zeros):
        step = Binarize(share, relative=relative).fit(given_as(signed))
        by_size = Binarize(share, relative=relative).fit(given_as(x))
        assert np.array_equal(step.thresholds_, by_size.thresholds_)
        found, expected = (each.toarray() if sp.issparse(each) else each
                           for each in (step.transform(given_as(signed)), by_size.transform(given_as(x))))  # fmt: skip
        assert np.array_equal(found, expected)
        assert np.array_equal(step.by_magnitude_, (signed < 0).any(0))
        # a column that had no negative value in the rows of fit: negative values stay 0
        later = by_size.transform(given_as(-x))
        assert not (later.toarray() if sp.issparse(later) else later).any()


def test_thresholds_come_from_the_rows_of_fit_only() -> None:
    train, test = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[1.5, 9.0], [100.0, 9.0]])
    step = Binarize(0.5, relative="max").fit(train)
    assert step.transform(test).tolist() == [[1, 0], [1, 0]]  # a column that never fired in training says nothing
    assert step.thresholds_.tolist() == [1.0, np.inf]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0, "compare": ">="}, "zeros must stay zeros.*`0 >= 0.0` is true"),
        ({"threshold": -1.0}, "zeros must stay zeros"),
        ({"threshold": 0.0, "compare": ">=", "relative": "max"}, "zeros must stay zeros"),
        ({"threshold": np.nan}, "`threshold` must be a finite number; got nan"),
        ({"threshold": "1"}, "`threshold` must be a finite number; got '1'"),
        ({"threshold": 1.5, "relative": "quantile"}, "fraction of 0 to 1; got 1.5"),
        ({"threshold": 1.0, "relative": "max"}, "must be below 1, or nothing in the rows of fit is above it"),
        ({"compare": "=>"}, "`compare` must be `>` or `>=`; got '=>'"),
        ({"relative": "quantil"}, "`relative` must be None, `max` or `quantile`.*Did you mean `quantile`"),
    ],
)
def test_binarize_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Binarize(**settings).fit(np.ones((2, 2)))


def test_zero_is_a_threshold_that_keeps_what_fired() -> None:
    x = sparse_with_zeros(np.array([[0.0, 0.1], [3.0, 0.0]]))
    assert Binarize(0.0).fit_transform(x).toarray().tolist() == [[0, 1], [1, 0]]
    assert Binarize(0.0, compare=">=", relative="quantile").fit_transform(x).nnz == 2


# ----------------------------------------------------------------------------------------------------------- scores


def brute(x: np.ndarray, label: np.ndarray, by: str) -> np.ndarray:
    """The definition, column by column and class by class."""
    scores = []
    for column in x.T:
        found = []
        for c in np.unique(label):
            inside, outside = column[label == c], column[label != c]
            if by == "auc":
                auc = roc_auc_score(label == c, column)
                found.append(max(auc, 1 - auc))
                continue
            difference = abs(inside.mean() - outside.mean())
            if by == "mean_difference_nonzero":
                nonzero = column[column != 0]
                mean = np.abs(nonzero).mean() if len(nonzero) else 0
                difference = difference / mean if mean else 0
            found.append(difference)
        scores.append(max(found))
    return np.array(scores)


@given(labelled(), st.sampled_from(["mean_difference", "mean_difference_nonzero", "auc"]))
def test_scores_are_their_definitions(case: tuple[np.ndarray, np.ndarray], by: str) -> None:
    x, label = case
    n_classes = len(np.unique(label))
    expected = brute(x, label, by)
    for given_x in (x, sp.csr_matrix(x), sp.csc_matrix(x), sparse_with_zeros(x)):
        found, _ = rate_latents(given_x, label, n_classes, by)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@given(labelled())
def test_chi2_is_that_of_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    x, label = np.abs(case[0]), case[1]
    scores, pvalues = rate_latents(sp.csr_matrix(x), label, len(np.unique(label)), "chi2")
    with np.errstate(invalid="ignore"):
        expected, p = chi2(x, label)
    np.testing.assert_allclose(scores, np.nan_to_num(expected), rtol=1e-9)
    np.testing.assert_allclose(pvalues, np.where(np.isnan(p), 1.0, p), rtol=1e-9)


@given(labelled(), st.sampled_from(SCORES[:4]))
def test_permuted_columns_have_permuted_scores(case: tuple[np.ndarray, np.ndarray], by: str) -> None:
    x, label = np.abs(case[0]), case[1]
    order = np.random.default_rng(0).permutation(x.shape[1])
    n_classes = len(np.unique(label))
    found, _ = rate_latents(sp.csr_matrix(x[:, order]), label, n_classes, by)
    np.testing.assert_array_equal(found, rate_latents(sp.csr_matrix(x), label, n_classes, by)[0][order])


def planted(n: int = 200, d: int = 50, n_classes: int = 2, seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Sparse noise in which column 7c + 3 tells class c."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=(n, d)) * (rng.random((n, d)) < 0.1)
    label = np.arange(n) % n_classes
    for c in range(n_classes):
        x[label == c, 7 * c + 3] += 1.5
    return sp.csr_matrix(x), label


@pytest.mark.parametrize("by", [by for by in SCORES if by != "random"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_planted_columns_are_found(by: str, n_classes: int) -> None:
    x, label = planted(n_classes=n_classes)
    names = np.array(["cat", "dog", "fox"])[label]
    step = SelectLatents(n_classes, scoring=by).fit(x, names)
    assert step.get_support(indices=True).tolist() == [7 * c + 3 for c in range(n_classes)]
    assert sorted(step.order_.tolist()) == step.get_support(indices=True).tolist()
    assert step.classes_.tolist() == sorted(set(names))
    assert (step.pvalues_ is None) == (by != "chi2")


def test_one_column_of_each_class_is_found_in_many_classes() -> None:
    x, label = planted(n=400, d=80, n_classes=10)
    found = SelectLatents(10, scoring="auc").fit(x, label).get_support(indices=True)
    assert found.tolist() == [7 * c + 3 for c in range(10)]


def test_columns_that_enter_the_l1_path_earlier_score_higher() -> None:
    x, label = planted(n=400)
    x = x.tolil()
    rng = np.random.default_rng(1)
    for column, share in ((12, 0.5), (22, 0.3)):
        chosen = np.flatnonzero((label == 0) & (rng.random(400) < share))
        x[chosen, column] = 2.0
    scores = SelectLatents(12, scoring="l1").fit(sp.csr_matrix(x), label).scores_
    steps = np.floor(scores)
    assert steps[3] > steps[12] > steps[22] > 1


def test_what_the_l1_path_does_not_reach_comes_behind_in_order_of_its_gradient() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(300) % 2
    x = rng.random((300, 40)) * (rng.random((300, 40)) < 0.1)
    x[:, 30] = label  # tells all, so that the path needs no other
    x[:, 20] = label * (rng.random(300) < 0.9)
    x[:, 10] = label * (rng.random(300) < 0.6)
    step = SelectLatents(3, scoring="l1").fit(sp.csr_matrix(x), label)
    assert step.order_.tolist() == [30, 20, 10]
    assert step.scores_[30] > 12  # in at the first of 12 steps


# -------------------------------------------------------------------------------------------------------- selection


def test_selection_stays_sparse_and_never_becomes_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    x, label = planted(d=3000)

    for kind in (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.coo_array, sp.coo_matrix):
        original = kind.toarray

        def toarray(self: Any, *args: Any, original: Any = original, **settings: Any) -> Any:
            assert self.shape != x.shape, "the features were made dense"
            return original(self, *args, **settings)

        monkeypatch.setattr(kind, "toarray", toarray)
    for by in SCORES:
        found = SelectLatents(5, scoring=by).fit_transform(x, label)
        assert sp.issparse(found)
        assert found.format == "csr"
        assert found.shape == (200, 5)
    kept = SelectLatents(5).fit(x, label)
    back = kept.inverse_transform(kept.transform(x))
    assert sp.issparse(back)
    assert back.shape == x.shape


def test_equal_scores_go_to_the_lower_column() -> None:
    x = np.tile([[0.0], [1.0]], (4, 6))
    for by in ("mean_difference", "auc", "chi2"):
        assert SelectLatents(3, scoring=by).fit(x, [0, 1] * 4).order_.tolist() == [0, 1, 2]
    assert SelectLatents(2, scoring="stability", scores=[1, 3, 3, 3, 0, 0]).fit(x).order_.tolist() == [1, 2]


def test_scores_from_elsewhere_need_no_labels() -> None:
    x = sp.csr_matrix(np.eye(4))
    step = SelectLatents(2, scoring="stability", scores=np.array([0.1, 0.9, 0.2, 0.8])).fit(x)
    assert step.get_support(indices=True).tolist() == [1, 3]
    assert step.get_feature_names_out([f"sae_{i}" for i in range(4)]).tolist() == ["sae_1", "sae_3"]
    for wrong in ([1, 2, 3], [1, 2, np.nan, 3]):
        with pytest.raises(ConfigError, match="`scores` must be 4 numbers, one per column, none NaN"):
            SelectLatents(2, scores=wrong).fit(x)


def test_random_selection_is_a_matter_of_the_seed() -> None:
    x = np.ones((3, 100))
    chosen = [set(SelectLatents(10, scoring="random", random_state=seed).fit(x).order_.tolist()) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_more_columns_than_there_are() -> None:
    x, label = planted(d=30)
    with pytest.warns(UserWarning, match="k=31 is more than the 30 columns; all are kept"):
        assert SelectLatents(31).fit_transform(x, label).shape == (200, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SelectLatents("all").fit_transform(x, label).shape == (200, 30)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "`k` must be a positive integer or `all`; got 0"),
        ({"k": True}, "`k` must be a positive integer"),
        ({"k": 2.0}, "`k` must be a positive integer"),
        (
            {"scoring": "mean_diference"},
            "`scoring` must be one of.*got 'mean_diference'.*Did you mean `mean_difference`",
        ),
        ({"scoring": "stability"}, "or `scores` must be given"),
    ],
)
def test_selection_refuses_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectLatents(**settings).fit(np.ones((4, 3)), [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 1, 1, 1], "at least two classes; all 4 rows are of one class, "),
        (["a", None, "b", "a"], "1 of 4 are NaN or None: rows `1`"),
        ([0.0, 1.0, np.nan, np.nan], "2 of 4 are NaN or None: rows `2`, `3`"),
        ([0.1, 0.2, 0.3, 0.4], "labels must be classes; got continuous values"),
        ([[0, 1], [1, 0], [1, 1], [0, 0]], r"one per row; got an array of shape \(4, 2\)"),
        (None, "requires y to be passed"),
        ([], "at least one row with a label"),
    ],
)
def test_labels_that_cannot_be_used(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        SelectLatents(1).fit(np.ones((4, 3)), labels)
    assert isinstance(raised.value, ValueError)


def test_chi2_refuses_negative_features() -> None:
    with pytest.raises(DataError, match="chi2 needs features that are not negative"):
        SelectLatents(1, scoring="chi2").fit([[1.0], [-1.0]], [0, 1])


def test_a_class_with_one_member_can_be_rated() -> None:
    x = sp.csr_matrix([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    assert SelectLatents(1).fit(x, ["a", "b", "a"]).order_.tolist() == [1]


def test_parameters_are_kept_as_they_were_given() -> None:
    scores = np.arange(3.0)
    step = SelectLatents(2, scoring="x", scores=scores)
    assert step.get_params()["scores"] is scores
    assert clone(step).get_params()["scoring"] == "x"


def test_files_of_an_earlier_version_had_other_names() -> None:
    state = SelectLatents(2, scoring="auc", random_state=3).__getstate__()
    old = {"scoring": "by", "random_state": "seed"}
    again = SelectLatents()
    again.__setstate__({old.get(name, name): value for name, value in state.items()})
    assert again.get_params() == {"k": 2, "scoring": "auc", "scores": None, "random_state": 3}


# ---------------------------------------------------------------------------------------------------------- leaks


def noise(n: int, n_features: int, seed: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Codes as sparse as an SAE's, and labels that have nothing to do with them."""
    rng = np.random.default_rng(seed)
    x = sp.random_array((n, n_features), density=0.05, format="csr", rng=rng, data_sampler=rng.standard_exponential)
    return sp.csr_matrix(x), rng.permutation(np.arange(n) % 2)


def out_of_fold_auc(model: Any, x: Any, y: np.ndarray, seed: int) -> float:
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    aucs = []
    p = cross_val_predict(model, x, y, cv=folds, method="decision_function")
    for _, test in folds.split(np.zeros(len(y)), y):
        aucs.append(roc_auc_score(y[test], p[test]))  # within a fold: scores of two fits have no common zero
    return float(np.mean(aucs))


def test_noise_has_no_signal_unless_columns_are_chosen_before_the_folds() -> None:
    """20 rows of noise in 16,384 columns: selection inside the folds finds nothing, before them nearly everything."""
    nested, leaky = [], []
    for seed in range(40):
        x, y = noise(20, 16_384, seed)
        pipeline = make_pipeline(SelectLatents(128), LogisticRegression())
        nested.append(out_of_fold_auc(pipeline, x, y, seed))
        if seed < 8:
            leaky.append(out_of_fold_auc(LogisticRegression(), SelectLatents(128).fit_transform(x, y), y, seed))
    error = np.std(nested, ddof=1) / len(nested) ** 0.5
    assert abs(np.mean(nested) - 0.5) < 3 * error
    assert error < 0.05
    assert np.mean(leaky) > 0.85
