"""How evaluations are shown."""

from __future__ import annotations

from fixtures.results import measured
from saekit import report
from saekit.report.evaluation import evaluation as show
from saekit.report.evaluation import verification


def test_controls_and_intervals_are_shown(evaluation):
    text = report.render([evaluation])
    assert text.count("↳ untrained") == 2
    assert text.count("↳ pca") == 2
    assert "0.240 to 0.260" in text
    assert 'class="control"' in text


def test_a_page_without_intervals_says_why_once(evaluation):
    few = "no interval: it needs at least 40 documents; there are 25, and texts may be missing"
    assert "Small numbers are 95% intervals over documents" in show(evaluation)[0].intro
    for entry in evaluation["entries"]:
        entry["metrics"] = {name: measured(each["value"], reason=few) for name, each in entry["metrics"].items()}
        entry["metrics"]["dead_fraction"] = measured(0.1, 0.05, 0.2, reason="over latents")
        entry["metrics"]["decoder_projection"] = measured(0.1, 0.05, 0.2, reason="interval from 20 runs of rows")
    intro = show(evaluation)[0].intro
    assert "No intervals: 25 documents, 40 are needed. Grey" in intro
    assert "Small" not in intro


def test_what_an_sae_states_stands_next_to_what_was_measured():
    about = {"saekit": "0.1.0", "versions": {}, "settings": {}, "sae": {"n_latents": 8}, "rows": {"data": "x"}}
    numbers = {"fvu": measured(1.7, 1.6, 1.8), "l0": measured(90.0), "dead_fraction": measured(0.1)}
    cause = {"what": "<b>scale</b> the rows", "fvu": 0.2, "l0": 16.0}
    found = {**about, **numbers, "kind": "verification", "schema": 1, "hook": "layers.2", "n_rows": 4000,
             "claimed": {"l0": 16.0}, "fits": False, "likely_causes": [cause]}  # fmt: skip
    text = report.render([found])
    assert "It does not fit at <code>layers.2</code>, on 4,000 rows." in text
    rows = [[cell.text for cell in row] for table in verification(found)[0].tables for row in table.rows]
    assert rows == [
        ["FVU", "1.70", "–"],
        ["L0", "90", "16"],
        ["dead", "0.1", "–"],
        ["<b>scale</b> the rows", "0.2", "16"],
    ]


def test_charts_follow_the_colours_of_the_page(evaluation):
    svg = show(evaluation)[0].figures[0].svg
    assert "currentColor" in svg
    assert "#123456" not in svg
    assert "<?xml" not in svg
    assert "metadata" not in svg


def test_without_a_language_model_or_controls(evaluation):
    evaluation["language_model"] = None
    for each in evaluation["entries"]:
        each["controls"] = {}
        each["metrics"].pop("ce_sae")
    assert "CE with SAE" not in report.render([evaluation])
