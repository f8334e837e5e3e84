"""The demo from end to end, very small: every question is answered, on screens of any width."""

from __future__ import annotations

import json
from pathlib import Path

from saekit.cli import demo

TINY = demo.Size(tokens=2_048, latents=64, test_rows=512, test_tokens=128, paragraphs=0, explained_tokens=2_048)


def test_the_demo_answers_every_question_that_needs_no_labels(call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo, "SHORT", TINY)
        status, out, err = call("demo", "--out", "demo", "--short", "--data", "builtin@heldout")
    assert status == 0, err
    for question in ("faithful?", "real?", "How many"):
        assert question in out
    assert "float" not in out  # rows of training and of the test have one precision: no note
    assert max(map(len, out.splitlines())) <= 100
    assert out.splitlines()[-1].endswith("Open demo/report.html")
    page = Path("demo/report.html").read_text(encoding="utf-8")
    assert page.count('<article class="verdict') == 3
    assert "64 latents, layers.2, seed 0" in page  # whose latents the page shows one by one
    assert {"held-out", "train", "evaluate", "compare", "sizes", "explain"} <= {
        line.split(":")[0].split()[0] for line in err.splitlines()
    }


def test_its_json_is_of_its_own_kind(call, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo, "run", lambda *_, **__: {"evaluation": Plain(kind="evaluation", metrics={}), "x": Plain()})
        patch.setattr("saekit.report.results_folder.write_report", lambda *_, **__: "page")
        status, out, err = call("demo", "--out", "demo", "--short", "--json")
    assert status == 0, err
    assert json.loads(out)["kind"] == "demo"
    assert json.loads(out)["metrics"] == {}


class Plain:
    def __init__(self, **facts):
        self.facts = facts

    def to_json(self):
        return dict(self.facts)
