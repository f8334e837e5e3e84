"""SAEs of other libraries are tried on their first rows, by whatever puts them onto rows; saekit's own are not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import saekit as sk
from fixtures.known_saes import oracle as oracle
from fixtures.known_saes import rows as rows
from fixtures.known_saes import synthetic as synthetic
from saekit.classification.settings import Budget, ClassifierSettings
from saekit.errors import PlaceWarning
from saekit.evaluation.settings import EvaluationSettings
from saekit.rows import first_use
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule
from saekit.store.exports import export

WHERE = {"model": "gpt2", "layer": 2, "hook": "layers.2"}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Nothing was tried before."""
    monkeypatch.setattr(first_use, "_known", {})


def foreign(sae: SAE, folder) -> SAE:
    """Return an SAE as it is read from a file of SAELens."""
    export(sae, folder, "saelens")
    return SAE.load(folder)


@pytest.fixture
def wrong(oracle, tmp_path) -> SAE:
    """One that was read the wrong way: what it writes has the wrong sign."""
    return foreign(oracle.replace(W_dec=-oracle.W_dec, b_pre=None, provenance=WHERE), tmp_path / "wrong")


@pytest.fixture
def right(oracle, tmp_path) -> SAE:
    return foreign(oracle.replace(provenance=WHERE), tmp_path / "right")


def codes(found):
    return [each.code for each in found if each.code in ("fvu_above_mean", "l0_off")]


VERBS = {
    "evaluate": lambda sae, rows: sk.evaluate(sae, rows, settings=EvaluationSettings(controls=False)).warnings,
    "compare": lambda sae, rows: sk.compare([sae, sae.take(30)], rows).warnings,
    "measure_sizes": lambda sae, rows: sk.measure_sizes(sae, rows, [16, 48]).warnings,
    "rank": lambda sae, rows: told(lambda: sk.rank(sae, rows, by="energy")),
    "prune": lambda sae, rows: told(lambda: sk.prune(sae, rows, sizes=[16])),
    "SAEFeatures": lambda sae, rows: told(lambda: sk.SAEFeatures(None, sae, layer=2).fit_transform(rows)),
}


def told(action):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", PlaceWarning)
        action()
    return [each.message for each in found if isinstance(each.message, PlaceWarning)]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_warns_of_an_sae_that_explains_nothing(verb, wrong, rows):
    found = VERBS[verb](wrong, rows.numpy())
    assert "fvu_above_mean" in codes(found)
    text = next(str(each) for each in found if each.code == "fvu_above_mean")
    assert "no better than the mean row" in text
    assert "saekit verify" in text
    assert "read as saelens" in text


@pytest.mark.parametrize("verb", VERBS)
def test_an_sae_that_is_read_the_right_way_is_not_doubted(verb, right, rows):
    assert codes(VERBS[verb](right, rows.numpy())) == []


def test_saes_of_saekit_are_not_tried(wrong, rows):
    own = wrong.replace(provenance=WHERE)
    assert codes(sk.evaluate(own, rows.numpy()).warnings) == []


def test_l0_that_is_not_as_stated(right, rows):
    claims = {"claimed": {"l0": 2 * first_use.L0_FACTOR * 1.1}}
    result = sk.evaluate(right.replace(provenance={**right.provenance, **claims}), rows.numpy())
    assert codes(result.warnings) == ["l0_off"]
    assert "the file states 6.6" in next(each.message for each in result.warnings if each.code == "l0_off")


def test_classification_and_features_of_texts(tmp_path):
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, 192, generator=g)
    where = {"model": "builtin", "layer": 2, "hook": "layers.2"}
    sae = SAE(W_enc=W, b_enc=W[:, 0], W_dec=W, b_dec=W[0], rule=TopKRule(8), provenance=where)
    wrong = foreign(sae, tmp_path / "wrong")
    texts = [
        f"{word} is number {i} of all the words that are written here" for i in range(24) for word in ("this", "that")
    ]
    data = {"text": texts, "label": ["a", "b"] * 24}
    settings = ClassifierSettings(arms=("full",), budget=Budget(C=(1.0,), widen=0))
    result = sk.classify(wrong, model="builtin", data=data, split=sk.Split(label="label"), settings=settings)
    assert "fvu_above_mean" in codes(result.warnings)
    assert "saekit verify" in str(result.warnings)
    first_use._known.clear()
    found = told(lambda: sk.SAEFeatures("builtin", wrong, layer=2).fit_transform(texts))
    assert "fvu_above_mean" in codes(found)


def test_it_is_measured_once_and_on_few_rows(wrong, rows, monkeypatch):
    seen = []
    encode = SAE.encode
    monkeypatch.setattr(SAE, "encode", lambda self, x, **rest: seen.append(len(x)) or encode(self, x, **rest))
    source = sk.ArrayRows(np.tile(rows.numpy(), (3, 1)))
    first_use.warnings_on_first_use([("a", wrong)], lambda: first_use.first_rows(source), {"digest": "x"})
    found = first_use.warnings_on_first_use([("a", wrong)], lambda: first_use.first_rows(source), {"digest": "x"})
    assert seen == [first_use.ROWS]
    assert codes(found) == ["fvu_above_mean"]


def test_of_a_stream_few_contexts_are_run(monkeypatch):
    stream = sk.stream("builtin", "builtin", layer=2, tokens=40_000)
    few = first_use.first_rows(stream)
    assert len(few) <= first_use.ROWS
    torch.testing.assert_close(few, next(stream.batches(first_use.ROWS)).x[: len(few)])  # other batches: rounding
    again = sk.stream("builtin", "builtin", layer=2, tokens=40_000)
    ran = []
    runner = type(again.shared.runner)
    run = runner.rows
    monkeypatch.setattr(runner, "rows", lambda self, contexts: ran.append(len(contexts.ids)) or run(self, contexts))
    first_use.first_rows(again)
    assert sum(ran) < 3 * first_use.ROWS


def test_the_command_to_type_is_whole(wrong):
    seen = {
        "model": "gpt2",
        "data": "my texts.txt",
        "data_path": "/data/my texts.txt",
        "hook": "layers.3",
        "digest": "y",
    }
    (found,) = first_use.warnings_on_first_use([("a", wrong)], lambda: torch.eye(24).repeat(13, 1), seen)
    line = found.message.partition("To find out: ")[2]
    assert (
        line == f"saekit verify {wrong.provenance['address']} --model gpt2 --data '/data/my texts.txt' --hook layers.3"
    )
