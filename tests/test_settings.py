"""Misspelt keywords are refused with where they belong; attribute docstrings are the help."""

from __future__ import annotations

import pytest
from sklearn.base import clone

import saekit as sk
from saekit.errors import ConfigError
from saekit.settings import attribute_docs


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: sk.classify([], label="x"), r"Pass split=Split\(label=…\), which is in `saekit.inputs.settings`"),
        (lambda: sk.classify([], lable="x"), r"unknown argument `lable`. Pass split=Split\(label=…\)"),
        (lambda: sk.compare([], treshold=0.8), r"Pass settings=ComparisonSettings\(threshold=…\)"),
        (lambda: sk.evaluate([], max_row=10), r"Pass settings=EvaluationSettings\(max_rows=…\)"),
        (lambda: sk.evaluate([], progres=None), "Did you mean `progress`"),
        (lambda: sk.TopK(n_latent=16, k=4), "Did you mean `n_latents`"),
        (lambda: sk.SAEFeatures("builtin", None, pol="sum"), "Did you mean `pool`"),
        (lambda: sk.HiddenStates("builtin", lyer=2), "Did you mean `layer`"),
        (lambda: sk.Binarize(treshold=1.0), "Did you mean `threshold`"),
        (lambda: sk.SelectLatents(5, scorin="auc"), "Did you mean `scoring`"),
        (lambda: sk.Split(lable="x"), "Did you mean `label`"),
    ],
)
def test_a_misspelt_keyword_is_refused_with_where_it_belongs(call, hint):
    with pytest.raises(ConfigError, match=hint) as caught:
        call()
    assert isinstance(caught.value, TypeError)


def test_estimators_keep_their_signature():
    assert clone(sk.Binarize(threshold=2.0)).get_params() == {"threshold": 2.0, "compare": ">", "relative": None}


def test_the_docstring_below_an_attribute_is_its_help():
    docs = attribute_docs(sk.Split)
    assert all(docs[name] for name in sk.Split.__dataclass_fields__)
