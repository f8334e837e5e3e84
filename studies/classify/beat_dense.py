"""Can scikit-learn alone, on the same pooled rows, beat the dense baseline of saekit?

    python studies/classify/beat_dense.py            # needs only results/; exit status 1 where it does

It does where it is more than .005 better. Where the interval of the difference holds 0 all the same, the test rows are
too few to tell it from chance: the page says so, and it counts as beaten.

Written without saekit's engine: from the pooled hidden states of the same training rows it builds its own candidates
(poolings alone and together; logistic regression, linear discriminant analysis, ridge, support vectors, with and
without balanced classes; grids of its own; and logistic regression and discriminant analysis voting), lets
cross-validation choose by the metric of the verdicts within training rows, and predicts the test rows once. It tries to
be better than the family `dense` of the result. Differences of
predictions that were made on the same rows have an interval from resampled test rows (groups); the scores by which both
chose tell whether the challenger saw in the training rows what saekit missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from run import HERE, SHARED, chosen, model_path, plan_of, smaller, table_of, tell, write_page
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

import saekit as sk
from saekit.classification.result import Classification
from saekit.files import read_json, write_json
from saekit.rows.pooling import Ask, pool_texts
from saekit.rows.pooling_cache import digest_arrays
from saekit.settings import silent

MARGIN = 0.005
RUNS = "minilm-families,builtin-families"
POOLS = ("last", "mean", "max", "min", "sum")
TOGETHER = (("mean", "max", "min"), ("mean", "last"))
FEW = 1500
"""Training rows on which the poolings are compared first."""
MANY_CLASSES = 20
"""From here on two poolings go on instead of three, and there are no support vectors, one classifier for each class."""


def candidates() -> dict[str, tuple[Any, dict[str, list[Any]]]]:
    """Classifiers with their grids."""
    C = [float(f"{value:.3g}") for value in np.logspace(-5, 3, 9)]
    return {
        "logistic": (
            LogisticRegression(max_iter=500),
            {"logisticregression__C": C[:-1], "logisticregression__class_weight": [None, "balanced"]},
        ),
        "lda": (
            LinearDiscriminantAnalysis(solver="lsqr"),
            {"lineardiscriminantanalysis__shrinkage": ["auto", 0.03, 0.1, 0.3, 0.7]},
        ),
        "ridge": (
            RidgeClassifier(),
            {
                "ridgeclassifier__alpha": list(np.logspace(-1, 5, 7)),
                "ridgeclassifier__class_weight": [None, "balanced"],
            },
        ),
        "svm": (LinearSVC(class_weight="balanced", dual="auto"), {"linearsvc__C": C[:6]}),
    }


@dataclass(frozen=True)
class Rules:
    """What classifiers are chosen by, in which folds, on which kinds."""

    scoring: str
    seed: int
    names: tuple[str, ...]
    views: int
    """Poolings that go on."""


@dataclass(frozen=True)
class Found:
    """A classifier, fitted on all rows that it was chosen on."""

    words: str
    inner: float
    model: Any


def best_of(X: Any, y: np.ndarray, groups: np.ndarray, names: Sequence[str], rules: Rules) -> Found:
    """The best of some classifiers on one representation, and of the vote of those that have probabilities."""
    folds = list(StratifiedGroupKFold(4, shuffle=True, random_state=rules.seed).split(X, y, groups))
    searches = {}
    for name in names:
        model, grid = candidates()[name]
        search = GridSearchCV(make_pipeline(StandardScaler(), model), grid, scoring=rules.scoring, cv=folds)
        searches[name] = search.fit(X, y)
    found = [Found(worded(each.best_params_), float(each.best_score_), each) for each in searches.values()]
    voters = [(name, each.best_estimator_) for name, each in searches.items() if hasattr(each, "predict_proba")]
    if len(voters) > 1:
        vote = VotingClassifier(voters, voting="soft")
        inner = cross_val_score(vote, X, y, scoring=rules.scoring, cv=folds).mean()
        words = " and ".join(worded(searches[name].best_params_) for name, _ in voters)
        found.append(Found(f"vote of {words}", float(inner), vote.fit(X, y)))
    return max(found, key=lambda each: each.inner)


def challenger(
    pooled: dict[str, np.ndarray], y: np.ndarray, groups: np.ndarray, train: np.ndarray, rules: Rules
) -> tuple[str, Found, np.ndarray]:
    """The representation and classifier that cross-validation prefers, fitted on all training rows."""
    views = {name: pooled[name] for name in POOLS}
    views |= {"+".join(parts): np.concatenate([pooled[part] for part in parts], axis=1) for parts in TOGETHER}
    few = np.random.default_rng(rules.seed).permutation(train)[:FEW]
    if min(np.bincount(y[few])) < 4:
        few = train
    first = {name: best_of(X[few], y[few], groups[few], ("ridge",), rules).inner for name, X in views.items()}
    kept = sorted(first, key=lambda name: -first[name])[: rules.views]
    found = {name: best_of(views[name][train], y[train], groups[train], rules.names, rules) for name in kept}
    name = max(kept, key=lambda each: found[each].inner)
    return name, found[name], views[name]


def challenged(
    pooled: dict[str, np.ndarray],
    y: np.ndarray,
    groups: np.ndarray,
    part: tuple[np.ndarray, np.ndarray],
    rules: Rules,
    where: Path,
) -> dict[str, Any]:
    """What the challenger says of the test rows: kept, since nothing that saekit changes can change it."""
    train, test = part
    rows = digest_arrays({**pooled, "y": y, "groups": groups.astype(str), "train": train, "test": test})
    spec = {"rows": rows, "rules": repr(rules), "of": repr((candidates(), POOLS, TOGETHER, FEW, MANY_CLASSES))}
    path = where.with_suffix(".json")
    if path.is_file() and (kept := read_json(path))["spec"] == spec:
        return dict(kept["found"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that stops early is a candidate like any other
        pools, best, X = challenger(pooled, y, groups, train, rules)
    said = said_of(best.model, X[test]) if rules.scoring == "roc_auc" else best.model.predict(X[test])
    found = {"words": f"{pools}, {best.words}", "inner": best.inner, "said": said.tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"spec": spec, "found": found})
    return found


Metric = Callable[[np.ndarray, np.ndarray], float]


def interval(metric: Metric, y: np.ndarray, ours: np.ndarray, theirs: np.ndarray, units: np.ndarray) -> list[float]:
    """95 % of the differences on resampled test rows (groups)."""
    generator, names = np.random.default_rng(0), np.unique(units)
    rows_of = {name: np.flatnonzero(units == name) for name in names}
    gaps = []
    for _ in range(500):
        rows = np.concatenate([rows_of[name] for name in generator.choice(names, len(names))])
        if len(np.unique(y[rows])) == len(np.unique(y)) or metric is macro:
            gaps.append(metric(y[rows], theirs[rows]) - metric(y[rows], ours[rows]))
    return [float(end) for end in np.quantile(gaps, [0.025, 0.975])]


def macro(y: np.ndarray, said: np.ndarray) -> float:
    """Macro-F1 over the classes in `y`."""
    return float(f1_score(y, said, labels=np.unique(y), average="macro", zero_division=0))


def area(y: np.ndarray, said: np.ndarray) -> float:
    """AUC of two classes."""
    return float(roc_auc_score(y, said))


def main() -> int:
    """Try it on every set of every model; exit status 1 where it succeeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "classify")
    parser.add_argument("--sets", help="names of data sets, with commas between [all]")
    parser.add_argument("--runs", default=RUNS, help=f"runs of config.toml [{RUNS}]")
    parser.add_argument("--quick", action="store_true", help="on the quick run")
    options, _ = parser.parse_known_args()  # run.py has more
    config = tomllib.loads((HERE / "config.toml").read_text(encoding="utf-8"))
    out, folder = options.out, HERE
    if options.quick:
        out = folder = options.out / "quick"
        config = smaller(config)
    if not (SHARED / "labelled").is_dir():
        tell(f"skipped: no sample data at `{SHARED}`")
        return 0
    stored = folder / "results" / "beat_dense.json"
    known = stored_at(stored)
    for name in options.runs.split(","):
        run = next(each for each in config["runs"] if each["name"] == name)
        path = model_path(config["models"][run["model"]]["path"])
        for each in chosen(config["sets"], options.sets):
            result = folder / "results" / f"{name}-{each['name']}.json"
            if path is None or not result.is_file():
                tell(f"skipped: no result of {name} on {each['name']}; run run.py first")
                continue
            new = attempt(config, run, each, (path, out), Classification.load(result))
            tell(str(new))
            known = stored_at(stored) | {(name, each["name"]): new}
            write_json(stored, {"margin": MARGIN, "sets": list(known.values())})
    found = list(known.values())
    if found and any((folder / "results").glob("minilm-*.json")):
        write_page(config, folder)
    beaten = [each for each in found if each["gap"] > MARGIN]
    for each in beaten:
        tell(f"beaten on {each['set']} ({each['run']}): {each['gap']:+.4f} [{each['low']:+.4f}, {each['high']:+.4f}]")
    return int(bool(beaten))


def stored_at(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What was tried so far, by run and set."""
    return {(each["run"], each["set"]): each for each in (read_json(path)["sets"] if path.is_file() else [])}


def attempt(config: Any, run: Any, each: Any, where: tuple[str, Path], result: Classification) -> dict[str, Any]:
    """Try to beat the dense family on one set."""
    from saekit.classification.families import FAMILIES
    from saekit.classification.run import run_fits
    from saekit.classification.stored_fits import read_fit

    path, out = where
    # The same rows, folds and hook without any SAE: the arm `strongest dense` does not depend on one, and its fit is
    # that of run.py where that has left it.
    alone = {**run, "saes": [], "hook": run["saes"][0].partition("-")[0]}
    plan = plan_of(sk.load_model(path), {}, alone, each, table_of(each), config, out)
    data, seed = plan.data, int(config["seed"])
    (train, test), *_ = data.parts
    hook = plan.origins["dense"].hook
    pooled = pool_texts(
        path, list(data.texts), [Ask(POOLS, hook=hook)], max_tokens=plan.how.max_tokens, cache=plan.reader.cache
    )[0]
    groups = np.arange(len(data.y)) if data.together is None else data.together
    is_auc, is_many = plan.chosen_by == "auc", len(data.classes) >= MANY_CLASSES
    names = tuple(name for name in candidates() if name != "svm" or not is_many)
    rules = Rules("roc_auc" if is_auc else "f1_macro", seed, names, 2 if is_many else 3)
    arrays = {name: np.asarray(x) for name, x in pooled.items()}
    best = challenged(
        arrays, data.y, groups, (train, test), rules, out / "challengers" / f"{run['name']}-{each['name']}"
    )
    theirs = np.asarray(best["said"])
    dense = next(family for family in result.families if family.name == "dense")
    arm, _, option = dense.strongest.partition(": ")
    job = next(job for job in plan.jobs if job.name == arm and job.arm.base_kind in FAMILIES["dense"])
    run_fits(replace(plan, jobs=(job,)), silent, None)
    fit = read_fit(plan, job)
    assert fit is not None
    options = [each["arm"] or "" for each in fit.facts["options"][0]]
    at = options.index(option) if option else 0
    guess = [fit.probabilities[0], *fit.rivals[0]][at]
    ours, metric = (guess[:, 1], area) if is_auc else (guess.argmax(1), macro)
    y = data.y[test]
    told = dense.auc if is_auc else dense.macro_f1
    assert abs(metric(y, ours) - told.value) < 1e-6, "these are not the predictions of the result"
    low, high = interval(metric, y, ours, theirs, groups[test])
    return {
        "set": each["name"], "run": run["name"], "metric": "AUC" if is_auc else "macro-F1", "test_rows": len(test),
        "dense": metric(y, ours), "arm": dense.strongest, "dense_inner": fit.facts["options"][0][at]["inner"],
        "challenger": metric(y, theirs), "chose": best["words"], "challenger_inner": best["inner"],
        "gap": metric(y, theirs) - metric(y, ours), "low": low, "high": high,
    }  # fmt: skip


def said_of(model: Any, X: np.ndarray) -> np.ndarray:
    """What a classifier says of the second class."""
    return model.decision_function(X) if hasattr(model, "decision_function") else model.predict_proba(X)[:, 1]


def worded(settings: dict[str, Any]) -> str:
    """``lda, shrinkage 0.7``."""
    kinds = {name.partition("__")[0] for name in settings}
    values = ", ".join(f"{name.partition('__')[2]} {value}" for name, value in settings.items() if value is not None)
    return f"{kinds.pop()}: {values}"


if __name__ == "__main__":
    sys.exit(main())
