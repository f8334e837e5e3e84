"""Features of texts as scikit-learn transformers: pipelines, clones, stored files, and what they refuse."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import skops.io
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

import saekit as sk
from saekit.errors import ConfigError, DataError, ModelError, ShapeError
from saekit.estimators.features import TRUSTED
from saekit.models.language import LanguageModel
from saekit.rows import pooling
from saekit.rows.pooling import Ask, pool_texts
from saekit.rows.pooling_cache import encoder_digest
from saekit.sae import rules
from saekit.sae.model import SAE
from saekit.sae.scaling import Scaling

LAYER = 1
POOLS = ("sum", "mean", "max", "last", "first", "count", "top5")


class AnyWidth(sk.SAEFeatures):
    """SAEFeatures of rows whose SAE has the width of the rows: the checks bring rows of many widths."""

    def __init__(self, model: Any = None, sae: Any = None, *, pool: str = "sum") -> None:
        super().__init__(model, sae, pool=pool)

    def _sae(self) -> SAE:
        d = getattr(self, "n_features_in_", 3)
        W = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(0))
        return SAE(W, torch.zeros(2 * d), W, torch.zeros(d), rules.ReLURule())


EXPECTED = {
    "check_transformers_unfitted_stateless": "before fit, the SAE of this test does not know the width of the rows",
}


@parametrize_with_checks([AnyWidth()], expected_failed_checks=lambda _: EXPECTED)
def test_scikit_learn_checks(estimator: Any, check: Any) -> None:
    state = np.random.get_state()  # one check draws from it
    try:
        check(estimator)
    finally:
        np.random.set_state(state)


# ------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("name", POOLS)
def test_features_are_what_pooling_gives(name: str, lm: LanguageModel, sae: SAE, texts: list[str]) -> None:
    features = sk.SAEFeatures(lm, sae, layer=LAYER, pool=name)
    found = features.fit_transform(texts)
    assert isinstance(found, sp.csr_matrix)
    assert found.dtype == np.float32
    (expected,) = pool_texts(lm, texts, [Ask((name,), sae, LAYER)])
    assert (found != expected[name]).nnz == 0
    # the SAE knows its hook; what holds texts does not matter
    for same in (np.array(texts), np.array(texts, object)[:, None], pd.Series(texts), tuple(texts)):
        assert (sk.SAEFeatures(lm, sae, pool=name).transform(same) != found).nnz == 0


def test_hidden_states_are_the_dense_arm(lm: LanguageModel, texts: list[str]) -> None:
    states = sk.HiddenStates(lm, layer=LAYER)
    found = states.fit_transform(texts)
    (expected,) = pool_texts(lm, texts, [Ask(("mean",), layer=LAYER)])
    assert found.dtype == np.float32
    assert (found == expected["mean"]).all()
    names = states.get_feature_names_out()
    assert names[[0, 12, -1]].tolist() == ["hidden_000", "hidden_012", f"hidden_{lm.d_model - 1}"]
    assert len(names) == found.shape[1]
    frame = sk.HiddenStates(lm, hook=f"layers.{LAYER}").set_output(transform="pandas").fit_transform(texts)
    assert frame.columns.tolist() == names.tolist()


def test_the_snippet_of_the_readme(sae: SAE, texts: list[str], labels: list[str]) -> None:
    clf = make_pipeline(
        sk.SAEFeatures("builtin", sae, layer=LAYER, pool="sum"), sk.Binarize(threshold=1.0), LogisticRegression()
    )
    clf.fit(texts, labels)
    assert clf.score(texts, labels) > 0.9
    assert clf.predict(["Return the mean of two numbers."]).tolist() == ["returns"]


def test_names_of_latents_go_through_a_pipeline(lm: LanguageModel, sae: SAE, texts: list[str], labels: Any) -> None:
    pipeline = make_pipeline(sk.SAEFeatures(lm, sae), sk.Binarize(), sk.SelectLatents(5))
    found = pipeline.fit_transform(texts, labels)
    names = pipeline.get_feature_names_out()
    assert names.shape == (5,)
    chosen = [int(name.removeprefix("sae_")) for name in names]
    assert all(len(name) == len("sae_000") for name in names)
    everything = sk.Binarize().fit_transform(sk.SAEFeatures(lm, sae).transform(texts))
    assert (everything[:, chosen] != found).nnz == 0
    assert sorted(names) == list(names)


def test_long_texts_are_cut_only_when_asked(lm: LanguageModel, sae: SAE) -> None:
    texts = ["one two three four five six", "one"]
    with pytest.warns(UserWarning, match="max_tokens=2 cuts 1 of 2 texts"):
        sk.SAEFeatures(lm, sae, max_tokens=2).transform(texts)


# -------------------------------------------------------------------------------------------- clones and searches


def test_clones_share_the_sae_and_the_model(lm: LanguageModel, sae: SAE) -> None:
    features = sk.SAEFeatures(lm, sae, pool="max")
    for copied in (clone(features), clone(make_pipeline(features))[0], clone(clone(features), safe=False)):
        assert copied is not features
        assert copied.sae is sae
        assert copied.model is lm
        assert copied.get_params() == features.get_params()
    assert clone(sk.HiddenStates(lm, layer=1)).model is lm


def test_nothing_is_loaded_before_it_is_needed() -> None:
    features = sk.SAEFeatures("./no/model", "./no/sae", pool="no pooling")
    assert repr(clone(features)).startswith("SAEFeatures(")
    with pytest.raises(ConfigError, match="`pool` must be"):
        features.set_params(sae=SAE(*[torch.ones(1, 1), torch.ones(1)] * 2, rules.ReLURule())).fit(["a"])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Texts in every forward pass."""
    seen: list[int] = []
    original = pooling.activations

    def counted(model: Any, hooks: Any, inputs: Any) -> Any:
        seen.append(len(inputs["input_ids"]))
        return original(model, hooks, inputs)

    monkeypatch.setattr(pooling, "activations", counted)
    return seen


def test_a_grid_search_over_pooling_threshold_and_sae_runs_each_text_once_per_pooling(
    lm: LanguageModel, sae: SAE, texts: list[str], labels: list[str], tmp_path: Path, passes: list[int]
) -> None:
    pipeline = Pipeline(
        [
            ("features", sk.SAEFeatures(lm, sae, cache=tmp_path)),
            ("binarize", sk.Binarize()),
            ("select", sk.SelectLatents(10)),
            ("fit", LogisticRegression()),
        ]
    )
    grid = {
        "features__pool": ["sum", "max"],
        "features__sae": [sae],
        "binarize__threshold": [0.5, 1.0],
        "select__scoring": ["mean_difference", "auc"],
    }
    search = GridSearchCV(pipeline, grid, cv=3, error_score="raise").fit(texts, labels)
    assert search.best_score_ > 0.9
    assert search.best_estimator_["features"].sae is sae
    assert sum(passes) == 2 * len(texts)


# ------------------------------------------------------------------------------------------------------ stored files


def saes() -> Iterator[Any]:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(24, 7, generator=g)
    plain = SAE(W, torch.randn(24, generator=g), W, torch.zeros(7), rules.TopKRule(3))
    scaling = Scaling("standardize", scale=torch.full((7,), 0.5), mean=torch.ones(7))
    yield pytest.param(plain, id="topk")
    yield pytest.param(
        plain.replace(rule=rules.JumpReLURule(torch.rand(24, generator=g)), scaling=scaling), id="jumprelu"
    )
    yield pytest.param(
        plain.replace(rule=rules.TopKRule(3, torch.rand(24, generator=g)), b_pre=torch.ones(7)), id="ranked"
    )
    yield pytest.param(plain.replace(provenance={"hook": "layers.2", "seed": 3}).to(dtype=torch.bfloat16), id="bf16")


def restore(estimator: Any, how: str) -> Any:
    if how == "pickle":
        return pickle.loads(pickle.dumps(estimator))
    data = skops.io.dumps(estimator)
    assert set(skops.io.get_untrusted_types(data=data)) <= set(TRUSTED)
    return skops.io.loads(data, trusted=list(TRUSTED))


@pytest.mark.parametrize("how", ["pickle", "skops"])
@pytest.mark.parametrize("sae", list(saes()))
def test_an_sae_given_as_a_value_is_stored_with_its_estimator(sae: SAE, how: str) -> None:
    x = np.random.default_rng(0).normal(size=(9, 7)).astype(np.float32)
    features = sk.SAEFeatures(None, sae, pool="max").fit(x)
    again = restore(features, how)
    assert (again.transform(x) != features.transform(x)).nnz == 0
    assert again.n_features_in_ == 7
    assert again.sae.provenance == sae.provenance
    assert again.sae.dtype == sae.dtype
    assert encoder_digest(again.sae) == encoder_digest(sae)
    assert features.sae is sae


@pytest.mark.parametrize("how", ["pickle", "skops"])
def test_a_stored_pipeline_predicts_as_before(
    how: str, lm: LanguageModel, sae: SAE, texts: list[str], labels: list[str], tmp_path: Path
) -> None:
    sae.save(tmp_path / "sae")
    for model, given in ((lm, sae), ("builtin", tmp_path / "sae")):
        clf = make_pipeline(sk.SAEFeatures(model, given), sk.Binarize(), sk.SelectLatents(20), LogisticRegression())
        again = restore(clf.fit(texts, labels), how)
        assert again.predict_proba(texts) == pytest.approx(clf.predict_proba(texts), abs=1e-6)
        features = again[0]
        assert isinstance(features.model, str)
        assert isinstance(features.sae, str if given is not sae else SAE)
        if given is not sae:
            assert features.sae == str(tmp_path / "sae")


def test_after_loading_another_model_is_refused(lm: LanguageModel, sae: SAE, texts: list[str], stories: Path) -> None:
    again = restore(sk.SAEFeatures(lm, sae).fit(texts), "pickle")
    with pytest.raises(ModelError, match="the model must be the one of fit"):
        again.set_params(model=str(stories)).transform(texts)
    assert again.set_params(model=lm).transform(texts).shape == (40, 300)


# ------------------------------------------------------------------------------------------------------ rows of arrays


def test_rows_are_documents_of_their_own(sae: SAE) -> None:
    x = np.random.default_rng(0).normal(size=(5000, sae.d_in)).astype(np.float32)
    codes = sae.encode(torch.from_numpy(x)).to_scipy()
    features = sk.SAEFeatures(None, sae)
    for name in ("sum", "mean", "max", "last"):
        assert abs(features.set_params(pool=name).fit_transform(x) - codes).max() < 1e-5
    count = features.set_params(pool="count").transform(x)
    assert count.nnz == codes.nnz
    assert set(count.data) == {1.0}


def test_rows_of_another_width_are_refused(sae: SAE) -> None:
    with pytest.raises(ShapeError, match=f"rows must have width d_in={sae.d_in} of the SAE; got 3"):
        sk.SAEFeatures(None, sae).fit(np.ones((2, 3)))
    with pytest.raises(ShapeError, match="got 3"):
        sk.SAEFeatures(None, sae).transform(np.ones((2, 3)))


# ----------------------------------------------------------------------------------------------------------- images


def test_images_go_through_the_same_estimators(tmp_path: Path) -> None:
    import transformers
    from PIL import Image

    from saekit.models.loading import load_vision_model
    from saekit.models.quiet import quiet_transformers

    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8,
            patch_size=4, num_channels=3,
        )  # fmt: skip
        transformers.ViTModel(config).save_pretrained(tmp_path)
        transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    vision = load_vision_model(tmp_path)
    W = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    sae = SAE(W, torch.zeros(32), W, torch.zeros(16), rules.TopKRule(4))
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    for model in (vision, str(tmp_path)):
        features = sk.SAEFeatures(model, sae, layer=0, pool="count").fit(images)
        found = features.transform(images)
        assert found.shape == (6, 32)
        assert found.sum() == 6 * 4 * 4  # images, patches, latents per patch
        assert sk.HiddenStates(model, layer=0).fit_transform(images).shape == (6, 16)
    assert clone(sk.SAEFeatures(vision, sae)).model is vision
    assert sk.HiddenStates(vision, layer=0).get_feature_names_out()[-1] == "hidden_15"
    with pytest.raises(ConfigError, match="`cache` and `max_tokens` are for texts"):
        sk.SAEFeatures(vision, sae, layer=0, cache=tmp_path / "cache").transform(images)


# ------------------------------------------------------------------------------------------------------- bad input


def test_pandas_output_is_refused_before_the_model_runs(
    lm: LanguageModel, sae: SAE, texts: list[str], passes: list[int]
) -> None:
    features = sk.SAEFeatures(lm, sae).set_output(transform="pandas")
    with pytest.raises(ConfigError, match="Pandas output does not support sparse data"):
        features.fit_transform(texts)
    assert not passes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pool": "total"}, "`pool` must be a pooling of codes.*got 'total'"),
        ({"layer": 1, "hook": "layers.1"}, "at most one of `layer` and `hook`"),
        ({"sae": 3}, "`sae` must be an SAE or the path of one; got int"),
        ({"model": 3}, "`model` must be a LanguageModel, a folder or a name; got int"),
    ],
)
def test_settings_are_refused_by_fit(settings: dict[str, Any], message: str, lm: LanguageModel, sae: SAE) -> None:
    with pytest.raises(ConfigError, match=message):
        sk.SAEFeatures(lm, sae).set_params(**settings).fit(["a text"])


def test_the_dense_arm_refuses_what_it_cannot_do(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="pooling of hidden states"):
        sk.HiddenStates(lm, layer=1, pool="count").fit(["a"])
    with pytest.raises(ConfigError, match="must say where the rows come from"):
        sk.HiddenStates(lm).fit(["a"])
    with pytest.raises(ConfigError, match="`model` must be a model; got None"):
        sk.HiddenStates(None, layer=1).fit(np.ones((2, 2)))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "got one string"),
        (["a", float("nan")], "1 of 2 are not: rows `1` .row 1 is None, NoneType"),
        (np.array([["a", "b"]]), r"got ndarray of shape \(1, 2\)\. Give one column"),
        ([], "at least one text"),
    ],
)
def test_what_is_no_text_is_refused_by_fit(texts: Any, message: str, lm: LanguageModel, sae: SAE) -> None:
    with pytest.raises(DataError, match=message):
        sk.SAEFeatures(lm, sae).fit(texts)


def test_texts_without_tokens(lm: LanguageModel, sae: SAE) -> None:
    with pytest.raises(DataError, match="1 have none: rows `1`"):
        sk.SAEFeatures(lm, sae).transform(["a text", ""])
    assert sk.SAEFeatures(lm, sae, empty="zero").transform(["a text", ""])[1].nnz == 0


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="there is no such folder"):
        sk.SAEFeatures(
            "./no/model",
            SAE(torch.ones(1, 1), torch.ones(1), torch.ones(1, 1), torch.ones(1), rules.ReLURule()),
            layer=0,
        ).fit(["a"])
