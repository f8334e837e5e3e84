"""What a grid shares gives the same classifiers as scikit-learn's own fits, one value at a time."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.decomposition import TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier

from saekit.classification import solvers
from saekit.classification.arms import Arm
from saekit.classification.fit import fit_arm, fit_reduction
from saekit.classification.probes import PROBES, Grid
from saekit.classification.settings import Budget
from saekit.classification.solvers import Rows


def rows(n: int, d: int, n_classes: int, *, is_sparse: bool = False) -> tuple:
    generator = np.random.default_rng(n + d)
    y = np.minimum(generator.geometric(0.5, n) - 1, n_classes - 1) + 3  # skewed; codes need not begin at 0
    x = generator.normal(size=(n, d)).astype(np.float32)
    x[:, :n_classes] += 1.5 * np.eye(n_classes, dtype=np.float32)[y - 3]
    return (scipy.sparse.csr_matrix(np.where(x > 0.8, x, 0)) if is_sparse else x), y


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("d", [12, 150])
def test_ridge_is_that_of_scikit_learn(d, is_sparse, n_classes):
    x, y = rows(100, d, n_classes, is_sparse=is_sparse)
    solver = solvers.ridge(Rows(x), y)
    assert solver is not None
    dense = x.toarray() if is_sparse else x
    for alpha in (0.1, 10.0, 1000.0):
        theirs = RidgeClassifier(alpha, class_weight="balanced").fit(dense.astype(np.float64), y)
        ours = solver(alpha)
        assert ours.decision_function(x) == pytest.approx(theirs.decision_function(dense), abs=1e-5)
        assert (ours.predict(x) == theirs.predict(dense)).all()


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("d", [12, 150])
def test_discriminant_analysis_is_that_of_scikit_learn(d, n_classes):
    x, y = rows(100, d, n_classes)
    solver, x = solvers.discriminant(Rows(x), y), x.astype(np.float64)
    for shrinkage in (0.01, 0.3, 1.0):
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, y)
        found = solver(shrinkage).decision_function(x)
        found = found[:, 1] - found[:, 0] if n_classes == 2 else found
        assert found == pytest.approx(theirs.decision_function(x), rel=1e-6, abs=1e-6)
        assert (solver(shrinkage).predict(x) == theirs.predict(x)).all()


@pytest.mark.parametrize("is_sparse", [False, True])
def test_narrowed_rows_give_the_same_logistic_regression(is_sparse):
    x, y = rows(90, 400, 3, is_sparse=is_sparse)
    found = solvers.narrowed(Rows(x[:60], x[60:]))
    A, B = found.X, found.others
    assert (A.shape, B.shape) == ((60, 60), (30, 60))
    own, same = (LogisticRegression(C=0.5, solver="newton-cg", tol=1e-7).fit(rows, y[:60]) for rows in (x[:60], A))
    assert same.predict_proba(B) == pytest.approx(own.predict_proba(x[60:]), abs=1e-5)
    alone = Rows(x[:60])
    np.testing.assert_allclose(solvers.narrowed(alone).X, A)
    solvers.widen(same, found, alone)
    assert same.predict_proba(x[60:]) == pytest.approx(own.predict_proba(x[60:]), abs=1e-5)
    assert same.coef_ == pytest.approx(own.coef_, abs=1e-5)


def test_products_of_sparse_rows_are_those_of_dense_ones():
    """Columns that are active in few rows and in many, which are multiplied in two ways."""
    generator = np.random.default_rng(0)
    x = np.where(generator.random((80, 300)) < np.linspace(0.001, 0.9, 300), generator.random((80, 300)), 0)
    x = x.astype(np.float32)
    found = Rows(scipy.sparse.csr_matrix(x[:50]), scipy.sparse.csr_matrix(x[50:]))
    exact = x.astype(np.float64) @ x.T
    assert found.gram == pytest.approx(exact[:50, :50], abs=1e-6)
    assert found.between == pytest.approx(exact[50:, :50], abs=1e-6)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("d", [400, 50])
def test_leading_directions_are_those_of_singular_vectors(d, is_sparse):
    """The same inner products within and between rows as scikit-learn's exact decomposition gives."""
    x, _ = rows(90, d, 3, is_sparse=is_sparse)
    found = solvers.leading(Rows(x[:60], x[60:]), 10)
    assert found is not None
    step = TruncatedSVD(10, algorithm="arpack", random_state=0)
    theirs = step.fit_transform(x[:60].astype(np.float64)), step.transform(x[60:].astype(np.float64))
    for one, other in zip((found.X, found.others), theirs):
        assert one @ found.X.T == pytest.approx(other @ theirs[0].T, abs=1e-4)


def test_leading_directions_of_many_rows_are_nearly_the_exact_ones(monkeypatch):
    generator = np.random.default_rng(2)
    x = generator.normal(size=(150, 90)) * 0.9 ** np.arange(90) @ generator.normal(size=(90, 300)) / 9
    exact = solvers.leading(Rows(x[:120], x[120:]), 12)
    for name, value in {"EXACT_ROWS": 50, "SPARE": 16}.items():
        monkeypatch.setattr(solvers, name, value)
    near = solvers.leading(Rows(x[:120], x[120:]), 12)
    assert exact is not None
    assert near is not None
    for one, other in zip((near.X, near.others), (exact.X, exact.others)):
        assert one @ near.X.T == pytest.approx(other @ exact.X.T, abs=2e-3 * float(np.abs(exact.X).max()) ** 2)


@pytest.mark.parametrize("d", [400, 60])
@pytest.mark.parametrize("is_sparse", [False, True])
def test_a_reduction_from_products_is_that_of_scikit_learn(d, is_sparse):
    """On rows that it was fitted on and on others."""
    x, _ = rows(90, d, 3, is_sparse=is_sparse)
    step, same = TruncatedSVD(10, random_state=0), TruncatedSVD(10, algorithm="arpack", random_state=0)
    A, B = fit_reduction(step, Rows(x[:60])), same.fit_transform(x[:60].astype(np.float64))
    assert step.transform(x[:60]) == pytest.approx(A, abs=1e-4)
    assert step.transform(x[60:]) @ A.T == pytest.approx(same.transform(x[60:].astype(np.float64)) @ B.T, abs=1e-3)
    assert step.singular_values_ == pytest.approx(same.singular_values_, rel=1e-4)
    assert step.explained_variance_ == pytest.approx(same.explained_variance_, rel=1e-3)


def test_rows_stay_as_they_are_where_nothing_is_gained():
    tall, _ = rows(60, 20, 2)
    sparse = scipy.sparse.random(60, 4000, density=1e-4, format="csr", random_state=0)
    for x in (tall, sparse):
        assert solvers.narrowed(Rows(x)).X is x


def test_too_many_rows_are_not_solved_for(monkeypatch):
    monkeypatch.setattr(solvers, "SOLVED_ROWS", 20)
    x, y = rows(40, 30, 2)
    assert solvers.ridge(Rows(x), y) is None
    wide = x[:25]
    assert solvers.narrowed(Rows(wide)).X is wide
    assert solvers.leading(Rows(x), 5) is None
    fitted = fit_arm(Arm("x", "dense", "x", probe="ridge"), x, y)
    assert fitted.chosen["alpha"] in Budget().alphas


@pytest.mark.parametrize("is_sparse", [False, True])
def test_discriminant_analysis_sees_all_directions_of_dense_rows(is_sparse):
    """Singular vectors of the largest variance may leave out what tells the classes apart."""
    x, y = rows(60, 520, 2, is_sparse=is_sparse)
    fitted = fit_arm(Arm("x", "dense", "x", probe="lda"), x, y, budget=Budget(shrinkages=(0.3,)))
    assert ("reduce" in fitted.pipeline.named_steps) == is_sparse


def test_a_grid_ends_where_larger_values_lead_away():
    grid = Grid(PROBES["logistic"], Budget())
    for value, score in ((0.01, 0.7), (0.1, 0.8), (1.0, 0.8), (10.0, 0.7)):
        grid.scores[value] = score
        assert not grid.is_past
    grid.scores = {0.01: 0.7, 0.1: 0.8, 1.0: 0.75, 10.0: 0.7}
    assert (grid.is_past, grid.edge) == (True, 0)


def test_steps_of_a_representation_are_fitted_once(monkeypatch):
    """Not again for every probe: three inner folds, and once on all rows for those that are fitted at the end."""
    from saekit.classification import fit

    fits, made = [], fit._steps
    monkeypatch.setattr(fit, "_steps", lambda *given: fits.append(given[0].representation) or made(*given))
    x, y = rows(120, 10, 2)
    arms = tuple(Arm(f"x, {probe}", "dense", "x", probe=probe) for probe in ("logistic", "balanced", "lda", "ridge"))
    fit_arm(Arm("strongest", "strongest", probe="search", candidates=arms), {"x": x}, y, budget=Budget(C=(0.1, 1.0)))
    assert len(fits) == 4
