"""Penalties on weights, constraints and schedules: gradients against a dense reference, the laws they keep, resume."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fixtures.learners import B, D, N, equal, new, rows, run
from saekit import train
from saekit.errors import ConfigError
from saekit.training.architectures import config_from_dict, config_to_dict, name_of
from saekit.training.config import BatchTopK, Gated, JumpReLU, Matryoshka, PAnneal, ReLU, TopK, k_now
from saekit.training.initialization import principal_directions
from saekit.training.learner import permute
from saekit.training.losses import Context, jumprelu_loss, matryoshka_loss
from saekit.training.mesh import ALONE
from saekit.training.penalties import ANCHORED, anchor, penalize, spread
from saekit.training.settings import TrainSettings

OPTIONS = {
    "aligned": TopK(N, k=3, aligned=True, dead_after_rows=100),
    "l2": TopK(N, k=3, l2=0.3, dead_after_rows=100),
    "orthogonal": TopK(N, k=3, orthogonal=0.3, orthogonal_chunk=9, dead_after_rows=100),
    "annealed": BatchTopK(N, k=3, k_start=10, k_fraction=0.5, dead_after_rows=100),
    "density": JumpReLU(N, target_l0=3, density=2.0, dead_after_rows=100),
    "detached": Matryoshka(N, k=3, detached=True, aux_per_size=True, dead_after_rows=100),
    "balance": Matryoshka(N, k=3, balance=0.5, dead_after_rows=100),
    "soft-frozen": TopK(N, k=3, control="soft-frozen-decoder", lr=0.1, dead_after_rows=100),
    "subspace": TopK(N, k=3, subspace=0.5, dead_after_rows=100),
    "incoherence": TopK(N, k=3, sign="magnitude", incoherence=0.3, dead_after_rows=100),
}


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights() -> dict[str, torch.Tensor]:
    W_dec = torch.nn.functional.normalize(double(40, 12))
    return {"W_enc": double(40, 12, seed=1), "W_dec": W_dec}


def gradients_of(config, p, value):
    """Return the terms and the gradients that `penalize` adds to those of ``sum(W * noise)``."""
    learner = SimpleNamespace(mesh=ALONE, config=config, parameters=p, seed=3, step=5, device=torch.device("cpu"))
    gradients = {name: double(40, 12, seed=7 + i) for i, name in enumerate(("W_enc", "W_dec"))}
    base = {name: t.clone() for name, t in gradients.items()}
    terms = penalize(learner, torch.tensor(value, dtype=torch.float64), gradients)
    return terms, base, gradients


# ------------------------------------------------------------------------------------- gradients, against autograd


def test_l2():
    p = weights()
    terms, base, found = gradients_of(TopK(40, k=4, l2=0.3), p, 2.5)
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    loss = 0.3 * 2.5 * (leaves["W_enc"].square().sum(1) + leaves["W_dec"].square().sum(1)).mean()
    of_enc, of_dec = torch.autograd.grad(loss, [leaves["W_enc"], leaves["W_dec"]])
    torch.testing.assert_close(terms["l2"], loss.detach())
    torch.testing.assert_close(found["W_enc"] - base["W_enc"], of_enc)
    # what is left out is along the decoder rows, which keep their length: projection removes all of it
    radial = (of_dec * p["W_dec"]).sum(1, keepdim=True) * p["W_dec"]
    torch.testing.assert_close(of_dec, radial)
    assert torch.equal(found["W_dec"], base["W_dec"])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("chunk", [7, 13, 40, 8192])
def test_orthogonal(chunk, signed, monkeypatch):
    monkeypatch.setattr("saekit.training.penalties.BLOCK_ROWS", 5)
    W = weights()["W_dec"].requires_grad_()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    unit = torch.nn.functional.normalize(W)
    terms = []
    for part in order.tensor_split(-(-40 // chunk)):
        cosines = unit[part] @ unit[part].T
        cosines = (cosines.abs() if signed else cosines).masked_fill(torch.eye(len(part), dtype=torch.bool), -2)
        terms.append(cosines.max(1).values.clamp(min=0).square().mean())
    expected = torch.stack(terms).mean()
    [gradient] = torch.autograd.grad(expected, W)
    value, found = spread(W.detach(), order, chunk, signed)
    torch.testing.assert_close(value, expected.detach())
    tangent = found - (found * W.detach()).sum(1, keepdim=True) * W.detach()  # lengths are kept anyway
    torch.testing.assert_close(tangent, gradient)


def test_aligned():
    """The gradient of v and d where e = v + (1 - <v, d>) d, taken at <v, d> = 1."""
    p = weights()
    v = p["W_enc"] + (1 - (p["W_enc"] * p["W_dec"]).sum(1, keepdim=True)) * p["W_dec"]
    _, base, found = gradients_of(TopK(40, k=4, aligned=True), {**p, "W_enc": v}, 1.0)
    leaf_v, leaf_d = v.clone().requires_grad_(), p["W_dec"].clone().requires_grad_()
    e = leaf_v + (1 - (leaf_v * leaf_d).sum(1, keepdim=True)) * leaf_d
    loss = (e * base["W_enc"]).sum() + (leaf_d * base["W_dec"]).sum()
    of_v, of_d = torch.autograd.grad(loss, [leaf_v, leaf_d])
    torch.testing.assert_close(found["W_enc"], of_v)
    torch.testing.assert_close(found["W_dec"], of_d)


def test_density():
    """Thresholds of dense latents rise more: the pressure on latent j grows with its frequency."""
    x = torch.cat(rows(1)) - 0.5
    config = JumpReLU(N, target_l0=3, density=2.0, density_at=0.2, bandwidth=0.5)
    p = new(config).parameters
    parts = {}
    for each in (config, JumpReLU(N, target_l0=3, bandwidth=0.5)):
        leaf = p["log_threshold"].clone().requires_grad_()
        context = Context(config=each, center=p["b_dec"])
        outcome = jumprelu_loss({**p, "log_threshold": leaf}, x, context)
        parts[each.density] = torch.autograd.grad(outcome.loss, leaf)[0], outcome
    pre = ((x - 0) @ p["W_enc"].T + p["b_enc"]).float()
    theta = p["log_threshold"].exp()
    frequency = (pre > theta).double().mean(0)
    near = ((pre - theta).abs() < 0.25).double().mean(0) / 0.5
    V = (x - x.mean(0)).square().sum(1).mean()
    weight = 2.0 * V / (0.2 * 3)
    torch.testing.assert_close(
        parts[2.0][1].parts["density"].double(), weight * frequency.square().sum(), rtol=1e-5, atol=0
    )
    expected = -weight * 2 * frequency * near * theta
    torch.testing.assert_close((parts[2.0][0] - parts[0.0][0]).double(), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_encoder_and_decoder_stay_aligned(kind):
    learner = new(kind(N, k=3, aligned=True, orthogonal=0.3, lr=0.05, dead_after_rows=100))
    for x in rows(12):
        run(learner, [x])
        product = (learner.parameters["W_enc"] * learner.parameters["W_dec"]).sum(1)
        torch.testing.assert_close(product, torch.ones(N), atol=1e-5, rtol=0)


def test_aligned_gated_latents_that_are_resampled_too():
    learner = new(Gated(N, target_l0=2, aligned=True, dead_after_rows=B, lr=0.05), steps=40)
    run(learner, rows(12))
    product = (learner.parameters["W_enc"] * learner.parameters["W_dec"]).sum(1)
    torch.testing.assert_close(product, torch.ones(N), atol=1e-5, rtol=0)


def test_soft_frozen_rows_stay_near_where_they_began():
    learner = new(OPTIONS["soft-frozen"])
    start = learner.parameters["W_dec"].clone()
    run(learner, rows(20))
    cosine = (learner.parameters["W_dec"] * start).sum(1)
    assert float(cosine.min()) >= ANCHORED - 1e-5
    assert float(cosine.min()) < ANCHORED + 0.05  # at this rate some would have left
    torch.testing.assert_close(learner.parameters["W_dec"].norm(dim=1), torch.ones(N))
    W = torch.nn.functional.normalize(double(6, 5))
    free, near = W.clone(), torch.nn.functional.normalize(W + 0.01 * double(6, 5, seed=1))
    anchor(near, free)
    assert (near * free).sum(1).min() > 0.99  # what is near stays


def test_weights_of_0_give_the_bits_of_the_run_without():
    plain, zero = TopK(N, k=3, dead_after_rows=100), TopK(N, k=3, l2=0.0, orthogonal=0, dead_after_rows=100, k_start=3)
    first, second = new(plain), new(zero)
    run(first, rows(5))
    run(second, rows(5))
    assert equal(first, second)


@pytest.mark.parametrize("name", ["aligned", "l2", "soft-frozen", "density", "incoherence"])
def test_permuting_latents_permutes_the_result(name):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    one = new(OPTIONS[name])
    other = permute(new(OPTIONS[name]), order)
    run(one, rows(6))
    run(other, rows(6))
    for key in ("W_enc", "W_dec"):
        torch.testing.assert_close(one.parameters[key][order], other.parameters[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_exactly_and_alone_as_together(name, tmp_path):
    data = torch.cat(rows(12))
    settings = TrainSettings(batch_rows=B, checkpoint_every=4, log_every=1)
    options = {"tokens": 12 * B, "settings": settings, "progress": False}
    config = OPTIONS[name]
    whole = train([config, TopK(N, k=3)], data, seeds=[0, 1], **options, out=tmp_path / "a")

    class Stopped(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, data, seeds=[1], **options, out=tmp_path / "b", callbacks=[stop])
    (again,) = train(config, data, seeds=[1], **options, out=tmp_path / "b", resume=True)
    for key, t in whole[1].tensors().items():
        assert torch.equal(t, again.tensors()[key]), key
    assert whole[1].provenance["config"] == config_to_dict(config)
    assert config_from_dict(config_to_dict(config)) == config


def test_l2_shortens_encoders_and_orthogonal_parts_decoders():
    found = {}
    for name, config in {"plain": TopK(N, k=3, lr=0.02), **OPTIONS}.items():
        if name in ("plain", "l2", "orthogonal"):
            learner = new(config)
            run(learner, rows(40))
            W = learner.parameters["W_dec"]
            near = (W @ W.T).fill_diagonal_(-1).max(1).values.mean()
            found[name] = float(learner.parameters["W_enc"].norm(dim=1).mean()), float(near)
    assert found["l2"][0] < 0.9 * found["plain"][0]
    assert found["orthogonal"][1] < found["plain"][1]


# ------------------------------------------------------------------------------------------- schedules and the start


def test_k_falls_and_ends_at_k():
    config = TopK(N, k=3, k_start=20, k_fraction=0.5)
    learner = new(config, steps=20)
    fired = [float(s.fired) / B for s in run(learner, rows(20))]
    assert fired[0] > 10
    assert fired[-1] <= 3
    assert [k_now(config, step, 20) for step in (0, 5, 10, 19)] == [20, 12, 3, 3]


def test_no_threshold_is_averaged_before_k_is_reached():
    learner = new(BatchTopK(N, k=3, k_start=20, k_fraction=0.9), steps=20)
    run(learner, rows(17))
    assert float(learner.state["threshold_steps"]) == 0
    run(learner, rows(3))
    assert float(learner.state["threshold_steps"]) == 2


def test_balance_of_1_is_equal_weights_and_of_0_the_full_size_alone():
    x = torch.cat(rows(1)) - 0.5
    loss = {}
    for balance, weights in ((1.0, None), (None, None), (0.0, None), (None, (0, 0, 0, 1)), (0.5, None)):
        config = Matryoshka(N, k=3, balance=balance, weights=weights)
        p = new(config).parameters
        loss[balance, weights] = float(matryoshka_loss(p, x, Context(config=config, center=p["b_dec"])).loss)
    assert loss[1.0, None] == pytest.approx(loss[None, None])
    assert loss[0.0, None] == pytest.approx(loss[None, (0, 0, 0, 1)])
    assert loss[0.0, None] < loss[0.5, None] < loss[1.0, None]


def test_the_start_lies_in_the_subspace():
    x = double(200, 3) @ double(3, D, seed=1) * 5 + 0.01 * double(200, D, seed=2) + 3
    span = principal_directions(x, 0.375)
    torch.testing.assert_close(span @ span.T, torch.eye(3, dtype=torch.float64))
    _, _, expected = torch.linalg.svd(x - x.mean(0))
    torch.testing.assert_close(span.T @ span, expected[:3].T @ expected[:3], atol=1e-8, rtol=0)
    assert len(principal_directions(x[:2], 1.0)) == 1  # two rows span a line about their mean
    learner = new(TopK(N, k=3, subspace=0.375), sample=x.float())
    W = learner.parameters["W_dec"]
    torch.testing.assert_close(W @ span.float().T @ span.float(), W, atol=1e-5, rtol=0)
    torch.testing.assert_close(W.norm(dim=1), torch.ones(N))
    torch.testing.assert_close(learner.parameters["W_enc"], 0.2 * W)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReLU(8, l2=0.1), r"`ReLU\.l2` needs decoder rows of length 1.*Take another architecture"),
        (lambda: PAnneal(8, aligned=True), r"`PAnneal\.aligned` needs decoder rows of length 1"),
        (lambda: TopK(8, k=2, orthogonal=1, control="frozen-decoder"), "moves weights, which control='frozen-decoder'"),
        (lambda: TopK(8, k=2, aligned=True, l2=0.1), "fixes the product.*which `l2` shrinks"),
        (lambda: TopK(8, k=2, aligned=1), r"`TopK\.aligned` must be True or False"),
        (lambda: TopK(8, k=2, l2=-1), r"`TopK\.l2` must be 0 or a positive number"),
        (lambda: TopK(8, k=2, orthogonal_chunk=1), "whole number of at least 2"),
        (lambda: TopK(8, k=4, k_start=3), r"`TopK\.k_start` must be from k=4 to n_latents=8; got 3"),
        (lambda: BatchTopK(8, k=4, k_start=9), r"`BatchTopK\.k_start` must be from k=4 to n_latents=8; got 9"),
        (lambda: TopK(8, k=4, k_fraction=0), r"`TopK\.k_fraction` must be a number in \(0, 1\]"),
        (lambda: TopK(8, k=2, subspace=1.5), r"`TopK\.subspace` must be a number in \(0, 1\]"),
        (lambda: JumpReLU(8, target_l0=2, density=-1), "0 or a positive number"),
        (lambda: JumpReLU(8, target_l0=2, density_at=0), r"a number in \(0, 1\]"),
        (lambda: Matryoshka(8, k=2, balance=0.5, weights=(1, 1, 1, 1)), "`Matryoshka.balance` stands for `weights`"),
        (lambda: Matryoshka(8, k=2, balance=0.5, sampled=2), "`Matryoshka.sampled` draws the sizes.*got `balance`"),
        (lambda: Matryoshka(8, k=2, k_start=4), "unknown argument `k_start`"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_names_say_what_is_special():
    assert name_of(TopK(64, k=4, aligned=True, orthogonal=0.25)) == "topk-64-k4-orthogonal0.25-aligned"
    assert name_of(BatchTopK(64, k=4, k_start=32, l2=0.03)) == "batchtopk-64-k4-l2-0.03-from32"
    assert name_of(Matryoshka(64, k=4, balance=0.75)) == "matryoshka-64-k4-balance0.75"
