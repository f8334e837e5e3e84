"""Choosing k: rows whose L0 is known, curves that decide nothing, resuming, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from saekit import JumpReLU, SyntheticRows, TopK, TrainSettings, train
from saekit.errors import ConfigError, DataError, FormatError
from saekit.report.page import sections_of
from saekit.rows.arrays import ArrayRows
from saekit.sizes import sparsity
from saekit.sizes.k_choice import KChoice, KPoint, decide, with_means
from saekit.sizes.settings import KChoiceSettings
from saekit.sizes.sparsity import choose_k

CONFIG = TopK(n_latents=16, k=1)
SMALL = TrainSettings(batch_rows=64)


@pytest.fixture(scope="module")
def rows() -> SyntheticRows:
    return SyntheticRows(d_in=24, n_features=16, l0=3.0, power=0.0, parting=100, n_rows=40_000)


@pytest.fixture(scope="module")
def choice(rows) -> KChoice:
    settings = KChoiceSettings(ks=(1, 3, 8), share=0.25)
    return choose_k(CONFIG, rows, tokens=48_000, settings=settings, train_settings=SMALL)


def points(*curve: tuple[float, ...]) -> list[KPoint]:
    return [KPoint(2**at, list(each), [0.5] * len(each)) for at, each in enumerate(curve)]


def test_the_known_l0_is_found(choice):
    assert choice.k == choice.decided == 3
    assert choice.near == [3]
    assert [len(point.projections) for point in choice.points] == [2, 2, 2]


def test_the_rows_that_it_used_are_charged_on_top_of_the_run(choice):
    assert (choice.rows_used, choice.n_saes) == (12_000, 6)
    assert choice.caption().endswith("the choice read 12,000 rows on top of the run, 6 SAEs each")
    main, *_ = sections_of(choice.to_json())
    assert "the choice read 12,000 rows on top of the run, 6 SAEs each" in main.intro


def test_the_result_is_read_back_and_shown(choice, tmp_path):
    choice.save(tmp_path / "k_choice.json")
    assert KChoice.load(tmp_path / "k_choice.json") == choice
    main, *_ = sections_of(choice.to_json())
    assert [row[0].text for row in main.tables[0].rows] == ["k = 1", "k = 3", "k = 8"]
    assert [row[0].is_strong for row in main.tables[0].rows] == [False, True, False]
    assert "lowest at k = 3" in main.intro
    assert "chosen" in str(choice)


def test_a_minimum_inside_the_curve_decides():
    k, near, why = decide(points((0.5, 0.51), (0.2, 0.21), (0.205, 0.21), (0.6, 0.61)))
    assert (k, near) == (2, [2, 4])
    assert "not told apart from 4" in why


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (points((0.5, 0.51), (0.4, 0.41), (0.3, 0.31)), "largest k that was tried, 4"),
        (points((0.1, 0.11), (0.4, 0.41), (0.3, 0.31)), "smallest k that was tried, 1"),
        (points((0.5, 0.1), (0.2, 0.3), (0.3, 0.5)), "the curve is flat"),
        (points((0.5, 0.51), (0.3, 0.31), (0.31, 0.31)), "the curve is flat"),
        (points((0.2, 0.2), (0.2, 0.2), (0.2, 0.2)), "smallest k"),
    ],
)
def test_a_curve_that_does_not_decide_says_so(curve, said):
    k, _, why = decide(curve)
    assert k is None
    assert said in why


def test_the_interval_is_that_of_the_spread_over_seeds():
    [first, *_] = with_means(points((0.5, 0.52), (0.2, 0.22), (0.3, 0.32)))
    # every k has a standard deviation of .01 sqrt 2; t with 3 degrees of freedom is 3.182
    assert first.projection.value == pytest.approx(0.51)
    assert first.projection.high - first.projection.value == pytest.approx(3.18245 * 0.01, rel=1e-4)


def test_what_does_not_decide_is_refused_when_asked_for_its_k(choice):
    open_ = dataclasses.replace(choice, k=None, why="the curve is flat")
    with pytest.raises(ConfigError, match=r"the curve is flat\. Give `k`"):
        _ = open_.decided
    with pytest.raises(FormatError, match="increasing k"):
        dataclasses.replace(choice, k=5).check()


def test_an_interrupted_choice_goes_on_with_the_same_result(rows, tmp_path, monkeypatch):
    settings = KChoiceSettings(ks=(1, 3, 8), share=0.25)
    asked = {"tokens": 8_000, "settings": settings, "train_settings": dataclasses.replace(SMALL, checkpoint_every=10)}
    choice = choose_k(CONFIG, rows, **asked)

    def stops(record):
        if record["step"] >= 20:
            raise KeyboardInterrupt

    def interrupted(*args, **kwargs):
        return train(*args, **kwargs, callbacks=[stops])

    monkeypatch.setattr(sparsity, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose_k(CONFIG, rows, out=tmp_path, **asked)
    assert not (tmp_path / "k_choice.json").exists()
    monkeypatch.setattr(sparsity, "train", train)
    found = choose_k(CONFIG, rows, out=tmp_path, resume=True, **asked)
    assert [each.projections for each in found.points] == [each.projections for each in choice.points]
    monkeypatch.setattr(sparsity, "train", None)  # a finished one is read back
    assert choose_k(CONFIG, rows, out=tmp_path, resume=True, **asked) == found
    with pytest.raises(ConfigError, match=r"`share` was 0\.25, now 0\.5"):
        choose_k(
            CONFIG, rows, out=tmp_path, resume=True, **{**asked, "settings": dataclasses.replace(settings, share=0.5)}
        )


def test_what_cannot_be_chosen_is_refused(rows, monkeypatch):
    with pytest.raises(ConfigError, match="the architecture must have a k"):
        choose_k(JumpReLU(n_latents=16, target_l0=3), rows)
    with pytest.raises(ConfigError, match="must be at least a batch"):
        choose_k(CONFIG, rows, tokens=2000)
    for few in (1, 3, 7):
        with pytest.raises(
            ConfigError, match=rf"must leave three or more k to try.*got {few} latents and .* 24\. Give"
        ):
            choose_k(TopK(few, k=1), rows)
    with pytest.raises(ConfigError, match="`tokens` must be given"):
        choose_k(CONFIG, dataclasses.replace(rows, n_rows=None))
    with pytest.raises(ConfigError, match="must have no targets"):
        choose_k(CONFIG, ArrayRows(torch.randn(4000, 8, generator=torch.Generator()), target=torch.ones(4000, 3)))
    with pytest.raises(ConfigError, match="k=20"):
        choose_k(CONFIG, rows, settings=KChoiceSettings(ks=(1, 2, 20)))
    same, ks = ArrayRows(torch.ones(4000, 8)), KChoiceSettings(ks=(1, 2, 3))
    with pytest.raises(DataError, match="these are all the same"):
        choose_k(TopK(8, k=1), same, settings=ks)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process"):
        choose_k(CONFIG, rows)


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"share": 0.0}, {"share": 1.0}, {"seeds": 1}, {"ks": (4, 2, 8)}, {"ks": (2, 4)}, {"ks": (0, 1, 2)}):
        with pytest.raises(ConfigError, match=f"choose_k: `{next(iter(wrong))}`"):
            KChoiceSettings(**wrong)
