"""Models that are loaded only when they are needed: their files say what their rows depend on."""

from __future__ import annotations

import shutil

import pytest

from saekit.errors import ConfigError
from saekit.models.deferred import defer_model
from saekit.models.loading import load_language_model


def test_a_name_and_its_model_depend_on_the_same(folders):
    named = defer_model(folders["llama"])
    loaded = defer_model(load_language_model(folders["llama"]))
    assert named.digest == loaded.digest == loaded.load().digest
    assert named.about == loaded.about
    assert named.about["dtype"] == "float32"
    assert named.load().digest == named.digest


def test_another_tokenizer_is_another_origin(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["llama"], copy)
    before = defer_model(copy).about
    file = next(copy.glob("tokenizer.json"))
    file.write_text(file.read_text() + "\n")
    after = defer_model(copy).about
    assert before["model"] == after["model"]
    assert before["tokenizer"] != after["tokenizer"]


def test_what_is_no_model():
    with pytest.raises(ConfigError, match="`model` must be a LanguageModel, a folder or a name; got int"):
        defer_model(3)
