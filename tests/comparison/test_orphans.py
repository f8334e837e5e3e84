"""Laws of orphans: subspaces, matching by frequency, and what is planted is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saekit import compare
from saekit.comparison.orphans import (
    Orphans,
    frequency_matched,
    orphans,
    over_saes,
    principal_angles,
    silenced,
    span_of,
)
from saekit.comparison.settings import ComparisonSettings, OrphanSettings
from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.evaluation.run import evaluate
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure.importance import importance
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ subspaces


@given(d=st.integers(2, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_equal_spans_have_no_angle_between_them(d, rank, seed):
    rank = min(rank, d)
    rows = gauss(rank, d, seed=seed)
    mixed = gauss(rank, rank, seed=seed + 1).double() @ rows.double()
    assert principal_angles(rows, rows).abs().max() < 1e-7
    if float(torch.linalg.cond(mixed)) < 1e5:
        assert principal_angles(rows.double(), mixed).abs().max() < 1e-6
        assert principal_angles(mixed, rows.double()[: (rank + 1) // 2]).abs().max() < 1e-6


def test_known_angles():
    a = torch.eye(4)[:2]
    b = torch.tensor([[math.cos(0.3), 0, math.sin(0.3), 0], [0, 0, 0, 1.0]])
    assert principal_angles(a, b).tolist() == pytest.approx([0.3, math.pi / 2], abs=1e-6)
    assert principal_angles(torch.eye(4)[:2], torch.eye(4)[2:]).tolist() == pytest.approx([math.pi / 2] * 2)
    tiny = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert principal_angles(tiny, torch.tensor([[1.0, 0.0]])).tolist() == pytest.approx([1e-9], rel=1e-3)


def test_the_span_does_not_see_lengths_and_signs():
    rows = gauss(9, 5)
    other = rows * torch.tensor([1.0, -3, 0.1, 7, 1, -1, 2, 5, 0.5])[:, None]
    assert principal_angles(span_of(rows, 3), span_of(other, 3)).abs().max() < 1e-6
    basis = span_of(rows, 3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="4 dimensions need at least as many rows; got 3"):
        span_of(rows[:3], 4)
    with pytest.raises(ShapeError, match="two matrices of one width are needed"):
        principal_angles(rows, rows[:, :3])


# ------------------------------------------------------------------ matching and silencing


@given(n=st.integers(1, 200), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_matched_latents_have_equal_frequencies(n, share, seed):
    generator = np.random.default_rng(seed)
    frequency = np.where(generator.random(n) < 0.1, 0, generator.random(n) ** 3)
    shared = generator.random(n) < share
    orphan, mate = frequency_matched(frequency, shared, generator)
    assert len(orphan) == len(mate) == len(set(orphan.tolist())) == len(set(mate.tolist()))
    assert not shared[orphan].any()
    assert shared[mate].all()
    assert (frequency[orphan] > 0).all()
    ratio = np.sort(frequency[orphan]) / np.sort(frequency[mate])
    assert ((ratio > 2**-0.2501) & (ratio < 2**0.2501)).all()


def test_silencing_one_latent_costs_its_loss(oracle, rows):
    lost = importance(oracle, rows).scores["loss"]
    whole, without = (
        evaluate(sae, rows, settings=EvaluationSettings(controls=False, draws=0)).metrics.fvu.value
        for sae in (oracle, silenced(oracle, [5]))
    )
    variance = float(rows.double().var(0, unbiased=False).sum())
    assert without - whole == pytest.approx(float(lost[5]) / variance, rel=1e-4)


# ------------------------------------------------------------------ the study


@pytest.fixture(scope="module")
def family(oracle) -> list[SAE]:
    """Three SAEs with the 48 true directions: 32 of them exact in all, the last 16 turned another way in each."""
    saes = []
    for seed in range(3):
        W = oracle.W_dec.clone()
        W[32:] = W[32:] + 2 * torch.nn.functional.normalize(gauss(16, 24, seed=seed), dim=1)
        W = torch.nn.functional.normalize(W, dim=1)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(seed))
        saes.append(oracle.replace(W_enc=W, W_dec=W, rule=TopKRule(2), provenance={"seed": seed}).permute(order))
    return saes


@pytest.fixture(scope="module")
def found(family, rows) -> Orphans:
    token = (rows[:, 0] * 3).round().long() % 7
    document = torch.arange(len(rows)) // 30
    return orphans(
        family, ArrayRows(rows, token=token, document=document), settings=OrphanSettings(ranks=[4, 12], batch_rows=700)
    )


def test_what_is_planted_is_found(found, family):
    assert found.n_orphans == [16, 16, 16]
    assert found.n_shared == [32, 32, 32]
    loss = found.property("loss")
    assert loss.auc.value < 0.4
    assert loss.orphans.value < loss.shared.value
    assert {"lift", "detection", "frequency", "neighbour"} <= {each.name for each in found.properties}
    assert "decoder_norm" not in {each.name for each in found.properties}  # all are 1
    cost = {each.latents: each for each in found.silenced}
    assert cost["all orphans"].n_latents == 16
    assert cost["all shared"].fvu.value > cost["all orphans"].fvu.value
    assert cost["orphans, matched"].n_latents == cost["shared, matched"].n_latents
    assert found.fvu_difference.value == pytest.approx(
        cost["orphans, matched"].fvu.value - cost["shared, matched"].fvu.value
    )
    assert found.ce_difference is None
    assert [span.rank for span in found.spans] == [4, 12]
    for span in found.spans:
        assert span.shared.value == pytest.approx(1, abs=1e-6)
        assert span.orphans.value < 0.9
        assert span.null.value == span.rank / 24
        assert span.null.low < span.null.value < span.null.high


def test_any_batching_and_a_given_comparison_give_the_same(found, family, rows):
    token = (rows[:, 0] * 3).round().long() % 7
    source = ArrayRows(rows, token=token, document=torch.arange(len(rows)) // 30)
    again = orphans(
        family,
        source,
        comparison=compare(family, settings=ComparisonSettings(controls=False)),
        settings=OrphanSettings(ranks=[4, 12], batch_rows=3000),
    )
    for one, other in zip(found.properties, again.properties, strict=True):
        assert one.auc.value == pytest.approx(other.auc.value, abs=1e-6)
        assert one.p == pytest.approx(other.p, rel=1e-3)
    assert [each.fvu.value for each in found.silenced] == pytest.approx([each.fvu.value for each in again.silenced])


def test_detection_has_both_halves_whatever_the_ids_of_documents(family, rows):
    token = (rows[:, 0] * 3).round().long() % 7
    for document in (torch.arange(len(rows)) // 30 * 10 + 9, torch.arange(len(rows)) // 30 * 2**20):
        found = orphans(
            family[:2], ArrayRows(rows, token=token, document=document), settings=OrphanSettings(max_rows=1500)
        )
        assert math.isfinite(found.property("detection").orphans.value)


def test_rows_without_tokens_have_no_interpretability(family, rows):
    plain = orphans(family[:2], rows, settings=OrphanSettings(max_rows=600))
    assert plain.n_rows == 600
    assert not {"lift", "detection"} & {each.name for each in plain.properties}
    assert "over latents" in plain.property("loss").auc.reason
    assert plain.spans[0].orphans.low is None


def test_round_trip_and_table(found, tmp_path):
    found.save(tmp_path / "orphans.json")
    assert Orphans.load(tmp_path / "orphans.json") == found
    assert "48 orphans and 96 shared latents of 3 SAEs" in repr(found)
    assert "<th>loss</th>" in found._repr_html_() or "loss" in found._repr_html_()
    with pytest.raises(FormatError, match="must be 'orphans'"):
        Orphans.from_json({"kind": "comparison"})


def test_what_is_refused(family, rows, oracle):
    with pytest.raises(ConfigError, match="at least two SAEs must be given; an orphan"):
        orphans(family[:1], rows)
    with pytest.raises(DataError, match=r"needs at least 2 orphans .* they have \[\(0, 48\), \(0, 48\)\]"):
        orphans([oracle, oracle], rows)
    with pytest.raises(ConfigError, match="`comparison` must be of these 3 SAEs, in this order"):
        orphans(family, rows, comparison=compare(family[::-1], settings=ComparisonSettings(controls=False)))
    with pytest.raises(ConfigError, match=r"`ranks` must lie within 1\.\.23"):
        orphans(family, rows, settings=OrphanSettings(ranks=[24]))
    with pytest.raises(ConfigError, match="orphans: `max_rows` must be a whole number from 1; got 0"):
        orphans(family, rows, settings=OrphanSettings(max_rows=0))
    with pytest.raises(DataError, match="at least one row"):
        orphans(family, rows[:0])


def test_means_over_saes():
    mean = over_saes([1.0, 2.0, 3.0])
    assert (mean.low, mean.value, mean.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2, 2 + 4.302653 / 3**0.5))
    assert over_saes([1.0, 2.0]).low is None
    assert over_saes([0.6, 0.8], fallback=0.1).reason.startswith("interval over latents")
    assert math.isnan(over_saes([math.nan]).value)
