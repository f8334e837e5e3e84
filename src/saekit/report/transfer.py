"""Sections and figures of a transfer: heat maps of every classifier, and every cell in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..classification.transfer_result import Transfer
from ..measure.intervals import no_intervals
from . import charts
from .classification import is_baseline
from .numbers import capital
from .parts import Cell, Figure, Section, Table, measured_cell, number_cell, settings_section, table_of, tables_of

_ALONE = (("native F1", "macro_f1"), ("native AUC", "auc"))
_MOVED = (
    ("transferred F1", "transferred"), ("drop", "drop"), ("transferred AUC", "transferred_auc"),
    ("above chance", lambda arm: _count(arm, "n_above")), ("at chance", lambda arm: _count(arm, "n_at")),
)  # fmt: skip
_AGAINST_DENSE = (("F1 − dense", "difference"), ("AUC − dense", "auc_difference"), ("against dense", "verdict"))


def transfer(result: Mapping[str, object]) -> list[Section]:
    """Show the classifiers over the whole matrix, heat maps, cells in words, settings."""
    result = Transfer.migrate(dict(result))
    several = len(result["values"]) > 1
    columns = [("", _name), *_ALONE, *(_MOVED if several else ()), *_AGAINST_DENSE]
    main = Section(
        f"Transfer across `{result['across']}`" if several else "Classification",
        _intro(result, several),
        [
            table_of(result["arms"], columns, is_muted=is_baseline),
            table_of(result["arms"], [("in words", "sentence")]),
        ],
        [Figure(chart, caption) for chart, caption in figures(result).values()],
    )
    return [main, *([_pairs(result)] if several else []), _values(result), _settings(result)]


def _intro(result: Mapping[str, Any], several: bool) -> str:
    settings = result["settings"]
    unit = "groups" if any(value["n_groups"] for value in result["values"]) else "rows"
    decides = "AUC" if settings.get("metric") == "auc" else "macro-F1"
    why = no_intervals(cell["macro_f1"] for cell in result["cells"])
    about = capital(why) if why else f"{settings['level']:.0%} intervals over {unit} of the test set"
    intro = (
        f"{about}. Differences from the dense states "
        f"are over the same rows; less than {settings['margin']:g} {decides} counts as none."
    )
    if several:
        intro = (
            f"Trained on one `{result['across']}`, tested on another; the drop is against a classifier of the tested "
            f"one, evaluated on the same rows. {intro} A pair is above chance when the whole interval of its AUC "
            "lies above 0.5; about one pair in forty would be so by chance."
        )
    return intro


def figures(result: Mapping[str, Any]) -> dict[str, tuple[charts.Chart, str]]:
    """Return a heat map of the AUC of every classifier that reads its input, by its name; none for a single value."""
    names = [value["name"] for value in result["values"]]
    drawn = {}
    for arm in result["arms"] if len(names) > 1 else ():
        if arm["family"] != "floor":
            cells = _cells_of(result, arm)
            numbers = [[cells[row, column]["auc"]["value"] for column in names] for row in names]
            marked = [[cells[row, column]["chance"] == "at chance" for column in names] for row in names]
            caption = (
                f"AUC of `{arm['name']}`: trained on the row, tested on the column. 0.5 is chance; in brackets: not "
                "told apart from it."
            )
            chart = charts.heat_map(
                numbers, names, names, x="tested on", y="trained on", quantity="AUC", centred=True, bracketed=marked
            )
            drawn[arm["name"]] = (chart, caption)
    return drawn


def write_transfer_figures(result: Mapping[str, object], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the heat maps of a transfer as ``transfer-<arm>.svg`` and ``.png``.

    Parameters
    ----------
    result
        What ``Transfer.to_json`` returned.
    folder
        Created if missing.
    """
    return charts.write_charts(figures(result), folder, "transfer")


def _name(arm: Mapping[str, Any]) -> Cell:
    return Cell(arm["name"], note=" ".join(part for part in (arm["source"], arm["pool"]) if part))


def _count(arm: Mapping[str, Any], key: str) -> Cell:
    return Cell(f"{arm[key]} of {arm['n_cells']}", arm[key], is_number=True)


def _cells_of(result: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    return {(cell["train"], cell["test"]): cell for cell in result["cells"] if cell["arm"] == arm["name"]}


def _pairs(result: Mapping[str, Any]) -> Section:
    names = [value["name"] for value in result["values"]]
    tables = []
    for arm in result["arms"]:
        cells = _cells_of(result, arm)
        rows = [[Cell(train), *(measured_cell(cells[train, test]["macro_f1"]) for test in names)] for train in names]
        tables.append(Table(("train ↓ test →", *names), rows, f"Macro-F1 of `{arm['name']}`."))
    for arm in result["arms"]:
        if arm["family"] == "sae":
            others = [cell for (train, test), cell in _cells_of(result, arm).items() if train != test]
            tables.append(table_of(others, [(f"`{arm['name']}`, every pair in words", "sentence")]))
    return Section("Every pair", "", tables, is_folded=True)


def _values(result: Mapping[str, Any]) -> Section:
    def name(value: Mapping[str, Any]) -> Cell:
        about = ", ".join(f"{key}: {item}" for key, item in value["about"].items() if not isinstance(item, Mapping))
        return Cell(value["name"], note=about)

    columns = (
        ("", name), ("train rows", "n_train"), ("test rows", "n_test"),
        ("test groups", lambda value: Cell("–" if value["n_groups"] is None else f"{value['n_groups']:,}")),
        ("tell as much as", lambda value: Cell("–" if value["effective"] is None else f"{value['effective']:,.1f}")),
        ("test rows by class", lambda value: Cell(", ".join(f"{c}: {n[1]:,}" for c, n in value["classes"].items()))),
    )  # fmt: skip
    matched = [
        {"name": f"{value['name']} → {other}", **pair}
        for value in result["values"]
        for other, pair in value["about"].get("matched", {}).items()
    ]
    of_pair = (
        ("matched latents", "name"), ("pairs", "pairs"), ("without", "unmatched"),
        ("mean cosine", lambda pair: number_cell(pair["mean_cosine"], ".3f")),
    )  # fmt: skip
    tables = [table_of(result["values"], columns), *tables_of(matched, of_pair)]
    return Section("Training and test sets", "", tables, is_folded=True)


def _settings(result: Mapping[str, Any]) -> Section:
    others = {"The data.": result["data"], "The model.": result["model"]}
    return settings_section("transfer", result, others, {each["name"]: each for each in result["saes"]})
