"""Classify texts or images by SAE features, compared with baselines and controls."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..grid import Sharing
from ..inputs.settings import Split
from ..measure.results import to_plain
from ..places import NOTE, Warned
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..ranks import ALONE, Ranks, agreed, check_same, refuse, together
from ..sae.model import SAE
from ..sae.naming import named_saes
from ..settings import Progress, silent, suggest_keywords
from .families import family_scores
from .features import ModelLike, place_warnings, read_features
from .plan import Plan, plan_classification
from .result import Classification
from .settings import ClassifierSettings
from .stored_fits import StoredFit, run_jobs
from .verdicts import (
    CONTROL_KINDS,
    SAE_KINDS,
    Judged,
    arm_scores,
    doubts,
    edge_warnings,
    judge,
    low_data,
    resolution,
    why_auc,
)

RESULT = "classification.json"
CLASSIFIER = "classifier"


@suggest_keywords
@shows_progress
def classify(
    saes: SAE | str | os.PathLike[str] | Sequence[SAE | str | os.PathLike[str]],
    *,
    model: ModelLike,
    data: Any,
    split: Split = Split(),
    settings: ClassifierSettings = ClassifierSettings(),
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Classification:
    """Classify texts or images by SAE features, compared with baselines and controls.

    Hyperparameters, selections and thresholds are chosen within the training rows; the test rows are used once.

    Parameters
    ----------
    saes
        SAEs of the model: values, or paths that `SAE.load` takes. SAEs whose provenance says that their decoder or
        encoder was frozen become controls.
    model
        Language model, or vision model for images: a value, a path or a name.
    data
        Labelled texts, as `read_texts` takes them; or `Images` (for a loaded vision model, whatever `read_images`
        takes).
    split
        Columns, and how rows are split into training and test rows.
    settings
        Which classifiers are compared, and how.
    out
        Output folder: ``classification.json``, the fitted classifier in ``classifier`` (of texts), fits, features. Fits
        that are there are not computed again. Figures: `saekit.report.classification.write_classification_figures`.
    progress
        Called with the stages ``tokens`` (``images``), ``arms`` and ``scores`` [shown on stderr; ``False``: none].

    Returns
    -------
    Classification

    Raises
    ------
    ConfigError
        An unknown arm or pooling, SAEs that do not say where they belong, an arm to save that cannot be saved.
    DataError
        Labels or groups are missing, a class is too rare for the split or the inner folds, a text has no tokens.
    ShapeError
        An SAE is for rows of another width.

    Examples
    --------
    ::

        result = sk.classify(saes, model="builtin", data="banking77.csv", split=sk.Split(split_column="split"))
        result                                  # a table in a notebook
        result.arm(result.best_sae).difference  # to the best dense arm
    """
    plan = plan_classification(
        named_saes(saes, "classify"), model=model, data=data, split=split, settings=settings, out=out
    )
    return run_plan(plan, progress or silent)


def run_plan(plan: Plan, progress: Progress = silent, sharing: Sharing | None = None) -> Classification:
    """Compute what is missing of a plan, compare the arms, and write what `classify` leaves in its folder.

    Parameters
    ----------
    plan
        What to fit.
    progress
        As for `classify`.
    sharing
        How other processes help with the fits, see `saekit.grid`; None: nobody does.

    Raises
    ------
    ConfigError
        The arm to save cannot be saved.
    """
    from .text_classifier import check_savable

    if plan.how.save_arm not in (None, "none"):
        check_savable(plan, str(plan.how.save_arm))
    if sharing is not None:
        refuse("classify with `sharing`")
    with together("classify") as ranks:
        _check_same(ranks, plan)
        if plan.data.images is not None:  # reading them is not split
            return agreed(ranks, lambda: _saved(plan, judged(plan, progress, sharing)))
        fits = _fits(plan, silent if ranks.rank else progress, sharing, ranks)
        return agreed(ranks, lambda: _saved(plan, judge(plan, fits, progress)))


def _check_same(ranks: Ranks, plan: Plan) -> None:
    """Refuse ranks that were started for different classifications."""
    if ranks.size > 1:
        known = {**versions(), "saekit": release()}
        check_same(ranks, "classify", to_plain({"versions": known, "settings": plan.settings}))
        check_same(ranks, "classify", {"jobs": [job.key for job in plan.jobs], "model": plan.reader.facts["digest"]})


def _saved(plan: Plan, judged: Judged) -> Classification:
    """Return the result, and write it into the folder with the classifier."""
    result = classification_of(judged)
    if plan.out is not None:
        result.save(plan.out / RESULT)
        _save_classifier(plan, result, plan.out / CLASSIFIER)
    return result


def _save_classifier(plan: Plan, result: Classification, folder: Path) -> None:
    from .text_classifier import fit_classifier, save_classifier

    is_linear = any(arm.family == "sae" and arm.probe == "logistic" for arm in result.arms)
    wanted = plan.how.save_arm
    if plan.data.images is None and wanted != "none" and (wanted is not None or is_linear):
        save_classifier(fit_classifier(plan, result, wanted), folder)


def judged(plan: Plan, progress: Progress, sharing: Sharing | None = None) -> Judged:
    """Compute the fits that are missing, and score all.

    Raises
    ------
    DataError
        Texts without tokens, activations that are NaN.
    """
    return judge(plan, _fits(plan, progress, sharing), progress)


def run_fits(plan: Plan, progress: Progress, sharing: Sharing | None) -> int:
    """Compute the fits that are missing, or the part of them that `sharing` says; return how many are there."""
    return len(_fits(plan, progress, sharing))


def _fits(plan: Plan, progress: Progress, sharing: Sharing | None, ranks: Ranks = ALONE) -> dict[str, StoredFit]:
    """Return all fits, on rank 0; the features are read by all ranks together."""
    return run_jobs(
        plan,
        lambda arms, tick: read_features(plan.reader, plan.origins, arms, plan.split.seed, tick),
        progress,
        sharing,
        ranks,
    )


def classification_of(judged: Judged) -> Classification:
    """Return the result of a plan of one value."""
    plan, arms = judged.plan, arm_scores(judged)
    settings = plan.settings
    return Classification(
        saekit=release(),
        versions=versions(),
        name=plan.title,
        settings={**plan.settings, "metric": judged.metric, "intervals": _interval_facts(judged)},
        data=plan.data.about,
        model=plan.reader.facts,
        saes=[
            {**origin.about, "name": origin.name, "digest": origin.recipe, "provenance": origin.sae.provenance}
            for origin in plan.origins.values()
            if origin.sae is not None and origin.kind in ("sae", "frozen")
        ],
        classes=plan.data.counts(),
        best_dense=judged.baseline,
        best_sae=judged.best(SAE_KINDS),
        best_control=judged.best(CONTROL_KINDS),
        floor=resolution(judged, arms),
        arms=arms,
        low_data=low_data(judged),
        families=family_scores(judged),
        warnings=[
            *place_warnings(plan.reader, plan.origins.values()),
            *edge_warnings(arms),
            *(Warned(NOTE, text) for text in (*plan.data.warnings, *why_auc(judged), *doubts(arms, settings["pools"]))),
        ],
    )


def _interval_facts(judged: Judged) -> dict[str, Any]:
    """Return what the intervals are over, with the number of groups (or rows) and how many equal ones tell as much."""
    rows = judged.held_out[0]
    n, effective = rows.n_groups, round(rows.effective_groups, 2)
    return {**judged.plan.settings["intervals"], "unit": rows.unit, "n": n, "effective": effective}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a classification depends on."""
    return {**library_versions(True), "scikit-learn": version("scikit-learn")}
