"""A classifier of a few latents next to one of all: what its explanations show is what decided, at a stated price."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..measure.paired_scores import HeldOut, score
from .arms import Arm, ranking_of
from .decisions import TOP_LATENTS, LinearRule
from .fit import Fitted, fit_smallest, predict_arm
from .plan import Plan

SPARSE_KS = (4, 8, 16, 32, 64)
"""Numbers of latents tried; the smallest that comes within the margin of the best in the inner folds is kept."""


@dataclass(frozen=True, eq=False)
class SparseArm:
    """A fitted classifier of a few latents."""

    pipeline: Any
    about: dict[str, Any]
    """Name, latents, settings, inner scores; on the test rows its macro-F1, that of the classifier of all latents and
    their difference, and the mean fraction of contributions that the latents shown carry in either."""


def sparse_arm(plan: Plan, full: Fitted, X: Any) -> SparseArm | None:
    """Fit the sparse arm of a classifier on its training rows, and score both on the test rows of the same fold.

    Parameters
    ----------
    plan
        What was run.
    full
        The classifier.
    X
        Pooled codes of all rows of the data.

    Returns
    -------
    SparseArm or None
        None where the classifier reads selected latents itself, or the SAE has no more than are tried.
    """
    arms, data, (train, test) = _arms(plan, full.arm, X.shape[1]), plan.data, plan.parts[0][0]
    if full.selected is not None or not arms:
        return None
    few, inner = fit_smallest(
        arms,
        X[train],
        data.y[train],
        groups=_of(data.together, train),
        budget=replace(plan.budget, widen=0),
        margin=plan.how.margin,
    )
    rows = HeldOut.over(data.y[test], groups=_of(data.groups, test), intervals=plan.how.intervals)
    mine, whole = (score(predict_arm(each, X[test], len(data.classes)), rows, ("macro_f1",)) for each in (few, full))
    about = {
        "arm": few.arm.name,
        "k": few.arm.k,
        "settings": few.chosen,
        "inner": inner,
        "margin": plan.how.margin,
        "n_test": len(test),
        "macro_f1": mine.measured("macro_f1").to_json(),
        "full_macro_f1": whole.measured("macro_f1").to_json(),
        "difference": mine.difference(whole).to_json(),
        "shown": TOP_LATENTS,
        "shown_fraction": _mean_shown(few, X[test]),
        "full_shown_fraction": _mean_shown(full, X[test]),
    }
    return SparseArm(few.pipeline, about)


def _arms(plan: Plan, arm: Arm, n_latents: int) -> list[Arm]:
    """Return an arm on selected latents, the fewest first."""
    ranking = ranking_of(plan.how.select_by, plan.origins[arm.source])
    few = replace(arm, kind="sparse", steps=(*arm.steps, "select"), **ranking)
    return [replace(few, name=f"{arm.name} k={k}", k=k) for k in SPARSE_KS if k < n_latents]


def _of(values: Any, rows: Any) -> Any:
    return None if values is None else values[rows]


def _mean_shown(fitted: Fitted, X: Any) -> float | None:
    """Return the mean fraction of the magnitude of contributions that the latents shown carry."""
    each = LinearRule.of(fitted.pipeline, X.shape[1]).shown_fractions(X)
    return float(each.mean()) if len(each) else None
