"""A transcoder is measured against the rows that it predicts, in every verb that measures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import saekit as sk
from fixtures.tiny_models import CONTEXT, TEXTS
from fixtures.transcoders import IN, LAYER, OUT
from saekit import ArrayRows
from saekit.errors import ConfigError, ShapeError
from saekit.evaluation.settings import EvaluationSettings
from saekit.measure.accumulators import fvu
from saekit.measure.linear import Regression
from saekit.measure.pca import Covariance
from saekit.rows.settings import CaptureSettings, StreamSettings
from saekit.rows.stream import stream
from saekit.sae.rules import JumpReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.sizes.settings import PruneSettings

FEW = EvaluationSettings(tokens=100, max_rows=200)


@pytest.fixture(scope="module")
def pairs(relu_lm):
    """Inputs of an MLP with what it adds."""
    settings = CaptureSettings(target=OUT, outliers=None)
    return sk.capture(relu_lm, TEXTS, hook=IN, settings=settings, progress=False)


def plainly(lm, texts, replaced=None):
    """Return inputs and outputs of the MLP by torch hooks, and the mean cross-entropy with its output replaced."""
    mlp = lm.model.transformer.h[LAYER].mlp
    xs, ys, losses = [], [], []

    def change(module, args, output):
        xs.append(args[0][0])
        ys.append(output[0])
        return output if replaced is None else replaced(args[0][0], output[0])[None]

    handle = mlp.register_forward_hook(change)
    for text in texts:
        ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logits = lm.model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    handle.remove()
    return torch.cat(xs), torch.cat(ys), float(torch.cat(losses).double().mean())


SHORT = [text for text in TEXTS if 2 <= len(text.split()) <= CONTEXT]


def test_the_mlp_itself_as_a_transcoder_is_perfect(perfect, relu_lm, pairs):
    found = sk.evaluate(perfect, pairs, model=relu_lm, data=TEXTS, settings=FEW, progress=False).metrics
    assert found.fvu.value < 1e-10
    assert found.ce_sae.value == pytest.approx(found.ce_clean.value, abs=1e-6)
    assert found.ce_recovered_mean.value == pytest.approx(1, abs=1e-4)
    assert found.ce_mean.value != pytest.approx(found.ce_clean.value, abs=1e-3)
    made = sk.evaluate(perfect, model=relu_lm, data=TEXTS, settings=FEW, progress=False).metrics
    assert made.fvu.value < 1e-10


def test_captured_and_streamed_pairs_are_what_torch_hooks_see(relu_lm):
    x, y, _ = plainly(relu_lm, SHORT)
    settings = CaptureSettings(target=OUT, outliers=None)
    pairs = sk.capture(relu_lm, SHORT, hook=IN, settings=settings, progress=False)
    whole = next(pairs.batches(10_000))
    torch.testing.assert_close(whole.x, x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(whole.target, y, atol=1e-5, rtol=1e-4)
    streamed = stream(relu_lm, SHORT, hook=IN, settings=StreamSettings(target=OUT, outliers=None))
    torch.testing.assert_close(
        torch.cat([each.target for each in streamed.batches(7)]), y, atol=1e-5, rtol=1e-4
    )  # fmt: skip
    assert (pairs.info["hook"], pairs.info["hook_out"], pairs.info["d_out"]) == (IN, OUT, y.shape[1])
    shuffled = next(pairs.batches(64, seed=0))
    for row, target in zip(shuffled.x[:5], shuffled.target[:5]):
        assert torch.equal(whole.target[int((whole.x - row).abs().sum(1).argmin())], target)


def test_the_norm_of_the_input_decides_which_pairs_are_left_out(relu_lm):
    x, y, _ = plainly(relu_lm, SHORT)
    pairs = sk.capture(relu_lm, SHORT, hook=IN, settings=CaptureSettings(target=OUT, outliers=1.1), progress=False)
    kept = x.norm(dim=1) <= pairs.info["filters"]["outliers"]["limit"]
    assert 0 < int(kept.sum()) < len(x)
    torch.testing.assert_close(next(pairs.batches(10_000)).target, y[kept], atol=1e-5, rtol=1e-4)


def test_numbers_are_those_of_plain_torch(rough, relu_lm):
    settings = CaptureSettings(target=OUT, outliers=None)
    rows = sk.capture(relu_lm, SHORT, hook=IN, settings=settings, progress=False)
    metrics = sk.evaluate(rough, rows, model=relu_lm, data=SHORT, settings=FEW, progress=False).metrics
    x, y, clean = plainly(relu_lm, SHORT)
    hidden = (x @ rough.W_enc.T + rough.b_enc).relu()
    y_hat = hidden @ rough.W_dec + rough.b_dec
    plain = float((y - y_hat).double().square().sum() / (y - y.mean(0)).double().square().sum())
    assert metrics.fvu.value == pytest.approx(plain, rel=1e-5)
    assert metrics.l0.value == pytest.approx(float((hidden > 0).double().sum(1).mean()), rel=1e-6)
    assert metrics.cosine.value == pytest.approx(float(torch.cosine_similarity(y, y_hat).double().mean()), abs=1e-5)
    assert metrics.ce_clean.value == pytest.approx(clean, abs=1e-5)
    costs = {
        "ce_sae": lambda x, _: (x @ rough.W_enc.T + rough.b_enc).relu() @ rough.W_dec + rough.b_dec,
        "ce_zero": lambda _, y: torch.zeros_like(y),
        "ce_mean": lambda _, out: y.mean(0).expand_as(out),
    }
    for name, replaced in costs.items():
        assert metrics[name].value == pytest.approx(plainly(relu_lm, SHORT, replaced)[2], abs=1e-4), name
    assert 0.001 < metrics.fvu.value < 1
    assert metrics.ce_sae.value != pytest.approx(metrics.ce_clean.value, abs=1e-3)


def test_baselines_are_the_best_affine_maps(rough, pairs):
    found = sk.evaluate(rough, pairs, settings=EvaluationSettings(), progress=False)
    assert set(found.controls) == {"linear", "affine"}
    assert "no untrained transcoder" in " ".join(each.message for each in found.warnings)
    batch = next(pairs.batches(10_000))
    x, y = batch.x.double().numpy(), batch.target.double().numpy()
    whole = np.concatenate([x, np.ones((len(x), 1))], 1)
    best = (
        whole @ np.linalg.lstsq(whole, y, rcond=1e-6)[0]
    )  # rows behind a layer norm have a direction without variance
    residual = np.square(y - best).sum() / np.square(y - y.mean(0)).sum()
    assert found.controls["affine"].metrics.fvu.value == pytest.approx(residual, rel=1e-4)
    k = round(found.metrics.l0.value)
    left, size, right = np.linalg.svd(best - best.mean(0), full_matrices=False)
    low = best.mean(0) + (left[:, :k] * size[:k]) @ right[:k]
    residual = np.square(y - low).sum() / np.square(y - y.mean(0)).sum()
    assert found.controls["linear"].metrics.fvu.value == pytest.approx(residual, rel=1e-4)


def test_a_linear_map_of_rows_to_themselves_is_pca(rows):
    regression, covariance = Regression(24, 24), Covariance(24)
    regression.update(rows, rows)
    covariance.update(rows)
    for k in (1, 5, 24):
        torch.testing.assert_close(
            regression.compute().take(k).predict(rows), covariance.compute().take(k).reconstruct(rows),
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip


KINDS = {
    "topk": lambda sae: sae,
    "thresholds": lambda sae: sae.replace(rule=JumpReLURule(torch.full((sae.n_latents,), 0.7))),
    "signed": lambda sae: sae.replace(rule=TopKRule(2, sign="magnitude")),
    "scalar": lambda sae: sae.replace(scaling=Scaling("scalar", torch.tensor(0.5))),
    "row norm": lambda sae: sae.replace(scaling=Scaling("row_norm")),
    "skip": lambda sae: sae.replace(W_skip=torch.eye(sae.d_in) * 0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_with_its_own_rows_as_target_a_transcoder_is_the_sae(kind, oracle, rows):
    sae = KINDS[kind](oracle).replace(provenance={"hook": "layers.1"})
    same = sae.replace(provenance={"hook": "layers.1", "hook_out": "layers.2"})
    assert (sae.is_transcoder, same.is_transcoder) == (False, True)
    pairs = ArrayRows(rows, document=torch.arange(len(rows)) // 30, target=rows.clone())
    one, other = (sk.evaluate(each, pairs, progress=False) for each in (sae, same))
    of_sae, of_transcoder = one.metrics.to_json(), other.metrics.to_json()
    assert of_sae.pop("decoder_projection")
    assert "decoder_projection" not in of_transcoder
    assert of_sae == of_transcoder
    first, second = (sk.rank(each, pairs, by="loss", progress=False) for each in (sae, same))
    assert torch.equal(first.W_dec, second.W_dec)
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in first.scores)
    first, second = (
        sk.prune(each, pairs, sizes=[8], settings=PruneSettings(refit=True), progress=False)[0] for each in (sae, same)
    )
    torch.testing.assert_close(first.W_dec, second.W_dec)


def test_without_codes_a_skip_transcoder_is_an_affine_map(perfect, pairs):
    generator = torch.Generator().manual_seed(0)
    skip = torch.randn(perfect.d_in, perfect.d_out, generator=generator)
    silent = perfect.replace(b_enc=torch.full_like(perfect.b_enc, -1e6), W_skip=skip)
    batch = next(pairs.batches(10_000))
    expected = fvu(batch.target, batch.x @ skip + perfect.b_dec)
    found = sk.evaluate(silent, pairs, progress=False).metrics
    assert (found.l0.value, found.dead_fraction.value) == (0, 1)
    assert found.fvu.value == pytest.approx(expected, rel=1e-6)


def test_what_a_transcoder_cannot_be_measured_on_is_refused(perfect, pairs, oracle, rows, relu_lm):
    x = next(pairs.batches(10_000))
    with pytest.raises(ConfigError, match=r"must come with those that it predicts \(`layers.1.mlp`\)"):
        sk.evaluate(perfect, x.x, progress=False)
    with pytest.raises(ShapeError, match="target rows must have the width that the transcoder writes, 16"):
        sk.evaluate(perfect, ArrayRows(x.x, target=x.target[:, :3]), progress=False)
    plain = perfect.replace(provenance={"hook": IN})
    with pytest.raises(ConfigError, match="all must predict the same rows"):
        sk.evaluate([plain, perfect], pairs, progress=False)
    with pytest.raises(ConfigError, match="all must predict the same rows"):
        sk.compare([plain, perfect], progress=False)
    nameless = perfect.replace(provenance={"hook": IN, "transcoder": True, "hook_out_stated": "hook_somewhere"})
    with pytest.raises(ConfigError, match="calls their module `hook_somewhere`, which is none of saekit's names"):
        sk.evaluate(nameless, model=relu_lm, data=TEXTS, progress=False)
    with pytest.raises(ConfigError, match="`target` is for transcoders"):
        sk.evaluate(plain, model=relu_lm, data=TEXTS, settings=EvaluationSettings(target=OUT), progress=False)
    with pytest.raises(ShapeError, match="`target` must have one row per row"):
        ArrayRows(rows, target=rows[:4])
    other = perfect.replace(provenance={"hook": IN, "hook_out": "layers.0.mlp"})
    warned = sk.evaluate(other, pairs, progress=False).warnings
    assert "other_target" in {each.code for each in warned}


def test_target_can_be_given_where_the_file_names_none(perfect, relu_lm):
    nameless = perfect.replace(provenance={"transcoder": True})
    settings = EvaluationSettings(hook=IN, target=OUT, tokens=100, max_rows=200)
    found = sk.evaluate(nameless, model=relu_lm, data=TEXTS, settings=settings, progress=False)
    assert found.metrics.fvu.value < 1e-10
    assert found.language_model["hook_out"] == OUT
