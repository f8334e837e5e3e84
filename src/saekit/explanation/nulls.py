"""Scores of an SAE compared with those of latents that mean nothing: percentiles by latent, differences by SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..measure.intervals import Estimate, Sample, mean_estimate
from ..measure.results import Measured
from ..measure.verdicts import family_verdicts
from ..randomness import random_order
from .explanation_result import Null, Score

MATCHED = 50
"""Latents of a control, those of the nearest density, that a latent is compared with."""

LATENT_GROUPS = 64
"""Groups of latents that are left out in turn for an interval."""

SHUFFLED = "shuffled"

REASON = "over latents at equal densities; another SAE or other texts would add to it"

MEANINGS: Mapping[str, tuple[str, str, bool]] = {
    "detection": ("AUC", "AUC of the label for where the latent fires, in documents that it was not made of", True),
    "lexical": ("AUC", "the same of all tokens, each by how often the latent fires on it", True),
    "context": (
        "AUC",
        "AUC of the tokens of a window (naive Bayes) for whether the latent fires in it, held out",
        True,
    ),
    "embedding": ("AUC", "AUC of being more like windows with the latent than like windows without, held out", True),
    "embedding_masked": ("AUC", "the same without the token that the latent fires on", True),
    "cohesion": ("cosine", "mean cosine of windows it fires in, without that token, weighted by the codes", True),
    "intruder": ("fraction", "how often a window without the latent is the least alike among four with it", True),
    "surprisal": ("AUC", "AUC of how much the label before a window lowers its cross-entropy, held out", True),
    "purity": ("fraction", "largest fraction of its activation on one token", True),
    "purity_previous": ("fraction", "the same for the token before", True),
    "purity_next": ("fraction", "the same for the token after", True),
    "entropy": ("nats", "entropy of the tokens that it responds to", False),
    "entropy_previous": ("nats", "the same for the token before", False),
    "entropy_next": ("nats", "the same for the token after", False),
    "documents": ("documents", "effective number of documents that it fires on", True),
    "separation": ("silhouette", "how much further its contexts fall apart than one cloud of them would", False),
}
"""Unit, meaning, and whether more is more coherent, of every score."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of some latents."""

    count: np.ndarray
    """Firings of each latent."""
    scores: dict[str, np.ndarray]
    """By name: a number for each latent, NaN where it is not known."""


def percentiles(value: np.ndarray, count: np.ndarray, null: np.ndarray, null_count: np.ndarray) -> np.ndarray:
    """Return the fraction of the control's latents of the nearest density with a lower value, ties counted half."""
    usable = np.flatnonzero(np.isfinite(null))
    usable = usable[np.argsort(null_count[usable], kind="stable")]
    found = np.full(len(value), np.nan)
    if not len(usable):
        return found
    known = np.flatnonzero(np.isfinite(value))
    at = np.searchsorted(null_count[usable], count[known])
    start = np.clip(at - MATCHED // 2, 0, max(0, len(usable) - MATCHED))
    near = null[usable][np.minimum(start[:, None] + np.arange(min(MATCHED, len(usable))), len(usable) - 1)]
    mine = value[known, None]
    found[known] = (near < mine).mean(1) + (near == mine).mean(1) / 2
    return found


def mean_over_latents(value: np.ndarray, unit: str) -> Measured:
    """Return the mean over latents with its interval."""
    known = np.isfinite(value)
    if not known.any():
        return Measured(float("nan"), unit=unit, reason="undefined: no latent has it")
    return _mean(value[known], np.zeros(int(known.sum()), np.int64), np.ones(1)).measured(unit)


def _mean(value: np.ndarray, stratum: np.ndarray, weight: np.ndarray) -> Estimate:
    """Return a weighted mean over strata of means over latents."""
    n_groups = min(LATENT_GROUPS, len(value))
    group = random_order(len(value), "latents") % n_groups
    cell = group * len(weight) + stratum
    size = (n_groups, len(weight))
    sums = np.bincount(cell, value, n_groups * len(weight)).reshape(size)
    counts = np.bincount(cell, minlength=n_groups * len(weight)).reshape(size).astype(np.float64)
    sample = Sample.over(counts.sum(1), reason=REASON)

    def mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        used = weight * (counts > 0)
        return (used * sums / np.maximum(counts, 1)).sum(-1) / used.sum(-1)

    left_out = None if sample.weights is None else mean(sample.weights @ sums, sample.weights @ counts)
    return sample.estimate(float(mean(sums.sum(0), counts.sum(0))), left_out)


def _matched(name: str, mine: Scored, null: Scored) -> tuple[Estimate, Estimate]:
    """Return the means of a score over both kinds of latents, at the densities of the first."""
    values = [each.scores[name] for each in (mine, null)]
    kept = [np.isfinite(value) & (each.count > 0) for value, each in zip(values, (mine, null), strict=True)]
    strata = [np.log2(each.count[k]).astype(np.int64) for each, k in zip((mine, null), kept, strict=True)]
    both = np.intersect1d(*strata)
    if not len(both):
        return (Estimate(float("nan"), reason="undefined: no latents of equal density"),) * 2
    weight = np.array([(strata[0] == each).sum() for each in both], np.float64)
    found = []
    for value, k, stratum in zip(values, kept, strata, strict=True):
        inside = np.isin(stratum, both)
        found.append(_mean(value[k][inside], np.searchsorted(both, stratum[inside]), weight / weight.sum()))
    return found[0], found[1]


@dataclass(frozen=True, eq=False)
class _Cell:
    """A score of the SAE and of a control."""

    name: str
    control: str
    mine: Estimate
    null: Estimate

    def claim(self) -> Estimate | None:
        """Return by how much the SAE's is better; None where that is not defined."""
        sign = 1.0 if MEANINGS[self.name][2] else -1.0
        found = mean_estimate([self.mine, self.null], (sign, -sign))
        return found if np.isfinite(found.value) else None

    def null_of(self, word: str) -> Null:
        unit = MEANINGS[self.name][0]
        difference = mean_estimate([self.mine, self.null], (1.0, -1.0)).measured(unit)
        return Null(self.control, self.null.measured(unit), difference, word or "undefined")


def compare_scores(mine: Scored, controls: Mapping[str, Scored]) -> list[Score]:
    """Return every score next to those of the controls; what is said of any of them is decided together (Holm)."""
    names = [name for name in MEANINGS if name in mine.scores]
    pairs = [(name, control) for name in names for control in controls if name in controls[control].scores]
    cells = [_Cell(name, control, *_matched(name, mine, controls[control])) for name, control in pairs]
    words = family_verdicts([cell.claim() for cell in cells], 0.0, least=None, most=None)
    decided = list(zip(cells, words, strict=True))
    return [_score(name, mine.scores[name], decided) for name in names]


def _score(name: str, value: np.ndarray, decided: Sequence[tuple[_Cell, str]]) -> Score:
    unit, meaning, higher = MEANINGS[name]
    nulls = [cell.null_of(word) for cell, word in decided if cell.name == name]
    return Score(name, meaning, mean_over_latents(value, unit), higher, nulls, _tells(nulls))


def _tells(nulls: Sequence[Null]) -> bool | None:
    """Return whether a score is better than for every control that learned nothing; None where none is defined."""
    words = [null.verdict for null in nulls if null.control != SHUFFLED and null.verdict != "undefined"]
    return all(word == "better" for word in words) if words else None
