"""Learners: reproducible, permutable, restored exactly, frozen into SAEs that do the same."""

import dataclasses

import pytest
import torch

from fixtures.learners import ALL as LEARNERS
from fixtures.learners import B, N, equal, name, new, rows, run
from saekit.training.config import HierarchicalTopK, TopK
from saekit.training.learner import finish, generator, permute, restore, tensors_of
from saekit.training.step import plain_step


@pytest.mark.parametrize("config", LEARNERS, ids=name)
def test_same_seed_twice_is_identical_and_other_seeds_differ(config):
    first, second, third = new(config), new(config), new(config, seed=1)
    for learner in (first, second, third):
        run(learner, rows(6))
    assert equal(first, second)
    assert not torch.equal(first.parameters["W_dec"], third.parameters["W_dec"])


@pytest.mark.parametrize("config", LEARNERS, ids=name)
def test_permute_then_step_equals_step_then_permute(config):
    config = dataclasses.replace(config, resample=False) if hasattr(config, "resample") else config
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    if config.arch == "matryoshka":  # permutations within the smallest step between sizes keep every prefix
        config = dataclasses.replace(config, sampled=0, sizes=(8, N))
        order = torch.cat([order[order < 8], order[order >= 8]])
    batches = rows(12)
    a = new(config)
    run(a, batches[:6])
    b = permute(a, order)
    run(a, batches[6:])
    run(b, batches[6:])
    moved = permute(a, order)
    for key, value in tensors_of(moved).items():
        torch.testing.assert_close(tensors_of(b)[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("config", LEARNERS, ids=name)
def test_state_round_trip_continues_bitwise(config):
    batches = rows(20)
    a = new(config)
    run(a, batches[:10])
    b = new(config, seed=99)
    kept = tensors_of(a)
    restore(b, {name: kept[name].clone() for name in sorted(kept)}, a.step)  # a file has an order of its own
    run(a, batches[10:])
    run(b, batches[10:])
    assert equal(a, b)


@pytest.mark.parametrize("config", LEARNERS, ids=name)
def test_frozen_sae_reconstructs_what_the_learner_did(config):
    learner = new(config, steps=60)
    batches = rows(61)
    run(learner, batches[:-1])
    sae = finish(learner, {})
    x = batches[-1]
    said = plain_step(learner, x)  # statistics are those before its update
    codes = sae.encode(x)
    error = (x - sae.decode(codes, x)).pow(2).sum()
    loose = config.arch == "batchtopk" or getattr(config, "over", "") == "batchtopk"
    assert codes.l0() == pytest.approx(float(said.fired) / B, rel=0.1 if loose else 1e-3)
    assert float(error) == pytest.approx(float(said.error), rel=0.1 if loose else 1e-3)
    alone = sae.encode(x[:1])
    assert torch.equal(alone.to_dense(), codes.rows([0]).to_dense()) or torch.allclose(
        alone.to_dense(), codes.rows([0]).to_dense(), atol=1e-5
    )


def test_hierarchical_with_one_level_is_topk_to_the_last_bit():
    batches = rows(60)
    one, plain = (
        new(HierarchicalTopK(N, k=3, levels=(3,), dead_after_rows=100)), new(TopK(N, k=3, dead_after_rows=100))
    )  # fmt: skip
    logs = [
        [(float(s.loss), float(s.error), float(s.fired), float(s.dead)) for s in run(each, batches)]
        for each in (one, plain)
    ]
    assert logs[0] == logs[1]
    assert equal(one, plain)
    assert finish(one, {}).rule.k == 3


def test_hierarchical_serves_every_k_better_than_one_trained_for_the_largest():
    batches = rows(400)
    many, plain = new(HierarchicalTopK(N, k=6, lr=3e-3), steps=400), new(TopK(N, k=6, lr=3e-3), steps=400)
    x = torch.cat(rows(8, seed=0))
    errors = []
    for learner in (many, plain):
        run(learner, batches)
        sae = finish(learner, {})
        assert torch.equal(sae.with_k(6).reconstruct(x), sae.reconstruct(x))
        errors.append([float((x - sae.with_k(k).reconstruct(x)).square().sum()) for k in (1, 2, 6)])
    assert errors[0][0] > errors[0][1] > errors[0][2]
    assert errors[0][0] < 0.9 * errors[1][0]
    assert errors[0][1] < errors[1][1]


def test_streams_of_seeds_and_names_differ():
    draws = {
        (s, n): float(torch.rand((), generator=generator(s, n))) for s in (0, 1) for n in ("init", "data", "resample")
    }
    assert len(set(draws.values())) == 6
