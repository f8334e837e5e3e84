"""Several ranks: the same as one process, resumed at any size, and ended by what goes wrong on one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fixtures.learners import ALL
from saekit.errors import ConfigError
from saekit.training.config import TopK
from saekit.training.loop import train
from saekit.training.mesh import ALONE, smallest_of_largest
from saekit.training.settings import TrainSettings

LR = 1e-3
"""Learning rate of the ten steps; Adam turns rounding of gradients near zero into steps of up to that."""
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("rank_jobs.py"))
    done = subprocess.run(
        [sys.executable, script, str(folder)], env=environment, capture_output=True, text=True, timeout=480
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def steps(found):
    assert all("value" in each for each in found["steps"]), found["steps"]
    return {key: value for key, value in found["steps"][0]["value"].items() if key not in ("bytes", "reduced")}


def numbers(saes):
    return [{name: torch.tensor(value) for name, value in sae.items()} for sae in saes]


def distance(one, other):
    return max(float((a[name] - b[name]).abs().max()) for a, b in zip(numbers(one), numbers(other)) for name in a)


def test_ten_steps_on_any_mesh_are_those_of_one_process(steps):
    assert {key.split()[1] for key in steps} >= {config.arch for config in ALL}
    for key, each in steps.items():
        assert each["far"] <= (1e-8 if "float64" in key else 2e-3 * LR), key
        assert each["counters"], key  # also the random streams; a code flipped at a near tie would show here
        assert each["same_b_dec"], key
        for name, (value, expected) in each["logged"].items():
            assert value == pytest.approx(expected, rel=1e-4, abs=1e-4), f"{key}: {name}"


def test_latents_died_in_these_steps_and_were_revived(steps):
    for key, each in steps.items():
        if key.split()[1] in ("relu", "gated", "p-anneal"):  # these point them at rows instead
            continue
        assert each["dead"] > 0, key
        assert each["logged"]["aux"][1] > 0, key


def test_bytes_sent_are_those_of_the_formula(found):
    counted = found["steps"][0]["value"]["bytes"]
    for sent, formula, _ in counted:
        assert formula <= sent <= 1.05 * formula
    assert {sparse for *_, sparse in counted} == {True, False}


def test_gradients_of_few_latents_are_those_that_are_summed_whole(found):
    for each in found["steps"]:
        assert each["value"]["reduced"]["far"] < 1e-6
        assert each["value"]["reduced"]["same"]
        assert each["value"]["reduced"]["size"] > 1


def test_runs_on_ranks_end_as_those_of_one_process(found):
    alone = found["alone"][0]["value"]
    for name in ("rows", "latents"):
        one, other = (each["value"] for each in found[name])
        assert one == other, name
        assert distance(one, alone) < 1e-5, name
    assert found["read back"][0]["value"] == found["rows"][0]["value"] == found["read back"][1]["value"]


def test_a_run_is_resumed_bit_for_bit_at_its_size_and_at_any_other(found):
    whole = found["rows"][0]["value"]
    assert found["cut"][0]["error"] == "OSError"
    assert found["resumed"][0]["value"] == whole
    assert distance(found["as latents"][0]["value"], whole) < 1e-5
    assert distance(found["as one"][0]["value"], whole) < 1e-5


def test_a_rank_that_is_gone_ends_the_others_with_a_clear_error(found):
    assert [each["error"] for each in found["killed"]] == ["RankError", "killed"]
    assert "rank 0 of 2 gets no answer from another" in found["killed"][0]["message"]
    assert "--resume" in found["killed"][0]["message"]
    assert found["killed"][0]["seconds"] < 60
    assert found["cut"][1]["error"] == "RankError"


def test_a_rank_that_joins_when_another_has_gone_is_told_so(found):
    late = found["late"][1]
    assert late["error"] == "RankError", late
    assert "rank 1 of 2 gets no answer from another" in late["message"]


def test_a_rank_that_waits_for_one_that_never_comes_says_for_what(found):
    [each] = found["missing"]
    assert each["error"] == "RankError"
    assert "all 2 ranks must meet at 127.0.0.1:" in each["message"]
    assert "MASTER_ADDR" in each["message"]
    assert each["seconds"] < 30


def test_nan_on_one_rank_ends_all_in_the_same_step_and_names_it(found):
    for each in found["nan"]:
        assert each["error"] == "NonFiniteError"
        assert "in step 6 on rank 1 of 2" in each["message"]


def test_a_full_disk_ends_all_ranks_with_its_error(found):
    for each in found["full disk"]:
        assert each["error"] == "OSError"
        assert "No space left on device" in each["message"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("settings", "on rank 1 `request.configs[0].lr` is"),
        ("rows", "on rank 1 `request.rows` is"),
        ("batch", "`batch_rows` must be a multiple of the 2 ranks that split the rows; got 65"),
        ("shards", "`latent_shards` must divide the number of ranks, 2; got 3"),
        ("latents", "`n_latents` must be a multiple of latent_shards=2; got 25"),
        ("step", "`step` must be 'plain' on several ranks"),
        ("orthogonal", "`orthogonal` must be 0 with latent_shards > 1"),
        ("mutual", "`mutual` must be 0 on several ranks"),
    ],
)
def test_ranks_that_cannot_work_together_are_refused_at_the_start(found, name, message):
    for each in found["refused"]:
        error, said = each["value"][name]
        assert error == "ConfigError"
        assert message in said


def test_shards_without_ranks_are_refused():
    with pytest.raises(ConfigError, match="`latent_shards` needs that many ranks; got 2 and one process"):
        train(TopK(8, k=2), torch.ones(600, 4), settings=TrainSettings(latent_shards=2))


@pytest.mark.parametrize("count", [1, 7, 40, 1000])
def test_the_smallest_of_the_largest_is_exact(count, monkeypatch):
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x, **_: None)
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).mul(8).round() / 8  # with ties
    largest = x[x > 0].sort(descending=True).values[:count]
    assert smallest_of_largest(ALONE, x, count) == largest[-1]
    assert smallest_of_largest(ALONE, -x.abs(), count) == 0
