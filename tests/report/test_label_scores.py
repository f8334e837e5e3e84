"""What a language model says about labels, on the page."""

from __future__ import annotations

from fixtures.results import NASTY, measured
from saekit import report
from saekit.explanation.label_scores_result import LabelScore, LabelScores, LabelTest
from saekit.measure.results import Measured
from saekit.report.page import RENDERERS


def test_tests_of_labels_stand_next_to_those_of_other_labels():
    def tested(auc: float) -> LabelTest:
        return LabelTest("detection", Measured(auc, auc - 0.1, auc + 0.1), 20, 1, 0.5, 0.9, 0.6, 0.45, 0.98)

    result = LabelScores(
        saekit="0", versions={}, settings={}, sae={"digest": "d"}, model={}, hook="layers.1", data={},
        judge={"name": NASTY, "missing": 2, "prompts": 1200},
        means={"detection": Measured(0.7, 0.6, 0.8), "detection_other_label": Measured(0.5)},
        scores=[LabelScore(1, NASTY, [tested(0.6)]), LabelScore(2, "b", [tested(0.8)]),
                LabelScore(3, "c", reason="it never fires")],
    )  # fmt: skip
    plain = result.to_json()
    main, *_ = RENDERERS["label_scores"](plain)
    rows = [[cell.text for cell in row] for row in main.tables[0].rows]
    assert rows[0] == ["#2", "b", "detection", "0.800", "0.6", "0.45", "98", "20", "1"]
    assert rows[1][0] == "#1"
    page = report.render([plain, {"kind": "training", "learners": {}}])
    assert "<b>" not in page.split("<script")[0]
    assert measured(0.8)["value"] in [row[3].value for row in main.tables[0].rows]
