"""Results and training logs found in folders."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from saekit import report
from saekit.cli.app import run
from saekit.errors import ConfigError, FormatError
from saekit.evaluation.result import Evaluation
from saekit.report import page as page_module
from saekit.report import results_folder as folder_module
from saekit.report.results_folder import training_log, write_report


def test_collect_finds_results_and_logs(tmp_path, evaluation):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"batch_rows": 8}')
    (tmp_path / "run" / "log.jsonl").write_text(LOG)
    found = report.collect(tmp_path).results
    assert [each["kind"] for each in found] == ["evaluation", "training"]
    assert found[1]["run"] == {"batch_rows": 8}
    assert found[1]["learners"]["topk-8-k2-seed0"]["fvu"] == [0.5, 0.25]
    report.write(found, tmp_path)


LOG = "".join(
    json.dumps(
        {"step": s, "rows": 8 * s, "learners": {"topk-8-k2-seed0": {"fvu": 1 / 2**s, "l0": 2.0, "dead_fraction": 0.0}}}
    )
    + "\n"
    for s in (1, 2)
)


def test_a_cut_off_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(LOG + '{"step": 3, "ro')
    assert training_log(path)["learners"]["topk-8-k2-seed0"]["rows"] == [8, 16]
    path.write_text("{oops\n" + LOG)
    with pytest.raises(FormatError, match="line 1 must be a JSON object"):
        training_log(path)


def test_folders_without_results(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        report.collect(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="must hold results"):
        report.collect(tmp_path)


def test_a_report_of_a_folder(tmp_path, evaluation):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(tmp_path, title="Ours")
    assert page == tmp_path / "report.html"
    in_this_layout = Evaluation.from_json(evaluation).to_json()
    date = report.collect(tmp_path).date
    assert re.fullmatch(r"\d{1,2} [A-Z][a-z]+ 20\d\d", date)
    assert page.read_text() == report.render([in_this_layout], title="Ours", date=date)
    (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation, "schema": 99}))
    with pytest.raises(FormatError, match=r"of 1 files .* none .*evaluation.json: .*has schema 99.*Install the newer"):
        write_report(tmp_path)


def test_every_kind_of_result_is_read_and_shown():
    source = Path(report.__file__).parents[1]
    text = "".join(path.read_text() for path in source.rglob("*.py"))
    kinds = set(re.findall(r'^    KIND: ClassVar\[str\] = "(\w+)"', text, re.MULTILINE))
    assert len(kinds) > 12
    kinds.remove("progressive_part")  # what workers leave for a result, and no page shows
    assert kinds <= folder_module._RESULTS.keys()
    assert kinds <= page_module.RENDERERS.keys()


def damaged(folder, evaluation) -> dict[str, str]:
    """Write files that cannot be read next to one that can; return what is said of each."""
    (folder / "good.json").write_text(json.dumps(evaluation))
    (folder / "cut.json").write_text(json.dumps(evaluation)[:-40])
    (folder / "newer.json").write_text(json.dumps({**evaluation, "schema": 99}))
    (folder / "altered.json").write_text(json.dumps({**evaluation, "entries": 3}))
    (folder / "<b>.json").write_text("")
    (folder / "gone.json").symlink_to(folder / "nowhere.json")
    os.mkfifo(folder / "pipe.json")
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text("{oops\n" + LOG)
    (folder / "run" / "classifier.json").write_text("{}")
    (folder / "folder.json").mkdir()
    (folder / "loop").symlink_to(folder)
    return {
        "<b>.json": "JSON", "altered.json": "entries", "cut.json": "JSON", "newer.json": "schema 99",
        "gone.json": "a link to a file that is not there", "pipe.json": "a pipe", "run/log.jsonl": "line 1",
        "run/classifier.json": "",
    }  # fmt: skip


def test_what_cannot_be_read_is_named_and_the_page_is_made_of_the_rest(tmp_path, evaluation):
    about = damaged(tmp_path, evaluation)
    found = report.collect(tmp_path)
    assert [each["kind"] for each in found.results] == ["evaluation"]  # once, in spite of the link to the folder
    own = {each.file: each.why for each in found.unread}
    assert own.keys() == about.keys()
    for file, part in about.items():
        assert part in own[file]
        assert str(tmp_path) not in own[file]
    with pytest.warns(UserWarning, match=r"made without what cannot be read:\n  <b>.json: "):
        page = write_report(tmp_path).read_text()
    assert "files that cannot be read</h2>" in page
    assert page.index('id="unread"') < page.index('id="answers"')
    assert "<code><bdi>&lt;b&gt;.json</bdi></code>" in page


def test_the_command_names_them_and_fails(tmp_path, evaluation, capsys):
    (tmp_path / "good.json").write_text(json.dumps(evaluation))
    assert run(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unread"] == []
    assert 'id="unread"' not in (tmp_path / "report.html").read_text()
    damaged(tmp_path, evaluation)
    assert run(["report", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'report.html'}\n"
    assert "\n  newer.json: this evaluation has schema 99" in told.err
    assert run(["report", str(tmp_path), "--json"]) == 1
    plain = json.loads(capsys.readouterr().out)
    assert {"file": "gone.json", "why": "a link to a file that is not there"} in plain["unread"]


def test_a_result_that_cannot_be_shown_does_not_stop_the_others(tmp_path, evaluation, monkeypatch):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "log.jsonl").write_text(LOG)
    monkeypatch.setitem(page_module.RENDERERS, "training", lambda result: [result["nothing"]])
    found = report.collect(tmp_path)
    assert [each["kind"] for each in found.results] == ["evaluation"]
    assert [(each.file, "cannot be shown" in each.why) for each in found.unread] == [("log.jsonl", True)]


def test_every_result_is_shown_once(tmp_path, evaluation, monkeypatch):
    """What tells whether a result can be shown is what stands on the page."""
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    made, show = [], page_module.RENDERERS["evaluation"]
    monkeypatch.setitem(page_module.RENDERERS, "evaluation", lambda result: made.append(result) or show(result))
    first = write_report(tmp_path).read_text()
    assert len(made) == 1
    assert run(["report", str(tmp_path)]) == 0
    assert len(made) == 2
    assert report.write(report.collect(tmp_path).results, tmp_path).read_text().count("<section") == first.count(
        "<section"
    )


def test_what_only_the_first_screen_cannot_show_does_not_stop_the_others(tmp_path, evaluation, monkeypatch):
    for name, rows in (("a", 10), ("b", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps({**evaluation, "n_rows": rows}))
    assert len(report.collect(tmp_path).results) == 2  # both can be shown
    shown = page_module.answers

    def answers(results):
        return shown([each for each in results if each["n_rows"] == 10 or each["missing"]])

    monkeypatch.setattr(page_module, "answers", answers)
    found = report.collect(tmp_path)
    assert [each["n_rows"] for each in found.results] == [10]
    assert [each.file for each in found.unread] == ["b/evaluation.json"]
