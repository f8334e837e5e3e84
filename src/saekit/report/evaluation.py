"""Sections of an evaluation: fidelity, baselines, densities, every metric, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ..evaluation.hedging import HEDGING
from ..evaluation.pursuit import PURSUIT
from ..evaluation.result import SOURCE_METRICS
from ..evaluation.truth import TRUTH
from ..measure.intervals import no_intervals
from ..measure.metrics import METRICS
from . import charts
from .metric_tables import MAIN_METRICS, heading, metric_row
from .numbers import capital, number
from .parts import Cell, Figure, Section, Table, measured_cell, number_cell, settings_section, table_of, tables_of


def evaluation(result: Mapping[str, Any]) -> list[Section]:
    """Show fidelity compared with baselines, the cost to the language model, densities, every metric, settings."""
    entries = result["entries"]
    found = {name for entry in entries for name in entry["metrics"]}
    intervals = result["settings"].get("intervals") or {}
    level = f"{intervals['level']:.0%}" if "level" in intervals else "95%"
    why = no_intervals(entry["metrics"].get(name) for entry in entries for name in MAIN_METRICS)
    why = why or f"Small numbers are {level} intervals over documents"
    main = Section(
        "Fidelity, compared with baselines",
        f"{number(result['n_rows'])} rows. {capital(why)}. Grey rows are "
        "baselines: an SAE must do better to be worth its training.",
        [_metrics_table(entries, [name for name in MAIN_METRICS if name in found])],
        [
            Figure(
                charts.intervals(_points(entries, name), x=f"{heading(name)} ({METRICS[name].unit})"),
                f"{METRICS[name].formula}. Better is {METRICS[name].better}. Baselines are grey.",
            )
            for name in ("fvu", "ce_sae")
            if name in found
        ],
    )
    sections = [_differences(entries), _density(entries), _everything(entries, found), _settings(result)]
    pursuit = _named(entries, "pursuit", "What matching pursuit makes of the same decoder", PURSUIT)
    return [
        main,
        *_sources(entries),
        *pursuit,
        *_named(entries, "hedging", "Hedging: trained on with new latents", HEDGING),
        *_named(entries, "truth", "Against the known dictionary", TRUTH),
        *sections,
    ]


def verification(result: Mapping[str, Any]) -> list[Section]:
    """Show what an SAE does on rows of the place that it states, compared with what its file states."""
    claimed = result["claimed"]
    rows = [
        [Cell(heading(name)), measured_cell(result[name]), number_cell(claimed.get(name))]
        for name in ("fvu", "l0", "dead_fraction")
    ]
    causes = [
        ("with this change", lambda each: Cell(each["what"])),
        ("FVU", lambda each: number_cell(each["fvu"])),
        ("L0", lambda each: number_cell(each["l0"])),
    ]
    said = "It fits" if result["fits"] else "It does not fit"
    main = Section(
        "Does it fit the place that it states?",
        f"{said} at `{result['hook']}`, on {number(result['n_rows'])} rows.",
        [Table(("", "measured", "stated"), rows), *tables_of(result["likely_causes"], causes)],
    )
    return [
        main,
        settings_section("verification", result, {"The rows.": result["rows"]}, {"that was verified": result["sae"]}),
    ]


def _named(entries: Sequence[Mapping[str, Any]], part: str, title: str, meanings: Mapping[str, str]) -> list[Section]:
    """Show a part of the entries that holds measured numbers by name; nothing where none has it."""
    known = [entry for entry in entries if entry.get(part)]
    if not known:
        return []
    names = list(known[0][part])
    rows = [[Cell(each["name"]), *(measured_cell(each[part][name]) for name in names)] for each in known]
    intro = "; ".join(f"{name}: {meanings[name]}" for name in names if name in meanings)
    return [Section(title, f"{intro}.", [Table(("", *names), rows, "")])]


def _sources(entries: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Show FVU and cosine on the columns of each source of crosscoders; nothing of other SAEs."""
    sources = list(entries[0].get("sources") or ())
    if not sources:
        return []
    rows, muted = [], set()
    for entry in entries:
        rows.append([Cell(entry["name"]), *_source_cells(entry, sources)])
        for label, control in entry["controls"].items():
            muted.add(len(rows))
            rows.append([Cell(f"↳ {label}"), *_source_cells(control, sources)])
    columns = ["", *(f"{source}: {heading(name)}" for source in sources for name in SOURCE_METRICS)]
    intro = "The columns of each source as rows of their own. In all together the source that varies most decides."
    return [Section("Each source of the rows", intro, [Table(columns, rows, "", frozenset(muted))])]


def _source_cells(measured: Mapping[str, Any], sources: Sequence[str]) -> list[Cell]:
    return [measured_cell(measured["sources"][source].get(name)) for source in sources for name in SOURCE_METRICS]


def _metrics_table(entries: Sequence[Mapping[str, Any]], names: Sequence[str], *, controls: bool = True) -> Table:
    rows, muted = [], set()
    for entry in entries:
        rows.append(metric_row(entry["name"], entry["metrics"], names))
        if controls:
            for label, control in entry["controls"].items():
                muted.add(len(rows))
                rows.append(metric_row(f"↳ {label}", control["metrics"], names))
    columns = ["", *(heading(name) for name in names)]
    return Table(columns, rows, _units(names), frozenset(muted))


def _units(names: Sequence[str]) -> str:
    """Say what the numbers of a table are in, but for fractions and cosines, which have no unit."""
    units: dict[str, list[str]] = {}
    for name in names:
        if name in METRICS and METRICS[name].unit not in ("fraction", "cosine"):
            units.setdefault(METRICS[name].unit, []).append(heading(name))
    said = [f"{' and '.join(own)} in {unit}" for unit, own in units.items()]
    return f"{', '.join(said)}; the others are fractions of 1." if said else ""


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
    names = [
        name for name in MAIN_METRICS if any(name in c["differences"] for e in entries for c in e["controls"].values())
    ]
    controls = [control for entry in entries for control in entry["controls"].values()]
    decided = [name for name in names if any(name in (control.get("verdicts") or {}) for control in controls)]
    rows = [
        metric_row(f"{entry['name']} − {label}", control["differences"], names) + _decided(control, decided)
        for entry in entries
        for label, control in entry["controls"].items()
    ]
    columns = ["SAE − baseline", *(heading(name) for name in names)]
    columns += [heading_ for name in decided for heading_ in (f"{heading(name)}: verdict", "detects")]
    return Section(
        "Differences from the baselines",
        "The SAE's value minus the baseline's over the same documents. Verdicts are for margins of 0.01, corrected for "
        "the number of SAEs and baselines (Holm). Detects: a true difference that would be found 4 times in 5, "
        "uncorrected.",
        [Table(columns, rows)] if rows else [],
    )


def _decided(control: Mapping[str, Any], names: Sequence[str]) -> list[Cell]:
    """Return the verdict about each metric, and which difference its interval detects."""
    verdicts, detects = control.get("verdicts") or {}, control.get("detects") or {}
    return [cell for name in names for cell in (Cell(verdicts.get(name, "–")), number_cell(detects.get(name)))]


def _density(entries: Sequence[Mapping[str, Any]]) -> Section:
    series: dict[str, charts.Series] = {}
    rows = []
    for entry in entries:
        density = entry["density"]
        edges, counts = density["log10_edges"], density["counts"]
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        series[entry["name"]] = (middles, counts[: len(middles)])
        rows.append({"name": entry["name"], "alive": sum(counts), **density})
    columns = (("", "name"), ("dead latents", "dead"), ("alive latents", "alive"), ("rows seen", "n_rows"))
    return Section(
        "How often latents fire",
        "Latents by the fraction of rows on which they fire. Far right are those that are nearly always on; "
        "the dead are in no bin.",
        [table_of(rows, columns)],
        [Figure(charts.lines(series, x="log10 of the fraction of rows", y="latents", steps=True), "Latents per bin.")],
    )


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
    others = {"The rows.": result["rows"], "The language model.": result["language_model"]}
    saes = {entry["name"]: entry["sae"] for entry in result["entries"]}
    return settings_section("evaluation", result, others, saes)
