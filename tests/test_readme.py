"""The tour of the README runs as it stands, only smaller."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import saekit as sk
from saekit.evaluation.settings import EvaluationSettings

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_python_tour(tmp_path, monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    smaller = {"tokens=200_000": "tokens=3_000", "n_latents=1024": "n_latents=256", "batch_rows=512": "batch_rows=256"}
    for old, new in smaller.items():
        assert old in code
        code = code.replace(old, new)
    code = code.replace('data="builtin@heldout")', 'data="builtin@heldout", settings=FEW)')
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        names: dict = {"FEW": EvaluationSettings(max_rows=512, tokens=256)}
        exec(compile(code, "README.md", "exec"), names)
    assert names["result"].entries[0].metrics.fvu.value < 1
    assert names["result"].entries[0].controls["pca"].differences["fvu"].unit == "fraction"
    assert names["codes"].to_scipy().shape == (1000, 256)
    assert names["x_hat"].shape == names["x"].shape
    assert names["small"].n_latents == 256
    assert names["sk"] is sk
