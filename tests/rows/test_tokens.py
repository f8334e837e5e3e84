"""Contexts: every token of every text once, and padded batches of contexts."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from fixtures.row_checks import KINDS
from saekit.errors import ModelError
from saekit.rows.capture import capture
from saekit.rows.settings import CaptureSettings
from saekit.rows.tokens import token_batches, tokenize


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_every_text_once_and_added_tokens_around_each_context(models, texts, kind):
    lm = models[kind]
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    assert contexts.lengths().max() == lm.context
    text_token = contexts.position >= 0
    for document, text in enumerate(texts):
        mine = text_token & (contexts.document == document)
        assert contexts.position[mine].tolist() == list(range(len(text.split())))
        assert contexts.ids[mine].tolist() == lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    before, after = {"llama": (1, 0), "bert": (1, 1), "roberta": (1, 1)}.get(kind, (0, 0))
    for i in range(len(contexts)):
        one = contexts.pick([i])
        assert len(set(one.document)) == 1, "texts never share a context"
        assert [p >= 0 for p in one.position] == [False] * before + [True] * (len(one.ids) - before - after) + [
            False
        ] * after


def test_packing_fills_contexts(models, texts):
    lm = models["llama"]
    packed = tokenize(lm.tokenizer, texts, context=24, pack=True)
    apart = tokenize(lm.tokenizer, texts, context=24)
    assert (packed.lengths()[:-1] == 24).all()
    keep = packed.position >= 0
    assert (packed.ids == 1).sum() == len(texts)
    for name in ("ids", "document", "position"):
        assert np.array_equal(getattr(packed, name)[keep], getattr(apart, name)[apart.position >= 0])


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padded_batches(models, texts, padding):
    lm = models["bert"]
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    seen = []
    for batch in token_batches(lm, contexts, batch_tokens=100, padding=padding):
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        assert ids.numel() <= 100
        assert not (batch.keep & ~mask).any(), "padding is never kept"
        assert not batch.keep[(ids == 1) | (ids == 2)].any()
        assert (batch.document[~mask] == -1).all()
        for row, i in enumerate(batch.index):
            assert torch.equal(ids[row][mask[row]], torch.from_numpy(contexts.pick([i]).ids).long())
            assert bool(mask[row][-1 if padding == "left" else 0])
        seen.extend(batch.index)
    assert sorted(seen) == list(range(len(contexts)))


def longer(tokenizer, pad):
    """Return a copy of a tokenizer with tokens that the model has no embedding of."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([f"new{i}" for i in range(40)])
    tokenizer.pad_token = pad
    return tokenizer


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_padding_token_outside_the_embedding_changes_no_row(models, texts, kind, padding):
    lm = models[kind]
    other = dataclasses.replace(lm, tokenizer=longer(lm.tokenizer, "new39"))
    assert other.tokenizer.pad_token_id >= other.vocabulary
    settings = CaptureSettings(padding=padding)
    rows, expected = (capture(each, texts, layer=1, settings=settings) for each in (other, lm))
    torch.testing.assert_close(rows.x, expected.x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_token_outside_the_embedding_is_refused_by_name(models, kind):
    lm = dataclasses.replace(models[kind], tokenizer=longer(models[kind].tokenizer, "<pad>"))
    with pytest.raises(ModelError, match=r"which has 40; `new\d+` is token \d+.*resize_token_embeddings"):
        capture(lm, ["the cat new39 sat", "a dog"], layer=1)
