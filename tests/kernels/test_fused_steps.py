"""The fused step of every architecture: the plain step's learner, up to the rounding of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from saekit import kernels
from saekit.training import fused
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, PAnneal, ReLU, TopK
from saekit.training.defaults import resolve
from saekit.training.fused import fused_step, fuses
from saekit.training.initialization import level_of
from saekit.training.learner import Learner, initialize_learner, restore, tensors_of
from saekit.training.step import plain_step

pytestmark = pytest.mark.usefixtures("fast")

D, N, B = 24, 640, 128
BASE: dict[str, Any] = {"dead_after_rows": 3 * B, "lr": 1e-3}
CONFIGS = {
    "topk": TopK(N, k=6, **BASE),
    "batchtopk": BatchTopK(N, k=6, **BASE),
    "jumprelu": JumpReLU(N, target_l0=6.0, **BASE),
    "relu": ReLU(N, target_l0=6.0, **BASE),
    "gated": Gated(N, target_l0=6.0, **BASE),
    "matryoshka": Matryoshka(N, k=6, **BASE),
    "matryoshka-truncated": Matryoshka(N, k=6, k_per_size="truncated", weights=(1, 2, 3, 4), **BASE),
    "matryoshka-scaled": Matryoshka(N, k=6, k_per_size="scaled", sizes=(100, 640), **BASE),
    "hierarchical": HierarchicalTopK(N, k=6, **BASE),
    "hierarchical-weighted": HierarchicalTopK(N, k=6, levels=(2, 3, 6), weights=(1.0, 0.5, 0.0), **BASE),
    "matryoshka-batch": Matryoshka(N, k=6, over="batchtopk", **BASE),
    "matryoshka-batch-fixed": Matryoshka(N, k=6, over="batchtopk", k_per_size="fixed", **BASE),
    "matryoshka-batch-scaled": Matryoshka(N, k=6, over="batchtopk", k_per_size="scaled", sizes=(100, 640), **BASE),
    "matryoshka-sampled": Matryoshka(N, k=6, sampled=2, **BASE),
    "topk-aligned": TopK(N, k=6, aligned=True, orthogonal=0.2, orthogonal_chunk=200, **BASE),
    "topk-annealed": TopK(N, k=6, k_start=20, k_fraction=0.2, l2=0.1, **BASE),
    "crosscoder": BatchTopK(N, k=6, parts=(9, 15), **BASE),
    "batchtopk-annealed": BatchTopK(N, k=6, k_start=12, k_fraction=0.2, l2=0.1, **BASE),
    "jumprelu-dense": JumpReLU(N, target_l0=6.0, density=4.0, **BASE),
    "gated-aligned": Gated(N, target_l0=6.0, aligned=True, **BASE),
    "matryoshka-balance": Matryoshka(N, k=6, balance=0.5, orthogonal=0.2, **BASE),
    "soft-frozen": TopK(N, k=6, control="soft-frozen-decoder", **BASE | {"lr": 0.1}),
    "topk-magnitude": TopK(N, k=6, sign="magnitude", **BASE),
    "topk-incoherent": TopK(N, k=6, sign="magnitude", incoherence=0.3, orthogonal=0.2, k_start=9, **BASE),
    "jumprelu-tanh": JumpReLU(N, target_l0=6.0, tanh=0.02, bandwidth=0.5, **BASE),
    "jumprelu-tanh-alone": JumpReLU(N, tanh=0.05, bandwidth=0.5, pre_activation=1e-3, l2=0.1, **BASE),
    "jumprelu-pre-activation": JumpReLU(N, target_l0=6.0, pre_activation=1e-3, **BASE),
    "matryoshka-detached": Matryoshka(N, k=6, detached=True, **BASE),
    "matryoshka-detached-truncated": Matryoshka(
        N, k=6, over="batchtopk", detached=True, aux_per_size=True, sizes=(80, 200, 640), **BASE
    ),
    "matryoshka-aux": Matryoshka(N, k=6, aux_per_size=True, k_aux=30, weights=(1, 0, 2, 1), **BASE),
    "matryoshka-without-the-last": Matryoshka(N, k=6, weights=(1, 1, 1, 0), **BASE),
}


def rows(steps: int, seed: int = 0, d: int = D, batch: int = B) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    basis = torch.randn(40, d, generator=stream)
    n = steps * batch
    codes = torch.rand(n, 40, generator=stream) * (torch.rand(n, 40, generator=stream) < 0.1)
    return list((codes @ basis + 0.5).split(batch))


def new(config: Any, *, scale: float | None = 2.0, seed: int = 0, d: int = D, batch: int = B) -> Learner:
    x = torch.cat(rows(4, d=d, batch=batch))
    factor = None if scale is None else torch.tensor(scale)
    resolved = resolve(config, d, 40, batch)
    return initialize_learner(config, seed, resolved, bias=x.mean(0), scale=factor, sample=x, device="cpu")


@pytest.fixture
def plain_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that the fused step left to the plain one."""
    left: list[int] = []

    def counted(learner: Learner, x: Tensor, target: Tensor | None = None) -> Any:
        left.append(learner.step)
        return plain_step(learner, x, target)

    monkeypatch.setattr(fused, "plain_step", counted)
    return left


def assert_same(mine: Learner, other: Learner) -> None:
    left, right = tensors_of(mine), tensors_of(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(t, right[name]) for name, t in left.items())


def assert_close(mine: Learner, other: Learner) -> None:
    """Adam divides gradients by their own size: one that is rounding and nothing else may move a weight apart."""
    left, right = tensors_of(mine), tensors_of(other)
    assert left.keys() == right.keys()
    for name, t in left.items():
        a, b = t.double(), right[name].double()
        assert float((a - b).norm()) <= 3e-3 * float(b.norm()) + 1e-9, name
        assert float(((a - b).abs() > 2e-5 + 1e-3 * b.abs()).double().mean()) <= 5e-3, name


@pytest.mark.parametrize("name, scale", [*((name, 2.0) for name in CONFIGS), ("jumprelu", None), ("relu", None)])
def test_ten_steps_are_those_of_the_plain_step(name: str, scale: float | None, plain_steps: list[int]) -> None:
    config = CONFIGS[name]
    mine, other = new(config, scale=scale), new(config, scale=scale)
    assert fuses(mine)
    if name == "jumprelu-tanh-alone":  # it begins with more codes than the fused step takes in some rows
        for each in (mine, other):
            each.parameters["b_enc"] -= 0.5
    for x in rows(10):
        a, b = fused_step(mine, x), plain_step(other, x)
        assert a.parts.keys() == b.parts.keys()
        assert bool(a.finite)
        for part in ("loss", "error", "fired", "dead", "grad_norm"):
            torch.testing.assert_close(getattr(a, part), getattr(b, part), rtol=2e-4, atol=2e-4, check_dtype=False)
        for part, value in a.parts.items():
            torch.testing.assert_close(value, b.parts[part], rtol=2e-4, atol=2e-4, check_dtype=False)
    assert "aux" in a.parts or name.startswith(("relu", "gated"))
    # A selection over the batch needs the last batch's smallest code.
    assert plain_steps == []
    assert_close(mine, other)


@given(
    name=st.sampled_from(sorted(CONFIGS)),
    shape=st.tuples(st.integers(3, 70), st.integers(2, 50)),
    bandwidth=st.sampled_from([1e-3, 0.1, 2.0]),
    clip=st.sampled_from([None, 1e-2, 1.0]),
    seed=st.integers(0, 2**20),
)
@examples(max_examples=40)
def test_a_step_from_any_state_has_the_plain_gradient(
    name: str, shape: tuple[int, int], bandwidth: float, clip: float | None, seed: int
) -> None:
    import dataclasses

    n, d = shape
    config = dataclasses.replace(CONFIGS[name], clip=clip, dead_after_rows=1)
    if isinstance(config, JumpReLU):
        config = dataclasses.replace(config, bandwidth=bandwidth)
    learners = [new(config, d=d, batch=n, seed=seed) for _ in range(2)]
    for learner in learners:  # away from the start: tilted encoders, uneven biases, some dead latents
        stream = torch.Generator().manual_seed(seed)
        p = learner.parameters
        p["W_enc"] += 0.2 * torch.randn(p["W_enc"].shape, generator=stream) / d**0.5
        for extra in p.keys() - {"W_enc", "W_dec"}:
            p[extra] += 0.1 * torch.randn(p[extra].shape, generator=stream)
        if not isinstance(config, (ReLU, Gated)):
            learner.rows_since_fired += (torch.rand(N, generator=stream) < 0.2) * 10
        for state, value in (("last_smallest", 0.3), ("coefficient", 0.7)):
            if state in learner.state:
                learner.state[state] = torch.tensor(value)
        learner.step = 5
    [x] = rows(1, seed=seed + 1, d=d, batch=n)
    a, b = fused_step(learners[0], x), plain_step(learners[1], x)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-4, check_dtype=False)
    for key, moment in learners[0].first_moments.items():
        other = learners[1].first_moments[key]
        # Pairs at an edge of a selection or a band may fall on the other side of it, by the rounding of one product.
        different = (moment - other).abs() > 2e-3 * other.abs().max() + 1e-7
        assert float(different.float().mean()) <= (2e-3 if bandwidth > 1e-2 else 1e-2), key


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(2, 40), st.integers(1, 130)),
    k=st.integers(1, 12),
    dead_fraction=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    clip=st.sampled_from([None, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 2**20),
)
@examples(max_examples=60)
def test_a_topk_step_of_any_shape_has_the_plain_gradient(
    shape: tuple[int, int, int], k: int, dead_fraction: float, clip: float | None, seed: int
) -> None:
    """Fewer and more dead latents than a row takes, fewer latents than a panel, one row."""
    n, d, n_latents = shape
    more = {"clip": clip, "k_aux": max(1, d // 2), "aux_coefficient": 0.5, "dead_after_rows": 1}
    learners = [new(TopK(n_latents, k=min(k, n_latents), **more), d=d, batch=n, seed=seed) for _ in range(2)]
    stream = torch.Generator().manual_seed(seed)
    dead = torch.rand(n_latents, generator=stream) < dead_fraction
    x = torch.randn(n, d, generator=stream)
    for learner in learners:
        stream.manual_seed(seed)
        learner.parameters["W_enc"] += 0.1 * torch.randn(n_latents, d, generator=stream)
        learner.parameters["b_enc"] += 0.1 * torch.randn(n_latents, generator=stream)
        learner.rows_since_fired += 10 * dead
        learner.step = 5  # before, none can be dead
    assert fuses(learners[0])
    a, b = fused_step(learners[0], x), plain_step(learners[1], x)
    # After one step the first moment is a tenth of the clipped gradient.
    for name, moment in learners[0].first_moments.items():
        other = learners[1].first_moments[name]
        assert float((moment - other).abs().max()) <= 1e-4 * (float(other.abs().max()) + 1e-12), name
    for field, tolerance in (("error", 1e-5), ("grad_norm", 1e-4), ("loss", 1e-4), ("fired", 0.0)):
        assert float(getattr(a, field)) == pytest.approx(float(getattr(b, field)), rel=tolerance), field
    assert float(a.parts["aux"]) == pytest.approx(float(b.parts["aux"]), rel=1e-4, abs=1e-7)
    assert torch.equal(learners[0].rows_since_fired, learners[1].rows_since_fired)
    torch.testing.assert_close(learners[0].parameters["W_dec"].norm(dim=1), torch.ones(n_latents), rtol=0, atol=1e-6)


def test_latents_that_do_not_fire_still_follow_their_moments() -> None:
    """Equal to a dense Adam: a latent with momentum and no gradient moves on."""
    learner = new(CONFIGS["topk"])
    learner.parameters["b_enc"][5] = -100.0
    first, second = learner.first_moments["W_enc"], learner.second_moments["W_enc"]
    first[5], second[5] = 1e-3, 1e-6
    before = learner.parameters["W_enc"][5].clone()
    fused_step(learner, rows(1)[0])
    assert learner.rows_since_fired[5] == B
    assert (learner.parameters["W_enc"][5] < before).all()
    torch.testing.assert_close(learner.first_moments["W_enc"][5], torch.full((D,), 9e-4))


def test_learners_that_take_turns_do_not_touch_each_other() -> None:
    alone, turns = ([new(CONFIGS["topk"], seed=seed) for seed in (3, 4)] for _ in range(2))
    for learner in alone:
        for x in rows(6):
            fused_step(learner, x)
    for x in rows(6):
        for learner in turns:
            fused_step(learner, x)
    for mine, other in zip(alone, turns):
        assert_same(mine, other)


def test_panels_of_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of the rows that do not stay in a cache are taken in parts."""
    from saekit.kernels.cpu import ops

    learners = []
    for size in (2**30, 8 * B * 16, 8 * B * 30):
        monkeypatch.setattr(ops, "PANEL_BYTES", size)
        learners.append(new(CONFIGS["topk"], d=50))
        for x in rows(6, d=50):
            fused_step(learners[-1], x)
    for learner in learners[1:]:
        assert_close(learner, learners[0])


def test_no_dense_array_of_rows_by_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory of a step grows with rows * k, not with rows * n_latents."""
    import tracemalloc

    from saekit.kernels.cpu import buffers, encode

    n, n_latents = 2048, 4096
    learner = new(TopK(n_latents, k=4), d=8, batch=n)
    made: list[int] = []
    empty = torch.empty

    def counted(*arguments: Any, **options: Any) -> Tensor:
        out = empty(*arguments, **options)
        made.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(encode, "BLOCK_BYTES", dict.fromkeys(encode.BLOCK_BYTES, 2**20))
    buffers.release()
    tracemalloc.start()
    fused_step(learner, rows(1, d=8, batch=n)[0])
    largest = max(*made, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    buffers.release()
    assert largest < n * n_latents * 4 / 8


def test_dense_codes_are_left_to_the_plain_step(plain_steps: list[int]) -> None:
    config = ReLU(N, l1=1e-3, **BASE)
    mine, other = new(config), new(config)
    for x in rows(3):
        fused_step(mine, x)
        plain_step(other, x)
    assert plain_steps == [0, 1, 2]
    assert_same(mine, other)


def test_a_step_left_to_the_plain_one_draws_what_that_draws(plain_steps: list[int]) -> None:
    # So many that some of them are not positive.
    config = Matryoshka(N, k=400, sampled=2, over="batchtopk", **BASE)
    mine, other = new(config), new(config)
    for x in rows(3):
        fused_step(mine, x)
        plain_step(other, x)
    assert plain_steps == [0, 1, 2]
    assert_same(mine, other)


def test_a_guess_that_is_too_high_for_one_size_only_is_noticed(
    plain_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_high(x: Tensor, W_enc: Tensor, bias: Tensor, l0: float) -> Tensor:
        return level_of(x, W_enc, bias, l0) * (1.5 if len(bias) == N else 1.0)

    monkeypatch.setattr(fused, "level_of", too_high)
    mine, other = new(CONFIGS["matryoshka-batch-fixed"]), new(CONFIGS["matryoshka-batch-fixed"])
    for x in rows(3):
        a, b = fused_step(mine, x), plain_step(other, x)
        torch.testing.assert_close(a.fired, b.fired)
    assert plain_steps == []
    assert_close(mine, other)


def test_what_has_no_fast_path_is_left_alone(plain_steps: list[int]) -> None:
    for config in (PAnneal(N, target_l0=6.0), JumpReLU(N, target_l0=6.0, control="frozen-encoder")):
        assert not fuses(new(config))
        fused_step(new(config), rows(1)[0])
    assert plain_steps == [0, 0]


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", "relu", "gated", "matryoshka", "matryoshka-batch"])
def test_steps_are_bitwise_the_same_for_any_number_of_threads_and_after_a_restart(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saekit.kernels.cpu import threads

    learners = []
    for count in (1, 2, 3):
        monkeypatch.setattr(threads, "thread_count", lambda count=count: count)
        monkeypatch.setattr(threads, "PIECE", 1000)
        learner = new(CONFIGS[name])
        for index, x in enumerate(rows(6)):
            if index == 3 and count == 2:
                fresh = new(CONFIGS[name], seed=9)
                restore(fresh, {key: t.clone() for key, t in tensors_of(learner).items()}, learner.step)
                learner = fresh
            fused_step(learner, x)
        learners.append(learner)
    for learner in learners[1:]:
        assert_same(learners[0], learner)


@pytest.mark.parametrize("name", sorted(CONFIGS))
@pytest.mark.usefixtures("whole_numbers")
def test_steps_are_bitwise_the_same_whichever_product_finds_the_candidates(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it does not matter that a resumed run, or one alone, may choose another format than the run it stands for."""
    from saekit.kernels.cpu import low_bit_matmul, rounded

    monkeypatch.setattr(rounded, "FARTHER", 0.0)
    learners = []
    own = kernels.bf16_unavailable() is None  # else fp32 takes its place
    for whole, bf16 in ((True, own), (False, own), (True, False), (False, False)):
        monkeypatch.setattr(low_bit_matmul, "whole_numbers_pay", lambda whole=whole: whole)
        monkeypatch.setattr(rounded, "multiplies_bf16", lambda bf16=bf16: bf16)
        learners.append(new(CONFIGS[name]))
        for x in rows(8):
            fused_step(learners[-1], x)
    assert_same(learners[0], learners[1])
    assert_same(learners[2], learners[3])
    assert_close(learners[0], learners[2])  # in fp32, AuxK adds in another order


def test_dead_latents_are_resampled_as_in_the_plain_step(plain_steps: list[int]) -> None:
    config = ReLU(N, target_l0=3.0, dead_after_rows=2 * B, lr=1e-3)
    mine, other = new(config), new(config)
    dead = 0
    for x in rows(5):
        fused_step(mine, x)
        dead += int(plain_step(other, x).dead)
    assert dead
    assert len(plain_steps) <= 1
    assert_close(mine, other)


def test_rows_that_are_not_finite_show() -> None:
    for name in ("topk", "batchtopk", "jumprelu", "relu", "gated"):
        learner = new(CONFIGS[name])
        batches = rows(2)
        fused_step(learner, batches[0])
        batches[1][3, 2] = torch.nan
        assert not bool(fused_step(learner, batches[1]).finite)
        assert not torch.isfinite(learner.parameters["W_enc"]).all()


def test_one_dense_row_leaves_the_step_to_the_plain_one(plain_steps: list[int]) -> None:
    mine, other = new(CONFIGS["relu"]), new(CONFIGS["relu"])
    [x] = rows(1)
    x[100] *= 50.0
    fused_step(mine, x)
    plain_step(other, x)
    assert plain_steps == [0]
    assert_same(mine, other)
