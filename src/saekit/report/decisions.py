"""Sections of a fitted classifier: which latents speak for its classes, and which decided about texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .charts import bars_across
from .parts import Cell, Figure, Section, Table, number_cell, settings_section, table_of

MOST_TEXTS = 50
"""Texts on the page; the JSON holds all."""


def classifier(result: Mapping[str, Any]) -> list[Section]:
    """Show the latents that speak for each class most."""
    rows = [
        [
            Cell(name),
            latent_cell(each["latent"], result["sae"]),
            Cell(each["label"] or "–"),
            number_cell(each["weight"], "+.3f"),
        ]
        for name, found in result["top_latents"].items()
        for each in found
    ]
    about = f"`{result['arm']}`: weights of the saved classifier, over those of the mean class."
    return [
        Section(
            "Which latents speak for each class",
            about,
            [Table(("class", "latent", "label", "weight"), rows)],
            is_folded=True,
        )
    ]


def decisions(result: Mapping[str, Any]) -> list[Section]:
    """Show for each text which latents decided about it, and how much of the logit they carry."""
    main = Section(
        "Which latents decided",
        f"Predictions by `{result['arm']}`, text by text. A contribution is the weight of a latent for the class times "
        "its activation in the text; the logit is their sum and the intercept.",
    )
    found = [_document(each, result["sae"]) for each in result["predictions"][:MOST_TEXTS]]
    return [main, *found, settings_section("predictions", result, {"The model.": result["model"]})]


def latent_cell(latent: int, sae: Mapping[str, Any]) -> Cell:
    """Return a cell with the number of a latent of an SAE, which leads to its card."""
    return Cell(f"#{latent}", latent=(str(sae.get("digest")), latent))


def _document(each: Mapping[str, Any], sae: Mapping[str, Any]) -> Section:
    few = each.get("sparse")
    reasons = each["reasons"]
    columns = (
        ("latent", lambda reason: latent_cell(reason["latent"], sae)),
        ("label", lambda reason: Cell(reason["label"] or "–")),
        ("fired at", lambda reason: Cell(" · ".join(firing["token"] for firing in reason["tokens"][:8]) or "–")),
        ("activation", lambda reason: number_cell(reason["value"])),
        ("weight", lambda reason: number_cell(reason["coefficient"], "+.3f")),
        ("contribution", lambda reason: number_cell(reason["contribution"], "+.3f")),
    )
    parts = [(f"#{reason['latent']} {reason['label']}", reason["contribution"]) for reason in reasons]
    parts += [("all other latents", each["rest"]), ("intercept", each["intercept"])]
    shown = each.get("shown_fraction")
    carried = "" if shown is None else f"The latents shown carry {shown:.0%} of what moved the logit, in magnitude."
    if few and few.get("shown_fraction") is not None:
        carried += (
            f" The sparse arm, of {few['n_latents']} latents, says {few['predicted']} "
            f"({few['probabilities'][few['predicted']]:.0%}); its {len(few['reasons'])} largest carry "
            f"{few['shown_fraction']:.0%}."
        )
    chart = bars_across(parts, x=f"contribution to the logit of {each['predicted']}")
    return Section(
        f"{each['predicted']}, {each['probabilities'][each['predicted']]:.0%}",
        carried,
        [Table(("",), [[Cell(each["text"])]]), *([table_of(reasons, columns)] if reasons else [])],
        [Figure(chart, "Contributions, largest first.")],
        kind="document",
    )
