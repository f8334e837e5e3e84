"""Evaluation on rows."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
import torch

from fixtures.known_saes import random_sae
from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.evaluation.result import Evaluation
from saekit.evaluation.run import _rows_to_make, evaluate
from saekit.evaluation.settings import MODEL_ROWS, EvaluationSettings
from saekit.files import dump_json
from saekit.measure.accumulators import fvu
from saekit.measure.metrics import METRICS
from saekit.measure.settings import CE_TOKENS
from saekit.measure.verdicts import Stored, verdict
from saekit.rows.arrays import ArrayRows
from saekit.sae import rules
from saekit.sae.model import SAE
from saekit.sae.scaling import Scaling
from saekit.training.config import TopK
from saekit.training.loop import train, untrained
from saekit.training.settings import TrainSettings

ON_ROWS = {"fvu", "l0", "dead_fraction", "dense_fraction", "cosine", "l2_ratio", "relative_reconstruction_bias",
           "mse", "ev_legacy", "decoder_redundancy", "encoder_redundancy", "redundancy_null",
           "decoder_projection"}  # fmt: skip


@pytest.fixture(scope="module")
def evaluation(oracle, thresholded, synthetic) -> Evaluation:
    return evaluate([oracle, thresholded], synthetic)


# ---------------------------------------------------------------- numbers


def test_metrics_are_those_of_the_rows(evaluation, oracle, rows):
    metrics = evaluation.entries[0].metrics
    assert set(metrics) == ON_ROWS
    assert metrics.fvu.value == pytest.approx(fvu(rows, oracle.reconstruct(rows)), rel=1e-9)
    assert metrics.l0.value == pytest.approx(oracle.encode(rows).l0())
    assert evaluation.n_rows == len(rows)
    for name, measured in metrics.items():
        assert measured.unit == METRICS[name].unit
        assert (measured.low is None) == ("redundancy" in name)
        assert measured.low is not None or measured.reason


@pytest.mark.parametrize(("batch_rows", "with_documents"), [(61, True), (399, False)])
def test_any_batching_gives_the_same_values(oracle, thresholded, synthetic, rows, batch_rows, with_documents):
    source = synthetic if with_documents else rows
    once = evaluate([oracle, thresholded], source, settings=EvaluationSettings(max_rows=500))
    again = evaluate([oracle, thresholded], source, settings=EvaluationSettings(max_rows=500, batch_rows=batch_rows))
    for one, other in zip(once.entries, again.entries, strict=True):
        pairs = [(one.metrics, other.metrics)]
        pairs += [(one.controls[name].metrics, other.controls[name].metrics) for name in one.controls]
        pairs += [(one.controls[name].differences, other.controls[name].differences) for name in one.controls]
        for mine, theirs in pairs:
            for name in mine:
                assert mine[name].value == pytest.approx(theirs[name].value, rel=1e-6, abs=1e-9), name
                if mine[name].low is not None:
                    assert mine[name].low == pytest.approx(theirs[name].low, rel=1e-5, abs=1e-7), name
        assert one.density == other.density


def test_sae_alone_gives_what_it_gives_beside_others(evaluation, thresholded, synthetic):
    alone = evaluate(thresholded, synthetic)
    assert alone.entries[0].metrics == evaluation.entries[1].metrics
    assert alone.entries[0].controls["untrained"] == evaluation.entries[1].controls["untrained"]


def test_rows_limits_what_is_seen(oracle, synthetic, rows):
    result = evaluate(oracle, synthetic, settings=EvaluationSettings(max_rows=1001, batch_rows=300, controls=False))
    assert result.n_rows == 1001
    assert result.metrics.fvu.value == pytest.approx(fvu(rows[:1001], oracle.reconstruct(rows[:1001])), rel=1e-9)


def test_a_mean_predictor_scores_one_and_a_perfect_sae_zero(constant, identity, rows):
    assert evaluate(constant(rows.mean(0)), rows).metrics.fvu.value == pytest.approx(1.0, rel=1e-6)
    assert evaluate(identity(24), rows).metrics.fvu.value == 0.0


def test_arrays_without_documents_say_where_their_interval_comes_from(oracle, rows):
    measured = evaluate(oracle, rows.numpy()).metrics.fvu
    assert measured.low is not None
    assert "consecutive rows" in measured.reason


def test_one_document_has_no_interval(oracle, rows):
    source = ArrayRows(rows, document=torch.zeros(len(rows), dtype=torch.long))
    measured = evaluate(oracle, source).metrics.fvu
    assert measured.low is None
    assert "at least 40 documents" in measured.reason


def test_intervals_can_be_left_out(oracle, rows):
    measured = evaluate(oracle, rows, settings=EvaluationSettings(intervals=False)).metrics.fvu
    assert (measured.low, measured.reason) == (None, "no interval asked for")


def test_training_rows_are_recognised(oracle, rows):
    source = ArrayRows(rows)
    digest = source.info["digest"]
    for known, expected in ((digest, True), ("sha256:00", False), (None, None)):
        provenance = {} if known is None else {"data_digest": known}
        result = evaluate(oracle.replace(provenance=provenance), source, settings=EvaluationSettings(intervals=False))
        assert result.entries[0].on_training_rows is expected
        assert ("was trained on" in repr(result)) == bool(expected)


def test_nothing_given_is_changed(oracle, rows):
    before = rows.clone(), oracle.W_dec.clone()
    evaluate(oracle, rows, settings=EvaluationSettings(intervals=False))
    assert torch.equal(before[0], rows)
    assert torch.equal(before[1], oracle.W_dec)


def test_progress_counts_rows(oracle, synthetic):
    seen = []
    evaluate(
        oracle,
        synthetic,
        progress=lambda *call: seen.append(call),
        settings=EvaluationSettings(batch_rows=1000, intervals=False),
    )
    assert seen == [("rows", 1000, 3000), ("rows", 2000, 3000), ("rows", 3000, 3000)]


# ---------------------------------------------------------------- controls


def test_controls_stand_beside_every_sae(evaluation):
    for entry in evaluation.entries:
        assert list(entry.controls) == ["untrained", "pca"]
        untrained = entry.controls["untrained"]
        assert set(untrained.metrics) == ON_ROWS
        assert untrained.metrics.l0.value == pytest.approx(entry.metrics.l0.value, rel=0.1)
        assert entry.controls["pca"].metrics.l0.value == round(entry.metrics.l0.value)


def test_an_sae_with_the_true_dictionary_beats_its_controls(evaluation):
    entry = evaluation.entries[0]
    for control in entry.controls.values():
        difference = control.differences.fvu
        assert difference.value == pytest.approx(entry.metrics.fvu.value - control.metrics.fvu.value)
        assert difference.high < 0


def test_training_beats_no_training(synthetic):
    config = TopK(n_latents=48, k=2, lr=1e-2, scaling="none")
    (trained,) = train([config], synthetic, tokens=12_000, settings=TrainSettings(batch_rows=200))
    result = evaluate([trained, untrained(config, synthetic, 0)], synthetic)
    first, second = result.entries
    assert first.controls["untrained"].differences.fvu.high < -0.1
    assert abs(second.controls["untrained"].differences.fvu.value) < 0.1
    assert first.on_training_rows
    assert [entry.name for entry in result.entries] == ["topk-48-k2-seed0", "topk-48-k2-untrained-seed0"]
    # One shape, rule and scaling: one control for both.
    assert first.controls["untrained"].metrics == second.controls["untrained"].metrics


def test_the_untrained_control_depends_on_the_seed_alone(synthetic, oracle):
    once = evaluate(oracle, synthetic, settings=EvaluationSettings(intervals=False, seed=3))
    again = evaluate(oracle, synthetic, settings=EvaluationSettings(intervals=False, seed=3))
    other = evaluate(oracle, synthetic, settings=EvaluationSettings(intervals=False, seed=4))
    mine, theirs = (each.controls["untrained"].metrics.fvu.value for each in (once, again))
    assert mine == theirs
    assert mine != other.controls["untrained"].metrics.fvu.value


def test_untrained_dictionary_lands_on_the_null(evaluation):
    metrics = evaluation.entries[0].controls["untrained"].metrics
    assert metrics.decoder_redundancy.value == pytest.approx(metrics.redundancy_null.value, abs=0.06)


@pytest.mark.parametrize("kind", ["relu", "groupmax", "scalar", "standardize", "layer_norm"])
def test_untrained_twin_matches_rule_scaling_and_l0(oracle, rows, kind):
    sae = {
        "relu": oracle.replace(rule=rules.ReLURule(), b_enc=torch.full((48,), -0.4)),
        "groupmax": oracle.replace(rule=rules.GroupMaxRule(4)),
        "scalar": oracle.replace(scaling=Scaling("scalar", scale=torch.tensor(2.0))),
        "standardize": oracle.replace(
            scaling=Scaling("standardize", scale=1 / rows.std(0), mean=rows.mean(0)), b_pre=None, b_dec=torch.zeros(24)
        ),
        "layer_norm": oracle.replace(scaling=Scaling("layer_norm"), b_pre=None, b_dec=torch.zeros(24)),
    }[kind]
    result = evaluate(sae, rows, settings=EvaluationSettings(intervals=False))
    untrained = result.controls["untrained"].metrics
    assert untrained.l0.value == pytest.approx(result.metrics.l0.value, rel=0.15)
    # Biases at the mean row: an untrained SAE is not absurdly far from predicting the mean.
    assert untrained.fvu.value < 1.5


def test_frozen_decoder_is_a_control_when_given_or_recognised(oracle, synthetic):
    config = {"control": "frozen-decoder"}
    frozen = oracle.replace(W_dec=torch.randn(48, 24, generator=torch.Generator().manual_seed(0)))
    by_argument = evaluate(oracle, synthetic, frozen=frozen, settings=EvaluationSettings(intervals=False))
    by_provenance = evaluate(
        [oracle, frozen.replace(provenance={"config": config})], synthetic, settings=EvaluationSettings(intervals=False)
    )
    assert list(by_argument.controls) == ["untrained", "frozen-decoder", "pca"]
    assert by_argument.controls["frozen-decoder"].metrics == by_provenance.entries[0].controls["frozen-decoder"].metrics
    assert len(by_provenance.entries) == 2
    assert "frozen-decoder" not in by_provenance.entries[1].controls
    assert "frozen-decoder" in by_provenance.entries[1].name


def test_controls_can_be_fitted_on_other_rows(oracle, rows):
    inside = evaluate(oracle, rows[:400], settings=EvaluationSettings(intervals=False))
    outside = evaluate(oracle, rows[:400], fit=rows[400:], settings=EvaluationSettings(intervals=False))
    assert "of the rows evaluated" in inside.controls["pca"].about["fitted_on"]
    assert "given as `fit`" in outside.controls["pca"].about["fitted_on"]
    assert inside.controls["pca"].metrics.fvu.value < outside.controls["pca"].metrics.fvu.value


def test_controls_can_be_left_out(oracle, synthetic):
    assert evaluate(oracle, synthetic, settings=EvaluationSettings(controls=False, intervals=False)).controls == {}


# ---------------------------------------------------------------- the result


def test_result_round_trips_through_json(evaluation, tmp_path):
    plain = json.loads(dump_json(evaluation.to_json()))
    assert Evaluation.from_json(plain) == evaluation
    evaluation.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == evaluation


def test_json_has_the_fixed_names(evaluation):
    plain = evaluation.to_json()
    for name in ("fvu", "l0", "dead_fraction"):
        assert set(plain["metrics"][name]) >= {"value", "low", "high", "unit"}
    assert plain["metrics"] == plain["entries"][0]["metrics"]
    assert (plain["kind"], plain["schema"]) == ("evaluation", 6)


def test_verdicts_over_baselines_follow_from_the_paired_intervals(evaluation, oracle, synthetic):
    for entry in evaluation.entries:
        for control in entry.controls.values():
            gap = control.differences["fvu"]
            alone = verdict(Stored(gap).oriented(-1).difference, METRICS["fvu"].margin)
            assert control.verdicts["fvu"] in (alone, "undecided")
            assert control.detects["fvu"] == pytest.approx(0.01 + 1.4294 * (gap.high - gap.low) / 2, rel=1e-3)
    assert evaluation.entries[0].controls["untrained"].verdicts == {"fvu": "better"}
    [entry] = evaluate(oracle, synthetic, settings=EvaluationSettings(intervals=False)).entries
    assert {word for each in entry.controls.values() for word in each.verdicts.values()} == {"undecided"}
    assert all(each.detects == {} for each in entry.controls.values())


def test_results_of_schema_2_say_that_their_untrained_saes_had_no_factor(evaluation):
    plain = json.loads(dump_json(evaluation.to_json()))
    about = plain["entries"][0]["controls"]["untrained"]["about"]
    assert 0 < about["factor"] < 1
    del about["factor"]
    read = Evaluation.from_json(plain | {"schema": 2})
    assert read.entries[0].controls["untrained"].about["factor"] == 1.0
    assert read.entries[0].metrics == evaluation.entries[0].metrics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plain: plain.update(schema=99), "reads up to 6. Install the newer release"),
        (lambda plain: plain.update(entris=[]), "Did you mean `entries`"),
        (lambda plain: plain["metrics"]["fvu"].update(value=0.0), "must equal those of the first entry"),
        (
            lambda plain: plain["entries"][0].update(metrics=3),
            r"`evaluation.entries\[0\].metrics` must be a JSON object",
        ),
        (lambda plain: plain.update(entries=[]), "must hold at least one SAE"),
    ],
)
def test_altered_results_are_refused(evaluation, change, message):
    plain = json.loads(dump_json(evaluation.to_json()))
    change(plain)
    with pytest.raises(FormatError, match=message):
        Evaluation.from_json(plain)
    with pytest.raises(FormatError, match="must be a JSON object"):
        Evaluation.from_json([])


def test_metrics_are_attributes_and_say_what_is_missing(evaluation):
    metrics = evaluation.entries[0].metrics
    assert metrics.fvu is metrics["fvu"]
    assert "fvu" in dir(metrics)
    with pytest.raises(AttributeError, match="Did you mean `fvu`"):
        _ = metrics.fvuu
    with pytest.raises(AttributeError, match="needs a causal language model"):
        _ = metrics.ce_sae
    with pytest.raises(AttributeError, match="cannot be changed"):
        metrics.fvu = 0
    with pytest.raises(AttributeError, match="cannot be changed"):
        del metrics.fvu
    assert copy.deepcopy(metrics) == metrics


def test_with_several_saes_one_must_be_chosen(evaluation, oracle, rows):
    for name in ("metrics", "controls"):
        with pytest.raises(ConfigError, match=r"holds 2 SAEs, `topk-48-k2`, `jumprelu-48`: choose one with `entry\("):
            getattr(evaluation, name)
    assert evaluation.entry("jumprelu-48") is evaluation.entries[1]
    with pytest.raises(ConfigError, match="Did you mean `jumprelu-48`"):
        evaluation.entry("jumprelu48")
    alone = evaluate(oracle, rows, settings=EvaluationSettings(intervals=False, controls=False))
    assert alone.metrics is alone.entry().metrics is alone.entries[0].metrics


def test_a_frame_has_a_row_per_sae_and_one_per_baseline(evaluation):
    frame = evaluation.to_pandas().set_index("name")
    assert frame.index.tolist() == ["topk-48-k2", "jumprelu-48"]
    second = evaluation.entries[1].metrics.fvu
    assert frame.loc["jumprelu-48", ["fvu", "fvu_low", "fvu_high"]].tolist() == [second.value, second.low, second.high]
    baselines = evaluation.to_pandas("controls")
    assert baselines[["name", "control"]].values.tolist()[:2] == [["topk-48-k2", "untrained"], ["topk-48-k2", "pca"]]
    control = evaluation.entries[0].controls["pca"]
    assert baselines.fvu[1] == control.metrics.fvu.value
    assert baselines.difference_fvu_low[1] == control.differences.fvu.low
    assert "entries[0].metrics.fvu" in evaluation.to_pandas("measured").name.tolist()
    with pytest.raises(ConfigError, match="`part` must be one of `entries`, `controls`, `measured`"):
        evaluation.to_pandas("sae")


def test_metrics_are_short_as_text_and_whole_in_a_notebook(evaluation):
    metrics = evaluation.entries[0].metrics
    assert re.fullmatch(r"Metrics\(fvu=0\.\d+, l0=2, .* … 13 in all\)", repr(metrics))
    assert len(repr(metrics)) < 160
    assert metrics._repr_html_().count("<tr>") == 1 + len(metrics)


def test_table_shows_each_sae_and_its_controls(evaluation):
    heading, *lines = evaluation.table()
    assert heading == ["", "fvu", "l0", "dead", "cosine"]
    assert [line[0] for line in lines] == ["topk-48-k2", "  untrained", "  pca", "jumprelu-48", "  untrained", "  pca"]
    assert lines[0][1] == str(evaluation.entries[0].metrics.fvu)
    assert lines[2][3] == "–"
    assert "3,000 rows; 95% intervals" in repr(evaluation)


def test_notebook_view_escapes_names(oracle, rows):
    result = evaluate(
        oracle.replace(provenance={"seed": "<script>"}), rows, settings=EvaluationSettings(intervals=False)
    )
    page = result._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_equal_names_are_told_apart(oracle, rows):
    names = [
        entry.name
        for entry in evaluate(
            [oracle, oracle, oracle], rows, settings=EvaluationSettings(intervals=False, controls=False)
        ).entries
    ]
    assert names == ["topk-48-k2", "topk-48-k2 (2)", "topk-48-k2 (3)"]


def test_paths_are_loaded_and_named_by_their_folder(oracle, rows, tmp_path):
    oracle.save(tmp_path / "run-1")
    result = evaluate(tmp_path / "run-1", rows, settings=EvaluationSettings(intervals=False, controls=False))
    assert result.entries[0].name == "run-1"
    assert (
        result.metrics.fvu
        == evaluate(oracle, rows, settings=EvaluationSettings(intervals=False, controls=False)).metrics.fvu
    )


# ---------------------------------------------------------------- refusals


def test_rows_of_another_width_are_refused_before_any_is_read(oracle):
    class Unread:
        d_in, n_rows, info = 25, 10, {}

        def batches(self, batch_rows, *, seed=None, start=(0, 0)):
            raise AssertionError("rows were read")

    with pytest.raises(ShapeError, match="width of the SAE, 24; they have 25"):
        evaluate(oracle, Unread())
    with pytest.raises(ShapeError, match="width of the SAE, 24; they have 25"):
        evaluate(oracle, torch.ones(4, 24), fit=Unread())


def test_nan_rows_are_refused(oracle, rows):
    class Bad:
        d_in, n_rows, info = 24, 10, {}

        def batches(self, batch_rows, *, seed=None, start=(0, 0)):
            x = rows[:10].clone()
            x[3] = math.nan
            yield _Batch(x)

    with pytest.raises(DataError, match="row 3 of this batch"):
        evaluate(oracle, Bad())


class _Batch:
    document = None

    def __init__(self, x):
        self.x = x


def test_no_rows_are_refused(oracle):
    class Empty:
        d_in, n_rows, info = 24, 0, {}

        def batches(self, batch_rows, *, seed=None, start=(0, 0)):
            return iter(())

    with pytest.raises(DataError, match="at least one row"):
        evaluate(oracle, Empty())


def test_calls_that_cannot_work_are_refused(oracle, rows):
    with pytest.raises(ConfigError, match="at least one SAE"):
        evaluate([], rows)
    with pytest.raises(ConfigError, match="got neither"):
        evaluate(oracle)
    with pytest.raises(ConfigError, match="must come with `data`"):
        evaluate(oracle, rows, model="builtin")
    with pytest.raises(ConfigError, match="`max_rows` must be a whole number from 1; got 0"):
        evaluate(oracle, rows, settings=EvaluationSettings(max_rows=0))
    with pytest.raises(ShapeError, match="must have one width; `topk-8-k3`"):
        evaluate([oracle, _square(8, 5)], rows)
    with pytest.raises(ShapeError, match="rows must have the width of the SAE, 5"):
        evaluate(_square(8, 5).replace(W_dec=torch.ones(8, 7), b_dec=torch.zeros(7)), rows)
    with pytest.raises(ShapeError, match="`frozen` has 5, others 24"):
        evaluate(oracle, rows, frozen=_square(8, 5))


def test_weights_with_nan_are_refused(oracle, rows):
    W = oracle.W_dec.clone()
    W[0, 0] = math.nan
    with pytest.raises(DataError, match="`W_dec` holds NaN"):
        evaluate(oracle.replace(W_dec=W), rows)


def _square(n_latents: int, d: int) -> SAE:
    W = torch.ones(n_latents, d)
    return SAE(W_enc=W, b_enc=torch.zeros(n_latents), W_dec=W, b_dec=torch.zeros(d), rule=rules.TopKRule(3))


def test_a_setting_passed_as_a_keyword_is_told_where_it_goes(oracle, rows):
    with pytest.raises(
        TypeError, match=r"unknown argument `intervals`. Pass settings=EvaluationSettings\(intervals=…\)"
    ):
        evaluate(oracle, rows, intervals=False)
    with pytest.raises(TypeError, match="Did you mean `frozen`"):
        evaluate(oracle, rows, frozn=oracle)
    with pytest.raises(TypeError, match="Did you mean `intervals`"):
        EvaluationSettings(interval=False)


def test_tokens_are_tokens_and_rows_are_rows(stories, oracle, rows):
    texts = ["Once upon a time there was a little dog who ran and ran."] * 200
    sae = random_sae(d=64).replace(provenance={"hook": "layers.1"})
    for asked, n_rows in (({"tokens": 600}, 600), ({"tokens": 600, "max_rows": 90}, 90)):
        how = EvaluationSettings(controls=False, intervals=False, **asked)
        found = evaluate(sae, model=stories, data=texts, settings=how)
        assert found.n_rows == found.settings["rows"] == n_rows
        assert 600 <= found.language_model["n_tokens"] < 640
        assert f"{n_rows:,} rows, {found.language_model['n_tokens']:,} predicted tokens" in found.caption()
        assert "tokens; no intervals asked for;" in found.caption()
    with pytest.raises(ConfigError, match="`tokens` is about a language model, and there is none; got 600"):
        evaluate(oracle, rows, settings=EvaluationSettings(tokens=600))


def test_the_default_number_of_tokens_is_a_number_like_any_other_where_it_is_given(oracle, rows):
    assert _rows_to_make(EvaluationSettings(tokens=CE_TOKENS)) == CE_TOKENS
    assert _rows_to_make(EvaluationSettings()) == _rows_to_make(EvaluationSettings(tokens=0)) == MODEL_ROWS
    with pytest.raises(ConfigError, match=f"there is none; got {CE_TOKENS}"):
        evaluate(oracle, rows, settings=EvaluationSettings(tokens=CE_TOKENS))
