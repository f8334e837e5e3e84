"""Classification where there is nothing to know: families at chance, false verdicts, and error rate of the leak check.

``python benchmarks/classification_chance.py`` fits the search of every family to features of noise, with 20 and with
200 training rows, by the functions that `saekit classify` calls, and counts (a) how far the chosen arms are from chance
on test rows, (b) how often a family is said to be better or worse than the best baseline, though none knows anything,
and (c) how often shuffled labels are said to leak though nothing does. (b) and (c) are announced to happen in at most 5
of 100 results. The counts go to ``classification_chance.json``, the tables between the markers of
``benchmarks/README.md``; tests run short ones. ``--table`` writes the tables of what is stored.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.sparse

from saekit.classification.arms import VOTERS, Arm
from saekit.classification.families import family_scores
from saekit.classification.plan import Job
from saekit.classification.result import FamilyScore
from saekit.classification.settings import Budget
from saekit.classification.stored_fits import compute
from saekit.classification.verdicts import ORDERS, Judged, doubts
from saekit.measure.intervals import wilson_interval
from saekit.measure.paired_scores import HeldOut, Predictions, chance_test

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE / "contestants"))
BUDGET = Budget(C=(0.01, 0.1, 1.0, 10.0), alphas=(1.0, 10.0, 100.0, 1000.0), shrinkages=(0.1, 0.3, 0.6), widen=2)
PROBES = ("logistic", "balanced", "lda", "ridge")
SEARCHED = {"words": "TF-IDF", "dense": "dense", "pca": "PCA", "random": "random", "full": "SAE"}
"""Families that are searched, by the kind of their arms."""


def noise(n: int, generator: np.random.Generator) -> dict[str, Any]:
    """Return features of `n` rows that know nothing: three poolings of states and codes, and texts."""
    words = [f"w{i}" for i in range(60)]
    found: dict[str, Any] = {"texts": [" ".join(generator.choice(words, 8)) for _ in range(n)]}
    for kind in ("dense", "pca", "random", "full"):
        for pool in "abc":
            x = generator.normal(size=(n, 48)).astype(np.float32)
            is_sparse = kind in ("random", "full")
            found[f"{kind}|{pool}"] = scipy.sparse.csr_matrix(np.where(x > 1, x, 0)) if is_sparse else x
    return found


def search(kind: str) -> Arm:
    """Return the search of a family."""
    steps: tuple[str, ...] = {"words": ("words",), "pca": ("pca",)}.get(kind, ())
    features = ["texts"] if kind == "words" else [f"{kind}|{pool}" for pool in "abc"]
    candidates = tuple(
        Arm(f"{each}, {probe}", kind, each, probe=probe, steps=steps, k=8 if kind == "pca" else None)
        for each in features
        for probe in PROBES
    )
    return Arm(f"strongest {kind}", "strongest", probe="search", candidates=candidates, voters=VOTERS)


def judged_noise(n_train: int, n_test: int, seed: int, kinds: Sequence[str] = tuple(SEARCHED)) -> Judged:
    """Return all families fitted to noise and scored, as `classify` would."""
    generator = np.random.default_rng([seed, n_train])
    n = n_train + n_test
    y = generator.permutation(np.arange(n) % 2)
    y[:n_train] = generator.permutation(np.arange(n_train) % 2)
    part = (np.arange(n_train), np.arange(n_train, n))
    X, budget = noise(n, generator), BUDGET
    plan: Any = SimpleNamespace(
        data=SimpleNamespace(y=y, together=None, classes=("a", "b"), parts=(part,)), parts=((part,),), values=("all",),
        split=SimpleNamespace(seed=seed, folds=None), how=SimpleNamespace(margin=0.01, train_sizes=()), budget=budget,
        shuffles=0, chosen_by="auc", test=lambda value: part[1], train_rows=lambda job: [part[0]],
    )  # fmt: skip
    plan.jobs = tuple(Job(search(kind), 0, None, kind) for kind in kinds)

    def view(arm: Arm, i: int, j: int) -> Any:
        return {each.features: X[each.features] for each in arm.candidates}

    fits = {job.key: compute(plan, job, view) for job in plan.jobs}
    rows = HeldOut.over(y[part[1]])
    # AUC, of which any classifier of noise has 0.5: its macro-F1 depends on how often it says which class
    return Judged(plan, fits, [rows], {}, "auc")


def families_of_noise(
    n_train: int, n_test: int, seed: int, kinds: Sequence[str] = tuple(SEARCHED)
) -> list[FamilyScore]:
    """Return the families of a result in which there is nothing to know."""
    return family_scores(judged_noise(n_train, n_test, seed, kinds))


def shuffled_arms(n_test: int, n_classes: int, n_arms: int, seed: int, kind: str = "means") -> list[SimpleNamespace]:
    """Return the arms of a result that all learned shuffled labels: nearest class means, or trees of sparse columns.

    A tree of many classes puts nearly all rows into one leaf and tells only a few apart.
    """
    generator = np.random.default_rng([seed, n_test, n_classes])
    n_train = 3 * n_test
    x = generator.normal(size=(n_train + n_test, 40))
    y = generator.integers(0, n_classes, n_train + n_test)
    y[:n_classes], y[-n_classes:] = np.arange(n_classes), np.arange(n_classes)
    noise_rows = HeldOut.over(y[n_train:])
    arms = []
    for arm in range(n_arms):
        said = {"means": _by_means, "trees": _by_tree}[kind](x, y[:n_train], n_classes, generator)
        _, p = chance_test([Predictions(said)], [noise_rows], ORDERS * n_arms, seed=seed)
        arms.append(SimpleNamespace(name=str(arm), shuffled_p=p, converged=True, notes=[]))
    return arms


def _by_means(x: np.ndarray, y: np.ndarray, n_classes: int, generator: np.random.Generator) -> np.ndarray:
    """Return probabilities of the test rows by nearest class means, on columns that arms have in common."""
    some = generator.permutation(40)[:20]
    means = np.stack([x[: len(y)][y == c][:, some].mean(0) for c in range(n_classes)])
    logits = 5 * (x[len(y) :, some] @ means.T - np.square(means).sum(1) / 2)
    guess = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(guess / guess.sum(1, keepdims=True), dtype=np.float32)


def _by_tree(x: np.ndarray, y: np.ndarray, n_classes: int, generator: np.random.Generator) -> np.ndarray:
    """Return probabilities of the test rows by a tree of columns that are seldom active."""
    from sklearn.tree import DecisionTreeClassifier

    often = np.minimum(0.5, 0.5 / np.arange(1, 201) ** 0.7)
    codes = (generator.random((len(x), 200)) < often) * generator.exponential(1, (len(x), 200))
    tree = DecisionTreeClassifier(max_depth=9, class_weight="balanced", random_state=0).fit(codes[: len(y)], y)
    return np.asarray(tree.predict_proba(codes[len(y) :]), dtype=np.float32)


def leaks(arms: Sequence[SimpleNamespace]) -> bool:
    """Return whether a result with these arms is said to leak."""
    return any("leaks" in told for told in doubts(arms, ()))  # type: ignore[arg-type]


CHECKED = (
    (100, 2, 20, "means"), (500, 2, 60, "means"), (500, 10, 20, "means"), (1000, 50, 20, "means"),
    (400, 30, 5, "trees"),
)  # fmt: skip
"""Results that the leak check looks at: test rows, classes, arms, and what they are."""


def rate(count: int, n: int) -> dict[str, Any]:
    """Return a fraction with its interval."""
    found = wilson_interval(count, n)
    return {"count": count, "of": n, "low": found.low, "high": found.high}


def told(share: dict[str, Any]) -> str:
    """Return a fraction with its interval as text."""
    return f"{share['count'] / share['of']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"


def tables(found: dict[str, Any]) -> str:
    """Return what was found as Markdown."""
    sizes = sorted({cell["training_rows"] for cell in found["families"]})
    lines = [ABOUT, "", "| family | " + " | ".join(f"{n} training rows" for n in sizes) + " |"]
    lines.append("| --- |" + " ---: |" * len(sizes))
    for name in SEARCHED.values():
        cells = [
            cell
            for n in sizes
            for cell in found["families"]
            if (cell.get("family"), cell["training_rows"]) == (name, n)
        ]
        lines.append(
            f"| {name}, AUC | " + " | ".join(f"{cell['auc']:.3f} ± {cell['error']:.3f}" for cell in cells) + " |"
        )
    for key, words in (("any_verdict", "any family better or worse"), ("claim", "the SAE better or worse")):
        cells = [cell for n in sizes for cell in found["families"] if key in cell and cell["training_rows"] == n]
        lines.append(f"| {words} | " + " | ".join(told(cell[key]) for cell in cells) + " |")
    lines += [
        "",
        LEAKS,
        "",
        "| test rows | classes | arms | classifiers | said to leak |",
        "| ---: | ---: | ---: | --- | ---: |",
    ]
    for cell in found["leak_check"]:
        facts = (cell["test_rows"], cell["classes"], cell["arms"], cell["kind"], told(cell["false"]))
        lines.append(f"| {' | '.join(map(str, facts))} |")
    return "\n".join(lines)


ABOUT = """## Classification of noise

`make chance` (`python benchmarks/classification_chance.py`): the search of every family on features that know nothing
(three poolings of 48 columns, random words), two classes, 400 test rows. AUC on the test rows of the arm or vote that
was chosen within the training rows, mean over results ± its standard error; fractions of results with a verdict, where
0.05 is announced, with 95% intervals."""
LEAKS = """Shuffled labels: fractions of results without any leak that are said to leak by the check of
`saekit classify` over all arms of a result; 0.05 is announced."""


def write_tables(found: dict[str, Any]) -> None:
    """Put the tables between their markers in the README."""
    import arena

    arena.replace_part(HERE / "README.md", "chance", tables(found))


def main() -> None:
    """Run the simulations, and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="results of noise, for each number of training rows")
    parser.add_argument("--checks", type=int, default=400, help="results that the leak check looks at, of each kind")
    parser.add_argument("--out", type=Path, default=HERE / "classification_chance.json")
    parser.add_argument("--table", action="store_true", help="only write the tables of what is stored")
    options = parser.parse_args()
    if options.table:
        write_tables(json.loads(options.out.read_text()))
        return
    found: dict[str, Any] = {"families": [], "leak_check": []}
    for n_test, n_classes, n_arms, kind in CHECKED:
        each = (shuffled_arms(n_test, n_classes, n_arms, seed, kind) for seed in range(options.checks))
        count = sum(map(leaks, each))
        cell: dict[str, Any] = {"test_rows": n_test, "classes": n_classes, "arms": n_arms, "kind": kind}
        cell["false"] = rate(count, options.checks)
        found["leak_check"].append(cell)
        print(json.dumps(cell), flush=True)
    for n_train in (20, 200):
        since = time.process_time()
        results = [families_of_noise(n_train, 400, seed) for seed in range(options.trials)]
        for name in SEARCHED.values():
            mine = [next(each for each in result if each.name == name) for result in results]
            aucs = np.array([each.auc.value for each in mine])
            cell = {
                "family": name, "training_rows": n_train, "trials": len(mine), "auc": float(aucs.mean()),
                "error": float(aucs.std(ddof=1) / np.sqrt(len(aucs))) if len(aucs) > 1 else None,
            }  # fmt: skip
            found["families"].append(cell)
            print(json.dumps(cell), flush=True)
        false = sum(any(each.verdict in ("better", "worse") for each in result) for result in results)
        claim = sum(result[-1].verdict in ("better", "worse") for result in results)
        cell = {"training_rows": n_train, "any_verdict": rate(false, len(results)), "claim": rate(claim, len(results))}
        found["families"].append(cell)
        print(json.dumps(cell), f"{time.process_time() - since:.0f} s of CPU", flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    write_tables(found)


if __name__ == "__main__":
    main()
