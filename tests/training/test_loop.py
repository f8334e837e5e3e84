"""The loop: together = alone, resume = uninterrupted (a real kill included), logs, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit import SAE, ArrayRows, SyntheticRows, store
from saekit.errors import BusyError, ConfigError, DataError, FormatError, MissingExtraError, NonFiniteError, ShapeError
from saekit.files import locked_folder
from saekit.rows.source import Batch
from saekit.training import checkpoint as checkpoints
from saekit.training import initialization
from saekit.training.callbacks import TensorBoard, Trackio
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.diagnostics import warnings_for
from saekit.training.learner import initialize_learner, resolve
from saekit.training.loop import train, untrained
from saekit.training.settings import TrainSettings
from saekit.training.step import STEPS

ALL = [
    TopK(24, k=3),
    TopK(24, k=3, multi_topk=0.1),
    BatchTopK(24, k=3),
    JumpReLU(24, target_l0=3),
    ReLU(24),
    Gated(24, target_l0=3),
    PAnneal(24),
    Matryoshka(24, k=3, sampled=2, over="batchtopk"),
    HierarchicalTopK(24, k=3),
]
TIMING = ("seconds", "rows_per_second")


def source(n_rows=4000, **kwargs):
    return SyntheticRows(**{"d_in": 8, "n_features": 16, "l0": 3.0, "n_rows": n_rows, "mean": 1.0} | kwargs)


def same(a, b):
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def log_of(out):
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMING} for r in records]


class Interrupted(Exception):
    """Stands for a crash at a known place."""


def stop_at(rows):
    def progress(stage, done, total=None, note=""):
        if done >= rows:
            raise Interrupted

    return progress


def test_together_equals_alone_bitwise():
    together = train(ALL, source(), seeds=[0, 7], settings=TrainSettings(batch_rows=200))
    assert len(together) == 2 * len(ALL)
    for index, config in enumerate(ALL):
        [alone] = train(config, source(), seeds=[7], settings=TrainSettings(batch_rows=200))
        assert same(alone, together[2 * index + 1]), config.arch
        assert not same(alone, together[2 * index])


def test_init_seed_and_data_order_are_separate():
    def run(seed, data_seed):
        return train(
            TopK(24, k=3), source(), seeds=[seed], settings=TrainSettings(data_seed=data_seed, batch_rows=500)
        )[0]

    assert same(run(0, 0), run(0, 0))
    assert not same(run(0, 0), run(1, 0))
    assert not same(run(0, 0), run(0, 1))


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


CHILD = """
import os, signal, sys
from saekit import BatchTopK, ReLU, SyntheticRows, TrainSettings, train

out, event, count = sys.argv[1], sys.argv[2], int(sys.argv[3])

def killed_at(name, count):  # kill -9 in place of the call: what was to be written is there by halves or not at all
    true = getattr(os, name)
    def call(*args, **options):
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return true(*args, **options)
    setattr(os, name, call)

if event != "none":
    killed_at(event, count)
rows = SyntheticRows(d_in=8, n_features=16, l0=3.0, n_rows=3_000, mean=1.0)
settings = TrainSettings(batch_rows=50, log_every=10, checkpoint_every=5)
train([BatchTopK(24, k=3), ReLU(24)], rows, seeds=[0, 1], settings=settings, out=out, resume=True)
"""


def child(out, event="none", count=0):
    environment = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(out), event, str(count)], env=environment, capture_output=True, text=True
    )
    return run.returncode, run.stderr


def test_kill_nine_at_any_write_then_resume_gives_the_same_bytes(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert child(whole) == (0, "")
    # Of a checkpoint the tensors are renamed first, then the index: killed before the one, before the other, and
    # before the bytes of a third are on disk; at last when the SAEs are being saved.
    for event, count in (("replace", 4), ("replace", 5), ("fsync", 7), ("replace", 20)):
        assert child(cut, event, count)[0] == -signal.SIGKILL, (event, count)
    assert child(cut) == (0, "")
    for name in ("batchtopk-24-k3-seed0", "batchtopk-24-k3-seed1", "relu-24-l1-2-seed0", "relu-24-l1-2-seed1"):
        for file in ("sae.safetensors", "sae.json"):
            assert (whole / name / file).read_bytes() == (cut / name / file).read_bytes()
    assert log_of(whole) == log_of(cut)
    orders = [json.loads((out / "run.json").read_text())["order_digest"] for out in (whole, cut)]
    assert orders[0] == orders[1]


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
    index.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(FormatError, match="must have checkpoint format 1; got 2"):
        train(TopK(24, k=3), source(), out=tmp_path, settings=TrainSettings(batch_rows=100), resume=True)


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
    assert provenance["metrics"].keys() == {"fvu", "l0", "dead_fraction"}


def test_logged_loss_does_not_depend_on_log_every():
    records = {}
    for every in (1, 5):
        kept = records.setdefault(every, [])
        train(
            [TopK(24, k=3), PAnneal(24)],
            source(),
            settings=TrainSettings(batch_rows=200, log_every=every),
            callbacks=[kept.append],
        )
    for learner in ("topk-24-k3-seed0", "p-anneal-24-l1-2-seed0"):
        fine = [r for r in records[1] if r["learner"] == learner]
        coarse = [r for r in records[5] if r["learner"] == learner]
        assert len(fine) == 20
        assert len(coarse) == 4
        for name in ("loss", "l0", "reconstruction", "grad_norm"):
            means = np.array([r[name] for r in fine]).reshape(4, 5).mean(1)
            np.testing.assert_allclose(means, [r[name] for r in coarse], rtol=1e-9)
        assert fine[-1]["dead_fraction"] == coarse[-1]["dead_fraction"]


def test_logged_fvu_is_the_sum_of_errors_over_the_sum_of_variance():
    kept = []
    rows = source(1000)
    config = TopK(24, k=3, control="untrained")
    train(config, rows, settings=TrainSettings(batch_rows=250, log_every=4), callbacks=[kept.append])
    sae = untrained(config, rows, settings=TrainSettings(batch_rows=250))
    x = torch.cat([b.x for b in rows.batches(250)]).double()
    fvu = (x - sae.reconstruct(x.float())).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    assert kept[-1]["fvu"] == pytest.approx(float(fvu), rel=1e-5)


@pytest.mark.parametrize("config", [TopK(64, k=3), BatchTopK(64, k=3), Matryoshka(64, k=3)], ids=lambda c: c.arch)
def test_planted_dictionary_is_recovered(config):
    rows = SyntheticRows(d_in=24, n_features=32, l0=2.0, n_rows=60_000, noise=0.01, power=0.0)
    [sae] = train(config, rows, settings=TrainSettings(batch_rows=250), tokens=120_000)

    def mean_max_cosine(directions):
        return float((rows.dictionary @ torch.nn.functional.normalize(directions, dim=1).T).max(1).values.mean())

    null = mean_max_cosine(torch.randn(64, 24, generator=torch.Generator().manual_seed(1)))
    assert null < 0.6
    assert mean_max_cosine(sae.W_dec) > 0.85


@pytest.mark.parametrize(
    "config",
    [BatchTopK(48, k=4), Matryoshka(48, k=4, over="batchtopk"), JumpReLU(48, target_l0=4)],
    ids=lambda c: c.arch,
)
def test_frozen_l0_is_near_its_target_and_rows_are_independent(config, tmp_path):
    rows = source(100_000)
    train(config, rows, out=tmp_path, settings=TrainSettings(batch_rows=250), tokens=100_000)
    [folder] = [p for p in tmp_path.iterdir() if (p / "sae.json").exists()]
    sae = SAE.load(folder)
    x = next(rows.batches(4000)).x
    assert sae.encode(x).l0() == pytest.approx(4, rel=0.15)
    half = sae.encode(x[::2]).to_dense()
    torch.testing.assert_close(half, sae.encode(x).to_dense()[::2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config", [ReLU(48, target_l0=4), Gated(48, target_l0=4), PAnneal(48, target_l0=4)], ids=lambda c: c.arch
)
def test_controller_brings_l0_to_its_target(config):
    kept = []
    train(config, source(200_000), settings=TrainSettings(batch_rows=250), callbacks=[kept.append])
    assert kept[-1]["l0"] == pytest.approx(4, rel=0.2)
    assert kept[0]["coefficient"] != kept[-1]["coefficient"]


def test_default_configuration_runs_five_steps():
    assert len(train(TopK(64, k=4), torch.randn(5 * 4096, 8, generator=torch.Generator().manual_seed(0)))) == 1


def test_progress_reports_every_log_step():
    seen = []

    def progress(stage, done, total=None, note=""):
        seen.append((stage, done, total, note))

    train(
        [TopK(24, k=3), ReLU(24)], source(1000), settings=TrainSettings(batch_rows=100, log_every=4), progress=progress
    )
    assert [each[:3] for each in seen] == [("train", 400, 1000), ("train", 800, 1000), ("train", 1000, 1000)]
    assert all(re.fullmatch(r"[\d,]+ rows/s  FVU \S+  L0 \S+  dead \S+%", each[3]) for each in seen), seen


def test_the_step_is_a_seam(monkeypatch):
    calls = []

    def counting(learner, x):
        calls.append(len(x))
        return STEPS["plain"](learner, x)

    monkeypatch.setitem(STEPS, "counting", counting)
    [a] = train(TopK(24, k=3), source(1000), settings=TrainSettings(batch_rows=100, step="counting"))
    [b] = train(TopK(24, k=3), source(1000), settings=TrainSettings(batch_rows=100, step="plain"))
    assert calls == [100] * 10
    assert same(a, b)


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
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(FormatError, match="must have format 1; got 99"):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=1000), out=tmp_path, resume=True)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"`out` must be empty or hold a run"):
        train(TopK(24, k=3), source(), settings=TrainSettings(batch_rows=1000), out=tmp_path)


class Lying:
    """Says one width and gives another."""

    d_in = 9
    n_rows = 4000
    info = {"kind": "lying"}  # noqa: RUF012

    def batches(self, batch_rows, *, seed=None, start=(0, 0)):
        return source().batches(batch_rows, seed=seed, start=start)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: train([], source()), ConfigError, "`configs` must hold at least one"),
        (lambda: train(["topk"], source()), ConfigError, "must be a configuration such as TopK"),
        (lambda: train([TopK(8, k=2)] * 2, source()), ConfigError, "must all be different; got one twice"),
        (lambda: train(TopK(8, k=2), source(), seeds=[]), ConfigError, "`seeds` must be different whole numbers"),
        (lambda: train(TopK(8, k=2), source(), seeds=[1, 1]), ConfigError, "`seeds` must be different"),
        (lambda: train(TopK(8, k=2), source(), settings=TrainSettings(batch_rows=0)), ConfigError, "`batch_rows` must be a whole number from 1; got 0"),  # noqa: E501
        (lambda: train(TopK(8, k=2), source(), tokens=10, settings=TrainSettings(batch_rows=20)), ConfigError, "`tokens` must be at least batch_rows=20"),  # noqa: E501
        (lambda: train(TopK(8, k=2), source(100)), DataError, "the source must have at least batch_rows=4096 rows; got 100"),  # noqa: E501
        (lambda: train(TopK(8, k=2), source(None)), ConfigError, "`tokens` must be given"),
        (lambda: train(TopK(8, k=2), source(), settings=TrainSettings(data_seed=0.5)), ConfigError, "`data_seed`"),
        (lambda: train(TopK(8, k=2), source(), settings=TrainSettings(precision="fp16")), ConfigError, "`precision` must be 'fp32' or 'bf16'; got 'fp16'"),  # noqa: E501
        (lambda: train(TopK(8, k=2), source(), settings=TrainSettings(step="fast")), ConfigError, "`step` must be one of `plain`"),  # noqa: E501
        (lambda: train(TopK(8, k=2), source(), resume=True), ConfigError, "`resume` needs the folder"),
        (lambda: train(TopK(8, k=2), Lying(), settings=TrainSettings(batch_rows=100)), ShapeError, "must have width d_in=9"),  # noqa: E501
        (lambda: train(TopK(8, k=2), torch.zeros(3)), ShapeError, "two-dimensional"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_computed(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_doctor_speaks_in_run_json(tmp_path):
    train([ReLU(24, l1=0.0), TopK(24, k=3)], source(), settings=TrainSettings(batch_rows=100), out=tmp_path)
    warnings = json.loads((tmp_path / "run.json").read_text())["warnings"]
    assert any("hardly sparse" in text for text in warnings["relu-24-l1-0-seed0"])


@pytest.mark.parametrize(
    "config, record, words",
    [
        (TopK(24, k=3), {"fvu": 1.2, "l0": 3.0, "dead_fraction": 0.0}, ["no better than predicting the mean row"]),
        (TopK(24, k=3), {"fvu": 0.2, "l0": 3.0, "dead_fraction": 0.5}, ["50% of the latents did not fire"]),
        (JumpReLU(24, target_l0=3), {"fvu": 0.2, "l0": 6.0, "dead_fraction": 0.0}, ["L0 is 6 and should be 3"]),
        (TopK(24, k=3), {"fvu": 0.2, "l0": 3.0, "dead_fraction": 0.05}, []),
    ],
)
def test_doctor_says_what_is_wrong(config, record, words):
    settings = resolve(config, 8, 10, 100)
    learner = initialize_learner(
        config, 0, settings, bias=torch.zeros(8), scale=None, sample=torch.ones(4, 8), device="cpu"
    )
    found = warnings_for(learner, record)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found))


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


def test_array_source_equals_rows():
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    assert same(
        train(TopK(24, k=3), x, settings=TrainSettings(batch_rows=100))[0],
        train(TopK(24, k=3), ArrayRows(x), settings=TrainSettings(batch_rows=100))[0],
    )


def test_where_the_time_went_is_in_the_run(tmp_path: Path) -> None:
    class Slow:
        """Rows with a language model behind them, so to speak."""

        def __init__(self) -> None:
            self.rows = SyntheticRows(d_in=8, n_features=16, n_rows=1000)
            self.d_in, self.n_rows, self.info = 8, 1000, self.rows.info
            self.seconds = {"lm": 100.0}

        def batches(self, batch_rows: int, **options: Any) -> Iterator[Batch]:
            for batch in self.rows.batches(batch_rows, **options):
                self.seconds["lm"] += 1.0
                yield batch

    run = {"tokens": 1000, "settings": TrainSettings(batch_rows=100)}
    train(TopK(16, k=2), Slow(), out=tmp_path / "run", **run)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["seconds"]
    assert recorded["model"] == 10.0
    assert 0 < recorded["start"] + recorded["rows"] + recorded["steps"] <= recorded["total"]
    assert recorded["steps_fraction"] == pytest.approx(recorded["steps"] / recorded["total"])
    train(TopK(16, k=2), SyntheticRows(d_in=8, n_features=16, n_rows=1000), out=tmp_path / "plain", **run)
    assert "model" not in json.loads((tmp_path / "plain" / "run.json").read_text())["seconds"]
