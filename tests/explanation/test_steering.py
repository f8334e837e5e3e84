"""Steered texts are those that the edited model generates, and are read by the untouched one."""

from __future__ import annotations

import pytest
import torch

from saekit.errors import ConfigError
from saekit.explanation.attach import attach
from saekit.explanation.settings import SteerSettings
from saekit.explanation.steering import Steered, steer
from saekit.models.hooks import activations, find_hook
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

WIDTH, N = 16, 40
PROMPT = "the cat sat on"
SMALL = SteerSettings(new_tokens=6, controls=3)


@pytest.fixture(scope="module")
def sae():
    W = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
    W = W / W.norm(dim=1, keepdim=True)
    return SAE(W, torch.zeros(N), W, torch.zeros(WIDTH), TopKRule(6), provenance={"hook": "layers.1"})


def generated(lm, edit=None):
    ids = lm.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("at", ["all", "prompt", "generated", "last"])
def test_texts_numbers_and_controls(models, sae, at):
    lm = models["llama"]
    result = steer(sae, lm, PROMPT, {3: 9.0}, settings=SteerSettings(new_tokens=6, controls=3, at=at))
    (found,) = result.prompts
    whole = generated(lm)
    n = len(lm.tokenizer(PROMPT)["input_ids"])
    with attach(lm, sae, {3: 9.0}, at=at):
        edited = generated(lm)
    for each, ids in ((found.clean, whole), (found.steered, edited)):
        assert each.text == lm.tokenizer.decode(ids[0], skip_special_tokens=True).removeprefix(PROMPT)
        (hidden,) = activations(lm.model, [find_hook(lm.model, layer=1)], {"input_ids": ids})
        assert each.read_back == pytest.approx(float(sae.encode(hidden[0, n:]).to_dense()[:, 3].mean()), abs=1e-5)
        with torch.no_grad():
            log_p = lm.model(input_ids=ids).logits[0].log_softmax(-1)
        lost = -log_p[torch.arange(n - 1, ids.shape[1] - 1), ids[0, n:]].mean()
        assert each.perplexity == pytest.approx(float(lost.exp()), rel=1e-4)
    column = torch.arange(whole.shape[1])[None]
    where = {"all": column >= 0, "prompt": column < n, "generated": column >= n, "last": column == n - 1}[at]
    with torch.no_grad():
        clean = lm.model(input_ids=whole).logits[0, n - 1 :].log_softmax(-1)
        with attach(lm, sae, {3: 9.0}, at=where):
            after = lm.model(input_ids=whole).logits[0, n - 1 :].log_softmax(-1)
    kl = (clean.exp() * (clean - after)).sum(-1).mean()
    assert found.clean.kl == 0
    assert found.steered.kl == pytest.approx(float(kl), rel=1e-3)
    assert len(found.controls) == 3
    for control in found.controls:  # the same norm at the same tokens
        assert control.change == pytest.approx(found.steered.change, rel=1e-4)
        assert control.kl != found.steered.kl
    top = (after - clean).mean(0)[: len(lm.tokenizer)].argmax()  # the model has rows that are no token
    assert found.raised[0]["token"] == lm.tokenizer.decode([int(top)]).strip()
    assert Steered.from_json(result.to_json()) == result
    assert PROMPT in result.table()[1][0]


def test_an_edit_that_changes_nothing(models, sae):
    (found,) = steer(sae, models["gpt2"], [PROMPT], {3: "*1"}, settings=SMALL).prompts
    assert found.steered.text == found.clean.text
    assert found.steered.kl == found.steered.change == 0


def test_sampling_is_repeatable(models, sae):
    settings = SteerSettings(new_tokens=8, controls=1, temperature=1.5, seed=3)
    one, two = (steer(sae, models["llama"], PROMPT, {3: 9.0}, settings=settings) for _ in range(2))
    assert one == two


def test_refusals(models, sae):
    lm = models["llama"]
    for prompts, edits in ((PROMPT, {}), ([], {3: 1.0}), (PROMPT, {N: 1.0}), (["a", 3], {3: 1.0}), (PROMPT, {3: "x"})):
        with pytest.raises(ConfigError):
            steer(sae, lm, prompts, edits, settings=SMALL)
    with pytest.raises(ConfigError, match="24 tokens"):
        steer(sae, lm, PROMPT, {3: 1.0}, settings=SteerSettings(new_tokens=24))
    with pytest.raises(ConfigError, match="causal"):
        steer(sae, models["bert"], PROMPT, {3: 1.0}, settings=SMALL)
    with pytest.raises(ConfigError, match="at least one token"):
        steer(sae, models["gpt2"], "", {3: 1.0}, settings=SMALL)
    for wrong in ({"at": "first"}, {"new_tokens": 0}, {"temperature": -1}, {"controls": -1}):
        with pytest.raises(ConfigError):
            SteerSettings(**wrong)
