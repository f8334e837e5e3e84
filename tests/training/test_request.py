"""What a run is asked for: refused before anything is computed, and seeds per configuration."""

import pytest
import torch

from fixtures.training_runs import source
from saekit import SyntheticRows, memory
from saekit.errors import ConfigError, DataError, ShapeError
from saekit.training import loop
from saekit.training.config import ReLU, TopK
from saekit.training.loop import train, untrained
from saekit.training.settings import TrainSettings


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
        (lambda: train(TopK(8, k=2), source(100)), DataError, "the source must have at least batch_rows=256 rows; got 100"),  # noqa: E501
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


ROWS = SyntheticRows(d_in=8, n_features=16, n_rows=1024)


CONFIGS = [TopK(n_latents=16, k=4), ReLU(n_latents=16)]


def test_each_configuration_gets_its_own_seeds_and_nothing_else_changes(tmp_path):
    some = train(CONFIGS, ROWS, seeds=[[0, 1], [3]], settings=TrainSettings(batch_rows=128), out=tmp_path / "a")
    assert [sae.provenance["seed"] for sae in some] == [0, 1, 3]
    assert [sae.rule.name for sae in some] == ["topk", "topk", "relu"]
    assert sorted(p.parent.name[-5:] for p in (tmp_path / "a").glob("*/sae.json")) == ["seed0", "seed1", "seed3"]
    alone = train(CONFIGS[1], ROWS, seeds=3, settings=TrainSettings(batch_rows=128))[0]
    assert torch.equal(some[2].W_dec, alone.W_dec)
    again = train(
        CONFIGS, ROWS, seeds=[[0, 1], [3]], settings=TrainSettings(batch_rows=128), out=tmp_path / "a", resume=True
    )
    assert torch.equal(again[1].W_enc, some[1].W_enc)


@pytest.mark.parametrize("seeds", [[[0]], [[0], 1], [[0], [1], [2]]])
def test_lists_that_do_not_fit_the_configurations(seeds):
    with pytest.raises(ConfigError, match="one list of them for each of the 2 configurations"):
        train(CONFIGS, ROWS, seeds=seeds, settings=TrainSettings(batch_rows=128))


@pytest.mark.parametrize("seeds", [[[0, 0], [1]], [[], [1]], [["a"], [1]]])
def test_seeds_of_one_configuration_must_differ(seeds):
    with pytest.raises(ConfigError, match="`seeds` must be different whole numbers"):
        train(CONFIGS, ROWS, seeds=seeds, settings=TrainSettings(batch_rows=128))


BATCH = TrainSettings(batch_rows=512)


def endless():
    return SyntheticRows(d_in=8, n_features=16, n_rows=None)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: train(TopK(10**9, k=2), ROWS, settings=BATCH), r"got 272 GB: 272 GB for weights and moments"),
        (lambda: train(TopK(10**12, k=2), ROWS, settings=BATCH), r"17,000,000,000,008 parameters"),
        (lambda: train(TopK(10**12, k=10**12), ROWS, settings=BATCH), "TB for batches of 512 rows"),
        (lambda: train(TopK(16, k=2), endless(), tokens=10**15, settings=TrainSettings(batch_rows=10**12)), "120 TB for batches of 1,000,000,000,000 rows"),  # noqa: E501
        (lambda: train(TopK(16, k=2), ROWS, seeds=range(10**12)), "TB for 1,000,000,000,000 seeds"),
        (lambda: train(TopK(16, k=2), ROWS, seeds=range(10**40)), "seeds. Use fewer seeds"),
        (lambda: untrained(TopK(10**12, k=2), ROWS), "untrained: the memory needed must be at most"),
        (lambda: TopK(10**30, k=2), "`n_latents` must be a whole number below 2\\*\\*63"),
        (lambda: train(TopK(16, k=2), ROWS, tokens=10**30), "`tokens` must be a whole number from 1 and below"),
        (lambda: train(TopK(16, k=2), ROWS, seeds=-1), "`seeds` must be different whole numbers from 0"),
    ],
)  # fmt: skip
def test_what_fits_no_memory_is_refused_with_the_arithmetic(monkeypatch, call, match):
    monkeypatch.setattr(loop, "begin", lambda *_: pytest.fail("begun"))
    monkeypatch.setattr(loop, "read_first_rows", lambda *_: pytest.fail("begun"))
    with pytest.raises(ConfigError, match=match):
        call()


def test_learners_must_fit_together(monkeypatch):
    needs = 16 * (2 * 16 * 8 + 16 + 8)
    settings = TrainSettings(batch_rows=1, step="fused")
    monkeypatch.setattr(memory, "available_memory", lambda device: 2 * needs + 1000)
    train(TopK(16, k=4), ROWS, seeds=[0, 1], tokens=4, settings=settings)
    with pytest.raises(ConfigError, match=r"weights and moments of 3 SAEs \(840 parameters\)"):
        train(TopK(16, k=4), ROWS, seeds=[0, 1, 2], tokens=4, settings=settings)
    with pytest.raises(ConfigError, match="weights and moments of 3 SAEs"):
        train([TopK(16, k=4), TopK(16, k=5)], ROWS, seeds=[[0, 1], [0]], tokens=4, settings=settings)
