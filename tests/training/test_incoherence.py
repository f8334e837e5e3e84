"""Codes with a sign and iSAE's regularizer: gradients against dense references in float64, and their laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fixtures.learners import N, new, rows, run
from saekit import SAE, train
from saekit.errors import ConfigError
from saekit.kernels import magnitude_encode, reference, using
from saekit.training.config import BatchTopK, TopK
from saekit.training.incoherence import incoherence, measure_incoherence, probes
from saekit.training.learner import finish
from saekit.training.losses import Context, topk_loss
from saekit.training.mutual_regularization import pull
from saekit.training.settings import TrainSettings
from saekit.training.sparse_autograd import Pairs


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(pre: Tensor, k: int) -> Tensor:
    """Return a mask of the `k` largest of each row by magnitude, one by one."""
    mask = torch.zeros_like(pre)
    for row in range(len(pre)):
        for latent in sorted(range(pre.shape[1]), key=lambda j: -abs(float(pre[row, j])))[:k]:
            mask[row, latent] = 1.0
    return mask


def test_incoherence_is_the_dense_formula_and_its_gradient():
    W = torch.nn.functional.normalize(double(40, 12)).requires_grad_()
    chosen = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:6] for i in range(30)])
    u = double(30, 6, seed=1)
    expected = 0.0
    for row in range(30):
        own = W[chosen[row]]
        expected = expected + (own @ own.T @ u[row]).square().sum() / 6 / 30
    [gradient] = torch.autograd.grad(expected, W)
    value, found = measure_incoherence(W, Pairs.even(chosen, 40), u.reshape(-1), 6)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found, gradient)
    twice = 2 * incoherence(W, Pairs.even(chosen, 40), u.reshape(-1), 6)
    torch.testing.assert_close(torch.autograd.grad(twice, W)[0], 2 * gradient)


def test_orthogonal_rows_have_incoherence_1_on_average():
    W = torch.linalg.qr(double(12, 12)).Q
    u = probes(4000, 6, seed=0, step=0)
    chosen = torch.arange(6).expand(4000, 6)
    value, _ = measure_incoherence(W, Pairs.even(chosen, 12), u.reshape(-1).double(), 6)
    assert float(value) == pytest.approx(1.0, abs=0.03)
    one = W[:1].expand(12, 12)  # and 6 times the same row 6
    value, _ = measure_incoherence(one, Pairs.even(chosen, 12), u.reshape(-1).double(), 6)
    assert float(value) == pytest.approx(6.0, abs=0.4)


@pytest.mark.parametrize("k_aux", [2, 20])
def test_abstopk_gradients(k_aux):
    x = torch.cat(rows(1)).double() - 0.5
    config = TopK(N, k=4, sign="magnitude", incoherence=0.3, aux_coefficient=0.2)
    p = {name: t.double() for name, t in new(config).parameters.items()}
    p["b_enc"] = 0.1 * double(N, seed=3)
    dead = torch.arange(N) % 5 == 0
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    outcome = topk_loss(leaves, x, Context(config=config, center=p["b_dec"] - 0.1, dead=dead, k_aux=k_aux, seed=3))
    found = torch.autograd.grad(outcome.loss, list(leaves.values()))

    dense = {name: t.clone().requires_grad_() for name, t in p.items()}
    offset = dense["b_dec"] - p["b_dec"] + 0.1
    pre = (x - offset) @ dense["W_enc"].T + dense["b_enc"]
    codes = pre * largest(pre.detach(), 4)
    assert int((codes < 0).sum()) > 20
    x_hat = codes @ dense["W_dec"] + offset
    V = (x - x.mean(0)).square().sum(1).mean()
    e = (x - x_hat).detach()
    of_dead = pre * dead * largest(pre.detach() * dead, min(k_aux, int(dead.sum())))
    aux = (e - of_dead @ dense["W_dec"]).square().sum(1).mean() / (e - e.mean(0)).square().sum(1).mean()
    together = pre.detach().abs().sort(1, descending=True).indices[:, :8]
    u = probes(len(x), 8, seed=3, step=0).double()
    products = [W @ W.T @ each for W, each in zip(dense["W_dec"][together], u)]
    R = torch.stack(products).square().sum() / 8 / len(x)
    loss = (x - x_hat).square().sum(1).mean() + 0.2 * V * aux + 0.3 * V * R
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-6, atol=1e-6)
    assert set(outcome.parts) == {"reconstruction", "aux", "incoherence"}
    for name, mine, theirs in zip(p, found, torch.autograd.grad(loss, list(dense.values()))):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(outcome.fired, (codes != 0).sum(0).float())


@pytest.mark.parametrize("backend", ["plain", "fast"])
def test_codes_by_magnitude_are_those_of_the_dense_product(backend):
    x, W, b = double(50, 12).float(), double(700, 12, seed=1).float(), 0.1 * double(700, seed=2).float()
    with using(backend):
        values, indices = magnitude_encode(x, W, b, 5)
    pre = torch.addmm(b, x, W.T)
    expected = pre.abs().topk(5, dim=1)
    torch.testing.assert_close(values.abs(), expected.values)
    torch.testing.assert_close(values, pre.gather(1, indices))
    assert torch.equal(reference.magnitude_encode(x, W, b, 5, block_rows=7)[1], expected.indices)
    assert (values < 0).any()


def test_a_latent_and_its_negative_are_the_same():
    """Turning latents round (both rows and the bias) changes neither the reconstruction nor how close rows are."""
    config = TopK(N, k=3, sign="magnitude", orthogonal=0.1, dead_after_rows=100)
    one, other = new(config), new(config)
    turned = torch.ones(N)
    turned[::2] = -1
    for name in ("W_enc", "W_dec", "b_enc"):
        t = other.parameters[name]
        t.mul_(turned.view(-1, *[1] * (t.ndim - 1)))
    for mine, theirs in zip(run(one, rows(6)), run(other, rows(6))):
        for name in ("reconstruction", "orthogonal"):
            assert float(mine.parts[name]) == pytest.approx(float(theirs.parts[name]), rel=1e-3)
    codes = finish(one, {}).encode(torch.cat(rows(1)))
    assert bool((codes.values < 0).any())


def test_seeds_pull_each_other_whatever_the_sign():
    W, other = double(6, 5).requires_grad_(), double(6, 5, seed=1)
    unit, theirs = torch.nn.functional.normalize(W), torch.nn.functional.normalize(other)
    expected = 0.3 * 5 * (1 - (unit @ theirs.T).abs().max(1).values.mean())
    value, gradient = pull(W.detach(), [other], 0.3, signed=True)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, W)[0])


def test_trained_saved_and_trained_on(tmp_path):
    data = torch.cat(rows(12))
    settings = TrainSettings(batch_rows=64)
    config = TopK(N, k=3, sign="magnitude")
    (sae,) = train(config, data, tokens=768, settings=settings, progress=False, out=tmp_path)
    again = SAE.load(next(tmp_path.glob("topk-24-k3-magnitude-seed0")))
    assert again.rule.settings() == {"k": 3, "sign": "magnitude"}
    codes = again.encode(data)
    assert torch.equal(codes.to_dense(), sae.encode(data).to_dense())
    assert bool((codes.values < 0).any())
    assert bool((codes.values > 0).any())
    (more,) = train(config, data, tokens=768, settings=settings, progress=False, start=sae)

    def error(each):
        return float((data - each.decode(each.encode(data))).square().sum())

    assert error(more) < error(sae)
    with pytest.raises(ConfigError, match="codes of the sign that the configuration trains, 'positive'; it has 'magn"):
        train(TopK(N, k=3), data, tokens=768, settings=settings, progress=False, start=sae)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: TopK(8, k=2, sign="signed"), "`TopK.sign` must be one of 'positive', 'magnitude'; got 'signed'"),
        (lambda: TopK(8, k=2, sign=None), "`TopK.sign` must be one of"),
        (
            lambda: TopK(8, k=2, incoherence=0.1),
            "`TopK.incoherence` is iSAE's, whose codes have a sign; got sign='posi",
        ),
        (lambda: TopK(8, k=2, sign="magnitude", incoherence=-1), "`TopK.incoherence` must be 0 or a positive number"),
        (lambda: TopK(8, k=2, sign="magnitude", incoherence="1"), "`TopK.incoherence` must be 0 or a positive number"),
        (
            lambda: TopK(8, k=2, sign="magnitude", incoherence=0.1, control="frozen-decoder"),
            "`TopK.incoherence` moves weights, which control='frozen-decoder' holds",
        ),
        (lambda: BatchTopK(8, k=2, sign="magnitude"), "sign"),
    ],
)
def test_refused(make, match):
    with pytest.raises((ConfigError, TypeError), match=match):
        make()
