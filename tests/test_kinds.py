"""Every kind of SAE through every verb: the numbers are those of a plain formula, or the kind is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import saekit as sk
from fixtures.tiny_models import TEXTS, WIDTH
from fixtures.tiny_models import folders as folders
from fixtures.tiny_models import models as models
from saekit import SAE, ArrayRows
from saekit.comparison.consensus import consensus
from saekit.errors import ConfigError
from saekit.estimators.features import SAEFeatures
from saekit.evaluation.settings import EvaluationSettings
from saekit.evaluation.verification import verify
from saekit.measure.controls import untrained_like
from saekit.measure.importance import importance
from saekit.rows.asks import Ask
from saekit.rows.document_pools import pool_batches
from saekit.sae.freeze import calibrate_batchtopk, freeze_gated
from saekit.sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.sizes.settings import PruneSettings, SizeSettings
from saekit.sizes.size_curve import measure_sizes
from saekit.store.opening import describe

N, K, LAYER = 40, 5, 1

pytestmark = pytest.mark.filterwarnings("ignore:the decoder rows of:saekit.errors.PlaceWarning")  # of kind `norms`


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base(seed: int = 0) -> SAE:
    """An SAE that reconstructs roughly: decoder rows of length 1, encoder near them."""
    W = torch.nn.functional.normalize(random(N, WIDTH, seed=seed), dim=1)
    b = 0.1 * random(WIDTH, seed=seed + 1)
    return SAE(
        W_enc=W + 0.05 * random(N, WIDTH, seed=seed + 2), b_enc=0.1 * random(N, seed=seed + 3), W_dec=W, b_dec=b,
        b_pre=b, rule=TopKRule(K), provenance={"hook": f"layers.{LAYER}"},
    )  # fmt: skip


def gated(sae: SAE) -> SAE:
    return freeze_gated(
        W_gate=sae.W_enc, b_gate=0.1 * random(N, seed=5), r_mag=0.1 * random(N, seed=6), b_mag=0.1 * random(N, seed=7),
        W_dec=sae.W_dec, b_dec=sae.b_dec, b_pre=sae.b_pre, provenance=sae.provenance,
    )  # fmt: skip


LENGTHS = torch.linspace(0.2, 5, N)
KINDS = {
    "topk": lambda sae: sae,
    "signed topk": lambda sae: sae.replace(rule=TopKRule(K, sign="signed"), b_enc=sae.b_enc - 3),
    "abstopk": lambda sae: sae.replace(rule=TopKRule(K, sign="magnitude")),
    "weighed topk": lambda sae: sae.replace(rule=TopKRule(K, rank=LENGTHS)),
    "capped thresholds": lambda sae: sae.replace(rule=TopKRule(K, threshold=torch.linspace(0.2, 1.5, N))),
    "relu": lambda sae: sae.replace(rule=ReLURule()),
    "jumprelu": lambda sae: sae.replace(rule=JumpReLURule(torch.linspace(-0.2, 2, N))),
    "groupmax": lambda sae: sae.replace(rule=GroupMaxRule(K)),
    "gated": gated,
    "no b_pre": lambda sae: sae.replace(b_pre=None),
    "own b_pre": lambda sae: sae.replace(b_pre=sae.b_dec * 2),
    "norms": lambda sae: sae.replace(W_dec=sae.W_dec * LENGTHS[:, None], W_enc=sae.W_enc / LENGTHS[:, None]),
    "scalar": lambda sae: sae.replace(scaling=Scaling("scalar", torch.tensor(0.7))),
    "standardize": lambda sae: sae.replace(
        scaling=Scaling("standardize", torch.linspace(0.5, 2, WIDTH), 0.1 * random(WIDTH, seed=8))
    ),
    "layer norm": lambda sae: sae.replace(scaling=Scaling("layer_norm")),
    "row norm": lambda sae: sae.replace(scaling=Scaling("row_norm")),
    "layer norm, abstopk": lambda sae: sae.replace(scaling=Scaling("layer_norm"), rule=TopKRule(K, sign="magnitude")),
    "skip": lambda sae: sae.replace(W_skip=0.1 * random(WIDTH, WIDTH, seed=9)),
    "prefix": lambda sae: sae.replace(rule=TopKRule(K, sign="magnitude")).take(N - 7),
}
"""Kinds by name, made from the same directions."""

SIGNED = ("signed topk", "abstopk", "layer norm, abstopk", "prefix")


def groups(sae: SAE) -> list[list[int]]:
    """Return the latents of each group."""
    n = sae.n_latents
    group = torch.arange(n) // (n // sae.rule.k) if sae.rule.group is None else sae.rule.group
    return [(group == each).nonzero().flatten().tolist() for each in group.unique()]


def plain(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense codes and reconstructions, written down from the formulas, in float64."""
    t = {name: value.double() for name, value in sae.tensors().items()}
    x, kind = x.double(), sae.scaling.kind
    shift, factor = torch.zeros(len(x), 1), torch.ones(len(x), 1)
    if kind == "layer_norm":
        shift, factor = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        u = (x - shift) / (factor + sae.scaling.eps)
    elif kind == "row_norm":
        factor = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
        u = x / factor
    else:
        u = (x - t.get("scaling.mean", 0)) * t.get("scaling.scale", 1)
    pre = (u - t.get("b_pre", 0)) @ t["W_enc"].T + t["b_enc"]
    z = torch.zeros_like(pre)
    for row, values in enumerate(pre):
        if sae.rule.name == "topk":
            score = (values * t.get("rule.rank", 1)).tolist()
            chosen = sorted(
                range(len(values)), key=lambda j: -abs(score[j]) if sae.rule.sign == "magnitude" else -score[j]
            )
            for j in chosen[: sae.rule.k]:
                z[row, j] = values[j] if sae.rule.sign != "positive" else max(values[j], 0)
                if "rule.threshold" in t and values[j] <= t["rule.threshold"][j]:
                    z[row, j] = 0
        elif sae.rule.name == "groupmax":
            for members in groups(sae):
                best = max(members, key=lambda j: values[j])
                z[row, best] = max(values[best], 0)
        else:
            z[row] = torch.where(values > t.get("rule.threshold", torch.zeros(())), values.clamp(min=0), 0.0)
    y = z @ t["W_dec"] + t["b_dec"]
    y = y if sae.W_skip is None else y + u @ t["W_skip"]
    if kind in ("layer_norm", "row_norm"):
        return z, y * factor + shift
    return z, y / t.get("scaling.scale", 1) + t.get("scaling.mean", 0)


@pytest.fixture(scope="module")
def lm(models):
    return models["llama"]


@pytest.fixture(scope="module")
def rows(lm) -> ArrayRows:
    """Rows of a tiny model, about 280."""
    return sk.capture(lm, TEXTS, layer=LAYER, progress=False)


@pytest.fixture(scope="module")
def x(rows) -> Tensor:
    return next(rows.batches(10_000)).x


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def sae(kind, x) -> SAE:
    scale = float(x.std())
    made = KINDS[kind](base())
    return made if made.scaling.kind != "none" else made.replace(b_dec=made.b_dec * scale)


def fvu_of(x: Tensor, x_hat: Tensor) -> float:
    x = x.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def test_codes_and_reconstructions(sae, x, kind):
    z, x_hat = plain(sae, x)
    torch.testing.assert_close(sae.encode(x).to_dense().double(), z, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(sae.reconstruct(x).double(), x_hat, atol=1e-3, rtol=1e-4)
    assert bool((z < 0).any()) == (kind in SIGNED)


def test_evaluate(sae, x, rows):
    z, x_hat = plain(sae, x)
    found = sk.evaluate(sae, rows, progress=False)
    assert found.metrics.fvu.value == pytest.approx(fvu_of(x, x_hat), rel=1e-4)
    assert found.metrics.l0.value == pytest.approx(float((z != 0).double().sum(1).mean()), rel=1e-3)
    assert found.metrics.dead_fraction.value == pytest.approx(float((z == 0).all(0).double().mean()), abs=1e-9)
    untrained = found.controls["untrained"].metrics
    assert untrained.l0.value == pytest.approx(found.metrics.l0.value, rel=0.25)


def test_cross_entropy(sae, rows, lm):
    text = " ".join(TEXTS[3].split()[: lm.context - 1])
    settings = EvaluationSettings(tokens=10, controls=False)
    found = sk.evaluate(sae, rows, model=lm, data=[text], settings=settings, progress=False).metrics
    ids = torch.tensor([lm.tokenizer(text)["input_ids"]])
    limit = rows.info["filters"]["outliers"]["limit"]

    def replaced(module, args, output):
        hidden = output if isinstance(output, Tensor) else output[0]
        kept = (hidden[0].norm(dim=1, keepdim=True) > limit) | (torch.arange(hidden.shape[1]) == 0)[:, None]
        new = torch.where(kept, hidden[0], plain(sae, hidden[0])[1].to(hidden))[None]
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = lm.model.model.layers[LAYER].register_forward_hook(replaced)
    with torch.no_grad():
        logits = lm.model(ids).logits[0, :-1].double()
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[1:], ids[0, 2:], reduction="mean")
    whole = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="mean")
    assert found.ce_sae.value == pytest.approx(float(whole), abs=2e-3) or found.ce_sae.value == pytest.approx(
        float(loss), abs=2e-3
    )


def test_importance_is_that_of_leaving_each_latent_out(sae, x, rows):
    z, x_hat = plain(sae, x)
    found = importance(sae, rows).scores
    expected = {"energy": z.square().mean(0), "frequency": (z != 0).double().mean(0), "mean": z.abs().mean(0)}
    whole = (x - x_hat).square().sum(1)
    some = range(0, sae.n_latents, 5)
    losses = []
    for j in some:
        without = plain(sae.replace(W_dec=sae.W_dec.index_fill(0, torch.tensor([j]), 0)), x)[1]
        losses.append((x - without).square().sum(1).sub(whole).mean())
    scale = float(found["loss"].abs().max())
    torch.testing.assert_close(found["loss"][list(some)], torch.stack(losses).double(), atol=1e-3 * scale, rtol=1e-3)
    for name, values in expected.items():
        scale = float(values.abs().max())
        torch.testing.assert_close(found[name], values.double(), atol=1e-3 * scale, rtol=1e-3, msg=name)


def test_weighted_energy_does_not_depend_on_the_lengths_of_decoder_rows(sae, rows):
    one, other = (importance(each, rows).scores["weighted_energy"] for each in (sae, sae.fold_norms()))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.max()))


def test_prune(sae, x, rows, kind):
    small = sk.prune(sae, rows, sizes=[10], by="mean", progress=False)[0]
    z, _ = plain(sae, x)
    best = z.abs().mean(0).argsort(descending=True)[:10]
    torch.testing.assert_close(small.W_dec, sae.W_dec[best])
    refitted = sk.prune(sae, rows, sizes=[10], by="energy", settings=PruneSettings(refit=True), progress=False)[0]
    before = sk.prune(sae, rows, sizes=[10], by="energy", progress=False)[0]
    # in units of the rows, up to the epsilon of a layer norm
    assert fvu_of(x, plain(refitted, x)[1]) <= fvu_of(x, plain(before, x)[1]) + 1e-3
    after = PruneSettings(selection="after")
    if kind in SIGNED:
        with pytest.raises(ConfigError, match="signed codes"):
            sk.prune(sae, rows, sizes=[10], settings=after, progress=False)
    else:
        assert not bool((plain(sk.prune(sae, rows, sizes=[10], settings=after, progress=False)[0], x)[0] < 0).any())


def test_sizes_and_their_latents(sae, x, rows):
    ranked = sk.rank(sae, rows, by="energy", progress=False)
    settings = SizeSettings(latents=True, selection="after", sample_rows=50)
    curve = measure_sizes(ranked, rows, [8, sae.n_latents], settings=settings, progress=False)
    z, x_hat = plain(ranked, x)
    assert curve.points[1].metrics.fvu.value == pytest.approx(fvu_of(x, x_hat), rel=1e-4)
    competes = sae.rule.name in ("topk", "groupmax")
    kept = z[:, :8] if competes else plain(ranked.take(8), x)[0]
    assert curve.points[0].metrics.l0.value == pytest.approx(float((kept != 0).double().sum(1).mean()), rel=1e-3)
    for point in curve.points:
        assert 0 <= point.metrics.purity.value <= 1
        assert 0 <= point.metrics.detection.value <= 1
        assert point.metrics.description_length.value > 0


def test_compare(sae, rows, kind):
    other = sae.permute(torch.arange(sae.n_latents).flip(0)).fold_norms()
    found = sk.compare([sae, other], rows, progress=False)
    assert found.shared.value == 1
    assert found.pairs[0].on_rows.correlation.value == pytest.approx(1, abs=1e-4)


def test_codes_signed_by_magnitude_are_not_pooled_and_compared_with_positive_ones_warned_of(rows):
    sae = KINDS["abstopk"](base())
    flipped = sae.replace(W_enc=-sae.W_enc, b_enc=-sae.b_enc, W_dec=-sae.W_dec)
    torch.testing.assert_close(sae.reconstruct(torch.eye(WIDTH)), flipped.reconstruct(torch.eye(WIDTH)))
    found = sk.compare([sae, flipped], progress=False)
    assert found.shared.value == 1
    assert "signed_codes" not in {each.code for each in found.warnings}
    mixed = sk.compare([sae, base()], progress=False)
    assert "signed_codes" in {each.code for each in mixed.warnings}
    with pytest.raises(ConfigError, match="a latent and its negative are the same"):
        consensus([sae, flipped], rows, progress=False)


def test_pooled_features(sae, x):
    z, _ = plain(sae, x[:60])
    document = torch.arange(60) // 20
    pools = ("sum", "mean", "max", "count", "last", "first", "top3")
    (found,) = pool_batches([({"layers.1": x[:60]}, document)], 3, [Ask(pools, sae=sae, hook="layers.1")])
    for d in range(3):
        part = z[20 * d : 20 * d + 20]
        strongest = part.abs().argsort(dim=1, descending=True, stable=True)[:, :3]
        top = torch.zeros_like(part).scatter(1, strongest, 1.0) * (part != 0)
        signed = part.gather(0, part.abs().argmax(0, keepdim=True))[0]
        expected = {
            "sum": part.sum(0), "mean": part.mean(0), "max": signed, "count": (part != 0).double().sum(0),
            "last": part[-1], "first": part[0], "top3": top.sum(0),
        }  # fmt: skip
        for name, values in expected.items():
            mine = torch.from_numpy(found[name][d].toarray()[0]).double()
            torch.testing.assert_close(mine, values, atol=2e-3, rtol=1e-3, msg=f"{name} of {d}")


def test_estimators(sae, x):
    features = SAEFeatures(None, sae).fit_transform(x.numpy())
    torch.testing.assert_close(
        torch.from_numpy(features.toarray()).double(), plain(sae, x)[0], atol=2e-4, rtol=1e-4
    )  # fmt: skip


def test_untrained_control_fires_as_often(sae, x, kind):
    l0 = float((plain(sae, x)[0] != 0).double().sum(1).mean())
    control = untrained_like(sae, x.mean(0), x, l0, 0)
    assert control.encode(x).l0() == pytest.approx(l0, rel=0.25)
    assert control.scaling.kind == sae.scaling.kind


def test_progressive(sae, rows):
    found = sk.progressive({"one": sae}, rows, sizes=[8, sae.n_latents], progress=False)
    by = {(curve.name, curve.size): curve.metrics.fvu.value for curve in found.curves}
    assert all(np.isfinite(value) for value in by.values())


def test_files_and_what_is_shown(sae, x, tmp_path):
    sae.save(tmp_path / "sae")
    back = SAE.load(tmp_path / "sae")
    assert back.digest() == sae.digest()
    torch.testing.assert_close(SAE.load(tmp_path / "sae", latents=9).W_dec, sae.W_dec[:9])
    assert describe(tmp_path / "sae")["rule"]["name"] == sae.rule.name


def test_report(sae, rows, tmp_path):
    sk.evaluate(sae, rows, progress=False).save(tmp_path / "evaluation.json")
    sk.compare([sae, sae.fold_norms()], progress=False).save(tmp_path / "comparison.json")
    assert sk.write_report(tmp_path).is_file()


def test_verify(sae, lm):
    found = verify(sae, lm, TEXTS, tokens=200, progress=False)
    assert found.hook == f"layers.{LAYER}"
    assert np.isfinite(found.fvu.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_number_types(dtype, x, rows):
    sae = base().to(dtype=dtype)
    exact = sk.evaluate(base(), rows, progress=False).metrics
    found = sk.evaluate(sae, rows, progress=False).metrics
    assert found.fvu.value == pytest.approx(exact.fvu.value, rel=0.05)
    assert found.l0.value == pytest.approx(exact.l0.value, rel=0.02)
    scores = importance(sae, rows).scores["energy"]
    assert float(torch.corrcoef(torch.stack([scores, importance(base(), rows).scores["energy"]]))[0, 1]) > 0.99
    assert sk.prune(sae, rows, sizes=[10], progress=False)[0].dtype == dtype
    assert sk.compare([sae, base()], rows, progress=False).shared.value == 1


def test_thresholds_of_batchtopk_are_calibrated_on_rows(x):
    sae = base()
    found = calibrate_batchtopk(sae, x, K)
    assert found.encode(x).l0() == pytest.approx(K, abs=1 / len(x))
    pre = sae.pre(x)
    assert torch.equal(found.encode(x).to_dense(), pre.relu() * (pre > found.provenance["calibrated"]["threshold"]))
    assert found.provenance["calibrated"]["n_rows"] == len(x)
    assert calibrate_batchtopk(sae, x, 10 * N).encode(x).l0() == pytest.approx(float((pre > 0).sum() / len(x)))
