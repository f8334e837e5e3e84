"""Classification of texts by a real model: one grid, resumed fit by fit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fixtures.flat_settings import asked
from fixtures.worded_classes import COMMON, FEW, QUICK, plan_of, read, run
from saekit import classify, load_classifier, transfer
from saekit.classification import features, stored_fits
from saekit.classification.result import Classification, ClassificationSummary, summarize
from saekit.classification.run import classify as classify_function
from saekit.classification.run import run_plan
from saekit.classification.stored_fits import missing_jobs, read_fit
from saekit.classification.text_classifier import fit_classifier, save_classifier
from saekit.classification.transfer import held_out
from saekit.classification.verdicts import difference
from saekit.errors import ConfigError, DataError, FormatError
from saekit.measure.verdicts import corrected_t
from saekit.measure.weight_scores import weight_scores
from saekit.report.classification import classification as classification_sections
from saekit.report.classification import figures, write_classification_figures
from saekit.report.page import render
from saekit.report.parts import measured_cell

# ------------------------------------------------------------------------------------------------------- the result


def test_every_arm_is_there_with_intervals_and_verdicts(full_run):
    _, result = full_run
    names = [arm.name for arm in result.arms]
    assert names[:4] == ["majority", "TF-IDF", "strongest TF-IDF", "dense last"]
    assert [name for name in names if name.startswith("strongest")][1:] == [
        "strongest dense", "strongest dense PCA", "strongest random", "strongest untrained", "strongest SAE",
    ]  # fmt: skip
    for name in ("dense sum", "dense mean", "dense sum class means", "dense sum tree", "dense sum PCA 8",
                 "dense sum SVD 4", "dense sum ICA 4", "random sum", "untrained count k=4", "SAE sum", "SAE sum k=2",
                 "SAE sum binarized", "SAE count tree", "SAE sum binarized tree"):  # fmt: skip
        assert name in names
    best = result.arm(result.best_dense)
    assert (best.family, best.verdict, best.difference.value) == ("dense", "equivalent", 0.0)
    assert best.inner == max(arm.inner or 0 for arm in result.arms if arm.family == "dense")
    for arm in result.arms:
        assert arm.verdict in ("better", "equivalent", "worse", "undecided")
        assert arm.difference.value == pytest.approx(arm.macro_f1.value - best.macro_f1.value)
        assert arm.macro_f1.low <= arm.macro_f1.value <= arm.macro_f1.high  # type: ignore[operator]
        assert arm.shuffled_auc is not None
    assert result.arm("majority").auc.value == 0.5
    assert result.arm("SAE sum").auc.value > 0.8
    control = result.arm(result.best_control)
    assert (control.control_difference.value, control.control_auc_difference.value) == (0.0, 0.0)
    for arm in result.arms:
        assert arm.control_auc_difference.value == pytest.approx(arm.auc.value - control.auc.value)
    assert result.settings["intervals"]["unit"] == "groups"
    assert 0 < result.floor.value < 0.5
    assert any("fewer than 50 test rows" in warning.message for warning in result.warnings)
    assert any("no pooling `count`" in warning.message for warning in result.warnings)
    assert {point.n_train for point in result.low_data} == {40}
    assert set(result.classes) == {"good", "bad"}


def test_two_arms_can_be_compared(full_run, lm, sae, rows, tmp_path):
    plan, result = full_run
    found = difference(plan, "SAE sum", "TF-IDF")
    assert found.value == pytest.approx(result.arm("SAE sum").macro_f1.value - result.arm("TF-IDF").macro_f1.value)
    assert difference(plan, "SAE sum", result.best_dense) == result.arm("SAE sum").difference
    with pytest.raises(ConfigError, match="there is no arm `SAE sun`"):
        difference(plan, "SAE sun", "TF-IDF")
    with pytest.raises(ConfigError, match="has not been computed"):
        difference(plan_of(lm, sae, rows, **FEW, out=tmp_path), "SAE sum", "TF-IDF")


def test_json_and_tables(full_run, tmp_path):
    _, result = full_run
    result.save(tmp_path / "r.json")
    again = Classification.load(tmp_path / "r.json")
    assert again.to_json() == result.to_json()
    plain = result.to_json()
    assert {"name", "macro_f1", "auc", "difference", "verdict"} <= set(plain["arms"][0])
    assert "This test set resolves ±" in repr(result)
    assert "<table>" in result._repr_html_()
    curves = result.price_of_sparsity()
    assert [k for k, _ in curves["topk-64-k6-seed5 sum"]] == [2, 8]
    assert [k for k, _ in curves["PCA dense sum"]] == [2, 8]
    with pytest.raises(ConfigError, match=r"there is no arm `SAE sumi`.*Did you mean"):
        result.arm("SAE sumi")
    with pytest.raises(FormatError, match="must hold the arm `x`"):
        Classification.from_json({**plain, "best_sae": "x"})
    with pytest.raises(FormatError, match="must name each arm once"):
        Classification.from_json({**plain, "arms": [*plain["arms"], plain["arms"][0]]})


def test_report(full_run, tmp_path):
    _, result = full_run
    drawn = figures(result.to_json())
    assert set(drawn) == {"best", "price", "pooling", "binarized", "low-data"}
    summary = summarize({"one": result, "two": result})
    page = render([result, summary])
    assert "Classification: list" in page
    assert "The price of sparsity" in page
    assert "Over data sets" in page
    assert len(write_classification_figures(result.to_json(), tmp_path)) == 10


@pytest.mark.parametrize(
    ("metric", "name", "gap"), [("macro_f1", "macro-F1", "difference"), ("auc", "AUC", "auc_difference")]
)
def test_a_report_shows_differences_of_what_verdicts_are_of(full_run, metric, name, gap):
    plain = full_run[1].to_json()
    sections = classification_sections({**plain, "settings": {**plain["settings"], "metric": metric}})
    (table,) = [each for section in sections for each in section.tables if f"{name} − best dense" in each.columns]
    shown = [row[table.columns.index(f"{name} − best dense")].text for row in table.rows]
    assert shown == [measured_cell(arm[gap], where=gap, spec="+.3f").text for arm in plain["arms"]]
    shown = [row[table.columns.index(f"{name} − best control")].text for row in table.rows]
    assert shown == [measured_cell(arm[f"control_{gap}"], where=gap, spec="+.3f").text for arm in plain["arms"]]


def test_an_older_file_shows_what_it_has(full_run):
    plain = full_run[1].to_json()
    for arm in plain["arms"]:
        del arm["control_auc_difference"]
    assert Classification.from_json(plain).arms[0].control_auc_difference is None
    sections = classification_sections({**plain, "settings": {**plain["settings"], "metric": "auc"}})
    (table,) = [each for section in sections for each in section.tables if "AUC − best dense" in each.columns]
    assert "macro-F1 − best control" in table.columns


def test_frames_have_a_row_per_arm(full_run):
    _, result = full_run
    frame = result.to_pandas().set_index("name")
    arm = result.arm("SAE sum k=2")
    row = frame.loc[arm.name]
    assert len(frame) == len(result.arms)
    assert (row.k, row.pool, row.verdict, row.macro_f1, row.macro_f1_low) == (
        2, "sum", arm.verdict, arm.macro_f1.value, arm.macro_f1.low,
    )  # fmt: skip
    assert result.to_pandas("low_data").n_train.unique().tolist() == [40]
    summary = summarize({"one": result, "two": result}).to_pandas()
    assert summary.n_sets.tolist() == [2] * len(summary)


def test_summaries_of_the_first_schema_still_load(full_run):
    _, result = full_run
    plain = summarize({"one": result, "two": result}).to_json()
    old = {key: value for key, value in plain.items() if key not in ("versions", "settings")}
    assert ClassificationSummary.from_json({**old, "schema": 1}).arms == ClassificationSummary.from_json(plain).arms
    twice = summarize([result, result])  # two results may have one name
    assert (twice.sets, twice.arms[0].n_sets) == (["list", "list"], 2)


def test_transfer_without_across_gives_the_same_numbers(full_run, lm, sae, rows):
    _, result = full_run
    how = asked(label="label", group="pair", **{**COMMON, "pools": ("sum", "count")}, train_sizes=(40,))
    found = transfer(sae, model=lm, data=rows, **how)
    assert [arm.name for arm in found.arms] == [arm.name for arm in result.arms]
    assert found.best_dense == result.best_dense
    assert found.verdict_metric == result.settings["metric"]
    for arm, cell in zip(found.arms, found.cells, strict=True):
        other = result.arm(arm.name)
        for name in ("macro_f1", "auc", "difference", "auc_difference", "verdict"):
            assert getattr(arm, name) == getattr(other, name)
        assert (cell.macro_f1, cell.auc) == (other.macro_f1, other.auc)


@pytest.mark.parametrize("split", [{}, {"folds": 3}, {"split_column": "split"}, {"group": "pair", "max_rows": 100}])
def test_every_split_gives_both_the_same_numbers(lm, sae, rows, split):
    how = asked(**{**COMMON, "arms": ("words", "dense", "sae")}, **split, shuffles=0)
    one, other = classify(sae, model=lm, data=rows, **how), transfer(sae, model=lm, data=rows, **how)
    for arm in other.arms:
        same = one.arm(arm.name)
        assert (arm.macro_f1, arm.auc, arm.difference, arm.verdict) == (
            same.macro_f1, same.auc, same.difference, same.verdict,
        )  # fmt: skip
    assert held_out(rows, split=how["split"]).sum() == one.data["n_test"] or "max_rows" in split


def test_out_leaves_what_the_command_leaves(lm, sae, rows, tmp_path):
    how = asked(**{**COMMON, "arms": ("dense", "full")}, group="pair", shuffles=0)
    result = classify(sae, model=lm, data=rows, **how, out=tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"classification.json", "classifier", "fits", "features"}
    assert Classification.load(tmp_path / "classification.json") == result
    assert load_classifier(tmp_path, model=lm).card["arm"] == "SAE sum"
    transfer(sae, model=lm, data=rows, **how, out=tmp_path / "t")
    assert {each.name for each in (tmp_path / "t").iterdir()} == {"transfer.json", "fits", "features"}


def test_lists_of_texts_and_labels_are_classified_like_their_table(lm, sae, rows):
    how = asked(**{**COMMON, "arms": ("dense", "full")}, shuffles=0, max_rows=120)
    texts, labels, pairs = ([row[name] for row in rows] for name in ("text", "label", "pair"))
    one, other = (classify(sae, model=lm, data=data, **how) for data in (rows, (texts, labels)))
    assert [arm.macro_f1 for arm in one.arms] == [arm.macro_f1 for arm in other.arms]
    with pytest.raises(ConfigError, match="'group': groups} and group='group'"):
        asked(group=pairs)
    grouped = {"text": texts, "label": labels, "group": pairs}
    how = asked(**{**COMMON, "arms": ("dense",)}, shuffles=0, group="group")
    assert classify(sae, model=lm, data=grouped, **how).data["group"] == "group"


def test_layers_and_widths_give_a_map(lm, sae, rows):
    other = replace(sae.take(32), provenance={"hook": "layers.2"})
    result = run(lm, [sae, other], rows, **{**COMMON, "arms": ("dense", "full")}, shuffles=0)
    assert {arm.about["hook"] for arm in result.arms} == {"layers.1", "layers.2"}
    assert "layers" in figures(result.to_json())
    assert all(arm.shuffled_auc is None for arm in result.arms)


# ------------------------------------------------------------------------------------------------------ the grid


def test_a_cut_off_run_goes_on_where_it_was(lm, sae, rows, tmp_path, monkeypatch):
    module = stored_fits
    done = []
    original = module.fit_arm

    def counted(arm, *arguments, **settings):
        done.append(arm.name)
        if len(done) == 5:
            raise KeyboardInterrupt
        return original(arm, *arguments, **settings)

    monkeypatch.setattr(module, "fit_arm", counted)
    plan = plan_of(lm, sae, rows, **FEW, shuffles=0, out=tmp_path)
    n_cells = len(plan.jobs)
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan)
    assert len(missing_jobs(plan)) == n_cells - 4
    done[:] = [""] * 10
    resumed = run_plan(plan)
    assert len(done) - 10 == n_cells - 4
    assert not missing_jobs(plan)
    monkeypatch.setattr(module, "fit_arm", original)
    whole = run(lm, sae, rows, **FEW, shuffles=0)
    assert _without_time(resumed) == _without_time(whole)
    monkeypatch.setattr(module, "fit_arm", None)  # nothing is fitted any more
    assert _without_time(run_plan(plan)) == _without_time(whole)
    wider = plan_of(lm, sae, rows, **{**FEW, "ks": (2, 8, 16)}, shuffles=0, out=tmp_path)
    assert [job.name for job in missing_jobs(wider)] == ["SAE sum k=16"]
    other_seed = plan_of(lm, sae, rows, **FEW, shuffles=0, out=tmp_path, seed=1)
    assert len(missing_jobs(other_seed)) == n_cells
    file = next((tmp_path / "fits").iterdir())
    data = bytearray(file.read_bytes())
    for change in (lambda: data.__setitem__(-3, data[-3] ^ 64), lambda: data.__delitem__(slice(9, None))):
        change()  # one bit of a probability; then cut off
        file.write_bytes(data)
        assert len(missing_jobs(plan)) == 1  # a damaged file is fitted again
    monkeypatch.setattr(module, "fit_arm", original)
    notes = []
    again = run_plan(plan, lambda stage, done, total=None, note="": notes.append(note))
    assert [note for note in notes if "its file was damaged" in note]
    assert _without_time(again) == _without_time(whole)


def _without_time(result: Classification) -> dict:
    plain = result.to_json()
    for arm in plain["arms"]:
        del arm["seconds"]
    return plain


def test_order_of_documents_changes_no_prediction(lm, sae, rows):
    """With a given split, only rounding of features in other batches may differ."""
    order = np.random.default_rng(0).permutation(len(rows))
    settings = {**COMMON, "arms": ("dense", "full"), "split_column": "split", "shuffles": 0}
    settings["budget"] = {**QUICK, "C": (1.0,)}
    one = run(lm, sae, rows, **settings)
    other = run(lm, sae, [rows[i] for i in order], **settings)
    for arm in one.arms:
        assert other.arm(arm.name).macro_f1.value == pytest.approx(arm.macro_f1.value, abs=0.03)
        assert other.arm(arm.name).auc.value == pytest.approx(arm.auc.value, abs=0.01)


def test_nested_cross_validation_judges_every_row(lm, sae, rows):
    result = run(lm, sae, rows, **{**COMMON, "arms": ("majority", "dense", "full")}, folds=3, shuffles=1)
    assert result.data["n_test"] == len(rows)
    assert len(result.arm("SAE sum").chosen) == 3
    assert result.arm("SAE sum").auc.value > 0.8
    assert result.settings["p_values"] == "corrected t over folds"
    majority, best = result.arm("majority"), result.arm(result.best_dense)
    assert best.p is None
    assert 0 < majority.p < 0.05


def test_p_values_over_folds_are_those_of_the_corrected_t(lm, sae, rows, tmp_path):
    other = {"good": "bad", "bad": "good"}
    rows = [{**row, "label": other[row["label"]]} if i % 5 == 0 else row for i, row in enumerate(rows)]
    plan = plan_of(lm, sae, rows, **{**COMMON, "arms": ("words", "dense")}, folds=3, shuffles=0, out=tmp_path)
    result = run_plan(plan)
    gaps, end = [], 0
    cells = {job.name: read_fit(plan, job) for job in plan.jobs}
    for _, test in plan.data.parts:
        y = plan.data.y[test]
        f1 = []
        for name in ("TF-IDF", result.best_dense):
            said = cells[name].probabilities[0][end : end + len(test)].argmax(1)
            parts = [2 * ((said == c) & (y == c)).sum() / ((said == c).sum() + (y == c).sum()) for c in (0, 1)]
            f1.append(np.mean(parts))
        gaps.append(f1[0] - f1[1])
        end += len(test)
    n_train = np.mean([len(train) for train, _ in plan.data.parts])
    n_test = np.mean([len(test) for _, test in plan.data.parts])
    expected = corrected_t(gaps, round(n_train), round(n_test))[1]
    assert 0 < expected < 1
    assert result.arm("TF-IDF").p == pytest.approx(expected)
    drawn = run(lm, sae, rows, **{**COMMON, "arms": ("words", "dense")}, shuffles=0)
    assert drawn.settings["p_values"] == "paired jackknife"


def test_latents_can_be_ranked_by_what_is_stored(lm, sae, rows, tmp_path):
    stored = torch.arange(64.0)
    stored[60] = math.nan
    rated = sae.replace(scores={"stability": stored})
    settings = {**COMMON, "arms": ("dense", "random", "matched", "sparse"), "ks": (3,), "shuffles": 0}
    plan = plan_of(lm, rated, rows, **settings, select_by="stability", out=tmp_path)
    result = run_plan(plan)
    assert set(result.arm("SAE sum k=3").selected) == {61, 62, 63}
    assert result.settings["select_by"] == "stability"
    weights = plan_of(lm, sae, rows, **settings, select_by="alignment_self", out=tmp_path)
    (scores,) = {job.arm.scores for job in weights.jobs if job.arm.name == "SAE sum k=3"}
    assert scores == tuple(weight_scores(sae)["alignment_self"].tolist())
    by = {job.arm.name: job.arm.by for job in plan.jobs}
    assert (by["SAE sum k=3"], by["random sum k=4"]) == ("stability", "mean_difference")
    loaded = load_classifier(save_classifier(fit_classifier(plan, result, "SAE sum k=3"), tmp_path / "c"))
    assert set(loaded.predict(["returns the array", "raises an error"])) <= {"good", "bad"}
    for one, by_name, message in (
        (rated, "stabilty", "with `topk-64-k6-seed5` are stored `stability`.*Did you mean `stability`"),
        (sae, "stability", "none are stored"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_of(lm, one, rows, select_by=by_name)


def test_frozen_saes_are_controls(lm, sae, rows):
    frozen = sae.replace(provenance={**sae.provenance, "config": {"control": "frozen-decoder", "arch": "topk"}})
    result = run(lm, [sae, frozen], rows, **{**COMMON, "arms": ("dense", "frozen", "full")}, shuffles=0)
    kinds = {arm.kind: arm for arm in result.arms}
    assert kinds["frozen"].family == "control"
    assert result.best_control is not None
    with pytest.raises(ConfigError, match="at least one SAE that is no control"):
        run(lm, frozen, rows)


# ------------------------------------------------------------------------------------------------ several data sets


def test_summary_over_data_sets(full_run):
    _, result = full_run
    worse = replace(result, name="other", arms=[replace(arm, verdict="worse") for arm in result.arms])
    summary = summarize([result, worse, result])
    first = summary.arms[0]
    assert first.name == "SAE, best by inner folds"
    assert first.n_sets == 3
    assert first.worse >= 1
    assert first.better + first.equivalent + first.worse + first.undecided == 3
    assert first.difference.value == pytest.approx(result.arm(result.best_sae).difference.value)
    assert ClassificationSummary.from_json(summary.to_json()) == summary
    assert "intervals over data sets" in repr(summary)
    with pytest.raises(ConfigError, match="one margin"):
        summarize([result, replace(result, settings={**result.settings, "margin": 0.5})])
    with pytest.raises(ConfigError, match="got no results"):
        summarize([])


# --------------------------------------------------------------------------------------------------------- bad input


def bad(rows: list[dict], **changes) -> list[dict]:
    return [{**row, **changes} for row in rows]


def test_bad_data_is_refused_before_anything_runs(lm, sae, rows):
    few = {"arms": ("full",)}
    with pytest.raises(DataError, match="at least two classes; all 160 rows are `x`"):
        run(lm, sae, bad(rows, label="x"), **few)
    with pytest.raises(DataError, match="`lonely` has 1"):
        run(lm, sae, [*rows, {**rows[0], "label": "lonely"}], **few)
    for missing in (None, math.nan, " "):
        with pytest.raises(DataError, match=r"1 of 161 have none or NaN: rows `160`"):
            run(lm, sae, [*rows, {**rows[0], "label": missing}], **few)
    with pytest.raises(DataError, match="every row must have a group"):
        run(lm, sae, [*rows, {**rows[0], "pair": None}], group="pair", **few)
    with pytest.raises(
        DataError, match=r"at least 3 rows: one for each of the 3 folds .*budget.inner\); `few` has fewer"
    ):
        run(lm, sae, [*rows[::2], *({"text": f"few {i}", "label": "few"} for i in range(3))], **few)
    unseen = [*rows, *[{**rows[0], "label": "new", "split": "test"}] * 2]
    with pytest.raises(DataError, match="`new` are only in test"):
        run(lm, sae, unseen, split_column="split", **few)
    torn = [{**row, "pair": "same"} for row in rows]
    with pytest.raises(DataError, match="a group must lie on one side"):
        run(lm, sae, torn, split_column="split", group="pair", **few)
    with pytest.raises(DataError, match="`labels`"):
        run(lm, sae, rows, label="labels", **few)
    alone = [{**row, "split": "test" if row["label"] == "good" and row["split"] == "test" else "train"} for row in rows]
    with pytest.raises(DataError, match=r"the test rows must be of at least two classes; all \d+ are `good`"):
        run(lm, sae, alone, split_column="split", **few)
    with pytest.raises(
        DataError, match=r"at least 30 groups .*: one for each of the 30 folds \(--folds\); `few` has fewer.*--min-rows"
    ):
        run(lm, sae, [*rows, *[{**rows[1], "label": "few"}] * 9], folds=30, **few)


def test_draws_that_leave_nothing_are_refused(lm, sae, rows):
    marked = [{**row, "split": "test" if i in (0, 1) else "train"} for i, row in enumerate(rows)]
    with pytest.raises(ConfigError, match="`max_rows` leaves no training or no test rows"):
        read(marked, split_column="split", max_rows=4)
    with pytest.raises(DataError, match=r"of the 3 that `max_rows` leaves.*Raise it"):
        read(rows, max_rows=3)
    rare = [{"text": f"rare {i}", "label": "rare"} for i in range(6)]
    with pytest.raises(ConfigError, match=r"`train_sizes` of 10 rows hold no row of `rare`"):
        plan_of(lm, sae, [*rows, *rare], train_sizes=(10,))


def test_texts_without_tokens_are_refused(lm, sae, rows, monkeypatch):
    module = features
    original = module.tokenize

    def tokenize(tokenizer, texts, **settings):
        found = original(tokenizer, texts, **settings)
        return replace(found, position=np.where(found.document == 7, -1, found.position))

    monkeypatch.setattr(module, "tokenize", tokenize)
    with pytest.raises(DataError, match="at least one token"):
        run(lm, sae, rows, **{**COMMON, "arms": ("full",)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arms": ("spares",)}, "`arms` must name kinds of arms; got `spares`"),
        ({"arms": ()}, "at least one kind"),
        ({"pools": ("median",)}, "`pool` must be"),
        ({"pools": ()}, "`pools` must name"),
        ({"ks": (0,)}, "`ks` must be"),
        ({"shuffles": 1.5}, "`shuffles` must be"),
        ({"margin": -1.0}, "`margin` must be"),
        ({"budget": {"c": (1.0,)}}, "Budget: unknown argument `c`"),
        ({"folds": 1}, "`folds` must be a whole number from 2"),
        ({"folds": 3, "split_column": "split"}, "at most one of `folds` and `split_column`"),
        ({"folds": 3, "train_sizes": (20,)}, "need one locked test set"),
        ({"train_sizes": (500,)}, "`train_sizes` must be smaller than the training set"),
        ({"train_sizes": (3,)}, "`train_sizes` of 3 rows are too few"),
        ({"test_share": 1.0}, "`test_share` must be a number between 0 and 1"),
        ({"max_rows": 0}, "`max_rows` must be"),
        ({"split_column": "split", "test_split": "dev"}, "must mark some rows, not all, with `dev`"),
        ({"layer": 1, "hook": "layers.1"}, "at most one of `layer` and `hook`"),
    ],
)
def test_bad_settings(lm, sae, rows, settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(lm, sae, rows, **settings)


def test_an_sae_must_say_where_it_belongs(lm, sae, rows):
    with pytest.raises(ConfigError, match="does not say where in the model"):
        plan_of(lm, sae.replace(provenance={}), rows)
    assert plan_of(lm, sae.replace(provenance={}), rows, layer=1).origins["dense"].hook == "layers.1"


def test_the_public_name_is_the_function():
    assert classify is classify_function
