"""Rows whose norm is out of all proportion are measured, left out and counted."""

from __future__ import annotations

import pytest
import torch

from fixtures.row_checks import TOLERANCE, everything
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings


def test_outliers_are_measured_skipped_and_counted(models, texts, small_groups):
    lm = models["llama"]
    kept_all = capture(lm, texts, layer=1, settings=CaptureSettings(outliers=None))
    x = everything(kept_all)["x"]
    median = float(x[:50].norm(dim=1).median())
    source = capture(lm, texts, layer=1, settings=CaptureSettings(outliers=1.2))
    recorded = source.info["filters"]["outliers"]
    assert recorded["median"] == pytest.approx(median, rel=1e-5)
    assert recorded["limit"] == pytest.approx(1.2 * median, rel=1e-5)
    assert recorded["n_measured"] == 50
    expected = x.norm(dim=1) <= 1.2 * median
    assert 0 < recorded["n"] == int((~expected).sum())
    torch.testing.assert_close(everything(source)["x"], x[expected], **TOLERANCE)
    assert kept_all.info["filters"]["outliers"] is None
    limited = capture(lm, texts, layer=1, tokens=100, settings=CaptureSettings(outliers=1.2))
    assert limited.n_rows == 100, "what the filter takes out is replaced"
