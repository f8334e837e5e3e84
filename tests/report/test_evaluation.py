"""How evaluations are shown."""

from __future__ import annotations

from saekit import report
from saekit.report.evaluation import evaluation as show


def test_controls_and_intervals_are_shown(evaluation):
    text = report.render([evaluation])
    assert text.count("↳ untrained") == 2
    assert text.count("↳ pca") == 2
    assert "0.240 to 0.260" in text
    assert 'class="control"' in text


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
