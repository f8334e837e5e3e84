"""Sections and figures of a classification: the arms, the price of sparsity, and what pooling and binarizing do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts
from .parts import Cell, Figure, Section, Table, count_cell, facts, measured_cell, number, text_cell

Result = Mapping[str, Any]
Arm = Mapping[str, Any]

_COLUMNS = (
    "", "macro-F1", "AUC", "balanced accuracy", "Brier", "− best dense", "verdict", "− best control", "verdict",
    "shuffled AUC",
)  # fmt: skip
_CURVES = {"sparse": "", "matched": "density-matched", "pca": "PCA", "random": "random", "untrained": "untrained"}
_BEST = ("best_dense", "best_sae", "best_control")


def classification(result: Result) -> list[Section]:
    """Show the arms compared with the best dense one, figures, low-data curves, classes, settings."""
    data, settings = result["data"], result["settings"]
    decides = "AUC" if settings.get("metric") == "auc" else "macro-F1"
    intervals, floor = settings["intervals"], result["floor"]["value"]
    best = {result[name] for name in _BEST}
    arms = result["arms"]
    resolves = "" if floor is None else f" It cannot resolve differences of macro-F1 below {number(floor)}."
    main = Section(
        f"Classification: {result['name']}",
        f"{data['n_train']:,} training and {data['n_test']:,} test rows, {len(result['classes'])} classes; "
        f"{intervals['level']:.0%} intervals from {intervals['draws']:,} resamples of test {intervals['unit']}, paired "
        f"between arms; differences below {settings['margin']:g} {decides} count as none.{resolves} Settings, "
        "selections and thresholds were chosen within the training rows; bold arms are the best of their family there. "
        "Grey arms are baselines and controls.",
        [Table(_COLUMNS, [_row(arm, best) for arm in arms], "", frozenset(_muted(arms)))],
        [Figure(chart, caption) for chart, caption in figures(result).values()],
    )
    return [main, *_low_data(result), _latents(result), _classes(result), _settings(result)]


def _row(arm: Arm, best: set[str | None]) -> list[Cell]:
    name = f"▸ {arm['name']}" if arm["name"] in best else arm["name"]
    metrics = ("macro_f1", "auc", "balanced_accuracy", "brier", "difference")
    return [
        Cell(name, note="; ".join(arm["notes"])),
        *(measured_cell(arm[metric], where=f"{arm['name']}.{metric}") for metric in metrics),
        Cell(arm["verdict"] or "–"),
        measured_cell(arm["control_difference"], where=f"{arm['name']}.control_difference"),
        Cell(arm["control_verdict"] or "–"),
        measured_cell(arm["shuffled_auc"], where=f"{arm['name']}.shuffled_auc"),
    ]


def _muted(arms: Sequence[Arm]) -> list[int]:
    return [place for place, arm in enumerate(arms) if arm["family"] in ("floor", "control")]


# ---------------------------------------------------------------------------------------------------------- figures


def figures(result: Result) -> dict[str, tuple[charts.Chart, str]]:
    """Return the charts that the arms of a classification allow, with their captions, by name."""
    arms = result["arms"]
    drawn: dict[str, tuple[charts.Chart, str]] = {}
    leaders = _leaders(result)
    if len(leaders) > 1:
        drawn["best"] = (
            charts.intervals(leaders, x="macro-F1", from_zero=False),
            "The best arm of each kind, chosen by inner cross-validation; baselines and controls are grey.",
        )
    curves = _sparsity(arms)
    if any(len(points) > 1 for points in curves.values()):
        dense = next((arm for arm in arms if arm["name"] == result["best_dense"]), None)
        drawn["price"] = (
            charts.curves(curves, x="latents or components kept (k)", y="macro-F1", from_zero=False,
                          level=None if dense is None else (f"best dense: {dense['name']}", dense["macro_f1"])),
            "The price of sparsity: macro-F1 of the k latents that tell the classes apart best, compared with as many "
            "principal components and controls, and the best dense arm.",
        )  # fmt: skip
    for kind, title in (("pooling", "How tokens are pooled."), ("binarized", "What binarizing does.")):
        groups = _pooling(arms) if kind == "pooling" else _binarized(arms)
        if len(groups) > 1:
            drawn[kind] = (charts.bars(groups, y="macro-F1"), f"{title} All latents, linear probe.")
    grid = _grid(arms)
    if grid is not None:
        rows, columns, values = grid
        drawn["layers"] = (
            charts.heat_map(values, rows, columns, y="layer", x="SAE"),
            "Best macro-F1 of the linear probes of all latents, by layer and SAE.",
        )
    curves = low_data_curves(result)
    if curves:
        drawn["low-data"] = (
            charts.curves(curves, x="training rows", y="macro-F1", from_zero=False),
            "Fewer training rows: the same test rows, the same budget.",
        )
    return drawn


def _leaders(result: Result) -> list[tuple[str, Mapping[str, Any], bool]]:
    """Return the best arm of each kind by inner score."""
    found: dict[str, Arm] = {}
    for arm in result["arms"]:
        kind = arm["kind"]
        if kind not in found or (arm["inner"] or 0) > (found[kind]["inner"] or 0):
            found[kind] = arm
    return [(arm["name"], arm["macro_f1"], arm["family"] in ("floor", "control")) for arm in found.values()]


def _sparsity(arms: Sequence[Arm]) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    curves: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for arm in arms:
        if arm["k"] is None or arm["kind"] not in _CURVES:
            continue
        source = "" if arm["kind"] in ("random", "untrained") else arm["source"]
        name = " ".join(part for part in (_CURVES[arm["kind"]], source, arm["pool"]) if part)
        curves.setdefault(name, []).append((arm["k"], arm["macro_f1"]))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def _pooling(arms: Sequence[Arm]) -> dict[str, dict[str, Mapping[str, Any]]]:
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for arm in arms:
        if arm["kind"] in ("full", "dense", "last", "random", "untrained") and arm["k"] is None:
            groups.setdefault(arm["pool"], {})[arm["source"]] = arm["macro_f1"]
    return groups


def _binarized(arms: Sequence[Arm]) -> dict[str, dict[str, Mapping[str, Any]]]:
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for arm in arms:
        if arm["kind"] in ("full", "binarized"):
            groups.setdefault(f"{arm['source']} {arm['pool']}", {})[
                "as it is" if arm["kind"] == "full" else "binarized"
            ] = arm["macro_f1"]
    return {name: each for name, each in groups.items() if len(each) > 1}


def _grid(arms: Sequence[Arm]) -> tuple[list[str], list[str], list[list[float | None]]] | None:
    """Return the best macro-F1 of all latents by layer and width; None unless there are several of either."""
    best: dict[tuple[str, str], float] = {}
    for arm in arms:
        if arm["kind"] in ("full", "binarized") and arm["macro_f1"]["value"] is not None:
            place = (str(arm["about"].get("hook")), f"{arm['about'].get('n_latents', 0):,} latents")
            best[place] = max(best.get(place, 0.0), arm["macro_f1"]["value"])
    rows = list(dict.fromkeys(row for row, _ in best))
    columns = list(dict.fromkeys(column for _, column in best))
    if len(best) < 2:
        return None
    return rows, columns, [[best.get((row, column)) for column in columns] for row in rows]


def low_data_curves(result: Result) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Return the macro-F1 at every number of training rows, all of them last, for the best arm of each kind."""
    points = result["low_data"]
    wanted: dict[str, str] = {}
    inner = {arm["name"]: arm["inner"] or 0 for arm in result["arms"]}
    for point in points:
        kind = point["kind"]
        if kind not in wanted or inner.get(point["name"], 0) > inner.get(wanted[kind], 0):
            wanted[kind] = point["name"]
    curves: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for point in points:
        if point["name"] in wanted.values():
            curves.setdefault(point["name"], []).append((point["n_train"], point["macro_f1"]))
    for arm in result["arms"]:
        if arm["name"] in curves:
            curves[arm["name"]].append((result["data"]["n_train"], arm["macro_f1"]))
    return {name: sorted(each, key=lambda point: point[0]) for name, each in curves.items()}


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
    points = result["low_data"]
    if not points:
        return []
    rows = [
        [
            Cell(point["name"]),
            count_cell(point["n_train"]),
            measured_cell(point["macro_f1"]),
            measured_cell(point["auc"]),
            measured_cell(point["difference"]),
        ]
        for point in points
    ]
    columns = ("", "training rows", "macro-F1", "AUC", "− best dense")
    return [Section("With fewer training rows", "", [Table(columns, rows)], is_folded=True)]


def _latents(result: Result) -> Section:
    """Show what the k-sparse arms selected, and how stable that is."""
    rows = [
        [
            Cell(arm["name"]),
            text_cell(arm["selected"][:16]),
            *(
                Cell("–") if arm["stability"] is None else Cell(f"{arm['stability'][name]:.2f}", is_number=True)
                for name in ("jaccard", "kuncheva")
            ),
        ]
        for arm in result["arms"]
        if arm["selected"]
    ]
    intro = (
        "The latents that reach the classifier, best first (at most 16 shown), and how far the choices of the inner "
        "folds agree: intersection over union (Jaccard), and corrected for chance (Kuncheva; 1 the same, 0 chance)."
    )
    tables = [Table(("", "latents", "Jaccard", "Kuncheva"), rows)] if rows else []
    return Section("Which latents are selected", intro, tables, is_folded=True)


def _classes(result: Result) -> Section:
    rows = [[Cell(name), *map(count_cell, counts)] for name, counts in result["classes"].items()]
    return Section("Rows by class", "", [Table(("class", "train", "test"), rows)], is_folded=True)


def _settings(result: Result) -> Section:
    tables = [facts(result["settings"]), facts(result["data"]), facts(result["model"]), facts(result["versions"])]
    return Section("Settings of the classification", "", tables, is_folded=True)


def classification_summary(result: Result) -> list[Section]:
    """Show each kind of arm over data sets."""
    rows = [
        [
            Cell(arm["name"]),
            Cell(str(arm["n_sets"]), arm["n_sets"], is_number=True),
            measured_cell(arm["difference"]),
            *(
                Cell(str(arm[name]), arm[name], is_number=True)
                for name in ("better", "equivalent", "worse", "undecided")
            ),
            Cell(number(arm["p"]), arm["p"], is_number=True),
            Cell(number(arm["p_holm"]), arm["p_holm"], is_number=True),
        ]
        for arm in result["arms"]
    ]
    columns = ("", "data sets", "− best dense", "better", "equivalent", "worse", "undecided", "p", "p (Holm)")
    points = [
        (arm["name"], arm["difference"], arm["name"].startswith(("random", "untrained"))) for arm in result["arms"]
    ]
    intro = (
        f"Macro-F1 minus that of the best dense arm, over {len(result['sets'])} results: {', '.join(result['sets'])}. "
        f"Intervals from resampled data sets, Wilcoxon's signed-rank test, Holm's correction; "
        f"margin {result['margin']:g}."
    )
    chart = charts.intervals(points, x="macro-F1 minus best dense arm", from_zero=False)
    return [Section("Over data sets", intro, [Table(columns, rows)], [Figure(chart, "Mean over data sets.")])]
