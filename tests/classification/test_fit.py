"""Arms: nothing of the test rows is known in training, one budget for all, and selections are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler, StandardScaler

from saekit.classification.arms import Arm
from saekit.classification.fit import fit_arm, inner_folds, predict_arm, selection_stability
from saekit.classification.probes import EDGE, PROBES, Grid
from saekit.classification.settings import KINDS, Budget
from saekit.classification.sklearn_steps import DensityMatched, MeanDifference, density_partners
from saekit.errors import ConfigError, DataError
from saekit.estimators.select import SelectLatents
from saekit.measure.paired_scores import HeldOut, Predictions, auc_of, score

QUICK = Budget(C=(0.1, 1.0), depths=(2, 3), thresholds=(0.0, "median"), widen=0)

SPARSE = [
    Arm("full", "full", "z"),
    Arm("binarized", "binarized", "z", steps=("binarize",)),
    Arm("k=4", "sparse", "z", steps=("select",), k=4),
    Arm("matched", "matched", "z", steps=("match",), k=4),
    Arm("tree", "tree", "z", probe="tree"),
    Arm("binarized tree", "binarized-tree", "z", steps=("binarize",), probe="tree"),
]
DENSE = [
    Arm("dense", "dense", "x"),
    Arm("dense tree", "dense-tree", "x", probe="tree"),
    Arm("class means", "difference", "x", steps=("means",)),
    Arm("pca", "pca", "x", steps=("pca",), k=4),
    Arm("svd", "svd", "x", steps=("svd",), k=4),
    Arm("ica", "ica", "x", steps=("ica",), k=2),
]
WORDS = [
    Arm("majority", "majority", "texts", probe="majority"),
    Arm("words", "words", "texts", steps=("words",)),
]


def features(n: int, n_classes: int, seed: int = 0, *, signal: float = 1.0) -> dict:
    """Sparse codes, dense states and texts of which some columns (words) tell the class."""
    generator = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    z = scipy.sparse.random(n, 60, density=0.15, random_state=seed, dtype=np.float32).tolil()
    for c in range(n_classes):
        rows = np.flatnonzero(y == c)
        z[rows[generator.random(len(rows)) < 0.8 * signal], c] = 2.0
    x = generator.normal(size=(n, 12)).astype(np.float32)
    x[:, :n_classes] += 2 * signal * np.eye(n_classes, dtype=np.float32)[y]
    words = np.array([f"class{c}" if generator.random() < signal else "other" for c in y])
    texts = [f"{word} {' '.join(generator.choice(['a1', 'b2', 'c3', 'd4'], 4))}" for word in words]
    return {"y": y, "z": z.tocsr(), "x": x, "texts": texts}


def matrix(data: dict, arm: Arm, rows: np.ndarray):
    X = data[arm.features]
    return [X[row] for row in rows] if isinstance(X, list) else X[rows]


@pytest.mark.parametrize("arm", [*SPARSE, *DENSE, *WORDS], ids=lambda arm: arm.name)
@pytest.mark.parametrize("n_classes", [2, 4])
def test_every_arm_learns_what_is_there_and_nothing_from_shuffled_labels(arm, n_classes):
    data = features(320, n_classes)
    train, test = np.arange(240), np.arange(240, 320)
    y = data["y"]
    fitted = fit_arm(arm, matrix(data, arm, train), y[train], budget=QUICK)
    predictions = predict_arm(fitted, matrix(data, arm, test), n_classes)
    assert predictions.probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    found = score(predictions, HeldOut.over(y[test]))
    if arm.kind not in ("majority", "matched"):
        assert found["auc"].value > 0.7
        assert fitted.converged
    again = fit_arm(arm, matrix(data, arm, train), y[train], budget=QUICK)
    assert np.array_equal(
        predict_arm(again, matrix(data, arm, test), n_classes).probabilities, predictions.probabilities
    )

    generator = np.random.default_rng(1)
    shuffled = y.copy()
    shuffled[train], shuffled[test] = generator.permutation(y[train]), generator.permutation(y[test])
    noise = fit_arm(arm, matrix(data, arm, train), shuffled[train], budget=QUICK, chosen=fitted.chosen)
    guess = predict_arm(noise, matrix(data, arm, test), n_classes)
    chance = score(guess, HeldOut.over(shuffled[test]), ("auc",))["auc"]
    assert abs(chance.value - 0.5) <= 3.3 * chance.spread.error + 1e-12  # type: ignore[union-attr]


@pytest.mark.parametrize("n", [20, 60])
def test_selection_within_the_folds_finds_nothing_in_noise_and_outside_finds_it(n):
    """16,384 columns of sparse noise: the classic leak gives an AUC above 0.85 where there is nothing to know."""
    arm = Arm("k=128", "sparse", "z", steps=("select",), k=128)
    budget = Budget(C=(1.0,), inner=2)
    nested, leaky, errors = [], [], []
    for seed in range(6):
        z = scipy.sparse.random(n, 16_384, density=0.05, random_state=seed, format="csr", dtype=np.float32)
        y = np.arange(n) % 2
        parts = inner_folds(y, None, Budget(inner=5, seed=seed))
        test = np.concatenate([rows for _, rows in parts])
        folds = np.repeat(np.arange(5), [len(rows) for _, rows in parts])
        guesses = [predict_arm(fit_arm(arm, z[a], y[a], budget=budget), z[b], 2).probabilities for a, b in parts]
        held_out = HeldOut.over(y[test], folds=folds)
        found = score(Predictions(np.concatenate(guesses)), held_out, ("auc",))["auc"]
        nested.append(found.value)
        errors.append(found.spread.error)  # type: ignore[union-attr]

        peeked = SelectLatents(128).fit(z, y).transform(z)
        guesses = []
        for a, b in parts:
            model = make_pipeline(MaxAbsScaler(), LogisticRegression()).fit(peeked[a], y[a])
            guesses.append(model.predict_proba(peeked[b]))
        leaky.append(score(Predictions(np.concatenate(guesses)), held_out, ("auc",))["auc"].value)
    assert np.mean(leaky) > 0.85
    assert abs(np.mean(nested) - 0.5) < 3 * np.sqrt(np.mean(np.square(errors)) / len(nested)) + 0.02


def test_settings_are_chosen_by_the_inner_folds_and_all_arms_have_one_grid():
    data = features(200, 2)
    fitted = fit_arm(SPARSE[1], data["z"], data["y"], budget=QUICK)
    assert set(fitted.chosen) == {"threshold", "C"}
    assert fitted.chosen["C"] in QUICK.C
    assert fitted.chosen["threshold"] in QUICK.thresholds
    assert 0.5 < fitted.inner_score <= 1
    assert fit_arm(SPARSE[4], data["z"], data["y"], budget=QUICK).chosen["depth"] in QUICK.depths
    given = fit_arm(SPARSE[0], data["z"], data["y"], chosen={"C": 0.3})
    assert given.chosen == {"C": 0.3}
    assert np.isnan(given.inner_score)


@pytest.mark.parametrize("probe", ["logistic", "lda", "ridge", "tree"])
def test_two_classes_can_be_chosen_for_by_auc(probe):
    """The score is the mean of scikit-learn's AUC over the inner folds, and what is kept of each row gives it again."""
    generator = np.random.default_rng(4)
    y = (np.arange(150) % 5 == 0).astype(int)
    x = generator.normal(size=(150, 8)).astype(np.float32) + 0.6 * y[:, None].astype(np.float32)
    budget = Budget(C=(0.01, 1.0), alphas=(1.0, 100.0), shrinkages=(0.1, 0.6), depths=(1, 4), widen=0)
    fitted = fit_arm(Arm("x", "dense", "x", probe=probe), x, y, budget=budget, metric="auc")
    folds, setting = inner_folds(y, None, budget), PROBES[probe].setting
    scaler = [] if probe == "tree" else [StandardScaler()]
    means = {}
    for value in PROBES[probe].values(budget):
        model = make_pipeline(*scaler, PROBES[probe].make(value, budget))
        means[value] = cross_val_score(model, x, y, scoring="roc_auc", cv=folds).mean()
    assert fitted.inner_score == pytest.approx(max(means.values()), abs=2e-3)
    assert means[fitted.chosen[setting]] == pytest.approx(max(means.values()), abs=2e-3)
    assert fitted.labels is not None
    assert auc_of(y, fitted.labels, np.ones((1, 150), np.float32))[0] == pytest.approx(fitted.inner_score, abs=0.03)
    by_labels = fit_arm(Arm("x", "dense", "x", probe=probe), x, y, budget=budget)
    assert abs(by_labels.inner_score - fitted.inner_score) > 0.02  # macro-F1 is another score


def test_order_of_columns_does_not_matter():
    """Permuting latents permutes what is selected, and changes no prediction beyond rounding."""
    data = features(200, 2)
    order = np.random.default_rng(0).permutation(60)
    arm = Arm("k=2", "sparse", "z", steps=("select",), k=2)
    one = fit_arm(arm, data["z"], data["y"], budget=QUICK)
    other = fit_arm(arm, data["z"][:, order], data["y"], budget=QUICK)
    assert {int(order[j]) for j in other.selected} == set(one.selected)  # type: ignore[union-attr]
    assert predict_arm(one, data["z"], 2).probabilities == pytest.approx(
        predict_arm(other, data["z"][:, order], 2).probabilities, abs=1e-4
    )


def test_what_is_selected_and_how_stable_that_is():
    data = features(300, 2)
    fitted = fit_arm(Arm("k=2", "sparse", "z", steps=("select",), k=2), data["z"], data["y"], budget=QUICK)
    assert set(fitted.selected or ()) == {0, 1}
    assert fitted.stability == {"jaccard": 1.0, "kuncheva": 1.0}
    assert fit_arm(SPARSE[0], data["z"], data["y"], budget=QUICK).selected is None
    assert selection_stability([[0, 1], [0, 2]], 100) == {
        "jaccard": pytest.approx(1 / 3), "kuncheva": pytest.approx((1 * 100 - 4) / (2 * 98)),
    }  # fmt: skip
    assert selection_stability([[0, 1], [0, 1]], 2)["kuncheva"] == 1.0


def test_a_fit_that_does_not_converge_says_so():
    data = features(200, 4)
    budget = Budget(C=(100.0,), max_iter=2)
    fitted = fit_arm(DENSE[0], data["x"], data["y"], budget=budget)
    assert not fitted.converged
    assert any("had not converged after 2 iterations" in note for note in fitted.notes)
    assert any("inner fits stopped at 2 iterations" in note for note in fitted.notes)


def test_dead_columns_among_the_selected_are_told():
    data = features(120, 2)
    z = scipy.sparse.hstack([data["z"][:, :2], scipy.sparse.csr_matrix((120, 30), dtype=np.float32)]).tocsr()
    fitted = fit_arm(Arm("k=8", "sparse", "z", steps=("select",), k=8), z, data["y"], budget=QUICK)
    assert any("6 of the 8 selected columns are 0 in every training row" in note for note in fitted.notes)


def test_the_end_of_the_grid_is_told():
    data = features(200, 2)
    rows = np.flatnonzero((data["y"] == 0) | (np.arange(200) % 8 == 1))  # the weaker penalty is needed to see the few
    x, y = data["x"][rows], data["y"][rows]
    fitted = fit_arm(DENSE[0], x, y, budget=Budget(C=(1e-6, 1.0), widen=0))
    assert any(
        note == "C = 1 was chosen, the largest of the 2 values tried: a wider grid may give more"
        for note in fitted.notes
    )
    wider = fit_arm(DENSE[0], x, y, budget=Budget(C=(0.01, 0.1), widen=8))
    assert 0.1 < wider.chosen["C"] < 1e3
    assert not any(note.endswith(EDGE) for note in wider.notes)


class Peak:
    """Scores of a grid whose best value is known."""

    def __init__(self, values: tuple, best: float, widen: int = 9, probe: str = "logistic") -> None:
        self.grid = Grid(PROBES[probe], Budget(widen=widen))
        self.grid.values = list(values)
        self.tried: list = []
        for value in values:
            self.add(value, best)
        while (value := self.grid.wider()) is not None:
            self.add(value, best)

    def add(self, value, best) -> None:
        self.tried.append(value)
        self.grid.scores[value] = -abs(np.log(value / best))


@pytest.mark.parametrize("best", [1e-5, 1e-3, 1.0, 1e4, 1e6])
def test_a_grid_grows_at_both_ends_until_the_best_value_is_inside(best):
    """Geometrically; a score that is level at the lower end does not lead it away."""
    found = Peak((0.01, 0.1, 1.0, 10.0, 100.0), best)
    assert (found.grid.best, found.grid.edge) == (pytest.approx(best), 0)
    ordered = sorted(found.tried)
    assert ordered[0] < best < ordered[-1]
    assert np.allclose(np.diff(np.log10(ordered)), 1)


def test_a_grid_grows_within_its_bound_and_says_where_it_ends():
    found = Peak((0.1, 1.0), 1e9, widen=3)
    assert (found.tried, found.grid.edge) == ([0.1, 1.0, 10.0, 100.0, 1000.0], 1)
    assert (Peak((0.1, 1.0), 1e-9, widen=2).grid.edge, Peak((1.0,), 1e9).tried) == (-1, [1.0])
    shallow = Peak((3, 5), 1, probe="tree")  # one split is the least that a tree can have: no end of doubt
    assert (shallow.tried, shallow.grid.edge) == ([3, 5, 1], 0)
    level = Grid(PROBES["logistic"], Budget())
    level.scores = dict.fromkeys(level.values, 0.5)
    assert (level.best, level.edge, level.wider()) == (0.01, 0, None)


def test_groups_stay_in_one_fold():
    y = np.tile([0, 1], 30)
    groups = np.repeat(np.arange(30), 2)
    for train, validate in inner_folds(y, groups, Budget()):
        assert not set(groups[train]) & set(groups[validate])


def test_inner_folds_have_their_rows_of_every_class_where_groups_are_of_any_size():
    """Groups of sizes as in real data: nearer to equal folds than scikit-learn's own."""
    ours, theirs = [], []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        sizes = np.maximum(generator.pareto(1.2, 40) * 3, 1).astype(int).clip(1, 30)
        groups = np.repeat(np.arange(40), sizes)
        y = (generator.random(40) < 0.3).astype(int)[groups] ^ (generator.random(len(groups)) < 0.1)
        folds = inner_folds(y, groups, Budget(seed=seed))
        assert sorted(np.concatenate([rows for _, rows in folds])) == list(range(len(y)))
        ours.append(imbalance(y, folds))
        splitter = StratifiedGroupKFold(3, shuffle=True, random_state=seed)
        theirs.append(imbalance(y, splitter.split(y, y, groups)))
    assert np.mean(ours) < 0.75 * np.mean(theirs)


def imbalance(y, folds) -> float:
    """How far a fold is from its fraction of the rows of some class, at most."""
    parts = np.array([np.bincount(y[rows], minlength=2) for _, rows in folds]) / np.bincount(y)
    return float(np.abs(parts * len(parts) - 1).max())


def test_density_matched_columns_are_as_dense_and_not_the_best():
    data = features(300, 3)
    step = DensityMatched(3, seed=1).fit(data["z"], data["y"])
    partners = np.flatnonzero(step.get_support())
    assert not set(partners) & {0, 1, 2}
    assert step.transform(data["z"]).shape == (300, 3)
    density = np.array([10.0, 50, 11, 49, 90, 9])
    assert density_partners(density, np.array([0, 1]), near=1).tolist() == [2, 3]
    assert len(density_partners(density, np.arange(5))) == 1


def test_difference_of_means_is_one_direction():
    data = features(200, 2)
    step = MeanDifference().fit(data["x"], data["y"])
    assert step.transform(data["x"]).shape == (200, 1)
    gap = data["x"][data["y"] == 1].mean(0) - data["x"][data["y"] == 0].mean(0)
    assert step.directions_[0] == pytest.approx(gap / np.linalg.norm(gap), abs=1e-5)
    assert MeanDifference().fit(*(features(90, 3)[k] for k in ("x", "y"))).directions_.shape == (3, 12)


def test_bad_calls():
    data = features(40, 2)
    z, y = data["z"], data["y"]
    with pytest.raises(DataError, match="at least two classes"):
        fit_arm(SPARSE[0], z, np.zeros(40))
    with pytest.raises(DataError, match="one label per row; got 40 rows and 39"):
        fit_arm(SPARSE[0], z, y[:39])
    with pytest.raises(DataError, match=r"at least 3 training rows: one for each .*; there are 2"):
        fit_arm(SPARSE[0], z[:2], y[:2])
    with pytest.raises(DataError, match="`1` has fewer"):
        fit_arm(SPARSE[0], z, np.array([0] * 38 + [1] * 2))
    with pytest.raises(DataError, match="at least 3 groups"):
        fit_arm(SPARSE[0], z, y, groups=np.repeat([0, 1], 20))
    with pytest.raises(ConfigError, match="Did you mean `sparse`"):
        Arm("x", "spares")
    with pytest.raises(ConfigError, match="`probe` must be"):
        Arm("x", "full", probe="forest")
    with pytest.raises(ConfigError, match="step must be known; got `umap`"):
        fit_arm(Arm("x", "full", "z", steps=("umap",)), z, y)
    assert set(KINDS) >= {arm.kind for arm in [*SPARSE, *DENSE, *WORDS]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"C": (1.0, 0.1)}, "`C` must be increasing"),
        ({"C": ()}, "`C` must be increasing"),
        ({"alphas": (2.0, 1.0)}, "`alphas` must be increasing"),
        ({"shrinkages": (0.5, 1.5)}, "`shrinkages` must be increasing numbers above 0, up to 1"),
        ({"widen": -1}, "`widen` must be"),
        ({"depths": (0,)}, "`depths` must be"),
        ({"thresholds": ()}, "`thresholds` must be .* at least one"),
        ({"thresholds": ("mean",)}, "numbers or `median`.*'mean'"),
        ({"inner": 1}, "`inner` must be a whole number from 2"),
        ({"max_iter": 0}, "`max_iter` must be"),
    ],
)
def test_bad_budgets(settings, message):
    with pytest.raises(ConfigError, match=message):
        Budget(**settings)
