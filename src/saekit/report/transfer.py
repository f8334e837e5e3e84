"""Sections and figures of a transfer: heat maps of every classifier, and every cell in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..classification.transfer_result import Transfer
from . import charts
from .parts import Cell, Figure, Section, Table, count_cell, facts, measured_cell

_AT_CHANCE = "at chance"


def transfer(result: Mapping[str, Any]) -> list[Section]:
    """Show the classifiers over the whole matrix, heat maps, cells in words, settings."""
    result = Transfer.migrate(dict(result))
    several = len(result["values"]) > 1
    settings = result["settings"]
    rows = [_arm(arm, several) for arm in result["arms"]]
    muted = frozenset(i for i, arm in enumerate(result["arms"]) if arm["family"] in ("floor", "control"))
    columns: tuple[str, ...] = ("", "native F1", "native AUC", "F1 − dense", "AUC − dense", "against dense")
    if several:
        columns = (
            "", "native F1", "native AUC", "transferred F1", "drop", "transferred AUC", "above chance", "at chance",
            "F1 − dense", "AUC − dense", "against dense",
        )  # fmt: skip
    unit = "groups" if any(value["n_groups"] for value in result["values"]) else "rows"
    decides = "AUC" if settings.get("metric") == "auc" else "macro-F1"
    intro = (
        f"{settings['level']:.0%} intervals from resampled {unit} of the test set. Differences from the dense states "
        f"are over the same rows; less than {settings['margin']:g} {decides} counts as none."
    )
    if several:
        intro = (
            f"Trained on one `{result['across']}`, tested on another; the drop is against a classifier of the tested "
            f"one, evaluated on the same rows. {intro} A pair is above chance when the whole interval of its AUC "
            "lies above 0.5; about one pair in forty would be so by chance."
        )
    if result["notes"]:
        intro += " " + "; ".join(result["notes"]) + "."
    title = f"Transfer across `{result['across']}`" if several else "Classification"
    figures_ = [Figure(chart, caption) for chart, caption in figures(result).values()] if several else []
    words = Table(("in words",), [[Cell(arm["sentence"])] for arm in result["arms"]])
    main = Section(title, intro, [Table(columns, rows, "", muted), words], figures_)
    return [main, *([_cells(result)] if several else []), _values(result), _settings(result)]


def figures(result: Mapping[str, Any]) -> dict[str, tuple[charts.Chart, str]]:
    """Return a heat map of the AUC of every classifier that reads its input, by its name, with captions."""
    names = [value["name"] for value in result["values"]]
    drawn = {}
    for arm in result["arms"]:
        if arm["family"] == "floor":
            continue
        cells = [cell for cell in result["cells"] if cell["arm"] == arm["name"]]
        numbers = [[cell["auc"]["value"] for cell in cells if cell["train"] == name] for name in names]
        marked = [[cell["chance"] == _AT_CHANCE for cell in cells if cell["train"] == name] for name in names]
        caption = (
            f"AUC of `{arm['name']}`: trained on the row, tested on the column. 0.5 is chance; in brackets: not told "
            "apart from it."
        )
        chart = charts.heat_map(numbers, names, names, x="tested on", y="trained on", centred=True, bracketed=marked)
        drawn[arm["name"]] = (chart, caption)
    return drawn


def write_transfer_figures(result: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the heat maps of a transfer as ``transfer-<arm>.svg`` and ``.png``.

    Parameters
    ----------
    result
        What ``Transfer.to_json`` returned.
    folder
        Created if missing.
    """
    several = len(result["values"]) > 1
    return charts.write_charts(figures(result) if several else {}, folder, "transfer")


def _arm(arm: Mapping[str, Any], several: bool) -> list[Cell]:
    name = Cell(arm["name"], note=" ".join(part for part in (arm["source"], arm["pool"]) if part))
    native = [measured_cell(arm["macro_f1"]), measured_cell(arm["auc"])]
    end = [measured_cell(arm["difference"]), measured_cell(arm["auc_difference"]), Cell(arm["verdict"] or "–")]
    if not several:
        return [name, *native, *end]
    counts = [Cell(f"{arm[key]} of {arm['n_cells']}", arm[key], is_number=True) for key in ("n_above", "n_at")]
    moved = [measured_cell(arm[key]) for key in ("transferred", "drop", "transferred_auc")]
    return [name, *native, *moved, *counts, *end]


def _cells(result: Mapping[str, Any]) -> Section:
    names = [value["name"] for value in result["values"]]
    tables = []
    for arm in result["arms"]:
        cells = {(cell["train"], cell["test"]): cell for cell in result["cells"] if cell["arm"] == arm["name"]}
        rows = [[Cell(train), *(measured_cell(cells[train, test]["macro_f1"]) for test in names)] for train in names]
        tables.append(Table(("train ↓ test →", *names), rows, f"Macro-F1 of `{arm['name']}`."))
    for arm in result["arms"]:
        if arm["family"] != "sae":
            continue
        told = [
            [Cell(cell["sentence"])]
            for cell in result["cells"]
            if cell["arm"] == arm["name"] and cell["train"] != cell["test"]
        ]
        tables.append(Table((f"`{arm['name']}`, every pair in words",), told))
    return Section("Every pair", "", tables, is_folded=True)


def _values(result: Mapping[str, Any]) -> Section:
    rows = []
    for value in result["values"]:
        classes = ", ".join(f"{name}: {count:,}" for name, count in value["classes"].items())
        groups = "–" if value["n_groups"] is None else f"{value['n_groups']:,}"
        about = ", ".join(f"{key}: {item}" for key, item in value["about"].items() if not isinstance(item, Mapping))
        rows.append(
            [
                Cell(value["name"], note=about),
                count_cell(value["n_train"]),
                count_cell(value["n_test"]),
                Cell(groups),
                Cell(classes),
            ]
        )
    matched = [
        [
            Cell(f"{value['name']} → {other}"),
            count_cell(pair["pairs"]),
            count_cell(pair["unmatched"]),
            Cell(
                "–" if pair["mean_cosine"] is None else f"{pair['mean_cosine']:.3f}",
                pair["mean_cosine"],
                is_number=True,
            ),
        ]
        for value in result["values"]
        for other, pair in value["about"].get("matched", {}).items()
    ]
    tables = [Table(("", "train rows", "test rows", "test groups", "test rows by class"), rows)]
    tables += [Table(("matched latents", "pairs", "without", "mean cosine"), matched)] if matched else []
    return Section("Training and test sets", "", tables, is_folded=True)


def _settings(result: Mapping[str, Any]) -> Section:
    tables = [
        facts({"saekit": result["saekit"], **result["settings"]}, caption="Settings of the transfer."),
        facts(result["data"], caption="The data."),
        facts(result["model"], caption="The model."),
        facts(result["versions"], caption="Versions."),
    ]
    tables += [facts(each, caption=f"The SAE {each['name']}.") for each in result["saes"]]
    return Section("Settings and provenance of the transfer", "", tables, is_folded=True)
