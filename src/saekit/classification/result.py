"""The result of a classification: every arm with intervals, its distance to the best dense arm, its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..errors import ConfigError, FormatError
from ..measure.intervals import measured_mean, no_intervals
from ..measure.results import Measured, Result
from ..measure.verdicts import VERDICTS, detectable, holm
from ..provenance import library_versions, release
from ..settings import brief
from .arm_results import ArmsResult, ComparedArm

_COLUMNS = ("arm", "macro-F1", "AUC", "balanced accuracy", "Brier", "− best dense", "verdict", "shuffled AUC")
_AUC_COLUMNS = (*_COLUMNS[:5], "AUC − best dense", *_COLUMNS[6:])


@dataclass(frozen=True, kw_only=True)
class ArmScore(ComparedArm):
    """One classifier, evaluated on the test set."""

    __repr__ = brief

    probe: str
    k: int | None
    """Latents or components kept; None for all."""
    about: dict[str, Any]
    """Facts about the source: hook, layer, latents, rule."""
    balanced_accuracy: Measured
    accuracy: Measured
    brier: Measured
    control_difference: Measured
    """Macro-F1 minus that of the best dictionary that learned nothing or was frozen."""
    control_auc_difference: Measured | None = None
    """AUC minus that of the same; None in older files."""
    control_verdict: str
    """Verdict at the margin; like `verdict` of macro-F1, or of AUC where ``settings["metric"]`` is ``auc``."""
    p: float | None
    """Two-sided p-value of no difference of macro-F1: from the paired jackknife, in nested cross-validation from Nadeau
    and Bengio's corrected t over the folds (``settings["p_values"]``); None without one."""
    p_holm: float | None
    """The same after Holm's correction over all arms of this result."""
    inner: float | None
    """Score in the inner cross-validation, which arms are chosen by: macro-F1, or AUC where verdicts on two classes
    look at it."""
    shuffled_auc: Measured | None
    """AUC after the same with permuted labels; chance is 0.5. None where it was not asked for."""
    shuffled_p: float | None = None
    """P-value of chance for it, from other orders of the test labels."""
    chosen: list[dict[str, Any]]
    """Settings that the inner cross-validation chose, per outer fold."""
    selected: list[int] = field(repr=False)
    """Latents that reach the classifier, best first (of the first outer fold); empty where all do."""
    stability: dict[str, float] | None
    """Agreement of the latents selected in the inner folds: jaccard, kuncheva."""
    converged: bool
    notes: list[str]
    seconds: float
    """Time of all its fits."""


@dataclass(frozen=True, kw_only=True)
class FamilyScore:
    """A family of arms: the strongest is chosen within the training rows, and the choice is part of the interval."""

    __repr__ = brief

    name: str
    """TF-IDF, pixels, dense, PCA, random, untrained, frozen or SAE."""
    role: str
    """baseline, control or sae."""
    n_arms: int
    """Number of arms; a search counts as one."""
    strongest: str
    """The arm that was chosen (over folds, most often); of a search with its representation and probe, ``a & b`` where
    several vote."""
    chosen: dict[str, int]
    """How often each arm was chosen: once per outer fold."""
    again: dict[str, float]
    """Fraction of the resamples of the training rows in which each arm is chosen."""
    macro_f1: Measured
    """On the test set."""
    auc: Measured
    baseline: str | None
    """The baseline family that was chosen to compare with (over folds, most often); None without one."""
    difference: Measured
    """Macro-F1 minus that of the best baseline family, which is chosen within the training rows as well."""
    auc_difference: Measured
    verdict: str
    """Verdict of the difference at the margin, of the metric of the verdicts; empty without baselines."""
    control: str | None = None
    """For the SAE: the family that learned nothing (random, untrained or frozen) which the training rows prefer."""
    control_difference: Measured | None = None
    """For the SAE: the metric of the verdicts, minus that of the best of those families, both choices included."""
    control_verdict: str = ""
    """Verdict of that difference: whether its training makes an SAE a better classifier."""


@dataclass(frozen=True)
class LowData:
    """One arm trained on fewer rows."""

    name: str
    kind: str
    n_train: int
    macro_f1: Measured
    auc: Measured
    difference: Measured
    """Macro-F1 minus that of the best dense arm at the same number of rows."""


@dataclass(frozen=True, repr=False)
class Classification(ArmsResult):
    """What an interpretable classifier costs against the best simple alternative.

    Examples
    --------
    ::

        result = sk.classify(saes, model="builtin", data="reviews.csv", split=sk.Split(label="stars"))
        result.arm(result.best_sae).difference          # to the best dense arm, with its interval
        result.arm(result.best_sae).verdict             # "equivalent"
        result.price_of_sparsity()                      # macro-F1 at every k
    """

    KIND: ClassVar[str] = "classification"
    SCHEMA: ClassVar[int] = 3
    PARTS: ClassVar[tuple[str, ...]] = ("arms", "families", "low_data")

    name: str
    """What tables over several data sets call it."""
    best_sae: str | None
    """The SAE arm with the highest inner macro-F1."""
    best_control: str | None
    """The random, untrained or frozen arm with the highest inner macro-F1."""
    floor: Measured
    """What the test set resolves: half the width of the interval of the best SAE arm minus the best dense arm (without
    SAEs the median over arms)."""
    arms: list[ArmScore]
    low_data: list[LowData]
    families: list[FamilyScore] = field(default_factory=list)
    """Every family with its strongest arm; empty in files of schema 1 and 2."""

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        names = [arm.name for arm in self.arms]
        for best in (self.best_dense, self.best_sae, self.best_control):
            if best is not None and best not in names:
                raise FormatError(f"a saved classification must hold the arm `{best}`; it does not. It was altered.")
        if len(set(names)) < len(names) or any(arm.verdict not in ("", *VERDICTS) for arm in self.arms):
            raise FormatError("a saved classification must name each arm once, with a verdict. The file was altered.")

    def price_of_sparsity(self) -> dict[str, list[tuple[int, ArmScore]]]:
        """Per curve (an SAE under a pooling, or a control) the arms by rising k."""
        curves: dict[str, list[tuple[int, ArmScore]]] = {}
        for arm in self.arms:
            if arm.k is not None and arm.kind in _CURVES:
                label = " ".join(part for part in (_CURVES[arm.kind], arm.source, arm.pool) if part)
                curves.setdefault(label, []).append((arm.k, arm))
        return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}

    def table(self) -> list[list[str]]:
        """Rows of text, headings first; the best dense and the best SAE arm carry a star."""
        is_auc = self.settings.get("metric") == "auc"
        lines = [list(_AUC_COLUMNS if is_auc else _COLUMNS)]
        for arm in self.arms:
            gap = arm.auc_difference if is_auc else arm.difference
            star = " *" if arm.name in (self.best_dense, self.best_sae, self.best_control) else ""
            lines.append(
                [
                    arm.name + star, f"{arm.macro_f1:.3f}", f"{arm.auc:.3f}", f"{arm.balanced_accuracy.value:.3f}",
                    f"{arm.brier.value:.3f}",
                    f"{gap:+.3f}" if gap.is_defined else "–", arm.verdict or "–",
                    "–" if arm.shuffled_auc is None else f"{arm.shuffled_auc:.2f}",
                ]
            )  # fmt: skip
        return lines

    def families_table(self) -> list[list[str]]:
        """Rows of text, headings first: every family with its strongest arm, minus the best baseline family."""
        is_auc = self.verdict_metric == "auc"
        gap = f"{'AUC' if is_auc else 'macro-F1'} − best non-SAE"
        lines = [["family", "strongest arm", "chosen", "macro-F1", "AUC", gap, "verdict"]]
        for each in self.families:
            difference = each.auc_difference if is_auc else each.difference
            shown = f"{difference:+.3f}" if difference.is_defined else "–"
            chosen = f"{each.again.get(each.strongest, 0.0):.0%} of resamples"
            if sum(each.chosen.values()) > 1:
                chosen = f"{each.chosen[each.strongest]} of {sum(each.chosen.values())} folds, {chosen}"
            numbers = (f"{each.macro_f1:.3f}", f"{each.auc:.3f}", shown)
            lines.append([each.name, each.strongest, chosen, *numbers, each.verdict or "–"])
        return lines

    def conclusion(self) -> str:
        """Say in one sentence what a reader may conclude; empty without an SAE or a baseline."""
        sae = next((each for each in self.families if each.role == "sae"), None)
        if sae is None or sae.baseline is None:
            return ""
        is_auc, margin = self.verdict_metric == "auc", self.settings["margin"]
        unit = "AUC" if is_auc else "macro-F1"
        gap = sae.auc_difference if is_auc else sae.difference
        said = {
            "better": f"The SAE's latents classify better than every baseline: more than {margin:g} {unit} above",
            "worse": f"The SAE's latents classify worse than a simple baseline: more than {margin:g} {unit} below",
            "equivalent": f"The SAE's latents classify as well as the best baseline, within {margin:g} {unit} of",
            "undecided": "Whether the SAE's latents classify better or worse than a baseline is undecided against",
        }[sae.verdict]
        sentence = f"{said} {sae.baseline} ({gap:+.3f} {unit}, the choice of the arms included)."
        if sae.control is None:
            return sentence
        helps = {
            "better": "Its training helps", "worse": "Its training harms",
            "equivalent": f"Its training changes less than {margin:g}",
            "undecided": "Whether its training helps is undecided",
        }[sae.control_verdict]  # fmt: skip
        return f"{sentence} {helps}: {sae.control_difference:+.3f} to what learned nothing ({sae.control})."

    def caption(self) -> str:
        """Return the footnote: test size, interval method."""
        data, settings = self.data, self.settings
        unit = " AUC" if settings.get("metric") == "auc" else ""
        about = no_intervals(arm.macro_f1 for arm in self.arms) or describe_intervals(settings["intervals"])
        lines = [
            f"{data['n_train']:,} training and {data['n_test']:,} test rows, {len(self.classes)} classes; "
            f"{about}; margin {settings['margin']:g}{unit}. * chosen by inner "
            "cross-validation.",
            describe_resolution(self.floor.to_json(), settings),
            self.conclusion(),
        ]
        return "\n".join(filter(None, lines))


def describe_intervals(intervals: Mapping[str, Any]) -> str:
    """Return what the intervals of a result are over, in words."""
    unit, n, effective = intervals["unit"], intervals.get("n"), intervals.get("effective")
    if n is None:  # of earlier versions, from resamples
        return f"{intervals['level']:.0%} intervals from resampled test {unit}"
    equal = "" if effective is None or effective > 0.95 * n else f" (which tell as much as {effective:.1f} equal ones)"
    return f"{intervals['level']:.0%} intervals over {n:,} test {unit}{equal}"


def describe_resolution(floor: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return what the test set resolves, in words, with the power it means."""
    if floor["value"] is None:
        return "What this test set resolves is not known: no difference has an interval."
    metric = "AUC" if settings.get("metric") == "auc" else "macro-F1"
    half, margin = floor["value"], settings["margin"]
    reason = floor.get("reason") or "half the width of an interval"
    return (
        f"This test set resolves ±{half:.3f} {metric} ({reason}); a true difference of "
        f"{detectable(half, margin):.3f} would be found 4 times in 5 at the margin of {margin:g}."
    )


_CURVES = {"sparse": "", "matched": "density-matched", "pca": "PCA", "svd": "SVD", "ica": "ICA",
           "random": "random", "untrained": "untrained"}  # fmt: skip


# ------------------------------------------------------------------------------------------------ several data sets


@dataclass(frozen=True)
class Across:
    """One kind of arm over data sets."""

    name: str
    n_sets: int
    difference: Measured
    """Mean over data sets of macro-F1 minus the best dense arm's; interval over data sets."""
    better: int
    """Data sets on which its verdict is better."""
    equivalent: int
    worse: int
    undecided: int
    p: float | None
    """Wilcoxon's signed-rank test over data sets; None below two data sets."""
    p_holm: float | None


@dataclass(frozen=True, repr=False)
class ClassificationSummary(Result):
    """The same arms over several data sets, each minus the best dense arm of its data set."""

    KIND: ClassVar[str] = "classification_summary"
    SCHEMA: ClassVar[int] = 2
    PARTS: ClassVar[tuple[str, ...]] = ("arms",)

    sets: list[str]
    """Names of the results, in the order given."""
    margin: float
    arms: list[Across]

    @classmethod
    def migrate(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Return a file of schema 1, which did not say versions and settings, in the layout of this one."""
        return {"versions": {}, "settings": {}, **plain} if plain.get("schema") == 1 else plain

    def table(self) -> list[list[str]]:
        """Rows of text, headings first."""
        lines = [["arm", "data sets", "− best dense", "better", "equivalent", "worse", "undecided", "p", "p (Holm)"]]
        for arm in self.arms:
            counts = (arm.better, arm.equivalent, arm.worse, arm.undecided)
            lines.append(
                [arm.name, str(arm.n_sets), f"{arm.difference:+.3f}", *map(str, counts), _p(arm.p), _p(arm.p_holm)]
            )
        return lines

    def caption(self) -> str:
        """Return the footnote: data sets, interval method."""
        return (
            f"macro-F1 minus the best dense arm of each of {len(self.sets)} results ({', '.join(self.sets)}); "
            f"intervals over data sets, Wilcoxon's signed-rank test, Holm's correction; "
            f"margin {self.margin:g}."
        )


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def summarize(
    results: Sequence[Classification] | Mapping[str, Classification],
) -> ClassificationSummary:
    """Each kind of arm minus the best dense arm, over data sets.

    Arms are the same where kind, pooling and k are; where a result has several of one kind (several SAEs), the one
    with the highest inner macro-F1 stands for it. The first line is the SAE arm that inner cross-validation chose in
    each result.

    Parameters
    ----------
    results
        One per data set (and model).

    Raises
    ------
    ConfigError
        No results, or results of different margins.
    """
    found = list(results.items() if isinstance(results, Mapping) else ((each.name, each) for each in results))
    margins = {each.settings["margin"] for _, each in found}
    if len(margins) != 1:
        raise ConfigError(f"summarize: results must be judged at one margin; got {sorted(margins) or 'no results'}.")
    rows: dict[str, list[ArmScore]] = {}
    for _, result in found:
        for role, arm in _standing(result).items():
            rows.setdefault(role, []).append(arm)
    tests = [*map(_wilcoxon, rows.values())]
    arms = [_across(*row, p) for row, p in zip(rows.items(), zip(tests, holm(tests)))]
    return ClassificationSummary(
        release(), library_versions(False), {"intervals": "jackknife over data sets"}, [name for name, _ in found],
        margins.pop(), arms,
    )  # fmt: skip


def _standing(result: Classification) -> dict[str, ArmScore]:
    """Return the arms that stand for a result, by what they are called over data sets."""
    found: dict[str, ArmScore] = {}
    if result.best_dense is None:
        return found
    if result.best_sae is not None:
        found["SAE, best by inner folds"] = result.arm(result.best_sae)
    for arm in result.arms:
        role = _role(arm)
        if role not in found or (arm.inner or 0) > (found[role].inner or 0):
            found[role] = arm
    return found


def _across(role: str, arms: Sequence[ArmScore], p: tuple[float, float]) -> Across:
    gaps = np.array([arm.difference.value for arm in arms])
    return Across(
        name=role,
        n_sets=len(arms),
        difference=measured_mean(gaps, "macro-F1", least=-1.0, most=1.0),
        **{verdict: sum(arm.verdict == verdict for arm in arms) for verdict in VERDICTS},
        p=none_if_nan(p[0]),
        p_holm=none_if_nan(p[1]),
    )


def none_if_nan(number: float) -> float | None:
    """Return a number as JSON holds it: None for NaN."""
    return None if math.isnan(number) else number


def _role(arm: ArmScore) -> str:
    """Return the name of an arm over data sets and SAEs."""
    if arm.kind == "strongest":
        return arm.name
    k = "" if arm.k is None else f" k={arm.k}"
    return " ".join(part for part in (arm.kind, arm.pool if arm.pool != arm.kind else "") if part) + k


def _wilcoxon(arms: Sequence[ArmScore]) -> float:
    gaps = np.array([arm.difference.value for arm in arms])
    if len(gaps) < 2 or not np.any(gaps):
        return math.nan if len(gaps) < 2 else 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(gaps, zero_method="zsplit", method="exact" if len(gaps) <= 10 else "asymptotic").pvalue)
