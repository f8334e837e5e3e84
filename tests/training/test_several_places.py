"""Runs on several sources of rows in one call: side by side, and each as if it were alone."""

from __future__ import annotations

import pytest
import torch

from fixtures.training_runs import same, source
from saekit.errors import ConfigError
from saekit.rows.capture_texts import TextRunner
from saekit.rows.settings import StreamSettings
from saekit.rows.stream import stream
from saekit.training import loop
from saekit.training.config import BatchTopK, TopK
from saekit.training.loop import train
from saekit.training.run_folder import read_record
from saekit.training.settings import TrainSettings

SETTINGS = TrainSettings(batch_rows=16, checkpoint_every=2)


def streams(models, texts, layers):
    settings = StreamSettings(block_tokens=60, prefetch=False, outliers=None)
    return stream(models["llama"], texts, layer=layers, tokens=200, settings=settings)


def test_layers_trained_together_are_bitwise_those_trained_alone_in_one_pass_of_the_model(
    models, texts, tmp_path, monkeypatch
):
    passes = []
    runs = TextRunner.rows
    monkeypatch.setattr(TextRunner, "rows", lambda self, contexts, split=None: passes.append(1) or runs(self, contexts))
    configs, seen = [TopK(24, k=3), BatchTopK(24, k=3)], []
    together = streams(models, texts, [0, 2])
    passes.clear()
    saes = train(configs, together, seeds=[0, 1], tokens=128, out=tmp_path, settings=SETTINGS, callbacks=[seen.append])
    n_together = len(passes)
    assert list(saes) == ["layers.0", "layers.2"]
    for layer, name in ((0, "layers.0"), (2, "layers.2")):
        alone_rows = streams(models, texts, layer)
        passes.clear()
        alone = train(configs, alone_rows, seeds=[0, 1], tokens=128, settings=SETTINGS)
        assert len(passes) == n_together
        assert all(same(one, other) for one, other in zip(saes[name], alone, strict=True))
        record = read_record(tmp_path / name)
        assert record["status"] == "done"
        assert saes[name][0].provenance["hook"] == name
        assert any(str(each["learner"]).startswith(f"{name}/topk-24") for each in seen)
    again = train(configs, together, seeds=[0, 1], tokens=128, out=tmp_path, resume=True, settings=SETTINGS)
    assert all(same(one, other) for name in saes for one, other in zip(saes[name], again[name], strict=True))


def test_runs_at_different_steps_go_on_to_the_same_bits(tmp_path, monkeypatch):
    rows = {"a": source(400), "b": source(400, seed=1)}
    settings = TrainSettings(batch_rows=50, checkpoint_every=2)
    whole = train(TopK(24, k=3), rows, settings=settings)
    save = loop.save_checkpoint
    saved = []

    def save_and_die(run, **how):
        save(run, **how)
        saved.append(run.folder.name)
        if len(saved) == 3:  # the second checkpoint of the first run only
            raise OSError("gone")

    monkeypatch.setattr(loop, "save_checkpoint", save_and_die)
    with pytest.raises(OSError, match="gone"):
        train(TopK(24, k=3), rows, out=tmp_path, settings=settings)
    monkeypatch.setattr(loop, "save_checkpoint", save)
    resumed = train(TopK(24, k=3), rows, out=tmp_path, resume=True, settings=settings)
    assert saved == ["a", "b", "a"]
    assert all(same(whole[name][0], resumed[name][0]) for name in rows)


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ({}, {}, "a dictionary of them by names that a folder can have; got none"),
        ({"a/b": torch.ones(300, 4)}, {}, "got the name 'a/b'"),
        ({"..": torch.ones(300, 4)}, {}, "got the name '..'"),
        ({0: torch.ones(300, 4)}, {}, "got the name 0"),
        ({"a": torch.ones(300, 4)}, {"start": object()}, "`start` must be left out with several rows"),
    ],
)
def test_dictionaries_of_rows_that_cannot_work(rows, more, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(TopK(8, k=2), rows, out=tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()
