"""One definition of the fraction of variance unexplained, and of rows that do not vary, in training and measuring."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SAE, TopK, TrainSettings, evaluate, measure_sizes, progressive, train
from saekit.cli import app
from saekit.errors import DataError
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure.accumulators import fvu
from saekit.report.page import render
from saekit.report.results_folder import training_log
from saekit.sae.rules import TopKRule
from saekit.sizes.settings import ProgressiveSettings, SizeSettings
from saekit.variance import SAME_ROWS, fraction_unexplained

QUICK = TrainSettings(batch_rows=100)


def row(scale: float) -> torch.Tensor:
    return scale * torch.randn(1, 16, generator=torch.Generator().manual_seed(0))


def sae() -> SAE:
    W = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    return SAE(W_enc=W, b_enc=torch.zeros(32), W_dec=W, b_dec=torch.zeros(16), rule=TopKRule(4))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 7.3, 1e3, 1e15])
@pytest.mark.parametrize("n", [100, 500])
def test_one_row_repeated_has_no_fvu_anywhere(scale: float, n: int, tmp_path: Path) -> None:
    rows = row(scale).repeat(n, 1)
    notes: list[str] = []
    config = TopK(32, k=4, scaling="none")
    [trained] = train(
        config, rows, tokens=400, settings=QUICK, out=tmp_path, progress=lambda *call: notes.append(call[3])
    )
    assert trained.provenance["metrics"]["fvu"] is None
    assert "FVU undefined" in notes[-1]
    record = json.loads((tmp_path / "run.json").read_text())
    assert any(each["code"] == "rows_do_not_vary" and SAME_ROWS in each["message"] for each in record["warnings"])
    found = evaluate(sae(), rows, settings=EvaluationSettings())
    assert found.metrics.fvu.reason == found.metrics.ev_legacy.reason == f"undefined: {SAME_ROWS}"
    assert np.isnan(fvu(rows, torch.zeros_like(rows)))
    assert SAME_ROWS in render([found, training_log(tmp_path / "log.jsonl")])


def test_curves_say_it_too() -> None:
    rows = row(1.0).repeat(200, 1)
    curve = measure_sizes(sae(), rows, [16, 32], settings=SizeSettings(sample_rows=0))
    assert {point.metrics.fvu.reason for point in curve.points} == {f"undefined: {SAME_ROWS}"}
    settings = ProgressiveSettings(sample_rows=0, latents=False, by=("unsorted",))
    found = progressive([sae()], rows, sizes=[16, 32], settings=settings)
    assert all(SAME_ROWS in str(point.metrics.fvu.reason) for point in found.curves)


@pytest.mark.parametrize("away", [1e-4, 1.0, 1e3])
def test_training_and_measuring_agree_on_rows_that_vary(away: float, tmp_path: Path) -> None:
    """Rows far from zero, in units of their spread, included."""
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(2)) + away
    config = TopK(32, k=4, scaling="none", lr=1e-12)  # does not move: the last batches see one function
    [trained] = train(config, x, tokens=400, settings=TrainSettings(batch_rows=100, log_every=4))
    assert trained.provenance["metrics"]["fvu"] == pytest.approx(fvu(x, trained.reconstruct(x)), rel=1e-2)


def test_a_fraction_of_nothing_is_undefined_and_scale_changes_nothing() -> None:
    for scale in (1e-20, 1.0, 1e20):
        assert float(fraction_unexplained(2 * scale, 4 * scale, 9 * scale)) == 0.5
        assert np.isnan(fraction_unexplained(0.0, 0.0, scale))
        assert np.isnan(fraction_unexplained(scale, 1e-16 * scale, scale))


def test_rows_whose_squares_overflow_are_told_to_be_scaled() -> None:
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(3))
    with pytest.raises(DataError, match=r"squared norms of rows must fit into float32; row 0 .* Scale the rows"):
        train(TopK(32, k=4), x * 1e30, settings=QUICK)
    settings = EvaluationSettings(intervals=False, controls=False)
    flat = sae()
    small, large = (evaluate(flat, x * scale, settings=settings).metrics.fvu.value for scale in (1.0, 1e30))
    assert small == pytest.approx(large, rel=1e-5)


def test_the_command_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", row(1.0).repeat(400, 1).numpy())
    command = ["train", "--arch", "topk", "--latents", "32", "--k", "4", "--set", "batch_rows=100", "--rows"]
    assert app.run([*command, str(tmp_path / "x.npy"), "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr()
    assert "–" in out.out
    assert SAME_ROWS in out.out + out.err
