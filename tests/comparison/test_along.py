"""Snapshots of a run, compared like its SAEs: what they share, and whether it still rises."""

from __future__ import annotations

import shutil

import pytest
import torch

from saekit import TopK, TrainSettings, compare, train
from saekit.comparison.along import _difference, _partners_warning, _warning, along
from saekit.comparison.result import Comparison
from saekit.comparison.settings import ComparisonSettings
from saekit.errors import ConfigError
from saekit.measure.results import Measured
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.model import SAE

PLAIN = ComparisonSettings(controls=False)
ROWS = SyntheticRows(n_rows=8192, d_in=16, n_features=24, l0=2, noise=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("along") / "run"
    settings = TrainSettings(batch_rows=128, snapshots=3)
    train(TopK(24, k=2), ROWS, seeds=[0, 1, 2], tokens=64 * 128, settings=settings, out=folder, progress=False)
    return folder


def paths(run):
    return [str(run / f"topk-24-k2-seed{seed}") for seed in range(3)]


def test_snapshots_are_the_saes_of_shorter_looks(run):
    """At a half, a quarter and an eighth of the steps; the weights are those that the run went through."""
    steps = sorted(folder.name for folder in (run / "snapshots").iterdir())
    assert steps == ["step-00000008", "step-00000016", "step-00000032"]
    seen = [SAE.load(run / "snapshots" / step / "topk-24-k2-seed1").provenance["rows_seen"] for step in steps]
    assert seen == [8 * 128, 16 * 128, 32 * 128]
    assert sorted(p.name for p in run.iterdir() if (p / "sae.json").is_file()) == [
        f"topk-24-k2-seed{i}" for i in range(3)
    ]


def test_an_interrupted_run_keeps_the_same_snapshots(run, tmp_path):
    class Stopped(Exception):
        pass

    def stop(record):
        if record["step"] == 20:
            raise Stopped

    settings = TrainSettings(batch_rows=128, snapshots=3, checkpoint_every=6)
    options = {"seeds": [0, 1, 2], "tokens": 64 * 128, "settings": settings, "out": tmp_path / "b", "progress": False}
    with pytest.raises(Stopped):
        train(TopK(24, k=2), ROWS, **options, callbacks=[stop])
    train(TopK(24, k=2), ROWS, **options, resume=True)
    for step in ("step-00000008", "step-00000016", "step-00000032"):
        one, other = (SAE.load(place / "snapshots" / step / "topk-24-k2-seed2") for place in (run, tmp_path / "b"))
        assert torch.equal(one.W_enc, other.W_enc)
        assert one.digest() == other.digest()


def test_points_are_comparisons_and_a_rise_is_told(run, tmp_path):
    final = compare(paths(run), settings=PLAIN, progress=False)
    result = along(paths(run), final, settings=PLAIN, progress=False)
    assert [point.rows_seen for point in result.along] == [1024, 2048, 4096, 8192]
    assert result.along[-1].shared == final.shared
    half = compare(
        [str(run / "snapshots" / "step-00000032" / f"topk-24-k2-seed{seed}") for seed in range(3)], settings=PLAIN
    )
    assert result.along[2].shared == half.shared
    assert result.shared_rise.value == pytest.approx(final.shared.value - half.shared.value)
    assert result.shared_rise.value > 0.02
    told = [warning for warning in result.warnings if warning.code == "shared_still_rises"]
    assert bool(told) == (result.shared_rise.low > 0)
    if told:
        assert "the last doubling of the rows still raised the shared fraction by" in told[0].message
    result.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == result
    assert [line[0] for line in result.along_table()] == ["rows seen", "1,024", "2,048", "4,096", "8,192"]


def test_a_rise_that_seeds_do_not_decide_is_told_as_such(run):
    two = paths(run)[:2]
    known = compare(two, settings=PLAIN, progress=False)
    for rise, code in (
        (Measured(0.1, 0.05, 0.15), ["shared_still_rises"]),
        (Measured(0.1, -0.05, 0.25), ["shared_may_rise"]),
        (Measured(0.1, None, None), ["shared_may_rise"]),
        (Measured(0.01, -0.05, 0.07), []),
    ):
        assert [each.code for each in _warning(rise, known, run)] == code


def test_a_difference_has_no_interval_where_one_side_has_none():
    for pair in [(Measured(0.5), Measured(0.2, 0.1, 0.3)), (Measured(0.5, 0.4, 0.6), Measured(0.2))]:
        found = _difference(*pair)
        assert (found.value, found.low, found.high) == (pytest.approx(0.3), None, None)


def test_the_interval_of_a_difference():
    found = _difference(Measured(0.5, 0.4, 0.6), Measured(0.2, 0.17, 0.24))
    assert found.value == pytest.approx(0.3)
    assert (found.low, found.high) == pytest.approx((0.3 - (0.1**2 + 0.04**2) ** 0.5, 0.3 + (0.1**2 + 0.03**2) ** 0.5))


def test_what_is_refused(run, tmp_path):
    final = compare(paths(run)[:2], settings=PLAIN)
    for seed in (0, 1):
        shutil.copytree(run / f"topk-24-k2-seed{seed}", tmp_path / "other" / f"topk-24-k2-seed{seed}")
    with pytest.raises(ConfigError, match=r"along: `.*other` must hold snapshots.*--snapshots 4"):
        along([str(tmp_path / "other" / f"topk-24-k2-seed{seed}") for seed in (0, 1)], final)
    with pytest.raises(ConfigError, match="along: the SAEs must be of one run; they lie in 2 folders"):
        along([paths(run)[0], str(tmp_path / "other" / "topk-24-k2-seed1")], final)
    with pytest.raises(ConfigError, match="`snapshots`"):
        TrainSettings(snapshots=-1)


def test_one_sae_shares_nothing_with_itself(run):
    with pytest.raises(ConfigError, match=r"along: at least two SAEs of a run must be given.*--seeds 0,1"):
        along(paths(run)[:1], None)


def test_partners_that_still_become_equal_are_told_where_nothing_is_shared(tmp_path):
    rises = Measured(0.08, 0.03, 0.13), Measured(0.08, -0.01, 0.17), Measured(0.01, 0.005, 0.015)
    told = [[each.code for each in _partners_warning(rise, tmp_path)] for rise in rises]
    assert told == [["partners_still_rise"], [], []]
