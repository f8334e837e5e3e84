"""Convergence: a curve that still falls is told, one that has levelled off is not."""

import json

import numpy as np
import pytest

from saekit import compare
from saekit.rows.synthetic import SyntheticRows
from saekit.training.config import TopK
from saekit.training.convergence import FALL_LIMIT, fall_per_doubling, is_undertrained, undertrained
from saekit.training.loop import train
from saekit.training.settings import TrainSettings

ROWS = np.arange(1, 101) * 10_000


def curve(fvu):
    return list(zip(ROWS.tolist(), fvu.tolist()))


@pytest.mark.parametrize("fall", [0.02, 0.1, 0.3])
def test_a_power_law_falls_by_what_it_says(fall):
    points = curve(0.3 * ROWS ** np.log2(1 - fall))
    assert fall_per_doubling(points, 50_000, 800_000) == pytest.approx(fall)


def test_noise_of_batches_changes_little():
    noise = np.exp(0.02 * np.random.default_rng(0).standard_normal(100))
    points = curve(ROWS ** np.log2(0.95) * noise)
    assert fall_per_doubling(points, 50_000, 800_000) == pytest.approx(0.05, abs=0.02)


def test_a_curve_that_has_levelled_off_is_not_told_whatever_the_decay_brings():
    level = 0.06 + 0.5 * np.exp(-ROWS / 60_000)
    level[80:] *= np.linspace(1, 0.7, 20)  # the learning rate falls to 0
    fall = fall_per_doubling(curve(level), 50_000, 800_000)
    assert abs(fall) < 0.02
    assert not is_undertrained(fall)


def test_a_curve_with_no_constant_half_says_nothing():
    points = curve(1 / ROWS)
    assert fall_per_doubling(points, 500_000, 800_000) is None  # warm-up
    assert fall_per_doubling(points, 0, 0) is None  # decay throughout
    assert fall_per_doubling(points[:50], 0, 800_000) is not None
    assert fall_per_doubling(points[:42], 0, 800_000) is None
    assert not is_undertrained(None)


@pytest.fixture(scope="module")
def rows():
    return SyntheticRows(d_in=16, n_features=64, n_rows=60_000)


def run(rows, tokens, out, lr=1e-3, **settings):
    saes = train(
        TopK(n_latents=64, k=4, lr=lr), rows, seeds=[0, 1], tokens=tokens, out=out,
        settings=TrainSettings(batch_rows=256, **settings),
    )  # fmt: skip
    return saes, [each["code"] for each in json.loads((out / "run.json").read_text())["warnings"]]


def test_a_short_run_is_told_and_a_long_one_is_not(rows, tmp_path):
    short, told = run(rows, 25_600, tmp_path / "short")
    assert told.count("undertrained") == 2  # each SAE
    assert short[0].provenance["metrics"]["fvu_fall_per_doubling"] > FALL_LIMIT
    long, told = run(rows, 153_600, tmp_path / "long", lr=4e-3)
    assert "undertrained" not in told
    assert [each.code for each in compare(short).warnings].count("undertrained") == 1
    assert "undertrained" not in [each.code for each in compare(long).warnings]
    [warning] = undertrained([("a", short[0]), ("b", long[0])])
    assert "`a`" in warning.message
    assert "`b`" not in warning.message


def test_the_curve_does_not_depend_on_an_interruption(rows, tmp_path):
    whole, _ = run(rows, 51_200, tmp_path / "whole")

    def stop(record):
        if record["step"] == 150:
            raise RuntimeError

    config, settings = TopK(n_latents=64, k=4, lr=1e-3), TrainSettings(batch_rows=256)
    with pytest.raises(RuntimeError):
        train(config, rows, seeds=[0, 1], tokens=51_200, out=tmp_path / "cut", callbacks=[stop], settings=settings)
    cut, _ = run(rows, 51_200, tmp_path / "again")
    resumed = train(config, rows, seeds=[0, 1], tokens=51_200, out=tmp_path / "cut", resume=True, settings=settings)
    falls = [sae.provenance["metrics"]["fvu_fall_per_doubling"] for sae in (whole[0], cut[0], resumed[0])]
    assert falls[0] == falls[1] == falls[2]
    assert falls[0] is not None
