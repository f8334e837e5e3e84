"""How often intervals hold the truth, by simulation.

``python benchmarks/interval_coverage.py`` (``make coverage``) simulates groups of equal, lognormal and Pareto sizes
whose rows go together, measures what saekit measures on them, and counts how often the 95 % interval holds the true
value. The cells go to ``coverage.json``; tests run short ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from saekit.measure.accumulators import Reconstruction, Sparsity
from saekit.measure.intervals import Estimate, Sample
from saekit.measure.paired_scores import HeldOut, Predictions, score
from saekit.sae.codes import Codes

HERE = Path(__file__).resolve().parent
GROUPS = (10, 20, 50, 200)
SIZES = ("equal", "lognormal", "pareto")
CLASSES = 3
D_IN = 16
LATENTS = 200

Generator = np.random.Generator


@dataclass(frozen=True)
class Found:
    """What one cell of the table found."""

    quantity: str
    sizes: str
    groups: int
    trials: int
    tried: int
    """Trials with an interval; the others were refused for too few effective groups."""
    hits: int
    width: float
    """Median width of the intervals."""

    @property
    def coverage(self) -> float:
        """Fraction of the intervals that hold the truth."""
        return self.hits / max(self.tried, 1)


def draw_sizes(kind: str, n_groups: int, generator: Generator) -> np.ndarray:
    """Return rows per group."""
    drawn = {
        "equal": lambda: np.full(n_groups, 30.0),
        "lognormal": lambda: generator.lognormal(3, 1, n_groups),
        "pareto": lambda: 10 * (1 + generator.pareto(1.5, n_groups)),
    }[kind]()
    return np.clip(np.ceil(drawn), 1, 5000).astype(int)


# ----------------------------------------------------------------- quantities: an estimate, and the truth


def ce_difference(n: np.ndarray, generator: Generator) -> Estimate:
    """Sum over tokens of a difference that varies between documents, divided by the tokens."""
    gaps = n * (0.3 + 0.2 * generator.normal(size=len(n))) + 0.5 * np.sqrt(n) * generator.normal(size=len(n))
    return Sample.over(n).ratio(gaps, n.astype(float))


def l0(n: np.ndarray, generator: Generator) -> Estimate:
    """Active latents per row: positive, lognormal over documents."""
    per_row = 20 * np.exp(0.4 * generator.normal(size=len(n)) - 0.08)
    return Sample.over(n).ratio(n * per_row + 4 * np.sqrt(n) * generator.normal(size=len(n)), n.astype(float))


def fvu(n: np.ndarray, generator: Generator) -> Estimate:
    """Rows about the mean of their document, with noise of half their variance."""
    group = np.repeat(np.arange(len(n)), n)
    x = generator.normal(size=(len(n), D_IN))[group] + generator.normal(size=(len(group), D_IN))
    noise = np.exp(0.2 * generator.normal(size=len(n)) - 0.04)[group, None] * generator.normal(size=x.shape)
    accumulator = Reconstruction(D_IN, n_groups=len(n))
    accumulator.update(torch.from_numpy(x), torch.from_numpy(x + 0.5**0.5 * noise), torch.from_numpy(group))
    return accumulator.compute()["fvu"]


def dense_share(n: np.ndarray, generator: Generator) -> Estimate:
    """Fraction of latents that fire on more than a tenth of the rows; how often varies between documents."""
    group = np.repeat(np.arange(len(n)), n)
    rates = 1 / (1 + np.exp(-(_base_rates() + 0.7 * generator.normal(size=(len(n), LATENTS)))))
    fired = generator.random((len(group), LATENTS)) < rates[group]
    accumulator = Sparsity(LATENTS, n_groups=len(n))
    accumulator.update(Codes.from_dense(torch.from_numpy(fired.astype(np.float32))), torch.from_numpy(group))
    return accumulator.compute()["dense_fraction"]


def _base_rates() -> np.ndarray:
    return np.random.default_rng(5).normal(-2.5, 1.5, LATENTS)


def _classified(n: np.ndarray, generator: Generator) -> tuple[np.ndarray, ...]:
    """Rows in groups of mixed classes; two classifiers, each better on some groups, wrong together on others."""
    group = np.repeat(np.arange(len(n)), n)
    mix = generator.dirichlet(np.ones(CLASSES), len(n)).cumsum(1)
    y = (generator.random(len(group))[:, None] > mix[group]).sum(1).clip(max=CLASSES - 1)
    ease = np.array([1.5, 1.0, 0.5])[y] + 0.7 * generator.normal(size=len(n))[group]
    luck = generator.logistic(size=len(group))
    said = []
    for shift in (0.0, 0.3):
        own = shift + 0.4 * generator.normal(size=len(n))[group] + 0.5 * generator.normal(size=len(group))
        wrong = (y + generator.integers(1, CLASSES, len(y))) % CLASSES
        said.append(np.where(ease + own + luck > 0, y, wrong))
    return group, y, *said


def _scored(n: np.ndarray, generator: Generator, name: str) -> list[Estimate]:
    group, y, *said = _classified(n, generator)
    held_out = HeldOut.over(y, groups=group)
    every = np.full((len(y), CLASSES), 1 / CLASSES)
    return [score(Predictions(every, each), held_out, (name,))[name] for each in said]


def macro_f1(n: np.ndarray, generator: Generator) -> Estimate:
    """Macro-F1 of a classifier."""
    return _scored(n, generator, "macro_f1")[0]


def macro_f1_difference(n: np.ndarray, generator: Generator) -> Estimate:
    """Macro-F1 of one classifier minus another on the same rows."""
    one, other = _scored(n, generator, "macro_f1")
    return other.minus(one)


def accuracy(n: np.ndarray, generator: Generator) -> Estimate:
    """Fraction of right answers."""
    return _scored(n, generator, "accuracy")[0]


def auc(n: np.ndarray, generator: Generator) -> Estimate:
    """AUC of a score that also depends on the group."""
    group = np.repeat(np.arange(len(n)), n)
    y = (generator.random(len(group)) < generator.beta(2, 2, len(n))[group]).astype(int)
    value = y + 0.5 * generator.normal(size=len(n))[group] + generator.normal(size=len(group))
    p = 1 / (1 + np.exp(-value))
    return score(Predictions(np.stack([1 - p, p], 1)), HeldOut.over(y, groups=group), ("auc",))["auc"]


Quantity = Callable[[np.ndarray, Generator], Estimate]

QUANTITIES: dict[str, tuple[Quantity, float | None, float | None]] = {
    "fvu": (fvu, 0.0, None),
    "l0": (l0, 0.0, None),
    "ce difference": (ce_difference, None, None),
    "share of dense latents": (dense_share, 0.0, 1.0),
    "accuracy": (accuracy, 0.0, 1.0),
    "auc": (auc, 0.0, 1.0),
    "macro-F1": (macro_f1, 0.0, 1.0),
    "macro-F1 difference": (macro_f1_difference, -1.0, 1.0),
}
"""What is simulated, and its range."""


@cache
def truth(quantity: str) -> float:
    """Return the true value: exact, or of very many small groups (sizes and outcomes are independent)."""
    exact = {"l0": 20.0, "ce difference": 0.3, "fvu": 0.25}
    if quantity in exact:
        return exact[quantity]
    if quantity == "share of dense latents":
        rates = 1 / (1 + np.exp(-(_base_rates()[:, None] + 0.7 * np.random.default_rng(1).normal(size=20_000))))
        return float((rates.mean(1) > 0.1).mean())
    generator, few = np.random.default_rng(99), np.full(150_000, 2)
    if quantity == "auc":
        # Only the values matter here, so no part of the sample is left out.
        group = np.repeat(np.arange(len(few)), few)
        y = (generator.random(len(group)) < generator.beta(2, 2, len(few))[group]).astype(int)
        from sklearn.metrics import roc_auc_score

        value = y + 0.5 * generator.normal(size=len(few))[group] + generator.normal(size=len(group))
        return float(roc_auc_score(y, value))
    from sklearn.metrics import accuracy_score, f1_score

    _, y, one, other = _classified(few, generator)
    if quantity == "accuracy":
        return float(accuracy_score(y, one))
    first, second = (float(f1_score(y, each, average="macro")) for each in (one, other))
    return first if quantity == "macro-F1" else second - first


def simulate(quantity: str, sizes: str, n_groups: int, trials: int, seed: int = 0) -> Found:
    """Return how often the interval of a quantity holds the truth."""
    measure, least, most = QUANTITIES[quantity]
    generator = np.random.default_rng([seed, n_groups, SIZES.index(sizes)])
    hits, widths = 0, []
    for _ in range(trials):
        measured = measure(draw_sizes(sizes, n_groups, generator), generator).measured("", least=least, most=most)
        if measured.low is not None and measured.high is not None:
            hits += measured.low <= truth(quantity) <= measured.high
            widths.append(measured.high - measured.low)
    return Found(quantity, sizes, n_groups, trials, len(widths), hits, float(np.median(widths or [np.nan])))


def table(cells: list[Found]) -> list[str]:
    """Return the cells as lines of Markdown: coverage (and refused)."""
    lines = ["| quantity | sizes | " + " | ".join(f"{g} groups" for g in sorted({c.groups for c in cells})) + " |"]
    lines.append("|" + " --- |" * (lines[0].count("|") - 1))
    for key in dict.fromkeys((cell.quantity, cell.sizes) for cell in cells):
        mine = sorted((c for c in cells if (c.quantity, c.sizes) == key), key=lambda c: c.groups)
        shown = [
            f"{c.coverage:.3f}" + (f" ({1 - c.tried / c.trials:.0%} refused)" if c.tried < c.trials else "")
            for c in mine
        ]
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(shown) + " |")
    return lines


def main() -> None:
    """Print the tables and write ``coverage.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--only", choices=tuple(QUANTITIES), help="one quantity")
    arguments = parser.parse_args()
    begun, cells = time.time(), []
    for quantity in [arguments.only] if arguments.only else QUANTITIES:
        for sizes in SIZES:
            cells += [simulate(quantity, sizes, n_groups, arguments.trials) for n_groups in GROUPS]
            print("\n".join(table(cells[-len(GROUPS) :])[2:]), flush=True)
    print("\n".join(table(cells)))
    print(f"{time.time() - begun:.0f} s")
    if arguments.only is None:
        (HERE / "coverage.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


if __name__ == "__main__":
    main()
