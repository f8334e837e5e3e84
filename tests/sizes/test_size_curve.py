"""Curves along sizes, and the files that carry them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from saekit.errors import ConfigError, FormatError, ShapeError
from saekit.files import dump_json
from saekit.measure.accumulators import fvu
from saekit.measure.intervals import jackknife_error, student
from saekit.measure.metrics import METRICS, Metrics
from saekit.models.language import LanguageModel
from saekit.models.loading import load_model
from saekit.rows.arrays import ArrayRows
from saekit.rows.source import Batch
from saekit.rows.split import halves
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sizes.largest import FromLargest
from saekit.sizes.prune import prune
from saekit.sizes.ranking import rank
from saekit.sizes.settings import PruneSettings, SizeSettings
from saekit.sizes.size_curve import SizeCurve, default_sizes, measure_sizes
from saekit.store.native import describe, load

SIZES = [4, 12, 48]
QUICK = {"sample_rows": 60}


@pytest.fixture(scope="module")
def ranked(oracle, synthetic) -> SAE:
    return rank(oracle, synthetic)


@pytest.fixture(scope="module")
def curve(ranked, synthetic) -> SizeCurve:
    return measure_sizes(ranked, synthetic, SIZES, name="oracle", settings=SizeSettings(**QUICK))


# ---------------------------------------------------------------- numbers


def test_points_are_what_prefixes_give(curve, ranked, rows):
    assert curve.sizes == SIZES
    for size, measured in zip(SIZES, curve.values("fvu"), strict=True):
        assert measured.value == pytest.approx(fvu(rows, ranked.take(size).reconstruct(rows)), rel=1e-6)
        assert measured.low < measured.value < measured.high or measured.value < 1e-3
    assert [value.value for value in curve.values("l0")] == pytest.approx(
        [ranked.take(size).encode(rows).l0() for size in SIZES]
    )
    for name in ("fvu", "rsa", "cka", "cka_codes"):
        assert curve.values(name)[0].unit == METRICS[name].unit


def test_sizes_are_compared_with_the_largest_over_the_same_documents(curve, ranked, rows):
    """The difference is that of a jackknife that leaves the same run of rows out of both, by hand."""
    *parts, last = curve.points
    assert last.from_largest == FromLargest()
    gaps = {p.size: p.from_largest.differences["fvu"] for p in parts}
    assert [gap.value for gap in gaps.values()] == pytest.approx(
        [p.metrics.fvu.value - last.metrics.fvu.value for p in parts]
    )
    kept, run = rows[:3000], torch.arange(3000) // 64
    left_out = [
        fvu(kept[run != r], ranked.take(12).reconstruct(kept[run != r]))
        - fvu(kept[run != r], ranked.reconstruct(kept[run != r]))
        for r in range(int(run.max()) + 1)
    ]
    half = student(len(left_out) - 1) * jackknife_error(left_out)
    assert (gaps[12].high - gaps[12].low) / 2 == pytest.approx(half, rel=0.1)
    assert {p.size: p.from_largest.verdicts["fvu"] for p in parts} == {4: "worse", 12: "worse"}
    assert "no smaller size keeps fvu within 0.01 of all" in curve.caption()


def test_a_curve_of_schema_2_is_read_without_differences(curve):
    plain = curve.to_json() | {"schema": 2}
    plain["points"] = [{k: v for k, v in point.items() if k != "from_largest"} for point in plain["points"]]
    again = SizeCurve.from_json(plain)
    assert again.values("fvu") == curve.values("fvu")
    assert again.answer() == ""


def test_the_full_size_is_the_original(curve, oracle, rows):
    assert curve.values("fvu")[-1].value == pytest.approx(fvu(rows, oracle.reconstruct(rows)), rel=1e-5)


def test_larger_sizes_are_more_like_the_rows(curve):
    for name in ("rsa", "cka"):
        values = [value.value for value in curve.values(name)]
        assert values == sorted(values)
        assert values[-1] > 0.8
        assert all(value.low < value.value < value.high for value in curve.values(name)[:2])


@pytest.mark.parametrize("selection", ["before", "after"])
def test_any_batching_gives_the_same_curve(ranked, synthetic, selection):
    options = {**QUICK, "selection": selection, "max_rows": 900}
    one = measure_sizes(ranked, synthetic, [4, 12], settings=SizeSettings(**options))
    other = measure_sizes(ranked, synthetic, [4, 12], settings=SizeSettings(**options, batch_rows=77))
    for mine, theirs in zip(one.points, other.points, strict=True):
        assert set(mine.metrics) == set(theirs.metrics)
        for name in mine.metrics:
            assert mine.metrics[name].value == pytest.approx(theirs.metrics[name].value, rel=1e-5, abs=1e-7), name
            if mine.metrics[name].low is not None:
                assert mine.metrics[name].low == pytest.approx(theirs.metrics[name].low, rel=1e-4, abs=1e-6), name


def test_after_counts_and_decodes_what_is_left_of_the_whole_selection(ranked, synthetic, rows):
    found = measure_sizes(ranked, synthetic, [12, 48], settings=SizeSettings(selection="after", **QUICK))
    codes = ranked.encode(rows).take(12)
    assert found.values("fvu")[0].value == pytest.approx(fvu(rows, ranked.decode(codes)), rel=1e-6)
    assert found.values("l0")[0].value == pytest.approx(codes.l0())
    assert found.values("fvu")[1].value == pytest.approx(fvu(rows, ranked.reconstruct(rows)), rel=1e-6)
    dead = 1 - len(codes.indices.unique()) / 12
    assert found.values("dead_fraction")[0].value == pytest.approx(dead)


def test_before_and_after_are_one_without_competition(thresholded, synthetic):
    one, other = (
        measure_sizes(thresholded, synthetic, [12], settings=SizeSettings(selection=each, **QUICK))
        for each in ("before", "after")
    )
    assert one.points == other.points


def test_without_intervals_the_curve_says_that_nothing_is_decided(ranked, synthetic, curve):
    bare = measure_sizes(ranked, synthetic, [4, 48], settings=SizeSettings(intervals=False, sample_rows=0))
    kept = "how many latents keep fvu within 0.01 of all"
    assert bare.answer() == f"{kept}: not decided: no intervals asked for"
    few = "no interval: it needs at least 40 documents; there are 12, and texts may be missing"
    gap = replace(bare.points[0].from_largest.differences.fvu, reason=few)
    point = replace(bare.points[0], from_largest=FromLargest(Metrics({"fvu": gap}), {"fvu": "undecided"}))
    found = replace(bare, points=[point, bare.points[1]])
    assert found.caption().endswith(f"{kept}: not decided: 12 documents, 40 are needed")
    assert "not decided" not in curve.caption()


def test_several_saes_are_measured_whole(oracle, synthetic, rows):
    small = prune(oracle, synthetic, sizes=[4, 12], settings=PruneSettings(refit=True))
    found = measure_sizes(small, synthetic, settings=SizeSettings(**QUICK))
    assert found.sizes == [4, 12]
    assert found.values("fvu")[0].value == pytest.approx(fvu(rows, small[0].reconstruct(rows)), rel=1e-6)
    assert found.settings["each_size"] == "an SAE of its own"


def test_similarity_can_be_left_out_and_progress_is_told(ranked, synthetic):
    seen = []
    found = measure_sizes(
        ranked,
        synthetic,
        [4],
        progress=lambda *call: seen.append(call),
        settings=SizeSettings(intervals=False, sample_rows=0),
    )
    assert "rsa" not in found.points[0].metrics
    assert seen[-1] == ("rows", 3000, 3000)
    measure_sizes(ranked, synthetic, [4], progress=lambda *call: seen.append(call), settings=SizeSettings(**QUICK))
    assert seen[-1] == ("similarity", 1, 1)


def test_default_sizes(ranked, synthetic):
    assert (
        measure_sizes(ranked, synthetic, settings=SizeSettings(intervals=False, sample_rows=0)).sizes
        == default_sizes(48)
        == [1, 3, 6, 12, 24, 48]
    )


def test_cross_entropy_along_the_sizes(stories):
    lm: LanguageModel = load_model(stories)
    data = [
        "Once upon a time there was a little dog who liked to run.",
        "The sun was bright and the cat sat still.",
    ] * 3
    d = lm.d_model
    W = torch.cat([torch.eye(d), -torch.eye(d)])
    sae = SAE(W_enc=W, b_enc=torch.zeros(2 * d), W_dec=W, b_dec=torch.zeros(d), rule=TopKRule(d),
              provenance={"hook": "layers.1"})  # fmt: skip
    rows = torch.randn(200, d, generator=torch.Generator().manual_seed(0))
    found = measure_sizes(sae, rows, [8, 2 * d], model=lm, data=data, settings=SizeSettings(tokens=60, **QUICK))
    assert found.values("ce_recovered_zero")[-1].value == pytest.approx(1, abs=1e-3)
    assert found.values("ce_sae")[0].value > found.values("ce_sae")[-1].value
    assert found.language_model["n_tokens"] >= 60
    written = found.write_into(sae).provenance["sizes"]
    assert written["measured_on"]["n_tokens"] >= 60
    assert "ce_sae" in written["points"][0]["metrics"]


# ---------------------------------------------------------------- plain data


def test_json_round_trip(curve, tmp_path):
    curve.save(tmp_path / "sizes.json")
    again = SizeCurve.load(tmp_path / "sizes.json")
    assert again == curve
    assert dump_json(again.to_json()) == dump_json(curve.to_json())
    plain = json.loads((tmp_path / "sizes.json").read_text())
    assert (plain["kind"], plain["schema"]) == ("size_curve", 3)
    assert plain["points"][0]["metrics"]["fvu"]["unit"] == "fraction"


def test_json_that_is_no_curve(curve):
    plain = curve.to_json()
    with pytest.raises(FormatError, match="unknown key `pints`"):
        SizeCurve.from_json({**plain, "pints": []})
    for points in ([], plain["points"][::-1]):
        with pytest.raises(FormatError, match="must be of increasing sizes"):
            SizeCurve.from_json({**plain, "points": points})


def test_tables(curve):
    lines = curve.table()
    assert lines[0] == ["latents", "fvu", "l0", "rsa", "cka"]
    assert [line[0] for line in lines[1:]] == ["4", "12", "48"]
    assert "latents in order of energy" in repr(curve)
    assert "<caption>oracle" in curve._repr_html_()


# ---------------------------------------------------------------- targets and files


def test_smallest_size_that_meets_a_target(curve):
    values = [value.value for value in curve.values("fvu")]
    assert curve.smallest(fvu=1.1) == 4
    assert curve.smallest(fvu=values[1]) == 12
    with pytest.raises(ConfigError, match=rf"an FVU of -1; the best is {values[2]:.3g} with 48 latents"):
        curve.smallest(fvu=-1)


def test_a_file_carries_the_curve(curve, ranked, tmp_path, rows):
    curve.write_into(ranked).save(tmp_path)
    target = curve.values("fvu")[1].value
    small = load(tmp_path, fvu=target)
    assert small.n_latents == 12
    assert torch.equal(small.reconstruct(rows), ranked.take(12).reconstruct(rows))
    facts = describe(tmp_path)
    assert facts["latent_order"] == "energy"
    assert set(facts["sizes"]["points"][0]["metrics"]) == {"fvu", "l0", "dead_fraction", "rsa", "cka"}
    assert facts["sizes"]["measured_on"]["n_rows"] == 3000


def test_a_curve_of_something_else_is_not_written(curve, ranked, synthetic):
    with pytest.raises(ConfigError, match="it goes to 48 latents where the SAE has 12"):
        curve.write_into(ranked.take(12))
    after = measure_sizes(
        ranked, synthetic, [4], settings=SizeSettings(selection="after", intervals=False, sample_rows=0)
    )
    with pytest.raises(ConfigError, match="needs the curve of selection='before'"):
        after.write_into(ranked)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([49], {}, r"must lie within 1\.\.48, .*; got 49"),
        ([12, 4], {}, "must increase"),
        ([4], {"selection": "amid"}, "must be 'before' or 'after'; got 'amid'"),
        ([4], {"sample_rows": 3}, "`sample_rows` must be 0 or at least 4; got 3"),
    ],
)
def test_measure_sizes_refuses(ranked, synthetic, sizes, options, message):
    with pytest.raises(ConfigError, match=message):
        measure_sizes(ranked, synthetic, sizes, settings=SizeSettings(**options))


def test_several_saes_of_the_wrong_kind(oracle, synthetic):
    for saes, sizes in (([oracle, oracle], None), ([oracle.take(4), oracle], [4]), ([], None)):
        with pytest.raises(ConfigError, match="several SAEs must be of increasing sizes"):
            measure_sizes(saes, synthetic, sizes)


def test_other_rows(ranked, rows):
    with pytest.raises(ShapeError, match="rows must have the width of the SAE, 24; they have 5"):
        measure_sizes(ranked, rows[:, :5], [4])


# ---------------------------------------------------------------- halves


@pytest.mark.parametrize("batch_rows", [50, 4096])
@pytest.mark.parametrize("known", [True, False])
def test_halves_share_nothing_and_lose_nothing(synthetic, rows, batch_rows, known):
    source = synthetic if known else ArrayRows(rows)
    parts = [list(half.batches(batch_rows)) for half in halves(source)]
    documents = [{int(each) for batch in part for each in batch.document} if known else set() for part in parts]
    assert not documents[0] & documents[1]
    found = torch.cat([batch.x for part in parts for batch in part])
    assert torch.equal(found.sum(1).sort().values, rows.sum(1).sort().values)
    assert all(isinstance(batch, Batch) for part in parts for batch in part)
    sizes = [sum(batch.n_rows for batch in part) for part in parts]
    assert max(sizes) - min(sizes) <= 64


def test_a_half_is_not_shuffled(synthetic):
    first, second = halves(synthetic)
    assert (first.d_in, first.n_rows) == (24, None)
    assert "odd documents" in second.info["part"]
    with pytest.raises(ConfigError, match="stored order from the beginning"):
        next(first.batches(10, seed=1))


def test_choosing_and_measuring_on_two_halves(oracle, synthetic):
    first, second = halves(synthetic)
    found = measure_sizes(rank(oracle, first), second, [12, 48], settings=SizeSettings(**QUICK))
    assert found.n_rows == 1500
    assert found.rows["part"].startswith("odd")
