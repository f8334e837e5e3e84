"""Section of labels that a language model has tested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..explanation.label_scores_result import short_name
from .decisions import latent_cell
from .parts import Cell, Section, number_cell, settings_section, table_of

_COLUMNS = (
    ("label", lambda each: Cell(each["label"])),
    ("test", "scorer"),
    ("AUC", "auc"),
    ("against similar texts", lambda each: number_cell(each["hard"])),
    ("label of another latent", lambda each: number_cell(each["other_label"])),
    ("above other labels (%)", lambda each: number_cell(_percent(each["percentile"]), ".0f")),
    ("answers", lambda each: Cell(str(each["n"]), each["n"])),
    ("missing", lambda each: Cell(str(each["missing"]), each["missing"])),
)
_UNTESTED = (("latent", lambda each: Cell(str(each["latent"]))), ("reason", "reason"))
_SHOWN = 50


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def label_scores(result: Mapping[str, Any]) -> list[Section]:
    """Show how well labels tell where latents fire, by a language model."""
    tests = [{**test, **score} for score in result["scores"] for test in score["tests"]]
    tests.sort(key=lambda each: -(each["auc"]["value"] or 0.0))
    untested = [each for each in result["scores"] if each["reason"]]
    more = f" The {_SHOWN} best of {len(tests)} are shown." if len(tests) > _SHOWN else ""
    main = Section(
        "Labels, tested by a language model",
        f"{short_name(result['judge']['name'])} was asked about texts that the labels were not made of, as many with a "
        "firing as without, alike in everything else: does the label fit the text (detection), or the words marked in "
        "it (fuzzing)? 0.5 is chance; so is the same with the label of another latent, unless the model reads more "
        f"than the label.{more}",
        [table_of(tests[:_SHOWN], [("latent", lambda each: latent_cell(each["latent"], result["sae"])), *_COLUMNS])],
    )
    rest = [Section("Labels that were not tested", "", [table_of(untested, _UNTESTED)], is_folded=True)]
    facts = {"The model that was asked.": result["judge"], "The texts.": result["data"]}
    return [main, *(rest if untested else []), settings_section("label_scores", result, facts)]
