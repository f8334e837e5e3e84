"""Comparisons: what is shared is what was planted, chance is named, and the numbers survive the file."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from saekit import compare
from saekit.comparison.concept_groups import only_in_one
from saekit.comparison.result import Comparison
from saekit.comparison.run import in_exactly
from saekit.comparison.settings import ComparisonSettings
from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.measure.intervals import wilson_interval
from saekit.rows.arrays import ArrayRows
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule, TopKRule

D = 16


def sae_of(W_dec: torch.Tensor, W_enc: torch.Tensor | None = None, rule=None, **provenance) -> SAE:
    n, d = W_dec.shape
    return SAE(
        W_enc=W_dec if W_enc is None else W_enc, b_enc=torch.zeros(n), W_dec=W_dec, b_dec=torch.zeros(d),
        rule=rule or ReLURule(), provenance=provenance,
    )  # fmt: skip


def directions(n: int, seed: int, d: int = D) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=1, keepdim=True)


def order_of(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def planted() -> tuple[list[SAE], list[list[int]]]:
    """Three SAEs in 64 dimensions: axes 0–9 in all, 10–14 in the first two, the rest their own; shuffled."""
    axes = torch.eye(64)
    own = [axes[:15], axes[:15], axes[:10]]
    own = [torch.cat([rows, axes[20 + 12 * i : 20 + 12 * i + 24 - len(rows)]]) for i, rows in enumerate(own)]
    counts = [[3] * 10 + [2] * 5 + [1] * 9, [3] * 10 + [2] * 5 + [1] * 9, [3] * 10 + [1] * 14]
    orders = [order_of(24, seed) for seed in range(3)]
    saes = [sae_of(rows[order], seed=i) for i, (rows, order) in enumerate(zip(own, orders, strict=True))]
    return saes, [[count[place] for place in order.tolist()] for count, order in zip(counts, orders, strict=True)]


def test_an_sae_and_itself_in_another_order():
    sae = sae_of(directions(40, 0), directions(40, 1))
    order = order_of(40)
    result = compare([sae, sae.permute(order)], settings=ComparisonSettings(controls=False))
    assert result.shared.value == result.equal.value == 1
    assert result.mean_cosine.value == pytest.approx(1, abs=1e-12)
    assert order[result.pairs[0].decoder.partner].tolist() == list(range(40))
    assert result.saes[0].stability == [1.0] * 40
    assert result.saes[1].found_in == [2] * 40
    assert [each.value for each in result.in_exactly] == [0, 1]
    for certificate in result.certificate.values():
        assert certificate.objective == pytest.approx(40, abs=1e-9)
        assert abs(certificate.gap) < 1e-6


def test_random_dictionaries_land_on_the_null():
    a, b = (sae_of(directions(200, seed), directions(200, seed + 10)) for seed in (1, 2))
    result = compare([a, b])
    assert result.shared.value == result.shared_null.value == 0
    assert 0 < result.shared.high < 0.03
    for name in ("mean_cosine", "max_cosine"):
        assert getattr(result, name).value == pytest.approx(getattr(result, f"{name}_null").value, abs=0.02)
    formula = float(result.max_cosine_null.reason.split("formula: ")[1])
    assert result.max_cosine_null.low - 0.01 < formula < result.max_cosine_null.high + 0.01
    assert "expected by formula: 0.005" in result.equal_null.reason
    assert result.nulls["permuted"].mean_cosine.value == pytest.approx(result.mean_cosine_null.value, abs=0.02)
    assert result.mean_cosine.value < result.max_cosine.value < result.max_absolute_cosine.value


def test_the_permuted_null_keeps_what_ties_encoder_and_decoder():
    """Encoder equal to decoder: even unrelated dictionaries have equal partners, and only this null says so."""
    result = compare([sae_of(directions(60, 1)), sae_of(directions(60, 2))])
    assert result.equal.value == result.nulls["permuted"].equal.value == 1
    assert result.equal_null.value == 1
    assert result.nulls["random"].equal.value < 0.1
    assert "Dictionaries without any resemblance" in result.equal_null.reason
    assert result.shared.value < 0.2


def test_found_in_as_many_as_planted(planted):
    saes, counts = planted
    result = compare(saes, settings=ComparisonSettings(controls=False))
    assert [each.found_in for each in result.saes] == counts
    assert result.saes[0].stability == [(count - 1) / 2 for count in counts[0]]
    expected = [np.mean([np.mean(np.array(count) == j) for count in counts]) for j in (1, 2, 3)]
    assert [each.value for each in result.in_exactly] == pytest.approx(expected)
    assert [pair.shared.value for pair in result.pairs] == pytest.approx([15 / 24, 10 / 24, 10 / 24])
    assert result.shared.value == pytest.approx(35 / 72)
    assert "jackknife over 3 SAEs" in result.shared.reason


def test_only_in_one_counts_every_subset():
    generator = np.random.default_rng(0)
    has = generator.random((5, 30, 5)) < 0.4  # base, latent, other
    found = []
    for base in range(5):
        has[base, :, base] = False
        found.append(has[base].sum(1))
    curve = only_in_one(list(has)).mean(0)
    for size, share in zip(range(2, 6), curve, strict=True):
        shares = [
            np.mean([~has[base][:, list(others)].any(1) for others in combinations(set(range(5)) - {base}, size - 1)])
            for base in range(5)
        ]
        assert share == pytest.approx(np.mean(shares))
    assert sum(each.value for each in in_exactly(found)) == pytest.approx(1)
    assert curve[-1] == pytest.approx(in_exactly(found)[0].value)


def test_the_threshold_and_what_reaches_it():
    axes = torch.eye(D)
    tilted = axes.clone()
    tilted[0, 1] = 0.75  # cosine 0.8
    pair = [sae_of(axes), sae_of(tilted)]
    assert compare(pair, settings=ComparisonSettings(controls=False)).shared.value == 1
    assert compare(pair, settings=ComparisonSettings(threshold=0.81, controls=False)).shared.value == 15 / 16
    assert compare(pair, settings=ComparisonSettings(threshold=1.0, controls=False)).shared.value == 0
    assert (
        compare(pair, settings=ComparisonSettings(threshold=1.0, strict=False, controls=False)).shared.value == 15 / 16
    )


def test_partners_must_agree():
    rows, order = torch.eye(D), order_of(D)
    a, b = sae_of(rows, rows), sae_of(rows, rows[order])
    result = compare([a, b], settings=ComparisonSettings(controls=False))
    fixed = int((order == torch.arange(D)).sum()) / D
    assert result.shared.value == result.equal.value == fixed
    assert result.pairs[0].aligned.value == 1


def test_unequal_widths_share_what_the_narrower_has():
    wide = sae_of(torch.eye(D))
    narrow = wide.permute(order_of(D)).take(6)
    for saes in ([wide, narrow], [narrow, wide]):
        result = compare(saes)
        assert result.shared.value == 1
        small, large = sorted(result.saes, key=lambda each: len(each.found_in))
        assert small.stability == [1.0] * 6
        assert sorted(large.found_in) == [1] * 10 + [2] * 6
    assert compare([wide, narrow]).pairs[0].decoder.cosine.count(None) == 10


def test_on_rows(rows, oracle):
    order = order_of(oracle.n_latents)
    seen = []
    source = ArrayRows(rows, document=torch.arange(len(rows)) // 30)
    settings = ComparisonSettings(controls=False, batch_rows=700)
    saes = [oracle, oracle.permute(order)]
    result = compare(saes, source, settings=settings, progress=lambda *told: seen.append(told))
    same = result.pairs[0].on_rows
    assert same.correlation.value == pytest.approx(1)
    assert same.n_pairs == oracle.n_latents
    assert same.cka.value == pytest.approx(1)
    assert same.rsa.value == pytest.approx(1)
    assert result.n_rows == len(rows)
    assert ("match", 2, 2) in seen
    assert seen[-1] == ("rows", 3000, 3000)


def test_correlations_are_those_of_the_dense_codes(rows, oracle):
    g = torch.Generator().manual_seed(0)
    other = oracle.replace(W_enc=oracle.W_enc + 0.3 * torch.randn(oracle.W_enc.shape, generator=g), rule=TopKRule(3))
    result = compare([oracle, other], rows, settings=ComparisonSettings(controls=False, max_rows=1000, batch_rows=333))
    a, b = (sae.encode(rows[:1000]).to_dense().double().numpy() for sae in (oracle, other))
    partner = result.pairs[0].decoder.partner
    each = [pearsonr(a[:, i], b[:, j]).statistic for i, j in enumerate(partner) if a[:, i].any() and b[:, j].any()]
    assert result.n_rows == 1000
    assert result.pairs[0].on_rows.n_pairs == len(each)
    assert result.pairs[0].on_rows.correlation.value == pytest.approx(np.mean(each))


def test_latents_that_never_fire_have_no_correlation():
    dead = sae_of(torch.eye(4)).replace(b_enc=torch.full((4,), -100.0))
    result = compare([dead, dead.replace()], directions(50, 0, 4), settings=ComparisonSettings(controls=False))
    assert math.isnan(result.pairs[0].on_rows.correlation.value)
    assert "no pair of which both latents fire" in result.pairs[0].on_rows.correlation.reason


def test_round_trip(planted, tmp_path, rows, oracle):
    for result in (compare(planted[0]), compare([oracle, oracle.take(20)], rows)):
        result.save(tmp_path / "comparison.json")
        assert Comparison.load(tmp_path / "comparison.json") == result
        plain = json.loads((tmp_path / "comparison.json").read_text())
        assert plain["shared"].keys() >= {"value", "low", "high", "unit"}
        assert plain["certificate"]["decoder"].keys() == {"objective", "dual", "gap"}
        for name in ("shared", "equal", "mean_cosine"):
            assert plain[f"{name}_null"]["value"] is not None


def test_altered_files(planted):
    plain = compare(planted[0], settings=ComparisonSettings(controls=False)).to_json()
    with pytest.raises(FormatError, match="must hold every pair of at least two SAEs; it holds 2 pairs"):
        Comparison.from_json(plain | {"pairs": plain["pairs"][:2]})
    with pytest.raises(FormatError, match="schema 6"):
        Comparison.from_json(plain | {"schema": 6})
    older = {key: value for key, value in plain.items() if key not in ("shared_alive", "warnings")} | {"schema": 2}
    assert Comparison.from_json(older).shared_alive is None
    with pytest.raises(FormatError, match="unknown key `sharde`"):
        Comparison.from_json(plain | {"sharde": 1})


def test_the_same_twice(planted):
    assert compare(planted[0]) == compare(planted[0])


def test_tables(planted, rows, oracle):
    result = compare(planted[0])
    assert [line[0].strip() for line in result.table()][1:] == [
        "3 pairs", *(f"{a.name} | {b.name}" for a, b in combinations(result.saes, 2)), "random", "permuted",
    ]  # fmt: skip
    assert "both cosines > 0.7" in repr(result)
    assert "in exactly 1 … 3 of 3 SAEs" in repr(result)
    html = compare([oracle, oracle.replace()], rows, settings=ComparisonSettings(controls=False))._repr_html_()
    assert html.startswith("<table><caption>shared: ")
    assert "<th>cka</th>" in html


def test_pairs_that_began_alike_are_marked():
    a, b, c = (sae_of(directions(20, i), seed=seed) for i, seed in enumerate((3, 3, 4)))
    result = compare([a, b, c], settings=ComparisonSettings(controls=False))
    assert [pair.same_seed for pair in result.pairs] == [True, False, False]
    assert [line[0].endswith(" *") for line in result.table()[2:]] == [True, False, False]
    assert "* began from the same random weights" in repr(result)
    assert not compare([a, b.take(10)], settings=ComparisonSettings(controls=False)).pairs[0].same_seed
    unknown = sae_of(directions(20, 5))
    assert not compare([unknown, unknown.replace()], settings=ComparisonSettings(controls=False)).pairs[0].same_seed


def test_means_are_over_pairs_that_began_apart():
    rows = directions(20, 0)
    a, b, c = sae_of(rows, seed=0), sae_of(rows, seed=0, arch="other"), sae_of(directions(20, 1), seed=1)
    result = compare([a, b, c], directions(200, 2), settings=ComparisonSettings(controls=False))
    assert [pair.shared.value for pair in result.pairs] == [1, 0, 0]
    for name in ("shared", "equal", "mean_cosine", "shared_alive"):
        pairs = [getattr(pair, name, None) or getattr(pair.on_rows, name, None) or pair.decoder.mean_cosine
                 for pair in result.pairs[1:]]  # fmt: skip
        assert getattr(result, name).value == pytest.approx(np.mean([each.value for each in pairs]))
    assert result.shared.low is None
    assert "have one SAE in common" in result.shared.reason
    assert result.n_counted == 2
    assert result.table()[1][0] == "2 pairs"
    assert "not in the means" in result.caption()
    alone = compare([a, b], settings=ComparisonSettings(controls=False))
    assert (alone.n_counted, alone.shared.value) == (1, 1)
    assert "not in the means" not in alone.caption()


def test_latents_that_never_fire_do_not_lower_what_the_others_share():
    # Of 8 axes, 5 are in both SAEs; the first 3 never fire in either, one more is dead in the second alone.
    axes = torch.eye(16)
    a, b = sae_of(axes[:8], seed=0), sae_of(torch.cat([axes[:5], axes[8:11]])[order_of(8)], seed=1)
    dead_b = [order_of(8).tolist().index(place) for place in (0, 3)]
    bias_a, bias_b = torch.zeros(8), torch.zeros(8)
    bias_a[:3], bias_b[dead_b] = -100.0, -100.0
    a, b = a.replace(b_enc=bias_a), b.replace(b_enc=bias_b)
    result = compare([a, b], directions(300, 0), settings=ComparisonSettings(controls=False))
    assert result.shared.value == 5 / 8
    assert result.shared_alive.value == 1 / 5  # a has 5 alive, b 6; of the five shared only axis 4 fires in both
    assert result.shared_alive.low < 1 / 5 < result.shared_alive.high
    assert result.pairs[0].on_rows.shared_alive.value == 1 / 5
    assert "of latents that fire on the rows 0.2" in result.caption()
    assert compare([b, a], directions(300, 0), settings=ComparisonSettings(controls=False)).shared_alive.value == 1 / 5
    silent = a.replace(b_enc=torch.full((8,), -100.0))
    none = compare([silent, b], directions(300, 0), settings=ComparisonSettings(controls=False)).shared_alive
    assert math.isnan(none.value)
    assert compare([a, b], settings=ComparisonSettings(controls=False)).shared_alive is None


def test_names_are_escaped(tmp_path):
    sae = sae_of(torch.eye(3))
    sae.save(tmp_path / "<b>")
    assert "<b>" not in compare([tmp_path / "<b>", sae], settings=ComparisonSettings(controls=False))._repr_html_()


def test_intervals_of_shares():
    zero, all_ = wilson_interval(0, 100), wilson_interval(100, 100)
    assert (zero.value, zero.low) == (0, 0)
    assert zero.high == pytest.approx(0.0370, abs=1e-4)  # Wilson
    assert (all_.value, all_.high) == (1, 1)
    half = wilson_interval(50, 100)
    assert (half.low, half.high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_one_latent_has_no_interval():
    one = sae_of(torch.ones(1, 3))
    cosine = compare([one, one.replace()], settings=ComparisonSettings(controls=False)).mean_cosine
    assert cosine.low is None
    assert cosine.value == pytest.approx(1)


def test_what_is_refused(oracle, rows):
    with pytest.raises(ConfigError, match="at least two SAEs must be given; got one"):
        compare([oracle])
    with pytest.raises(ConfigError, match="at least two SAEs must be given; got one"):
        compare(oracle)
    with pytest.raises(ConfigError, match=r"`threshold` is a cosine and must be -1 to 1; got 1.5"):
        compare([oracle, oracle.replace()], settings=ComparisonSettings(threshold=1.5))
    for name in ("max_rows", "batch_rows"):
        with pytest.raises(ConfigError, match=f"compare: `{name}` must be a whole number from 1; got 0"):
            ComparisonSettings(**{name: 0})
    with pytest.raises(ShapeError, match="all SAEs must read and write rows of one width; `relu-5` maps 5 to 5"):
        compare([oracle, sae_of(torch.eye(5))])
    with pytest.raises(ShapeError, match="rows must have the width of the SAE, 24; they have 23"):
        compare([oracle, oracle.replace()], rows[:, :23])
    with pytest.raises(DataError, match="`W_dec` holds NaN or infinity"):
        compare([oracle, oracle.replace(W_dec=oracle.W_dec * math.nan)])
    with pytest.raises(DataError, match="there must be at least one row"):
        compare([oracle, oracle.replace()], rows[:0])
