"""Laws of pooling: documents from rows, whatever batches, passes and caches they come through."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.pooling_checks import CLOSE, LAYER, SPARSE, asks, assert_equal, dense, random_sae, reference
from saekit.errors import ConfigError, DataError, ModelError, ShapeError
from saekit.models.hooks import find_hook
from saekit.rows import pooling
from saekit.rows.capture import capture
from saekit.rows.pooling import DENSE_POOLS, Ask, pool_texts
from saekit.rows.settings import CaptureSettings, PoolingSettings
from saekit.rows.tokens import tokenize
from saekit.sae import rules
from saekit.sae.codes import Codes
from saekit.sae.model import SAE

# --------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_texts_are_pooled_over_the_rows_that_capture_gives(kind: str, models: Any, texts: list[str]) -> None:
    """Texts longer than the context (24 here) are read in windows, none of it is lost."""
    rows = capture(models[kind], texts, layer=LAYER, settings=CaptureSettings(outliers=None))
    found, states = pool_texts(models[kind], texts, asks())
    z = random_sae().encode(rows.x).to_dense().numpy()
    assert len(np.unique(rows.document.numpy())) == len(texts)
    for i in range(len(texts)):
        here = rows.document.numpy() == i
        for name in SPARSE:
            np.testing.assert_allclose(dense(found[name][i])[0], reference(z[here], name), **CLOSE, err_msg=name)
        for name in DENSE_POOLS:
            np.testing.assert_allclose(states[name][i], reference(rows.x.numpy()[here], name), **CLOSE, err_msg=name)


def test_permuted_texts_give_permuted_rows_bit_for_bit(
    models: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # many of nearly one length: which of them share a batch, and its padding, must not depend on the order
    words = " ".join(texts).split()
    texts = [*texts, texts[3], texts[0], *(" ".join(words[i : i + 4 + i % 3]) for i in range(60))]
    order = np.random.default_rng(0).permutation(len(texts))
    batches: list[Any] = []
    original = pooling.activations

    def seen(model: Any, hooks: Any, inputs: Any) -> Any:
        batches.append(inputs["input_ids"].tolist())
        return original(model, hooks, inputs)

    monkeypatch.setattr(pooling, "activations", seen)
    found = pool_texts(models["bert"], texts, asks(), settings=PoolingSettings(batch_tokens=64))
    again = pool_texts(models["bert"], [texts[i] for i in order], asks(), settings=PoolingSettings(batch_tokens=64))
    assert_equal(again, [{name: x[order] for name, x in one.items()} for one in found])
    assert batches[: len(batches) // 2] == batches[len(batches) // 2 :]
    once = tokenize(models["bert"].tokenizer, sorted(set(texts)), context=models["bert"].context)
    assert sum(len(batch) for batch in batches) == 2 * len(once)


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_a_text_alone_is_the_text_among_others(kind: str, models: Any, texts: list[str]) -> None:
    together = pool_texts(models[kind], texts, asks())
    for i in (0, 1, 5):
        alone = pool_texts(models[kind], [texts[i]], asks())
        assert_equal(alone, [{name: x[[i]] for name, x in one.items()} for one in together], **CLOSE)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_the_size_of_a_batch_does_not_matter(batch_tokens: int, models: Any, texts: list[str]) -> None:
    found = pool_texts(models["llama"], texts, asks(), settings=PoolingSettings(batch_tokens=batch_tokens))
    assert_equal(found, pool_texts(models["llama"], texts, asks()), **CLOSE)


def test_one_pass_serves_all_asks_as_separate_passes_would(models: Any, texts: list[str], passes: Any) -> None:
    lm = models["llama"]
    wanted = [
        Ask(("sum", "max"), random_sae(0), layer=0),
        Ask(("mean",), random_sae(1), layer=1),
        Ask(("top3",), random_sae(0), hook="layers.0.mlp"),
        Ask(("last",), layer=1),
        Ask(("count",), random_sae(0), layer=0),
    ]
    find_hook(lm.model, "layers.0.mlp")  # what must be known of a model is asked once, by passes that run through it
    pool_texts(lm, texts[:1], wanted[:1])
    passes.clear()
    reached = []
    handle = lm.model.get_submodule("model.layers.2").register_forward_hook(lambda *_: reached.append(1))
    try:
        together = pool_texts(lm, texts, wanted)
        once = len(passes)
        assert all(hooks == ["layers.0", "layers.1", "layers.0.mlp"] for hooks in passes)
        separate = [pool_texts(lm, texts, [ask])[0] for ask in wanted]
    finally:
        handle.remove()
    assert not reached, "the model went on after the last hook"
    assert len(passes) == once * (1 + len(wanted))
    assert_equal(together, separate)


def test_an_sae_asked_for_twice_encodes_once(models: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = SAE.encode

    def counted(self: SAE, x: torch.Tensor, **settings: Any) -> Codes:
        calls.append(len(x))
        return original(self, x, **settings)

    monkeypatch.setattr(SAE, "encode", counted)
    sae = random_sae()
    pool_texts(
        models["llama"],
        texts,
        [Ask(SPARSE, sae, layer=1), Ask(("sum",), sae, layer=1)],
        settings=PoolingSettings(batch_tokens=10**6),
    )
    assert len(calls) == 1


def test_padding_never_counts_and_added_tokens_only_when_asked(models: Any, texts: list[str]) -> None:
    lm = models["bert"]
    always = SAE(torch.zeros(1, 16), torch.ones(1), torch.zeros(1, 16), torch.zeros(16), rules.ReLURule())
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    for skip in (True, False):
        kept = (contexts.position >= 0) | (not skip)
        expected = np.bincount(contexts.document[kept], minlength=len(texts))
        (found,) = pool_texts(
            lm, texts, [Ask(("count", "sum", "mean"), always, layer=1)], settings=PoolingSettings(skip_special=skip)
        )
        assert dense(found["count"])[:, 0].tolist() == expected.tolist()
        assert dense(found["sum"])[:, 0].tolist() == expected.tolist()
        np.testing.assert_allclose(dense(found["mean"]), 1)


def test_max_tokens_reads_the_beginning_and_says_what_it_cuts(models: Any, texts: list[str]) -> None:
    lm = models["bert"]
    for most in (3, 22, 30):  # within a window, at its end (24 less CLS and SEP), in the second
        cut = [" ".join(text.split()[:most]) for text in texts]
        n_cut = sum(len(text.split()) > most for text in texts)
        lost = sum(max(len(text.split()) - most, 0) for text in texts)
        with pytest.warns(UserWarning, match=f"max_tokens={most} cuts {n_cut} of 12 texts and loses {lost} of 296 tok"):
            found = pool_texts(lm, texts, asks(), max_tokens=most)
        assert_equal(found, pool_texts(lm, cut, asks()), **CLOSE)
    assert_equal(pool_texts(lm, texts, asks(), max_tokens=1000), pool_texts(lm, texts, asks()))


def test_texts_without_tokens(models: Any) -> None:
    texts = ["the cat", "", "   ", "on a mat"]
    with pytest.raises(
        DataError, match=r"texts must have at least one token; 2 have none: rows `1`, `2`.* empty='zero'"
    ):
        pool_texts(models["llama"], texts, asks())
    found, states = pool_texts(models["llama"], texts, asks(), settings=PoolingSettings(empty="zero"))
    assert found["sum"][1:3].nnz == 0
    assert found["sum"][[0, 3]].nnz > 0
    assert not states["mean"][1:3].any()
    (nothing,) = pool_texts(
        models["llama"], [""], [Ask(("sum",), random_sae(), layer=1)], settings=PoolingSettings(empty="zero")
    )
    assert nothing["sum"].shape == (1, 48)
    with pytest.raises(DataError, match="2 have none"):  # tokens that are added make no text
        pool_texts(models["llama"], texts, asks(), settings=PoolingSettings(skip_special=False))


def test_the_place_is_what_the_sae_knows_unless_it_is_given(models: Any, texts: list[str]) -> None:
    lm = models["llama"]
    there = [Ask(("sum",), random_sae(), layer=1)]
    for facts in ({"hook": "layers.1", "layer": 1}, {"layer": 1}, {"hook": "layers.1", "model_digest": lm.digest}):
        sae = random_sae(provenance=facts)
        assert_equal(pool_texts(lm, texts, [Ask(("sum",), sae)]), pool_texts(lm, texts, there))
    with pytest.warns(UserWarning, match="trained on rows of `layers.1`; the model given makes rows of `layers.0`"):
        pool_texts(lm, texts, [Ask(("sum",), sae, layer=0)])
    with pytest.warns(UserWarning, match="trained on rows of `gemma` \\(sha256:0"):
        pool_texts(lm, texts, [Ask(("sum",), random_sae(provenance={"model": "gemma", "model_digest": "sha256:0"}), 1)])


# ------------------------------------------------------------------------------------------------------ bad input


def test_an_sae_of_another_width_is_refused_before_the_model_runs(models: Any, texts: list[str], passes: Any) -> None:
    with pytest.raises(ShapeError, match=r"rows of width 16 at `layers.1`; its d_in is 12"):
        pool_texts(models["llama"], texts, [Ask(("sum",), random_sae(d=12), layer=1)])
    assert not passes


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "got one string. Put it in a list"),
        ([], "at least one text; got none"),
        (["a", None, 3.0], "2 of 3 are not: rows `1`, `2` .row 1 is None, NoneType"),
    ],
)
def test_what_is_no_text(texts: Any, message: str, models: Any) -> None:
    with pytest.raises(DataError, match=message):
        pool_texts(models["llama"], texts, asks())


@pytest.mark.parametrize(
    ("name", "value"), [("max_tokens", 0), ("max_tokens", 2.5), ("batch_tokens", -1), ("batch_tokens", True)]
)
def test_bad_settings(name: str, value: Any, models: Any) -> None:
    kind: Any = PoolingSettings if name == "batch_tokens" else partial(pool_texts, models["llama"], ["the cat"], asks())
    with pytest.raises(ConfigError, match=f"`{name}` must be a whole number from 1"):
        kind(**{name: value})


def test_other_bad_settings(models: Any) -> None:
    with pytest.raises(ConfigError, match=r"`empty` must be one of .*; got 'skip'"):
        pool_texts(models["llama"], ["the cat"], asks(), settings=PoolingSettings(empty="skip"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`model` must be a LanguageModel, a folder or a name; got int"):
        pool_texts(3, ["the cat"], asks())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="there is no such folder"):
        pool_texts("./nowhere", ["the cat"], asks())


def test_activations_that_are_not_finite_name_the_text(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pooling.activations

    def broken(model: Any, hooks: Any, inputs: Any) -> Any:
        found = original(model, hooks, inputs)
        found[0][inputs["input_ids"] == 5] = float("nan")  # the second word of the vocabulary: "cat"
        return found

    monkeypatch.setattr(pooling, "activations", broken)
    with pytest.raises(DataError, match=r"row 2 of the texts at `layers.1` has nan"):
        pool_texts(models["llama"], ["the the", "on a mat", "the cat", "sat on"], asks())


def test_warnings_are_not_shown_without_a_reason(models: Any, texts: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool_texts(models["llama"], texts, asks())
