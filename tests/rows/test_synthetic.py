"""Rows from a known dictionary."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import ConfigError
from saekit.rows.shards import open_rows
from saekit.rows.synthetic import SyntheticRows


def test_rows_are_what_the_formula_says():
    rows = SyntheticRows(d_in=12, n_features=40, l0=4, noise=0, mean=3.0, n_rows=5000, seed=1)
    codes = rows.codes(1500, 2600)
    assert codes.shape == (1100, 40)
    assert (codes >= 0).all()
    torch.testing.assert_close(rows.rows(1500, 2600), codes @ rows.dictionary + rows.offset)
    torch.testing.assert_close(rows.dictionary.norm(dim=1), torch.ones(40))
    assert float(rows.offset.norm()) == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.5])
def test_frequencies(power):
    rows = SyntheticRows(d_in=8, n_features=64, l0=6, power=power, n_rows=20_000)
    assert float(rows.frequencies.sum()) == pytest.approx(6, abs=1e-9)
    assert (rows.frequencies <= 1).all()
    assert (rows.frequencies.diff() <= 0).all()
    fired = (rows.codes(0, 20_000) > 0).double().mean(0)
    # five standard errors of a mean of 20,000 draws
    assert (
        (fired - rows.frequencies).abs() <= 5 * (rows.frequencies * (1 - rows.frequencies) / 20_000).sqrt() + 1e-9
    ).all()


def test_any_part_is_the_same_whatever_came_before():
    a, b = (SyntheticRows(d_in=4, n_features=8, l0=2, seed=5) for _ in range(2))
    whole = a.rows(0, 3000)
    assert torch.equal(b.rows(1024, 3000), whole[1024:])
    assert not torch.equal(SyntheticRows(d_in=4, n_features=8, l0=2, seed=6).rows(0, 3000), whole)
    assert a.info == b.info
    assert a == b


def test_documents_and_short_last_batch():
    batches = list(SyntheticRows(d_in=4, n_features=8, l0=2, n_rows=70, rows_per_document=32).batches(50))
    assert [b.n_rows for b in batches] == [50, 20]
    assert torch.cat([b.document for b in batches]).bincount().tolist() == [32, 32, 6]


def test_the_global_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    next(SyntheticRows(d_in=4, n_features=8, l0=2).batches(10, seed=0))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_in": 0}, "d_in` must be a positive integer"),
        ({"n_rows": 0}, "n_rows` must be a positive integer, or None"),
        ({"l0": 9}, "l0` must lie above 0 and not above n_features=8"),
        ({"noise": -1}, "noise` must be 0 or more"),
        ({"noise": "much"}, "SyntheticRows: `noise` must be a number; got 'much'"),
        ({"n_rows": 10**30}, r"n_rows` must be a positive integer, or None for no end \(below 2\*\*63\)"),
        ({"d_in": 10**12}, "SyntheticRows: the memory needed must be at most .* a dictionary of 8 directions"),
        ({"n_features": 10**12, "l0": 2}, "a dictionary of 1,000,000,000,000 directions"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticRows(**{"d_in": 4, "n_features": 8, "l0": 2, **change})


# --------------------------------------------------------------------- hierarchy, correlation, sizes, superposition

TREES = {"d_in": 12, "n_features": 120, "l0": 6, "trees": 5, "branching": 3, "depth": 3, "n_rows": 20_480, "noise": 0}


def test_children_fire_under_their_parent_and_alone():
    rows = SyntheticRows(**TREES)
    assert [(rows.parent == parent).sum() for parent in range(6)] == [3, 3, 3, 3, 3, 3]
    assert rows.parent[:5].tolist() == [-1] * 5
    assert rows.parent[5:8].tolist() == [0, 0, 0]
    assert (rows.parent[65:] == -1).all()
    codes = rows.codes(0, 20_480)
    fires = codes > 0
    children = (rows.parent >= 0).nonzero().squeeze(1)
    assert not (fires[:, children] & ~fires[:, rows.parent[children]]).any()
    for parent in range(20):
        assert fires[:, rows.parent == parent].sum(1).max() <= 1
    assert float(rows.frequencies.sum()) == pytest.approx(6, abs=1e-6)
    p = rows.frequencies
    assert ((fires.double().mean(0) - p).abs() <= 5 * (p * (1 - p) / 20_480).sqrt() + 1e-9).all()
    child = int(children[0])
    both = fires[:, child]
    sizes = codes[both][:, [0, child]].log()
    assert float(torch.corrcoef(sizes.T)[0, 1]) > 0.5  # large where its parent is


def test_common_causes_correlate_and_keep_frequencies():
    plain = {"d_in": 8, "n_features": 40, "l0": 12, "power": 0.0, "n_rows": 30_720}
    free, tied = SyntheticRows(**plain), SyntheticRows(**plain, factors=30)
    found = {}
    for rows in (free, tied):
        fires = (rows.codes(0, 30_720) > 0).double()
        p = rows.frequencies
        assert ((fires.mean(0) - p).abs() <= 5 * (p * (1 - p) / 30_720).sqrt()).all()
        found[rows.factors] = float(torch.corrcoef(fires.T).fill_diagonal_(0).abs().max())
    assert found[30] > 3 * found[0]


def test_sizes_and_directions():
    rows = SyntheticRows(d_in=8, n_features=200, l0=60, power=0, norm_spread=0.7, n_rows=8192)
    assert float(rows.sizes.log().std()) == pytest.approx(0.7, abs=0.1)
    codes = rows.codes(0, 8192)
    torch.testing.assert_close(codes.sum(0) / (codes > 0).sum(0), rows.sizes, rtol=0.1, atol=0)
    near = {}
    for steps in (0, 100):
        W = SyntheticRows(d_in=16, n_features=40, l0=2, parting=steps).dictionary
        torch.testing.assert_close(W.norm(dim=1), torch.ones(40))
        near[steps] = float((W @ W.T).fill_diagonal_(0).square().sum())
    assert near[100] < 0.7 * near[0]
    assert near[100] >= 40**2 / 16 - 40 - 1e-3  # no unit vectors go below the Welch bound


def test_at_their_defaults_they_change_nothing():
    """The digest and the rows are those of builds that did not know them."""
    rows = SyntheticRows(d_in=4, n_features=8, l0=2)
    assert rows.info["digest"] == "sha256:9e130d35d8d1b7451ce772aa5addcc879ce461e7491066259b4d901a1b7be805"
    assert float(SyntheticRows(d_in=4, n_features=8, l0=2, magnitude=1.7).rows(0, 3000).sum()) == pytest.approx(
        3421.90869140625, rel=1e-6
    )
    assert "trees" in SyntheticRows(d_in=4, n_features=8, l0=2, trees=1, depth=2).info
    a, b = SyntheticRows(**TREES, factors=3), SyntheticRows(**TREES, factors=3)
    assert torch.equal(a.rows(1024, 2048), b.rows(0, 2048)[1024:])


def test_addresses():
    rows = open_rows("synthetic:d_in=4,n_features=8,l0=2.5,n_rows=1_000,trees=1,depth=2")
    assert rows == SyntheticRows(d_in=4, n_features=8, l0=2.5, n_rows=1000, trees=1, depth=2)
    for address, message in (
        ("synthetic:d_in=4", "must give `n_features`"),
        ("synthetic:d_in=4,features=8", "`features` is no setting of synthetic rows. Did you mean `n_features`"),
        ("synthetic:d_in=4,n_features=x", "`n_features` must be a whole number; got `x`"),
        ("synthetic:d_in=4,n_features=8,l0=x", "`l0` must be a number; got `x`"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_rows(address)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trees": -1}, "trees` must be a whole number of at least 0"),
        ({"trees": 1}, "trees` must fit into n_features=8; 1 of them with 21 features each"),
        ({"trees": 1, "depth": 10_000}, "trees` must fit into n_features=8"),
        ({"trees": 1, "depth": 2, "n_features": 5, "l0": 3}, "l0` must be at most 2 with trees=1"),
        ({"factors": 10**12}, "1,000,000,000,000 common causes"),
        ({"branching": 0}, "branching` must be a whole number of at least 1"),
        ({"depth": 0}, "depth` must be a whole number of at least 1"),
        ({"factors": 1.5}, "factors` must be a whole number"),
        ({"norm_spread": -1}, "norm_spread` must be 0 or more"),
        ({"norm_spread": 500.0}, "norm_spread` must leave sizes that are numbers"),
        ({"parting": -1}, "parting` must be a whole number of at least 0"),
    ],
)
def test_bad_settings_of_the_structure(change, message):
    with pytest.raises(ConfigError, match=message):
        SyntheticRows(**{"d_in": 4, "n_features": 8, "l0": 2, **change})
