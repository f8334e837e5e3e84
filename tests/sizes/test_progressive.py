"""The comparison of pruned, nested and separately trained SAEs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from saekit.errors import ConfigError, FormatError
from saekit.measure.accumulators import fvu
from saekit.models.loading import load_model
from saekit.report.page import write
from saekit.report.results_folder import collect
from saekit.rows.arrays import ArrayRows
from saekit.rows.capture import capture
from saekit.rows.split import halves
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.sizes.attribution import attribution
from saekit.sizes.latent_metrics import seed_overlap
from saekit.sizes.progressive import Progressive, progressive
from saekit.sizes.ranking import rank
from saekit.sizes.settings import ProgressiveSettings, SizeSettings
from saekit.sizes.size_curve import measure_sizes
from saekit.training.config import Matryoshka, TopK
from saekit.training.loop import train
from saekit.training.settings import TrainSettings

QUICK = {"sample_rows": 60}


@pytest.fixture(scope="module")
def source() -> SyntheticRows:
    return SyntheticRows(d_in=16, n_features=64, l0=3, n_rows=2000, mean=1.0, rows_per_document=20)


@pytest.fixture(scope="module")
def saes(source) -> list[SAE]:
    configs = [
        TopK(n_latents=32, k=3),
        TopK(n_latents=8, k=3),
        Matryoshka(n_latents=32, k=3, sizes=(8, 32)),
        TopK(n_latents=32, k=3, control="frozen-decoder"),
    ]
    return train(configs, source, seeds=[0, 1], tokens=25_600, settings=TrainSettings(batch_rows=256))


@pytest.fixture(scope="module")
def result(saes, source) -> Progressive:
    first, second = halves(source)
    return progressive(
        saes, second, fit=first, settings=ProgressiveSettings(by=("energy", "unsorted", "forward"), **QUICK)
    )


def at(result, name, size):
    return next(point for point in result.curves if (point.name, point.size) == (name, size))


def test_every_way_is_there_at_every_size(result):
    assert {(point.name, point.size) for point in result.curves} == {
        (name, size)
        for name in ("matryoshka", "topk pruned by energy", "topk pruned by forward", "topk unsorted",
                     "topk trained separately")
        for size in (8, 32)
    }  # fmt: skip
    assert all(point.seeds == [0, 1] for point in result.curves)
    assert result.n_rows == 1000
    assert result.settings["ranked_on"]["part"].startswith("even")
    assert result.rows["part"].startswith("odd")


def test_values_are_means_over_seeds_with_intervals_over_seeds(result, saes, source):
    x = torch.cat([batch.x for batch in halves(source)[1].batches(4096)])
    values = [fvu(x, sae.take(8).reconstruct(x)) for sae in saes[4:6]]
    point = at(result, "matryoshka", 8).metrics.fvu
    assert point.value == pytest.approx(np.mean(values), rel=1e-6)
    low, high = stats.t.interval(0.95, 1, np.mean(values), stats.sem(values))
    assert (point.low, point.high) == pytest.approx((max(low, 0), high), rel=1e-6)
    assert "over 2 seeds" in point.reason


def test_all_ways_of_one_sae_meet_at_its_full_size(result):
    for way in ("topk pruned by energy", "topk pruned by forward", "topk trained separately"):
        assert at(result, way, 32).metrics.fvu.value == pytest.approx(at(result, "topk unsorted", 32).metrics.fvu.value)


def test_what_the_paper_says_holds_on_planted_features(result):
    small = {name: at(result, name, 8).metrics.fvu.value for name in result.names}
    assert small["matryoshka"] < small["topk pruned by energy"] < small["topk unsorted"]
    assert at(result, "topk pruned by energy", 32).metrics.fvu.value < at(result, "matryoshka", 32).metrics.fvu.value


def test_differences_are_paired_by_seed(result):
    found = next(
        each for each in result.differences
        if (each.metric, each.name, each.minus, each.size) == ("fvu", "matryoshka", "topk pruned by energy", 8)
    )  # fmt: skip
    gap = at(result, "matryoshka", 8).metrics.fvu.value - at(result, "topk pruned by energy", 8).metrics.fvu.value
    assert found.difference.value == pytest.approx(gap)
    assert found.verdict in (
        "undecided" if found.difference.low <= 0 <= found.difference.high else "better",
        "undecided",
    )
    assert found.seeds == 2
    assert {(each.name, each.minus) for each in result.differences} == {
        ("matryoshka", "topk pruned by energy"),
        *(
            ("topk pruned by energy", f"topk {other}")
            for other in ("unsorted", "pruned by forward", "trained separately")
        ),
    }


def test_power_laws_of_importance_and_decoder(result):
    assert [(each.name, each.by) for each in result.rankings] == [
        ("topk-32-k3-seed0", "energy"),
        ("topk-32-k3-seed1", "energy"),
    ]
    for each in (*result.rankings, *result.spectra):
        assert each.scores == sorted(each.scores, reverse=True)
        assert each.ranks[0] == 1
        assert each.fit is not None


def test_one_seed_keeps_its_own_interval_and_judges_nothing(saes, source):
    found = progressive([saes[0], saes[4]], source, sizes=[8], settings=ProgressiveSettings(by=("energy",), **QUICK))
    point = at(found, "matryoshka", 8).metrics.fvu
    assert point.low < point.value < point.high
    assert {(each.seeds, each.verdict, each.detects) for each in found.differences} == {(1, "undecided", None)}


def test_scaled_and_truncated_selections_are_measured_as_trained(saes, source):
    nested = saes[4]
    x = torch.cat([batch.x for batch in source.batches(4096)])

    def first_point(how):
        config = {**nested.provenance["config"], "k_per_size": how}
        sae = nested.replace(provenance={**nested.provenance, "config": config})
        return progressive([sae], source, sizes=[11], settings=ProgressiveSettings(**QUICK)).curves[0].metrics.fvu.value

    k1 = nested.take(11).replace(rule=type(nested.rule)(1))
    assert first_point("scaled") == pytest.approx(fvu(x, k1.reconstruct(x)), rel=1e-6)
    cut = nested.decode(nested.encode(x).take(11))
    assert first_point("truncated") == pytest.approx(fvu(x, cut), rel=1e-6)
    assert first_point("fixed") == pytest.approx(fvu(x, nested.take(11).reconstruct(x)), rel=1e-6)


def test_sizes_of_a_lone_sae(saes, source):
    found = progressive(saes[0], source, settings=ProgressiveSettings(by=("energy",), **QUICK))
    assert sorted({point.size for point in found.curves}) == [1, 2, 4, 8, 16, 32]


def test_rankings_say_where_they_come_from(result):
    curve = next(run for run in result.runs if run.sae["name"].endswith(", energy"))
    ranking = curve.sae["provenance"]["ranking"]
    assert ranking["by"] == "energy"
    assert ranking["n_rows"] == 1000


def test_json_round_trip_and_the_flat_curves(result, tmp_path):
    result.save(tmp_path / "progressive.json")
    assert Progressive.load(tmp_path / "progressive.json") == result
    plain = json.loads((tmp_path / "progressive.json").read_text())
    for point in plain["curves"]:
        assert {"name", "size", "fvu", "ce_sae", "rsa"} <= set(point)
        assert set(point["fvu"]) >= {"value", "low", "high", "unit"}
        assert point["ce_sae"]["value"] is None
        assert "no language model" in point["ce_sae"]["reason"]
    with pytest.raises(FormatError, match="must hold `name`, `size`, `seeds`"):
        Progressive.from_json({**result.to_json(), "curves": [{"name": "a"}]})


def test_differences_of_schema_2_are_decided_by_todays_rule(result):
    plain = result.to_json() | {"schema": 2}
    for each in plain["differences"]:
        del each["seeds"], each["detects"]
        each["verdict"] = each["name"]
    assert Progressive.from_json(plain) == result
    with pytest.raises(FormatError):
        Progressive.from_json(plain | {"differences": [{"metric": "fvu"}]})


def test_tables_and_page(result, tmp_path):
    assert result.table()[0] == ["fvu", "8", "32"]
    assert "topk pruned by energy" in repr(result)
    assert "<caption>FVU by latents" in result._repr_html_()
    result.save(tmp_path / "progressive.json")
    page = write(collect(tmp_path).results, tmp_path, title="t").read_text()
    for text in (
        "Small SAEs from large ones",
        "paired by seed",
        "as a power law",
        "latents kept",
        "energy: rank^-",
        "description_length",
    ):
        assert text in page
    assert "Fidelity against interpretability" not in page  # rows without tokens


def test_the_page_shows_fidelity_against_interpretability(saes, source, tmp_path):
    x = torch.cat([batch.x for batch in source.batches(4096)])
    rows = ArrayRows(x, token=torch.arange(len(x)).int() % 7, document=torch.arange(len(x)) // 20)
    progressive(saes, rows, settings=ProgressiveSettings(by=("energy",), **QUICK)).save(tmp_path / "progressive.json")
    page = write(collect(tmp_path).results, tmp_path, title="t").read_text()
    assert "Fidelity against interpretability" in page
    assert "detection (AUC)" in page


def test_cross_entropy_is_compared_too(stories):
    from saekit.models.loading import load_model

    lm = load_model(stories)
    data = [
        "Once upon a time there was a little dog who liked to run.",
        "The sun was bright and the cat sat still.",
    ] * 3
    rows = torch.randn(300, lm.d_model, generator=torch.Generator().manual_seed(0))
    saes = train(TopK(n_latents=16, k=2), rows, seeds=[0], tokens=512, settings=TrainSettings(batch_rows=64))
    saes = [sae.replace(provenance={**sae.provenance, "hook": "layers.1"}) for sae in saes]
    found = progressive(
        saes,
        rows,
        sizes=[4, 16],
        model=lm,
        data=data,
        settings=ProgressiveSettings(by=("energy", "unsorted"), tokens=60, **QUICK),
    )
    assert math.isfinite(found.curves[0].metrics.ce_sae.value)
    assert found.language_model["n_tokens"] >= 60
    assert any(each.metric == "ce_sae" for each in found.differences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ProgressiveSettings(by=("enrgy",))}, "Did you mean `energy`"),
        ({"sizes": [8, 33]}, r"within 1\.\.32, the widest SAE; got \[8, 33\]"),
        ({"sizes": [8, 4]}, "must be increasing whole numbers"),
        ({"sizes": []}, "must be increasing whole numbers"),
    ],
)
def test_progressive_refuses(saes, source, options, message):
    with pytest.raises(ConfigError, match=message):
        progressive(saes, source, **options)


def test_saes_that_cannot_be_compared(saes, source, oracle):
    with pytest.raises(ConfigError, match=r"must have one width; they have \[16, 24\]"):
        progressive([saes[0], oracle], source)
    with pytest.raises(ConfigError, match="at least one SAE that is no control"):
        progressive([saes[6]], source)


def test_saes_that_differ_in_a_setting_are_no_seeds_of_one_another(saes, source):
    other = saes[0].with_k(2)
    with pytest.raises(ConfigError, match=r"must differ in their seed.* `a` and `b` do not"):
        progressive({"a": saes[0], "b": other}, source)


def test_only_the_saes_to_be_pruned_need_the_score(saes, source):
    scored = [sae.with_scores(stability=torch.arange(sae.n_latents) / sae.n_latents) for sae in saes[:2]]
    result = progressive(
        [*scored, *saes[2:6]], source, settings=ProgressiveSettings(by=("stability",), latents=False, **QUICK)
    )
    assert at(result, "topk pruned by stability", 8).seeds == [0, 1]
    with pytest.raises(ConfigError, match=r"got `stability`.*written by `saekit compare --write`"):
        progressive([scored[0], saes[1]], source, settings=ProgressiveSettings(by=("stability",)))


def test_given_scores_rank_like_their_name(saes, source):
    from saekit.measure.importance import importance

    sae = saes[0]
    scores = importance(sae, source).scores["energy"]
    assert torch.equal(rank(sae, by=scores).W_dec, rank(sae, source, by="energy").W_dec)


def test_latents_and_the_overlap_of_seeds_are_measured_at_every_size(saes, source):
    by = ("energy", "unsorted")
    result = progressive(saes, source, settings=ProgressiveSettings(by=by, **QUICK))
    topk = [sae for sae in saes if sae.provenance["config"]["arch"] == "topk" and sae.n_latents == 32]
    topk = [sae for sae in topk if sae.provenance["config"]["control"] is None]
    for way, order in (("unsorted", topk), ("pruned by energy", [rank(sae, source) for sae in topk])):
        for size in (8, 32):
            found = at(result, f"topk {way}", size).metrics
            assert found["shared"].value == seed_overlap([sae.take(size) for sae in order]).value
            assert found["description_length"].low is not None
    apart = [sae for sae in saes if sae.n_latents == 8]
    assert at(result, "topk trained separately", 8).metrics["shared"].value == seed_overlap(apart).value
    assert "parent_cosine" in at(result, "matryoshka", 32).metrics
    assert "parent_cosine" not in at(result, "topk trained separately", 32).metrics
    assert any(each.metric == "description_length" for each in result.differences)
    plain = progressive(saes, source, settings=ProgressiveSettings(by=by, latents=False, **QUICK))
    assert "shared" not in at(plain, "matryoshka", 8).metrics
    assert at(plain, "matryoshka", 8).metrics.fvu == at(result, "matryoshka", 8).metrics.fvu


def test_rankings_by_gradient_are_taken_on_other_texts_than_the_cross_entropies():
    lm = load_model("builtin", device="cpu", dtype="float32")
    texts = [f"Return the {what} of an array over a given axis." for what in ("mean", "sum", "maximum", "range") * 6]
    g = torch.Generator().manual_seed(0)
    W = torch.randn(32, lm.d_model, generator=g)
    W = W / W.norm(dim=1, keepdim=True)
    sae = SAE(
        W_enc=W, b_enc=torch.zeros(32), W_dec=W, b_dec=torch.zeros(lm.d_model), rule=TopKRule(4),
        provenance={"hook": "layers.1"}, scores={"mine": torch.arange(32.0)},
    )  # fmt: skip
    rows = capture(lm, texts, layer=1)
    by = ("attribution", "mine", "energy")
    result = progressive(
        [sae], rows, sizes=[8, 32], model=lm, data=texts, settings=ProgressiveSettings(by=by, tokens=60, **QUICK)
    )
    assert set(result.names) == {f"topk pruned by {each}" for each in by}
    assert result.language_model["n_documents"] <= 12  # those in odd places
    assert {ranking.by for ranking in result.rankings} == {"attribution", "energy"}
    gradient = attribution(sae, lm, texts[::2], hook="layers.1", tokens=60)
    ranked = rank(sae.with_scores(**gradient.scores), by="attribution")
    expected = measure_sizes(ranked, rows, [8], settings=SizeSettings(**QUICK))
    assert at(result, "topk pruned by attribution", 8).metrics.fvu.value == expected.points[0].metrics.fvu.value
    with pytest.raises(ConfigError, match="`attribution` is a gradient of a language model; got none"):
        progressive([sae], rows, settings=ProgressiveSettings(by=("attribution",)))
