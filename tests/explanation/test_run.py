"""Labels name what was planted, on documents that they were not made of; what is shuffled names nothing."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from fixtures.tiny_models import WORDS
from saekit import SAE
from saekit.errors import ConfigError, DataError, FormatError
from saekit.explanation import firings
from saekit.explanation import run as module
from saekit.explanation.explanation_result import Card, Example, Explanation, Null, about_random_models
from saekit.explanation.nulls import _tells
from saekit.explanation.run import explain, token_texts
from saekit.explanation.settings import ExplainSettings
from saekit.measure.results import Measured
from saekit.models.hooks import activations, find_hook
from saekit.sae.rules import ReLURule, TopKRule

WIDTH, N = 16, 12
PLANTED = ("cat", "dog", "house")


@pytest.fixture(scope="module")
def corpus():
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, generator.integers(8, 20))) for _ in range(80)]


@pytest.fixture(scope="module")
def planted(models, corpus):
    """An SAE on the embedding of which three latents fire on a word each; the others have random directions."""
    lm = models["gpt2"]
    hook = find_hook(lm.model, "transformer.drop")
    rows, tokens = [], []
    for text in corpus[:60]:
        inputs = lm.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        rows.append(activations(lm.model, [hook], dict(inputs))[0][0])
        tokens.append(inputs["input_ids"][0])
    x, token = torch.cat(rows).double(), torch.cat(tokens)
    inputs = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    generator = torch.Generator().manual_seed(0)
    W, b = torch.randn(N, WIDTH, generator=generator), torch.randn(N, generator=generator)
    for j, word in enumerate(PLANTED):
        on = (token == lm.tokenizer.convert_tokens_to_ids(word)).double()
        solved = torch.linalg.lstsq(inputs, (on * 2 - 1)[:, None]).solution[:, 0].float()
        W[j], b[j] = solved[:-1], solved[-1]
    b[N - 1] = -1e4  # never fires
    provenance = {"hook": "transformer.drop", "context": 24}
    return SAE(W, b, torch.randn(N, WIDTH, generator=generator), torch.zeros(WIDTH), ReLURule(), provenance=provenance)


SETTINGS = ExplainSettings(tokens=2000, top=4, sample=3, window=7)


def test_labels_name_what_is_planted(models, corpus, planted):
    found = explain(planted, models["gpt2"], corpus, settings=SETTINGS)
    for j, word in enumerate(PLANTED):
        card = found[j]
        assert card.label.startswith(f"`{word}`")
        assert card.detection >= 0.95
        assert card.is_told
        assert all(word in example.tokens[example.peak] for example in card.top)
    assert found.detection_null.value == pytest.approx(0.5, abs=0.05)
    assert found.detection.value > 0.5
    assert found.fired_fraction == pytest.approx((N - 1) / N)
    with pytest.raises(ConfigError, match="must have a card"):
        found[N - 1]
    assert Explanation.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_examples_are_the_codes_of_the_texts(models, corpus, planted):
    lm = models["gpt2"]
    found = explain(planted, lm, corpus, settings=SETTINGS)
    hook = find_hook(lm.model, "transformer.drop")
    for latent in (0, 5):
        strongest, count = {}, 0
        for number, text in enumerate(corpus):
            inputs = lm.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            z = planted.encode(activations(lm.model, [hook], dict(inputs))[0][0]).to_dense()[:, latent]
            count += int((z != 0).sum())
            if (z != 0).any():
                strongest[number] = (float(z.max()), int(z.argmax()), z, text.split())
        card = found[latent]
        best = sorted(strongest.items(), key=lambda each: -each[1][0])[:4]
        assert [example.codes[example.peak] for example in card.top] == pytest.approx(
            [each[0] for _, each in best], abs=1e-4
        )
        assert card.density == pytest.approx(count / found.data["tokens"])
        assert sum(n for _, n in card.histogram) == count
        for example in (*card.top, *card.sample):
            _, _, z, words = strongest[example.document]
            start = next(
                i
                for i in range(len(words))
                if np.allclose(z[i : i + len(example.codes)].numpy(), example.codes, atol=1e-4)
            )
            assert [token.strip() for token in example.tokens] == words[start : start + len(example.tokens)]
            assert example.codes[example.peak] != 0


def test_rows_that_are_not_kept_and_firings_in_a_file_give_the_same(models, corpus, planted, monkeypatch):
    kept = explain(planted, models["gpt2"], corpus, settings=SETTINGS)
    monkeypatch.setattr(module, "HELD_ROWS", 100)
    monkeypatch.setattr(firings, "HELD", 500)
    monkeypatch.setattr(firings, "BLOCK", 200)
    again = explain(planted, models["gpt2"], corpus, settings=SETTINGS)
    assert again.cards == kept.cards
    assert again.scores == kept.scores


def test_chosen_latents_and_signed_codes(models, corpus, planted):
    signed = planted.replace(rule=TopKRule(4, sign="magnitude"))
    settings = ExplainSettings(tokens=2000, latents=(7, 2), neighbours=2)
    found = explain(signed, models["gpt2"], corpus, settings=settings)
    assert [card.latent for card in found.cards] == [2, 7]
    assert min(example.codes[example.peak] for card in found.cards for example in card.top) < 0
    unit = torch.nn.functional.normalize(planted.W_dec, dim=1)
    cosine = (unit @ unit[2]).index_fill(0, torch.tensor([2]), -2)
    assert [each["latent"] for each in found[2].neighbours] == cosine.topk(2).indices.tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
def test_tokens_that_latents_write_agree_with_ablation_behind_the_last_block(models, corpus, planted, kind):
    lm = models[kind]
    sae = SAE(planted.W_enc, planted.b_enc, planted.W_dec, torch.zeros(WIDTH), TopKRule(4))
    settings = ExplainSettings(tokens=1000, controls=(), top=1, sample=0)
    last, first = (explain(sae, lm, corpus, layer=layer, settings=settings) for layer in (2, 0))
    assert last.logits.agreement.value > 0.8
    assert last.logits.is_shown
    # at the last block the lists are all that ablation does, but for how far the norm bends
    assert last.logits.agreement.value > first.logits.agreement.value
    card = last[int(last.cards[0].latent)]
    assert card.promoted[0].value > card.promoted[-1].value > card.suppressed[-1].value
    assert "raises" in repr(card)
    assert all(bool(card.promoted) == first.logits.is_shown for card in first.cards)


def test_the_model_itself_scores_labels(models, corpus, planted):
    settings = ExplainSettings(tokens=1000, controls=(), top=1, sample=0, surprisal=5, window=6)
    found = explain(planted, models["gpt2"], corpus, settings=settings)
    values = [card.scores["surprisal"] for card in found.cards if card.scores["surprisal"] is not None]
    assert 0 < len(values) <= 5
    assert all(0 <= value <= 1 for value in values)
    with pytest.raises(ConfigError, match="causal"):
        explain(planted, models["bert"], corpus, layer=1, settings=settings)


def test_why_there_are_no_lists(models, corpus, planted):
    settings = ExplainSettings(tokens=1000, controls=(), top=1, sample=0)
    assert "residual stream" in explain(planted, models["gpt2"], corpus, settings=settings).logits.reason
    bert = explain(planted, models["bert"], corpus, layer=1, settings=settings)
    assert "no vocabulary" in bert.logits.reason
    assert (
        explain(planted, models["gpt2"], corpus, settings=dataclasses.replace(settings, logit_tokens=0)).logits is None
    )


@pytest.mark.parametrize(
    ("verdicts", "tells"),
    [
        (["better", "better"], True),
        (["better", "undecided"], False),
        (["better", "undefined"], True),
        (["undefined", "undefined"], None),
        ([], None),
    ],
)
def test_what_is_not_defined_is_no_finding(verdicts, tells):
    nothing = Measured(math.nan, None, None, "auc", "undefined")
    assert _tells([Null(f"control {at}", nothing, nothing, word) for at, word in enumerate(verdicts)]) is tells


def test_scores_that_do_not_tell_a_trained_dictionary_from_a_random_one_say_so(models, corpus, planted):
    settings = dataclasses.replace(SETTINGS, controls=("shuffled", "random", "frozen", "randomized"))
    found = explain(planted, models["gpt2"], corpus, nulls=[planted], settings=settings)
    assert [each.name for each in found.controls][:4] == list(settings.controls)
    assert len(found.controls) == 5
    by_name = {score.name: score for score in found.scores}
    for score in found.scores:
        assert len(score.nulls) == 5
        # the SAE itself is among the controls: nothing can be better than it
        assert score.tells_random_apart is (False if score.value.is_defined else None)
        assert score.nulls[4].value.value == pytest.approx(score.value.value, abs=0.1) or not score.value.is_defined
    assert by_name["detection"].value.value == pytest.approx(found.detection.value)
    assert "Not shown to be better than for random latents" in found.caption()
    verdicts = {score.name: {null.control: null.verdict for null in score.nulls} for score in found.scores}
    told = {"better": True, "undefined": None}
    for score in found.scores:
        assert score.tells_trained_apart is told.get(verdicts[score.name]["randomized"], False)
    said = about_random_models({score.name: score.tells_trained_apart for score in found.scores})
    assert "random weights" in said
    for shown in (found.caption(), repr(found), found._repr_html_()):
        assert said in shown
    words = {None: "not asked", True: "told apart", False: "not told"}
    assert [row[-1] for row in found.score_table()[1:]] == [words[each.tells_trained_apart] for each in found.scores]
    assert found[0].percentiles["detection"]["shuffled"] >= 0.9
    assert Explanation.from_json(json.loads(json.dumps(found.to_json()))) == found
    unasked = dataclasses.replace(found, scores=[dataclasses.replace(each, nulls=[]) for each in found.scores])
    assert "was not asked" in repr(unasked)
    assert about_random_models({"a": False}) == (
        "No score tells the trained model from one of the same architecture with random weights."
    )
    assert about_random_models({}) == ""


def test_cards_are_text_and_html(models, corpus, planted):
    card = explain(planted, models["gpt2"], corpus, settings=SETTINGS)[0]
    assert "⟦cat⟧" in repr(card).replace("⟦ cat⟧", "⟦cat⟧")
    assert "<script>" not in card._repr_html_()
    hostile = Card(0, "<script>", 0.1, 1.0, 1.0, None, None, None, None, None)
    assert "&lt;script&gt;" in hostile._repr_html_()
    assert "unknown" in repr(hostile)


def test_a_card_in_a_notebook_is_read_in_any_theme_whatever_its_tokens_hold():
    example = Example(0, 1, ["a\n", "<b>\u202e", "\x1b[31m"], [0.0, 4.0, 1.0])
    card = Card(0, "l", 0.1, 4.0, 1.0, None, None, None, None, None, top=[example], sample=[example])
    page = card._repr_html_()
    assert page.index(">strongest</caption>") < page.index(">from every fifth of its codes</caption>")
    assert "a⏎<span style='background:rgba(230,140,0,1.00);color:#000'>&lt;b&gt;?</span>" in page
    assert "<span style='background:rgba(230,140,0,0.25)'>?[31m</span>" in page
    for shown in (page, repr(card)):
        assert "\u202e" not in shown
        assert "\x1b" not in shown


def test_token_texts_join_to_the_text(models):
    tokenizer = models["llama"].tokenizer
    ids = tokenizer("the cat sat on a mat")["input_ids"]
    assert "".join(token_texts(tokenizer.decode, ids)) == tokenizer.decode(ids)


def test_refusals(models, corpus, planted):
    lm = models["gpt2"]
    with pytest.raises(ConfigError, match="within"):
        explain(planted, lm, corpus, settings=ExplainSettings(latents=(N,)))
    for texts in (["", ""], ["the cat sat"]):
        with pytest.raises(DataError):
            explain(planted, lm, texts, settings=SETTINGS)
    for wrong in ({"tokens": 1}, {"window": 1}, {"top": 0}, {"latents": (-1,)}, {"sample": -1}):
        with pytest.raises(ConfigError):
            ExplainSettings(**wrong)


def test_texts_of_one_token_have_nothing_before_or_after(models, planted):
    texts = [word for word in WORDS for _ in range(8)]
    found = explain(planted, models["gpt2"], texts, settings=SETTINGS)
    card = found.cards[0]
    assert card.label.startswith("`")
    assert card.previous == card.next == []
    assert card.scores["purity_next"] is None
    assert card.scores["purity"] is not None


def test_an_sae_that_never_fires_says_so(models, corpus, planted):
    sae = planted.replace(b_enc=torch.full((N,), -1e4))
    found = explain(sae, models["llama"], corpus, layer=1, settings=SETTINGS)
    assert found.cards == []
    assert "no latent fires" in found.logits.reason
    assert not found.detection.is_defined


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("neighbours", [{"cosine": 0.5}]),
        ("coactive", [{"latent": 1.0}]),
        ("histogram", [[1.0]]),
        ("positions", [[0.0, 1.0, 2.0]]),
        ("top", [{"document": 0, "peak": 3, "tokens": ["a"], "codes": [1.0]}]),
        ("sample", [{"document": 0, "peak": 0, "tokens": ["a"], "codes": []}]),
    ],
)
def test_cards_that_were_altered_are_refused_when_read(models, corpus, planted, part, value):
    settings = ExplainSettings(tokens=300, latents=(0,), controls=(), logit_tokens=0)
    plain = explain(planted, models["gpt2"], corpus, settings=settings).to_json()
    plain["cards"][0][part] = value
    with pytest.raises(FormatError, match=f"`{part}` of the card of latent 0"):
        Explanation.from_json(plain)
