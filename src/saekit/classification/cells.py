"""Cells of a transfer: every arm trained on one value and tested on another, and its means over the matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..measure.intervals import Estimate, mean_estimate
from ..measure.results import Measured
from ..measure.verdicts import family_verdicts
from ..places import NOTE, Warned
from ..provenance import release
from .features import place_warnings
from .plan import Job
from .run import versions
from .transfer_result import (
    LOSSES,
    ArmTransfer,
    Cell,
    Transfer,
    Value,
    arm_sentence,
    cell_sentence,
    near_chance,
)
from .verdicts import NO_DENSE, Judged, arm_verdicts, edge_warnings, why_auc

_UNITS = {"macro_f1": "fraction", "auc": "area"}
_RANGE = {"least": 0.0, "most": 1.0}
Pairs = Sequence[tuple[int, int]]


def transfer_of(
    judged: Judged, saes: list[dict[str, Any]], *, notes: Sequence[str] = (), about: Sequence[dict[str, Any]] = ()
) -> Transfer:
    """Return the result of a plan between its values.

    Parameters
    ----------
    judged
        Scores of every fit.
    saes
        Name, shape, digest and provenance of each SAE.
    notes
        What a reader must know besides what the data says.
    about
        What else is known of each value.
    """
    plan = judged.plan
    n, names = len(plan.values), list(dict.fromkeys(job.arm.name for job in judged.jobs()))
    cells = {name: _cells(judged, name) for name in names}
    every = [cell for each in cells.values() for cell in each]
    words = _verdicts(judged, names)
    facts = plan.reader.facts
    return Transfer(
        saekit=release(),
        versions=versions(),
        settings={**plan.settings, "metric": judged.metric},
        data=plan.data.about,
        model={**facts, "model": facts["name"], "model_digest": facts["digest"]},
        saes=saes,
        across=plan.across,
        classes=plan.data.counts(),
        values=[_value(judged, j, about[j] if about else {}) for j in range(n)],
        best_dense=judged.baseline,
        arms=[_arm(judged, name, cells[name], words[name]) for name in names],
        cells=every,
        warnings=[
            *(Warned(NOTE, text) for text in (*plan.data.warnings, *notes, *why_auc(judged))),
            *place_warnings(plan.reader, plan.origins.values()),
            *edge_warnings(every),
        ],
    )


def _value(judged: Judged, j: int, about: dict[str, Any]) -> Value:
    plan, test, groups = judged.plan, judged.plan.test(j), judged.plan.data.groups
    train = plan.parts[j][0][0]
    return Value(
        name=plan.values[j],
        n_train=len(train),
        n_test=len(test),
        n_groups=None if groups is None else len(np.unique(groups[test])),
        classes=plan.data.counts(train, test),
        about=about,
        effective=round(judged.held_out[j].effective_groups, 2),
    )


def _verdicts(judged: Judged, names: Sequence[str]) -> dict[str, str]:
    """Return the verdict of every arm against the best dense one, corrected for the number of arms."""
    if judged.baseline is None:
        return dict.fromkeys(names, "")
    others = _other_cells(len(judged.plan.values))
    return arm_verdicts(judged, {name: _gap(judged, name, others, judged.metric) for name in names}, judged.baseline)


def _other_cells(n: int) -> Pairs:
    """Return the cells off the diagonal; of one value the one that there is."""
    return [(i, j) for i in range(n) for j in range(n) if i != j] or [(0, 0)]


def _cells(judged: Judged, name: str) -> list[Cell]:
    """Return every cell of an arm; what is claimed of those off the diagonal is one family."""
    n, jobs = len(judged.plan.values), judged.of_arm(name)
    others = [(i, j) for i, j in _other_cells(n) if i != j]
    drops = [judged.score(jobs[j], j).gap(judged.score(jobs[i], j)) for i, j in others]
    areas = [judged.score(jobs[i], j)["auc"].plus(-0.5) for i, j in others]
    lost = dict(zip(others, family_verdicts(drops, judged.plan.how.margin)))
    found = dict(zip(others, family_verdicts(areas, 0.0, least=-0.5, most=0.5)))
    return [_cell(judged, name, (i, j), lost.get((i, j)), found.get((i, j))) for i in range(n) for j in range(n)]


def _cell(judged: Judged, name: str, place: tuple[int, int], lost: str | None, found: str | None) -> Cell:
    """Return a cell, with the verdicts of its drop and of its AUC; None on the diagonal."""
    i, j = place
    jobs = judged.of_arm(name)
    mine, native = judged.score(jobs[i], j), judged.score(jobs[j], j)
    base = judged.baseline
    drop, auc = native.difference(mine), mine.measured("auc")
    facts = judged.fits[jobs[i].key].facts
    minus_dense = None
    if base is not None and base != name:
        minus_dense = mine.difference(judged.score(judged.of_arm(base)[i], j))
    cell = Cell(
        arm=name,
        train=judged.plan.values[i],
        test=judged.plan.values[j],
        macro_f1=mine.measured("macro_f1"),
        auc=auc,
        drop=drop,
        drop_auc=native.difference(mine, "auc"),
        minus_dense=minus_dense,
        chance=near_chance(auc, found),
        verdict="native" if lost is None else LOSSES[lost],
        sentence="",
        chosen=facts["chosen"],
        notes=facts["notes"],
    )
    return replace(cell, sentence=cell_sentence(cell))


def _arm(judged: Judged, name: str, cells: Sequence[Cell], verdict: str) -> ArmTransfer:
    jobs, n = judged.of_arm(name), len(judged.plan.values)
    arm, diagonal = jobs[0].arm, [(j, j) for j in range(n)]
    chances = [cell.chance for cell in cells if cell.train != cell.test]
    found = ArmTransfer(
        **{key: getattr(arm, key) for key in ("name", "kind", "family", "source", "pool")},
        macro_f1=_over(judged, jobs, diagonal, "macro_f1").measured("fraction", **_RANGE),
        auc=_over(judged, jobs, diagonal, "auc").measured("area", **_RANGE),
        **_moved(judged, jobs),
        difference=_measured_gap(judged, name, "macro_f1"),
        auc_difference=_measured_gap(judged, name, "auc"),
        verdict=verdict,
        n_cells=len(chances),
        n_above=chances.count("above chance"),
        n_at=chances.count("at chance") + chances.count("unknown"),
        n_below=chances.count("below chance"),
        sentence="",
    )
    is_baseline = name == judged.baseline
    sentence = arm_sentence(found, judged.plan.across, judged.metric, is_baseline=is_baseline)
    return replace(found, sentence=sentence)


def _moved(judged: Judged, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the means over the cells off the diagonal; None of one value."""
    if len(jobs) == 1:
        return dict.fromkeys(("transferred", "transferred_auc", "drop"))
    others = _other_cells(len(jobs))
    drops = [judged.score(jobs[j], j)["macro_f1"].minus(judged.score(jobs[i], j)["macro_f1"]) for i, j in others]
    return {
        "transferred": _over(judged, jobs, others, "macro_f1").measured("fraction", **_RANGE),
        "transferred_auc": _over(judged, jobs, others, "auc").measured("area", **_RANGE),
        "drop": mean_estimate(drops).measured("fraction", least=-1.0, most=1.0),
    }


def _over(judged: Judged, jobs: Sequence[Job], pairs: Pairs, metric: str) -> Estimate:
    return mean_estimate([judged.score(jobs[i], j)[metric] for i, j in pairs])


def _gap(judged: Judged, name: str, pairs: Pairs, metric: str) -> Estimate:
    """Minus the best dense arm, over the same cells."""
    assert judged.baseline is not None
    mine = _over(judged, judged.of_arm(name), pairs, metric)
    base = mine if name == judged.baseline else _over(judged, judged.of_arm(judged.baseline), pairs, metric)
    return mine.minus(base)


def _measured_gap(judged: Judged, name: str, metric: str) -> Measured:
    if judged.baseline is None:
        return NO_DENSE
    gap = _gap(judged, name, _other_cells(len(judged.plan.values)), metric)
    return gap.measured(_UNITS[metric], least=-1.0, most=1.0)
