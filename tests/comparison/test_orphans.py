"""Orphans: what is planted is found, and what cannot be measured is refused."""

from __future__ import annotations

import math

import pytest
import torch

from saekit import compare
from saekit.comparison.orphans import orphans
from saekit.comparison.orphans_result import Orphans
from saekit.comparison.settings import ComparisonSettings, OrphanSettings
from saekit.errors import ConfigError, DataError, FormatError
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule


def gauss(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
        orphans([oracle, oracle.replace()], rows)
    with pytest.raises(ConfigError, match="`comparison` must be of these 3 SAEs, in this order"):
        orphans(family, rows, comparison=compare(family[::-1], settings=ComparisonSettings(controls=False)))
    with pytest.raises(ConfigError, match=r"`ranks` must lie within 1\.\.23"):
        orphans(family, rows, settings=OrphanSettings(ranks=[24]))
    with pytest.raises(ConfigError, match="orphans: `max_rows` must be a whole number from 1; got 0"):
        orphans(family, rows, settings=OrphanSettings(max_rows=0))
    with pytest.raises(DataError, match="at least one row"):
        orphans(family, rows[:0])
