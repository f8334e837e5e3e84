"""Values that are not finite stop a run; warnings at its end."""

import json

import pytest
import torch

from fixtures.training_runs import source
from saekit.errors import NonFiniteError
from saekit.rows.arrays import ArrayRows
from saekit.training import checkpoint as checkpoints
from saekit.training import initialization
from saekit.training.config import JumpReLU, ReLU, TopK
from saekit.training.defaults import resolve
from saekit.training.diagnostics import warnings_for
from saekit.training.learner import initialize_learner
from saekit.training.loop import train
from saekit.training.settings import TrainSettings


class Poisoned:
    """A source whose rows turn into NaN after some batches."""

    d_in = 8
    n_rows = 4000
    info = {"kind": "poisoned", "digest": "none"}  # noqa: RUF012

    def __init__(self, after):
        self.after = after

    def batches(self, batch_rows, *, seed=None, start=(0, 0)):
        for index, batch in enumerate(source().batches(batch_rows, seed=seed, start=start)):
            if start == (0, 0) and index >= self.after:
                batch.x[3, 2] = float("nan")
            yield batch


def test_nan_rows_stop_with_step_seed_and_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(initialization, "FIRST_ROWS", 500)
    with pytest.raises(
        NonFiniteError,
        match=r"in step 13, learner `topk-24-k3-seed4` \(seed 4, TopK\(.*the rows hold NaN.*step-00000010",
    ) as caught:
        train(
            TopK(24, k=3),
            Poisoned(12),
            seeds=[4],
            settings=TrainSettings(batch_rows=100, checkpoint_every=5),
            out=tmp_path,
        )
    assert "resume=True" in str(caught.value)
    _, tensors = checkpoints.read(tmp_path)
    assert all(torch.isfinite(t.float()).all() for t in tensors.values())
    assert not any((p / "sae.json").exists() for p in tmp_path.iterdir())
    with pytest.raises(NonFiniteError, match="among the first"):
        train(TopK(24, k=3), Poisoned(0), settings=TrainSettings(batch_rows=100))


def test_diverging_training_stops(tmp_path):
    config = ReLU(24, lr=1e30, clip=None, warmup_steps=0)
    with pytest.raises(NonFiniteError, match=r"learner `relu-24-l1-2-seed0` \(seed 0.*lower `lr`"):
        train(config, source(), settings=TrainSettings(batch_rows=100, checkpoint_every=1), out=tmp_path)
    found = checkpoints.read(tmp_path)
    assert found is None or all(torch.isfinite(t.float()).all() for t in found[1].values())


def test_warnings_are_in_run_json(tmp_path):
    configs = [ReLU(24, l1=0.0), TopK(24, k=3), JumpReLU(24, tanh=1e-6, bandwidth=8, lr=0.05)]
    train(configs, source(), settings=TrainSettings(batch_rows=100), out=tmp_path)
    warnings = json.loads((tmp_path / "run.json").read_text())["warnings"]
    found, of_jumprelu = (each for each in warnings if each["code"] == "hardly_sparse")
    assert found["sae"] == "relu-24-l1-0-seed0"
    assert "hardly sparse. Raise `l1` or" in found["message"]
    assert "hardly sparse. Raise `tanh` or" in of_jumprelu["message"]


@pytest.mark.parametrize(
    "config, record, silent, words",
    [
        (TopK(100, k=3), {"fvu": 1.2, "l0": 3.0}, 0, ["no better than predicting the mean row"]),
        (TopK(100, k=3), {"fvu": 0.2, "l0": 3.0}, 50, ["50.0% of the latents did not fire in the last 2,400 rows"]),
        (TopK(100, k=3), {"fvu": 0.2, "l0": 3.0}, 3, ["3.0% of the latents did not fire in the last 2,400 rows"]),
        (JumpReLU(100, target_l0=3), {"fvu": 0.2, "l0": 6.0}, 0, ["L0 is 6 and should be 3"]),
        (TopK(100, k=3), {"fvu": 0.2, "l0": 3.0}, 2, []),
    ],
)
def test_warnings_say_what_is_wrong(config, record, silent, words):
    settings = resolve(config, 8, 120, 100)
    learner = initialize_learner(
        config, 0, settings, bias=torch.zeros(8), scale=None, sample=torch.ones(4, 8), device="cpu"
    )
    learner.rows_since_fired[:silent] = 2400
    learner.rows_since_fired[silent:] = 2399  # rare, and longer silent than `dead_after_rows`
    assert settings.dead_after_rows < 2399
    found = warnings_for(learner, record)
    assert len(found) == len(words)
    assert all(word in each["message"] for word, each in zip(words, found))


@pytest.mark.parametrize(
    ("config", "rows", "code"),
    [
        (TopK(24, k=3), 2300, "few_rows_per_latent"),
        (TopK(24, k=3), 2400, None),
        (TopK(24, k=3, control="untrained"), 100, None),
        (TopK(24, k=8), 2400, "l0_reaches_width"),
        (JumpReLU(24, target_l0=8.5), 2400, "l0_reaches_width"),
        (ReLU(24), 2400, None),
    ],
)
def test_why_latents_stay_dead_is_told(config, rows, code):
    learner = initialize_learner(
        config, 0, resolve(config, 8, rows // 100, 100), bias=torch.zeros(8), scale=None, sample=torch.ones(4, 8),
        device="cpu",
    )  # fmt: skip
    target = getattr(config, "target_l0", None) or getattr(config, "k", 3)
    found = warnings_for(learner, {"fvu": 0.2, "l0": float(target), "dead_fraction": 0.0})
    assert [each["code"] for each in found] == ([code] if code else [])


def codes_of(folder):
    return [warning["code"] for warning in json.loads((folder / "run.json").read_text())["warnings"]]


def test_rows_that_are_seen_more_than_once_are_told(tmp_path):
    few = ArrayRows(torch.randn(25, 8, generator=torch.Generator().manual_seed(0)))
    notes = []
    train(
        TopK(24, k=3), few, tokens=2000, settings=TrainSettings(batch_rows=25), out=tmp_path,
        progress=lambda *step: notes.append(step[3]),
    )  # fmt: skip
    record = json.loads((tmp_path / "run.json").read_text())
    [warning] = [each for each in record["warnings"] if each["code"] == "repeated_rows"]
    assert warning["message"].startswith("Each of the 25 rows is seen 80 times, to train on 2,000.")
    assert record["epochs"] == 80
    logged = [json.loads(line)["epochs"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[0] == pytest.approx(1 / 1)
    assert logged[-1] == 80
    assert "epoch 80" in notes[-1]


@pytest.mark.parametrize(("tokens", "is_told"), [(1040, True), (1005, False), (None, False)])
def test_rows_that_do_not_fill_a_batch_are_told(tmp_path, tokens, is_told):
    train(TopK(24, k=3), source(), tokens=tokens, settings=TrainSettings(batch_rows=100), out=tmp_path)
    record = json.loads((tmp_path / "run.json").read_text())
    assert ("rows_left_out" in codes_of(tmp_path)) is is_told
    if is_told:
        assert (record["rows_seen"], record["rows_asked"]) == (1000, 1040)
        assert any(
            "Trained on 1,000 of 1,040 rows, whole batches of 100" in each["message"] for each in record["warnings"]
        )
