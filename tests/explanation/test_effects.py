"""The effect of a latent is what forward passes by hand say, and a latent that does nothing is told so."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from saekit.errors import ConfigError, DataError
from saekit.explanation.edits import Edit
from saekit.explanation.effects import LEAST_FIRED, _Firing, _Run, _Tests, effects, mean_over_documents
from saekit.explanation.effects_result import Effect, Effects, is_promoting, verdict_of
from saekit.explanation.halves import is_labelling
from saekit.explanation.settings import EffectSettings
from saekit.inputs.texts import read_texts
from saekit.measure.fidelity import contexts_for
from saekit.measure.results import Measured
from saekit.models.hooks import activations, find_hook
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

WIDTH, N = 16, 40
SMALL = EffectSettings(tokens=1500, context=24, contexts=8, controls=5, targets=4, doses=(1.0, 4.0))


@pytest.fixture(scope="module")
def corpus(texts_of):
    return texts_of(60)


@pytest.fixture(scope="module")
def texts_of():
    from fixtures.tiny_models import WORDS

    def make(n):
        generator = np.random.default_rng(0)
        return [" ".join(generator.choice(WORDS, generator.integers(8, 20))) for _ in range(n)]

    return make


@pytest.fixture(scope="module")
def sae():
    W = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(0))
    W = W / W.norm(dim=1, keepdim=True)
    return SAE(W, torch.zeros(N), W, torch.zeros(WIDTH), TopKRule(6), provenance={"hook": "layers.1"})


def by_hand(lm, sae, corpus, latent, settings):
    """Return KL and fall of log sum_T p at firing tokens of the held-out half, one context at a time."""
    contexts = contexts_for(lm, read_texts(corpus), min(settings.context, lm.context), settings.tokens)
    hook = find_hook(lm.model, layer=1)
    block = lm.model.get_submodule(hook.path)
    found = {}
    for i in range(len(contexts)):
        one = contexts.pick([i])
        document = int(one.document[0])
        if is_labelling(document):
            continue
        ids = torch.tensor(one.ids[None], dtype=torch.int64)
        (hidden,) = activations(lm.model, [hook], {"input_ids": ids})
        keep = torch.tensor(one.position >= 0)
        z = sae.encode(hidden[0]).to_dense()[:, latent] * keep
        if not bool((z != 0).any()):
            continue

        def ablated(module, args, output, z=z):
            x = output[0] if isinstance(output, tuple) else output
            x = x - z[None, :, None] * sae.W_dec[latent]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        with torch.no_grad():
            clean = lm.model(input_ids=ids).logits[0].log_softmax(-1)
            handle = block.register_forward_hook(ablated)
            after = lm.model(input_ids=ids).logits[0].log_softmax(-1)
            handle.remove()
        kl = (clean.exp() * (clean - after)).sum(-1)
        found.setdefault(document, []).append((kl[z != 0], clean[z != 0], after[z != 0]))
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ablation_is_what_passes_by_hand_say(models, corpus, sae, kind):
    lm = models[kind]
    settings = EffectSettings(tokens=1500, context=24, contexts=1000, controls=2, targets=4, doses=())
    result = effects(sae, lm, corpus, 7, settings=settings)
    (effect,) = result.effects
    expected = by_hand(lm, sae, corpus, 7, settings)
    kl = torch.cat([k for each in expected.values() for k, _, _ in each])
    assert effect.n_contexts == len(expected)  # no text is longer than a context here
    assert effect.n_tokens == len(kl)
    assert effect.kl.value == pytest.approx(float(kl.mean()), rel=1e-3)
    followers = [lm.tokenizer.convert_tokens_to_ids(token) for token in effect.followers]
    drop = torch.cat(
        [c[:, followers].logsumexp(1) - a[:, followers].logsumexp(1) for each in expected.values() for _, c, a in each]
    )
    assert effect.drop.value == pytest.approx(float(drop.mean()), abs=1e-4)
    assert effect.kl.low is None  # of fewer than 40 documents
    assert len(expected) < 40
    assert "at least 40 documents" in effect.kl.reason
    assert Effects.from_json(result.to_json()) == result


def test_a_latent_that_writes_nothing_does_nothing(models, corpus, sae):
    W_dec = sae.W_dec.clone()
    W_dec[7] = 0
    (effect,) = effects(sae.replace(W_dec=W_dec), models["llama"], corpus, [7], settings=SMALL).effects
    assert effect.kl.value == 0
    assert effect.verdict == "cannot be told from random"
    assert not effect.promotes
    assert all(dose.kl.value == 0 and dose.change == 0 for dose in effect.doses)


def test_latents_of_a_random_sae_are_no_more_than_their_controls(models, corpus, sae):
    """Where decoder rows have nothing to do with when latents fire, each is as good as any: percentiles are uniform."""
    W_dec = torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(5))
    sae = sae.replace(W_dec=W_dec / W_dec.norm(dim=1, keepdim=True))
    settings = EffectSettings(tokens=1500, context=24, contexts=6, controls=9, doses=())
    found = effects(sae, models["gpt2"], corpus, list(range(N)), settings=settings).effects
    percentiles = [each.kl_percentile["latents"] for each in found if each.reason is None]
    assert len(percentiles) >= 15
    assert 30 < np.mean(percentiles) < 70


def test_what_is_planted_is_found(models, texts_of, sae):
    """A latent that fires on one word and writes along the unembedding of the next raises that word."""
    lm = models["gpt2"]
    corpus = [text.replace("cat", "cat sat") for text in texts_of(150)]
    ids = lm.tokenizer.convert_tokens_to_ids(["cat", "sat"])
    hook = find_hook(lm.model, layer=2)
    head = lm.model.get_output_embeddings().weight.detach()
    towards = (head[ids[1]] - head.mean(0)) * lm.model.transformer.ln_f.weight.detach()  # what the logit of "sat" reads
    W_enc, W_dec = torch.zeros(N, WIDTH), torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(1))
    every = torch.cat(
        [
            activations(lm.model, [hook], lm.tokenizer(text, return_tensors="pt", return_token_type_ids=False))[0][0]
            for text in corpus[:40]
        ]
    )
    tokens = torch.cat([torch.tensor(lm.tokenizer(text)["input_ids"]) for text in corpus[:40]])
    on = (tokens == ids[0]).double()
    inputs = torch.cat([every.double(), torch.ones(len(every), 1, dtype=torch.float64)], 1)
    weights = torch.linalg.lstsq(inputs, on[:, None] * 6 - 2).solution[:, 0].float()
    W_enc[0], W_dec[0] = weights[:-1], 5 * towards / towards.norm()
    b_enc = torch.full((N,), -1e3)
    b_enc[0] = weights[-1]
    b_enc[1:] = 0
    W_enc[1:] = torch.randn(N - 1, WIDTH, generator=torch.Generator().manual_seed(2)) * 0.05
    planted = SAE(W_enc, b_enc, W_dec, torch.zeros(WIDTH), TopKRule(20), provenance={"layer": 2})
    settings = EffectSettings(tokens=3000, context=24, contexts=12, controls=20, targets=1, doses=(1.0,))
    (effect,) = effects(planted, lm, corpus, 0, settings=settings).effects
    assert effect.followers == ["sat"]
    assert effect.drop.value > 0
    assert effect.drop_percentile["directions"] >= 95
    assert effect.doses[0].rise.value > 0
    assert effect.doses[0].rise_percentile >= 95


def test_a_latent_that_hardly_fires_is_not_tested(models, corpus, sae):
    b_enc = torch.zeros(N)
    b_enc[3] = -1e4
    (effect,) = effects(sae.replace(b_enc=b_enc), models["llama"], corpus, 3, settings=SMALL).effects
    assert effect.verdict == "not tested"
    assert f"at least {LEAST_FIRED}" in effect.reason
    assert math.isnan(effect.kl.value)


@pytest.mark.parametrize("n", [39, 40])
def test_there_is_an_interval_from_forty_documents_on(n):
    found = mean_over_documents(np.sin(np.arange(120.0)), np.arange(120) % n, "nats")
    assert (found.low is not None) == (n == 40)


def test_documents_fall_into_halves():
    share = np.mean([is_labelling(i) for i in range(4000)])
    assert 0.47 < share < 0.53


def test_verdicts():
    assert verdict_of({"latents": 95, "directions": 100}) == "acts"
    assert verdict_of({"latents": 100, "directions": 90}) == "cannot be told from random"
    assert Effect.untested(0, 0.1, "why").verdict == "not tested"
    told = {"latents": 100.0, "directions": 100.0}
    assert is_promoting(Measured(0.2, 0.1, 0.3), told)
    assert not is_promoting(Measured(0.2, -0.1, 0.3), told)
    assert not is_promoting(Measured(0.2), told)
    assert not is_promoting(Measured(0.2, 0.1, 0.3), {**told, "latents": 50.0})


def test_refusals(models, corpus, sae):
    lm = models["llama"]
    for latents in ([], [N], [-1], [1, 1], [True], "3"):
        with pytest.raises(ConfigError):
            effects(sae, lm, corpus, latents, settings=SMALL)
    with pytest.raises(ConfigError, match="causal"):
        effects(sae, models["bert"], corpus, 3, settings=SMALL)
    with pytest.raises(DataError):
        effects(sae, lm, ["", ""], 3, settings=SMALL)
    for wrong in ({"doses": (0.0,)}, {"controls": 0}, {"context": 1}, {"tokens": 1.5}):
        with pytest.raises(ConfigError):
            EffectSettings(**wrong)


def test_gradients_expect_what_attribution_says_and_small_edits_do(models, corpus, sae):
    """To first order in the code; over latents the two then agree in sign and rank."""
    lm = models["gpt2"]
    settings = EffectSettings(tokens=1500, context=24, contexts=1000, controls=1, doses=())
    lm.model.double()
    try:
        found = effects(sae, lm, corpus, list(range(12)), settings=settings)
        tested = [each for each in found.effects if each.loss_expected is not None]
        contexts = contexts_for(lm, read_texts(corpus), 24, 1500)
        firing = _Firing.over(sae, lm, found.hook, contexts, list(range(12)), settings, lambda *_: None)
        tests = _Tests(sae, lm, found.hook, contexts, firing, settings)
        slopes = []
        for each in tested:
            fired = firing.codes[:, each.latent] != 0
            run = _Run(lm, found.hook, contexts.pick(tests._chosen(fired, "ablated")), [])
            up, down = (run.costs(sae, {each.latent: Edit.scale(1 + s)})[2].sum() for s in (0.03, -0.03))
            slopes.append((down - up) / 0.06 / run.predicted.sum())
    finally:
        lm.model.float()
    expected = np.array([each.loss_expected for each in tested])
    assert len(tested) >= 6
    assert np.abs(slopes - expected).max() < 0.01 * np.abs(expected).max()  # costs are in float32
    assert (np.sign(slopes) == np.sign(expected)).all()
    assert spearmanr(slopes, expected).statistic > 0.99
    sign, rank = found.agreement()
    full = [each.loss.value for each in tested]
    assert sign == (np.sign(full) == np.sign(expected)).mean()
    assert rank == pytest.approx(spearmanr(full, expected).statistic)
    assert f"rank correlation {rank:.2f}" in found.caption()
    assert Effects.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


def test_without_other_latents_directions_alone_decide(models, corpus, sae):
    one = sae.take(1).replace(rule=TopKRule(1))
    found = effects(one, models["gpt2"], corpus, 0, settings=SMALL)
    (effect,) = found.effects
    assert list(effect.kl_percentile) == ["directions"]
    assert effect.verdict == verdict_of(effect.kl_percentile)
    assert found.table()[1][3] == "–"
    json.dumps(found.to_json(), allow_nan=False)
    assert verdict_of({}) == "not tested"


def test_nothing_is_said_of_followers_where_there_are_none(models, sae):
    texts = ["the", "cat", "sat", "on"] * 30
    found = effects(sae, models["gpt2"], texts, list(range(N)), settings=SMALL).effects
    tested = [each for each in found if each.reason is None]
    assert tested
    for each in tested:
        assert each.followers == []
        assert not each.drop.is_defined
        assert not each.promotes
