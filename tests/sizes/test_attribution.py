"""Laws of gradient attribution: it is the derivative that finite differences see."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from saekit.errors import ConfigError, DataError
from saekit.models.intervene import splice
from saekit.models.loading import load_model
from saekit.sae.codes import Codes
from saekit.sae.model import SAE
from saekit.sae.rules import JumpReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.sizes.attribution import attribution
from saekit.sizes.ranking import rank
from saekit.sizes.settings import AttributionSettings

LAYER = 1
TEXTS = ["Return the mean of an array over a given axis.", "Parameters: a is an array_like.", "Raises ValueError."]


@pytest.fixture(scope="module")
def lm():
    """The built-in model in double precision, so that differences are not lost in rounding."""
    single = load_model("builtin", device="cpu", dtype="float32")
    return dataclasses.replace(single, model=copy.deepcopy(single.model).double())


def make(lm, scaling="none", rule="topk", n=40) -> SAE:
    d, g = lm.d_model, torch.Generator().manual_seed(3)
    W = torch.randn(n, d, generator=g, dtype=torch.float64)
    W = W / W.norm(dim=1, keepdim=True)
    scalings = {
        "none": Scaling(),
        "scalar": Scaling("scalar", scale=torch.tensor(0.5).double()),
        "layer_norm": Scaling("layer_norm"),
    }
    return SAE(
        W_enc=W, b_enc=torch.zeros(n).double(), W_dec=2 * W, b_dec=torch.zeros(d).double(),
        rule=TopKRule(6) if rule == "topk" else JumpReLURule(torch.full((n,), 0.3).double()), scaling=scalings[scaling],
    )  # fmt: skip


def cost(lm, sae, factors, texts=TEXTS, error=False) -> float:
    """Cross-entropy per token, text by text, with the codes of latent j multiplied by ``factors[j]``."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])

        def function(x):
            codes = sae.encode(x)
            scaled = Codes(codes.offsets, codes.indices, codes.values * factors[codes.indices], codes.n_latents)
            written = sae.decode(scaled, x)
            return written + (x - sae.decode(codes, x) if error else 0)

        kept = torch.tensor([[t not in lm.tokenizer.all_special_ids for t in ids[0].tolist()]])
        with torch.no_grad(), splice(lm, f"layers.{LAYER}", function, mask=kept):
            logits = lm.model(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += len(logits)
    return total / count


@pytest.mark.parametrize("scaling", ["none", "scalar", "layer_norm"])
@pytest.mark.parametrize("at", ["reconstruction", "activation"])
def test_it_is_the_finite_difference(lm, scaling, at):
    sae = make(lm, scaling)
    found = attribution(sae, lm, TEXTS, layer=LAYER, settings=AttributionSettings(at=at))
    step = 1e-2  # the model's norms compute in single precision
    for latent in found.scores["attribution"].topk(3).indices.tolist():
        factors = torch.ones(sae.n_latents, dtype=torch.float64)
        costs = []
        for change in (-step, step):
            factors[latent] = 1 + change
            costs.append(cost(lm, sae, factors, error=at == "activation"))
        slope = (costs[0] - costs[1]) / (2 * step)
        assert float(found.scores["cross_entropy"][latent]) == pytest.approx(slope, rel=1e-3, abs=2e-5)


def test_on_one_row_the_size_is_the_sum_over_rows_of_the_sizes(lm):
    sae = make(lm)
    found = attribution(sae, lm, TEXTS, layer=LAYER).scores
    assert (found["attribution"] >= found["cross_entropy"].abs() - 1e-12).all()
    assert (found["attribution"] > found["cross_entropy"].abs() + 1e-9).any()
    fired = found["frequency"] > 0
    assert (found["attribution"][~fired] == 0).all()


def test_any_batching_gives_the_same(lm):
    sae = make(lm, rule="jumprelu")
    one, other = (
        attribution(sae, lm, TEXTS, layer=LAYER, settings=AttributionSettings(batch_tokens=n, context=8))
        for n in (8, 4096)
    )
    for name, value in one.scores.items():
        torch.testing.assert_close(value, other.scores[name], rtol=1e-8, atol=1e-12)
    assert one.n_rows == other.n_rows


def test_a_permuted_sae_has_permuted_scores_and_ranks_by_them(lm):
    sae = make(lm)
    order = torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(0))
    found, permuted = (attribution(each, lm, TEXTS, layer=LAYER) for each in (sae, sae.permute(order)))
    torch.testing.assert_close(found.scores["attribution"][order], permuted.scores["attribution"])
    ranked = rank(sae.with_scores(**found.scores), by="attribution")
    assert ranked.provenance["latent_order"] == "attribution"
    assert (ranked.scores["attribution"].diff() <= 0).all()


def test_weights_get_no_gradient_and_nothing_is_left_behind(lm):
    sae = make(lm)
    stages = []
    attribution(sae, lm, TEXTS, layer=LAYER, progress=lambda *each: stages.append(each))
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not lm.model.get_submodule(f"model.layers.{LAYER}")._forward_hooks
    assert stages[-1][0] == "attribution"
    assert stages[-1][1] == stages[-1][2]


def test_half_precision_models(lm):
    half = dataclasses.replace(lm, model=copy.deepcopy(lm.model).bfloat16())
    sae = make(lm).to(dtype=torch.float32)
    rough, exact = (attribution(sae, each, TEXTS, layer=LAYER).scores["attribution"] for each in (half, lm))
    assert float(torch.corrcoef(torch.stack([rough, exact]))[0, 1]) > 0.99


def test_what_is_refused(lm):
    sae = make(lm)
    with pytest.raises(ConfigError, match="does not say where in the model it belongs"):
        attribution(sae, lm, TEXTS)
    with pytest.raises(ConfigError, match="`at` must be 'reconstruction' or 'activation'; got 'here'"):
        attribution(sae, lm, TEXTS, layer=LAYER, settings=AttributionSettings(at="here"))
    with pytest.raises(ConfigError, match="`tokens` must be a whole number from 1; got 0"):
        attribution(sae, lm, TEXTS, layer=LAYER, tokens=0)
    with pytest.raises(DataError, match="must hold texts of at least two tokens"):
        attribution(sae, without_bos(lm), ["a"], layer=LAYER)
    wide = sae.replace(W_dec=torch.zeros(sae.n_latents, 5).double(), b_dec=torch.zeros(5).double())
    with pytest.raises(ConfigError, match="`target` must say which rows the SAE predicts"):
        attribution(wide, lm, TEXTS, layer=LAYER)
    with pytest.raises(ConfigError, match="must predict next tokens"):
        attribution(sae, dataclasses.replace(lm, is_causal=False), TEXTS, layer=LAYER)
    broken = dataclasses.replace(lm, model=copy.deepcopy(lm.model))
    with torch.no_grad():
        broken.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(DataError, match=r"gradients of .* must be finite"):
        attribution(sae, broken, TEXTS, layer=LAYER)


def without_bos(lm):
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer._tokenizer.post_processor = None
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_the_place_comes_from_the_provenance(lm):
    sae = make(lm).replace(provenance={"hook": f"layers.{LAYER}"})
    assert attribution(sae, lm, TEXTS).rows["hook"] == f"layers.{LAYER}"
    assert attribution(make(lm).replace(provenance={"layer": LAYER}), lm, TEXTS).rows["hook"] == f"layers.{LAYER}"
