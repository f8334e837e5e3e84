"""SAEs of every kind and in every kind of model: what is said of them is what plain passes say, or they are refused."""

from __future__ import annotations

import pytest
import torch
import transformers

import saekit as sk
from fixtures.tiny_models import CONTEXT, LAYERS, WIDTH, _tokenizer
from fixtures.tiny_vision import VISION, made
from saekit.errors import ConfigError, MissingModelError, ShapeError
from saekit.explanation.edits import Edit
from saekit.explanation.effects import _Firing, _Run, effects
from saekit.explanation.explanation_result import Explanation
from saekit.explanation.halves import is_labelling
from saekit.explanation.logit_lists import Tail
from saekit.explanation.run import explain
from saekit.explanation.settings import EffectSettings, ExplainSettings, SteerSettings
from saekit.explanation.steering import steer
from saekit.inputs.texts import read_texts
from saekit.measure.fidelity import contexts_for
from saekit.models.hooks import activations, find_hook
from saekit.models.intervene import splice
from saekit.models.loading import load_model
from saekit.sae.model import SAE
from saekit.sae.rules import JumpReLURule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling

N = 24
IN, OUT = "layers.2.mlp.input", "layers.2.mlp"
SMALL = ExplainSettings(tokens=240, controls=(), top=2, sample=2, window=5, context=CONTEXT)
FEW = EffectSettings(tokens=400, context=CONTEXT, contexts=1000, controls=1, targets=3, doses=())


def random_sae(n=N, rule=None, hook="layers.2", skip=None, **provenance):
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(n, WIDTH, generator=generator), torch.randn(n, WIDTH, generator=generator)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    b_dec = torch.randn(WIDTH, generator=generator)
    place = {"hook": hook, "context": CONTEXT, **provenance}
    return SAE(W_enc, torch.zeros(n), W_dec, b_dec, rule or TopKRule(4), W_skip=skip, provenance=place)


def transcoder(**fields):
    return random_sae(hook=IN, hook_out=OUT, transcoder=True, **fields)


def trained(config, lm, corpus):
    """An SAE trained for a few steps: its rule is the one that training freezes into."""
    rows = sk.capture(lm, corpus, layer=2, tokens=400, progress=False)
    return sk.train(config, rows, seeds=[0], tokens=1600, progress=False)[0]


KINDS = {
    "k of 1": lambda *_: random_sae(rule=TopKRule(1)),
    "4 latents": lambda *_: random_sae(4, TopKRule(2)),
    "1 latent": lambda *_: random_sae(1, ReLURule()),
    "signed": lambda *_: random_sae(rule=TopKRule(4, sign="signed")),
    "top k with thresholds": lambda *_: random_sae(rule=TopKRule(4, threshold=torch.full((N,), 2.0))),
    "gated": lambda lm, corpus: trained(sk.Gated(n_latents=N, l1=0.1), lm, corpus),
    "batchtopk": lambda lm, corpus: trained(sk.BatchTopK(n_latents=N, k=3), lm, corpus),
    "matryoshka": lambda lm, corpus: trained(sk.Matryoshka(n_latents=N, k=3, sizes=(8, N)), lm, corpus),
    "layer norm": lambda *_: random_sae().replace(scaling=Scaling("layer_norm")),
    "row norm": lambda *_: random_sae(rule=ReLURule()).replace(scaling=Scaling("row_norm")),
    "standardize": lambda *_: random_sae().replace(
        scaling=Scaling("standardize", scale=torch.linspace(0.5, 2, WIDTH), mean=torch.ones(WIDTH))
    ),
    "mlp output": lambda *_: random_sae(hook=OUT),
    "transcoder": lambda *_: transcoder(),
    "skip transcoder": lambda *_: transcoder(skip=torch.eye(WIDTH)),
}


@pytest.fixture(scope="module")
def saes(models, corpus, tmp_path_factory):
    """SAEs of all kinds, saved and loaded."""
    folder, found = tmp_path_factory.mktemp("odd"), {}
    for kind, build in KINDS.items():
        build(models["gpt2"], corpus).save(folder / kind)
        found[kind] = SAE.load(folder / kind)
    return found


def plain_passes(lm, corpus, tokens, *hooks):
    """Rows at hooks and ids of real tokens, text after text, by the hooks of torch."""
    contexts = contexts_for(lm, read_texts(corpus), CONTEXT, tokens)
    modules = [find_hook(lm.model, hook) for hook in hooks]
    for i in range(len(contexts)):
        one = contexts.pick([i])
        ids = torch.tensor(one.ids[None], dtype=torch.int64)
        real = torch.tensor(one.position >= 0)
        yield one, [x[0][real] for x in activations(lm.model, modules, {"input_ids": ids})], real


def written_at_unit(sae, x):
    """What one unit of each latent adds to the prediction for each row, by decoding ``[n, latents, d_out]``."""
    from saekit.sae.codes import Codes

    zero = sae.decode(Codes.from_dense(torch.zeros(len(x), sae.n_latents)), x)
    units = [
        sae.decode(Codes.from_dense(torch.eye(sae.n_latents)[j].expand(len(x), -1).contiguous()), x) - zero
        for j in range(sae.n_latents)
    ]
    return torch.stack(units, 1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_cards_and_lists_are_what_plain_passes_say(models, corpus, saes, kind):
    """Densities and maxima; and tokens written, by finite differences of the last norm and head at every firing."""
    lm, sae = models["gpt2"], saes[kind]
    found = explain(
        sae,
        lm,
        corpus,
        settings=ExplainSettings(
            **{**vars(SMALL), "logit_tokens": 10_000, "latents": tuple(range(min(8, sae.n_latents)))}
        ),
    )
    assert Explanation.from_json(found.to_json()) == found
    passes = list(plain_passes(lm, corpus, SMALL.tokens, sae.provenance["hook"], "layers.2"))
    x, last = (torch.cat([rows[i] for _, rows, _ in passes]) for i in (0, 1))
    codes = sae.encode(x).to_dense()
    assert found.cards
    for card in found.cards:
        z = codes[:, card.latent]
        assert card.density == pytest.approx(float((z != 0).float().mean()))
        assert card.maximum == pytest.approx(float(z.abs().max()), rel=1e-4)
    assert found.fired_fraction == pytest.approx(float((codes != 0).any(0).float().mean()))
    assert found.logits.agreement.value > 0.5 or sae.n_latents < 5  # at the last block ablation does little else
    card = max(found.cards, key=lambda each: each.density)
    at = codes[:, card.latent] != 0
    along = (codes[at, card.latent, None] * written_at_unit(sae, x[at])[:, card.latent]).double()
    tail = Tail(lm)
    lm.model.double()
    try:
        rows, step = last[at].double(), 1e-4
        with torch.no_grad():
            effect = ((tail(rows + step * along) - tail(rows - step * along)) / (2 * step)).mean(0)
    finally:
        lm.model.float()
    effect = effect - effect.mean()
    told = {each.token: each.value for each in card.promoted + card.suppressed}
    ids = lm.tokenizer.convert_tokens_to_ids(list(told))
    assert len(told) >= 10
    assert list(told.values()) == pytest.approx(effect[ids].tolist(), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("kind", ["4 latents", "signed", "batchtopk", "row norm", "mlp output", "skip transcoder"])
def test_ablation_is_what_passes_by_hand_say(models, corpus, saes, kind):
    lm, sae = models["gpt2"], saes[kind]
    read, out = sae.provenance["hook"], sae.provenance.get("hook_out", sae.provenance["hook"])
    firing = [
        int((sae.encode(x[0]).to_dense() != 0).any(0).nonzero()[0, 0]) for _, x, _ in plain_passes(lm, corpus, 40, read)
    ]
    latent = firing[0]
    (effect,) = effects(sae, lm, corpus, latent, settings=FEW).effects
    costs = []
    for one, (x,), real in plain_passes(lm, corpus, FEW.tokens, read):
        z = sae.encode(x).to_dense()[:, latent]
        if is_labelling(int(one.document[0])) or not bool((z != 0).any()):
            continue
        ids = {"input_ids": torch.tensor(one.ids[None], dtype=torch.int64)}
        removed = z[:, None] * written_at_unit(sae, x)[:, latent]
        with torch.no_grad():
            clean = lm.model(**ids).logits[0].log_softmax(-1)
            with splice(lm, out, lambda rows, removed=removed: rows - removed, mask=real[None]):
                after = lm.model(**ids).logits[0].log_softmax(-1)
        costs.append((clean.exp() * (clean - after)).sum(-1)[real][z != 0])
    assert effect.reason is None
    assert effect.n_tokens == sum(map(len, costs))
    assert effect.kl.value == pytest.approx(float(torch.cat(costs).mean()), rel=2e-3)


def test_a_transcoder_is_compared_where_it_writes(models, corpus, saes):
    """Directions come from the rows that it predicts; gradients expect what small edits do there."""
    lm, sae = models["gpt2"], saes["skip transcoder"]
    contexts = contexts_for(lm, read_texts(corpus), CONTEXT, 300)
    latents = list(range(8))
    firing = _Firing.over(sae, lm, IN, contexts, latents, FEW, lambda *_: None)
    expected = torch.cat([rows[0] for _, rows, _ in plain_passes(lm, corpus, 300, OUT)])
    covariance = torch.cov(expected.T)
    assert torch.cov(firing.rows.T) == pytest.approx(covariance, abs=1e-3 * float(covariance.abs().max()))
    lm.model.double()
    try:
        run = _Run(lm, IN, contexts, [])
        for latent in (j for j in latents if (firing.codes[:, j] != 0).sum() > 5):
            up, down = (run.costs(sae, {latent: Edit.scale(1 + s)})[2].sum() for s in (0.03, -0.03))
            assert run.expected(sae, latent) == pytest.approx((down - up) / 0.06, rel=0.05, abs=0.02)
    finally:
        lm.model.float()


def test_latents_that_are_all_dead(models, corpus):
    lm = models["gpt2"]
    dead = random_sae(rule=JumpReLURule(torch.full((N,), 1e6)))
    found = explain(dead, lm, corpus, settings=ExplainSettings(tokens=500, latents=(3,), context=CONTEXT, controls=()))
    assert found.fired_fraction == 0
    assert found[3].density == 0
    assert not found.detection.is_defined
    assert "no latent fires" in found.logits.reason
    assert found._repr_html_()
    assert all(each.reason for each in effects(dead, lm, corpus, [0, 3], settings=FEW).effects)
    steered = steer(dead, lm, "the cat", {3: 2.0}, settings=SteerSettings(new_tokens=2, controls=2))
    assert steered.prompts[0].steered.kl > 0
    assert steered.prompts[0].steered.read_back == 0


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A Mamba, the encoder of a T5, and a ViT."""
    root, t = tmp_path_factory.mktemp("others"), transformers
    width = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 2}
    builds = {
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(**width, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4)
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(
                **width, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=LAYERS, num_heads=2, decoder_start_token_id=0
            )
        ),
    }
    found = {kind: load_model(made(root / kind, build, _tokenizer("llama"))) for kind, build in builds.items()}
    vit = made(
        root / "vit", lambda: t.ViTModel(t.ViTConfig(**VISION)), t.ViTImageProcessor(size={"height": 8, "width": 8})
    )
    return {**found, "vit": load_model(vit)}


@pytest.mark.parametrize("kind", ["mamba", "t5", "bert", "roberta"])
def test_models_of_other_kinds(models, others, corpus, kind):
    lm, sae = {**models, **others}[kind], random_sae(hook="layers.1", rule=ReLURule())
    found = explain(sae, lm, corpus, settings=SMALL)
    x = torch.cat([rows[0] for _, rows, _ in plain_passes(lm, corpus, SMALL.tokens, "layers.1")])
    codes = sae.encode(x).to_dense()
    assert {card.latent: card.density for card in found.cards} == pytest.approx(
        {int(j): float((codes[:, j] != 0).float().mean()) for j in (codes != 0).any(0).nonzero()[:, 0]}, abs=2e-3
    )
    assert found.logits.agreement.is_defined == lm.is_causal
    if lm.is_causal:
        assert effects(sae, lm, corpus, 3, settings=FEW).effects[0].kl.value > 0
        assert (
            steer(sae, lm, "the cat", {3: 5.0}, settings=SteerSettings(new_tokens=3, controls=1)).prompts[0].steered.kl
            > 0
        )
        return
    for refused in (lambda: effects(sae, lm, corpus, 3), lambda: steer(sae, lm, "the", {3: 5.0})):
        with pytest.raises(ConfigError, match="not a causal language model"):
            refused()


def test_images_are_attached_to_and_else_refused(others):
    vit, sae = others["vit"], random_sae(hook="layers.1")
    for verb in (
        lambda: explain(sae, vit, ["a"]), lambda: effects(sae, vit, ["a"], 3), lambda: steer(sae, vit, "a", {3: 1.0}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="language model"):
            verb()
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    hook = find_hook(vit.model, "layers.1")
    (before,) = activations(vit.model, [hook], inputs)
    with sk.attach(vit, sae, {3: "+5"}):
        (after,) = activations(vit.model, [hook], inputs)
    torch.testing.assert_close(after[:, 1:], before[:, 1:] + 5 * sae.W_dec[3], atol=1e-4, rtol=1e-4)
    assert torch.equal(after[:, 0], before[:, 0])


def test_transcoders_are_refused_before_any_work(models, corpus):
    lm = models["gpt2"]
    silent = random_sae(hook=IN, transcoder=True)
    for verb in (lambda: effects(silent, "nowhere", corpus, 3), lambda: steer(silent, "nowhere", "the", {3: 1.0})):
        with pytest.raises(ConfigError, match="must say which module's output it predicts"):
            verb()
    assert "does not say" in explain(silent, lm, corpus, settings=SMALL).logits.reason
    absent = random_sae(hook=IN, hook_out="layers.9.mlp")
    narrow = transcoder().replace(W_dec=torch.ones(N, 8), b_dec=torch.zeros(8))
    for sae, error in ((absent, MissingModelError), (narrow, ShapeError)):
        for verb in (
            lambda sae: explain(sae, lm, corpus, settings=SMALL),
            lambda sae: effects(sae, lm, corpus, 3, settings=FEW),
            lambda sae: steer(sae, lm, "the cat", {3: 1.0}, settings=SteerSettings(new_tokens=2)),
        ):
            with pytest.raises(error):
                verb(sae)


def test_no_edited_latent_is_a_control_of_the_edit(models):
    lm, sae = models["gpt2"], random_sae(4, TopKRule(2))
    settings = SteerSettings(new_tokens=2, controls=9)
    steered = steer(sae, lm, "the cat", {0: 3.0, 1: 2.0, 2: 1.0}, settings=settings)
    assert steered.prompts[0].controls == []  # three others are needed, there is one
    assert len(steer(sae, lm, "the cat", {0: 3.0}, settings=settings).prompts[0].controls) == 3
