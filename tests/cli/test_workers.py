"""``--workers`` and ``--part``: the result of one process, from several; and no process that outlives the call."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saekit import SAE, load_model
from saekit.classification import stored_fits
from saekit.cli import app, workers
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.rules import TopKRule
from saekit.sizes import progressive
from saekit.store.native import save
from saekit.training.config import Matryoshka, TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings

QUICK = ("--set", "budget.C=[0.1, 10.0]", "--set", "budget.thresholds=[0.0]", "--set", "budget.widen=0",
         "--pool", "sum", "--arms", "majority,words,dense,sparse,full", "--ks", "2,8",
         "--save-arm", "none")  # fmt: skip


@pytest.fixture
def common(tmp_path: Path) -> tuple[object, ...]:
    generator = np.random.default_rng(0)
    words = (["returns", "array", "value", "shape", "index"], ["raises", "error", "warning", "invalid", "fails"])
    lines = []
    for i in range(80):
        chosen = [*generator.choice(words[i % 2], 2), *generator.choice(["the", "of", "a", "for"], 4)]
        lines.append(json.dumps({"text": " ".join(chosen), "label": ("good", "bad")[i % 2]}))
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    d = load_model("builtin").d_model
    W = torch.randn(48, d, generator=torch.Generator().manual_seed(0))
    sae = SAE(W_enc=W, b_enc=torch.zeros(48), W_dec=W, b_dec=torch.zeros(d), rule=TopKRule(6),
              provenance={"hook": "layers.1", "seed": 0})  # fmt: skip
    return ("classify", "--model", "builtin", "--sae", save(sae, tmp_path / "sae"), "--data", tmp_path / "texts.jsonl",
            *QUICK)  # fmt: skip


def numbers(folder: str) -> Any:
    """A result without the times that its fits took."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(each) for key, each in value.items() if key not in ("seconds", "seal")}
        return [timeless(each) for each in value] if isinstance(value, list) else value

    return timeless(json.loads((Path(folder) / "classification.json").read_text()))


class Within:
    """A worker that lives in this process, and has done all the work before its caller looks for any."""

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(workers.VARIABLE, env[workers.VARIABLE])
            self.returncode = app.run(command[1 + len(workers.COMMAND) :])
        self.files = {each.name for each in Path("two").iterdir()}

    def poll(self) -> int:
        return self.returncode

    def wait(self, _: float | None = None) -> int:
        return self.returncode


def test_workers_and_parts_give_the_result_of_one_process(
    call: Any, common: tuple[object, ...], monkeypatch: Any
) -> None:
    assert call(*common, "--out", "one")[0] == 0
    team: list[Within] = []
    with monkeypatch.context() as patch:
        patch.setattr(workers.subprocess, "Popen", lambda *a, **k: team.append(Within(*a, **k)) or team[-1])
        status, out, err = call(*common, "--out", "two", "--workers", "2")
    assert (status, len(team)) == (0, 1), err
    assert "6 of 6 cells are there" in err
    assert "a worker ended" not in err
    assert team[0].files
    assert "classification.json" not in team[0].files
    assert numbers("two") == numbers("one")
    assert not Path("two/claims").exists()

    status, out, err = call(*common, "--out", "parts", "--part", "1/2", "--json")
    assert (status, json.loads(out)) == (0, {"cells": 6, "done": 3}), err
    status, out, err = call(*common, "--out", "parts", "--part", "0/2")
    assert (status, out) == (0, "")
    assert "6 of 6 cells are there" in err
    assert not Path("parts/classification.json").exists()
    monkeypatch.setattr(stored_fits, "compute", lambda *_: pytest.fail("computed again"))
    assert call(*common, "--out", "parts", "--workers", "1")[0] == 0
    assert numbers("parts") == numbers("one")


def test_progressive_gives_the_result_of_one_process(call: Any, tmp_path: Path, monkeypatch: Any) -> None:
    rows = SyntheticRows(d_in=16, n_features=64, l0=3, n_rows=1000, mean=1.0, rows_per_document=20)
    x = torch.cat([batch.x for batch in rows.batches(500)])
    np.save(tmp_path / "x.npy", x.numpy())
    configs = [TopK(n_latents=24, k=3), TopK(n_latents=8, k=3), Matryoshka(n_latents=24, k=3, sizes=(8, 24))]
    train(configs, rows, seeds=[0, 1], tokens=5_000, settings=TrainSettings(batch_rows=250), out=tmp_path / "run")
    common = ("progressive", "run", "--rows", "x.npy", "--set", "sample_rows=60", "--set", "latents=true")
    team = []
    begin = subprocess.Popen
    with monkeypatch.context() as patch:
        patch.setattr(workers.subprocess, "Popen", lambda *a, **k: team.append(begin(*a, **k)) or team[-1])
        results = [call(*common, "--out", "one"), call(*common, "--out", "two", "--workers", "2")]
    assert [status for status, _, _ in results] == [0, 0], results
    assert "a worker ended" not in results[1][2]
    (worker,) = team
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
    assert results[1][1] == results[0][1]
    whole = (tmp_path / "one" / "progressive.json").read_bytes()
    assert (tmp_path / "two" / "progressive.json").read_bytes() == whole
    assert not (tmp_path / "two" / "claims").exists()

    status, out, _ = call(*common, "--out", "parts", "--part", "1/2", "--json")
    assert (status, json.loads(out)) == (0, {"cells": 6, "done": 3})
    damaged = next((tmp_path / "parts" / "parts").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-40])
    computed: list[str] = []
    measured = progressive._Comparison.measured
    monkeypatch.setattr(
        progressive._Comparison, "measured", lambda self, job: computed.append(job.name) or measured(self, job)
    )
    assert call(*common, "--out", "parts", "--workers", "1")[0] == 0
    assert len(computed) == 4  # the other part, and the damaged file
    assert (tmp_path / "parts" / "progressive.json").read_bytes() == whole
    computed.clear()
    assert call(*common, "--out", "parts", "--part", "0/6", "--set", "seed=5")[0] == 0
    assert len(computed) == 1  # another seed is other work


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", "2"), "give --out"),
        (("--part", "0/2"), "give --out"),
        (("--out", "o", "--workers", "0"), "--workers must be 1 to 1,024; got 0"),
        (("--out", "o", "--workers", "-1"), "--workers must be 1 to 1,024; got -1"),
        (("--out", "o", "--part", "2/2"), "--part must be `i/n`"),
        (("--out", "o", "--part", "0/2", "--workers", "2"), "must not be given together"),
    ],
)
@pytest.mark.parametrize("command", ["classify", "progressive"])
def test_wrong_calls_are_refused_before_anything_is_read(call: Any, command: str, options: Any, said: str) -> None:
    arguments = {"classify": ("--model", "m", "--sae", "s", "--data", "d"), "progressive": ("r",)}[command]
    status, out, err = call(command, *arguments, *options)
    assert (status, out) == (2, "")
    assert said in err
    assert not Path("o").exists()


def test_no_worker_outlives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    team = []
    begin = subprocess.Popen
    monkeypatch.setattr(workers, "COMMAND", ("-c", "import time; time.sleep(60)"))
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: team.append(begin(*a, **k)) or team[-1])
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt), workers.started(3):
        raise KeyboardInterrupt
    assert len(team) == 2
    assert all(each.returncode is not None for each in team)
    assert time.monotonic() - before < workers.PATIENCE


def test_a_worker_that_ignores_the_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(60)"
    team = []
    begin = subprocess.Popen
    monkeypatch.setattr(workers, "COMMAND", ("-c", code))
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: team.append(begin(*a, **k)) or team[-1])

    def interrupted() -> None:
        with workers.started(2):
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert team[0].returncode is not None


def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(workers, "COMMAND", ("-c", "raise SystemExit('there is no memory')"))
    with workers.started(2):
        pass
    assert "a worker ended with status 1: there is no memory" in capsys.readouterr().err
    monkeypatch.setattr(workers, "COMMAND", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    with workers.started(2):
        pass
    assert "a worker was killed by SIGKILL (out of memory?)" in capsys.readouterr().err
