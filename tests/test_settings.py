"""Misspelt keywords are refused with where they belong; attribute docstrings are the help."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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


# ------------------------------------------------------------------ how values look


def test_settings_show_what_is_not_the_default():
    from saekit.evaluation.settings import EvaluationSettings
    from saekit.training.config import Matryoshka, TopK
    from saekit.training.settings import TrainSettings

    assert repr(TrainSettings(batch_rows=256)) == "TrainSettings(batch_rows=256)"
    assert repr(EvaluationSettings()) == "EvaluationSettings()"
    assert repr(TopK(16, k=4)) == "TopK(n_latents=16, k=4)"
    assert repr(Matryoshka(1024, k=4, sizes=tuple(range(1, 1025)))).endswith("sizes=tuple of 1024)")


def test_every_settings_class_is_short():
    import importlib

    rooms = sorted(path.parent.name for path in Path(sk.__file__).parent.glob("*/settings.py"))
    kinds = [kind for room in rooms for kind in vars(importlib.import_module(f"saekit.{room}.settings")).values()]
    mine = [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    assert len(mine) > 20
    for kind in mine:
        if all(field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
               for field in dataclasses.fields(kind)):  # fmt: skip
            assert repr(kind()) == f"{kind.__name__}()"


def test_rows_metrics_and_parts_of_results_are_short():
    import saekit as sk
    from saekit.training.settings import TrainSettings

    rows = sk.SyntheticRows(d_in=8, n_features=16, n_rows=1024)
    saes = sk.train(sk.TopK(16, k=4), rows, seeds=[0, 1], settings=TrainSettings(batch_rows=256))
    found, pairs = sk.evaluate(saes[0], rows), sk.compare(saes)
    batch = next(rows.batches(10))
    assert repr(batch).startswith("Batch(x=tensor[10, 8], ")
    assert repr(sk.ArrayRows(batch.x)) == "ArrayRows(10 rows of width 8)"
    assert repr(found.metrics).startswith("Metrics(fvu=0.")
    shown = [batch, rows, sk.ArrayRows(batch.x), found.metrics, found.entries[0], found.controls["pca"],
             pairs.pairs[0], pairs.saes[0], sk.measure_sizes(saes[0], rows).points[0]]  # fmt: skip
    assert {type(each).__name__: repr(each) for each in shown if len(repr(each)) > 400} == {}
