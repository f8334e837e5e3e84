"""Transfer: what is the same loses nothing, what is renamed moves with its name, and nothing leaks across the split."""

from __future__ import annotations

import json
import math
import re
import warnings

with warnings.catch_warnings():
    import sympy  # noqa: F401

import numpy as np
import pytest
import torch

from fixtures.flat_settings import asked
from fixtures.worded_classes import SEARCH
from saekit import SAE, load_model
from saekit.classification import stored_fits
from saekit.classification.settings import Budget, Matching
from saekit.classification.transfer import held_out, transfer
from saekit.classification.transfer_features import transfer_features
from saekit.classification.transfer_result import Transfer, near_chance
from saekit.errors import ConfigError, DataError, FormatError, ShapeError
from saekit.files import write_sealed
from saekit.inputs.settings import Split
from saekit.measure.results import Measured
from saekit.measure.verdicts import verdict
from saekit.places import NOTE, Warned
from saekit.sae.rules import TopKRule

D = 192
QUICK = Budget(C=(1.0,))
COMMON = {"layer": 1, "budget": QUICK}

GOOD = "returns computes array value shape index number mean sum axis".split()  # noqa: SIM905
BAD = "raises error warning invalid deprecated exception fails missing broken wrong".split()  # noqa: SIM905
OTHER = "the of a for in to with and or by".split()  # noqa: SIM905


def run(data, *, model, sae=(), across=None, out=None, **flat) -> Transfer:
    return transfer(sae, model=model, data=data, across=across, out=out, **asked(**flat))


def between(data, *, model, saes, to_model=None, by="decoder", threshold=None, out=None, **flat) -> Transfer:
    models = model if to_model is None else [model, *[to_model] * (len(saes) - 1)]
    matching = Matching(by=by, threshold=threshold)
    return transfer_features(saes, model=models, data=data, matching=matching, out=out, **asked(**flat))


def out_of(data, *, across=None, **flat) -> np.ndarray:
    return held_out(data, across=across, split=Split(**flat))


def rows_of(n: int, lang: str, seed: int, *, informative: bool = True) -> list[dict]:
    """Short texts of words that tell their class, or of words that do not."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        label = i % 2
        words = list(generator.choice((GOOD, BAD)[label] if informative else OTHER, 4)) + list(
            generator.choice(OTHER, 4)
        )
        text = " ".join(generator.permutation(words))
        rows.append(
            {
                "text": f"{text} {generator.integers(10**6)}",
                "label": ("good", "bad")[label],
                "lang": lang,
                "item": i // 2,
            }
        )
    return rows


@pytest.fixture(scope="module")
def lm():
    return load_model("builtin")


@pytest.fixture(scope="module")
def sae() -> SAE:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(96, D, generator=g)
    W = W / W.norm(dim=1, keepdim=True)
    return SAE(
        W_enc=W, b_enc=torch.zeros(96), W_dec=W, b_dec=torch.zeros(D), rule=TopKRule(8),
        provenance={"model": "builtin", "hook": "layers.1", "seed": 0},
    )  # fmt: skip


@pytest.fixture(scope="module")
def data() -> list[dict]:
    """Three languages: two in which the class can be told, one in which it cannot."""
    return [*rows_of(120, "en", 0), *rows_of(120, "fr", 1), *rows_of(120, "xx", 2, informative=False)]


@pytest.fixture(scope="module")
def result(lm, sae, data) -> Transfer:
    return run(data, model=lm, sae=sae, across="lang", **COMMON)


# ---------------------------------------------------------------------------------------------------------- laws


def test_the_same_data_twice_loses_nothing(lm, sae):
    rows = rows_of(120, "en", 0)
    twice = [*rows, *({**row, "lang": "copy"} for row in rows)]
    found = run(twice, model=lm, sae=sae, across="lang", **COMMON)
    for cell in found.cells:
        assert (cell.drop.value, cell.drop_auc.value) == (0, 0)
        if cell.train == cell.test:
            assert (cell.drop.low, cell.verdict) == (0, "native")
        else:  # thirty rows on which all agree do not tell that less than 0.01 would be lost on others
            assert cell.drop.low == -cell.drop.high < -0.01
            assert cell.verdict == "undecided"
    assert {arm.name: arm.drop.value for arm in found.arms} == dict.fromkeys(
        ("majority", "TF-IDF", "dense sum", "dense last", "SAE sum binarized", "SAE sum"), 0
    )
    assert any("texts occur before" in each.message for each in found.warnings)


def test_lists_of_texts_labels_and_values_are_the_table(lm, sae, data, result):
    columns = {name: [row[name] for row in data] for name in ("text", "label", "lang")}
    for given in ((columns["text"], columns["label"]), {"text": columns["text"], "label": columns["label"]}):
        found = run(given, model=lm, sae=sae, across=columns["lang"], **COMMON)
        assert [cell.macro_f1 for cell in found.cells] == [cell.macro_f1 for cell in result.cells]
        assert (out_of(given, across=columns["lang"]) == out_of(data, across="lang")).all()
    with pytest.raises(DataError, match="a value per row; got 3 for 360 rows"):
        run((columns["text"], columns["label"]), model=lm, sae=sae, across=["en", "fr", "xx"], **COMMON)
    with pytest.raises(ConfigError, match="for data in memory only"):
        run("some.csv", model=lm, sae=sae, across=columns["lang"], **COMMON)


def as_in_schema_3(result: Transfer) -> dict:
    plain = result.to_json()
    return {
        **plain, "schema": 3, "notes": ["texts are few"], "classes": list(plain["classes"]),
        "values": [{**v, "classes": {name: n for name, (_, n) in v["classes"].items()}} for v in plain["values"]],
        "cells": [{**cell, "chosen": cell["chosen"][0]} for cell in plain["cells"]],
    }  # fmt: skip


@pytest.mark.parametrize("schema", [2, 3])
def test_files_of_earlier_schemas_still_load(result, tmp_path, schema):
    # up to schema 3 classes had no training rows, and cells the settings of one fold; up to 2 warnings were texts
    told = [{"code": "other_hook", "message": "of another hook"}] if schema == 3 else ["of another hook"]
    write_sealed(tmp_path / "transfer.json", {**as_in_schema_3(result), "schema": schema, "warnings": told})
    again = Transfer.load(tmp_path / "transfer.json")
    assert [(each.code, each.message) for each in again.warnings] == [
        ("note", "texts are few"),  # up to schema 4 in a list of its own
        ("other_hook" if schema == 3 else "note", "of another hook"),
    ]
    assert (again.arms, again.cells) == (result.arms, result.cells)
    assert again.classes == {name: [None, n] for name, (_, n) in result.classes.items()}
    assert [sum(n for n, _ in value.classes.values()) for value in result.values] == [v.n_train for v in result.values]


def test_renaming_the_values_moves_the_matrix(lm, sae, data, result):
    names = {"en": "zz", "fr": "aa", "xx": "mm"}
    renamed = run([{**row, "lang": names[row["lang"]]} for row in data], model=lm, sae=sae, across="lang", **COMMON)
    assert [value.name for value in renamed.values] == ["aa", "mm", "zz"]
    turned = run(data, model=lm, sae=sae, across="lang", values=["xx", "en", "fr"], **COMMON)
    for cell in result.cells:
        for other in (
            renamed.cell(cell.arm, names[cell.train], names[cell.test]), turned.cell(cell.arm, cell.train, cell.test),
        ):  # fmt: skip
            assert (other.macro_f1, other.auc, other.drop) == (cell.macro_f1, cell.auc, cell.drop)


def test_other_values_do_not_change_a_cell(lm, sae, data, result):
    two = run(data, model=lm, sae=sae, across="lang", values=["en", "xx"], **COMMON)
    for arm in ("sae", "dense", "words"):
        for train, test in (("en", "xx"), ("xx", "en"), ("en", "en")):
            assert two.cell(arm, train, test).macro_f1 == result.cell(arm, train, test).macro_f1


def test_an_sae_in_another_order_reads_the_same(lm, sae):
    rows = rows_of(160, "en", 3)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    found = between(rows, model=lm, saes=[sae, sae.permute(order)], **COMMON)
    a, b = (value.name for value in found.values)
    for arm in ("sae", "binarized", "dense"):
        direct = found.cell(arm, a, a)
        moved = found.cell(arm, a, b)
        assert (moved.macro_f1, moved.auc) == (direct.macro_f1, direct.auc)
        assert moved.drop.value == pytest.approx(0, abs=1e-9)
    assert found.values[0].about["matched"][b]["mean_cosine"] == pytest.approx(1)
    assert found.values[0].about["matched"][b]["pairs"] == 96
    direct, at_random = found.cell("sae", a, a), found.cell("random", a, b)
    assert direct.auc.value > 0.9
    assert at_random.auc.value < direct.auc.value - 0.1
    assert found.arm("random").family == "control"


def test_matching_by_documents_finds_the_order_too(lm, sae):
    rows = rows_of(160, "en", 3)
    found = between(rows, model=lm, saes=[sae, sae.permute(torch.arange(96).flip(0))], by="documents", **COMMON)
    a, b = (value.name for value in found.values)
    assert found.cell("sae", a, b).auc.value == pytest.approx(found.cell("sae", a, a).auc.value, abs=0.02)


def test_signed_latents_that_point_the_other_way_are_turned_round(lm, sae):
    signed = sae.replace(rule=TopKRule(8, sign="magnitude"))
    signs = torch.tensor([1.0, -1.0, -1.0] * 32)[:, None]
    turned = signed.replace(W_enc=signs * sae.W_enc, W_dec=signs * sae.W_dec).permute(torch.arange(96).flip(0))
    call = {"model": lm, "saes": [signed, turned], "arms": ["sae", "majority"], **COMMON}
    for by in ("decoder", "documents"):
        found = between(rows_of(120, "en", 3), by=by, **call)
        a, b = (value.name for value in found.values)
        assert found.cell("sae", a, b).auc == found.cell("sae", a, a).auc, by
        assert found.values[0].about["matched"][b]["mean_cosine"] == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"`pools` must be one of `sum`.* where codes have signs; got `max`"):
        between(rows_of(120, "en", 3), pools=("max",), **call)


def test_fits_between_saes_are_kept_for_their_matching(lm, sae, tmp_path):
    rows = rows_of(120, "en", 3)
    other = sae.replace(W_enc=-sae.W_enc, W_dec=-sae.W_dec)
    call = {"model": lm, "arms": ["sae", "majority"], **COMMON}
    between(rows, saes=[sae, other], out=tmp_path, **call)
    for change in ({"threshold": 0.99}, {"by": "documents"}, {"saes": [sae, sae.permute(torch.arange(96).flip(0))]}):
        given = {"saes": [sae, other], **call, **change}
        kept, fresh = between(rows, out=tmp_path, **given), between(rows, **given)
        assert [cell.auc for cell in kept.cells] == [cell.auc for cell in fresh.cells]


def test_latents_without_a_partner_are_zero(lm, sae):
    rows = rows_of(160, "en", 3)
    other = sae.replace(W_enc=-sae.W_enc, W_dec=-sae.W_dec)
    found = between(rows, model=lm, saes=[sae, other], threshold=0.99, arms=["sae", "majority"], **COMMON)
    a, b = (value.name for value in found.values)
    assert found.values[0].about["matched"][b] == {"pairs": 0, "unmatched": 96, "mean_cosine": None}
    assert found.cell("sae", a, b).auc.value == 0.5
    narrow = between(rows, model=lm, saes=[sae, sae.take(40)], arms=["sae"], **COMMON)
    assert narrow.values[0].about["matched"]["topk-40-k8-seed0"]["unmatched"] == 56
    assert narrow.values[1].about["matched"]["topk-96-k8-seed0"]["unmatched"] == 0


# ------------------------------------------------------------------------------------------------------ what it says


def test_what_can_be_told_and_what_cannot(result):
    assert result.cell("words", "en", "fr").chance == "above chance"
    assert result.cell("dense", "en", "fr").auc.low > 0.7
    for train, test in (("en", "xx"), ("xx", "en"), ("fr", "xx")):
        assert result.cell("words", train, test).auc.value < 0.85
    at_chance = result.cell("words", "xx", "en")
    assert at_chance.chance == "at chance"
    assert "at chance: AUC" in at_chance.sentence
    assert at_chance.verdict == "lost"
    assert "macro-F1 lost against training on en itself" in at_chance.sentence
    majority = result.arm("majority")
    assert (majority.auc.value, majority.n_at, majority.n_above) == (0.5, 6, 0)
    assert len(result.sentences("sae")) == 6
    assert len(result.sentences()) == 6 * len(result.arms)
    assert "pairs of different langs" in result.arm("sae").sentence


def test_every_cell_has_its_intervals_and_the_same_test_rows(result):
    for cell in result.cells:
        for measured in (cell.macro_f1, cell.auc, cell.drop):
            assert measured.low <= measured.value <= measured.high
        assert (cell.minus_dense is None) == (cell.arm == result.best_dense)
    assert [value.n_train + value.n_test for value in result.values] == [120] * 3
    assert all(25 <= value.n_test <= 35 for value in result.values)
    arm = result.arm("sae")
    diagonal = [result.cell("sae", name, name).macro_f1.value for name in ("en", "fr", "xx")]
    assert arm.macro_f1.value == pytest.approx(np.mean(diagonal))
    drops = [cell.drop.value for cell in result.cells if cell.arm == arm.name and cell.train != cell.test]
    assert arm.drop.value == pytest.approx(np.mean(drops))


def test_one_value_is_plain_classification(lm, sae):
    found = run(rows_of(120, "en", 0), model=lm, sae=sae, **{**COMMON, **SEARCH}, ks=(2, 8), control_ks=(4,))
    assert [value.name for value in found.values] == ["all"]
    assert len(found.cells) == len(found.arms) > 20
    assert found.arm("sae").transferred is None
    assert found.arm("words").auc.value > 0.9
    assert found.table()[0] == ["", "macro-F1", "AUC", "F1 − dense", "verdict"]
    assert found._repr_html_().count("<table>") == 1


def test_several_saes_and_hooks(lm, sae, data):
    other = sae.replace(provenance={"hook": "layers.2"})
    found = run(
        data, model=lm, sae=[sae, other], across="lang", values=["en", "fr"], budget=QUICK,
        arms=["sae", "dense"],
    )  # fmt: skip
    assert [arm.name for arm in found.arms] == [
        "dense layers.1 sum", "dense layers.2 sum", "topk-96-k8-seed0 sum", "topk-96-k8 sum",
    ]  # fmt: skip
    assert found.arm("topk-96-k8 sum").pool == "sum"


def test_cross_fitting_judges_every_row(lm, sae, data):
    found = run(data, model=lm, sae=sae, across="lang", values=["en", "fr"], folds=3, arms=["dense"], **COMMON)
    assert [value.n_test for value in found.values] == [120, 120]
    assert found.cell("dense", "en", "fr").auc.low > 0.7


def test_groups_are_never_on_both_sides(lm, data):
    """Labels that say nothing but the group: only a leak could tell them."""
    generator = np.random.default_rng(0)
    rows = []
    for lang in ("a", "b"):
        for item in range(80):
            word = f"{generator.choice(OTHER)} w{item}x"
            rows += [{"text": f"{word} {k} {lang}", "label": item % 2, "lang": lang, "item": item} for k in range(4)]
    kept = run(rows, model=lm, across="lang", group="item", arms=["words"], budget=QUICK)
    leaky = run(rows, model=lm, across="lang", arms=["words"], budget=QUICK)
    assert leaky.cell("words", "a", "a").auc.value > 0.9
    assert leaky.cell("words", "a", "b").auc.value > 0.9
    for train in "ab":
        for test in "ab":
            assert kept.cell("words", train, test).chance == "at chance"
    assert kept.values[0].n_groups == kept.values[0].n_test // 4
    assert kept.values[0].effective == kept.values[0].n_groups
    unequal = [row for i, row in enumerate(rows) if row["item"] < 8 or i % 4 == 0]  # groups of four rows, and of one
    told = run(unequal, model=lm, across="lang", group="item", arms=["majority"], budget=QUICK)
    for value in told.values:
        large = (value.n_test - value.n_groups) // 3
        assert 0 < large < value.n_groups
        squares = 16 * large + value.n_groups - large
        assert value.effective == pytest.approx(value.n_test**2 / squares, abs=0.01)
    assert re.search(r"at least \d+ test groups \(which tell as much as [\d.]+ equal ones\)", told.caption())


def test_held_out_are_the_rows_that_judge_and_their_likes(lm, data):
    settings = {"arms": ["majority"], "budget": QUICK, "intervals": False}
    for split in ({"group": "item", "max_rows": 60}, {"group": "item"}, {"max_rows": 60}, {}):
        out = out_of(data, across="lang", **split)
        judges = sum(value.n_test for value in run(data, model=lm, across="lang", **settings, **split).values)
        assert out.shape == (len(data),)
        assert judges <= out.sum() <= 0.35 * len(data)
        if "max_rows" not in split:
            assert judges == out.sum()
        if "group" in split:
            sides = {row["item"]: set() for row in data}
            for row, each in zip(data, out):
                sides[row["item"]].add(bool(each))
            assert max(map(len, sides.values())) == 1
    # the same text in another group, which may be on the other side
    twice = [*data, *({**row, "item": 10_000 + row["item"]} for row in data)]
    out = out_of(twice, across="lang", group="item").reshape(2, -1)
    assert (out[0] == out[1]).all()
    assert 0.4 < out.mean() < 0.5  # 1 - 0.75²
    assert out_of(data, across="lang", folds=3).all()


def test_rare_classes_are_compared_by_auc(lm, data):
    rare = [row for i, row in enumerate(data) if row["label"] == "good" or i % 3 == 0]
    settings = {"across": "lang", "values": ["en", "fr"], "arms": ["dense", "words", "majority"], "layer": 1}
    found = run(rare, model=lm, budget=QUICK, **settings)
    assert found.verdict_metric == "auc"
    assert any("arms are chosen and compared by AUC" in each.message for each in found.warnings)
    assert found.table()[0][-2] == "AUC − dense"
    assert "margin 0.01 AUC" in found.caption()
    assert "AUC)" in found.arm("words").sentence
    by_f1 = run(rare, model=lm, budget=QUICK, metric="macro_f1", **settings)
    assert by_f1.verdict_metric == "macro_f1"
    assert by_f1.warnings == [each for each in found.warnings if "AUC" not in each.message]
    for one, other in zip(found.arms, by_f1.arms):
        assert (one.difference, one.auc_difference) == (other.difference, other.auc_difference)
        assert one.verdict in (verdict(one.auc_difference, 0.01), "undecided")  # corrected for the number of arms
        assert other.verdict in (verdict(other.difference, 0.01), "undecided")
    even = run(data, model=lm, budget=QUICK, **settings)
    assert even.verdict_metric == "macro_f1"
    with pytest.raises(ConfigError, match="`across` must be another column than the label"):
        run(data, model=lm, across="label", arms=["majority"])
    with pytest.raises(ConfigError, match="`metric` must be one of"):
        run(data, model=lm, metric="accuracy", **settings)


def test_rows_are_drawn_by_group(lm, data):
    found = run(data, model=lm, across="lang", max_rows=60, group="item", arms=["words"], budget=QUICK)
    assert [value.n_train + value.n_test for value in found.values] == [60] * 3


# ---------------------------------------------------------------------------------------------------------- files


def test_round_trip(result, tmp_path):
    result.save(tmp_path / "transfer.json")
    assert Transfer.load(tmp_path / "transfer.json") == result
    plain = json.loads((tmp_path / "transfer.json").read_text())
    json.dumps(plain, allow_nan=False)
    with pytest.raises(FormatError, match="seal does not fit"):
        Transfer.from_json(plain | {"across": "x"})
    del plain["seal"]
    with pytest.raises(FormatError, match="must hold 54 cells in order; it holds 53"):
        Transfer.from_json(plain | {"cells": plain["cells"][1:]})
    with pytest.raises(FormatError, match="unknown key `wais`"):
        Transfer.from_json(plain | {"wais": 1})
    assert "transferred F1" in repr(result)
    assert result._repr_html_().count("<table>") == 2
    assert result.matrix_table("words", "auc")[0] == ["train ↓ test →", "en", "fr", "xx"]
    assert result.matrix("words")[0][0] == result.cell("words", "en", "en").macro_f1.value
    assert result.matrix(result.best_dense, "minus_dense") == [[None] * 3] * 3
    for call, message in (
        (lambda: result.arm("tfdif"), "there is no arm `tfdif` in this transfer"),
        (lambda: result.cell("sae", "en", "de"), "`de` must be a value of `lang`"),
        (lambda: result.matrix("sae", "f1"), "a matrix must be of a known number; got `f1`"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


def test_a_file_of_the_first_schema_is_read(result):
    plain = as_in_schema_3(result)
    old = {"macro_f1": "native", "auc": "native_auc", "difference": "minus_dense", "auc_difference": "minus_dense_auc",
           "verdict": "against_dense"}  # fmt: skip
    ways = [{old.get(key, key): value for key, value in arm.items()} for arm in plain.pop("arms")]
    del plain["best_dense"]
    dense = next(way for way in ways if way["kind"] == "dense")
    dense |= {"minus_dense": None, "minus_dense_auc": None, "against_dense": None}
    read = Transfer.from_json({**plain, "schema": 1, "ways": ways})
    assert read.best_dense == result.best_dense == dense["name"]
    assert read.cells == result.cells
    for one, other in zip(read.arms, result.arms):
        assert (one.macro_f1, one.transferred, one.sentence) == (other.macro_f1, other.transferred, other.sentence)
        if one.name != dense["name"]:
            assert one == other


def test_the_notes_of_schema_4_are_warnings(result):
    plain = {**result.to_json(), "schema": 4, "notes": ["texts are few"], "warnings": []}
    assert Transfer.from_json(plain).warnings == [Warned(NOTE, "texts are few")]


@pytest.mark.parametrize("key", ["values", "cells", "notes", "classes"])
@pytest.mark.parametrize("value", [None, 3, [3], "x"])
def test_damaged_old_files_are_refused(result, key, value):
    plain = as_in_schema_3(result) | {key: value}
    with pytest.raises(FormatError):
        Transfer.from_json(plain)
    del plain[key]
    with pytest.raises(FormatError):
        Transfer.from_json(plain)


def test_what_was_fitted_is_not_fitted_again(lm, sae, data, tmp_path, monkeypatch):
    fitted = []
    real = stored_fits.fit_arm
    monkeypatch.setattr(stored_fits, "fit_arm", lambda arm, *a, **k: fitted.append(arm.name) or real(arm, *a, **k))
    call = {"model": lm, "sae": sae, "across": "lang", "arms": ["sae", "words"], "out": tmp_path, **COMMON}
    one = run(data, **call)
    assert sorted(fitted) == ["SAE sum"] * 3 + ["TF-IDF"] * 3
    victim = sorted((tmp_path / "fits").iterdir())[0]
    victim.write_bytes(b"damaged")
    assert run(data, **call) == one
    assert len(fitted) == 7
    run(data, **call | {"seed": 1})
    assert len(fitted) == 13
    other = [{**row, "label": "good" if row["label"] == "bad" else "bad"} for row in data]
    run(other, **call)
    assert len(fitted) == 19


def test_the_same_twice(lm, sae, data, result):
    assert run(data, model=lm, sae=sae, across="lang", **COMMON) == result


# ---------------------------------------------------------------------------------------------------------- refusals


def test_bad_data_is_refused(lm, sae):
    good = [*rows_of(60, "en", 0), *rows_of(60, "fr", 1)]
    call = {"model": lm, "sae": sae, "across": "lang", **COMMON}

    def one_class():
        return [{**row, "label": "good"} if row["lang"] == "fr" else row for row in good]

    for rows, message in (
        (one_class(), "`fr` of column `lang` must have at least two classes; all its 60 rows are `good`"),
        ([*good, *({**row, "label": "odd"} for row in rows_of(20, "fr", 5))], "it lacks `odd`"),
        (
            [*good, *rows_of(4, "de", 6)],
            "`de` of column `lang`: class `bad` must have at least 2 test and 3 training rows",
        ),
        ([{**row, "label": "good"} for row in good], "labels must be of at least two classes; all 120 rows are `good`"),
        (
            [{**row, "label": None if i == 7 else row["label"]} for i, row in enumerate(good)],
            "every row must have a label",
        ),
        ([{**row, "label": math.nan} for row in good], "120 of 120 have none"),
        ([{**row, "lang": "en"} for row in good], "column `lang` must have at least two values to transfer between"),
        ([{**row, "lang": ""} for row in good], "every row must have a value in column `lang`"),
        ([{k: v for k, v in row.items() if k != "lang"} for row in good], "must have a column `lang`"),
    ):
        with pytest.raises(DataError, match=message):
            run(rows, **call)
    with pytest.raises(DataError, match=r"column `lang` must hold the value `de`; Known|Did you mean"):
        run(good, **call, values=["en", "de"])
    with pytest.raises(ConfigError, match="`values` must differ"):
        run(good, **call, values=["en", "en"])


def test_bad_settings_are_refused(lm, sae, data):
    call = {"model": lm, "sae": sae, "across": "lang", **COMMON}
    for change, message in (
        ({"test_share": 1.0}, "`test_share` must be a number between 0 and 1; got 1.0"),
        ({"folds": 1}, "`folds` must be a whole number from 2; got 1"),
        ({"max_rows": 0}, "`max_rows` must be a whole number from 1; got 0"),
        ({"margin": -0.1}, "`margin` must be a difference"),
        ({"arms": ["binarised"]}, "`arms` must name kinds of arms; got `binarised`. Did you mean `binarized`"),
        ({"arms": ["pixels"]}, "the arm `pixels` needs images; there is none"),
        ({"arms": []}, "at least one kind of arm"),
        ({"sae": [], "arms": ["sae"]}, "the arm `full` needs an SAE; there is none"),
        ({"hook": "layers.1"}, "at most one of `layer` and `hook` may be given"),
        ({"pools": ("median",)}, "`pool` must be a pooling of codes"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(data, **call | change)
    with pytest.raises(ShapeError, match="must be for rows of the model's width, 192; it is for 16"):
        run(data, **call | {"sae": SAE(torch.eye(16), torch.zeros(16), torch.eye(16), torch.zeros(16), TopKRule(2))})


def test_bad_pairs_of_saes_are_refused(lm, sae, data):
    call = {"model": lm, **COMMON}
    narrow = SAE(torch.eye(16), torch.zeros(16), torch.eye(16), torch.zeros(16), TopKRule(2))
    with pytest.raises(ConfigError, match="at least two SAEs must be given; got one"):
        between(data, saes=[sae], **call)
    with pytest.raises(ConfigError, match=r"`by` must be one of .*; got 'encoder'"):
        between(data, saes=[sae, sae], by="encoder", **call)
    with pytest.raises(ConfigError, match=r"`threshold` is a cosine and must be -1 to 1; got 2"):
        between(data, saes=[sae, sae], threshold=2, **call)
    with pytest.raises(ShapeError, match="must write rows of one width"):
        between(data, saes=[sae, narrow], **call)


def test_two_models_of_other_widths(lm, sae, stories):
    other = load_model(stories)
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    small = SAE(W, torch.zeros(64), W, torch.zeros(64), TopKRule(6), provenance={"hook": "layers.1"})
    found = between(rows_of(160, "en", 3), model=lm, to_model=other, saes=[sae, small], by="documents", budget=QUICK)
    assert [value.about["model"] for value in found.values] == ["builtin", "stories260K"]
    assert Warned(NOTE, "no dense arm: the hidden states of the models differ in width") in found.warnings
    assert found.settings["to_model"]["model"] == "stories260K"


def test_words_for_intervals():
    assert near_chance(Measured(0.4, 0.3, 0.45)) == "below chance"
    assert near_chance(Measured(0.5, None, None)) == "unknown"
