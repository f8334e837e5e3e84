"""Splicing values into a running model: nothing changes but what is replaced."""

from __future__ import annotations

import threading

import pytest
import torch

from saekit.errors import ShapeError
from saekit.models.hooks import activations, find_hook
from saekit.models.intervene import splice
from saekit.rows.tokens import token_batches, tokenize

KINDS = ["llama", "gpt2", "neox", "bert", "roberta"]


# rounding: sums in another order or shape
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def inputs(lm, texts, padding="right"):
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    return next(token_batches(lm, contexts, batch_tokens=100_000, padding=padding))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook", ["layers.1", "layers.1.mlp", "layers.1.attn"])
def test_splicing_the_same_values_changes_nothing(models, texts, kind, hook):
    lm = models[kind]
    batch = inputs(lm, texts)
    with torch.no_grad():
        clean = lm.model(**batch.inputs)[0]
        with splice(lm, hook, lambda x: x.clone(), mask=batch.keep) as found:
            same = lm.model(**batch.inputs)[0]
        with splice(lm, hook, torch.zeros_like, mask=batch.keep):
            zeroed = lm.model(**batch.inputs)[0]
        with splice(lm, hook, torch.zeros_like, mask=torch.zeros_like(batch.keep)):
            passed = lm.model(**batch.inputs)[0]
    assert found.name == hook
    torch.testing.assert_close(same[batch.keep], clean[batch.keep], **TOLERANCE)
    torch.testing.assert_close(passed[batch.keep], clean[batch.keep], **TOLERANCE)
    assert not torch.allclose(zeroed[batch.keep], clean[batch.keep], atol=1e-2)


def test_the_function_sees_exactly_the_kept_rows(models, texts):
    lm = models["llama"]
    batch = inputs(lm, texts)
    (hidden,) = activations(lm.model, [find_hook(lm.model, layer=1)], batch.inputs)
    seen = []
    with torch.no_grad(), splice(lm, 1, lambda x: seen.append(x) or x, mask=batch.keep):
        lm.model(**batch.inputs)
    assert torch.equal(seen[0], hidden[batch.keep])


def test_a_splice_leaves_other_threads_alone(models, texts):
    lm = models["llama"]
    batch = inputs(lm, texts)
    hook = find_hook(lm.model, layer=1)
    (clean,) = activations(lm.model, [hook], batch.inputs)
    found = []
    with splice(lm, hook, torch.zeros_like):
        thread = threading.Thread(target=lambda: found.extend(activations(lm.model, [hook], batch.inputs)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], clean)
        assert not activations(lm.model, [hook], batch.inputs)[0].any()


def test_bad_splices(models, texts):
    lm = models["llama"]
    batch = inputs(lm, texts)
    with (
        pytest.raises(
            ShapeError, match=r"spliced in at `layers\.1` must have shape .* Was the SAE trained on this hook"
        ),
        splice(lm, 1, lambda x: x[:, :5]),
    ):
        lm.model(**batch.inputs)
    wrong = pytest.raises(ShapeError, match="`mask` must be bool with one entry per token")
    with wrong, splice(lm, 1, lambda x: x, mask=batch.keep[:1]):
        lm.model(**batch.inputs)
