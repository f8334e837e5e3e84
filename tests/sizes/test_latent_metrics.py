"""Laws of what latents are like at each size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saekit.errors import ShapeError
from saekit.measure.mdl import DescriptionLength
from saekit.measure.token_statistics import TokenScores, token_detection
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule, TopKRule
from saekit.sizes.latent_metrics import nearest, over_latents, seed_overlap
from saekit.sizes.settings import SizeSettings
from saekit.sizes.size_curve import measure_sizes

QUICK = {"intervals": False, "sample_rows": 0, "latents": True}
N_ROWS, D = 600, 12


@pytest.fixture(scope="module")
def source() -> ArrayRows:
    g = torch.Generator().manual_seed(0)
    token = torch.randint(0, 20, (N_ROWS,), generator=g)
    x = torch.randn(20, D, generator=g)[token] + 0.5 * torch.randn(N_ROWS, D, generator=g)
    return ArrayRows(x, token=token.int(), document=torch.arange(N_ROWS) // 10)


def random_sae(seed=0, n=32, rule=None) -> SAE:
    W = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    W = W / W.norm(dim=1, keepdim=True)
    return SAE(W_enc=W, b_enc=torch.zeros(n), W_dec=W, b_dec=torch.zeros(D), rule=rule or TopKRule(3))


@pytest.mark.parametrize("selection", ["before", "after"])
def test_any_batching_gives_the_same(source, selection):
    one, other = (
        measure_sizes(
            random_sae(), source, [8, 16, 32], settings=SizeSettings(selection=selection, batch_rows=n, **QUICK)
        )
        for n in (7, 600)
    )
    for a, b in zip(one.points, other.points, strict=True):
        assert set(a.metrics) == set(b.metrics)
        for name in ("description_length", "purity", "detection", "ring_purity", "ring_detection"):
            assert a.metrics[name].value == pytest.approx(b.metrics[name].value, rel=1e-9)
            assert a.metrics[name].low == pytest.approx(b.metrics[name].low) or a.metrics[name].low is None
        for name in {"coactivation", "handed_over"} & set(a.metrics):
            assert a.metrics[name].value == b.metrics[name].value


def test_they_are_what_the_accumulators_say(source):
    sae = random_sae()
    point = measure_sizes(sae, source, [8, 32], settings=SizeSettings(**QUICK)).points[1].metrics
    length, halves = DescriptionLength(32), [TokenScores(32), TokenScores(32)]
    codes = sae.encode(source.x)
    length.update(codes)
    second = source.document // 2 % 2 == 1
    for scores, mine in zip(halves, (~second, second), strict=True):
        scores.update(codes.rows(mine), source.token[mine])
    assert point["description_length"].value == pytest.approx(length.compute())
    detection = token_detection(*halves)
    assert point["detection"].value == pytest.approx(float(detection.nanmean()))
    assert point["ring_detection"].value == pytest.approx(float(detection[8:].nanmean()))
    halves[0].merge(halves[1])
    assert point["purity"].value == pytest.approx(float(halves[0].compute().purity.nanmean()))
    assert point["purity"].value > point["purity_chance"].value
    assert point["detection"].low < point["detection"].value < point["detection"].high


def test_the_smallest_size_is_its_own_ring_and_has_no_parents(source):
    first, second = (
        point.metrics for point in measure_sizes(random_sae(), source, [8, 32], settings=SizeSettings(**QUICK)).points
    )
    assert first["ring_purity"] == first["purity"]
    assert "parent_cosine" not in first
    assert "parent_cosine" in second


def test_a_latent_that_takes_over_from_its_parent():
    general, special = torch.tensor([1.0, 0, 0]), torch.tensor([0.8, 0.6, 0])
    other = torch.tensor([0, 0, 1.0])
    W = torch.stack([general, other, special])
    rows = torch.cat([general.expand(30, 3), special.expand(10, 3), other.expand(20, 3)])
    common = {"W_enc": W, "b_enc": torch.zeros(3), "W_dec": W, "b_dec": torch.zeros(3)}
    compete, together = SAE(**common, rule=TopKRule(1)), SAE(**common, rule=ReLURule())
    found = measure_sizes(compete, rows, [2, 3], settings=SizeSettings(**QUICK)).points[1].metrics
    assert found["parent_cosine"].value == pytest.approx(0.8)
    assert (found["coactivation"].value, found["handed_over"].value) == (1, 1)
    found = measure_sizes(together, rows, [2, 3], settings=SizeSettings(**QUICK)).points[1].metrics
    assert (found["coactivation"].value, found["handed_over"].value) == (1, 0)
    unrelated = SAE(**common, rule=ReLURule()).permute(torch.tensor([1, 0, 2])).take(torch.tensor([0, 1]))
    found = measure_sizes(unrelated, rows, [1, 2], settings=SizeSettings(**QUICK)).points[1].metrics
    assert found["coactivation"].value == 0
    assert math.isnan(found["handed_over"].value)
    assert "no new latent fires with its parent" in found["handed_over"].reason


def test_saes_of_their_own_have_no_parents_and_prefixes_given_one_by_one_have(source):
    sae = random_sae()
    apart = measure_sizes([random_sae(1, 8), sae], source, settings=SizeSettings(**QUICK))
    assert all("parent_cosine" not in point.metrics for point in apart.points)
    assert apart.points[1].metrics["ring_purity"] == apart.points[1].metrics["purity"]
    given = measure_sizes([sae.take(8), sae], source, settings=SizeSettings(**QUICK))
    assert (
        given.points[1].metrics == measure_sizes(sae, source, [8, 32], settings=SizeSettings(**QUICK)).points[1].metrics
    )


def test_rows_without_tokens_have_no_interpretability(source):
    point = measure_sizes(random_sae(), source.x, [8], settings=SizeSettings(**QUICK)).points[0].metrics
    assert "description_length" in point
    assert "purity" not in point


def test_no_more_rows_than_asked_for(source):
    few = ArrayRows(source.x[:100], token=source.token[:100], document=source.document[:100])
    part = measure_sizes(random_sae(), source, [8, 32], settings=SizeSettings(max_rows=100, batch_rows=64, **QUICK))
    assert (
        part.points == measure_sizes(random_sae(), few, [8, 32], settings=SizeSettings(batch_rows=64, **QUICK)).points
    )


def test_rows_without_documents_are_divided_in_runs(source):
    found = (
        measure_sizes(random_sae(), ArrayRows(source.x, token=source.token), [8], settings=SizeSettings(**QUICK))
        .points[0]
        .metrics
    )
    assert found["detection"].value > 0.5


def test_overlap_of_seeds():
    sae = random_sae(n=20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert seed_overlap([sae, sae.permute(order)]).value == 1
    assert seed_overlap([sae, random_sae(5, 20)]).value < 0.2
    half = sae.replace(W_enc=torch.cat([sae.W_enc[:10], -sae.W_enc[10:]]))
    assert seed_overlap([sae, half]).value == pytest.approx(0.5)
    axes = torch.cat([torch.eye(D), torch.roll(torch.eye(D), 1, 1)[:1]])[:D]
    same = SAE(W_enc=axes, b_enc=torch.zeros(D), W_dec=axes, b_dec=torch.zeros(D), rule=ReLURule())
    turned = same.replace(W_enc=axes + torch.cat([torch.full((6, D), 0.5), torch.zeros(6, D)]))
    assert seed_overlap([same, turned]).value == 0.5  # the same partners, at a cosine of 0.7 and less
    three = seed_overlap([sae, sae.permute(order), half])
    assert three.value == pytest.approx(2 / 3)
    assert "over 3 pairs of seeds" in three.reason
    assert math.isnan(seed_overlap([sae]).value)
    with pytest.raises(ShapeError, match=r"all SAEs must be of one size; got \[20, 8\]"):
        seed_overlap([sae, random_sae(n=8)])


def test_nearest_rows_in_blocks(monkeypatch):
    g = torch.Generator().manual_seed(0)
    rows, among = torch.randn(50, 5, generator=g), torch.randn(30, 5, generator=g)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], among[None], dim=2)
    places, found = nearest(rows, among)
    np.testing.assert_array_equal(places, cosine.argmax(1).numpy())
    torch.testing.assert_close(found.float(), cosine.amax(1))


def test_means_over_few_latents():
    nan = math.nan
    assert over_latents("purity", torch.tensor([nan, nan])).reason.startswith("undefined")
    assert over_latents("purity", torch.tensor([0.5, nan])).reason == "no interval: one latent"
    found = over_latents("purity", torch.tensor([0.9, 1.0, 1.0]))
    assert found.high == 1
    assert found.low == pytest.approx(found.value - 1.96 * torch.tensor([0.9, 1.0, 1.0]).std().item() / 3**0.5)
