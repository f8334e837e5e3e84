"""Sections of effects and steered texts."""

from __future__ import annotations

from saekit.explanation.effects_result import Dose, Effect, Effects
from saekit.explanation.steering import Generated, Steered, SteeredPrompt
from saekit.measure.results import Measured
from saekit.report.page import RENDERERS
from saekit.report.results_folder import write_report

FACTS = {
    "saekit": "0",
    "versions": {},
    "settings": {},
    "sae": {"latents": 4},
    "model": {"model": "m"},
    "hook": "layers.1",
}
NULL = {"latents": [0.1], "directions": [0.2]}
TOLD = {"latents": 100.0, "directions": 100.0}


def test_effects_and_texts_are_shown_as_text(tmp_path):
    kl = Measured(0.5, 0.4, 0.6, "nats")
    dose = Dose(1.0, 3.0, 0.2, kl, 90.0, kl, 0.1, 100.0)
    acting = Effect(
        1, 0.01, 2.0, ["<b>x</b>"], 3, 9, kl, 0.1, NULL, TOLD, kl, NULL, TOLD, [dose], "acts", kl, 0.25, promotes=True
    )
    effects = Effects(**FACTS, data={"name": "d"}, effects=[acting, Effect.untested(2, 0.0, "it never fires")])
    run = Generated(" <script>alert(1)</script>", 0.5, 3.0, 0.2, 0.1)
    steered = Steered(
        **FACTS,
        edits={"1": "set 8"},
        prompts=[SteeredPrompt("once", run, run, [run]), SteeredPrompt("then", run, run, [])],
    )
    main, doses, _ = RENDERERS["effects"](effects.to_json())
    assert [[row[at].text for at in (6, 7, 8)] for row in main.tables[0].rows] == [
        ["0.500", "0.25", "acts"],
        ["–", "–", "not tested"],
    ]
    assert main.tables[0].muted == {1}
    assert len(doses.tables[0].rows) == 1
    assert "it never fires" in effects.caption()
    for each in (effects, steered):
        each.save(tmp_path / f"{each.KIND}.json")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<b>x</b>" not in page
