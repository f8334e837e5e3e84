import dataclasses

import pytest
import torch

from saekit import kernels
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.learner import Learner, finish, initialize_learner, permute, resolve, restore, tensors_of
from saekit.training.step import plain_step

D, N, B = 8, 24, 64
ALL = [
    TopK(N, k=3, multi_topk=0.1, dead_after_rows=100),
    BatchTopK(N, k=3, dead_after_rows=100),
    JumpReLU(N, target_l0=3, dead_after_rows=100),
    ReLU(N, dead_after_rows=100),
    Gated(N, target_l0=3, dead_after_rows=100),
    PAnneal(N, dead_after_rows=100),
    HierarchicalTopK(N, k=3, dead_after_rows=100),
    Matryoshka(N, k=3, dead_after_rows=100),
    Matryoshka(N, k=3, sampled=2, over="batchtopk", dead_after_rows=100),
]


def name(c):
    return c.arch if not isinstance(c, Matryoshka) else f"{c.arch}-{c.over}"


def rows(steps, seed=0, batch=B):
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(16, D, generator=g)
    codes = torch.rand(steps * batch, 16, generator=g) * (torch.rand(steps * batch, 16, generator=g) < 0.15)
    return list((codes @ basis + 0.5).split(batch))


def new(config, *, seed=0, steps=40, batch=B, sample=None):
    x = torch.cat(rows(4)) if sample is None else sample
    resolved = resolve(config, D, steps, batch)
    return initialize_learner(config, seed, resolved, bias=x.mean(0), scale=torch.tensor(2.0), sample=x, device="cpu")


def run(learner, batches):
    return [plain_step(learner, x) for x in batches]


def equal(a: Learner, b: Learner) -> bool:
    left, right = tensors_of(a), tensors_of(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left) and a.step == b.step


@pytest.mark.parametrize("config", ALL, ids=name)
def test_same_seed_twice_is_identical_and_other_seeds_differ(config):
    first, second, third = new(config), new(config), new(config, seed=1)
    for learner in (first, second, third):
        run(learner, rows(6))
    assert equal(first, second)
    assert not torch.equal(first.parameters["W_dec"], third.parameters["W_dec"])


@pytest.mark.parametrize("config", ALL, ids=name)
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


@pytest.mark.parametrize("config", ALL, ids=name)
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


@pytest.mark.parametrize("config", ALL, ids=name)
def test_training_lowers_the_error(config):
    learner = new(config, steps=150)
    statistics = run(learner, rows(150))
    assert statistics[-1].error < 0.7 * statistics[0].error
    assert all(bool(s.finite) for s in statistics)


@pytest.mark.parametrize("config", ALL, ids=name)
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


def test_one_step_moves_encoder_and_decoder_independently():
    learner = new(TopK(N, k=3))
    run(learner, rows(1))
    assert not torch.equal(learner.parameters["W_enc"], learner.parameters["W_dec"])


@pytest.mark.parametrize("config", [c for c in ALL if c.arch not in ("relu", "gated", "p-anneal")], ids=name)
def test_decoder_rows_stay_unit(config):
    learner = new(config)
    run(learner, rows(5))
    torch.testing.assert_close(learner.parameters["W_dec"].norm(dim=1), torch.ones(N))


def test_decoder_gradient_has_no_radial_part_in_the_moments():
    learner = new(TopK(N, k=3))
    before = learner.parameters["W_dec"].clone()
    run(learner, rows(1))
    radial = (learner.first_moments["W_dec"] * before).sum(1)
    assert radial.abs().max() < 1e-6 * learner.first_moments["W_dec"].norm(dim=1).max()


@pytest.mark.parametrize("config", ALL[:7], ids=name)
def test_controls_keep_what_they_say(config):
    for control, kept in (
        ("untrained", ("W_enc", "W_dec", "b_dec")),
        ("frozen-decoder", ("W_dec",)),
        ("frozen-encoder", ("W_enc",)),
    ):
        learner = new(dataclasses.replace(config, control=control))
        before = {k: t.clone() for k, t in learner.parameters.items()}
        run(learner, rows(5))
        same = {k for k, t in learner.parameters.items() if torch.equal(t, before[k])}
        assert set(kept) <= same
        assert ("W_dec" in same) == (control != "frozen-encoder")
        assert ("W_enc" in same) == (control != "frozen-decoder")


@pytest.mark.parametrize("batch", [16, 64, 128])
def test_dead_counter_counts_rows_whatever_the_batch(batch):
    learner = new(TopK(N, k=3), batch=batch)
    learner.parameters["b_enc"][:5] = -1e3  # these never fire
    x = torch.cat(rows(4))  # 256 rows
    for part in x.split(batch):
        plain_step(learner, part)
    assert learner.rows_since_fired[:5].tolist() == [256] * 5
    assert (learner.rows_since_fired[5:] < 256).any()


def test_dead_latents_are_revived_by_aux_only():
    def dead_after(aux):
        learner = new(TopK(N, k=2, dead_after_rows=10 * B, aux_coefficient=aux), steps=300)
        learner.parameters["W_enc"][:8] *= 0.1  # often positive, never among the largest
        run(learner, rows(300))
        return int((learner.rows_since_fired[:8] >= 10 * B).sum())

    assert dead_after(0.0) >= 6
    assert dead_after(1 / 32) <= 3


def test_resampling_points_dead_latents_elsewhere_and_forgets_their_moments():
    def trained(resample):
        learner = new(ReLU(N, resample=resample, dead_after_rows=5 * B), steps=40)
        learner.parameters["b_enc"][:6] = -1e3
        run(learner, rows(6))
        return learner

    kept, moved = trained(False), trained(True)
    assert kept.rows_since_fired[:6].tolist() == [6 * B] * 6
    assert (moved.rows_since_fired[:6] <= B).all()
    assert (moved.parameters["b_enc"][:6] > -1).all()
    torch.testing.assert_close(moved.parameters["W_dec"][:6].norm(dim=1), torch.ones(6), rtol=0.05, atol=0)


OPTIONS = [
    (TopK(N, k=3), {"lr": 1e-4}),
    (TopK(N, k=3), {"betas": (0.5, 0.9)}),
    (TopK(N, k=3), {"warmup_steps": 30}),
    (TopK(N, k=3), {"decay_fraction": 1.0}),
    (TopK(N, k=3), {"clip": None}),
    (TopK(N, k=3), {"multi_topk": 0.125}),
    (TopK(N, k=3, dead_after_rows=B), {"aux_coefficient": 0.0}),
    (TopK(N, k=3, dead_after_rows=B), {"k_aux": 1}),
    (TopK(N, k=3, dead_after_rows=B), {"dead_after_rows": 10 * B}),
    (JumpReLU(N, target_l0=3), {"target_l0": 6}),
    (JumpReLU(N, target_l0=3), {"sparsity": 0.1}),
    (JumpReLU(N, target_l0=3), {"bandwidth": 0.5}),
    (ReLU(N), {"l1": 4.0}),
    (ReLU(N), {"target_l0": 3}),
    (Gated(N), {"l1": 4.0}),
    (PAnneal(N), {"p_end": 0.9}),
    (PAnneal(N), {"p_start_fraction": 0.0}),
    (PAnneal(N), {"p_updates": 2}),
    (HierarchicalTopK(N, k=3), {"levels": (2, 3)}),
    (HierarchicalTopK(N, k=3), {"weights": (1.0, 1.0, 2.0)}),
    (Matryoshka(N, k=3), {"sizes": (12, N)}),
    (Matryoshka(N, k=3), {"weights": (1.0, 1.0, 1.0, 2.0)}),
    (Matryoshka(N, k=3), {"sampled": 2}),
    (Matryoshka(N, k=3), {"over": "batchtopk"}),
    (Matryoshka(N, k=3), {"k_per_size": "scaled"}),
    (Matryoshka(N, k=3), {"k_per_size": "truncated"}),
]


@pytest.mark.parametrize("config, change", OPTIONS, ids=lambda v: "-".join(v) if isinstance(v, dict) else v.arch)
def test_each_option_changes_something(config, change):
    plain, changed = new(config), new(dataclasses.replace(config, **change))
    batches = rows(30)
    run(plain, batches)
    run(changed, batches)
    assert not torch.equal(plain.parameters["W_enc"], changed.parameters["W_enc"])


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


def test_bf16_keeps_fp32_masters_and_changes_little():
    low, full = new(TopK(N, k=3), steps=60), new(TopK(N, k=3), steps=60)
    low.resolved = dataclasses.replace(low.resolved, precision="bf16")
    with kernels.using("plain"):  # the fast ones are exact all the same
        a, b = run(low, rows(60))[-1], run(full, rows(60))[-1]
    assert low.parameters["W_enc"].dtype == torch.float32
    assert not torch.equal(low.parameters["W_enc"], full.parameters["W_enc"])
    assert float(a.error) == pytest.approx(float(b.error), rel=0.1)


def test_step_leaves_rows_and_global_state_alone():
    x = rows(1)[0]
    copy, state = x.clone(), torch.get_rng_state()
    plain_step(new(TopK(N, k=3)), x)
    assert torch.equal(x, copy)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [ReLU, Gated, PAnneal])
def test_penalized_learners_start_near_their_target_l0(kind):
    # Half of 256 latents would fire from a bias of 0; the start is twice the target.
    statistics = plain_step(new(kind(256, target_l0=6)), torch.cat(rows(4)))
    assert 6 < float(statistics.fired) / statistics.rows < 20


def test_a_gated_sae_has_unit_decoder_rows():
    learner = new(Gated(N, target_l0=3))
    run(learner, rows(6))
    torch.testing.assert_close(learner.parameters["W_dec"].norm(dim=1), torch.ones(N))
