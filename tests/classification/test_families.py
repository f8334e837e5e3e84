"""Families of arms: the choice within them is made in the training rows, and is part of what is reported."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from fixtures.worded_classes import COMMON, plan_of, run
from saekit.classification.arms import Arm
from saekit.classification.choices import RESAMPLES
from saekit.classification.families import AVERAGED, _Family, _Option, _options, _Part, family_scores, resampled
from saekit.classification.fit import fit_arm, predict_arm
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


def search(features: str = "abc", probes: tuple[str, ...] = PROBES) -> Arm:
    candidates = tuple(Arm(f"{f}, {p}", "dense", f, probe=p) for f in features for p in probes)
    return Arm("strongest", "strongest", probe="search", candidates=candidates)


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
            assert each.alone is not None
            assert each.alone.value == pytest.approx(getattr(arm, result.verdict_metric).value)
            assert each.alone.low <= getattr(arm, result.verdict_metric).low + 1e-9  # type: ignore[operator]
        assert 1 <= len(each.averaged) <= AVERAGED
        assert each.strongest in each.averaged
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
    for each, line in zip(result.families, result.families_table()[1:]):
        assert (f"and {len(each.averaged) - 1} more" in line[1]) == (len(each.averaged) > 1)
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
        for name in ("control", "control_difference", "control_verdict", "averaged", "alone"):
            del family[name]
    assert Classification.from_json(before).families[-1].control is None
    assert "the mean of" not in render([Classification.from_json(before)])


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
    assert width(loose["SAE"].alone) > 1.1 * width(certain["SAE"].alone)
    assert width(loose["SAE"].alone) > 1.1 * width(loose["SAE"].macro_f1)  # a mean depends less on what is chosen


def test_a_family_is_the_mean_of_its_likeliest_arms(full_run):
    """Macro-F1 and AUC by scikit-learn, from the probabilities of what is said to be averaged."""
    plan, result = full_run
    found = judged(plan, silent)
    several = 0
    for each in result.families:
        jobs = [job for job in plan.jobs if job.arm.name in {name.split(": ")[0] for name in each.averaged}]
        options = [option for job in jobs for option in _options(found, job, 0)]
        best = {}  # of every arm the hyperparameter with the highest inner score that could be chosen
        for option in sorted(options, key=lambda option: -option.inner):
            best.setdefault(option.name, option)
        mean = np.mean([best[name].probabilities for name in each.averaged], axis=0)
        y = plan.data.y[plan.parts[0][0][1]]
        assert each.macro_f1.value == pytest.approx(f1_score(y, mean.argmax(1), average="macro"))
        assert each.auc.value == pytest.approx(roc_auc_score(y, mean[:, 1]))
        several += len(each.averaged) > 1
    assert several >= 1


def option(family: str, name: str) -> _Option:
    return _Option(family, name, 0.0, np.zeros(1), np.zeros((1, 2)))


def test_what_is_averaged():
    """Different arms that are not shown to be worse than the best, the best first, four at most."""
    columns = {  # score on the rows as they are, how much resamples change it
        "first": (0.60, 0.0), "first again": (0.595, 0.01), "near": (0.59, 0.01), "weak": (0.50, 0.01),
        "uncertain": (0.40, 0.10), "third": (0.58, 0.01), "fifth": (0.575, 0.01),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    scores = np.stack([value + noise * generator.normal(size=201) for value, noise in columns.values()], axis=1)
    scores[0] = [value for value, _ in columns.values()]
    scores[1] = scores[0]
    scores[1, 1] = 0.7
    names = [name.removesuffix(" again") for name in columns]
    part = _Part([option("dense", name) for name in names], scores)
    as_it_is, resample, *others = part.mixtures("dense")
    assert [names[at] for at in as_it_is] == ["first", "near", "third", "fifth"]
    assert resample[0] == 1  # the other hyperparameter: the arm counts once
    assert 0 not in resample
    few = _Part(part.options[:5], scores[:, :5])
    assert [names[at] for at in few.mixtures("dense")[0]] == ["first", "near", "uncertain"]
    for row, each in zip(scores[2:], others):
        assert each[0] == row.argmax()
        assert len({names[at] for at in each}) == len(each) <= AVERAGED


def test_the_best_family_is_chosen_by_its_best_arm():
    """And is then all that it averages, with nothing of another family."""
    options = [option("TF-IDF", "words"), option("dense", "mean"), option("dense", "max")]
    part = _Part(options, np.array([[0.5, 0.6, 0.58], [0.7, 0.6, 0.58], [0.5, 0.58, 0.6]]))
    each = [_Family(name, [part], [part.mixtures(name)], None) for name in ("TF-IDF", "dense")]
    best = _Family.best_of(each)
    assert best.mixtures == [[(1, 2), (0,), (2, 1)]]
    assert (best.most_chosen, best.alone.mixtures) == ("dense", [[(1,), (0,), (2,)]])


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
