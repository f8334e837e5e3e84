"""The plain step: what it changes, what it keeps, dead latents, controls, every option."""

import dataclasses

import pytest
import torch

from fixtures.learners import ALL as LEARNERS
from fixtures.learners import B, N, name, new, rows, run
from saekit import kernels
from saekit.training.config import Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.defaults import resolve
from saekit.training.step import SMALL, learning_rate, plain_step, small_on_one_thread


def test_learning_rate_rises_stays_and_falls():
    settings = resolve(TopK(16, k=4, lr=1.0), 8, 100, 16)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[10:65] == pytest.approx([1.0] * 55)
    assert rates[65:67] == pytest.approx([1.0, 34 / 35])
    assert rates[-1] == pytest.approx(1 / 35)


@pytest.mark.parametrize("config", LEARNERS, ids=name)
def test_training_lowers_the_error(config):
    learner = new(config, steps=150)
    statistics = run(learner, rows(150))
    assert statistics[-1].error < 0.7 * statistics[0].error
    assert all(bool(s.finite) for s in statistics)


def test_one_step_moves_encoder_and_decoder_independently():
    learner = new(TopK(N, k=3))
    run(learner, rows(1))
    assert not torch.equal(learner.parameters["W_enc"], learner.parameters["W_dec"])


@pytest.mark.parametrize("config", [c for c in LEARNERS if c.arch not in ("relu", "gated", "p-anneal")], ids=name)
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


@pytest.mark.parametrize("config", LEARNERS[:7], ids=name)
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


def test_a_gated_sae_has_unit_decoder_rows():
    learner = new(Gated(N, target_l0=3))
    run(learner, rows(6))
    torch.testing.assert_close(learner.parameters["W_dec"].norm(dim=1), torch.ones(N))


@pytest.fixture
def two_threads():
    """Have torch use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_torch_has_one_thread_in_small_steps_and_all_in_large_ones():
    learner = new(TopK(N, k=3))
    step = small_on_one_thread(lambda learner, x, target=None: torch.get_num_threads())
    most = SMALL // learner.parameters["W_enc"].numel()
    d = rows(1)[0].shape[1]
    assert step(learner, torch.empty(most, d)) == 1
    assert step(learner, torch.empty(most + 1, d)) == 2
    assert step(learner, torch.empty(most, d, device="meta")) == 2  # threads of a device's own are not counted so


@pytest.mark.usefixtures("two_threads")
def test_a_step_that_fails_leaves_the_number_of_threads_alone():
    with pytest.raises(RuntimeError, match="size"):
        plain_step(new(TopK(N, k=3)), torch.zeros(4, 3))


@pytest.mark.parametrize("config", [TopK(N, k=3), ReLU(N, target_l0=3)], ids=name)
def test_small_steps_are_bitwise_those_of_one_thread(config, two_threads):
    learners = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        learners.append(new(config))
        run(learners[-1], rows(5, batch=4096))
    assert all(torch.equal(t, learners[1].parameters[k]) for k, t in learners[0].parameters.items())
