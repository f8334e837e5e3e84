"""Families of arms: what each could do if its arm had to be chosen within the training rows, choice included.

In every outer training part the arm of a family with the highest score in the inner folds is chosen (macro-F1; AUC
where verdicts on two classes look at it), and the test
rows of that part are predicted by it: the score is that of this procedure. How uncertain the choice is follows from
resampled training rows (groups): what the inner folds said about them is scored again, the arm, its hyperparameter or a
vote of arms are chosen again, on both sides of a difference alike, and the mean square of what that changes is added to
the variance over the test rows. Which arms may vote together is not chosen again: that part is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..measure.intervals import Estimate
from ..measure.paired_scores import HeldOut, Predictions, Scores, score
from ..measure.results import Measured
from ..measure.verdicts import family_verdicts
from .choices import resampled_rows, scores_again
from .plan import Job
from .result import FamilyScore
from .verdicts import NO_DENSE, Judged

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "TF-IDF": ("words",),
    "pixels": ("pixels",),
    "dense": ("last", "dense", "dense-tree"),
    "PCA": ("pca", "svd", "ica", "difference"),
    "random": ("random",),
    "untrained": ("untrained",),
    "frozen": ("frozen",),
    "SAE": ("full", "binarized", "sparse", "tree", "binarized-tree"),
}
"""Kinds of arms of each family."""

BASELINES = ("TF-IDF", "pixels", "dense", "PCA")
"""Families that an SAE is compared with."""

CONTROLS = ("random", "untrained", "frozen")
"""Families of dictionaries that learned nothing, which tell whether the training of an SAE helps."""

_UNITS = {"macro_f1": "fraction", "auc": "area"}
_METRICS = tuple(_UNITS)


@dataclass(frozen=True, eq=False)
class _Option:
    """An arm with its hyperparameter that can be chosen in one part."""

    family: str
    name: str
    inner: float
    labels: np.ndarray
    """What the inner folds said about the training rows: class codes, or ranks for AUC."""
    probabilities: np.ndarray
    """What it says about the test rows."""


class _Choices:
    """The options of some families in every part, and what is chosen of them on resampled training rows."""

    def __init__(self, judged: Judged, jobs: Sequence[Job], weights: Sequence[np.ndarray]) -> None:
        data, parts = judged.plan.data, judged.plan.parts[0]
        self.options = [[each for job in jobs for each in _options(judged, job, part)] for part in range(len(parts))]
        chosen = []
        for (train, _), options, weight in zip(parts, self.options, weights):
            inner, labels = [each.inner for each in options], [each.labels for each in options]
            chosen.append(scores_again(data.y[train], inner, labels, weight, judged.plan.chosen_by).argmax(1))
        self.chosen = np.stack(chosen, axis=1)
        """``[1 + RESAMPLES, n_parts]`` index of the option; first as it is."""

    @property
    def names(self) -> list[str]:
        """The arm chosen in each part."""
        return [options[at].name for options, at in zip(self.options, self.chosen[0])]

    def probabilities(self, choice: Sequence[int]) -> np.ndarray:
        """Return what the chosen options say about all test rows."""
        return np.concatenate([options[at].probabilities for options, at in zip(self.options, choice)])

    def values(self, held_out: HeldOut, metric: str) -> np.ndarray:
        """Return a metric on the test rows for every choice, ``[1 + RESAMPLES]``."""
        choices, which = np.unique(self.chosen, axis=0, return_inverse=True)
        rest = replace(held_out, sample=replace(held_out.sample, reason="no interval asked for"))
        found = [score(Predictions(self.probabilities(each)), rest, (metric,))[metric].value for each in choices]
        return np.array(found)[which.ravel()]


@dataclass(frozen=True, eq=False)
class _Family:
    name: str
    choices: _Choices
    held_out: HeldOut

    @cached_property
    def scores(self) -> Scores:
        """Scores of what was chosen."""
        return score(Predictions(self.choices.probabilities(self.choices.chosen[0])), self.held_out, _METRICS)

    @cached_property
    def again(self) -> dict[str, np.ndarray]:
        """Every metric for every choice."""
        return {metric: self.choices.values(self.held_out, metric) for metric in _METRICS}

    @property
    def most_chosen(self) -> str:
        """Family that is chosen most often."""
        options = self.choices.options
        return Counter(each[at].family for each, at in zip(options, self.choices.chosen[0])).most_common(1)[0][0]

    def estimate(self, metric: str) -> Estimate:
        """Return a metric with the uncertainty of the choice."""
        return _with_choice(self.scores[metric], self.again[metric])

    def minus(self, other: _Family, metric: str) -> Estimate:
        """Return the difference on the same test rows, with the uncertainty of both choices."""
        mine, theirs = self.scores[metric], other.scores[metric]
        gap = mine.minus(mine if self.choices.names == other.choices.names else theirs)  # itself: no uncertainty
        return _with_choice(gap, self.again[metric] - other.again[metric])


def _with_choice(estimate: Estimate, again: np.ndarray) -> Estimate:
    return replace(estimate, choice=float(np.square(again[1:] - again[0]).mean()))


def _options(judged: Judged, job: Job, part: int) -> list[_Option]:
    """Return what an arm could be in a part: itself, and what the inner folds could have chosen instead."""
    fit, family = judged.fits[job.key], _family_of(job)
    test = judged.plan.parts[0][part][1]
    start = sum(len(rows) for _, rows in judged.plan.parts[0][:part])
    said = [fit.probabilities[0][start : start + len(test)], *fit.rivals[part]]
    return [
        _Option(family, f"{job.arm.name}: {each['arm']}" if each["arm"] else job.arm.name, each["inner"], labels, guess)
        for each, labels, guess in zip(fit.facts["options"][part], fit.labels[part], said)
    ]


def _family_of(job: Job) -> str:
    return next((name for name, kinds in FAMILIES.items() if job.arm.base_kind in kinds), "")


def resampled(judged: Judged) -> list[np.ndarray]:
    """Return how often each training row is drawn, per part ``float32 [1 + RESAMPLES, n_train]``; first once each."""
    together, seed = judged.plan.data.together, judged.plan.split.seed
    return [
        resampled_rows(None if together is None else together[train], len(train), (seed, 31, part))
        for part, (train, _) in enumerate(judged.plan.parts[0])
    ]


def family_scores(judged: Judged) -> list[FamilyScore]:
    """Return every family with its strongest arm, compared with the best baseline family, both choices included."""
    jobs = _jobs_by_family(judged)
    weights = resampled(judged)

    def family(*names: str) -> _Family | None:
        mine = [job for name in names for job in jobs[name]]
        return _Family("+".join(names), _Choices(judged, mine, weights), judged.held_out[0]) if mine else None

    found = {name: each for name in jobs if (each := family(name)) is not None}
    base, control = family(*BASELINES), family(*CONTROLS)
    words = _verdicts(found, base, judged)
    scores = [_family_score(each, base, len(jobs[name]), words[name]) for name, each in found.items()]
    if control is None:
        return scores
    return [replace(each, **_beyond(found["SAE"], control, judged)) if each.role == "sae" else each for each in scores]


def _beyond(sae: _Family, control: _Family, judged: Judged) -> dict[str, Any]:
    """Return what an SAE is better by than dictionaries that learned nothing: a claim alone."""
    gap = sae.minus(control, judged.metric)
    return {
        "control": control.most_chosen,
        "control_difference": gap.measured(_UNITS[judged.metric], least=-1.0, most=1.0),
        "control_verdict": family_verdicts([gap], judged.plan.how.margin)[0],
    }


def _jobs_by_family(judged: Judged) -> dict[str, list[Job]]:
    """Return the jobs of each family that have options to choose among."""
    jobs: dict[str, list[Job]] = {name: [] for name in FAMILIES}
    for job in judged.jobs():
        if _family_of(job) and judged.fits[job.key].facts["options"][0]:
            jobs[_family_of(job)].append(job)
    return jobs


def _verdicts(found: Mapping[str, _Family], base: _Family | None, judged: Judged) -> dict[str, str]:
    """Return the verdicts of all families minus the best baseline: that of the SAEs is a claim alone."""
    if base is None:
        return dict.fromkeys(found, "")
    gaps = {name: each.minus(base, judged.metric) for name, each in found.items()}
    said: dict[str, str] = {}
    for family in ([name for name in gaps if name == "SAE"], [name for name in gaps if name != "SAE"]):
        said |= dict(zip(family, family_verdicts([gaps[name] for name in family], judged.plan.how.margin)))
    return said


def _family_score(family: _Family, base: _Family | None, n_arms: int, word: str) -> FamilyScore:
    chosen = Counter(family.choices.names)
    again = Counter(
        family.choices.options[part][at].name for row in family.choices.chosen[1:] for part, at in enumerate(row)
    )
    gaps: dict[str, Measured] = dict.fromkeys(_METRICS, NO_DENSE)
    if base is not None:
        gaps = {
            metric: family.minus(base, metric).measured(unit, least=-1.0, most=1.0) for metric, unit in _UNITS.items()
        }
    total = sum(again.values())
    return FamilyScore(
        name=family.name,
        role="baseline" if family.name in BASELINES else "sae" if family.name == "SAE" else "control",
        n_arms=n_arms,
        strongest=chosen.most_common(1)[0][0],
        chosen=dict(chosen.most_common()),
        again={name: count / total for name, count in again.most_common()},
        macro_f1=family.estimate("macro_f1").measured("fraction", least=0.0, most=1.0),
        auc=family.estimate("auc").measured("area", least=0.0, most=1.0),
        baseline=None if base is None else base.most_chosen,
        difference=gaps["macro_f1"],
        auc_difference=gaps["auc"],
        verdict=word,
    )
