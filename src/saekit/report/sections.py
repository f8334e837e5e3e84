"""One renderer per kind of result: JSON in, sections out. A new kind is one function and one row of the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..measure.metrics import METRICS
from . import charts
from .actions import actions
from .classification import classification, classification_summary
from .comparison import comparison, orphans
from .parts import Cell, Figure, Section, Table, facts, measured_cell, number
from .transfer import transfer

_HEADINGS = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_fraction": "dead",
    "dense_fraction": "dense",
    "ce_clean": "CE clean",
    "ce_sae": "CE with SAE",
    "ce_zero": "CE zeroed",
    "ce_mean": "CE mean",
    "ce_recovered_zero": "recovered (zero)",
    "ce_recovered_mean": "recovered (mean)",
    "kl": "KL",
}
_MAIN = ("fvu", "l0", "dead_fraction", "cosine", "ce_sae", "ce_recovered_zero", "ce_recovered_mean", "kl")


def evaluation(result: Mapping[str, Any]) -> list[Section]:
    """Fidelity beside controls, what it costs the language model, densities, every number, settings."""
    entries = result["entries"]
    found = {name for entry in entries for name in entry["metrics"]}
    intervals = result["settings"].get("intervals") or {}
    level = f"{intervals['level']:.0%}" if "level" in intervals else "95%"
    main = Section(
        "Fidelity, beside its controls",
        f"{number(result['n_rows'])} rows. Small numbers are {level} intervals from resampled documents. Grey rows are "
        "controls: what an SAE must beat to be worth its training.",
        [_metrics_table(entries, [name for name in _MAIN if name in found])],
        [
            Figure(
                charts.intervals(_points(entries, name), x=f"{_HEADINGS[name]} ({METRICS[name].unit})"),
                f"{METRICS[name].formula}. Better is {METRICS[name].better}. Controls are grey.",
            )
            for name in ("fvu", "ce_sae")
            if name in found
        ],
    )
    return [main, _differences(entries), _density(entries), _everything(entries, found), _settings(result)]


def _metrics_table(entries: Sequence[Mapping[str, Any]], names: Sequence[str], *, controls: bool = True) -> Table:
    rows, muted = [], set()
    for entry in entries:
        rows.append(_row(entry["name"], entry["metrics"], names))
        if controls:
            for label, control in entry["controls"].items():
                muted.add(len(rows))
                rows.append(_row(f"↳ {label}", control["metrics"], names))
    columns = ["", *(_HEADINGS.get(name, name.replace("_", " ")) for name in names)]
    caption = "Units: " + ", ".join(f"{_HEADINGS.get(n, n)} in {METRICS[n].unit}" for n in names if n in METRICS) + "."
    return Table(columns, rows, caption, frozenset(muted))


def _row(name: str, metrics: Mapping[str, Any], names: Sequence[str]) -> list[Cell]:
    return [Cell(name), *(measured_cell(metrics.get(each), where=f"{name}.{each}") for each in names)]


def _points(entries: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, Mapping[str, Any], bool]]:
    points = []
    for entry in entries:
        if name in entry["metrics"]:
            points.append((entry["name"], entry["metrics"][name], False))
        points += [
            (f"{entry['name']}: {label}", control["metrics"][name], True)
            for label, control in entry["controls"].items()
            if name in control["metrics"]
        ]
    return points


def _differences(entries: Sequence[Mapping[str, Any]]) -> Section:
    names = [name for name in _MAIN if any(name in c["differences"] for e in entries for c in e["controls"].values())]
    rows = [
        _row(f"{entry['name']} − {label}", control["differences"], names)
        for entry in entries
        for label, control in entry["controls"].items()
    ]
    columns = ["SAE − control", *(_HEADINGS.get(name, name) for name in names)]
    return Section(
        "Differences from the controls",
        "The SAE's value minus the control's over the same resampled documents. An interval that holds 0 means: not "
        "told apart.",
        [Table(columns, rows)] if rows else [],
    )


def _density(entries: Sequence[Mapping[str, Any]]) -> Section:
    series: dict[str, charts.Series] = {}
    rows = []
    for entry in entries:
        density = entry["density"]
        edges, counts = density["log10_edges"], density["counts"]
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        series[entry["name"]] = (middles, counts[: len(middles)])
        rows.append([Cell(entry["name"]), _count(density["dead"]), _count(sum(counts)), _count(density["n_rows"])])
    return Section(
        "How often latents fire",
        "Latents by the share of rows on which they fire. Far right are those that are nearly always on; the dead are "
        "in no bin.",
        [Table(("", "dead latents", "alive latents", "rows seen"), rows)],
        [Figure(charts.lines(series, x="log10 of the share of rows", y="latents", steps=True), "Latents per bin.")],
    )


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", value, is_number=True)


def _everything(entries: Sequence[Mapping[str, Any]], found: set[str]) -> Section:
    names = [name for name in METRICS if name in found] + sorted(found - set(METRICS))
    labels = [entry["name"] for entry in entries]
    rows = [
        [Cell(name), *(measured_cell(entry["metrics"].get(name), where=name) for entry in entries), *_meaning(name)]
        for name in names
    ]
    return Section("Every metric", "", [Table(["", *labels, "unit", "better", "formula"], rows)], is_folded=True)


def _meaning(name: str) -> list[Cell]:
    metric = METRICS.get(name)
    return [Cell(text) for text in ((metric.unit, metric.better, metric.formula) if metric else ("", "", ""))]


def _settings(result: Mapping[str, Any]) -> Section:
    tables = [facts({"saekit": result["saekit"], **result["settings"]}, caption="Settings of the evaluation.")]
    tables.append(facts(result["rows"], caption="The rows."))
    if result["language_model"]:
        tables.append(facts(result["language_model"], caption="The language model."))
    tables.append(facts(result["versions"], caption="Versions."))
    tables += [facts(entry["sae"], caption=f"The SAE {entry['name']}.") for entry in result["entries"]]
    return Section("Settings and provenance", "", tables, is_folded=True)


def training(result: Mapping[str, Any]) -> list[Section]:
    """Curves over the rows seen, and what was asked for."""
    learners = result["learners"]
    figures = []
    for name, title in (
        ("fvu", "FVU on the training batch"),
        ("l0", "latents per row"),
        ("dead_fraction", "dead fraction"),
    ):
        series = {label: (log["rows"], log[name]) for label, log in learners.items() if log.get(name)}
        if series:
            figures.append(Figure(charts.lines(series, x="rows seen", y=title, log_y=name == "fvu"), f"{title}."))
    columns = ("", "rows seen", "FVU", "L0", "dead")
    rows = [
        [Cell(label), *(_last(log, name) for name in ("rows", "fvu", "l0", "dead_fraction"))]
        for label, log in learners.items()
    ]
    sections = [Section("Training", "", [Table(columns, rows, "Last logged values, on training batches.")], figures)]
    if result.get("run"):
        sections.append(Section("Training run", "", [facts(result["run"])], is_folded=True))
    return sections


def _last(log: Mapping[str, Any], name: str) -> Cell:
    value = log[name][-1] if log.get(name) else None
    return Cell(number(value), value, is_number=True)


def size_curve(result: Mapping[str, Any]) -> list[Section]:
    """What each size of an SAE is worth."""
    points = result["points"]
    along = (*_MAIN, "rsa", "cka", "cka_codes", *_LATENTS)
    names = [name for name in along if any(name in p["metrics"] for p in points)]
    rows = [_row(f"{point['size']:,} latents", point["metrics"], names) for point in points]
    columns = ["", *(_HEADINGS.get(name, name) for name in names)]
    figures = []
    for name in ("fvu", "ce_sae", "rsa", "detection", "description_length"):
        drawn = [(p["size"], p["metrics"][name]) for p in points if name in p["metrics"]]
        figures += _along_sizes({result["sae"]["name"]: drawn}, name)
    intro = (
        f"{result['sae']['name']}, latents in order of {result['sae']['order']}: {result['settings']['each_size']} per "
        f"row of the table, measured on {number(result['n_rows'])} rows."
    )
    tables = [facts({"saekit": result["saekit"], **result["settings"]}, caption="Settings."), facts(result["rows"])]
    main = Section("What each size is worth", intro, [Table(columns, rows)], figures)
    return [main, Section("Settings of the sizes", "", tables, is_folded=True)]


def progressive(result: Mapping[str, Any]) -> list[Section]:
    """Every way of getting a small SAE: curves, differences, power laws."""
    curves = result["curves"]
    names = list(dict.fromkeys(point["name"] for point in curves))
    measured = {
        name for point in curves for name, each in point.items() if isinstance(each, dict) and each["value"] is not None
    }
    shown = [name for name in (*_MAIN, "rsa", "cka", *_LATENTS) if name in measured]
    figures = []
    for metric in ("fvu", "ce_sae", "rsa", "detection", "shared"):
        drawn = {name: [(p["size"], p[metric]) for p in curves if p["name"] == name and metric in p] for name in names}
        figures += _along_sizes(drawn, metric)
    figures += _trade_off(curves, names) if {"fvu", "detection"} <= measured else []
    rows = [_row(f"{point['name']}, {point['size']:,}", point, shown) for point in curves]
    columns = ["", *(_HEADINGS.get(name, name) for name in shown)]
    intro = f"Measured on {number(result['n_rows'])} rows; intervals over seeds where there are several."
    return [
        Section("Small SAEs from large ones", intro, [Table(columns, rows)], figures),
        _paired(result["differences"]),
        _power_laws(result["rankings"], result["spectra"]),
        Section("Settings of the comparison", "", [facts(result["settings"]), facts(result["rows"])], is_folded=True),
    ]


def _along_sizes(series: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]], name: str) -> list[Figure]:
    """One metric over the latents kept, with intervals; nothing where it has no value."""
    drawn = {way: points for way, points in series.items() if any(each["value"] is not None for _, each in points)}
    if not drawn:
        return []
    title = f"{_HEADINGS.get(name, name)} ({METRICS[name].unit})"
    chart = charts.curves(drawn, x="latents kept", y=title, from_zero=False)
    caption = f"{METRICS[name].formula}. Better is {METRICS[name].better}. Bars are the intervals."
    return [Figure(chart.svg(), caption)]


_LATENTS = (
    "description_length", "purity", "purity_chance", "detection", "ring_purity", "ring_detection", "parent_cosine",
    "coactivation", "handed_over", "shared",
)  # fmt: skip


def _trade_off(curves: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Figure]:
    """Fidelity against interpretability: a line per way, from its smallest size (right) to its largest."""
    series = {}
    for name in names:
        mine = [p for p in curves if p["name"] == name and {"fvu", "detection"} <= p.keys()]
        drawn = [(p["fvu"]["value"], p["detection"]["value"]) for p in mine if p["detection"]["value"] is not None]
        if drawn:
            series[name] = ([fvu for fvu, _ in drawn], [value for _, value in drawn])
    caption = (
        "Fidelity against interpretability: each line goes from the smallest size (right) to the largest. Up and to "
        f"the left is better. Detection: {METRICS['detection'].formula}."
    )
    return [Figure(charts.lines(series, x="FVU", y="detection (AUC)"), caption)] if series else []


def _paired(differences: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        [
            Cell(f"{each['name']} − {each['minus']}"),
            Cell(each["metric"]),
            _count(each["size"]),
            measured_cell(each["difference"], where=f"{each['name']} − {each['minus']}"),
            Cell(each["verdict"]),
        ]
        for each in differences
    ]
    columns = ("difference", "metric", "latents", "value", "better")
    return Section("Differences, paired by seed", "", [Table(columns, rows)] if rows else [])


def _power_laws(rankings: Sequence[Mapping[str, Any]], spectra: Sequence[Mapping[str, Any]]) -> Section:
    fitted = [each for each in (*rankings, *spectra) if each["fit"] is not None]
    rows = [
        [
            Cell(f"{each['name']}: {each['by']}"),
            measured_cell(each["fit"]["alpha"], where="alpha"),
            Cell(number(each["fit"]["r2"]), each["fit"]["r2"], is_number=True),
            measured_cell(each["fit"]["alpha_likelihood"], where="alpha_likelihood"),
            *(Cell(f"{rival['verdict']} (p {rival['p']:.2g})") for rival in each["fit"]["rivals"]),
        ]
        for each in fitted
    ]
    columns = ("", "exponent (line)", "R²", "exponent (likelihood)", "against log-normal", "against exponential")
    figures = []
    for group, title in ((rankings, "score of the latent"), (spectra, "eigenvalue")):
        series = {}
        for each in group:
            drawn = [(rank, value) for rank, value in zip(each["ranks"], each["scores"]) if value > 0]
            xs, ys = [math.log10(rank) for rank, _ in drawn], [math.log10(value) for _, value in drawn]
            series[f"{each['name']}: {each['by']}"] = (xs, ys)
            if each["fit"] is not None and each["name"] == group[0]["name"]:
                ends = [math.log10(rank) for rank in each["fit"]["ranks"]]
                line = [each["fit"]["log10_c"] - each["fit"]["alpha"]["value"] * end for end in ends]
                series[f"{each['by']}: rank^-{each['fit']['alpha']['value']:.2f}"] = (ends, line)
        if series:
            chart = charts.lines(series, x="log10 of the rank", y=f"log10 of the {title}")
            caption = "A power law is a straight line. The fitted lines are those of the first SAE; the table has all."
            figures.append(Figure(chart, caption))
    return Section("Does importance fall as a power law?", "", [Table(columns, rows)] if rows else [], figures)


RENDERERS: dict[str, Callable[[Mapping[str, Any]], list[Section]]] = {
    "evaluation": evaluation,
    "progressive": progressive,
    "size_curve": size_curve,
    "training": training,
    "comparison": comparison,
    "orphans": orphans,
    "actions": actions,
    "transfer": transfer,
    "classification": classification,
    "classification_summary": classification_summary,
}
"""Kind of result -> the function that shows it."""
