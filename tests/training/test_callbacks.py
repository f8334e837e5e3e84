"""Callbacks: services that log, and what to install for them."""

import sys

import pytest

from fixtures.training_runs import Interrupted, source
from saekit.errors import MissingExtraError
from saekit.training.callbacks import TensorBoard, Trackio
from saekit.training.config import TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings


def test_optional_callbacks_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'saekit\[trackio\]'"):
        Trackio(project="x")
    with pytest.raises(MissingExtraError, match=r"pip install 'saekit\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_service_callbacks_log_and_close(monkeypatch):
    import types

    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end")
    )
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **settings: run))
    train(
        TopK(24, k=3),
        source(400),
        settings=TrainSettings(batch_rows=100, log_every=2),
        callbacks=[Trackio(project="x")],
    )
    assert [call[0] for call in calls[:-1]] == [2, 4]
    assert "topk-24-k3-seed0/fvu" in calls[0][1]
    assert calls[-1] == "end"


def test_callbacks_are_closed_when_a_run_fails():
    class Closing:
        closed = 0

        def log(self, record):
            raise Interrupted

        def close(self):
            self.closed += 1

    callback = Closing()
    with pytest.raises(Interrupted):
        train(TopK(24, k=3), source(400), callbacks=[callback], settings=TrainSettings(batch_rows=100))
    assert callback.closed == 1
