"""Scores of every fitted arm on the same resamples of the test rows, the baseline among them, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ConfigError, did_you_mean, listed
from ..measure.intervals import Estimate
from ..measure.paired_scores import METRIC_NAMES, HeldOut, Predictions, Scores, chance_test, score
from ..measure.results import Measured
from ..measure.verdicts import corrected_t, family_verdicts, holm
from ..measure.verdicts import resolution as resolved
from ..places import Warned
from ..rows.pooling import DENSE_POOLS
from ..settings import Progress
from .plan import Job, Plan
from .probes import EDGE
from .result import ArmScore, LowData
from .stored_fits import StoredFit, read_fit, shuffled_labels
from .transfer_result import Cell

LEAK_LEVEL = 0.05
"""Level of the warning that shuffled labels were not at chance, after Holm's correction."""

ORDERS = 40
"""Orders of shuffled labels for every arm: the smallest p-value is below the level after the correction."""

DENSE_KINDS = ("last", "dense", "dense-tree")
SAE_KINDS = ("full", "binarized", "sparse", "tree", "binarized-tree")
CONTROL_KINDS = ("random", "untrained", "frozen")

NO_DENSE = Measured(math.nan, None, None, "fraction", "no dense arm to compare with")
NO_CONTROL = Measured(math.nan, None, None, "fraction", "no random, untrained or frozen dictionary to compare with")


@dataclass(frozen=True, eq=False)
class Judged:
    """Every fit of a plan, scored."""

    plan: Plan
    fits: Mapping[str, StoredFit]
    held_out: list[HeldOut]
    """The test rows of each value."""
    scores: Mapping[tuple[str, int], Scores]
    """Scores by the key of a job and the index of the tested value."""
    metric: str
    """What verdicts look at: ``macro_f1`` or ``auc``."""

    def jobs(self, n_train: int | None = None) -> list[Job]:
        """Return the jobs on that number of training rows; None: on all."""
        return [job for job in self.plan.jobs if job.n_train == n_train]

    def of_arm(self, name: str) -> list[Job]:
        """Return the jobs of an arm on all training rows, a job per value."""
        return [job for job in self.jobs() if job.arm.name == name]

    def score(self, job: Job, value: int = 0) -> Scores:
        """Return the scores of a job on the test rows of a value."""
        return self.scores[job.key, value]

    def best(self, kinds: Sequence[str], n_train: int | None = None) -> str | None:
        """Return the arm of these kinds with the highest inner score (mean over values), the first of equals."""
        inner: dict[str, list[float | None]] = {}
        for job in self.jobs(n_train):
            if job.arm.base_kind in kinds:
                inner.setdefault(job.arm.name, []).append(self.fits[job.key].facts["inner"])
        known = {name: float(np.mean(each)) for name, each in inner.items() if None not in each}  # type: ignore
        return max(known, key=lambda name: known[name], default=None)

    @cached_property
    def baseline(self) -> str | None:
        """The dense arm that all are compared with."""
        return self.best(DENSE_KINDS)


def judge(plan: Plan, fits: Mapping[str, StoredFit], progress: Progress) -> Judged:
    """Score the fits of a plan.

    Parameters
    ----------
    plan, fits
        What was fitted, and what came out; see `run_jobs`.
    progress
        Called with the stage ``scores``.
    """
    n = len(plan.values)
    held_out = [held_out_of(plan, value) for value in range(n)]
    names = METRIC_NAMES if n == 1 else ("macro_f1", "auc")
    scores = {}
    for done, job in enumerate(plan.jobs):
        progress("scores", done, len(plan.jobs), "")
        for j, rows in enumerate(held_out):
            scores[job.key, j] = score(Predictions(fits[job.key].probabilities[j]), rows, names)
    progress("scores", len(plan.jobs), len(plan.jobs), "")
    return Judged(plan, fits, held_out, scores, plan.metric)


def held_out_of(plan: Plan, value: int) -> HeldOut:
    """Return the test rows of a value, which all arms share.

    Groups and texts that several values have (translations of one text) are the same parts in each.
    """
    data, rows = plan.data, plan.test(value)
    return HeldOut.over(
        data.y[rows],
        groups=None if data.groups is None else data.groups[rows],
        folds=_fold_of_test(plan, value),
        names=[data.keys[row] for row in rows],
        intervals=plan.how.intervals,
    )


def _fold_of_test(plan: Plan, value: int) -> np.ndarray:
    parts = plan.parts[value]
    return np.repeat(np.arange(len(parts)), [len(test) for _, test in parts])


def difference(plan: Plan, first: str, second: str, metric: str = "macro_f1") -> Measured:
    """Return one arm minus another on the same test rows; both must have been computed.

    Raises
    ------
    ConfigError
        There is no such arm, or its fit has no file yet.
    """
    found = []
    for name in (first, second):
        job = next((job for job in plan.jobs if job.name == name), None)
        if job is None:
            raise ConfigError(
                f"there is no arm `{name}` in this plan. {did_you_mean(name, [j.name for j in plan.jobs])}"
            )
        fit = read_fit(plan, job)
        if fit is None:
            raise ConfigError(f"`{name}` has not been computed in this folder; run the plan first.")
        found.append(score(Predictions(fit.probabilities[job.value]), held_out_of(plan, job.value), (metric,)))
    return found[0].difference(found[1], metric)


# ------------------------------------------------------------------------------------------------------- the metric


def why_auc(judged: Judged) -> list[str]:
    """Return why verdicts look at AUC, where nobody asked for it."""
    if judged.plan.how.metric != "auto" or judged.metric != "auc":
        return []
    return [
        f"the rarer class has {judged.plan.rarer_fraction:.0%} of the test rows: arms are chosen and compared by AUC, "
        "because macro-F1 depends on the threshold then (metric='macro_f1' to look at it all the same)"
    ]


# ---------------------------------------------------------------------------------------------------- one value: arms


def arm_scores(judged: Judged) -> list[ArmScore]:
    """Return every arm on the test rows of the one value, compared with the best dense arm and the best control."""
    plan, main = judged.plan, judged.jobs()
    base, control = _of(judged, judged.baseline), _of(judged, judged.best(CONTROL_KINDS))
    p_values = [_p_value(judged, job, base) for job in main]
    noise = _noise(plan)
    words = zip(_verdicts(judged, main, base), _verdicts(judged, main, control))
    return [
        _arm_score(judged, job, against=(base, control), verdicts=said, p=(p, q), chance=_chance(judged, job, noise))
        for job, said, p, q in zip(main, words, p_values, holm(p_values))
    ]


def _verdicts(judged: Judged, jobs: Sequence[Job], other: Job | None) -> list[str]:
    """Return the verdicts of all arms minus one of them."""
    if other is None:
        return [""] * len(jobs)
    gaps = {job.arm.name: judged.score(job).gap(judged.score(other), judged.metric) for job in jobs}
    return list(arm_verdicts(judged, gaps, other.arm.name).values())


def arm_verdicts(judged: Judged, gaps: Mapping[str, Estimate], other: str) -> dict[str, str]:
    """Return the verdicts of all arms minus an `other` one, which is equivalent to itself.

    The claim of a result is that of the SAE arm that the inner folds chose, and stands alone; what is said of all the
    other arms is one family.
    """
    main = judged.best(SAE_KINDS)
    rest = [name for name in gaps if name not in (main, other)]
    found = {other: "equivalent"}
    alone = [main] if main is not None and main in gaps and main != other else []
    for family in (alone, rest):
        found |= dict(zip(family, family_verdicts([gaps[name] for name in family], judged.plan.how.margin)))
    return {name: found[name] for name in gaps}


def _of(judged: Judged, name: str | None) -> Job | None:
    return None if name is None else judged.of_arm(name)[0]


def _arm_score(
    judged: Judged,
    job: Job,
    *,
    against: tuple[Job | None, Job | None],
    verdicts: tuple[str, str],
    p: tuple[float, float],
    chance: tuple[Measured | None, float],
) -> ArmScore:
    arm, facts, scores = job.arm, judged.fits[job.key].facts, judged.score(job)
    base, control = against
    gaps = {
        name: {metric: none if other is None else scores.difference(judged.score(other), metric) for metric in _TWO}
        for name, other, none in (("dense", base, NO_DENSE), ("control", control, NO_CONTROL))
    }
    metrics = {name: scores.measured(name) for name in METRIC_NAMES}
    return ArmScore(
        name=arm.name, kind=arm.kind, family=arm.family, source=arm.source, pool=arm.pool, probe=arm.probe, k=arm.k,
        about=dict(arm.about), **metrics,
        difference=gaps["dense"]["macro_f1"],
        auc_difference=gaps["dense"]["auc"],
        verdict=verdicts[0],
        control_difference=gaps["control"]["macro_f1"],
        control_auc_difference=gaps["control"]["auc"],
        control_verdict=verdicts[1],
        p=None if math.isnan(p[0]) else p[0], p_holm=None if math.isnan(p[1]) else p[1],
        inner=facts["inner"], shuffled_auc=chance[0],
        shuffled_p=None if math.isnan(chance[1]) else chance[1], chosen=facts["chosen"], selected=facts["selected"],
        stability=facts["stability"], converged=facts["converged"], notes=facts["notes"], seconds=facts["seconds"],
    )  # fmt: skip


_TWO = ("macro_f1", "auc")


def _noise(plan: Plan) -> list[HeldOut]:
    """Return the test rows with permuted labels, of every control."""
    test, seed = plan.test(0), plan.split.seed
    return [
        HeldOut.over(
            shuffled_labels(plan.data, seed + each)[test], folds=_fold_of_test(plan, 0), intervals=plan.how.intervals
        )
        for each in range(plan.shuffles)
    ]


def _chance(judged: Judged, job: Job, noise: Sequence[HeldOut]) -> tuple[Measured | None, float]:
    """Return the AUC after learning permuted labels, and the p-value of chance; orders enough for Holm's correction."""
    if not noise:
        return None, math.nan
    guesses = [Predictions(each) for each in judged.fits[job.key].shuffled]
    n_tests = len(judged.jobs()) * len(judged.plan.parts[0])
    return chance_test(guesses, noise, max(999, ORDERS * n_tests), seed=judged.plan.split.seed)


def _p_value(judged: Judged, job: Job, base: Job | None) -> float:
    """P-value of no difference of macro-F1 from the baseline; NaN for the baseline itself."""
    if base is None or job is base:
        return math.nan
    if judged.plan.split.folds is None:
        return judged.score(job).p_value(judged.score(base))
    return _over_folds(judged, job, base)


def _over_folds(judged: Judged, one: Job, other: Job) -> float:
    """Return the p-value over folds: their training rows overlap, which leaving out test rows ignores."""
    parts, y = judged.plan.parts[0], judged.plan.data.y
    gaps, end = [], 0
    for _, test in parts:
        rows = slice(end, end + len(test))
        rest = HeldOut.over(y[test], intervals=False)
        first, second = (
            score(Predictions(judged.fits[job.key].probabilities[0][rows]), rest, ("macro_f1",)) for job in (one, other)
        )
        gaps.append(first["macro_f1"].value - second["macro_f1"].value)
        end = rows.stop
    n_train, n_test = (round(float(np.mean([len(part[side]) for part in parts]))) for side in (0, 1))
    return corrected_t(gaps, n_train, n_test)[1]


def resolution(judged: Judged, arms: Sequence[ArmScore]) -> Measured:
    """Return half the width of the interval of the difference that is decided.

    That of the best SAE arm from the best dense arm; without an SAE, the median over the arms that learned something.
    """
    gaps = {arm.name: arm.auc_difference if judged.metric == "auc" else arm.difference for arm in arms}
    unit, best, base = "AUC" if judged.metric == "auc" else "macro-F1", judged.best(SAE_KINDS), judged.baseline
    if best is not None and base is not None:
        reason = f"half the 95% interval of `{best}` minus `{base}`"
        return Measured(resolved(gaps[best]), None, None, unit, reason)
    return _median_half([gaps[arm.name] for arm in arms if arm.name != base and arm.family != "floor"], unit)


def _median_half(gaps: Sequence[Measured], unit: str) -> Measured:
    """Return the median of half the widths of the intervals of differences, without those that have none."""
    halves = [resolved(gap) for gap in gaps]
    known = [half for half in halves if not math.isnan(half)]
    if not known:
        return Measured(math.nan, None, None, unit, "no difference with an interval")
    return Measured(float(np.median(known)), None, None, unit, f"half a 95% interval, median over {len(known)} arms")


def low_data(judged: Judged) -> list[LowData]:
    """Return every arm on fewer training rows, compared with the best dense arm there."""
    lines = []
    for size in judged.plan.how.train_sizes:
        jobs = judged.jobs(size)
        best = judged.best(DENSE_KINDS, size)
        base = next((judged.score(job) for job in jobs if job.arm.name == best), None)
        for job in jobs:
            mine = judged.score(job)
            gap = NO_DENSE if base is None else mine.difference(base)
            lines.append(
                LowData(job.arm.name, job.arm.kind, size, mine.measured("macro_f1"), mine.measured("auc"), gap)
            )
    return lines


def edge_warnings(arms: Sequence[ArmScore | Cell]) -> list[Warned]:
    """Return the warning that hyperparameters were chosen at the end of their grid, though it was widened."""
    names = dict.fromkeys(_name_of(arm) for arm in arms if any(note.endswith(EDGE) for note in arm.notes))
    if not names:
        return []
    message = f"the best hyperparameter is still at the end of its widened grid in {len(names)} arms: {listed(names)}"
    return [Warned("grid_edge", f"{message}; a wider grid (budget.widen) may give more")]


def _name_of(arm: ArmScore | Cell) -> str:
    return arm.name if isinstance(arm, ArmScore) else arm.arm


def doubts(arms: Sequence[ArmScore], pools: Sequence[str]) -> list[str]:
    """Return what a reader must know about the fits."""
    concerned = {
        f"with shuffled labels these arms are not at chance: something leaks, or this is the one result in "
        f"{1 / LEAK_LEVEL:.0f} where chance looks like it (another seed tells)": _leaky(arms),
        "the fit of these arms did not converge": [arm.name for arm in arms if not arm.converged],
        "some selected columns never fire in training": [arm.name for arm in arms if _has_dead_columns(arm)],
    }
    found = [f"{what}: {listed(names)}" for what, names in concerned.items() if names]
    alone = [pool for pool in pools if pool not in DENSE_POOLS]
    if alone:
        found.append(f"hidden states have no pooling {listed(alone)}: these arms are compared with dense mean")
    return found


def _leaky(arms: Sequence[ArmScore]) -> list[str]:
    """Return the arms whose AUC with shuffled labels is not at chance; all arms are one family of tests."""
    known = [(arm.name, arm.shuffled_p) for arm in arms if arm.shuffled_p is not None]
    return [name for (name, _), p in zip(known, holm([p for _, p in known])) if p < LEAK_LEVEL]


def _has_dead_columns(arm: ArmScore) -> bool:
    """Return whether a note of the fit says that selected columns never fire in training."""
    return any("are 0 in every training row" in note for note in arm.notes)
