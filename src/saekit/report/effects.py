"""Sections of what latents do: ablated and dosed against controls; texts that an edited model generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .decisions import latent_cell
from .parts import Cell, Section, Table, measured_cell, number_cell, percent_cell, settings_section, table_of, tables_of


def _percentile(name: str, kind: str) -> Any:
    return lambda each: number_cell(each[name].get(kind), ".0f")


_COLUMNS = (
    ("density", lambda each: percent_cell(each["density"])),
    ("KL (nats)", "kl"),
    ("above latents (%)", _percentile("kl_percentile", "latents")),
    ("above directions (%)", _percentile("kl_percentile", "directions")),
    ("fall of followers (nats)", "drop"),
    ("rise of cross-entropy (nats)", lambda each: measured_cell(each.get("loss"))),
    ("as gradients expect", lambda each: number_cell(each.get("loss_expected"))),
    ("verdict", "verdict"),
    ("followed by", lambda each: Cell(" ".join(each["followers"][:5]) or "–")),
)

_DOSES = (
    ("latent", lambda each: Cell(str(each["latent"]))),
    ("dose (99th percentiles)", "dose"),
    ("edit / hidden state", "change"),
    ("KL (nats)", "kl"),
    ("above directions (%)", lambda each: number_cell(each["kl_percentile"], ".0f")),
    ("rise of followers (nats)", "rise"),
    ("above directions (%)", lambda each: number_cell(each["rise_percentile"], ".0f")),
)


def _linked(result: Mapping[str, Any]) -> list[Any]:
    return [("latent", lambda each: latent_cell(each["latent"], result["sae"]))]


def effects(result: Mapping[str, Any]) -> list[Section]:
    """Show what ablating and adding each latent does compared with the controls."""
    main = Section(
        "What latents do",
        "Each latent is ablated where it fires, in documents that its followers were not read from. Controls change "
        "the same tokens by the same norm, along the decoder rows of latents that fire about as often and along "
        "directions drawn from the covariance of the rows. A latent acts when it moves the next-token distribution "
        "further than 95% of either.",
        [table_of(result["effects"], [*_linked(result), *_COLUMNS], is_muted=lambda each: each["verdict"] != "acts")],
    )
    doses = [{**dose, "latent": each["latent"]} for each in result["effects"] for dose in each["doses"]]
    more = Section("Adding latents where they do not fire", "", tables_of(doses, _DOSES), is_folded=True)
    facts = {"The model.": result["model"], "The texts.": result["data"]}
    return [main, more, settings_section("effects", result, facts)]


def steered(result: Mapping[str, Any]) -> list[Section]:
    """Show the texts by the untouched model, by the edited one and by the controls."""
    edits = ", ".join(f"latent {latent}: {edit}" for latent, edit in result["edits"].items())
    sections = [
        Section(f"Steered: {edits}" if not number else "", "", [_texts(each)])
        for number, each in enumerate(result["prompts"])
    ]
    return [*sections, settings_section("steering", result, {"The model.": result["model"]})]


def _texts(prompt: Mapping[str, Any]) -> Table:
    runs = [("untouched", prompt["clean"]), ("edited", prompt["steered"])]
    runs += [(f"control {number}", each) for number, each in enumerate(prompt["controls"], 1)]
    rows = [
        [
            Cell(by),
            number_cell(run["kl"]),
            number_cell(run["read_back"]),
            number_cell(run["perplexity"]),
            Cell(prompt["prompt"] + run["text"]),
        ]
        for by, run in runs
    ]
    muted = frozenset(range(2, len(rows)))
    return Table(("by", "KL (nats)", "read back", "perplexity", "text"), rows, "", muted)
