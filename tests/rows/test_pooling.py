"""Laws of pooling: documents from rows, whatever batches, passes and caches they come through."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from saekit.errors import ConfigError, DataError, ModelError, ShapeError
from saekit.kernels.pooling import largest_of_rows, pool_segments
from saekit.models import deferred
from saekit.models.language import LanguageModel
from saekit.rows import pooling, pooling_cache
from saekit.rows.capture import capture
from saekit.rows.pooling import DENSE_POOLS, Ask, pool_batches, pool_texts
from saekit.rows.pooling_cache import encoder_digest
from saekit.rows.settings import CaptureSettings, PoolingSettings
from saekit.rows.tokens import tokenize
from saekit.sae import rules
from saekit.sae.codes import Codes
from saekit.sae.model import SAE
from saekit.sae.scaling import Scaling

SPARSE = ("sum", "mean", "max", "last", "first", "count", "top1", "top3")
LAYER = 1
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # of values around 1 to 100; the models are float32


def identity(d: int) -> SAE:
    """Codes are the positive parts of the rows."""
    eye = torch.eye(d)
    return SAE(eye, torch.zeros(d), eye, torch.zeros(d), rules.ReLURule())


def random_sae(seed: int = 0, n: int = 48, d: int = 16, rule: Any = None, **fields: Any) -> SAE:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(n, d, generator=g)
    return SAE(W, torch.randn(n, generator=g), W, torch.zeros(d), rule or rules.TopKRule(4), **fields)


def reference(z: np.ndarray, name: str) -> np.ndarray:
    """The definition of a pooling, on the dense rows [n, m] of one document."""
    if name == "sum":
        return z.sum(0)
    if name == "mean":
        return z.mean(0)
    if name == "max":
        return z.max(0)
    if name in ("first", "last"):
        return z[0 if name == "first" else -1]
    if name == "count":
        return (z > 0).sum(0)
    total = np.zeros(z.shape[1])
    for row in z:
        best = np.argsort(-row, kind="stable")[: int(name.removeprefix("top"))]
        total[best[row[best] > 0]] += 1
    return total


def dense(x: Any) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.toarray()


# ------------------------------------------------------------------------------------------------------------- kernels


@st.composite
def segments(draw: Any) -> tuple[np.ndarray, list[int]]:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    d = draw(st.integers(1, 7))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    # few different values: ties; many zeros: rows and segments where nothing fires
    z = rng.integers(1, 4, (sum(lengths), d)) * (rng.random((sum(lengths), d)) < draw(st.sampled_from([0.1, 0.5, 1.0])))
    return z.astype(np.float32), lengths


@given(segments())
def test_segments_are_reduced_as_the_dense_definition_says(case: tuple[np.ndarray, list[int]]) -> None:
    z, lengths = case
    codes = Codes.from_dense(torch.from_numpy(z))
    # the order within a row has no meaning
    backwards = [torch.arange(a, b).flip(0) for a, b in zip(codes.offsets[:-1], codes.offsets[1:])]
    order = torch.cat([torch.zeros(0, dtype=torch.int64), *backwards])
    pooled = pool_segments(
        codes.offsets, codes.indices[order], codes.values[order], torch.tensor(lengths), codes.n_latents
    )
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for name in ("sum", "max", "count"):
        found = Codes(pooled.offsets, pooled.indices, getattr(pooled, name), codes.n_latents).to_dense().numpy()
        for i, (a, b) in enumerate(itertools.pairwise(ends)):
            expected = reference(z[a:b], name) if b > a else np.zeros(z.shape[1])
            np.testing.assert_array_equal(found[i], expected)
    for a, b in zip(pooled.offsets[:-1], pooled.offsets[1:]):
        assert (pooled.indices[a:b].diff() > 0).all()


@given(segments())
def test_places_in_a_row_put_the_largest_first_and_ties_by_latent(case: tuple[np.ndarray, list[int]]) -> None:
    z, _ = case
    codes = Codes.from_dense(torch.from_numpy(z))
    place = largest_of_rows(codes.offsets, codes.indices, codes.values)
    for r in range(len(z)):
        a, b = int(codes.offsets[r]), int(codes.offsets[r + 1])
        order = np.lexsort((codes.indices[a:b].numpy(), -codes.values[a:b].numpy()))
        assert place[a:b][order].tolist() == list(range(b - a))


# ------------------------------------------------------------------------------------------------- batches of rows


@given(segments(), st.integers(1, 4), st.booleans())
def test_every_pooling_is_its_dense_definition(case: tuple[np.ndarray, list[int]], step: int, shuffle: bool) -> None:
    """Also when the rows of a document are spread over batches, with other documents between them."""
    z, lengths = case
    z = z - 2.0 * (z == 3)  # states may be negative; codes are then zero
    lengths = [n for n in lengths if n] or [1]
    z = z if len(z) else np.ones((1, z.shape[1]), np.float32)
    document = np.repeat(np.arange(len(lengths)), lengths)
    order = np.arange(len(z))
    if shuffle:  # documents interleave, each keeps the order of its rows
        mixed = np.random.default_rng(0).permutation(document)
        order = np.argsort(np.argsort(mixed, kind="stable"), kind="stable")
        document = mixed
    x = torch.from_numpy(z[order])
    batches = [({"a": x[i : i + step]}, torch.from_numpy(document[i : i + step])) for i in range(0, len(x), step)]
    sparse, states = pool_batches(
        batches, len(lengths), [Ask(SPARSE, identity(z.shape[1]), hook="a"), Ask(DENSE_POOLS, hook="a")]
    )
    for i in range(len(lengths)):
        rows = z[order][document == i]
        for name in SPARSE:
            np.testing.assert_allclose(dense(sparse[name])[i], reference(np.maximum(rows, 0), name), rtol=1e-6)
        for name in DENSE_POOLS:
            np.testing.assert_allclose(states[name][i], reference(rows, name), rtol=1e-6, err_msg=name)
    for matrix in sparse.values():
        assert matrix.dtype == np.float32
        assert matrix.has_canonical_format
        assert (matrix.data != 0).all()


def test_a_document_of_two_parts_is_the_sum_the_maximum_and_the_count_of_its_parts() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 16, generator=g), torch.randn(4, 16, generator=g)
    ask = Ask(("sum", "max", "count", "top2", "first", "last"), random_sae(), hook="h")

    def pooled(*parts: torch.Tensor) -> dict[str, np.ndarray]:
        batches = [({"h": part}, torch.zeros(len(part), dtype=torch.int64)) for part in parts]
        return {name: dense(x)[0] for name, x in pool_batches(batches, 1, [ask])[0].items()}

    whole, first, second = pooled(torch.cat([a, b])), pooled(a), pooled(b)
    np.testing.assert_allclose(whole["sum"], first["sum"] + second["sum"], rtol=1e-5)
    for name in ("count", "top2"):
        np.testing.assert_array_equal(whole[name], first[name] + second[name])
    np.testing.assert_array_equal(whole["max"], np.maximum(first["max"], second["max"]))
    np.testing.assert_array_equal(whole["first"], first["first"])
    np.testing.assert_array_equal(whole["last"], second["last"])
    split = pooled(a, b)
    for name, values in whole.items():
        np.testing.assert_allclose(split[name], values, rtol=1e-6)


def test_documents_that_come_out_of_order_or_not_at_all() -> None:
    x = torch.arange(1.0, 7.0).reshape(3, 2)
    batches = [({"h": x}, torch.tensor([2, 0, 0])), ({"h": x[:0]}, torch.zeros(0, dtype=torch.int64))]
    asks = [Ask(("sum", "last", "mean"), identity(2), hook="h"), Ask(("mean", "max"), hook="h")]
    found, states = pool_batches(batches, 4, asks, empty="zero")
    assert dense(found["sum"]).tolist() == [[8, 10], [0, 0], [1, 2], [0, 0]]
    assert dense(found["mean"]).tolist() == [[4, 5], [0, 0], [1, 2], [0, 0]]
    assert dense(found["last"]).tolist() == [[5, 6], [0, 0], [1, 2], [0, 0]]
    assert states["max"].tolist() == [[5, 6], [0, 0], [1, 2], [0, 0]]
    with pytest.raises(DataError, match="images must have at least one token; 2 have none: rows `1`, `3`"):
        pool_batches(batches, 4, asks, what="images")
    nothing, _ = pool_batches([], 2, asks, empty="zero")
    assert nothing["sum"].shape == (2, 2)
    assert nothing["sum"].nnz == 0


class Largest(TorchDispatchMode):
    """Watches the size of every tensor that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return out


def test_no_array_of_tokens_by_latents_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    n_rows, n_latents = 5000, 16_384
    sae = random_sae(n=n_latents, d=8, rule=rules.TopKRule(8))
    x = torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(0))
    document = torch.arange(n_rows) // 10

    def refuse(*_: Any) -> Any:
        raise AssertionError("codes were made dense")

    monkeypatch.setattr(Codes, "to_dense", refuse)
    monkeypatch.setattr(SAE, "pre", refuse)
    with Largest() as largest:
        (found,) = pool_batches([({"h": x}, document)], n_rows // 10, [Ask(SPARSE, sae, hook="h")])
    assert found["sum"].shape == (500, n_latents)
    # the encoder works in blocks of some tens of MiB; a dense array would be eight times the limit here
    assert largest.bytes < 4 * n_rows * n_latents / 8


@pytest.mark.gpu
def test_pooling_on_a_gpu_is_pooling_on_the_cpu() -> None:
    sae, g = random_sae(), torch.Generator().manual_seed(0)
    x, document = torch.randn(500, 16, generator=g), torch.arange(500) // 7
    wanted = [Ask(SPARSE, sae, hook="h"), Ask(DENSE_POOLS, hook="h")]
    there = [dataclasses.replace(ask, sae=ask.sae and ask.sae.to("cuda")) for ask in wanted]
    found = pool_batches([({"h": x.cuda()}, document)], 72, there)
    assert_equal(found, pool_batches([({"h": x}, document)], 72, wanted), **CLOSE)


# --------------------------------------------------------------------------------------------------------------- texts


def asks(sae: SAE | None = None) -> list[Ask]:
    return [Ask(SPARSE, sae or random_sae(), layer=LAYER), Ask(DENSE_POOLS, layer=LAYER)]


def assert_equal(a: Any, b: Any, **close: float) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            if close:
                np.testing.assert_allclose(dense(one[name]), dense(other[name]), err_msg=name, **close)
            else:
                np.testing.assert_array_equal(dense(one[name]), dense(other[name]), err_msg=name)


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


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The hooks of every forward pass."""
    seen: list[list[str]] = []
    original = pooling.activations

    def counted(model: Any, hooks: Any, inputs: Any) -> Any:
        seen.append([hook.name for hook in hooks])
        return original(model, hooks, inputs)

    monkeypatch.setattr(pooling, "activations", counted)
    return seen


def test_one_pass_serves_all_asks_as_separate_passes_would(models: Any, texts: list[str], passes: Any) -> None:
    lm = models["llama"]
    wanted = [
        Ask(("sum", "max"), random_sae(0), layer=0),
        Ask(("mean",), random_sae(1), layer=1),
        Ask(("top3",), random_sae(0), hook="layers.0.mlp"),
        Ask(("last",), layer=1),
        Ask(("count",), random_sae(0), layer=0),
    ]
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
    with pytest.warns(UserWarning, match="trained at `layers.1` and is used at `layers.0`"):
        pool_texts(lm, texts, [Ask(("sum",), sae, layer=0)])
    with pytest.warns(UserWarning, match="trained on another model \\(gemma, sha256:0"):
        pool_texts(lm, texts, [Ask(("sum",), random_sae(provenance={"model": "gemma", "model_digest": "sha256:0"}), 1)])


# --------------------------------------------------------------------------------------------------------------- cache


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


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("pools", "sae", "message"),
    [
        (("sums",), True, "`pool` must be a pooling of codes.*got 'sums'.*Did you mean `sum`"),
        (("top",), True, "`top` needs a number: `top5`"),
        (("top0",), True, "got 'top0'"),
        (("sum", 3), True, "got 3"),
        (("count",), False, "pooling of hidden states.*got 'count'"),
        (("top5",), False, "pooling of hidden states"),
        ((), True, "at least one pooling"),
    ],
)
def test_unknown_poolings(pools: Any, sae: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ask(pools, random_sae() if sae else None, layer=0)


def test_bad_asks(models: Any, texts: list[str]) -> None:
    lm = models["llama"]
    with pytest.raises(ConfigError, match="at most one of `layer` and `hook`"):
        Ask(("sum",), layer=1, hook="layers.1")
    with pytest.raises(ConfigError, match=r"`layer` or `hook` must say where.*the SAE does not say where in the model"):
        pool_texts(lm, texts, [Ask(("sum",), random_sae())])
    with pytest.raises(ConfigError, match=r"where the rows come from; got neither\."):
        pool_texts(lm, texts, [Ask(("sum",))])
    with pytest.raises(ConfigError, match="at least one ask"):
        pool_texts(lm, texts, [])
    with pytest.raises(ModelError, match="`layer` must lie between 0 and 2"):
        pool_texts(lm, texts, [Ask(("sum",), layer=7)])
    with pytest.raises(ConfigError, match="activations must be given for the hook `b`"):
        pool_batches([({"a": torch.ones(1, 2)}, torch.tensor([0]))], 1, [Ask(("sum",), hook="b")])


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
    with pytest.raises(ConfigError, match="`empty` must be one of its options; got 'skip'"):
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
