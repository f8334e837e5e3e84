"""Checkpoints: two generations, the older one where the newer is damaged, refusal of what cannot be read."""

import json

import pytest
import torch

from fixtures.training_runs import Interrupted, log_of, same, source, stop_at
from saekit.errors import FormatError
from saekit.files import write_sealed
from saekit.training import checkpoint as checkpoints
from saekit.training.config import TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings


def test_altered_checkpoint_falls_back_to_the_one_before(tmp_path):
    settings = {"settings": TrainSettings(batch_rows=100, checkpoint_every=5, log_every=5)}
    [whole] = train(TopK(24, k=3), source(), out=tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        train(TopK(24, k=3), source(), out=tmp_path / "cut", progress=stop_at(2000), **settings)
    files = sorted((tmp_path / "cut" / "checkpoints").glob("*.safetensors"))
    assert [f.name for f in files] == ["step-00000010.safetensors", "step-00000015.safetensors"]
    data = bytearray(files[-1].read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)  # still a readable file, with other numbers
    files[-1].write_bytes(data)
    [resumed] = train(TopK(24, k=3), source(), out=tmp_path / "cut", resume=True, **settings)
    assert same(whole, resumed)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")


def test_all_checkpoints_altered_or_newer_is_an_error(tmp_path):
    with pytest.raises(Interrupted):
        train(
            TopK(24, k=3),
            source(),
            out=tmp_path,
            settings=TrainSettings(batch_rows=100, checkpoint_every=5, log_every=5),
            progress=stop_at(2000),
        )
    index = tmp_path / "checkpoints" / "index.json"
    text = index.read_text()
    for file in (tmp_path / "checkpoints").glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(FormatError, match="must hold an unaltered checkpoint"):
        train(TopK(24, k=3), source(), out=tmp_path, settings=TrainSettings(batch_rows=100), resume=True)
    index.write_text(text.replace('"order_digest": "', '"order_digest": "0'))
    with pytest.raises(FormatError, match="its seal does not fit"):
        train(TopK(24, k=3), source(), out=tmp_path, settings=TrainSettings(batch_rows=100), resume=True)
    write_sealed(index, json.loads(text) | {"format": 3})
    with pytest.raises(FormatError, match="must have checkpoint format 2; got 3"):
        train(TopK(24, k=3), source(), out=tmp_path, settings=TrainSettings(batch_rows=100), resume=True)


def test_two_generations_are_kept_and_nothing_that_a_killed_run_left(tmp_path):
    assert checkpoints.read(tmp_path) is None
    assert checkpoints.newest(tmp_path) is None
    for step in (5, 10, 15):
        checkpoints.write(tmp_path, step, {"x": torch.full((2,), float(step))}, {"place": [0, step]})
        (tmp_path / "checkpoints" / ".step-00000099.safetensors.1.tmp").write_bytes(b"half")
    checkpoints.write(tmp_path, 20, {"x": torch.full((2,), 20.0)}, {"place": [0, 20]})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "index.json", "step-00000015.safetensors", "step-00000020.safetensors",
    ]  # fmt: skip
    facts, tensors = checkpoints.read(tmp_path)
    assert (facts["step"], facts["place"]) == (20, [0, 20])
    assert tensors["x"].tolist() == [20.0, 20.0]
    assert checkpoints.newest(tmp_path).endswith("step-00000020.safetensors")


def test_a_step_that_is_written_again_replaces_later_ones(tmp_path):
    for step in (5, 10, 5):  # resumed at 5 since 10 was damaged
        checkpoints.write(tmp_path, step, {"x": torch.zeros(1)}, {})
    assert checkpoints.read(tmp_path)[0]["step"] == 5
    assert not (tmp_path / "checkpoints" / "step-00000010.safetensors").exists()
