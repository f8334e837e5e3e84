"""Resumed equals uninterrupted, to the last byte: after an exception, after a real kill at any write."""

import json
import os
import signal

import pytest

from fixtures.forks import call_in_forks
from fixtures.kills import contents
from fixtures.training_runs import ALL, Interrupted, log_of, same, source, stop_at
from saekit.training.loop import train
from saekit.training.settings import TrainSettings


def test_resume_equals_uninterrupted_for_every_architecture(tmp_path):
    settings = {
        "seeds": [0, 1], "settings": TrainSettings(batch_rows=100, log_every=3, checkpoint_every=7)
    }  # fmt: skip
    whole = train(ALL, source(), out=tmp_path / "whole", **settings)
    for stop in (12, 29):
        with pytest.raises(Interrupted):
            train(ALL, source(), out=tmp_path / "cut", resume=stop > 12, progress=stop_at(stop * 100), **settings)
    resumed = train(ALL, source(), out=tmp_path / "cut", resume=True, **settings)
    assert all(same(a, b) for a, b in zip(whole, resumed))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    for folder in sorted(p.name for p in (tmp_path / "whole").iterdir() if (p / "sae.json").exists()):
        for name in ("sae.safetensors", "sae.json"):
            assert (tmp_path / "whole" / folder / name).read_bytes() == (tmp_path / "cut" / folder / name).read_bytes()
    again = train(ALL, source(), out=tmp_path / "cut", resume=True, **settings)  # a finished run is read back
    assert all(same(a, b) for a, b in zip(whole, again))


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("every", [7, 1000])
def test_what_ctrl_c_interrupts_goes_on_and_ends_as_if_nothing_had_been(tmp_path, every):
    """Also before the first checkpoint is due, at a step that has one, and after the last step."""
    rows, configs = source(), [ALL[0], ALL[3]]
    settings = {"settings": TrainSettings(batch_rows=100, log_every=4, checkpoint_every=every)}
    train(configs, rows, out=tmp_path / "whole", **settings)

    def stop(step):
        def receive(record):
            if record["step"] == step and record["learner"].startswith("topk"):
                os.kill(os.getpid(), signal.SIGTERM if step == 28 else signal.SIGINT)

        return receive

    for step in (4, 28, 40):
        with pytest.raises(KeyboardInterrupt, match=f"train: interrupted after step {step} of 40; a checkpoint is in"):
            train(configs, rows, out=tmp_path / "cut", resume=True, callbacks=[stop(step)], **settings)
        assert (tmp_path / "cut" / "checkpoints" / f"step-{step:08d}.safetensors").is_file()
    train(configs, rows, out=tmp_path / "cut", resume=True, **settings)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 40; nothing is kept \(no `out`\)"):
        train(configs, rows, callbacks=[stop(4)], **settings)


CHILD = """
import os, signal
from saekit import BatchTopK, ReLU, SyntheticRows, TrainSettings, train

def killed_at(name, count):  # kill -9 in place of the call: what was to be written is there by halves or not at all
    true = getattr(os, name)
    def call(*args, **options):
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*args, **options)
    setattr(os, name, call)

def work(out, event="none", count=0):
    if event != "none":
        killed_at(event, count)
    rows = SyntheticRows(d_in=8, n_features=16, l0=3.0, n_rows=3_000, mean=1.0)
    settings = TrainSettings(batch_rows=50, log_every=10, checkpoint_every=5)
    train([BatchTopK(24, k=3), ReLU(24)], rows, seeds=[0, 1], settings=settings, out=out, resume=True, progress=False)
"""


def test_kill_nine_at_any_write_then_resume_gives_the_same_bytes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Of a checkpoint the tensors are renamed first, then the index: killed before the one, before the other, and
    # before the bytes of a third are on disk; at last when the SAEs are being saved.
    kills = [(str(cut), *event) for event in (("replace", 4), ("replace", 5), ("fsync", 7), ("replace", 20))]
    assert call_in_forks(CHILD, [(str(whole),), *kills, (str(cut),)]) == [None, *["killed"] * 4, None]
    for name in ("batchtopk-24-k3-seed0", "batchtopk-24-k3-seed1", "relu-24-l1-2-seed0", "relu-24-l1-2-seed1"):
        for file in ("sae.safetensors", "sae.json"):
            assert (whole / name / file).read_bytes() == (cut / name / file).read_bytes()
    assert log_of(whole) == log_of(cut)
    orders = [json.loads((out / "run.json").read_text())["order_digest"] for out in (whole, cut)]
    assert orders[0] == orders[1]
