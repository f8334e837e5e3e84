"""Which latents decided about texts, on the page."""

from __future__ import annotations

import json

import pytest

from fixtures.results import NASTY
from saekit.classification.decisions import Explanation, Firing, Reason
from saekit.classification.decisions_result import Decisions
from saekit.errors import FormatError
from saekit.files import dump_json, seal
from saekit.report import render
from saekit.report.page import RENDERERS
from saekit.report.results_folder import collect


def explained(sae: str = "d") -> Decisions:
    reasons = (
        Reason(17, f"`cash` {NASTY}", 2.0, 0.5, 1.0, (Firing(3, f" cash{NASTY}", 2.0),)),
        Reason(4, "", 1.0, -0.25, -0.25, ()),
    )
    few = Explanation("pay me", "spam", {"spam": 0.75, "ham": 0.25}, 1.0, 0.5, reasons[:1], 0.0, 1.0, 1.0, 8)
    found = Explanation("pay me", "spam", {"spam": 0.875, "ham": 0.125}, 2.0, 0.75, reasons, 0.5, 0.6, 0.7, None, few)
    return Decisions(
        saekit="0", versions={}, settings={}, sae={"digest": sae, "n_latents": 32}, model={"name": "m"},
        arm="SAE sum", predictions=[found],
    )  # fmt: skip


def test_a_text_is_shown_with_the_latents_that_decided():
    result = explained()
    assert Decisions.from_json(json.loads(json.dumps(result.to_json()))) == result
    _, document, _ = RENDERERS["decisions"](result.to_json())
    assert document.title == "spam, 88%"
    assert document.tables[0].rows[0][0].text == "pay me"
    assert [[cell.text for cell in row][-3:] for row in document.tables[1].rows] == [
        ["2", "+0.500", "+1.000"], ["1", "−0.250", "−0.250"],
    ]  # fmt: skip
    assert [row[1] for row in document.figures[0].chart.rows] == [1.0, -0.25, 0.5, 0.75]
    assert "carry 70% of what moved the logit" in document.intro
    assert "The sparse arm, of 8 latents, says spam (75%)" in document.intro
    page = render([result])
    assert "<b>" not in page.split("<script")[0]
    assert 'href="#f17"' not in page  # no card of it is on the page
    assert result.table()[1] == ["pay me", "spam", "0.88", "70%"]


def test_the_card_of_a_saved_classifier_says_what_speaks_for_each_class(tmp_path):
    top = {"spam": [{"latent": 17, "weight": 0.5, "label": NASTY}], "ham": [{"latent": 4, "weight": 0.25, "label": ""}]}
    file = tmp_path / "classifier" / "classifier.json"
    file.parent.mkdir()
    file.write_text(
        dump_json(seal({"kind": "classifier", "schema": 2, "arm": "SAE sum", "sae": "d", "top_latents": top}))
    )
    [found] = collect(tmp_path).results
    [section] = RENDERERS["classifier"](found)
    assert [[cell.text for cell in row][:2] for row in section.tables[0].rows] == [["spam", "#17"], ["ham", "#4"]]
    assert "<b>" not in render([found]).split("<script")[0]
    file.write_text(file.read_text().replace("SAE sum", "SAE max"))
    with pytest.raises(FormatError, match="its seal does not fit"):
        collect(tmp_path)
