"""How often verdicts are wrong, and how often they are found, by simulation.

``python benchmarks/verdict_simulation.py`` (``make verdicts``) simulates families of paired differences over
documents of unequal length, or over a few seeds, whose true values are known: nothing (A/A), the edge of the margin,
what intervals are said to detect. It counts the families with a false verdict after Holm's correction; then how often
the verdict of a power law is right on samples of power laws, log-normals and exponentials. The rows go to
``verdicts.json``; tests run short ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from saekit.measure.intervals import Sample, measured_mean
from saekit.measure.verdicts import (
    Claim,
    HasInterval,
    Stored,
    detectable,
    family_verdicts,
    non_inferiority,
    resolution,
    verdict,
)

HERE = Path(__file__).resolve().parent
MARGIN = 0.01
SPREAD = 0.02
"""Standard deviation of a difference between documents, or seeds."""

Generator = np.random.Generator
Family = Callable[[Generator, Sequence[float]], list[HasInterval]]


def over_documents(generator: Generator, truths: Sequence[float], *, n: int, sizes: str) -> list[HasInterval]:
    """Differences of several arms from one baseline, over the same documents, with an error that all arms share."""
    rows = np.ceil(generator.lognormal(3, 1, n)) if sizes == "lognormal" else np.full(n, 30.0)
    sample, shared = Sample.over(rows), generator.normal(size=n)
    return [
        sample.ratio(rows * (truth + SPREAD * (shared + generator.normal(size=n)) / 2**0.5), rows) for truth in truths
    ]


def over_seeds(generator: Generator, truths: Sequence[float], *, n: int) -> list[HasInterval]:
    """Mean differences over a few seeds, as results store them."""
    gaps = (truth + SPREAD * generator.normal(size=n) for truth in truths)
    return [Stored(measured_mean(each), n - 1) for each in gaps]


FAMILIES: dict[str, Family] = {
    "20 documents, lognormal lengths": partial(over_documents, n=20, sizes="lognormal"),
    "50 documents, equal lengths": partial(over_documents, n=50, sizes="equal"),
    "200 documents, lognormal lengths": partial(over_documents, n=200, sizes="lognormal"),
    "3 seeds": partial(over_seeds, n=3),
    "5 seeds": partial(over_seeds, n=5),
}


@dataclass(frozen=True)
class Simulated:
    """One row of the table."""

    what: str
    family: str
    claims: int
    trials: int
    fraction: float
    """Of the families: with a false verdict; of the last kind: of differences, found."""
    bound: float
    """The fraction that is announced."""


def false_verdicts(what: str, family: str, *, claims: int, trials: int, seed: int = 0) -> float:
    """Return the fraction of families with at least one verdict that is false, all differences being equal."""
    truth, margin, false, rule = KINDS[what]
    generator = np.random.default_rng([seed, list(FAMILIES).index(family), claims])
    wrong = 0
    for _ in range(trials):
        gaps = FAMILIES[family](generator, [truth] * claims)
        words = family_verdicts([Claim(gap, margin, rule) for gap in gaps], least=None, most=None)
        wrong += any(word in false for word in words)
    return wrong / trials


def found(family: str, *, trials: int, seed: int = 0) -> float:
    """Return how often a difference is found that intervals like these are said to detect 4 times in 5."""
    generator = np.random.default_rng([seed, list(FAMILIES).index(family)])
    halves = [resolution(FAMILIES[family](generator, [0.0])[0].measured("")) for _ in range(200)]
    truth = detectable(float(np.nanmedian(halves)), MARGIN)
    gaps = (FAMILIES[family](generator, [truth])[0] for _ in range(trials))
    return sum(verdict(gap.measured(""), MARGIN) == "better" for gap in gaps) / trials


KINDS: dict[str, tuple[float, float, tuple[str, ...], Callable[..., str]]] = {
    "no difference, no margin: better or worse": (0.0, 0.0, ("better", "worse"), verdict),
    "no difference: better or worse": (0.0, MARGIN, ("better", "worse"), verdict),
    "a difference of the margin: better": (MARGIN, MARGIN, ("better",), verdict),
    "a difference of the margin: equivalent": (MARGIN, MARGIN, ("equivalent",), verdict),
    "worse by the margin: keeps or improves": (-MARGIN, MARGIN, ("holds",), non_inferiority),
}
"""What would be false: the true difference, the margin, the false verdicts, the rule."""


def simulated(trials: int) -> list[Simulated]:
    """Return every row of the table."""
    rows = []
    for what in KINDS:
        for family in FAMILIES:
            for claims in (1, 8):
                fraction = false_verdicts(what, family, claims=claims, trials=trials)
                rows.append(Simulated(what, family, claims, trials, fraction, 0.05))
    rows += [
        Simulated("what is detected: found", each, 1, trials, found(each, trials=trials), 0.8) for each in FAMILIES
    ]
    return rows


LAWS: dict[str, Callable[[Generator, int], np.ndarray]] = {
    "power law, exponent 0.4": lambda generator, n: generator.random(n) ** -0.4,
    "power law, exponent 1": lambda generator, n: generator.random(n) ** -1.0,
    "power law, exponent 2": lambda generator, n: generator.random(n) ** -2.0,
    "log-normal, width 0.5": lambda generator, n: generator.lognormal(0, 0.5, n),
    "log-normal, width 1": lambda generator, n: generator.lognormal(0, 1, n),
    "log-normal, width 2": lambda generator, n: generator.lognormal(0, 2, n),
    "exponential": lambda generator, n: generator.exponential(size=n),
    "exponential from 1": lambda generator, n: 1 + generator.exponential(size=n),
}
"""Distributions of importances."""


def law_verdicts(law: str, n: int, trials: int, seed: int = 0) -> dict[str, float]:
    """Return how often the verdict about samples of a distribution is right, wrong and undecided."""
    from saekit.sizes.power_law import power_law

    generator = np.random.default_rng([seed, n])
    said = [power_law(LAWS[law](generator, n), draws=2).verdict for _ in range(trials)]
    undecided = sum(word.startswith("undecided") for word in said)
    claimed = sum(word.startswith("a power law") for word in said)
    right = claimed if law.startswith("power") else trials - undecided - claimed
    return {
        "right": right / trials,
        "wrong": (trials - undecided - right) / trials,
        "undecided": undecided / trials,
    }


def table(rows: Sequence[Simulated]) -> list[str]:
    """Return the rows as lines of Markdown."""
    kinds = list(dict.fromkeys((row.what, row.claims) for row in rows))
    lines = ["| | claims | " + " | ".join(FAMILIES) + " |", "|" + " --- |" * (len(FAMILIES) + 2)]
    for what, claims in kinds:
        by = {row.family: row.fraction for row in rows if (row.what, row.claims) == (what, claims)}
        lines.append(f"| {what} | {claims} | " + " | ".join(f"{by[family]:.3f}" for family in FAMILIES) + " |")
    return lines


def main() -> None:
    """Print the tables and write ``verdicts.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=60, help="samples of each distribution of importances")
    arguments = parser.parse_args()
    begun = time.time()
    rows = simulated(arguments.trials)
    print("\n".join(table(rows)), flush=True)
    laws = {law: law_verdicts(law, 1000, arguments.samples) for law in LAWS}
    for law, said in laws.items():
        print(law, said)
    print(f"{time.time() - begun:.0f} s")
    kept = {"rows": [asdict(row) for row in rows], "laws": laws, "samples": arguments.samples}
    (HERE / "verdicts.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
