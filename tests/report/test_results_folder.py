"""Results and training logs found in folders."""

from __future__ import annotations

import json
import re

import pytest

from saekit import report
from saekit.errors import ConfigError, FormatError
from saekit.evaluation.result import Evaluation
from saekit.report.results_folder import date_of, training_log, write_report


def test_collect_finds_results_and_logs(tmp_path, evaluation):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"batch_rows": 8}')
    (tmp_path / "run" / "log.jsonl").write_text(LOG)
    found = report.collect(tmp_path)
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
    date = date_of(tmp_path)
    assert re.fullmatch(r"\d{1,2} [A-Z][a-z]+ 20\d\d", date)
    assert page.read_text() == report.render([in_this_layout], title="Ours", date=date)
    (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation, "schema": 99}))
    with pytest.raises(FormatError, match=r"evaluation.json.*has schema 99.*Install the newer release"):
        write_report(tmp_path)
