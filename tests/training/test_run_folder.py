"""The folder of a run: what is in it, and who may write to it."""

import json

import pytest
import torch

from fixtures.training_runs import same, source
from saekit import SAE, store
from saekit.errors import BusyError, ConfigError, FormatError
from saekit.files import locked_folder, write_sealed
from saekit.training.config import JumpReLU, TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings


def test_saved_files_hold_the_returned_saes(tmp_path):
    configs = [TopK(24, k=3), JumpReLU(24, target_l0=3), TopK(24, k=3, lr=0.01)]
    saes = train(configs, source(), seeds=[0, 5], out=tmp_path, settings=TrainSettings(batch_rows=200))
    names = [f"{base}-seed{seed}" for base in ("topk-24-k3", "jumprelu-24-l0-3", "topk-24-k3-2") for seed in (0, 5)]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["saes"] == names
    assert record["status"] == "done"
    for sae, name in zip(saes, names):
        loaded = store.load(tmp_path / name)
        assert isinstance(loaded, SAE)
        assert same(loaded, sae)
        assert loaded.provenance == sae.provenance
        if "topk" in name:
            torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(24))
    provenance = saes[1].provenance
    assert provenance["seed"] == 5
    assert provenance["rows_seen"] == 4000
    assert provenance["config"]["arch"] == "topk"
    assert provenance["metrics"].keys() == {"fvu", "l0", "dead_fraction", "fvu_fall_per_doubling"}


def test_busy_folder_is_refused(tmp_path):
    with locked_folder(tmp_path), pytest.raises(BusyError, match="in use by another run"):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=100), out=tmp_path)


def test_folder_of_another_run_is_refused(tmp_path):
    train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=1000), out=tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    with pytest.raises(ConfigError, match=r"holds a run. Pass resume=True"):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=1000), out=tmp_path)
    with pytest.raises(
        ConfigError, match=r"must have the settings it began with; `batch_rows` was 1000, now 500; `total_steps`"
    ):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=500), out=tmp_path, resume=True)
    with pytest.raises(
        ConfigError, match=r"it began with; `configs\[0\].k` was 3, now 4; `seeds\[0\]` was 0, now 1. Rep"
    ):
        train(TopK(24, k=4), source(), seeds=[1], settings=TrainSettings(batch_rows=1000), out=tmp_path, resume=True)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"rows_seen": 1}))
    with pytest.raises(FormatError, match="its seal does not fit"):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=1000), out=tmp_path, resume=True)
    write_sealed(tmp_path / "run.json", record | {"format": 99})
    with pytest.raises(FormatError, match="must have format 2; got 99"):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=1000), out=tmp_path, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"`out` must be empty or hold a run"):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=1000), out=tmp_path)
