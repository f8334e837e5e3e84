import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fixtures.learners import new
from saekit import ArrayRows, SyntheticRows
from saekit.errors import ConfigError
from saekit.training import initialization
from saekit.training.config import BatchTopK, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from saekit.training.initialization import geometric_median, initial_bias, initial_scale, initial_weights, level_of
from saekit.training.learner import generator
from saekit.training.loop import untrained
from saekit.training.settings import TrainSettings


def skewed():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=g).exp()
    x[:60] += 40.0
    return x


def test_geometric_median_minimizes_the_sum_of_distances():
    x = skewed()
    points = x.double().numpy()

    def cost(m):
        return np.linalg.norm(points - m, axis=1).sum()

    best = minimize(cost, np.median(points, axis=0), method="BFGS").x
    median = geometric_median(x).numpy()
    np.testing.assert_allclose(median, best, rtol=1e-3)
    # It is neither the mean nor the median of each coordinate.
    assert np.linalg.norm(median - points.mean(0)) > 1
    assert np.linalg.norm(median - np.median(points, axis=0)) > 0.05


@pytest.mark.parametrize("n", [10, 100, 16_384])
def test_geometric_median_of_identical_rows_is_that_row(n):
    row = 1e15 * torch.randn(7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(geometric_median(row.repeat(n, 1)), row)


def test_bias_options_differ_and_are_what_they_say():
    x = skewed()
    assert torch.equal(initial_bias(x, "zero"), torch.zeros(5))
    torch.testing.assert_close(initial_bias(x, "mean"), x.mean(0))
    torch.testing.assert_close(initial_bias(x, "geometric-median"), geometric_median(x))


def test_scale_gives_mean_length_root_d():
    x, bias = skewed(), torch.arange(5.0)
    scale = initial_scale(x, "scalar", bias)
    assert float((x * scale).norm(dim=1).mean()) == pytest.approx(5**0.5, rel=1e-5)
    scale = initial_scale(x, "centered", bias)
    assert float(((x - bias) * scale).norm(dim=1).mean()) == pytest.approx(5**0.5, rel=1e-5)
    torch.testing.assert_close(initial_scale(x + 100, "centered", bias + 100), scale)
    assert initial_scale(x, "none", bias) is None
    assert initial_scale(torch.zeros(4, 3), "scalar", torch.ones(3)) == 1
    assert initial_scale(torch.ones(4, 3), "centered", torch.ones(3)) == 1


@pytest.mark.parametrize("l0", [0.01, 1.0, 3.3, 29.0, 100.0])
@pytest.mark.parametrize("block_bytes", [1, 1000, 2**24])
def test_as_many_pre_activations_as_wanted_reach_the_level(l0, block_bytes, monkeypatch):
    monkeypatch.setattr(initialization, "BLOCK_BYTES", block_bytes)
    g = torch.Generator().manual_seed(0)
    x, W, bias = torch.randn(50, 7, generator=g), torch.randn(40, 7, generator=g), torch.randn(40, generator=g)
    level = level_of(x, W, bias, l0)
    reached = (torch.addmm(bias, x, W.T) >= level - 1e-5).sum()
    assert int(reached) == min(max(round(l0 * 50), 1), 50 * 40)


def test_encoder_starts_as_a_copy_in_other_storage():
    p = initial_weights(8, 3, generator(0, "init"))
    assert torch.equal(p["W_enc"], p["W_dec"])
    assert p["W_enc"].untyped_storage().data_ptr() != p["W_dec"].untyped_storage().data_ptr()
    torch.testing.assert_close(p["W_dec"].norm(dim=1), torch.ones(8))


def test_a_decoder_that_stays_frozen_is_random_with_the_covariance_of_the_rows():
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 1.0, 0.0]) + 5
    W = initial_weights(4000, 3, generator(0, "init"), x)["W_dec"]
    torch.testing.assert_close(W.norm(dim=1), torch.ones(4000))
    # the angle of a Gaussian row with deviations 10 and 1: its tangent is Cauchy with scale 1/10
    assert float((W[:, 1] / W[:, 0]).abs().median()) == pytest.approx(0.1, rel=0.08)
    assert float(W[:, 2].abs().max()) < 0.2
    rows = ArrayRows(x)
    settings = TrainSettings(batch_rows=512)
    frozen, other, free = (
        untrained(TopK(400, k=2, control=control), rows, 0, settings=settings)
        for control in ("frozen-decoder", "frozen-encoder", None)
    )
    assert torch.equal(other.W_dec, free.W_dec)
    assert float((frozen.W_dec[:, 0].abs() > 0.9).float().mean()) > 0.85
    assert float((free.W_dec[:, 0].abs() > 0.9).float().mean()) < 0.2


def test_untrained_is_the_start():
    rows = SyntheticRows(d_in=8, n_features=16, n_rows=4096, mean=2.0)
    sae = untrained(TopK(32, k=4), rows, 3, settings=TrainSettings(batch_rows=512))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.provenance["seed"] == 3
    assert sae.provenance["rows_seen"] == 0
    x = next(rows.batches(4096)).x
    norm = (sae.scaling.apply(x)[0] - sae.b_dec).norm(dim=1).mean()
    assert float(norm) == pytest.approx(8**0.5, rel=0.02)
    assert not torch.equal(sae.W_enc, untrained(TopK(32, k=4), rows, 4).W_enc)


@pytest.mark.parametrize("config", [BatchTopK(32, k=4), JumpReLU(32, target_l0=4)])
def test_untrained_thresholds_give_the_wanted_l0(config):
    rows = SyntheticRows(d_in=8, n_features=16, n_rows=4096)
    sae = untrained(config, rows)
    assert sae.encode(next(rows.batches(4096)).x).l0() == pytest.approx(4, rel=0.1)


def test_untrained_takes_an_array():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(untrained(ReLU(8), x).W_dec, untrained(ReLU(8), ArrayRows(x)).W_dec)


@pytest.mark.parametrize("kind", [TopK, BatchTopK, HierarchicalTopK, Matryoshka])
def test_encoder_rows_begin_as_long_as_they_are_told(kind):
    for options, length in (({}, 0.2), ({"encoder_length": 0.7}, 0.7), ({"aligned": True}, 1.0)):
        start = new(kind(16, k=3, **options)).parameters
        torch.testing.assert_close(start["W_enc"], length * start["W_dec"])


def test_an_untrained_baseline_has_encoder_rows_of_length_1():
    rows = ArrayRows(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    sae = untrained(TopK(8, k=2, encoder_length=0.2), rows)
    assert torch.equal(sae.W_enc, sae.W_dec)


@pytest.mark.parametrize("held", [{"aligned": True}, {"control": "frozen-encoder"}, {"control": "untrained"}])
def test_a_length_that_something_else_sets_is_refused(held):
    with pytest.raises(ConfigError, match=r"`TopK\.encoder_length` would change nothing"):
        TopK(16, k=3, encoder_length=0.7, **held)
