"""Sections and figures of a comparison of SAEs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..comparison.result import FUNCTION_COLUMNS, FUNCTION_ROWS, Comparison
from ..measure.intervals import no_intervals
from . import charts
from .numbers import capital, number
from .parts import (
    Cell,
    Figure,
    Section,
    Table,
    count_cell,
    facts,
    measured_cell,
    number_cell,
    settings_section,
    table_of,
    tables_of,
)

_COLUMNS = (
    "", "shared", "partners equal", "PW-MCC", "cosine encoder", "largest cosine", "shared, alive",
    "correlation", "CKA",
)  # fmt: skip


def comparison(result: Mapping[str, Any]) -> list[Section]:
    """Show shared latents compared with chance, in how many SAEs a latent is found, proofs, settings."""
    settings = result["settings"]
    limit = f"{'>' if settings['strict'] else '≥'} {number(settings['threshold'])}"
    starred = [pair["same_seed"] for pair in result["pairs"]]
    apart = any(starred) and not all(starred) and result["schema"] > 2  # before, means were over all pairs
    means = ("shared", "equal", "mean_cosine", "mean_cosine_encoder", "max_cosine")
    rows = [
        [
            Cell("pairs without a star" if apart else "all pairs"),
            *(measured_cell(result[name], where=name) for name in means),
            measured_cell(result.get("shared_alive")),
            Cell("–"),
            Cell("–"),
        ],
        *(_pair(pair) for pair in result["pairs"]),
    ]
    muted = frozenset(range(len(rows), len(rows) + len(result["nulls"])))
    rows += [_null(name, null) for name, null in result["nulls"].items()]
    drawn = figures(result)
    why = no_intervals(result[name] for name in means)
    about = capital(why) if why else f"Intervals: {settings['intervals']['over']}"
    main = Section(
        "Which latents SAEs share, compared with chance",
        "A latent is shared when decoder and encoder, matched independently, give it the same partner and both "
        f"cosines are {limit}. PW-MCC is the mean cosine of decoder partners. {about}. Grey rows are "
        "dictionaries that have nothing in common. Pairs with a star began from the same random weights: what they "
        "share says nothing about stability. Shared, alive: the same among latents that fire on the rows.",
        [Table(_COLUMNS, rows, "", muted)],
        [Figure(chart, caption) for chart, caption in drawn.values()],
    )
    return [main, *_along(result), *_function(result), *_many(result), _proofs(result), _settings(result)]


def source_comparison(result: Mapping[str, Any]) -> list[Section]:
    """Show which latents of a crosscoder belong to which of its sources, and what a null calls so."""
    found, null = result["found"], result["null"]
    rows = [
        [Cell(label), measured_cell(value), measured_cell(null[part][name] if null else None)]
        for part in ("kinds", "specific")
        for name, value in found[part].items()
        for label in [name if part == "kinds" else f"specific to {name}"]
    ]
    a, b = result["sources"]
    limits = result["settings"]
    intro = (
        f"{number(result['n_alive'])} latents fire on {number(result['n_rows'])} rows; fractions of them. Kinds are by "
        f"the length of the decoder row in {b}, as a fraction of its lengths in {a} and {b}: below .1, .4, up to .6, "
        f".9, above. Specific: only there, and the other source neither keeps the direction as error (nu up to "
        f"{number(limits['error_limit'])}) nor writes it with other latents (up to "
        f"{number(limits['reconstruction_limit'])}). Null: the same of a crosscoder whose sources hold the same "
        "but for noise."
    )
    main = Section("Which latents belong to which source", intro, [Table(("", "fraction", "null"), rows)])
    return [
        main,
        settings_section("comparison of sources", result, {"The rows.": result["rows"]}, {"crosscoder": result["sae"]}),
    ]


def _along(result: Mapping[str, Any]) -> list[Section]:
    """Show what snapshots of the run shared."""
    points = result.get("along") or []
    if not points:
        return []
    curve = [(point["rows_seen"], point["shared"]) for point in points]
    chart = charts.curves({"shared": curve}, x="rows seen", y="fraction of latents")
    names = ("shared", "equal", "mean_cosine")
    rows = [[count_cell(point["rows_seen"]), *(measured_cell(point[name]) for name in names)] for point in points]
    rows.append([Cell("chance"), *(measured_cell(result.get(f"{name}_null")) for name in names)])
    table = Table(("rows seen", "shared", "partners equal", "PW-MCC"), rows, "")
    return [Section("What snapshots shared", "", [table], [Figure(chart, "Shared latents as training went on.")])]


def _function(result: Mapping[str, Any]) -> list[Section]:
    """Show whether partners do the same, and what predicts stability."""
    function, predictors = result.get("function") or {}, result.get("predictors") or {}
    tables = []
    rows = [
        [Cell(words), *(measured_cell(function.get(name)) for name in names)]
        for words, names in FUNCTION_ROWS.items()
        if names[0] in function
    ]
    if rows:
        caption = (
            "Means over pairs of SAEs. FVU and cross-entropy: codes of one SAE, decoded with the partners' decoder "
            "rows. Exchanged: each latent with another one's partner, of about equal frequency but for FVU and "
            "cross-entropy. At best: the SAE itself; the best matching by firing together; halves of a latent's tokens."
        )
        tables.append(Table(("", *FUNCTION_COLUMNS), rows, caption))
    if predictors:
        caption = (
            "Rank correlation with the stability of latents, mean over SAEs: alignment_self is the cosine of a "
            "latent's own encoder and decoder row, encoder_norm its encoder's length; they need no second SAE."
        )
        cells = [Cell("rank correlation"), *(measured_cell(each) for each in predictors.values())]
        told = Section("What one SAE alone says about stability", "", [Table(("", *predictors), [cells], caption)])
    return [*([Section("Whether partners do the same", "", tables)] if tables else []), *([told] if predictors else [])]


def _many(result: Mapping[str, Any]) -> list[Section]:
    """Show what more than two SAEs share: the fraction that only one has as their number grows, its law, concepts."""
    m = len(result["saes"])
    if m < 3 or not result.get("only_in_one"):
        return []
    curve = list(enumerate(result["only_in_one"], start=2))
    chart = charts.curves({"only in one": curve}, x="number of SAEs", y="fraction of latents")
    figures = [Figure(chart, "Fraction of latents that none of the others has, among that many of the SAEs.")]
    law, groups = Comparison.migrate(dict(result)).get("law"), result.get("groups")
    tables = [*([] if law is None else [_law(law)]), *([] if groups is None else [_concepts(groups)])]
    return [Section(f"What {m} SAEs have in common", "", tables, figures)]


def _law(law: Mapping[str, Any]) -> Table:
    """Show both fits of the fraction of latents that only one SAE has."""
    fits = [
        {"name": "with offset", **law},
        {"name": "without", "offset": "0", **{key[6:]: law[key] for key in law if key.startswith("plain_")}},
    ]
    columns = [(name, name) for name in ("amplitude", "exponent", "offset")]
    columns = [("", "name"), *columns, ("error", "error"), ("error at the last", "held_out")]
    verdicts = {"offset": "an offset: some latents no further seed would find", "no offset": "no offset"}
    caption = (
        "fraction = amplitude × number^-exponent + offset; the points speak for "
        f"{verdicts.get(law['verdict'], 'neither')}. Error at the last: at the full number of SAEs, predicted from "
        "fewer."
    )
    return table_of(fits, columns, caption=caption)


def _concepts(groups: Mapping[str, Any]) -> Table:
    """Show in how many SAEs concepts are found."""
    mean = groups["mean_consistency"]
    columns = ("", *(f"in {m}" for m in range(1, len(groups["count"]) + 1)), "pairs that agree", "pairs left out")
    row = [
        Cell("concepts"),
        *map(count_cell, groups["count"]),
        Cell(number(mean), mean, is_number=mean is not None),
        count_cell(groups["contested"]),
    ]
    caption = (
        "Shared latents of all pairs clustered into concepts, at most one latent of an SAE in each. Pairs that agree: "
        "fraction of the pairs within a concept that are shared themselves."
    )
    return Table(columns, [row], caption)


def figures(result: Mapping[str, Any]) -> dict[str, tuple[charts.Chart, str]]:
    """Return the charts of a comparison with their captions, by name."""
    threshold = result["settings"]["threshold"]
    m = len(result["saes"])
    drawn = {
        "cosines": (
            _cosines(result, threshold),
            "Cosines of matched latents, all pairs of SAEs together.",
        ),
        "decoder-encoder": (
            charts.scatter(
                _points(result), x="cosine of encoder partners", y="cosine of decoder partners", threshold=threshold
            ),
            "Every latent: cosine with its encoder partner against cosine with its decoder partner. The dashed lines "
            "are the threshold.",
        ),
    }
    if m > 2 and all(each["value"] is not None for each in result["in_exactly"]):
        values = {str(count): {"": each} for count, each in enumerate(result["in_exactly"], start=1)}
        drawn["in-exactly"] = (
            charts.bars(values, x=f"number of the {m} SAEs that have it", y="fraction of latents"),
            "In how many of the SAEs a latent is found, itself included; mean over the SAEs.",
        )
        shares = [(f"in {place}", each["value"]) for place, each in enumerate(result["in_exactly"], start=1)]
        drawn["donut"] = (
            charts.donut(shares, centre=f"of {m} SAEs"),
            f"The same as fractions of a whole: latents that exactly 1 … {m} of the SAEs have.",
        )
    by_frequency = _by_frequency(result)
    if by_frequency:
        drawn["frequency"] = (
            charts.scatter(
                by_frequency, x="fraction of rows on which it fires", y="mean cosine with its partners", log_x=True
            ),
            "Every latent that fires: how often, against how well its partners in the other SAEs agree with it.",
        )
    return drawn


def _cosines(result: Mapping[str, Any], threshold: float) -> charts.Chart:
    """Draw the distribution of the cosines of matched latents on either side."""
    sides = {
        f"{side} rows": [value for pair in result["pairs"] for value in pair[side]["cosine"] if value is not None]
        for side in ("decoder", "encoder")
    }
    lowest = min((min(values) for values in sides.values() if values), default=0.0)
    low = min(0.0, int(lowest * 20 - 1) / 20)
    steps = round((1 - low) * 40)
    edges = [low + (1 - low) * step / steps for step in range(steps + 1)]
    marks = {"threshold": threshold}
    if (result["mean_cosine_null"] or {}).get("value") is not None:
        marks["mean of random dictionaries"] = result["mean_cosine_null"]["value"]
    return charts.histogram(sides, edges, x="cosine of the pair", y="fraction of pairs", marks=marks)


def _by_frequency(result: Mapping[str, Any]) -> dict[str, charts.Series]:
    """Return frequency and alignment of the latents of all SAEs, by how many SAEs have them."""
    m = len(result["saes"])
    names = {1: "in only one SAE", m: "in all SAEs"}
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for each in result["saes"]:
        rows = zip(each.get("frequency") or [], each.get("alignment") or [], each["found_in"])
        for frequency, alignment, found in rows:
            if frequency > 0 and alignment is not None:
                xs, ys = groups.setdefault(names.get(found, "in some SAEs"), ([], []))
                xs.append(frequency)
                ys.append(alignment)
    return {name: groups[name] for name in sorted(groups)}


def across(results: Sequence[Mapping[str, object]]) -> list[Section]:
    """Show how overlap changes with width, k and rows of training, where several comparisons differ in one of them."""
    known = [(_facts(each), each) for each in results if each.get("kind") == "comparison"]
    figures = []
    for name, title in (("latents", "latents"), ("k", "k: latents per row"), ("rows", "rows of training")):
        series = _varying(known, name)
        if series:
            chart = charts.curves(series, x=title, y="fraction of latents that two SAEs share")
            figures.append(Figure(chart, f"Shared latents by {title}, with their intervals."))
    return [Section("How overlap changes", "One point per comparison.", [], figures)] if figures else []


def _varying(
    known: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], name: str
) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """Return shared latents along the fact `name`, for comparisons that are equal in all other facts."""
    series: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for own, result in known:
        if own.get(name) is not None:
            label = ", ".join(f"{key} {value}" for key, value in own.items() if key != name and value is not None)
            series.setdefault(label, []).append((own[name], result["shared"]))
    return {
        label: sorted(points, key=lambda point: point[0])
        for label, points in series.items()
        if len({at for at, _ in points}) > 1
    }


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that the SAEs of a comparison have in common."""
    found = []
    for each in result["saes"]:
        provenance = each["sae"].get("provenance") or {}
        config = provenance.get("config") or {}
        found.append(
            {
                "arch": config.get("arch"),
                "latents": each["sae"].get("n_latents"),
                "k": config.get("k") or config.get("target_l0"),
                "rows": provenance.get("rows_seen"),
                "hook": provenance.get("hook"),
            }
        )
    return {name: value for name, value in found[0].items() if all(each[name] == value for each in found)}


def orphans(result: Mapping[str, Any]) -> list[Section]:
    """Show properties of orphans compared with those of shared latents, the cost of ablating them, what they span."""
    heads = (
        ("", lambda each: Cell(each["name"], note=each["meaning"])), ("orphans (median)", "orphans"),
        ("shared (median)", "shared"), ("AUC", "auc"), ("p", lambda each: _p(each["p"])),
        ("AUC, equal frequency", "auc_matched"), ("p", lambda each: _p(each["p_matched"])),
    )  # fmt: skip
    costs = (
        ("ablated", "latents"), ("how many", lambda each: number_cell(each["n_latents"])), ("rise of FVU", "fvu"),
        ("rise of cross-entropy", "ce"),
    )  # fmt: skip
    spans = (
        ("rank", lambda each: Cell(str(each["rank"]), each["rank"], is_number=True)), ("orphans", "orphans"),
        ("shared", "shared"), ("random", "null"), ("orphans | rows", "rows"),
    )  # fmt: skip
    above = "AUC: the chance that an orphan has more of it; 0.5 is no difference."
    caption = "Mean squared cosine of the principal angles between what latents of two seeds span."
    tables = [
        table_of(result["properties"], heads, caption=above),
        *tables_of(result["silenced"], costs),
        *tables_of(result["spans"], spans, caption=caption),
    ]
    chart = charts.intervals([(each["name"], each["auc"], False) for each in result["properties"]], x="AUC")
    main = Section(
        "What orphans are",
        f"{sum(result['n_orphans']):,} latents that none of the other SAEs has, compared with "
        f"{sum(result['n_shared']):,} that at least one other has. Intervals are over SAEs.",
        tables,
        [Figure(chart, "Chance that an orphan has more of a property than a shared latent.")],
    )
    return [main, Section("Settings of the orphans", "", [facts(result["settings"])], is_folded=True)]


def _p(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.2g}", value, is_number=value is not None)


def without_lists(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a comparison for embedding in a page: long lists with a number per latent give way to their length."""
    numbers = sum(len(each["found_in"]) for each in result["saes"]) * (len(result["saes"]) + 3)
    if numbers <= MOST_EMBEDDED:
        return result

    def cut(value: object) -> Any:
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, list) and len(value) > LEAST_CUT and not isinstance(value[0], Mapping):
            return {"left_out": len(value), "see": "the JSON file of the comparison"}
        return [cut(item) for item in value] if isinstance(value, list) else value

    return cut(result)


MOST_EMBEDDED = 50_000
"""Numbers about single latents that a page carries, about; with more, they stay in the JSON file alone."""

LEAST_CUT = 64
"""Lists up to this length stay whole in any case."""


def write_figures(result: Mapping[str, object], folder: str | os.PathLike[str]) -> list[Path]:
    """Write the charts of a comparison as ``comparison-<name>.svg`` and ``.png``.

    Parameters
    ----------
    result
        What ``Comparison.to_json`` returned.
    folder
        Created if missing.
    """
    return charts.write_charts(figures(result), folder, "comparison")


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
        pair["decoder"]["max_cosine"], on_rows.get("shared_alive"), on_rows.get("correlation"),
        on_rows.get("cka"),
    )  # fmt: skip
    mark, note = (" *", "began from the same random weights: no test of stability") if pair["same_seed"] else ("", "")
    return [Cell(f"{pair['first']} | {pair['second']}{mark}", note=note), *(measured_cell(value) for value in values)]


def _null(name: str, null: Mapping[str, Any]) -> list[Cell]:
    values = (null["shared"], null["equal"], null["mean_cosine"], None, null["max_cosine"], None, None, None)
    return [Cell(f"↳ {name}", note=null["made"]), *(measured_cell(value) for value in values)]


def _proofs(result: Mapping[str, Any]) -> Section:
    proofs = [
        {"name": f"{pair['first']} | {pair['second']}, {side}", **pair[side]["certificate"]}
        for pair in result["pairs"]
        for side in ("decoder", "encoder")
    ]
    columns = (
        ("", "name"), ("sum of cosines", lambda each: number_cell(each["objective"], ".9g")),
        ("dual bound", lambda each: number_cell(each["dual"], ".9g")),
        ("gap", lambda each: number_cell(each["gap"], ".1e")),
    )  # fmt: skip
    return Section(
        "How exact the matching is",
        "No one-to-one matching has a sum of cosines above the dual bound.",
        [table_of(proofs, columns)],
        is_folded=True,
    )


def _settings(result: Mapping[str, Any]) -> Section:
    saes = {each["name"]: each["sae"] for each in result["saes"]}
    return settings_section("comparison", result, {"The rows.": result["rows"]}, saes)
