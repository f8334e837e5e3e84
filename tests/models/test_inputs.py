"""Hooks on what a module is given, instead of what it returns."""

from __future__ import annotations

import pytest
import torch

from fixtures.tiny_models import TEXTS
from saekit.errors import ModelError
from saekit.models.hooks import activations, find_hook
from saekit.models.intervene import splice
from saekit.rows.tokens import token_batches, tokenize

WHOLE = {"llama": "mlp", "gpt2": "mlp", "neox": "mlp"}  # the MLP of BERT is two modules of the block


def batch_of(lm):
    return next(token_batches(lm, tokenize(lm.tokenizer, TEXTS, context=lm.context), batch_tokens=100_000))


@pytest.mark.parametrize("kind", WHOLE)
def test_the_input_of_a_module_gives_its_output(models, kind):
    lm = models[kind]
    hooks = [find_hook(lm.model, name) for name in ("layers.1.mlp.input", "layers.1.mlp", "layers.0", "layers.1.input")]
    assert [hook.name for hook in hooks] == ["layers.1.mlp.input", "layers.1.mlp", "layers.0", "layers.1.input"]
    given, returned, before, stream = activations(lm.model, hooks, batch_of(lm).inputs)
    with torch.no_grad():
        torch.testing.assert_close(lm.model.get_submodule(hooks[0].path)(given), returned, atol=1e-5, rtol=1e-4)
    assert torch.equal(before, stream)
    assert find_hook(lm.model, hooks[0].path + ".input") == hooks[0]


@pytest.mark.parametrize("kind", WHOLE)
def test_replacing_the_input_replaces_the_output(models, kind):
    lm, batch = models[kind], batch_of(models[kind])
    given, returned = (find_hook(lm.model, f"layers.1.mlp{side}") for side in (".input", ""))
    with torch.no_grad(), splice(lm, given, lambda x: 2 * x, mask=batch.keep):
        (changed,) = activations(lm.model, [returned], batch.inputs)
    (x,) = activations(lm.model, [given], batch.inputs)
    with torch.no_grad():
        expected = lm.model.get_submodule(given.path)(torch.where(batch.keep[..., None], 2 * x, x))
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-4)


def test_a_splice_with_a_source_sees_both_and_replaces_one(models):
    lm, batch = models["llama"], batch_of(models["llama"])
    x, y = activations(lm.model, [find_hook(lm.model, n) for n in ("layers.1.mlp.input", "layers.1.mlp")], batch.inputs)
    seen = []

    def same(rows, old):
        seen.append((rows, old))
        return old

    with torch.no_grad(), splice(lm, "layers.1.mlp", same, mask=batch.keep, source="layers.1.mlp.input"):
        lm.model(**batch.inputs)
    assert torch.equal(seen[0][0], x[batch.keep])
    assert torch.equal(seen[0][1], y[batch.keep])
    late = splice(lm, "layers.0", lambda rows, old: old, source="layers.1")
    with pytest.raises(ModelError, match=r"`layers.1` must be reached before `layers.0`"), late:
        lm.model(**batch.inputs)


def test_inputs_that_are_not_those_of_a_sub_layer_are_refused(models):
    with pytest.raises(ModelError, match="must be what a whole sub-layer is given"):
        find_hook(models["bert"].model, "layers.1.mlp.input")
    with pytest.raises(ModelError, match="must be a module of the model"):
        find_hook(models["llama"].model, "layers.1.nothing.input")
    with pytest.raises(ModelError, match="must lie between 0 and 2"):
        find_hook(models["llama"].model, "layers.9.mlp.input")
