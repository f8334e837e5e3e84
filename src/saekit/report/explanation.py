"""Sections of an explanation: how well labels hold, scores compared with controls, groups of latents, settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..explanation.explanation_result import about_random_models, tells_trained_apart
from .decisions import latent_cell
from .parts import (
    Cell,
    Section,
    Table,
    count_cell,
    measured_cell,
    number_cell,
    percent_cell,
    settings_section,
    table_of,
    tables_of,
)

SHOWN = 12
"""Latents in the table; the browser has all."""

TRAINED = "tells a trained model from a random one"
"""Heading of what a score says against a transformer with random weights."""

_COLUMNS = (
    ("label", lambda card: Cell(card["label"] or "–")),
    ("density", lambda card: percent_cell(card["density"])),
    ("AUC, held out", lambda card: number_cell(card["detection"])),
    ("above shuffled", lambda card: percent_cell(card["detection_percentile"])),
    ("purity", lambda card: number_cell(card["purity"])),
    ("documents", lambda card: number_cell(card["documents"])),
    ("strongest example", lambda card: Cell(_example(card))),
)

_NUMBERS = (
    ("", "name"),
    ("AUC of labels", "detection"),
    ("AUC, shuffled codes", "detection_null"),
    ("labels above 95% of shuffled", "told_fraction"),
    ("latents that fire", lambda result: percent_cell(result["fired_fraction"])),
)


def explanation(result: Mapping[str, Any]) -> list[Section]:
    """Show how well labels hold in other documents, scores and groups, and the latents whose labels hold best."""
    cards = sorted(result["cards"], key=lambda card: -(card["detection"] or 0))
    main = Section(
        "What latents respond to",
        "A label is made of tokens that the latent responds to in one half of the documents; its AUC is that of these "
        "tokens for where the latent fires in the other half. Shuffled codes are labelled and scored in the same way. "
        f"Coherent firing is not meaning: the latents of a frozen decoder have it too. {_worth(result)}".strip(),
        [table_of([{**result, "name": result["data"]["name"]}], _NUMBERS)],
    )
    scored = [*_scores(result), *_groups(result)]
    more = [Section("Every score, compared with the controls", "", scored, is_folded=True)] if scored else []
    shown = Section(
        f"The {min(SHOWN, len(cards)):,} latents whose labels hold best, of {len(cards):,}",
        "The peak of each example stands in ⟦⟧. `saekit show SAE --latent J` prints a whole card.",
        tables_of(cards[:SHOWN], [("latent", lambda card: latent_cell(card["latent"], result["sae"])), *_COLUMNS]),
        is_folded=True,
    )
    facts = {"The model.": result["model"], "The texts.": result["data"]}
    return [main, shown, *more, settings_section("explanation", result, facts)]


def _worth(result: Mapping[str, Any]) -> str:
    """Say which scores are a sign of learning."""
    return f"{_telling(result)} {_of_random_models(result)}"


def _telling(result: Mapping[str, Any]) -> str:
    """Say which scores tell latents that were learned from those of random directions or models."""
    tested = [each for each in result.get("scores") or () if each["tells_random_apart"] is not None]
    telling = [each["name"].replace("_", " ") for each in tested if each["tells_random_apart"]]
    if not tested:
        return ""
    if not telling:
        return f"None of {len(tested)} scores tells these latents from ones that were not learned."
    return (
        f"Scores that tell these latents from ones that were not learned: {', '.join(telling)} ({len(telling)} of "
        f"{len(tested)}); the others are no evidence that anything was."
    )


def _of_random_models(result: Mapping[str, Any]) -> str:
    """Say which scores tell a trained model from a random one."""
    return about_random_models({each["name"]: _tells_trained(each) for each in result.get("scores") or ()})


def _tells_trained(score: Mapping[str, Any]) -> bool | None:
    return tells_trained_apart({each["control"]: each["verdict"] for each in score["nulls"]})


def without_cards(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an explanation for embedding in a page, which holds the cards in another form."""
    left = {"left_out": len(result["cards"]), "see": "the JSON file of the explanation"}
    return {**result, "cards": left} if result["cards"] else result


def _scores(result: Mapping[str, Any]) -> list[Table]:
    """Show every score next to those of the controls, and whether it tells a trained SAE from a random one."""
    scores = result.get("scores") or []
    controls = list(dict.fromkeys(null["control"] for score in scores for null in score["nulls"]))
    rows = []
    for score in scores:
        null = {each["control"]: each for each in score["nulls"]}
        tells = {True: "yes", False: "no", None: "–"}[score.get("tells_random_apart")]
        rows.append(
            [
                Cell(score["name"].replace("_", " "), note=score["meaning"]),
                measured_cell(score["value"]),
                *(measured_cell(null[name]["value"] if name in null else None) for name in controls),
                Cell(", ".join(f"{name}: {null[name]['verdict']}" for name in controls if name in null) or "–"),
                Cell(tells),
                Cell({True: "yes", False: "no", None: "not asked"}[_tells_trained(score)]),
            ]
        )
    columns = ("score", "SAE", *controls, "SAE compared with each", "tells learned from random", TRAINED)
    about = "; ".join(f"{each['name']}: {each['what']}" for each in result.get("controls") or [])
    return [Table(columns, rows, f"Means over latents. Controls: {about}." if about else "")] if rows else []


def _groups(result: Mapping[str, Any]) -> list[Table]:
    groups = result.get("groups") or []
    names = list(dict.fromkeys(name for each in groups for name in each["scores"]))
    rows = [
        [
            Cell(f"{each['by']}: {each['name']}"),
            count_cell(each["n_latents"]),
            *(measured_cell(each["scores"].get(name)) for name in names),
        ]
        for each in groups
    ]
    return [Table(("group", "latents", *(name.replace("_", " ") for name in names)), rows)] if rows else []


def _example(card: Mapping[str, Any]) -> str:
    if not card["top"]:
        return "–"
    example = card["top"][0]
    tokens, peak = example["tokens"], example["peak"]
    return f"{''.join(tokens[:peak])}⟦{tokens[peak]}⟧{''.join(tokens[peak + 1 :])}"
