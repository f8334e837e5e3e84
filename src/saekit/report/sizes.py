"""Sections of size curves and of progressive coding: what each size is worth, differences, power laws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..measure.intervals import no_intervals
from ..measure.metrics import METRICS
from ..sizes.result import Progressive, order_in_words
from . import charts
from .metric_tables import MAIN_METRICS, heading, metric_row
from .numbers import capital, number
from .parts import Cell, Figure, Section, Table, facts, measured_cell, number_cell, tables_of

_LATENTS = (
    "description_length", "purity", "purity_chance", "detection", "ring_purity", "ring_detection", "parent_cosine",
    "coactivation", "handed_over", "shared",
)  # fmt: skip


def size_curve(result: Mapping[str, Any]) -> list[Section]:
    """Show what each size of an SAE is worth."""
    points = result["points"]
    along = (*MAIN_METRICS, "rsa", "cka", "cka_codes", *_LATENTS)
    names = [name for name in along if any(name in p["metrics"] for p in points)]
    rows = [metric_row(f"{point['size']:,} latents", point["metrics"], names) for point in points]
    columns = ["", *(heading(name) for name in names)]
    figures = []
    for name in ("fvu", "ce_sae", "rsa", "detection", "description_length"):
        drawn = [(p["size"], p["metrics"][name]) for p in points if name in p["metrics"]]
        figures += _along_sizes({result["sae"]["name"]: drawn}, name)
    order = order_in_words(result["sae"]["order"])
    each = result["settings"]["each_size"]
    intro = (
        f"{_named(result['sae'])}, latents in {order}: {each} per row of the table, measured on "
        f"{number(result['n_rows'])} rows."
    )
    why = no_intervals(p["metrics"].get(name) for p in points for name in names)
    intro += f" {capital(why)}." if why else ""
    tables = [facts({"saekit": result["saekit"], **result["settings"]}, caption="Settings."), facts(result["rows"])]
    main = Section("What each size is worth", intro, [Table(columns, rows), *_from_largest(points)], figures)
    return [main, Section("Settings of the sizes", "", tables, is_folded=True, kind="provenance")]


def k_choice(result: Mapping[str, Any]) -> list[Section]:
    """Show the curve from which a number of latents per row was chosen."""
    points = result["points"]
    rows = [
        [
            Cell(f"k = {point['k']}", is_strong=point["k"] == result["k"]),
            measured_cell(point["projection"]),
            number_cell(_mean(point["fvu"])),
        ]
        for point in points
    ]
    series = {
        f"seed {seed}": ([point["k"] for point in points], [point["projections"][seed] for point in points])
        for seed in range(len(points[0]["projections"]))
    }
    count = sum(len(point["projections"]) for point in points)
    intro = (
        f"{capital(result['why'])}. For this the choice read "
        f"{number(result['rows_used'])} rows on top of the run, {count} SAEs each, "
        "in one pass; the run itself trains on all of its rows."
    )
    figure = Figure(charts.lines(series, x="k", y="decoder projection"), METRICS["decoder_projection"].formula)
    columns = ("", "decoder projection", "FVU (training)")
    about = {"saekit": result["saekit"], **result["settings"], **result["config"]}
    return [
        Section("How many latents per row?", intro, [Table(columns, rows)], [figure]),
        Section("Settings of the choice of k", "", [facts(about)], is_folded=True, kind="provenance"),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _from_largest(points: Sequence[Mapping[str, Any]], name: str = "") -> list[Table]:
    """Show how much worse each size is than the largest, by the paired difference; nothing where it was not kept."""
    known = [point for point in points if (point.get("from_largest") or {}).get("differences")]
    metrics = list(dict.fromkeys(metric for point in known for metric in point["from_largest"]["differences"]))
    rows = [
        [
            Cell(f"{name}{point['size']:,} latents"),
            *(
                cell
                for metric in metrics
                for cell in (
                    measured_cell(point["from_largest"]["differences"].get(metric)),
                    Cell(point["from_largest"]["verdicts"].get(metric, "–")),
                )
            ),
        ]
        for point in known
    ]
    columns = [each for metric in metrics for each in (f"{heading(metric)}, more than with all", "verdict")]
    caption = (
        "Each size minus the largest, paired; verdicts for the margin of the metric (0.01), corrected for the number "
        "of sizes (Holm). Equivalent: it keeps what the largest gives."
    )
    return [Table(("", *columns), rows, caption)] if rows else []


def _named(sae: Mapping[str, Any]) -> str:
    """Return the name of an SAE with what it was trained as, where its name says another rule."""
    arch = ((sae.get("provenance") or {}).get("config") or {}).get("arch")
    return f"{sae['name']} ({arch})" if arch and arch not in sae["name"] else str(sae["name"])


def progressive(result: Mapping[str, object]) -> list[Section]:
    """Show every way of getting a small SAE: curves, differences, power laws."""
    result = Progressive.migrate(dict(result))
    curves = result["curves"]
    names = list(dict.fromkeys(point["name"] for point in curves))
    shown = _with_values(curves, (*MAIN_METRICS, "rsa", "cka", *_LATENTS))
    figures = []
    for metric in ("fvu", "ce_sae", "rsa", "detection", "shared"):
        figures += _along_sizes({name: _points(curves, name, metric) for name in names}, metric)
    figures += _trade_off(curves, names)
    rows = [metric_row(f"{point['name']}, {point['size']:,}", point, shown) for point in curves]
    columns = ["", *(heading(name) for name in shown)]
    intro = f"Measured on {number(result['n_rows'])} rows; intervals over seeds where there are several."
    return [
        Section("Small SAEs from large ones", intro, [Table(columns, rows)], figures),
        _paired(result["differences"]),
        _power_laws(result["rankings"], result["spectra"]),
        Section("Settings of the ways", "", [facts(result["settings"]), facts(result["rows"])], [], True, "provenance"),
    ]


def _along_sizes(series: Mapping[str, Sequence[tuple[int, Mapping[str, object]]]], name: str) -> list[Figure]:
    """Draw one metric over the latents kept, with intervals; nothing where it has no value."""
    drawn = {way: points for way, points in series.items() if any(_has_value(each) for _, each in points)}
    if not drawn:
        return []
    title = f"{heading(name)} ({METRICS[name].unit})"
    chart = charts.curves(drawn, x="latents kept", y=title, from_zero=False)
    has_bars = not no_intervals(each for points in drawn.values() for _, each in points)
    bars = " Bars are the intervals." if has_bars else ""
    caption = f"{METRICS[name].formula}. Better is {METRICS[name].better}.{bars}"
    return [Figure(chart, caption)]


def _trade_off(curves: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Figure]:
    """Draw fidelity against interpretability: a line per way, from its smallest size (right) to its largest."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for name in names:
        mine = [
            p for p in curves if p["name"] == name and all(_has_value(p.get(each)) for each in ("fvu", "detection"))
        ]
        if mine:
            series[name] = ([p["fvu"]["value"] for p in mine], [p["detection"]["value"] for p in mine])
    caption = (
        "Fidelity against interpretability: each line goes from the smallest size (right) to the largest. Up and to "
        f"the left is better. Detection: {METRICS['detection'].formula}."
    )
    return [Figure(charts.lines(series, x="FVU", y="detection (AUC)"), caption)] if series else []


def _points(curves: Sequence[Mapping[str, Any]], name: str, metric: str) -> list[tuple[int, Mapping[str, Any]]]:
    return [(each["size"], each[metric]) for each in curves if each["name"] == name and metric in each]


def _with_values(curves: Sequence[Mapping[str, object]], names: Sequence[str]) -> list[str]:
    return [name for name in names if any(_has_value(point.get(name)) for point in curves)]


def _has_value(measured: object) -> bool:
    return isinstance(measured, Mapping) and measured["value"] is not None


def _paired(differences: Sequence[Mapping[str, object]]) -> Section:
    columns = (
        ("difference", lambda each: Cell(f"{each['name']} − {each['minus']}")), ("metric", "metric"),
        ("latents", "size"), ("value", "difference"), ("verdict", "verdict"),
        ("detects", lambda each: number_cell(each.get("detects"))),
    )  # fmt: skip
    about = (
        "The first way compared with the second, for the margin of the metric (0.01; 1 bit), corrected for the number "
        "of sizes (Holm). Detects: a true difference that would be found 4 times in 5, uncorrected."
    )
    return Section("Differences, paired by seed", about, tables_of(differences, columns))


def _power_laws(rankings: Sequence[Mapping[str, object]], spectra: Sequence[Mapping[str, object]]) -> Section:
    columns = (
        ("", lambda each: Cell(f"{each['name']}: {each['by']}")),
        ("exponent (line)", lambda each: measured_cell(each["fit"]["alpha"], where="alpha")),
        ("R²", lambda each: number_cell(each["fit"]["r2"])),
        ("exponent (likelihood)", lambda each: measured_cell(each["fit"]["alpha_likelihood"])),
        ("against log-normal", lambda each: _rival(each["fit"]["rivals"][0])),
        ("against exponential", lambda each: _rival(each["fit"]["rivals"][1])),
    )
    fitted = [each for each in (*rankings, *spectra) if each["fit"] is not None]
    figures = [
        Figure(
            charts.lines(_falling(group), x="log10 of the rank", y=f"log10 of the {title}"),
            "A power law is a straight line. The fitted lines are those of the first SAE; the table has all.",
        )
        for group, title in ((rankings, "score of the latent"), (spectra, "eigenvalue"))
        if group
    ]
    return Section("Does importance fall as a power law?", "", tables_of(fitted, columns), figures)


def _rival(rival: Mapping[str, object]) -> Cell:
    return Cell(f"{rival['verdict']} (p {rival['p']:.2g})")


def _falling(group: Sequence[Mapping[str, Any]]) -> dict[str, charts.Series]:
    """Return logarithms of ranks and scores of each ranking, and the fitted lines of the first SAE."""
    series: dict[str, charts.Series] = {}
    for each in group:
        drawn = [(rank, value) for rank, value in zip(each["ranks"], each["scores"]) if value > 0]
        xs, ys = [math.log10(rank) for rank, _ in drawn], [math.log10(value) for _, value in drawn]
        series[f"{each['name']}: {each['by']}"] = (xs, ys)
        fit = each["fit"]
        if fit is not None and each["name"] == group[0]["name"]:
            ends = [math.log10(rank) for rank in fit["ranks"]]
            line = [fit["log10_c"] - fit["alpha"]["value"] * end for end in ends]
            series[f"{each['by']}: rank^-{fit['alpha']['value']:.2f}"] = (ends, line)
    return series
