"""The log: sums over steps, the file, progress, and where the time went."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.training_runs import source
from saekit import SyntheticRows
from saekit.rows.source import Batch
from saekit.training import log
from saekit.training.config import PAnneal, ReLU, TopK
from saekit.training.log import cut_log
from saekit.training.loop import train, untrained
from saekit.training.settings import TrainSettings


def test_logged_loss_does_not_depend_on_log_every():
    records = {}
    for every in (1, 5):
        kept = records.setdefault(every, [])
        train(
            [TopK(24, k=3), PAnneal(24)],
            source(),
            settings=TrainSettings(batch_rows=200, log_every=every),
            callbacks=[kept.append],
        )
    for learner in ("topk-24-k3-seed0", "p-anneal-24-l1-2-seed0"):
        fine = [r for r in records[1] if r["learner"] == learner]
        coarse = [r for r in records[5] if r["learner"] == learner]
        assert len(fine) == 20
        assert len(coarse) == 4
        for name in ("loss", "l0", "reconstruction", "grad_norm"):
            means = np.array([r[name] for r in fine]).reshape(4, 5).mean(1)
            np.testing.assert_allclose(means, [r[name] for r in coarse], rtol=1e-9)
        assert fine[-1]["dead_fraction"] == coarse[-1]["dead_fraction"]


def test_logged_fvu_is_the_sum_of_errors_over_the_sum_of_variance():
    kept = []
    rows = source(1000)
    config = TopK(24, k=3, control="untrained")
    train(config, rows, settings=TrainSettings(batch_rows=250, log_every=4), callbacks=[kept.append])
    sae = untrained(config, rows, settings=TrainSettings(batch_rows=250))
    x = torch.cat([b.x for b in rows.batches(250)]).double()
    fvu = (x - sae.reconstruct(x.float())).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert kept[-1]["fvu"] == pytest.approx(float(fvu), rel=1e-5)


def test_progress_reports_every_log_step():
    seen = []

    def progress(stage, done, total=None, note=""):
        seen.append((stage, done, total, note))

    train(
        [TopK(24, k=3), ReLU(24)], source(1000), settings=TrainSettings(batch_rows=100, log_every=4), progress=progress
    )
    assert [each[:3] for each in seen] == [("train", 400, 1000), ("train", 800, 1000), ("train", 1000, 1000)]
    assert all(re.fullmatch(r"[\d,]+ rows/s  FVU \S+  L0 \S+  dead \S+%", each[3]) for each in seen), seen


def test_where_the_time_went_is_in_the_run(tmp_path: Path) -> None:
    class Slow:
        """Rows with a language model behind them, so to speak."""

        def __init__(self) -> None:
            self.rows = SyntheticRows(d_in=8, n_features=16, n_rows=1000)
            self.d_in, self.n_rows, self.info = 8, 1000, self.rows.info
            self.seconds = {"lm": 100.0}

        def batches(self, batch_rows: int, **options: Any) -> Iterator[Batch]:
            for batch in self.rows.batches(batch_rows, **options):
                self.seconds["lm"] += 1.0
                yield batch

    run = {"tokens": 1000, "settings": TrainSettings(batch_rows=100)}
    train(TopK(16, k=2), Slow(), out=tmp_path / "run", **run)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["seconds"]
    assert recorded["model"] == 10.0
    assert 0 < recorded["start"] + recorded["rows"] + recorded["steps"] <= recorded["total"]
    assert recorded["steps_fraction"] == pytest.approx(recorded["steps"] / recorded["total"])
    train(TopK(16, k=2), SyntheticRows(d_in=8, n_features=16, n_rows=1000), out=tmp_path / "plain", **run)
    assert "model" not in json.loads((tmp_path / "plain" / "run.json").read_text())["seconds"]


def test_lines_after_a_step_and_a_half_written_one_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 5, "loss": 2.0}\n{"step": 10, "loss": 1.0}\n{"step": 15, "lo')
    cut_log(path, 10)
    assert path.read_text() == '{"step": 5, "loss": 2.0}\n{"step": 10, "loss": 1.0}\n'
    cut_log(path, 7)
    assert path.read_text() == '{"step": 5, "loss": 2.0}\n'
    cut_log(tmp_path / "none.jsonl", 7)


def test_sums_over_rows_are_done_where_torch_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, right, before = [], log._row_sums, torch.get_num_threads()
    monkeypatch.setattr("saekit.kernels.cpu.threads.GRAIN", 1)
    monkeypatch.setattr(log, "_row_sums", lambda *given: (seen.append(torch.get_num_threads()), right(*given))[1])
    torch.set_num_threads(2)
    try:
        train(TopK(16, k=2), source(), tokens=400, settings=TrainSettings(batch_rows=200))
        assert seen == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
