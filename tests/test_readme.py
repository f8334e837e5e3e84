"""The tour of the README runs as it stands, only smaller."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import saekit as sk
from saekit.cli.app import run
from saekit.evaluation.settings import EvaluationSettings

ROOT = Path(__file__).resolve().parents[1]
SMALL_TRAINING = "--set batch_rows=256"
SMALL_FITS = "--set budget.C=[1.0] --set budget.inner=2 --set budget.widen=0"
SMALL_MEASURE = "--set max_rows=512 --set tokens=256"


def fences(language: str) -> list[str]:
    """Return the blocks of the README in a language; those without one are the shell's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def smaller(code: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    return code


@pytest.mark.slow
def test_the_python_tour(tmp_path, monkeypatch):
    code = smaller(
        "\n".join(fences("python")),
        {
            "tokens=200_000": "tokens=3_000", "n_latents=1024": "n_latents=256",
            'data="builtin@heldout")': 'data="builtin@heldout", settings=FEW)', "clf.fit": "answer = clf.fit",
        },
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        names: dict = {"FEW": EvaluationSettings(max_rows=512, tokens=256)}
        exec(compile(code, "README.md", "exec"), names)
    assert names["result"].entries[0].metrics.fvu.value < 1
    assert names["result"].entries[0].controls["pca"].differences["fvu"].unit == "fraction"
    assert names["codes"].to_scipy().shape == (1000, 256)
    assert names["x_hat"].shape == names["x"].shape
    assert names["small"].n_latents == 256
    assert names["answer"].tolist() == ["raises"]
    assert names["sk"] is sk


@pytest.mark.slow
def test_the_shell_tour(tmp_path, monkeypatch, capsys):
    """Every command of the tour ends with 0 and says something; numbers are smaller, the rest is as it stands."""
    [tour] = [block for block in fences("") if block.startswith("saekit capture")]
    tour = smaller(
        tour,
        {
            "--tokens 200000": "--tokens 4000", "--latents 1024": "--latents 128",
            "--seeds 0,1 --out run": f"--seeds 0,1 --out run {SMALL_TRAINING}",
            "--data builtin@heldout": f"--data builtin@heldout {SMALL_MEASURE}", "topk-1024": "topk-128",
            "--sizes 64,256": "--sizes 16,64", "small/64": "small/16",
            "--ks 4,64": "--ks 4,16", "--limit 3000": f"--limit 3000 {SMALL_FITS}",
        },
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        for line in tour.replace("\\\n", " ").strip().splitlines():
            status = run(shlex.split(line)[1:])
            out, err = capsys.readouterr()
            assert status == 0, f"{line}\n{err}"
            assert out.strip(), line
    assert (tmp_path / "run" / "report.html").is_file()
