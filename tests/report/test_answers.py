"""The first screen: words come from stored verdicts and from intervals, never from a value alone."""

from __future__ import annotations

import pytest

from fixtures.results import measured
from saekit.report.answers import answers, sentence
from saekit.report.sizes import size_curve


def classified(verdict: str, gap: dict) -> dict:
    family = {"macro_f1": measured(0.91, 0.9, 0.92), "auc": measured(0.95), "auc_difference": measured(0.0)}
    return {
        "kind": "classification",
        "name": "tickets",
        "settings": {"margin": 0.01, "intervals": {"level": 0.95}},
        "data": {"n_train": 900, "n_test": 310},
        "families": [
            {**family, "name": "dense", "role": "baseline", "difference": measured(0.0), "verdict": "equivalent"},
            {**family, "name": "SAE", "role": "sae", "baseline": "dense", "difference": gap, "verdict": verdict},
        ],
    }


@pytest.mark.parametrize(
    ("verdict", "word", "tone"),
    [
        ("better", "yes", "yes"),
        ("worse", "no", "no"),
        ("equivalent", "no difference that matters (within 0.01)", "partly"),
        ("undecided", "undecided", "open"),
    ],
)
def test_the_word_is_that_of_the_stored_verdict_whatever_the_value(verdict, word, tone):
    for value in (0.3, -0.3):
        useful = answers([classified(verdict, measured(value, value - 0.01, value + 0.01))])[0]
        assert (useful.word, useful.tone) == (word, tone)
    assert useful.value == "−0.300"
    assert useful.unit == "macro-F1, difference from hidden states; 95% interval −0.310 to −0.290"
    assert "On 310 held-out texts: macro-F1 0.910 with the SAE’s latents, 0.910 with hidden states." in useful.sentence


def test_what_is_undecided_says_what_would_decide_it():
    useful = answers([classified("undecided", measured(0.004, -0.012, 0.02))])[0]
    assert "one of 0.02 takes about 1,700 test texts" in useful.more
    assert "no interval" in answers([classified("undecided", measured(0.004))])[0].more
    assert "not defined" in answers([classified("undecided", measured(None))])[0].more


def compared(shared: dict, null: dict | None = None) -> dict:
    settings = {"threshold": 0.7, "intervals": {"level": 0.95, "over": "over latents"}}
    return {"kind": "comparison", "shared": shared, "shared_null": null, "saes": [{}, {}], "settings": settings}


@pytest.mark.parametrize(
    ("shared", "word"),
    [
        (measured(0.71, 0.66, 0.75), "mostly"),
        (measured(0.71, 0.45, 0.9), "about half"),
        (measured(0.3, 0.28, 0.33), "a minority"),
        (measured(0.002, 0.0, 0.004), "no more than chance"),
        (measured(0.02, 0.001, 0.05), "undecided"),
        (measured(0.99), "undecided"),
    ],
)
def test_stability_is_told_from_the_whole_interval(shared, word):
    assert answers([compared(shared, measured(0.0, 0.0, 0.003))])[1].word == word


def test_a_null_without_interval_is_not_taken_for_exact():
    assert answers([compared(measured(0.71, 0.66, 0.75), measured(0.0))])[1].word == "undecided"


def curve(*points: tuple[int, float, float]) -> dict:
    return {
        "kind": "size_curve", "sae": {"name": "a"}, "n_rows": 1000, "settings": {"intervals": {"level": 0.95}},
        "points": [{"size": size, "metrics": {"fvu": measured(v, v - half, v + half)}} for size, v, half in points],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("points", "word"),
    [
        ([(64, 0.5, 0.01), (128, 0.2, 0.001), (256, 0.2, 0.001)], "128 of 256"),
        ([(64, 0.5, 0.01), (128, 0.4, 0.01), (256, 0.2, 0.001)], "all 256"),
        ([(64, 0.5, 0.01), (128, 0.21, 0.03), (256, 0.2, 0.001)], "between 128 and 256"),
        ([(64, 0.5, 0.01), (128, 0.21, 0.03), (256, 0.2, 0.001), (512, 0.2, 0.001)], "between 128 and 256"),
        ([(64, 0.2, 0.0), (128, 0.21, 0.03), (256, 0.2, 0.0)], "between 64 and 256"),
    ],
)
def test_a_size_is_enough_where_the_intervals_leave_no_doubt(points, word):
    assert answers([curve(*points)])[2].word == word


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (("worse", "equivalent"), "128 of 256"),
        (("equivalent", "equivalent"), "64 of 256"),
        (("worse", "worse"), "all 256"),
        (("worse", "undecided"), "between 128 and 256"),
    ],
)
@pytest.mark.parametrize("kind", ["size_curve", "progressive"])
def test_paired_differences_decide_where_intervals_of_the_sizes_do_not(words, word, kind):
    result = curve((64, 0.21, 0.1), (128, 0.205, 0.1), (256, 0.2, 0.1))
    assert answers([result])[2].word == "between 64 and 256"
    for point, said in zip(result["points"], words):
        gap = measured(point["metrics"]["fvu"]["value"] - 0.2, 0.001, 0.009)
        point["from_largest"] = {"differences": {"fvu": gap}, "verdicts": {"fvu": said}}
    if kind == "progressive":
        points = [{"name": "a", "size": each["size"], **each["metrics"], **each} for each in result["points"]]
        for each in points:
            del each["metrics"]
        result |= {"kind": kind, "curves": points}
    many = answers([result])[2]
    assert many.word == word
    assert "by the interval of the paired difference" in many.how
    assert "; the difference is 0.0" in many.sentence


@pytest.mark.parametrize("is_paired", [True, False])
def test_without_intervals_no_size_is_told_and_documents_are_asked_for(is_paired):
    few = "no interval: it needs at least 40 documents; there are 25, and texts may be missing"
    result = curve((64, 0.5, 0.0), (128, 0.2, 0.0))
    for point in result["points"]:
        point["metrics"]["fvu"] = measured(point["metrics"]["fvu"]["value"], reason=few)
    if is_paired:
        gap = measured(0.3, reason=few)
        result["points"][0]["from_largest"] = {"differences": {"fvu": gap}, "verdicts": {"fvu": "undecided"}}
    many = answers([result])[2]
    assert (many.word, many.tone) == ("undecided", "open")
    assert many.more == "Not decided: 25 documents, 40 are needed."
    page = size_curve(
        result | {"saekit": "0", "rows": {}, "sae": {"name": "a", "order": None}, "settings": {"each_size": "before"}}
    )
    assert page[0].intro.endswith("No intervals: 25 documents, 40 are needed.")
    assert "Bars" not in page[0].figures[0].caption


def test_what_was_not_asked_says_which_command_answers_it(evaluation):
    assert [(each.word, each.tone) for each in answers([evaluation])] == [("not asked", "none")] * 3
    assert ["saekit classify" in each.more for each in answers([evaluation])] == [True, False, False]


def test_one_sentence_says_what_was_measured(evaluation):
    known = {"model": "builtin", "hook": "layers.2", "layer": 2, "data": "builtin", "rows_seen": 4000}
    for number, entry in enumerate(evaluation["entries"]):
        entry["sae"] |= {"digest": f"d{number}", "provenance": known}
    rows = {**evaluation["rows"], "data": "x.csv", "data_split": "heldout"}
    assert sentence([{**evaluation, "rows": rows}], "3 May 2026") == (
        "Two SAEs of 1,024 latents on layer 2 of the built-in model, trained on 4,000 rows of the built-in corpus and "
        "measured on 12,345 held-out rows of x.csv; 3 May 2026."
    )
    assert sentence([{"kind": "training"}]) == "Results."
