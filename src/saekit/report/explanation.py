"""Sections of an explanation: how well labels hold, and the latents whose labels hold best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .parts import Cell, Section, number_cell, settings_section, table_of, tables_of

SHOWN = 200
"""Latents on the page; the JSON holds all."""

_COLUMNS = (
    ("latent", lambda card: Cell(str(card["latent"]))),
    ("label", lambda card: Cell(card["label"] or "–")),
    ("density", "density"),
    ("AUC, held out", lambda card: number_cell(card["detection"])),
    (
        "above shuffled (%)",
        lambda card: number_cell(
            None if card["detection_percentile"] is None else 100 * card["detection_percentile"], ".0f"
        ),
    ),
    ("purity", lambda card: number_cell(card["purity"])),
    ("documents", lambda card: number_cell(card["documents"])),
    ("strongest example", lambda card: Cell(_example(card))),
)

_NUMBERS = (
    ("", "name"),
    ("AUC of labels", "detection"),
    ("AUC, shuffled codes", "detection_null"),
    ("labels above 95% of shuffled", "told_fraction"),
    ("latents that fire", lambda result: number_cell(result["fired_fraction"], ".1%")),
)


def explanation(result: Mapping[str, Any]) -> list[Section]:
    """Show how well labels hold in other documents, and the latents whose labels hold best."""
    cards = sorted(result["cards"], key=lambda card: -(card["detection"] or 0))
    main = Section(
        "What latents respond to",
        "A label is made of tokens that the latent responds to in one half of the documents; its AUC is that of these "
        "tokens for where the latent fires in the other half. Shuffled codes are labelled and scored in the same way. "
        "Coherent firing is not meaning: the latents of a frozen decoder have it too.",
        [table_of([{**result, "name": result["data"]["name"]}], _NUMBERS)],
    )
    shown = Section(
        f"Latents by how well their labels hold ({min(SHOWN, len(cards)):,} of {len(cards):,})",
        "The peak of each example stands in ⟦⟧. `saekit show SAE --latent J` prints a whole card.",
        tables_of(cards[:SHOWN], _COLUMNS),
    )
    facts = {"The model.": result["model"], "The texts.": result["data"]}
    return [main, shown, settings_section("explanation", result, facts)]


def _example(card: Mapping[str, Any]) -> str:
    if not card["top"]:
        return "–"
    example = card["top"][0]
    tokens, peak = example["tokens"], example["peak"]
    return f"{''.join(tokens[:peak])}⟦{tokens[peak]}⟧{''.join(tokens[peak + 1 :])}"
