"""Families of arms: what each could do if its arms had to be chosen within the training rows, choice included.

In every outer training part the arms of a family with the highest scores in the inner folds (macro-F1; AUC where
verdicts on two classes look at it) are chosen, up to `AVERAGED` of those that are `NEAR` the best, and the test rows of
that part are predicted by the mean of their class probabilities: the score is that of this procedure. How uncertain the
choice is follows from resampled training rows (groups): what the inner folds said about them is scored again, arms and
hyperparameters are chosen again, on both sides of a difference alike, and the mean square of what that changes is added
to the variance over the test rows.
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

AVERAGED = 4
"""Arms of a family whose class probabilities are averaged, at most.

Over all families of 12 tables (6 data sets, 2 models; the finalists of their searches) the mean of up to 2, 3, 4 and 5
arms is .004, .006, .007 and .007 above the best one alone: macro-F1, or AUC where that decides. What 4 give is on the
page of `studies/classify`.
"""

NEAR = 3.0
"""How far behind the best arm of its family another is averaged with it, in standard errors of the difference of their
scores in the inner folds: farther behind it is the weaker one, however many are compared, and would spoil the mean."""

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


@dataclass(frozen=True, eq=False)
class _Part:
    """An outer training part: what could be chosen in it."""

    options: list[_Option]
    scores: np.ndarray
    """``[1 + RESAMPLES, n_options]`` scores in the inner folds; first of the training rows as they are."""

    def mixtures(self, family: str) -> list[_Mixture]:
        """Return what a family is, on the rows as they are and on every resample."""
        mine = np.flatnonzero([each.family == family for each in self.options])
        scores = self.scores[:, mine]
        found = []
        for row in scores:
            behind = row.max() - row
            error = np.std(scores[1:, [row.argmax()]] - scores[1:], axis=0)
            ranked = np.argsort(behind, kind="stable")
            found.append(self._mixture(mine[ranked[(behind <= NEAR * error)[ranked]]]))
        return found

    def _mixture(self, ranked: np.ndarray) -> _Mixture:
        """Return the best arms, each with its best hyperparameter."""
        found: dict[str, int] = {}
        for at in ranked:
            found.setdefault(self.options[at].name, int(at))
        return tuple(found.values())[:AVERAGED]


_Mixture = tuple[int, ...]
"""Options of a part whose probabilities are averaged, best first."""


@dataclass(frozen=True, eq=False)
class _Family:
    name: str
    parts: Sequence[_Part]
    mixtures: Sequence[Sequence[_Mixture]]
    """By part; first of the rows as they are, then of every resample."""
    held_out: HeldOut

    @classmethod
    def best_of(cls, families: Sequence[_Family]) -> _Family:
        """Return the family with the best arm, chosen in every part and on every resample."""
        first, mixtures = families[0], []
        for at, part in enumerate(first.parts):
            options = zip(*(each.mixtures[at] for each in families))
            mixtures.append([max(each, key=lambda of: row[of[0]]) for row, each in zip(part.scores, options)])
        return cls("best", first.parts, mixtures, first.held_out)

    @property
    def alone(self) -> _Family:
        """The best arm by itself."""
        return replace(self, mixtures=[[mixture[:1] for mixture in each] for each in self.mixtures])

    @property
    def chosen(self) -> list[_Option]:
        """The best arm of each part."""
        return [part.options[mixtures[0][0]] for part, mixtures in zip(self.parts, self.mixtures)]

    @property
    def chosen_again(self) -> list[_Option]:
        """The best arm of each part on every resample."""
        return [part.options[of[0]] for part, mixtures in zip(self.parts, self.mixtures) for of in mixtures[1:]]

    @property
    def averaged(self) -> list[_Option]:
        """All arms that are averaged in each part."""
        return [part.options[at] for part, mixtures in zip(self.parts, self.mixtures) for at in mixtures[0]]

    def _probabilities(self, mixtures: Sequence[_Mixture]) -> np.ndarray:
        """Return what mixtures, one of each part, say about all test rows."""
        return np.concatenate(
            [np.mean([part.options[at].probabilities for at in of], axis=0) for part, of in zip(self.parts, mixtures)]
        )

    @cached_property
    def scores(self) -> Scores:
        """Scores of what was chosen."""
        return score(Predictions(self._probabilities([each[0] for each in self.mixtures])), self.held_out, _METRICS)

    @cached_property
    def again(self) -> dict[str, np.ndarray]:
        """Every metric for every choice, ``[1 + RESAMPLES]``."""
        rest = replace(self.held_out, sample=replace(self.held_out.sample, reason="no interval asked for"))
        known: dict[tuple[_Mixture, ...], list[float]] = {}
        for mixtures in zip(*self.mixtures):
            if mixtures not in known:
                found = score(Predictions(self._probabilities(mixtures)), rest, _METRICS)
                known[mixtures] = [found[metric].value for metric in _METRICS]
        values = np.array([known[mixtures] for mixtures in zip(*self.mixtures)])
        return dict(zip(_METRICS, values.T))

    @property
    def most_chosen(self) -> str:
        """Family that is chosen most often."""
        return Counter(each.family for each in self.chosen).most_common(1)[0][0]

    def estimate(self, metric: str) -> Estimate:
        """Return a metric with the uncertainty of the choice."""
        return _with_choice(self.scores[metric], self.again[metric])

    def minus(self, other: _Family, metric: str) -> Estimate:
        """Return the difference on the same test rows, with the uncertainty of both choices."""
        mine, theirs = self.scores[metric], other.scores[metric]
        is_same = all(one[0] == two[0] for one, two in zip(self.mixtures, other.mixtures))
        gap = mine.minus(mine if is_same else theirs)  # itself: no uncertainty
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
    """Return every family with its strongest arms, compared with the best baseline family, both choices included."""
    jobs = {name: mine for name, mine in _jobs_by_family(judged).items() if mine}
    parts = _parts(judged, [job for mine in jobs.values() for job in mine])
    found = {name: _Family(name, parts, [part.mixtures(name) for part in parts], judged.held_out[0]) for name in jobs}

    def best(names: Sequence[str]) -> _Family | None:
        some = [found[name] for name in names if name in found]
        return _Family.best_of(some) if some else None

    base, control = best(BASELINES), best(CONTROLS)
    words = _verdicts(found, base, judged)
    scores = [_family_score(each, base, len(jobs[name]), words[name], judged.metric) for name, each in found.items()]
    if control is None:
        return scores
    return [replace(each, **_beyond(found["SAE"], control, judged)) if each.role == "sae" else each for each in scores]


def _parts(judged: Judged, jobs: Sequence[Job]) -> list[_Part]:
    """Return what could be chosen in every outer training part."""
    plan, weights, found = judged.plan, resampled(judged), []
    for part, (train, _) in enumerate(plan.parts[0]):
        options = [each for job in jobs for each in _options(judged, job, part)]
        inner, labels = [each.inner for each in options], [each.labels for each in options]
        scores = scores_again(plan.data.y[train], inner, labels, weights[part], plan.chosen_by)
        found.append(_Part(options, scores))
    return found


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


def _family_score(family: _Family, base: _Family | None, n_arms: int, word: str, metric: str) -> FamilyScore:
    chosen, averaged, again = (
        Counter(option.name for option in each) for each in (family.chosen, family.averaged, family.chosen_again)
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
        averaged=dict(averaged.most_common()),
        alone=family.alone.estimate(metric).measured(_UNITS[metric], least=0.0, most=1.0),
    )
