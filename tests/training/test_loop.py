"""The loop: together = alone, seeds, recovery of planted dictionaries, targets that are met, the step as a seam."""

import pytest
import torch

from fixtures.training_runs import ALL, same, source
from saekit import SAE, ArrayRows, SyntheticRows
from saekit.training.config import BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings
from saekit.training.step import STEPS


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


def test_array_source_equals_rows():
    x = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    assert same(
        train(TopK(24, k=3), x, settings=TrainSettings(batch_rows=100))[0],
        train(TopK(24, k=3), ArrayRows(x), settings=TrainSettings(batch_rows=100))[0],
    )
