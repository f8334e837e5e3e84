"""Pooled features on disk: a text is run once, whatever the selection, and damage is computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from fixtures.pooling_checks import CLOSE, asks, assert_equal, random_sae
from saekit.errors import DataError
from saekit.models import deferred
from saekit.models.language import LanguageModel
from saekit.rows import pooling, pooling_cache
from saekit.rows.pooling import Ask, pool_texts
from saekit.rows.pooling_cache import encoder_digest
from saekit.rows.settings import PoolingSettings
from saekit.rows.tokens import tokenize
from saekit.sae import rules
from saekit.sae.scaling import Scaling


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading or running a model is an error."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was needed")

    with monkeypatch.context() as patch:
        patch.setattr(deferred, "load_language_model", refuse)
        patch.setattr(pooling, "activations", refuse)
        deferred._loaded.cache_clear()
        yield


def test_what_is_in_the_cache_needs_no_model(
    folders: Any, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = folders["bert"]
    found = pool_texts(folder, texts, asks(), cache=tmp_path)
    plain = pool_texts(folder, texts, asks())
    assert_equal(found, plain)
    request.getfixturevalue("no_model")
    assert_equal(pool_texts(folder, texts, asks(), cache=tmp_path), plain)
    # any selection in any order, as the folds of a cross-validation make them; part of the poolings
    chosen = [5, 2, 2, 9]
    some = pool_texts(str(folder), [texts[i] for i in chosen], [Ask(("max",), random_sae(), layer=1)], cache=tmp_path)
    assert_equal(some, [{"max": plain[0]["max"][chosen]}])
    with pytest.raises(AssertionError, match="the model was needed"):
        pool_texts(folder, [*texts, "a dog"], asks(), cache=tmp_path)


def test_a_model_by_value_and_by_its_folder_share_a_cache(
    folders: Any, models: Any, texts: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain = pool_texts(models["llama"], texts, asks(), cache=tmp_path)
    request.getfixturevalue("no_model")
    assert_equal(pool_texts(folders["llama"], texts, asks(), cache=tmp_path), plain)


def test_only_texts_that_are_missing_are_run(models: Any, texts: list[str], tmp_path: Path) -> None:
    lm, n_tokens = models["llama"], []
    ask = [Ask(("sum",), random_sae(), layer=1)]

    def progress(stage: str, done: int, total: int | None = None, note: str = "") -> None:
        n_tokens.append(total)

    pool_texts(lm, texts[:6], ask, cache=tmp_path)
    found = pool_texts(lm, texts, ask, cache=tmp_path, progress=progress)
    missing = tokenize(lm.tokenizer, texts[6:], context=lm.context)
    assert set(n_tokens) == {len(missing.ids)}
    assert_equal(found, pool_texts(lm, texts, ask), **CLOSE)
    # a second pooling is missing for all texts, the first for some: what is kept already is not written again
    both = [Ask(("sum", "max"), random_sae(), layer=1)]
    more = [*texts, "the dog saw"]
    pool_texts(lm, more, both, cache=tmp_path, progress=progress)
    assert n_tokens[-1] == len(tokenize(lm.tokenizer, more, context=lm.context).ids)
    rows = [len(load_file(path)["digest"]) for path in tmp_path.rglob("*.safetensors")]
    assert sorted(rows) == [1, 6, 6, 13]
    assert_equal(pool_texts(lm, texts, ask, cache=tmp_path), found)


def variants() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """What differs from the first call: fields of the ask, settings of the call."""
    sae = random_sae()
    return {
        "encoder": ({"sae": sae.replace(W_enc=sae.W_enc * 1.01)}, {}),
        "bias": ({"sae": sae.replace(b_enc=sae.b_enc + 1)}, {}),
        "rule": ({"sae": sae.replace(rule=rules.TopKRule(5))}, {}),
        "threshold": ({"sae": sae.replace(rule=rules.JumpReLURule(torch.ones(48)))}, {}),
        "scaling": ({"sae": sae.replace(scaling=Scaling("scalar", scale=torch.tensor(0.5)))}, {}),
        "prefix": ({"sae": sae.take(40)}, {}),
        "hook": ({"layer": 0}, {}),
        "pool": ({"pools": ("max",)}, {}),
        "states": ({"sae": None}, {}),
        "special": ({}, {"settings": PoolingSettings(skip_special=False)}),
        "cut": ({}, {"max_tokens": 100}),
        "model": ({}, {"lm": "bert"}),
    }


@pytest.mark.parametrize("name", variants())
def test_the_key_holds_all_that_decides_a_row(
    name: str, models: Any, texts: list[str], tmp_path: Path, passes: Any
) -> None:
    ask, call = variants()[name]
    first = Ask(("sum",), random_sae(), layer=1)
    pool_texts(models["llama"], texts, [first], cache=tmp_path)
    n_passes = len(passes)
    lm = models[call.pop("lm", "llama")]
    found = pool_texts(lm, texts, [dataclasses.replace(first, **ask)], cache=tmp_path, **call)
    assert len(passes) > n_passes
    assert_equal(found, pool_texts(lm, texts, [dataclasses.replace(first, **ask)], **call))


def test_what_does_not_decide_a_row_is_not_in_the_key(
    models: Any, texts: list[str], tmp_path: Path, passes: Any
) -> None:
    sae = random_sae()
    pool_texts(models["llama"], texts, [Ask(("sum",), sae, layer=1)], cache=tmp_path)
    n_passes = len(passes)
    other = sae.replace(W_dec=sae.W_dec * 2, b_dec=sae.b_dec + 1)
    assert encoder_digest(other) == encoder_digest(sae)
    pool_texts(
        models["llama"],
        texts,
        [Ask(("sum",), other, hook="layers.1")],
        cache=tmp_path,
        settings=PoolingSettings(batch_tokens=100),
    )
    assert len(passes) == n_passes


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "other key"])
def test_a_damaged_file_is_computed_again(
    damage: str, models: Any, texts: list[str], tmp_path: Path, passes: Any
) -> None:
    ask = [Ask(("sum",), random_sae(), layer=1)]
    found = pool_texts(models["llama"], texts, ask, cache=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    elif damage == "other key":
        pool_texts(models["llama"], texts, [Ask(("sum",), random_sae(), layer=0)], cache=tmp_path)
        (other,) = set(tmp_path.rglob("*.safetensors")) - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes(data[: len(data) // 2 if damage == "truncate" else 0])
    n_passes = len(passes)
    assert_equal(pool_texts(models["llama"], texts, ask, cache=tmp_path), found)
    assert len(passes) > n_passes
    assert path.read_bytes() == data


def test_the_cache_remembers_what_is_empty_and_what_was_cut(models: Any, tmp_path: Path) -> None:
    texts, ask = ["the cat sat on", ""], [Ask(("sum",), random_sae(), layer=1)]
    for _ in range(2):
        with pytest.warns(UserWarning, match="max_tokens=3 cuts 1 of 2 texts and loses 1 of 4 tokens \\(25.0%\\)"):
            pool_texts(
                models["llama"], texts, ask, cache=tmp_path, max_tokens=3, settings=PoolingSettings(empty="zero")
            )
    with pytest.raises(DataError, match="1 have none: rows `1`"):
        pool_texts(models["llama"], texts, ask, cache=tmp_path, max_tokens=3)


def test_nothing_half_written_stays_in_the_cache(
    models: Any, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pooling_cache, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        pool_texts(models["llama"], texts, asks(), cache=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_digest_of_a_half_precision_encoder() -> None:
    sae = random_sae()
    assert encoder_digest(sae.to(dtype=torch.bfloat16)) != encoder_digest(sae)
    assert encoder_digest(sae) == encoder_digest(random_sae())


def test_the_model_of_a_name_is_loaded_once(folders: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    original = deferred.load_language_model

    def counted(name: str) -> LanguageModel:
        loads.append(name)
        return original(name)

    monkeypatch.setattr(deferred, "load_language_model", counted)
    deferred._loaded.cache_clear()
    for _ in range(2):
        pool_texts(folders["llama"], texts, asks())
    assert len(loads) == 1
