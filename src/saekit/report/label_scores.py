"""Section of what a language model says about labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .decisions import latent_cell
from .numbers import told
from .parts import Cell, Section, measured_as, number_cell, settings_section, tables_of

MOST_TESTS = 100
"""Tests on the page, the best first; the JSON holds all."""

_COLUMNS = (
    ("label", lambda each: Cell(each["label"])),
    ("test", "scorer"),
    ("AUC", measured_as("auc", ".2f")),
    ("label of another latent", lambda each: number_cell(each["other_label"], ".2f")),
    ("above others", lambda each: number_cell(each["percentile"], ".0%")),
    ("against hard windows", lambda each: number_cell(each["hard"], ".2f")),
    ("windows", "n"),
    ("missing answers", "missing"),
)


def label_scores(result: Mapping[str, Any]) -> list[Section]:
    """Show how well labels tell where latents fire, compared with labels of other latents on the same windows."""
    judge, means = result["judge"], result["means"]
    parts = [
        f"{name}: AUC {told(mean, '.2f')} on average, {told(means[f'{name}_other_label'], '.2f')} under the label of "
        "another latent."
        for name, mean in means.items()
        if not name.endswith("_other_label")
    ]
    tests = [{**each, **test} for each in result["scores"] for test in each["tests"]]
    tests.sort(key=lambda test: -(test["auc"]["value"] or 0.0))
    intro = (
        f"`{judge['name']}` was asked about windows of documents that the labels were not made of. {' '.join(parts)} "
        f"0.5 is chance; {judge['missing']:,} of {judge['prompts']:,} answers are missing."
    )
    columns: list[Any] = [("latent", lambda each: latent_cell(each["latent"], result["sae"])), *_COLUMNS]
    main = Section("What a language model says about the labels", intro, tables_of(tests[:MOST_TESTS], columns))
    return [main, settings_section("label tests", result, {"The judge.": judge, "The texts.": result["data"]})]
