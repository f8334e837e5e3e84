"""Sections and figures of a comparison of SAEs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_bytes
from . import charts
from .parts import Cell, Figure, Section, Table, facts, measured_cell, number

_COLUMNS = ("", "shared", "partners equal", "cosine decoder", "cosine encoder", "largest cosine", "correlation", "CKA")


def comparison(result: Mapping[str, Any]) -> list[Section]:
    """Shared latents beside chance, in how many SAEs a latent is found, proofs, settings."""
    settings = result["settings"]
    limit = f"{'>' if settings['strict'] else '≥'} {number(settings['threshold'])}"
    means = ("shared", "equal", "mean_cosine", "mean_cosine_encoder", "max_cosine")
    rows = [
        [Cell("all pairs"), *(measured_cell(result[name], where=name) for name in means), Cell("–"), Cell("–")],
        *(_pair(pair) for pair in result["pairs"]),
    ]
    muted = frozenset(range(len(rows), len(rows) + len(result["nulls"])))
    rows += [_null(name, null) for name, null in result["nulls"].items()]
    drawn = figures(result)
    main = Section(
        "Which latents SAEs share, beside chance",
        "A latent is shared when decoder and encoder, matched independently, give it the same partner and both "
        f"cosines are {limit}. Intervals: {settings['intervals']['over']}. Grey rows are "
        "dictionaries that have nothing in common. Pairs with a star began from the same random weights: what they "
        "share says nothing about stability.",
        [Table(_COLUMNS, rows, "", muted)],
        [Figure(chart.svg(), caption) for chart, caption in drawn.values()],
    )
    return [main, _proofs(result), _settings(result)]


def figures(result: Mapping[str, Any]) -> dict[str, tuple[charts.Chart, str]]:
    """Charts of a comparison with their captions, by name."""
    threshold = result["settings"]["threshold"]
    sides = {
        f"{side} rows": [value for pair in result["pairs"] for value in pair[side]["cosine"] if value is not None]
        for side in ("decoder", "encoder")
    }
    lowest = min((min(values) for values in sides.values() if values), default=0.0)
    low = min(0.0, int(lowest * 20 - 1) / 20)
    steps = round((1 - low) * 40)
    marks = {"threshold": threshold}
    if result["mean_cosine_null"] is not None:
        marks["mean of random dictionaries"] = result["mean_cosine_null"]["value"]
    edges = [low + (1 - low) * step / steps for step in range(steps + 1)]
    m = len(result["saes"])
    drawn = {
        "cosines": (
            charts.histogram(sides, edges, x="cosine of the pair", y="share of pairs", marks=marks),
            "Cosines of matched latents, all pairs of SAEs together.",
        ),
        "decoder-encoder": (
            charts.scatter(
                _points(result), x="cosine of encoder partners", y="cosine of decoder partners", at=threshold
            ),
            "Every latent: cosine with its encoder partner against cosine with its decoder partner. The dashed lines "
            "are the threshold.",
        ),
    }
    if m > 2:
        values = [(str(place), each) for place, each in enumerate(result["in_exactly"], start=1)]
        drawn["in-exactly"] = (
            charts.bars(values, x=f"number of the {m} SAEs that have it", y="share of latents"),
            "In how many of the SAEs a latent is found, itself included; mean over the SAEs.",
        )
    return drawn


def write_figures(result: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the charts of a comparison as ``comparison-<name>.svg`` and ``.png``.

    Parameters
    ----------
    result
        What ``Comparison.to_json`` returned.
    folder
        Created if missing.
    """
    written = []
    for name, (chart, _) in figures(result).items():
        for ending, data in ((".svg", chart.svg().encode()), (".png", chart.png())):
            path = Path(folder) / f"comparison-{name}{ending}"
            write_bytes(path, data)
            written.append(path)
    return written


def _points(result: Mapping[str, Any]) -> dict[str, charts.Series]:
    groups: dict[str, tuple[list[float], list[float]]] = {"partners equal": ([], []), "partners differ": ([], [])}
    for pair in result["pairs"]:
        one, other = pair["decoder"], pair["encoder"]
        for partner, mate, up, across in zip(one["partner"], other["partner"], one["cosine"], other["cosine"]):
            if up is not None and across is not None:
                xs, ys = groups["partners equal" if partner == mate else "partners differ"]
                xs.append(across)
                ys.append(up)
    return {name: points for name, points in groups.items() if points[0]}


def _pair(pair: Mapping[str, Any]) -> list[Cell]:
    on_rows = pair["on_rows"] or {}
    values = (
        pair["shared"], pair["equal"], pair["decoder"]["mean_cosine"], pair["encoder"]["mean_cosine"],
        pair["decoder"]["max_cosine"], on_rows.get("correlation"), on_rows.get("cka"),
    )  # fmt: skip
    mark, note = (" *", "began from the same random weights: no test of stability") if pair["same_seed"] else ("", "")
    return [Cell(f"{pair['first']} | {pair['second']}{mark}", note=note), *(measured_cell(value) for value in values)]


def _null(name: str, null: Mapping[str, Any]) -> list[Cell]:
    values = (null["shared"], null["equal"], null["mean_cosine"], None, null["max_cosine"], None, None)
    return [Cell(f"↳ {name}", note=null["made"]), *(measured_cell(value) for value in values)]


def _proofs(result: Mapping[str, Any]) -> Section:
    rows = [
        [
            Cell(f"{pair['first']} | {pair['second']}, {side}"),
            *map(_cell, ("objective", "dual", "gap"), [pair[side]] * 3),
        ]
        for pair in result["pairs"]
        for side in ("decoder", "encoder")
    ]
    return Section(
        "How exact the matching is",
        "No one-to-one matching has a sum of cosines above the dual bound.",
        [Table(("", "sum of cosines", "dual bound", "gap"), rows)],
        is_folded=True,
    )


def _cell(name: str, side: Mapping[str, Any]) -> Cell:
    value = side["certificate"][name]
    return Cell(f"{value:.1e}" if name == "gap" else f"{value:.9g}", value, is_number=True)


def _settings(result: Mapping[str, Any]) -> Section:
    tables = [facts({"saekit": result["saekit"], **result["settings"]}, caption="Settings of the comparison.")]
    tables += [facts(result["rows"], caption="The rows.")] if result["rows"] else []
    tables.append(facts(result["versions"], caption="Versions."))
    tables += [facts(each["sae"], caption=f"The SAE {each['name']}.") for each in result["saes"]]
    return Section("Settings and provenance of the comparison", "", tables, is_folded=True)
