"""Explanations on the page: scores next to their controls, and what they do not tell."""

from __future__ import annotations

from fixtures.results import NASTY, measured
from saekit.measure.results import Measured
from saekit.report import render
from saekit.report.browser import name_of, names_of
from saekit.report.explanation import explanation, without_cards


def explained(*tells: bool | None) -> dict:
    null = {"control": "random", "value": measured(0.6), "difference": measured(0.1), "verdict": "better"}
    scores = [
        {"name": f"score_{n}", "meaning": NASTY, "value": measured(0.7, 0.6, 0.8), "nulls": [null],
         "tells_random_apart": each}
        for n, each in enumerate(tells)
    ]  # fmt: skip
    return {
        "kind": "explanation", "schema": 2, "saekit": "0", "versions": {}, "settings": {}, "hook": "layers.1",
        "sae": {"n_latents": 4}, "model": {}, "data": {"name": "texts"}, "detection": measured(0.7),
        "detection_null": measured(0.5), "told_fraction": measured(0.5), "fired_fraction": 1.0, "cards": [],
        "scores": scores, "controls": [{"name": "random", "what": NASTY, "n_latents": 4, "seconds": 1.0}],
        "groups": [{"by": "sharing", "name": "orphan", "n_latents": 3, "scores": {"score_0": measured(0.25)}}],
    }  # fmt: skip


def test_scores_that_cannot_tell_learned_latents_from_random_ones_say_so():
    main, _, scored, _ = explanation(explained(True, False, None))
    assert "latents from ones that were not learned: score 0 (1 of 2); the others are no evidence" in main.intro
    assert [[cell.text for cell in row] for row in scored.tables[0].rows][1] == [
        "score 1", "0.700", "0.6", "random: better", "no", "not asked",
    ]  # fmt: skip
    assert [cell.text for cell in scored.tables[1].rows[0]] == ["sharing: orphan", "3", "0.25"]
    assert "None of 1 scores tells these latents" in explanation(explained(False))[0].intro
    assert "not learned" not in explanation(explained(None))[0].intro
    assert "<b>" not in render([explained(True)]).split("<script")[0]


def test_cards_are_not_embedded_twice():
    assert without_cards(explained(True)) == explained(True)
    assert without_cards({**explained(True), "cards": [{}, {}]})["cards"]["left_out"] == 2


def test_every_score_says_whether_it_tells_a_trained_model_from_a_random_one():
    """For every score: yes, no, or that it was not asked; in the sentence on top and in the table."""
    assert "trained model from a random one was not asked" in explanation(explained(True))[0].intro
    result = explained(True, False, None)
    for score, verdict in zip(result["scores"], ("better", "undecided", "undefined"), strict=True):
        score["nulls"] = [*score["nulls"], {**score["nulls"][0], "control": "randomized", "verdict": verdict}]
    main, _, scored, _ = explanation(result)
    assert "the same architecture with random weights: score 0; these do not: score 1." in main.intro
    table = scored.tables[0]
    at = list(table.columns).index("tells a trained model from a random one")
    assert [row[at].text for row in table.rows] == ["yes", "no", "not asked"]


def test_measured_quantities_of_a_card_have_one_text():
    from saekit.report.browser import _with_texts

    effect = {"kl": measured(0.026949, 0.0203, 0.0311), "doses": [{"rise": measured(1234.4)}], "p99": 2.0}
    found = _with_texts(effect)
    assert found["kl"]["text"] == "0.0269 (0.020 to 0.031)"
    assert str(Measured(0.026949, 0.0203, 0.0311)) == "0.0269 [0.020, 0.031]"
    assert found["doses"][0]["rise"]["text"] == str(Measured(1234.4)) == "1,234"
    assert found["p99"] == 2.0


def test_saes_of_one_name_are_told_apart():
    """By digest; where that is the same (explained twice), by number."""
    one = explained(True)
    several = [{**one, "sae": {**one["sae"], "digest": f"sha256:{digest}"}} for digest in ("aa", "bb", "bb")]
    name = name_of(one)
    assert names_of(several) == [f"{name} (aa)", f"{name} (bb) (2)", f"{name} (bb) (3)"]
    assert names_of([one]) == [name]
    assert names_of([one, {**one, "hook": "layers.2"}]) == [name, name.replace("layers.1", "layers.2")]
