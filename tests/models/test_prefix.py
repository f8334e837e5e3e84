"""Blocks before a hook are run once and replayed: the same as a whole pass, or not done at all."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from saekit.models.hooks import find_hook
from saekit.models.intervene import splice
from saekit.models.prefix import Prefix
from saekit.rows.tokens import token_batches, tokenize


def inputs(lm, texts):
    contexts = tokenize(lm.tokenizer, texts, context=lm.context)
    return next(token_batches(lm, contexts, batch_tokens=100_000))


def spliced(lm, hook, batch, function):
    with torch.no_grad(), splice(lm, hook, function, mask=batch.keep):
        return lm.model(**batch.inputs)[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "bert"])
@pytest.mark.parametrize(("hook", "skipped"), [("layers.1", 2), ("layers.1.mlp", 1), ("layers.1.attn", 1)])
def test_a_replayed_pass_equals_a_whole_one_bit_for_bit(models, texts, kind, hook, skipped):
    lm = models[kind]
    batch = inputs(lm, texts)
    prefix = Prefix.before(lm.model, [find_hook(lm.model, hook)])
    assert len(prefix.skipped) == skipped
    ran = []
    handle = prefix.skipped[0].register_forward_hook(lambda module, args, output: ran.append(output))
    with torch.no_grad(), prefix.recorded():
        lm.model(**batch.inputs)
    for function in (torch.zeros_like, lambda x: 0.5 * x + 1, lambda x: -x):
        whole = spliced(lm, hook, batch, function)
        with prefix.replayed():
            assert torch.equal(spliced(lm, hook, batch, function), whole)
    handle.remove()
    assert len(ran) == 7  # a hook on a block that is skipped fires as ever
    assert prefix.agrees(lambda: spliced(lm, hook, batch, torch.zeros_like))
    assert not any("forward" in vars(block) for block in prefix.skipped)


def test_the_blocks_do_not_run_in_a_replayed_pass(models, texts):
    lm = models["llama"]
    batch = inputs(lm, texts)
    prefix = Prefix.before(lm.model, [find_hook(lm.model, layer=1)])
    ran = []
    handles = [block.self_attn.register_forward_hook(lambda *_: ran.append(1)) for block in prefix.skipped]
    with torch.no_grad(), prefix.recorded():
        lm.model(**batch.inputs)
    before = len(ran)
    with prefix.replayed():
        spliced(lm, "layers.1", batch, torch.zeros_like)
    for handle in handles:
        handle.remove()
    assert (before, len(ran)) == (2, 2)


@pytest.mark.parametrize(
    ("hooks", "skipped"),
    [(["layers.1"], 2), (["layers.1.mlp.input", "layers.1.mlp"], 1), (["layers.0", "layers.1"], 1), (["lm_head"], 0)],
)
def test_what_is_skipped_comes_before_every_hook(models, hooks, skipped):
    model = models["llama"].model
    assert len(Prefix.before(model, [find_hook(model, hook) for hook in hooks]).skipped) == skipped


class Crossing(nn.Module):
    """Two blocks and a head that also reads what the first block left behind."""

    def __init__(self, crosses: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
        self.crosses = crosses

    def forward(self, x):
        first = self.layers[0](x)
        out = self.layers[2](self.layers[1](first))
        return out + first if self.crosses else out


@pytest.mark.parametrize("crosses", [False, True])
def test_a_model_that_reads_an_earlier_block_again_is_found_out(crosses):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Crossing(crosses), torch.randn(2, 5, 4)
    prefix = Prefix.before(model, [find_hook(model, "layers.1")])

    def run():
        with torch.no_grad(), splice(model, "layers.1", lambda rows: rows * 0):
            return model(x)

    with torch.no_grad(), prefix.recorded():
        model(x)
    assert prefix.agrees(run) is not crosses


def test_a_model_that_fails_without_its_blocks_is_run_whole(models, texts):
    lm = models["llama"]
    prefix = Prefix.before(lm.model, [find_hook(lm.model, layer=1)])
    calls = []

    def run():
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("keys of the first block")
        return torch.ones(2)

    assert not prefix.agrees(run)
    assert not Prefix(()).agrees(run)


def test_other_threads_run_the_whole_model(models, texts):
    lm = models["llama"]
    batch = inputs(lm, texts[:1])
    prefix = Prefix.before(lm.model, [find_hook(lm.model, layer=1)])
    with torch.no_grad(), prefix.recorded():
        clean = lm.model(**{**batch.inputs, "input_ids": batch.inputs["input_ids"].flip(1)})[0]
        lm.model(**batch.inputs)
    found = []

    def elsewhere():
        with torch.no_grad():
            found.append(lm.model(**{**batch.inputs, "input_ids": batch.inputs["input_ids"].flip(1)})[0])

    with prefix.replayed():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert torch.equal(found[0], clean)
