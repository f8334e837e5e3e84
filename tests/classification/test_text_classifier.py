"""Classifiers that were saved: they predict as before, explain themselves, and are refused when altered."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import f1_score

from fixtures.kills import contents
from saekit import SAE, load_classifier
from saekit.classification.decisions import LinearRule
from saekit.classification.pipeline_file import MOVED, SCHEMA_FILE, TRUSTED
from saekit.classification.stored_fits import run_jobs
from saekit.classification.text_classifier import fit_classifier, save_classifier
from saekit.errors import BusyError, ConfigError, FormatError
from saekit.files import digest_file, locked_folder, write_sealed
from saekit.settings import silent


@pytest.mark.parametrize("arm", ["SAE sum", "SAE sum k=8", "SAE sum binarized"])
def test_saved_classifier_predicts_and_explains(full_run, tmp_path, arm):
    plan, result = full_run
    fitted = fit_classifier(plan, result, arm)
    folder = save_classifier(fitted, tmp_path / "classifier")
    loaded = load_classifier(tmp_path, model=plan.reader.model)
    texts = ["the array returns a shape", "raises an error of invalid"]
    assert loaded.predict(texts).tolist() == fitted.predict(texts).tolist()
    assert loaded.predict(texts[1:]).tolist() == ["bad"]
    assert loaded.predict_proba(texts) == pytest.approx(fitted.predict_proba(texts), abs=1e-6)
    explanation = loaded.explain(texts[1], top=5)
    p = explanation.probabilities[explanation.predicted]
    assert explanation.predicted == "bad"
    # the parts add up to the logit, and the logit is that of the probability
    total = explanation.intercept + sum(each.contribution for each in explanation.reasons) + explanation.rest
    assert total == pytest.approx(explanation.logit, abs=1e-6)
    assert 1 / (1 + math.exp(-explanation.logit)) == pytest.approx(p, abs=1e-6)
    for reason in explanation.reasons:
        assert reason.contribution == pytest.approx(reason.value * reason.coefficient, abs=1e-6)
        assert reason.tokens
        if "binarized" not in arm:
            assert sum(firing.activation for firing in reason.tokens) == pytest.approx(reason.value, rel=1e-3)
    assert "intercept" in repr(explanation)
    json.dumps(explanation.to_json())
    top = loaded.top_latents(3)
    assert set(top) == {"good", "bad"}
    assert any(label for rows in top.values() for _, _, label in rows)
    assert (folder / "classifier.skops").is_file()
    card = json.loads((folder / "classifier.json").read_text())
    assert card["arm"] == arm
    assert card["verdict"] == result.arm(arm).verdict


def test_what_is_shown_is_stated_and_a_sparse_arm_carries_more_of_it(full_run, tmp_path):
    plan, result = full_run
    folder = save_classifier(fit_classifier(plan, result, "SAE sum"), tmp_path / "c")
    loaded = load_classifier(folder, model=plan.reader.model)
    X, rule = loaded.features(["raises an error of invalid"]), loaded.weights()
    found = loaded.explain("raises an error of invalid", top=3)
    chosen = loaded.classes.index(found.predicted)
    added = (rule[0][chosen] - rule[0][1 - chosen]) * X.toarray()[0]
    largest = sorted(added, key=abs)[-3:]
    assert found.shown == pytest.approx(sum(largest))
    assert found.logit_fraction == pytest.approx(sum(largest) / added.sum())
    assert found.shown_fraction == pytest.approx(sum(map(abs, largest)) / abs(added).sum())
    assert f"carry {found.shown:+.2f} of the {added.sum():+.2f}" in repr(found)

    about, few = loaded.card["sparse"], found.sparse
    assert few.n_latents == about["k"] < loaded.sae.n_latents
    assert few.shown_fraction > found.shown_fraction
    assert f"by the sparse arm, of {about['k']} latents: {few.predicted}" in repr(found)
    p = loaded.sparse.predict_proba(X)[0]
    assert list(few.probabilities.values()) == pytest.approx(p.tolist())
    assert few.intercept + few.shown + few.rest == pytest.approx(few.logit)
    assert max(p) == pytest.approx(1 / (1 + math.exp(-few.logit)))
    # the price: both arms on the test rows of the fold that they were fitted in
    test = plan.parts[0][0][1]
    y = plan.data.y[test]
    texts = [plan.data.texts[row] for row in test]
    for pipeline, name in ((loaded.pipeline, "full_macro_f1"), (loaded.sparse, "macro_f1")):
        said = pipeline.predict_proba(loaded.features(texts)).argmax(1)
        assert about[name]["value"] == pytest.approx(f1_score(y, said, average="macro"), abs=1e-6)
    assert about["difference"]["value"] == pytest.approx(
        about["macro_f1"]["value"] - about["full_macro_f1"]["value"], abs=1e-6
    )
    shown = [loaded.explain(text, top=about["shown"]) for text in texts[:8]]
    every = loaded.features(texts[:8])
    assert np.mean([each.shown_fraction for each in shown]) == pytest.approx(
        LinearRule.of(loaded.pipeline, loaded.sae.n_latents).shown_fractions(every).mean()
    )
    assert about["shown_fraction"] >= about["full_shown_fraction"]


def test_the_sparse_arm_is_chosen_within_the_training_rows(full_run):
    """Labels of test rows do not change it, and it is the smallest within the margin of the best."""
    plan, result = full_run
    about = fit_classifier(plan, result, "SAE sum").card["sparse"]
    y = plan.data.y.copy()
    y[plan.parts[0][0][1]] = 1 - y[plan.parts[0][0][1]]
    other = replace(plan, reader=replace(plan.reader, data=replace(plan.data, y=y)))
    again = fit_classifier(other, result, "SAE sum").card["sparse"]
    assert [again[key] for key in ("arm", "settings", "inner")] == [about[key] for key in ("arm", "settings", "inner")]
    assert again["macro_f1"] != about["macro_f1"]
    inner = list(about["inner"].values())
    kept = list(about["inner"]).index(about["arm"])
    assert inner[kept] >= max(inner) - about["margin"]
    assert all(each < max(inner) - about["margin"] for each in inner[:kept])


def test_arms_of_few_latents_need_no_sparse_arm(full_run, tmp_path):
    plan, result = full_run
    fitted = fit_classifier(plan, result, "SAE sum k=8")
    assert fitted.sparse is None
    assert fitted.explain("raises an error").sparse is None
    folder = save_classifier(fit_classifier(plan, result, "SAE sum"), tmp_path / "c")
    save_classifier(fitted, folder)  # over one that has it
    assert load_classifier(folder, model=plan.reader.model).sparse is None


def test_a_classifier_without_a_sparse_arm_is_read(full_run, tmp_path):
    """As earlier builds wrote them; and a sparse arm that was altered is refused."""
    plan, result = full_run
    folder = save_classifier(fit_classifier(plan, result, "SAE sum"), tmp_path / "c")
    path = folder / "classifier.json"
    card = json.loads(path.read_text())
    (folder / "sparse.skops").write_bytes((folder / "classifier.skops").read_bytes())
    with pytest.raises(FormatError, match="was altered"):
        load_classifier(folder)
    (folder / "sparse.skops").unlink()
    write_sealed(path, {**{key: each for key, each in card.items() if key != "sparse"}, "schema": 2})
    loaded = load_classifier(folder, model=plan.reader.model)
    assert loaded.sparse is None
    assert loaded.explain("raises an error").reasons
    write_sealed(path, {**card, "sparse": {"k": 3}})
    with pytest.raises(FormatError, match=r"must hold `sparse\.pipeline`"):
        load_classifier(folder)


def test_the_same_classifier_makes_the_same_bytes(full_run, tmp_path):
    plan, result = full_run
    for name in ("one", "two"):
        save_classifier(fit_classifier(plan, result, "SAE sum binarized"), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with zipfile.ZipFile(tmp_path / "one" / "classifier.skops") as stored:
        assert {each.date_time for each in stored.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert all(len(each.filename) < 12 for each in stored.infolist())


def test_one_call_at_a_time_fits_into_a_folder(full_run, tmp_path):
    plan, _ = full_run
    with locked_folder(tmp_path), pytest.raises(BusyError, match="in use by another run"):
        run_jobs(replace(plan, out=tmp_path), lambda *_: pytest.fail("it began"), silent)


def test_only_linear_probes_of_saes_can_be_saved(full_run):
    plan, result = full_run
    for arm in ("SAE sum tree", "dense sum", "random sum"):
        with pytest.raises(ConfigError, match="only a linear probe of an SAE's latents"):
            fit_classifier(plan, result, arm)
    dense = replace(result, arms=[arm for arm in result.arms if arm.family == "dense"], best_sae=None)
    with pytest.raises(ConfigError, match="there is none"):
        fit_classifier(plan, dense)


def test_altered_classifiers_are_refused(full_run, tmp_path, sae):
    plan, result = full_run
    folder = save_classifier(fit_classifier(plan, result, "SAE sum k=2"), tmp_path / "c")
    card = json.loads((folder / "classifier.json").read_text())
    with pytest.raises(FormatError, match="must hold a classifier"):
        load_classifier(tmp_path)
    write_sealed(folder / "classifier.json", {**card, "schema": 99})
    with pytest.raises(FormatError, match="has schema 99"):
        load_classifier(folder)
    write_sealed(folder / "classifier.json", {**card, "kind": "x"})
    with pytest.raises(FormatError, match="must describe a classifier"):
        load_classifier(folder)
    write_sealed(folder / "classifier.json", {**card, "pipeline": "sha256:0"})
    with pytest.raises(FormatError, match="was altered"):
        load_classifier(folder)
    from skops.io import dumps

    (folder / "classifier.skops").write_bytes(dumps(_Strange()))
    write_sealed(folder / "classifier.json", {**card, "pipeline": digest_file(folder / "classifier.skops")})
    with pytest.raises(FormatError, match="types of scikit-learn and saekit only"):
        load_classifier(folder)
    assert all(name.startswith("saekit.") for name in TRUSTED)


def test_class_names_and_the_sae_are_bound_to_the_classifier(full_run, tmp_path):
    plan, result = full_run
    folder = save_classifier(fit_classifier(plan, result, "SAE sum k=2"), tmp_path / "c")
    path = folder / "classifier.json"
    card = json.loads(path.read_text())
    for change in ({"classes": card["classes"][::-1]}, {"pool": "max"}, {"labels": {}}, {"hook": "layers.0"}):
        path.write_text(json.dumps({**card, **change}))
        with pytest.raises(FormatError, match="its seal does not fit"):
            load_classifier(folder)
    path.write_text(json.dumps(card))
    other = SAE.load(folder / "sae")
    other.replace(b_enc=other.b_enc + 1).save(folder / "sae")
    with pytest.raises(FormatError, match="must be the SAE of the classifier"):
        load_classifier(folder)


class _Strange:
    """A type that no classifier of ours holds."""


def test_another_model_is_refused(full_run, tmp_path, stories):
    plan, result = full_run
    save_classifier(fit_classifier(plan, result, "SAE sum k=2"), tmp_path)
    with pytest.raises(ConfigError, match="must read the model it was fitted with"):
        load_classifier(tmp_path, model=stories).predict(["a text"])


@pytest.mark.parametrize("arm", ["SAE sum binarized", "SAE sum k=8"])
def test_a_classifier_of_the_first_release_is_read(full_run, tmp_path, arm):
    """Its types had other modules."""
    plan, result = full_run
    fitted = fit_classifier(plan, result, arm)
    folder = save_classifier(fitted, tmp_path / "c")
    path = folder / "classifier.skops"
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as stored:
        files = {name: stored.read(name) for name in stored.namelist()}
    schema = files[SCHEMA_FILE].decode()
    for (old, kind), now in MOVED.items():
        here = rf'("__class__": "{kind}",\s+"__module__": )"{re.escape(now)}"'
        schema = re.sub(here, rf'\1"{old}"', schema)
    assert schema != files[SCHEMA_FILE].decode()
    with zipfile.ZipFile(path, "w") as changed:
        for name, content in files.items():
            changed.writestr(name, schema if name == SCHEMA_FILE else content)
    card = json.loads((folder / "classifier.json").read_text())
    del card["seal"], card["sae"], card["sparse"]
    (folder / "sparse.skops").unlink(missing_ok=True)
    (folder / "classifier.json").write_text(json.dumps({**card, "schema": 1, "pipeline": digest_file(path)}))
    texts = ["the array returns a shape", "raises an error of invalid"]
    loaded = load_classifier(folder, model=plan.reader.model)
    assert (loaded.predict_proba(texts) == fitted.predict_proba(texts)).all()
