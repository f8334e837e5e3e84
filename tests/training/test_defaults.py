"""Defaults: the learning rate, the window for dead latents and the batch that a run takes when none is given."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saekit.errors import ConfigError
from saekit.files import read_sealed, write_sealed
from saekit.rows.arrays import ArrayRows
from saekit.rows.synthetic import SyntheticRows
from saekit.training.architectures import ARCHITECTURES
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from saekit.training.defaults import LARGEST_LR, LEARNING_RATES, default_batch_rows, resolve
from saekit.training.loop import train, untrained
from saekit.training.settings import TrainSettings


def lr(config, steps, batch=550, d_in=64):
    return resolve(config, d_in, steps, batch).lr


def test_the_learning_rate_falls_with_the_width_and_with_steps_beyond_a_thousand():
    assert lr(TopK(1024, k=16), 100) == lr(TopK(1024, k=16), 1000) == pytest.approx(9.6e-3)
    assert lr(TopK(4096, k=16), 1000) == pytest.approx(9.6e-3 / 4**0.75)
    assert lr(JumpReLU(4096, target_l0=16), 1000, 1024) == pytest.approx(4e-3)
    assert lr(Matryoshka(4096, k=16), 1000, 1024) == pytest.approx(4.8e-3)
    assert lr(TopK(256, k=16), 1000) == lr(TopK(32, k=16), 1000) == LARGEST_LR
    assert lr(TopK(1024, k=16), 16_000) == pytest.approx(4.8e-3)
    # Meets the rule of long runs on large SAEs, 2e-4 at 2**14 latents (2406.04093).
    assert 2e-4 < lr(TopK(2**14, k=32), 100_000, 4096) < 1e-3


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1000, 10**6), st.integers(64, 10**6))
def test_the_learning_rate_goes_with_the_batch_where_the_largest_are_kept(batch, steps, n):
    config = TopK(n, k=16)
    assert lr(config, steps, batch) <= lr(config, steps, batch + 1) <= lr(config, steps, 1100) <= LARGEST_LR
    if n >= 1024 and 256 <= batch <= 900:  # below the largest
        assert lr(config, steps, batch) == pytest.approx(lr(config, steps, 550) * batch / 550)
    if n >= 1024 and batch < 256:
        assert lr(config, steps, batch) == pytest.approx(lr(config, steps, 256) * (batch / 256) ** 0.5)
    # A run too short to lose latents takes the full rate.
    assert lr(config, 1, batch) == pytest.approx(
        min(9.6e-3 * min((1024 / n) ** 0.5, (1024 / n) ** 0.75), LARGEST_LR), rel=0.01
    )


@pytest.mark.parametrize(
    ("config", "rows", "most"),
    [
        (JumpReLU(1024, target_l0=4), 1024, 8e-3),
        (Gated(1024, target_l0=32), 512, 9.6e-3),
        (ReLU(1024, target_l0=32), 512, 12.8e-3),
    ],
)
def test_the_learning_rate_falls_with_the_root_of_small_batches(config, rows, most):
    assert lr(config, 1000, 4096) == lr(config, 1000, rows) == lr(config, 10, rows) == pytest.approx(most)
    assert lr(config, 1000, rows // 2) == pytest.approx(most / 2**0.5)
    assert lr(config, 1000, rows // 16) == pytest.approx(most / 4)
    assert lr(config, 16_000, rows // 16) == pytest.approx(most / 8)
    # Short runs lose no latents at the rate of larger batches, and end lower.
    assert lr(config, 500, rows // 16) == pytest.approx(most / 2)
    assert lr(config, 10, rows // 16) == pytest.approx(most, rel=0.02)


def test_the_more_latents_compete_the_less_the_rate_rises_in_large_batches():
    alone = lr(TopK(1024, k=16), 1000, 4096)
    over_a_batch = lr(BatchTopK(1024, k=16), 1000, 4096)
    nested = lr(Matryoshka(1024, k=16), 1000, 4096)
    assert alone == lr(HierarchicalTopK(1024, k=16), 1000, 4096) == LARGEST_LR
    assert LARGEST_LR > over_a_batch > nested == pytest.approx(9.6e-3)
    assert nested > lr(TopK(1024, k=16, sign="magnitude"), 1000, 4096)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 10_000), st.integers(1, 5000), st.integers(64, 2**16))
def test_the_learning_rate_goes_with_a_power_of_k_up_to_twice_sixteen(k, batch, steps, n):
    for make in (TopK, BatchTopK, HierarchicalTopK, Matryoshka):
        rule = LEARNING_RATES[make.arch]
        factor = (min(k, 32) / 16) ** (rule.few if k < 16 else rule.many)
        at_16, at_k = lr(make(n, k=16), steps, batch), lr(make(n, k=k), steps, batch)
        falls = min(1, 1024 / n) ** ((rule.falls or 0) * min(1, steps / 500))
        largest = LARGEST_LR * max(1, min(k, 32) / 16) ** 0.25 * falls
        long = min(1, 1000 / steps) ** 0.25
        if n >= 1024 and at_k < 0.999 * largest * long and at_16 < 0.999 * LARGEST_LR * falls * long:
            assert at_k == pytest.approx(at_16 * factor)
        # The largest rate is the same for few latents per row: narrow SAEs need not wait for it.
        assert min(1, factor) * at_16 <= at_k * (1 + 1e-9)
        assert at_k <= largest * (1 + 1e-9)
    assert lr(TopK(24, k=3), 300) == lr(TopK(24, k=16), 300) == LARGEST_LR


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 10_000), st.integers(1, 5000), st.integers(32, 2**16))
def test_the_largest_rate_falls_with_the_width_of_rows_where_rates_are_highest(d, batch, steps, n):
    for make, power in ((TopK, 0.75), (HierarchicalTopK, 0.75), (BatchTopK, 0.0), (Matryoshka, 0.0)):
        at_d, at_64 = lr(make(n, k=16), steps, batch, d), lr(make(n, k=16), steps, batch)
        falls = min(1, 64 / d) ** 0.5 * min(1, 1024 / n) ** power
        most = LARGEST_LR * falls ** min(1, steps / 500) * min(1, 1000 / steps) ** 0.25
        assert at_d == pytest.approx(min(at_64, most))  # small batches, whose rates are lower, have the same for any
    assert lr(ReLU(n, target_l0=16), steps, batch, d) == lr(ReLU(n, target_l0=16), steps, batch)
    # The rule that long runs on language models are made with: 2e-4 at 2**14 latents (2406.04093).
    assert 1e-4 < lr(TopK(2**14, k=64), 50_000, 4096, 2304) < 4e-4


def test_every_architecture_has_a_learning_rate():
    """The fewer latents per row, the higher is the rate of nested sizes; the more, the lower that of JumpReLU."""
    assert LEARNING_RATES.keys() == {*ARCHITECTURES, "abstopk"}
    assert lr(Matryoshka(1024, k=8), 1000, 1024) == pytest.approx(2**0.5 * lr(Matryoshka(1024, k=16), 1000, 1024))
    assert lr(JumpReLU(1024, target_l0=32), 1000) == pytest.approx(lr(JumpReLU(1024, target_l0=4), 1000) / 2**0.4)


def test_what_follows_the_width_of_the_rows_and_the_length_of_the_run():
    long = resolve(TopK(2**14, k=32), 768, 100_000, 4096)
    assert (long.warmup_steps, long.decay_steps, long.k_aux) == (1000, 35_000, 384)
    assert long.threshold_start == 1000
    assert long.threshold_decay == pytest.approx(0.999)
    short = resolve(TopK(16, k=4), 64, 100, 256)
    assert (short.warmup_steps, short.k_aux, short.threshold_start) == (10, 16, 50)
    assert resolve(JumpReLU(16, target_l0=4), 64, 100, 256).warmup_steps == 5  # only where the largest are kept


def test_what_is_given_wins():
    given = TopK(n_latents=64, k=4, lr=1e-4, dead_after_rows=123, warmup_steps=7)
    resolved = resolve(given, 64, 1000, 512)
    assert (resolved.lr, resolved.dead_after_rows, resolved.warmup_steps) == (1e-4, 123, 7)


def test_latents_are_dead_after_a_fiftieth_of_the_run_within_bounds():
    def window(steps, batch):
        return resolve(TopK(n_latents=64, k=4), 64, steps, batch).dead_after_rows

    assert window(1000, 1000) == 20_000
    assert window(100, 1000) == 8000  # a shorter one would be a few batches
    assert window(1_000_000, 4096) == 10_000_000


def test_the_default_batch_gives_about_a_thousand_steps():
    for rows in (256_000, 700_000, 1_000_000, 3_000_000):
        assert 700 < rows / default_batch_rows(rows) < 1420
    assert default_batch_rows(10) == 256
    assert default_batch_rows(10**9) == 4096


@pytest.fixture
def rows():
    return SyntheticRows(d_in=8, n_features=16, n_rows=20_000)


def test_a_run_records_what_it_filled_in(tmp_path, rows):
    config = TopK(n_latents=32, k=4)
    [sae] = train(config, rows, tokens=10_000, out=tmp_path)
    asked = json.loads((tmp_path / "run.json").read_text())["request"]
    assert asked["batch_rows"] == 256
    assert asked["resolved"] == [dataclasses.asdict(resolve(config, 8, 39, 256))]
    assert sae.provenance["resolved"] == {"lr": asked["resolved"][0]["lr"], "dead_after_rows": 2048, "batch_rows": 256}
    # The same, said by hand: the same SAE.
    by_hand = dataclasses.replace(config, lr=asked["resolved"][0]["lr"], dead_after_rows=2048)
    [again] = train(by_hand, rows, tokens=10_000, settings=TrainSettings(batch_rows=256))
    assert torch.equal(again.W_dec, sae.W_dec)


def interrupted(rows, out, **options):
    def stop(record):
        if record["step"] == 20:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(TopK(n_latents=32, k=4), rows, out=out, callbacks=[stop], **options)


def rewrite(out, change):
    record = read_sealed(out / "run.json", since=2, version="format")
    change(record["request"])
    write_sealed(out / "run.json", record)


def test_a_resumed_run_goes_on_with_the_learning_rate_it_recorded(tmp_path, rows):
    options = {"tokens": 10_240, "settings": TrainSettings(checkpoint_every=10)}
    interrupted(rows, tmp_path, **options)
    rewrite(tmp_path, lambda asked: asked["resolved"][0].update(lr=1e-3))  # as a release with another rule would
    [resumed] = train(TopK(n_latents=32, k=4), rows, out=tmp_path, resume=True, **options)
    assert resumed.provenance["resolved"]["lr"] == 1e-3
    assert json.loads((tmp_path / "run.json").read_text())["request"]["resolved"][0]["lr"] == 1e-3
    [other] = train(TopK(n_latents=32, k=4), rows, **options)
    assert not torch.equal(resumed.W_dec, other.W_dec)


def test_a_run_of_a_release_with_other_defaults_is_not_resumed_with_ours(tmp_path, rows):
    interrupted(rows, tmp_path, tokens=10_240)
    rewrite(tmp_path, lambda asked: asked.pop("resolved"))
    with pytest.raises(ConfigError, match="must have recorded its learning rate"):
        train(TopK(n_latents=32, k=4), rows, out=tmp_path, resume=True, tokens=10_240)


@pytest.mark.parametrize(
    "config", [TopK(n_latents=16, k=3), JumpReLU(n_latents=16, target_l0=3)], ids=["topk", "jumprelu"]
)
def test_rows_whose_mean_is_far_from_zero_are_trained_on_like_others(config):
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(16, 8, generator=generator)
    codes = torch.rand(6000, 16, generator=generator)
    x = (codes * (codes > 0.8)) @ basis
    spread = float(x.std())
    trained = {}
    for shift in (0.0, 300 * spread):
        [sae] = train(config, ArrayRows((x + shift).numpy()), tokens=40_000)
        x_hat = sae.decode(sae.encode(x + shift))
        trained[shift] = float((x + shift - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum())
        assert float(sae.scaling.scale) == pytest.approx(8**0.5 / float((x - x.mean(0)).norm(dim=1).mean()), rel=0.02)
    near, far = trained.values()
    assert near < 0.2
    assert far < 1.2 * near


def test_an_untrained_sae_has_the_scale_of_the_trained_one():
    config, rows = TopK(n_latents=32, k=4), SyntheticRows(d_in=8, n_features=16, n_rows=20_480)
    [sae] = train(config, rows)
    assert torch.equal(sae.scaling.scale, untrained(config, rows).scaling.scale)
