"""Cross-entropies of a language model with reconstructions in place of activations."""

from __future__ import annotations

import math

import pytest
import torch

from saekit.errors import ConfigError, DataError, ShapeError
from saekit.evaluation.run import evaluate
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure import fidelity
from saekit.measure.fidelity import Skipped, predicted_positions, token_costs
from saekit.measure.metrics import leading_ablation, leading_recovered
from saekit.measure.results import Measured
from saekit.models.loading import load_model
from saekit.rows.capture import capture
from saekit.rows.tokens import TokenBatch
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

LAYER = 2
TEXTS = [
    f"Return the {what} of an array over a given axis. Parameters: a is an array_like, axis is an int or None. "
    f"By default the {what} is taken over the flattened array; raises ValueError if the axis is out of range."
    for what in ["mean", "median", "maximum", "minimum", "sum", "product", "variance", "range"]
]


@pytest.fixture(scope="module")
def lm():
    return load_model("builtin", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def source(lm):
    return capture(lm, TEXTS, layer=LAYER)


def random_sae(d: int, n_latents: int = 256) -> SAE:
    W = torch.randn(n_latents, d, generator=torch.Generator().manual_seed(7))
    W = W / W.norm(dim=1, keepdim=True)
    return SAE(W_enc=W, b_enc=torch.zeros(n_latents), W_dec=W, b_dec=torch.zeros(d), rule=TopKRule(8))


# ---------------------------------------------------------------- the formulas


def test_cross_entropy_and_divergence_equal_their_formulas(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits, clean = (torch.randn(9, 31, generator=generator) * 4 for _ in range(2))
    targets = torch.randint(0, 31, (9,), generator=generator)
    p, q = clean.double().softmax(1), logits.double().softmax(1)
    expected_kl = (p * (p.log() - q.log())).sum(1)
    for numbers in (10**6, 62):  # all at once, and two rows at a time
        monkeypatch.setattr("saekit.measure.fidelity.CHUNK_NUMBERS", numbers)
        ce, kl = token_costs(logits, targets, clean)
        torch.testing.assert_close(ce, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        torch.testing.assert_close(kl.double(), expected_kl, rtol=1e-4, atol=1e-5)
        assert (kl >= 0).all()


def test_divergence_of_a_model_from_itself_is_zero_even_where_tokens_cannot_come():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = -math.inf
    _, kl = token_costs(logits, torch.zeros(5, dtype=torch.long), logits)
    assert (kl == 0).all()


def test_divergence_in_half_precision_stays_finite():
    logits = (torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * 40).bfloat16()
    ce, kl = token_costs(logits, torch.zeros(4, dtype=torch.long), logits.flip(0))
    assert torch.isfinite(ce).all()
    assert torch.isfinite(kl).all()


# ---------------------------------------------------------------- the laws


def test_identity_recovers_everything(lm, source, identity):
    metrics = evaluate(
        identity(lm.d_model), source, model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER, controls=False)
    ).metrics
    assert metrics.ce_sae.value == metrics.ce_clean.value
    assert metrics.ce_recovered_zero.value == 1.0
    assert metrics.ce_recovered_mean.value == 1.0
    assert metrics.kl.value == 0.0
    assert metrics.ce_clean.value < metrics.ce_mean.value < metrics.ce_zero.value
    assert metrics.ce_clean.low is None
    assert "at least 40 documents; there are 8" in metrics.ce_clean.reason


def test_an_sae_that_answers_zero_or_the_mean_recovers_nothing(lm, source, constant):
    rows = torch.cat([batch.x for batch in source.batches(4096)])
    saes = [constant(torch.zeros(lm.d_model)), constant(rows.mean(0))]
    result = evaluate(saes, source, model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER, controls=False))
    zero, mean = (entry.metrics for entry in result.entries)
    assert zero.ce_sae.value == pytest.approx(zero.ce_zero.value, abs=1e-6)
    assert zero.ce_recovered_zero.value == pytest.approx(0, abs=1e-6)
    assert mean.ce_recovered_mean.value == pytest.approx(0, abs=1e-4)
    assert zero.kl.value > 0


def test_ablations_equal_a_plain_forward_pass_and_the_one_that_costs_less_leads(lm, source, constant):
    """Every token of the text is replaced and BOS is not; what leads is the smaller of the two cross-entropies."""
    mean = torch.cat([batch.x for batch in source.batches(4096)]).double().mean(0).float()
    result = evaluate(
        constant(mean / 2), source, model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER, controls=False)
    )
    costs = {}
    block = lm.model.model.layers[LAYER]
    for name, row in (("clean", None), ("zero", torch.zeros_like(mean)), ("mean", mean), ("sae", mean / 2)):
        total = count = 0.0
        for text in TEXTS:
            ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
            is_text = ids[0] != lm.tokenizer.bos_token_id

            def replace(module, inputs, output, row=row, is_text=is_text):
                x = output[0] if isinstance(output, tuple) else output
                x = x if row is None else torch.where(is_text[None, :, None], row, x)
                return (x, *output[1:]) if isinstance(output, tuple) else x

            handle = block.register_forward_hook(replace)
            with torch.no_grad():
                log_p = lm.model(input_ids=ids).logits[0].double().log_softmax(-1)
            handle.remove()
            total -= float(log_p[:-1].gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
        costs[name] = total / count
    for name, cost in costs.items():
        assert result.metrics[f"ce_{name}"].value == pytest.approx(cost, rel=1e-4)
    for name in ("zero", "mean"):
        expected = (costs[name] - costs["sae"]) / (costs[name] - costs["clean"])
        assert result.metrics[f"ce_recovered_{name}"].value == pytest.approx(expected, abs=1e-4)
    assert costs["mean"] < costs["zero"]
    assert result.language_model["leading_ablation"] == "mean"
    heading = result.table()[0]
    assert heading.index("recovered (mean)") < heading.index("recovered (zero)")
    assert (
        f"recovered from mean-ablation, CE {costs['mean']:.3g} (zero-ablation: {costs['zero']:.3g})" in result.caption()
    )


def test_what_leads_is_the_ablation_that_costs_less_whichever_it_is():
    assert leading_ablation(2.0, 3.0) == "zero"
    measured = {"ce_recovered_zero": Measured(0.5), "ce_recovered_mean": Measured(0.6)}
    assert leading_recovered(measured) == ("ce_recovered_zero", "ce_recovered_mean")
    plain = {"ce_recovered_zero": {"value": None}, "ce_recovered_mean": {"value": 0.6}}
    assert leading_recovered(plain) == ("ce_recovered_mean", "ce_recovered_zero")
    assert leading_recovered({"fvu": 1}) == ()


def test_controls_get_cross_entropies_too_and_differences_are_paired(lm, source):
    result = evaluate(random_sae(lm.d_model), source, model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER))
    names = {"ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_recovered_zero", "ce_recovered_mean", "kl"}
    assert names <= set(result.metrics)
    for control in result.controls.values():
        assert names <= set(control.metrics)
        assert control.metrics.ce_clean == result.metrics.ce_clean
        difference = control.differences.ce_sae
        assert difference.value == pytest.approx(result.metrics.ce_sae.value - control.metrics.ce_sae.value)
    plain = result.to_json()
    assert plain["metrics"]["ce_recovered_zero"]["unit"] == "fraction"
    assert plain["language_model"]["n_tokens"] == result.language_model["n_tokens"] > 100
    assert [line[0] for line in result.table()] == ["", "topk-256-k8", "  untrained", "  pca"]
    assert "recovered (zero)" in result.table()[0]
    assert type(result).from_json(plain) == result


def test_predicted_tokens_are_those_of_the_texts(lm, source, identity):
    """Every token of the text but a first one that nothing comes before; added tokens are never predicted."""
    result = evaluate(
        identity(lm.d_model),
        source,
        model=lm,
        data=TEXTS,
        settings=EvaluationSettings(layer=LAYER, controls=False, intervals=False),
    )
    encoded = [lm.tokenizer(text)["input_ids"] for text in TEXTS]
    assert result.language_model["n_tokens"] == sum(len(ids) - 1 for ids in encoded)
    assert result.language_model["n_documents"] == len(TEXTS)
    with torch.no_grad():
        losses = [
            lm.model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
            for ids in encoded
        ]
    expected = sum(losses) / result.language_model["n_tokens"]
    assert result.metrics.ce_clean.value == pytest.approx(expected, rel=1e-5)


def test_forward_batching_changes_nothing_beyond_rounding(lm, source, monkeypatch):
    sae = random_sae(lm.d_model)

    def measured():
        return evaluate(
            sae, source, model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER, controls=False)
        ).metrics

    together = measured()
    monkeypatch.setattr("saekit.measure.fidelity.BATCH_TOKENS", 1)
    monkeypatch.setattr("saekit.measure.fidelity.LOGITS", 1)
    apart = measured()
    for name in ("ce_clean", "ce_sae", "ce_zero", "kl", "ce_recovered_zero"):
        assert together[name].value == pytest.approx(apart[name].value, rel=1e-4)


def test_tokens_limits_the_texts_read(lm, source, identity):
    result = evaluate(
        identity(lm.d_model),
        source,
        model=lm,
        data=TEXTS,
        settings=EvaluationSettings(layer=LAYER, tokens=30, controls=False),
    )
    assert 30 <= result.language_model["n_tokens"] < 90
    assert result.metrics.ce_clean.low is None
    none = evaluate(
        identity(lm.d_model),
        source,
        model=lm,
        data=TEXTS,
        settings=EvaluationSettings(layer=LAYER, tokens=0, controls=False),
    )
    assert none.language_model is None
    assert none.settings["cross_entropy"] == "not measured: tokens = 0"
    assert "ce_sae" not in none.metrics


def test_rows_come_from_the_model_when_none_are_given(lm, identity):
    sae = identity(lm.d_model).replace(provenance={"hook": f"layers.{LAYER}"})
    result = evaluate(
        sae,
        model=lm,
        data=iter(TEXTS),
        settings=EvaluationSettings(max_rows=200, tokens=60, controls=False, intervals=False),
    )
    assert result.n_rows >= 190
    assert result.rows["hook"] == f"layers.{LAYER}"
    assert result.language_model["hook"] == f"layers.{LAYER}"
    assert result.metrics.fvu.value == 0


def test_skipped_tokens_pass_through_unchanged(lm, source, constant, monkeypatch):
    """With a norm limit of 0 every token is too long to be replaced, so nothing changes."""
    sae = constant(torch.zeros(lm.d_model))
    monkeypatch.setattr(Skipped, "by", classmethod(lambda cls, info: cls(True, 0.0)))
    metrics = evaluate(
        sae, source, model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER, controls=False, intervals=False)
    ).metrics
    assert metrics.ce_sae.value == metrics.ce_clean.value == metrics.ce_zero.value
    assert math.isnan(metrics.ce_recovered_zero.value)
    assert "costs the model nothing" in metrics.ce_recovered_zero.reason


def test_replacing_added_tokens_as_well_costs_more(lm, source, constant, monkeypatch):
    sae = constant(torch.zeros(lm.d_model))

    def ce_zero(special):
        monkeypatch.setattr(Skipped, "by", classmethod(lambda cls, info: cls(special, None)))
        return evaluate(
            sae, source, model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER, controls=False, intervals=False)
        ).metrics.ce_zero.value

    assert ce_zero(False) != ce_zero(True)


def test_filters_of_the_rows_are_taken_over(source):
    skipped = Skipped.by(source.info)
    assert skipped.special
    assert skipped.norm == source.info["filters"]["outliers"]["limit"]
    assert Skipped.by({}) == Skipped(True, None)
    assert Skipped.by({"filters": {"special": {"skipped": False}, "outliers": None}}) == Skipped(False, None)


def test_an_encoder_has_no_cross_entropy_and_the_result_says_so(minilm, identity):
    encoder = load_model(minilm, device="cpu", dtype="float32")
    result = evaluate(
        identity(encoder.d_model),
        model=encoder,
        data=TEXTS[:2],
        settings=EvaluationSettings(layer=1, controls=False, intervals=False),
    )
    assert result.language_model is None
    assert "not a causal language model" in result.settings["cross_entropy"]
    assert result.metrics.fvu.value == 0


# ---------------------------------------------------------------- refusals


def test_calls_that_cannot_work_are_refused(lm, source, identity):
    sae = identity(lm.d_model)
    with pytest.raises(ConfigError, match="does not say where in the model"):
        evaluate(sae, model=lm, data=TEXTS)
    two = [sae.replace(provenance={"hook": f"layers.{layer}"}) for layer in (0, 1)]
    with pytest.raises(ConfigError, match="must belong to one hook"):
        evaluate(two, model=lm, data=TEXTS)
    with pytest.raises(ShapeError, match="its residual stream has"):
        evaluate(identity(8), torch.ones(10, 8), model=lm, data=TEXTS, settings=EvaluationSettings(layer=LAYER))
    with pytest.raises(DataError, match="at least two tokens"):
        evaluate(
            sae, source, model=_without_bos(lm), data=["a"], settings=EvaluationSettings(layer=LAYER, controls=False)
        )


def test_rows_of_another_model_are_refused(lm, source, identity):
    import dataclasses

    other = dataclasses.replace(lm, digest="sha256:00", name="another")
    with pytest.raises(ConfigError, match="captured from `builtin` with other weights"):
        evaluate(identity(lm.d_model), source, model=other, data=TEXTS, settings=EvaluationSettings(layer=LAYER))


def test_a_model_that_gives_nan_is_refused(lm, source, identity):
    import copy
    import dataclasses

    model = copy.deepcopy(lm.model)
    model.get_output_embeddings().weight[0, 0] = math.nan
    broken = dataclasses.replace(lm, model=model)
    with pytest.raises(DataError, match="must be finite; it is not on its own activations"):
        evaluate(
            identity(lm.d_model),
            source,
            model=broken,
            data=TEXTS,
            settings=EvaluationSettings(layer=LAYER, controls=False),
        )


def _without_bos(lm):
    import copy
    import dataclasses

    from tokenizers import processors

    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return dataclasses.replace(lm, tokenizer=tokenizer)


def test_predicted_is_what_follows_a_token_wherever_the_padding_is():
    def places(position: list[int], attended: list[int]) -> list[bool]:
        inputs = {"attention_mask": torch.tensor([attended])}
        at = torch.tensor([position], dtype=torch.int32)
        batch = TokenBatch(inputs, at >= 0, torch.zeros_like(at), at, (0,))
        return predicted_positions(batch)[0].tolist()

    assert places([0, 1, 2, -1, -1], [1, 1, 1, 0, 0]) == [True, True, False, False]
    assert places([-1, -1, 0, 1, 2], [0, 0, 1, 1, 1]) == [False, False, True, True]
    assert places([-1, -1, 0, 1, -1], [0, 1, 1, 1, 1]) == [False, True, True, False]  # a token added on either side


def test_the_beginning_of_a_long_text_is_enough(models, texts, monkeypatch):
    """Contexts for a few tokens are those of the whole text, of which only a part is tokenized."""
    from saekit.inputs.texts import read_texts

    lm = models["llama"]
    read = read_texts(["the cat", " ".join(texts) * 60, *texts])
    seen = []
    tokenize = fidelity.tokenize
    monkeypatch.setattr(
        fidelity, "tokenize", lambda tok, chunk, **how: seen.append(sum(map(len, chunk))) or tokenize(tok, chunk, **how)
    )
    whole = tokenize(lm.tokenizer, read, context=20)
    for tokens in (5, 800, 4000, 12_000, 10**6):
        found = fidelity.contexts_for(lm, read, 20, tokens)
        n = len(found.ids)
        assert (found.ids == whole.ids[:n]).all()
        assert (found.document == whole.document[:n]).all()
    assert seen[0] < 10_100 < len(read[1])


@pytest.mark.parametrize("hook", ["layers.2", "layers.2.mlp"])
def test_blocks_before_the_hook_run_once_per_batch_and_change_no_bit(lm, hook, monkeypatch):
    sae = random_sae(lm.d_model)
    settings = EvaluationSettings(hook=hook, tokens=200, max_rows=200, controls=False)
    ran = []
    handle = lm.model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))

    def found():
        rows = capture(lm, TEXTS, hook=hook, progress=False)
        ran.clear()
        return evaluate(sae, rows, model=lm, data=TEXTS, settings=settings, progress=False)

    reused, n_reused = found(), len(ran)
    monkeypatch.setattr(fidelity.Prefix, "before", lambda *_: fidelity.Prefix(()))
    whole, n_whole = found(), len(ran)
    handle.remove()
    assert reused.metrics == whole.metrics
    assert (n_reused, n_whole) == (2, 4)  # once, and once more to see that a replayed pass is the same; every variant
    assert reused.language_model["blocks_reused"] == (3 if hook == "layers.2" else 2)
    assert whole.language_model["blocks_reused"] == 0
