"""Sections and figures of a classification: the arms, the price of sparsity, and what pooling and binarizing do."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..classification.result import describe_intervals, describe_resolution
from ..measure.intervals import no_intervals
from . import charts
from .parts import (
    Cell,
    Figure,
    Section,
    count_cell,
    measured_as,
    number_cell,
    settings_section,
    table_of,
    tables_of,
    text_cell,
)

Result = Mapping[str, Any]
Arm = Mapping[str, Any]
Quantity = Mapping[str, Any]
Curves = dict[str, list[tuple[float, Quantity]]]

_CURVES = {"sparse": "", "matched": "density-matched", "pca": "PCA", "random": "random", "untrained": "untrained"}
_SCORES = (("macro-F1", measured_as("macro_f1", ".3f")), ("AUC", measured_as("auc", ".3f")))
_BEST = ("best_dense", "best_sae", "best_control")
_VERDICTS = ("better", "equivalent", "worse", "undecided")


def classification(result: Result) -> list[Section]:
    """Show the arms compared with the best dense one, figures, low-data curves, classes, settings."""
    data, settings = result["data"], result["settings"]
    decides = "AUC" if settings.get("metric") == "auc" else "macro-F1"
    best = {result[name] for name in _BEST}
    resolves = describe_resolution(result["floor"], settings)

    def name(arm: Arm) -> Cell:
        return Cell(arm["name"], note="; ".join(arm["notes"]), is_strong=arm["name"] in best)

    is_auc = decides == "AUC" and all(arm.get("control_auc_difference") for arm in result["arms"])  # not in older files
    control = ("AUC", "control_auc_difference") if is_auc else ("macro-F1", "control_difference")
    columns = (
        ("", name), *_SCORES, ("balanced accuracy", measured_as("balanced_accuracy", ".3f")),
        ("Brier", measured_as("brier", ".3f")),
        (f"{decides} − best dense", measured_as("auc_difference" if decides == "AUC" else "difference", "+.3f")),
        ("verdict", "verdict"), (f"{control[0]} − best control", measured_as(control[1], "+.3f")),
        ("verdict", "control_verdict"), ("shuffled AUC", measured_as("shuffled_auc", ".2f")),
    )  # fmt: skip
    about = no_intervals(arm["macro_f1"] for arm in result["arms"])
    about = about or f"{describe_intervals(settings['intervals'])}, paired between arms"
    main = Section(
        f"Classification: {result['name']}",
        f"{data['n_train']:,} training and {data['n_test']:,} test rows, {len(result['classes'])} classes; "
        f"{about}; differences below {settings['margin']:g} "
        f"{decides} count as none; verdicts are corrected for the number of arms (Holm). {resolves} Settings, "
        "selections and thresholds were chosen within the training rows; bold arms are the best of their family there. "
        "Grey arms are baselines and controls.",
        [table_of(result["arms"], columns, is_muted=is_baseline)],
        [Figure(chart, caption) for chart, caption in figures(result).values()],
    )
    return [*_families(result), main, *_low_data(result), _latents(result), _classes(result), _settings(result)]


def _families(result: Result) -> list[Section]:
    """Show every family with its strongest arm, and what a reader may conclude."""
    if not result["families"]:
        return []
    gap = "auc_difference" if result["settings"].get("metric") == "auc" else "difference"

    def chosen(family: Arm) -> Cell:
        return Cell(f"{family['again'].get(family['strongest'], 0.0):.0%}", note=text_cell(list(family["again"])).text)

    columns = (
        ("", "name"), ("strongest arm", "strongest"), ("chosen on resamples", chosen), *_SCORES,
        ("− best non-SAE", measured_as(gap, "+.3f")), ("verdict", "verdict"),
    )  # fmt: skip
    from ..classification.result import Classification

    intro = (
        f"{Classification.from_json(dict(result)).conclusion()} Every family is its strongest arm: representation, "
        "probe and penalty, or a vote of several, are chosen within the training rows, for baselines, controls and "
        "SAEs alike. The intervals hold the uncertainty of these choices, which are made again on resampled training "
        "rows; who votes with whom is not, so that intervals of votes (a & b) are somewhat too narrow."
    )
    muted = {"baseline": False, "sae": False, "control": True}
    table = table_of(result["families"], columns, is_muted=lambda family: muted[family["role"]])
    return [Section(f"Families of classifiers: {result['name']}", intro.strip(), [table])]


def is_baseline(arm: Arm) -> bool:
    """Return whether an arm is a baseline or a control, which tables show in grey."""
    return arm["family"] in ("floor", "control")


# ---------------------------------------------------------------------------------------------------------- figures


def figures(result: Result) -> dict[str, tuple[charts.Chart, str]]:
    """Return the charts that the arms of a classification allow, with their captions, by name."""
    arms = result["arms"]
    every = {
        "best": _leaders(result), "price": _price(result),
        "pooling": _bars(_pooling(arms), "How tokens are pooled."),
        "binarized": _bars(_binarized(arms), "What binarizing does."),
        "layers": _layers(arms), "low-data": _low_data_chart(result),
    }  # fmt: skip
    return {name: drawn for name, drawn in every.items() if drawn is not None}


Drawn = tuple[charts.Chart, str] | None


def _leaders(result: Result) -> Drawn:
    leaders = list(_best_of(result["arms"], lambda arm: arm["inner"] or 0).values())
    if len(leaders) < 2:
        return None
    points = [(arm["name"], arm["macro_f1"], is_baseline(arm)) for arm in leaders]
    return (
        charts.intervals(points, x="macro-F1", from_zero=False),
        "The best arm of each kind, chosen by inner cross-validation; baselines and controls are grey.",
    )


def _best_of(arms: Sequence[Arm], score: Callable[[Arm], float]) -> dict[str, Arm]:
    """Return the arm of each kind with the highest score, the first of equals."""
    found: dict[str, Arm] = {}
    for arm in arms:
        if arm["kind"] not in found or score(arm) > score(found[arm["kind"]]):
            found[arm["kind"]] = arm
    return found


def _price(result: Result) -> Drawn:
    curves: Curves = {}
    for arm in result["arms"]:
        if arm["k"] is not None and arm["kind"] in _CURVES:
            curves.setdefault(_curve_of(arm), []).append((arm["k"], arm["macro_f1"]))
    if all(len(points) < 2 for points in curves.values()):
        return None
    dense = next((arm for arm in result["arms"] if arm["name"] == result["best_dense"]), None)
    level = None if dense is None else (f"best dense: {dense['name']}", dense["macro_f1"])
    return (
        charts.curves(_rising(curves), x="latents or components kept (k)", y="macro-F1", from_zero=False, level=level),
        "The price of sparsity: macro-F1 of the k latents that tell the classes apart best, compared with as many "
        "principal components and controls, and the best dense arm.",
    )


def _curve_of(arm: Arm) -> str:
    source = "" if arm["kind"] in ("random", "untrained") else arm["source"]
    return " ".join(part for part in (_CURVES[arm["kind"]], source, arm["pool"]) if part)


def _rising(curves: Curves) -> Curves:
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def _bars(groups: Mapping[str, Mapping[str, Quantity]], title: str) -> Drawn:
    return (charts.bars(groups, y="macro-F1"), f"{title} All latents, linear probe.") if len(groups) > 1 else None


def _pooling(arms: Sequence[Arm]) -> dict[str, dict[str, Quantity]]:
    groups: dict[str, dict[str, Quantity]] = {}
    for arm in arms:
        if arm["kind"] in ("full", "dense", "last", "random", "untrained") and arm["k"] is None:
            groups.setdefault(arm["pool"], {})[arm["source"]] = arm["macro_f1"]
    return groups


def _binarized(arms: Sequence[Arm]) -> dict[str, dict[str, Quantity]]:
    groups: dict[str, dict[str, Quantity]] = {}
    for arm in arms:
        if arm["kind"] in ("full", "binarized"):
            said = "as it is" if arm["kind"] == "full" else "binarized"
            groups.setdefault(f"{arm['source']} {arm['pool']}", {})[said] = arm["macro_f1"]
    return {name: each for name, each in groups.items() if len(each) > 1}


def _layers(arms: Sequence[Arm]) -> Drawn:
    """Draw the best macro-F1 of all latents by layer and width, where there are several of either."""
    best: dict[tuple[str, str], float] = {}
    for arm in arms:
        if arm["kind"] in ("full", "binarized") and arm["macro_f1"]["value"] is not None:
            place = (str(arm["about"].get("hook")), f"{arm['about'].get('n_latents', 0):,} latents")
            best[place] = max(best.get(place, 0.0), arm["macro_f1"]["value"])
    if len(best) < 2:
        return None
    rows, columns = (list(dict.fromkeys(place[side] for place in best)) for side in (0, 1))
    numbers = [[best.get((row, column)) for column in columns] for row in rows]
    return (
        charts.heat_map(numbers, rows, columns, y="layer", x="SAE", quantity="macro-F1"),
        "Best macro-F1 of the linear probes of all latents, by layer and SAE.",
    )


def _low_data_chart(result: Result) -> Drawn:
    curves = low_data_curves(result)
    if not curves:
        return None
    return (
        charts.curves(curves, x="training rows", y="macro-F1", from_zero=False),
        "Fewer training rows: the same test rows, the same budget.",
    )


def low_data_curves(result: Result) -> Curves:
    """Return the macro-F1 at every number of training rows, all of them last, for the best arm of each kind."""
    inner = {arm["name"]: arm["inner"] or 0 for arm in result["arms"]}
    wanted = [point["name"] for point in _best_of(result["low_data"], lambda p: inner.get(p["name"], 0)).values()]
    whole = [{**arm, "n_train": result["data"]["n_train"]} for arm in result["arms"]]
    curves: Curves = {}
    for point in (*result["low_data"], *whole):
        if point["name"] in wanted:
            curves.setdefault(point["name"], []).append((point["n_train"], point["macro_f1"]))
    return _rising(curves)


def write_classification_figures(result: Result, folder: str | os.PathLike[str]) -> list[Path]:
    """Write every figure of a classification as SVG and PNG into `folder`.

    Returns
    -------
    list of Path
        The files.
    """
    return charts.write_charts(figures(result), folder, "classification")


# ---------------------------------------------------------------------------------------------------------- the rest


def _low_data(result: Result) -> list[Section]:
    columns = (
        ("", "name"), ("training rows", "n_train"), ("macro-F1", measured_as("macro_f1", ".3f")),
        ("AUC", measured_as("auc", ".3f")), ("− best dense", measured_as("difference", "+.3f")),
    )  # fmt: skip
    tables = tables_of(result["low_data"], columns)
    return [Section("With fewer training rows", "", tables, is_folded=True)] if tables else []


def _latents(result: Result) -> Section:
    """Show what the k-sparse arms selected, and how stable that is."""

    def agreement(name: str) -> Callable[[Arm], Cell]:
        return lambda arm: Cell("–") if arm["stability"] is None else number_cell(arm["stability"][name], ".2f")

    columns = (
        ("", "name"), ("latents", lambda arm: text_cell(arm["selected"][:16])), ("Jaccard", agreement("jaccard")),
        ("Kuncheva", agreement("kuncheva")),
    )  # fmt: skip
    intro = (
        "The latents that reach the classifier, best first (at most 16 shown), and how far the choices of the inner "
        "folds agree: intersection over union (Jaccard), and corrected for chance (Kuncheva; 1 the same, 0 chance)."
    )
    tables = tables_of([arm for arm in result["arms"] if arm["selected"]], columns)
    return Section("Which latents are selected", intro, tables, is_folded=True)


def _classes(result: Result) -> Section:
    columns: list[Any] = [("class", lambda each: Cell(each[0]))]
    columns += [("train", lambda each: count_cell(each[1][0])), ("test", lambda each: count_cell(each[1][1]))]
    return Section("Rows by class", "", [table_of(list(result["classes"].items()), columns)], is_folded=True)


def _settings(result: Result) -> Section:
    others = {"The data.": result["data"], "The model.": result["model"]}
    return settings_section("classification", result, others, {each["name"]: each for each in result["saes"]})


def classification_summary(result: Result) -> list[Section]:
    """Show each kind of arm over data sets."""
    columns: list[Any] = [("", "name"), ("data sets", "n_sets"), ("− best dense", measured_as("difference", "+.3f"))]
    columns += [(name, name) for name in _VERDICTS]
    columns += [("p", lambda arm: number_cell(arm["p"])), ("p (Holm)", lambda arm: number_cell(arm["p_holm"]))]
    arms = result["arms"]
    points = [(arm["name"], arm["difference"], arm["name"].startswith(("random", "untrained"))) for arm in arms]
    intro = (
        f"Macro-F1 minus that of the best dense arm, over {len(result['sets'])} results: {', '.join(result['sets'])}. "
        f"Intervals over data sets, Wilcoxon's signed-rank test, Holm's correction; "
        f"margin {result['margin']:g}."
    )
    chart = charts.intervals(points, x="macro-F1 minus best dense arm", from_zero=False)
    return [Section("Over data sets", intro, [table_of(arms, columns)], [Figure(chart, "Mean over data sets.")])]
