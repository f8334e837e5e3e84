"""Families of arms: the choice within them is made in the training rows, and is part of what is reported."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from fixtures.worded_classes import COMMON, plan_of, run
from saekit.classification.arms import Arm
from saekit.classification.choices import RESAMPLES
from saekit.classification.families import family_scores, resampled
from saekit.classification.fit import Tuned, _votes, fit_arm, inner_folds, predict_arm, tune_arm
from saekit.classification.result import Classification
from saekit.classification.run import judged
from saekit.classification.settings import Budget
from saekit.measure.paired_scores import macro_f1_of
from saekit.measure.results import Measured
from saekit.report.page import render
from saekit.settings import silent

PROBES = ("logistic", "balanced", "lda", "ridge", "svm")
QUICK = Budget(C=(0.1, 1.0), widen=0)


def noise(n: int, seed: int, *, width: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=(n, width)).astype(np.float32) for name in "abc"}


def search(features: str = "abc", probes: tuple[str, ...] = PROBES, voters: int = 0) -> Arm:
    candidates = tuple(Arm(f"{f}, {p}", "dense", f, probe=p) for f in features for p in probes)
    return Arm("strongest", "strongest", probe="search", candidates=candidates, voters=voters)


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("n_classes", [2, 4])
def test_every_probe_gives_probabilities_that_fit_its_labels(probe, n_classes):
    """Rows that were not learned from: the labels are those of the largest probability, which is worth its name."""
    generator = np.random.default_rng(0)
    y = np.arange(400) % n_classes
    x = generator.normal(size=(400, 12)).astype(np.float32)
    x[:, :n_classes] += 2 * np.eye(n_classes, dtype=np.float32)[y]
    fitted = fit_arm(Arm("x", "dense", "x", probe=probe), x[:300], y[:300])
    found = predict_arm(fitted, x[300:], n_classes).probabilities
    assert found.sum(1) == pytest.approx(1, abs=1e-5)
    assert (found.argmax(1) == fitted.pipeline.predict(x[300:])).all()
    assert (found.argmax(1) == y[300:]).mean() > 0.65
    assert -np.log(found[np.arange(100), y[300:]]).mean() < 0.9 * np.log(n_classes)
    assert fitted.labels is not None
    assert macro_f1_of(y[:300], fitted.labels, np.ones((1, 300), np.float32))[0] == pytest.approx(
        fitted.inner_score, abs=0.03
    )


def test_a_search_finds_the_representation_and_fits_what_it_could_have_chosen():
    X, y = noise(300, 1), np.arange(300) % 3
    X["b"][:, :3] += 2 * np.eye(3, dtype=np.float32)[y]
    fitted = fit_arm(search(), X, y, budget=Budget(C=(0.1, 1.0), widen=0, keep=1, finalists=5))
    assert fitted.chosen["arm"].startswith("b, ")
    assert len(fitted.finalists) == 4
    scores = [fitted.inner_score, *(each.inner_score for each in fitted.finalists)]
    assert scores == sorted(scores, reverse=True)
    again = fit_arm(search(), X, y, budget=QUICK, chosen=fitted.chosen)
    one, other = (predict_arm(each, X, 3).probabilities for each in (fitted, again))
    assert np.array_equal(one, other)


@pytest.mark.parametrize("metric", ["macro_f1", "auc"])
def test_another_hyperparameter_could_have_been_chosen(metric):
    """Ridge on noise with a faint signal: penalties are alike, so that resampled rows choose others as well."""
    generator = np.random.default_rng(0)
    y = np.arange(200) % 2
    x = generator.normal(size=(200, 60)).astype(np.float32) + 0.2 * y[:, None].astype(np.float32)
    arm = Arm("x", "dense", "x", probe="ridge")
    fitted = fit_arm(arm, x, y, metric=metric)
    choices = [fitted, *fitted.finalists]
    penalties = [each.chosen["alpha"] for each in choices]
    assert len(set(penalties)) == len(penalties) > 2
    for each in choices:  # each is what it would be if it had been chosen
        alone = fit_arm(arm, x, y, chosen=each.chosen)
        one, other = (predict_arm(fit, x, 2).probabilities for fit in (each, alone))
        assert np.array_equal(one, other)
    assert fit_arm(arm, x, y, budget=Budget(finalists=1)).finalists == ()


def half_told(metric: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every feature tells a part of the classes: together they tell more."""
    X, y = noise(240, 3, width=12), np.arange(240) % (2 if metric == "auc" else 3)
    for at, name in enumerate("abc"):
        X[name][:, 0] += 1.2 * (y == at % (y.max() + 1))
    return X, y


@pytest.mark.parametrize("metric", ["macro_f1", "auc"])
def test_a_vote_is_the_mean_of_its_arms_in_the_inner_folds_too(metric):
    """Its score is that of the mean of what its arms say, each fitted by itself, to rows that they have not seen."""
    (X, y), budget = half_told(metric), Budget(C=(0.1, 1.0), widen=0, keep=None, finalists=60)
    fitted = fit_arm(search(probes=("logistic", "balanced", "lda"), voters=4), X, y, budget=budget, metric=metric)
    votes = [each for each in fitted.finalists if each.voters]
    assert 1 <= len(votes) <= 3
    assert not fitted.voters  # what is saved, and shuffled, is one arm
    assert max(each.inner_score for each in votes) > fitted.inner_score
    for vote in votes:
        assert vote.voters[0].chosen == fitted.chosen
        assert len({each.chosen["arm"] for each in vote.voters}) == len(vote.voters) <= 4
        found = [predict_arm(each, X, y.max() + 1).probabilities for each in vote.voters]
        assert predict_arm(vote, X, y.max() + 1).probabilities == pytest.approx(np.mean(found, axis=0))
        scores = []
        for train, rest in inner_folds(y, None, budget):
            within = {name: x[train] for name, x in X.items()}
            arms = [fit_arm(search(), within, y[train], budget=budget, chosen=each.chosen) for each in vote.voters]
            outside = {name: x[rest] for name, x in X.items()}
            said = np.mean([predict_arm(each, outside, y.max() + 1).probabilities for each in arms], axis=0)
            by_class = f1_score(y[rest], said.argmax(1), average="macro")
            scores.append(roc_auc_score(y[rest], said[:, 1]) if metric == "auc" else by_class)
        assert vote.inner_score == pytest.approx(np.mean(scores), abs=2e-3)  # C goes on from fit to fit there


@pytest.mark.parametrize("probe", [*PROBES, "tree"])
def test_what_votes_are_probabilities_of_what_the_inner_folds_say(probe):
    """Of decision values too: ridge and support vectors have nothing else."""
    X, y = half_told("macro_f1")
    arm = Arm("x", "dense", "x", probe=probe)
    tuned = tune_arm(arm, X["a"], y, inner_folds(y, None, QUICK), QUICK, votes=True)
    said = tuned.probabilities
    assert said is not None
    assert said.sum(1) == pytest.approx(1, abs=1e-5)
    assert (said.argmax(1) == tuned.labels).all()
    assert (said.argmax(1) == y).mean() > 0.4
    if probe != "tree":  # its leaves are certain
        assert -np.log(said[np.arange(len(y)), y]).mean() < np.log(3)
    assert tune_arm(arm, X["a"], y, inner_folds(y, None, QUICK), QUICK).probabilities is None


def test_an_arm_is_joined_by_the_one_that_helps_it_most():
    """Not by the next best one, which errs where it errs."""
    y = np.arange(40) % 2
    wrong = {"best, lda": range(8), "alike, lda": range(10), "other, lda": range(20, 34)}
    tuned = []
    for name, rows in wrong.items():
        sure = np.where(np.isin(np.arange(40), rows), 0.4, 0.9)  # of the class: little is wrong where it is
        said = np.stack([np.where(y == 0, sure, 1 - sure), np.where(y == 1, sure, 1 - sure)], axis=1)
        folds = [(np.arange(20, 40), np.arange(20)), (np.arange(20), np.arange(20, 40))]
        score = float(np.mean([f1_score(y[rows], said[rows].argmax(1), average="macro") for _, rows in folds]))
        tuned.append((Arm(name, "dense", "x", probe="lda"), Tuned({"arm": name}, score, probabilities=said)))
    votes = _votes(tuned, y, folds, 4, "macro_f1")
    assert [each.name for each in votes] == ["best, lda & other, lda", "best, lda & other, lda & alike, lda"]
    assert votes[0].score == 1.0
    assert (votes[0].labels == y).all()


def test_the_best_vote_is_fitted_however_few_finalists_there_are():
    X, y = half_told("macro_f1")
    arm = search(probes=("logistic", "lda"), voters=4)
    many, one = (fit_arm(arm, X, y, budget=Budget(keep=None, finalists=n)) for n in (60, 1))
    (vote,) = one.finalists
    best = max(many.finalists, key=lambda each: each.inner_score)
    assert len(vote.voters) > 1
    assert (vote.chosen, vote.inner_score) == (best.chosen, best.inner_score)
    assert one.chosen == many.chosen


def test_what_is_to_be_told_of_voters_is_told():
    """The best arm has nothing to tell, but one that votes with it is at the end of its grid."""
    (X, y), budget = half_told("macro_f1"), Budget(keep=None, widen=0)
    alone, voting = (fit_arm(search(probes=("ridge",), voters=n), X, y, budget=budget) for n in (0, 4))
    assert alone.chosen == voting.chosen
    assert alone.notes == ()
    assert any(note.startswith("alpha = 1000 was chosen, the largest") for note in voting.notes)


@pytest.mark.parametrize("probe", ["logistic", "lda", "ridge", "tree"])
def test_a_class_that_an_inner_fold_has_not_seen(probe):
    """Groups may leave no other way: what has not seen it says that it is not there."""
    X, y = half_told("macro_f1")
    train, rest = np.flatnonzero((np.arange(240) < 160) & (y != 1)), np.arange(160, 240)
    folds = [(train, rest), (np.arange(80, 240), np.arange(80)), (np.r_[:80, 160:240], np.arange(80, 160))]
    tuned = tune_arm(Arm("x", "dense", "x", probe=probe), X["a"], y, folds, QUICK, votes=True)
    assert tuned.probabilities is not None
    assert (tuned.probabilities[rest, 1] <= tuned.probabilities[rest].min(1)).all()
    assert tuned.probabilities.sum(1) == pytest.approx(1, abs=1e-5)


def test_arms_that_do_not_vote_are_what_they_were():
    """Their fits are found again by what they are."""
    plain = search()
    assert "voters" not in plain.to_json()
    assert "voters" not in plain.candidates[0].to_json()
    assert search(voters=4).to_json() == {**plain.to_json(), "voters": 4}
    X, y = half_told("macro_f1")
    one, other = (fit_arm(each, X, y, budget=QUICK) for each in (plain, search(voters=4)))
    assert one.chosen == other.chosen
    assert not any(each.voters for each in one.finalists)


def test_all_representations_can_be_asked_for():
    """One that ridge cannot see is left out by default, and found without screening."""
    X, y = noise(240, 2), np.arange(240) % 2
    everything = fit_arm(search(probes=("logistic", "lda")), X, y, budget=Budget(C=(1.0,), keep=None, finalists=30))
    assert {each.chosen["arm"][0] for each in (everything, *everything.finalists)} == set("abc")


@pytest.mark.parametrize("n", [20, 200])
def test_noise_is_at_chance_with_the_choice_among_arms(n):
    """Half of all rows are tested by the strongest of eight arms of noise: no more than chance tells."""
    right = []
    for seed in range(8 if n == 20 else 3):
        X, y = noise(2 * n, seed), np.arange(2 * n) % 2
        fitted = fit_arm(search("ab", PROBES[:4]), {name: x[:n] for name, x in X.items()}, y[:n], budget=QUICK)
        right.append(predict_arm(fitted, {name: x[n:] for name, x in X.items()}, 2).labels == y[n:])
    total = np.concatenate(right)
    assert abs(total.mean() - 0.5) < 3.3 * np.sqrt(0.25 / len(total))


def test_families_of_a_run(full_run):
    """Each is what its chosen arm is; the best baseline has no distance to itself; the interval holds the choice."""
    _, result = full_run
    names = [each.name for each in result.families]
    assert names == ["TF-IDF", "dense", "PCA", "random", "untrained", "SAE"]
    for each in result.families:
        arm = result.arm(each.strongest.split(": ")[0])
        assert each.n_arms >= 2
        assert sum(each.chosen.values()) == 1
        assert sum(each.again.values()) == pytest.approx(1)
        inside = ": " not in each.strongest or arm.chosen[0]["arm"] == each.strongest.split(": ")[1]
        if inside:
            assert each.macro_f1.value == pytest.approx(arm.macro_f1.value)
            assert each.macro_f1.low <= arm.macro_f1.low + 1e-9  # type: ignore[operator]
    base = next(each for each in result.families if each.name == each.baseline)
    assert (base.difference.value, base.verdict) == (0.0, "equivalent")
    sae = result.families[-1]
    assert sae.difference.value == pytest.approx(sae.macro_f1.value - base.macro_f1.value)
    assert sae.verdict in result.conclusion() or sae.verdict == "equivalent"
    control = next(each for each in result.families if each.name == sae.control)
    assert control.role == "control"
    mine, theirs = (getattr(each, result.verdict_metric) for each in (sae, control))
    assert sae.control_difference.value == pytest.approx(mine.value - theirs.value)
    assert sae.control_difference.low <= sae.control_difference.value <= sae.control_difference.high
    assert f"({control.name})" in result.conclusion()
    assert "Families of classifiers" in render([result])
    assert result.families_table()[1][0] == "TF-IDF"
    assert Classification.from_json(result.to_json()) == result


def test_results_without_families_still_load(full_run):
    _, result = full_run
    plain = {**result.to_json(), "schema": 2}
    del plain["families"]
    old = Classification.from_json(plain)
    assert (old.families, old.conclusion()) == ([], "")
    assert "Families" not in render([old])
    before = result.to_json()  # as of a build that did not compare the SAE with what learned nothing
    for family in before["families"]:
        for name in ("control", "control_difference", "control_verdict"):
            del family[name]
    assert Classification.from_json(before).families[-1].control is None


def test_the_choice_is_made_again_where_groups_are_drawn(full_run):
    plan, _ = full_run
    (weights,) = resampled(judged(plan, silent))
    train = plan.parts[0][0][0]
    assert weights.shape == (1 + RESAMPLES, len(train))
    assert (weights[0] == 1).all()
    groups = plan.data.groups[train]
    for group in np.unique(groups):
        assert (np.ptp(weights[:, groups == group], axis=1) == 0).all()


def test_an_uncertain_choice_widens_the_interval(lm, sae, rows):
    """Arms that differ on the test rows, but not in what the inner folds said: chance chooses among them."""
    plan = plan_of(lm, sae, rows, **{**COMMON, "arms": ("words", "full", "sparse", "tree")}, shuffles=0)
    found = judged(plan, silent)
    certain = {each.name: each for each in family_scores(found)}
    for seed, fit in enumerate(found.fits.values()):
        fit.labels[0][:] = np.random.default_rng(seed).integers(0, 2, fit.labels[0].shape)
        for option in fit.facts["options"][0]:
            option["inner"] = 0.5
    loose = {each.name: each for each in family_scores(found)}
    assert len(loose["SAE"].again) > len(certain["SAE"].again)
    assert width(loose["SAE"].macro_f1) > 1.1 * width(certain["SAE"].macro_f1)
    assert width(loose["SAE"].difference) > 1.1 * width(certain["SAE"].difference)


def width(measured: Measured) -> float:
    assert measured.low is not None
    assert measured.high is not None
    return measured.high - measured.low


def test_folds_choose_their_arms_one_by_one(lm, sae, rows):
    budget = {**COMMON["budget"], "C": (1.0,)}
    result = run(
        lm, sae, rows, **COMMON | {"arms": ("dense", "full", "strongest"), "budget": budget}, folds=3, shuffles=0
    )
    for each in result.families:
        assert sum(each.chosen.values()) == 3
    assert "of 3 folds" in result.families_table()[1][2]
