"""Transcoders: gradients against a dense reference, the case y = x, the affine start, and the laws of a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fixtures.learners import B, N, equal, new_transcoder, rows, target_of
from saekit import stream, train, untrained
from saekit.errors import ConfigError, MissingModelError, ShapeError
from saekit.rows.arrays import ArrayRows
from saekit.rows.settings import StreamSettings
from saekit.sae.codes import Codes
from saekit.sae.model import SAE
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.learner import finish, permute
from saekit.training.losses import Context, hierarchical_loss, matryoshka_loss, relu_loss, topk_loss
from saekit.training.settings import TrainSettings
from saekit.training.step import plain_step

EVERY = [
    TopK(N, k=3, multi_topk=0.1, skip="zero", dead_after_rows=100),
    TopK(N, k=3, skip="least-squares", dead_after_rows=100),
    BatchTopK(N, k=3, l2=0.01, dead_after_rows=100),
    JumpReLU(N, target_l0=3, dead_after_rows=100),
    ReLU(N, dead_after_rows=100),
    Gated(N, target_l0=3, skip="zero", dead_after_rows=B),
    PAnneal(N, dead_after_rows=100),
    HierarchicalTopK(N, k=3, orthogonal=0.1, dead_after_rows=100),
    Matryoshka(N, k=3, skip="zero", dead_after_rows=100),
    TopK(N, k=3, subspace=0.5, control="soft-frozen-decoder", dead_after_rows=100),
]


def name(config):
    return f"{config.arch}-{config.skip}-{config.control}"


def double(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem():
    """Return parameters of a transcoder from 7 to 5 dimensions, rows and targets, the latter centred."""
    p = {"W_enc": double(24, 7), "b_enc": double(24, seed=1) * 0.3, "W_dec": double(24, 5, seed=2)}
    p |= {"b_dec": double(5, seed=3), "W_skip": double(7, 5, seed=4)}
    return p, double(13, 7, seed=5), double(13, 5, seed=6), double(5, seed=7)


def fvu(sae, x, y):
    return float((sae.reconstruct(x) - y).square().sum() / (y - y.mean(0)).square().sum())


# ------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", ["topk", "relu", "hierarchical", "matryoshka"])
def test_gradients_are_those_of_a_dense_reference(kind):
    p, x, y, center = problem()
    dead = torch.arange(24) % 3 == 0
    leaves = {key: t.clone().requires_grad_() for key, t in p.items()}
    pre = x @ leaves["W_enc"].T + leaves["b_enc"]
    base = leaves["b_dec"] - center + x @ leaves["W_skip"]

    def top(scores, k):
        return torch.zeros_like(scores).scatter_(1, scores.topk(k).indices, 1.0)

    def error(codes, size=24):
        return (y - codes[:, :size] @ leaves["W_dec"][:size] - base).square().sum(1).mean()

    V = (y - y.mean(0)).square().sum(1).mean()
    codes = pre.relu() * top(pre.detach(), 4)
    residual = (y - codes @ leaves["W_dec"] - base).detach()
    silent = pre.relu() * top(pre.detach().masked_fill(~dead, -torch.inf), 3)
    aux = (residual - silent @ leaves["W_dec"]).square().sum() / (residual - residual.mean(0)).square().sum()
    if kind == "topk":
        config, loss = TopK(24, k=4, skip="zero"), topk_loss
        expected = error(codes) + V / 32 * aux
    elif kind == "relu":
        config, loss = ReLU(24, skip="zero"), relu_loss
        norms = leaves["W_dec"].norm(dim=1)
        expected = error(pre.relu()) + 2 * (pre.relu() * norms).sum(1).mean()
    elif kind == "hierarchical":
        config, loss = HierarchicalTopK(24, k=4, levels=(2, 4), skip="zero"), hierarchical_loss
        expected = (error(pre.relu() * top(pre.detach(), 2)) + error(codes)) / 2 + V / 32 * aux
    else:
        config, loss = Matryoshka(24, k=4, sizes=(8, 24), skip="zero"), matryoshka_loss
        inner = pre[:, :8].relu() * top(pre[:, :8].detach(), 4)
        expected = (error(inner, 8) + error(codes)) / 2 + V / 32 * aux
    own = {key: t.float().requires_grad_() for key, t in p.items()}
    state = {"coefficient": torch.tensor(2.0), "distance": torch.tensor(0.0)}
    context = Context(config, center.float(), target=y.float(), dead=dead, k_aux=3, state=state)
    outcome = loss(own, x.float(), context)
    torch.testing.assert_close(outcome.loss.double(), expected, rtol=1e-4, atol=0)
    wanted = torch.autograd.grad(expected, list(leaves.values()))
    found = torch.autograd.grad(outcome.loss, list(own.values()))
    for key, one, other in zip(p, found, wanted):
        torch.testing.assert_close(
            one.double(), other, rtol=2e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_of_the_rows_themselves_it_is_the_sae_but_for_its_bias():
    """Only b_dec, which an SAE subtracts before the encoder as well, gets another gradient."""
    p, x, _, _ = problem()
    p = {key: t.float() for key, t in p.items() if key in ("W_enc", "b_enc")} | {
        "W_dec": double(24, 7, seed=2).float(), "b_dec": torch.zeros(7)
    }  # fmt: skip
    found = []
    for target in (None, x.float()):
        leaves = {key: t.clone().requires_grad_() for key, t in p.items()}
        outcome = topk_loss(leaves, x.float(), Context(TopK(24, k=4), torch.zeros(7), target=target))
        found.append((outcome.loss, *torch.autograd.grad(outcome.loss, list(leaves.values()))))
    for one, other in list(zip(*found))[:-1]:
        assert torch.equal(one, other)
    assert not torch.equal(found[0][-1], found[1][-1])


# ------------------------------------------------------------------------------------------------------- the start


def test_least_squares_without_codes_has_the_fvu_of_linear_regression():
    x = torch.cat(rows(20))
    y = target_of(x)
    source = ArrayRows(x, target=y)
    sae = untrained(TopK(N, k=3, skip="least-squares"), source)
    nothing = Codes(torch.zeros(len(x) + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), N)
    design = np.hstack([x.double().numpy(), np.ones((len(x), 1))])
    best = design @ np.linalg.lstsq(design, y.double().numpy(), rcond=None)[0]
    given = sae.decode(nothing, x).double().numpy()
    np.testing.assert_allclose(given, best, rtol=0, atol=2e-5)
    mean = untrained(TopK(N, k=3, skip="zero"), source)
    torch.testing.assert_close(mean.decode(nothing, x), y.mean(0).expand_as(y))


def test_a_planted_mlp_is_found():
    g = torch.Generator().manual_seed(0)
    W1, W2 = (torch.nn.functional.normalize(torch.randn(12, d, generator=g)) for d in (10, 14))
    x = torch.randn(20_000, 10, generator=g)
    source = ArrayRows(x + 3, target=(x @ W1.T - 1).relu() @ W2 + 5)
    (sae,) = train(BatchTopK(24, k=3), source, tokens=76_800, settings=TrainSettings(batch_rows=256), progress=False)
    assert (W2 @ sae.W_dec.T).max(1).values.min() > 0.95
    assert (W1 @ torch.nn.functional.normalize(sae.W_enc).T).max(1).values.min() > 0.95
    assert sae.provenance["metrics"]["fvu"] < 0.05


# ------------------------------------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("config", EVERY, ids=name)
def test_resumed_exactly_alone_as_together_and_back_from_its_file(config, tmp_path):
    x = torch.cat(rows(12))
    source = ArrayRows(x, target=target_of(x))
    settings = TrainSettings(batch_rows=B, checkpoint_every=4, log_every=1)
    options = {"tokens": 12 * B, "settings": settings, "progress": False}
    whole = train([config, TopK(N, k=2)], source, seeds=[0, 1], **options)

    class Stopped(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, source, seeds=[1], **options, out=tmp_path / "run", callbacks=[stop])
    (again,) = train(config, source, seeds=[1], **options, out=tmp_path / "run", resume=True)
    (folder,) = [path.parent for path in (tmp_path / "run").glob("*/sae.json")]
    loaded = SAE.load(folder)
    for key, t in whole[1].tensors().items():
        assert torch.equal(t, again.tensors()[key]), key
        assert torch.equal(t, loaded.tensors()[key]), key
    assert loaded.is_transcoder
    assert (loaded.W_skip is not None) == (config.skip is not None)


@pytest.mark.parametrize("config", EVERY, ids=name)
def test_the_finished_sae_gives_what_the_learner_gives(config):
    learner = new_transcoder(config)
    for x in rows(8):
        plain_step(learner, x, target_of(x))
    if learner.state.get("threshold") is not None:
        learner.state["threshold"] = learner.state["last_smallest"]
    (x,) = rows(1, seed=3)
    sae = finish(learner, {})
    learner.config = TopK(N, k=3, control="untrained") if config.arch == "topk" else learner.config
    before = {key: t.clone() for key, t in learner.parameters.items()}
    error = float(plain_step(learner, x, target_of(x)).error) / float(
        (target_of(x) - target_of(x).mean(0)).square().sum()
    )
    if config.arch != "batchtopk":  # whose selection depends on the batch
        assert fvu(sae, x, target_of(x)) == pytest.approx(error, rel=1e-4)
    if config.arch not in ("relu", "p-anneal"):
        torch.testing.assert_close(before["W_dec"].norm(dim=1), torch.ones(N))


@pytest.mark.parametrize("config", [EVERY[0], EVERY[5]], ids=name)
def test_permuting_latents_permutes_the_result(config):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    one, other = new_transcoder(config), permute(new_transcoder(config), order)
    for x in rows(5):
        plain_step(one, x, target_of(x))
        plain_step(other, x, target_of(x))
    for key in ("W_enc", "W_dec"):
        torch.testing.assert_close(one.parameters[key][order], other.parameters[key], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(one.parameters["W_skip"], other.parameters["W_skip"], rtol=1e-3, atol=1e-4)
    assert not equal(one, other)


def test_units_of_rows_and_of_targets_change_nothing():
    x = torch.cat(rows(12))
    y = target_of(x)
    settings = TrainSettings(batch_rows=B)
    found = []
    for source in (ArrayRows(x, target=y), ArrayRows(100 * x + 7, target=0.01 * y - 3)):
        (sae,) = train(TopK(N, k=3, skip="zero", bias="mean"), source, settings=settings, progress=False)
        found.append(sae.provenance["metrics"]["fvu"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_layers_in_one_pass_are_those_of_passes_of_their_own(models, texts):
    settings = StreamSettings(block_tokens=60, prefetch=False, target="layers.{layer}.mlp")
    pattern, lm = "layers.{layer}.mlp.input", models["llama"]
    together = stream(lm, texts, layer=[0, 1], hook=pattern, settings=settings)
    assert {key: each.info["hook_out"] for key, each in together.items()} == {
        "layers.0.mlp.input": "layers.0.mlp", "layers.1.mlp.input": "layers.1.mlp"
    }  # fmt: skip
    alone = stream(lm, texts, hook="layers.1.mlp.input", settings=StreamSettings(
        block_tokens=60, prefetch=False, target="layers.1.mlp"))  # fmt: skip
    options = {"tokens": 64, "settings": TrainSettings(batch_rows=16), "progress": False}
    many = train(TopK(8, k=2, skip="least-squares"), together, **options)
    (one,) = train(TopK(8, k=2, skip="least-squares"), alone, **options)
    for key, t in one.tensors().items():
        assert torch.equal(t, many["layers.1.mlp.input"][0].tensors()[key]), key
    assert one.provenance["hook_out"] == "layers.1.mlp"


# ------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_is_refused(models, texts):
    x = torch.cat(rows(8))
    y = target_of(x)
    for config, source, message in (
        (TopK(N, k=3, skip="zero"), x, r"`TopK\.skip` is for transcoders"),
        (TopK(N, k=3, aligned=True), ArrayRows(x, target=y), r"`TopK\.aligned` must be False"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config, source, progress=False)
    with pytest.raises(ConfigError, match=r"`TopK\.skip` must be one of None, 'zero', 'least-squares'; got True"):
        TopK(N, k=3, skip=True)
    sae = untrained(TopK(N, k=3), ArrayRows(x, target=y))
    with pytest.raises(ConfigError, match="`start` must be left out where rows come with targets"):
        train(TopK(N, k=3), ArrayRows(x, target=y), start=sae, progress=False)
    with pytest.raises(ShapeError, match="`target` must have one row per row"):
        ArrayRows(x, target=y[:-1])
    with pytest.raises(MissingModelError, match="must be a module of the model"):
        stream(models["llama"], texts, layer=1, settings=StreamSettings(target="layers.1.nothing"))
    with pytest.raises(ConfigError, match=r"names a module of each layer; .* lies in none"):
        stream(models["llama"], texts, hook="model.norm", settings=StreamSettings(target="layers.{layer}.mlp"))


def test_a_source_without_the_targets_that_it_promises_is_refused():
    source = ArrayRows(torch.cat(rows(8)), info={"d_out": 6})
    with pytest.raises(ShapeError, match=r"width d_in=8 and d_out=6, as the source says; got \(512, 8\)"):
        train(TopK(N, k=3), source, settings=TrainSettings(batch_rows=B), progress=False)
