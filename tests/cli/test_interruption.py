"""Ctrl-C and SIGTERM during commands: status 130, no traceback, and the line that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fixtures.kills import contents
from fixtures.tiny_models import TEXTS, make_model
from saekit.rows.synthetic import SyntheticRows
from saekit.training import loop

TRAIN = ("train", "--rows", "rows.npy", "--arch", "topk", "--latents", "32", "--k", "4", "--set", "batch_rows=64")

pytestmark = pytest.mark.usefixtures("ctrl_c")


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, next(iter(SyntheticRows(d_in=12, n_features=24, n_rows=2048).batches(2048))).x.numpy())
    return path


def _interrupt(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_line_that_train_prints_goes_on(call, rows, monkeypatch):
    assert call(*TRAIN, "--out", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_batch", lambda *args, real=loop.train_batch: (real(*args), _interrupt()))
        status, out, err = call(*TRAIN, "--out", "cut")
    assert status == 130
    assert out == ""
    line = f"train: interrupted after step 1 of 32. To go on: saekit {' '.join(TRAIN)} --out cut --resume"
    assert err.splitlines()[-1] == line
    assert call(*line.partition("saekit ")[2].split())[0] == 0
    assert contents(Path("cut")) == contents(Path("whole"))


def test_the_line_that_capture_prints_goes_on(call, tmp_path):
    make_model("llama", tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    arguments = ("capture", "--model", "model", "--data", "texts.jsonl", "--layer", "1", "--out")
    assert call(*arguments, "whole")[0] == 0
    from saekit.rows import capture

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture.Sink, "take", lambda *args, take=capture.Sink.take: (take(*args), _interrupt()))
        status, _, err = call(*arguments, "cut")
    assert status == 130
    last = err.splitlines()[-1]
    assert last.startswith("capture: interrupted after ")
    assert last.endswith(f" rows. To go on: saekit {' '.join(arguments)} cut")
    assert list(Path("cut").glob("part-*.safetensors"))
    assert call(*arguments, "cut")[0] == 0
    assert contents(Path("cut")) == contents(Path("whole"))


@pytest.mark.parametrize(
    ("arguments", "patched", "said"),
    [
        ((*TRAIN, "--out", "run"), "saekit.training.loop.begin", "To go on: saekit train"),
        (
            ("prune", "SAE", "--sizes", "8", "--out", "x"),
            "saekit.sizes.run.study_pruning",
            "To begin again: saekit prune",
        ),
        (
            ("progressive", "RUN", "--out", "x"),
            "saekit.sizes.run.plan_study",
            "To begin again: saekit progressive",
        ),
    ],
)
def test_before_anything_is_kept_or_where_nothing_is(call, rows, monkeypatch, arguments, patched, said):
    with monkeypatch.context() as patch:
        patch.setattr(patched, _interrupt)
        status, _, err = call(*arguments)
    assert status == 130
    assert err.splitlines()[-1].startswith(f"interrupted. {said}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process(rows, tmp_path, number):
    command = [sys.executable, "-m", "saekit", *TRAIN, "--tokens", "100000000", "--out", "run", "--set", "log_every=1"]
    # in a shell's background job Ctrl-C is ignored, and so in its children
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        log = tmp_path / "run" / "log.jsonl"
        while process.poll() is None and not log.is_file():
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "To go on: saekit train --rows rows.npy" in err.splitlines()[-1]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*.safetensors"))
