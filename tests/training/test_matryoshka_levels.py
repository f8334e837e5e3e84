"""Sizes of a Matryoshka SAE that learn apart, and AuxK of each: dense references in float64, and laws."""

from __future__ import annotations

import pytest
import torch

from fixtures.learners import N, new, rows, run
from saekit.errors import ConfigError
from saekit.training.architectures import config_from_dict
from saekit.training.config import Matryoshka, TopK
from saekit.training.losses import Context, matryoshka_loss


def double(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def codes_of(config, pre, size):
    """Return the codes of a prefix, dense."""
    if config.over == "batchtopk":
        edge = pre.relu().flatten().sort(descending=True).values[config.k * len(pre) - 1]
        chosen = pre.relu() * (pre >= edge)
        return chosen[:, :size]
    part = pre[:, :size]
    edge = part.sort(dim=1, descending=True).values[:, [min(config.k, size) - 1]]
    return part.relu() * (part >= edge)


@pytest.mark.parametrize("over", ["topk", "batchtopk"])
@pytest.mark.parametrize("detached, aux_per_size", [(True, False), (False, True), (True, True)])
def test_gradients(over, detached, aux_per_size):
    sizes, weights, k_aux = (6, 15, N), (1.0, 0.5, 2.0), 3
    config = Matryoshka(
        N, k=4, sizes=sizes, weights=weights, over=over, detached=detached, aux_per_size=aux_per_size,
        aux_coefficient=0.2,
    )  # fmt: skip
    x = torch.cat(rows(1)).double() - 0.5
    p = {name: t.double() for name, t in new(config).parameters.items()}
    p["b_enc"] = 0.3 * double(N, seed=3)
    dead = torch.arange(N) % 3 == 1
    dead[:6] = torch.tensor([False, True, False, False, True, False])
    center = p["b_dec"] - 0.1
    leaves = {name: t.clone().requires_grad_() for name, t in p.items()}
    state = {name: torch.tensor(0.0) for name in ("threshold", "threshold_steps", "last_smallest")}
    outcome = matryoshka_loss(leaves, x, Context(config=config, center=center, state=state, dead=dead, k_aux=k_aux))
    found = torch.autograd.grad(outcome.loss, list(leaves.values()))

    dense = {name: t.clone().requires_grad_() for name, t in p.items()}
    offset = dense["b_dec"] - center
    held = offset.detach() if detached else offset
    inner, outer = (x - offset) @ dense["W_enc"][:6].T, (x - held) @ dense["W_enc"][6:].T
    pre = torch.cat([inner, outer], 1) + dense["b_enc"]
    V, loss, starts = (x - x.mean(0)).square().sum(1).mean(), 0.0, (0, 6, 15)
    for index, (start, size, weight) in enumerate(zip(starts, sizes, weights)):
        codes, W = codes_of(config, pre, size), dense["W_dec"][:size]
        base = offset if index == 0 else held
        if detached:
            x_hat = codes[:, :start].detach() @ W[:start].detach() + codes[:, start:] @ W[start:] + base
        else:
            x_hat = codes @ W + base
        loss = loss + weight * (x - x_hat).square().sum(1).mean()
        ring = dead & (torch.arange(N) >= start) & (torch.arange(N) < size)
        if aux_per_size or size == N:
            ring = ring if aux_per_size else dead
            e, share = (x - x_hat).detach(), min(1.0, int(ring.sum()) / k_aux) if aux_per_size else 1.0
            some = pre[:, ring]
            edge = some.sort(dim=1, descending=True).values[:, [min(k_aux, int(ring.sum())) - 1]]
            e_hat = (some.relu() * (some >= edge)) @ dense["W_dec"][ring]
            fraction = (e - e_hat).square().sum(1).mean() / (e - e.mean(0)).square().sum(1).mean()
            loss = loss + 0.2 * V * share * fraction
    torch.testing.assert_close(outcome.loss, loss, check_dtype=False, rtol=1e-6, atol=1e-6)
    for name, mine, theirs in zip(p, found, torch.autograd.grad(loss, list(dense.values()))):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_detached_first_latents_train_as_an_sae_of_their_size_does():
    options = {"clip": None, "aux_coefficient": 0.0, "lr": 0.01, "dead_after_rows": 10**6}
    whole = new(Matryoshka(N, k=3, sizes=(8, N), weights=(1.0, 1.0), detached=True, **options))
    small = new(TopK(8, k=3, **options))
    for name in ("W_enc", "W_dec", "b_enc"):
        small.parameters[name] = whole.parameters[name][:8].clone()
    for x in rows(12):
        run(whole, [x])
        run(small, [x])
    for name, t in small.parameters.items():
        torch.testing.assert_close(whole.parameters[name][: len(t)], t, rtol=1e-4, atol=1e-5)
    tied = new(Matryoshka(N, k=3, sizes=(8, N), weights=(1.0, 1.0), **options))
    run(tied, rows(12))
    assert not torch.allclose(tied.parameters["W_dec"][:8], small.parameters["W_dec"], atol=1e-3)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"detached": 1}, "`Matryoshka.detached` must be True or False; got 1"),
        ({"aux_per_size": "yes"}, "`Matryoshka.aux_per_size` must be True or False; got 'yes'"),
        ({"detach": True}, "unknown setting `detach` of Matryoshka"),
    ],
)
def test_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        config_from_dict({"arch": "matryoshka", "latents": 8, "k": 2, **settings})
