"""The fused training step of a TopK SAE: equal to dense differentiation, and the same however it is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saekit import kernels
from saekit.kernels import reference
from saekit.kernels.reference import Adam, StepOutcome, TopKSettings

pytestmark = pytest.mark.usefixtures("fast")

State = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def start(seed: int, d: int, n_latents: int) -> State:
    stream = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(n_latents, d, generator=stream)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    weights = {
        "W_enc": W_dec + 0.1 * torch.randn(n_latents, d, generator=stream),
        "W_dec": W_dec,
        "b_enc": 0.1 * torch.randn(n_latents, generator=stream),
        "b_dec": torch.randn(d, generator=stream),
    }
    return weights, *({name: torch.zeros_like(t) for name, t in weights.items()} for _ in range(2))


def rows(seed: int, n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def copy(state: State) -> State:
    return tuple({name: t.clone() for name, t in group.items()} for group in state)  # type: ignore[return-value]


CENTER = 0.5


def run(
    step: Any, state: State, n: int, options: TopKSettings, steps: int, dead: Tensor | None = None
) -> list[StepOutcome]:
    weights, first, second = state
    d = weights["W_enc"].shape[1]
    outcomes = []
    for index in range(steps):
        x = rows(100 + index, n, d)
        offset = weights["b_dec"] - CENTER
        adam = Adam(lr=1e-3, step=index + 1)
        outcomes.append(step(weights, first, second, x, offset, options, adam, dead if index % 2 == 0 else None))
    return outcomes


def assert_close(a: State, b: State, tolerance: float) -> None:
    for mine, other in zip(a, b):
        for name, t in mine.items():
            scale = float(other[name].abs().max()) + 1e-12
            assert float((t - other[name]).abs().max()) <= tolerance * scale, name


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(2, 40), st.integers(1, 130)),
    k=st.integers(1, 12),
    dead_share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    clip=st.sampled_from([None, 1e-3, 1.0, 1e6]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60)
def test_one_step_has_the_gradient_of_dense_differentiation(
    shape: tuple[int, int, int], k: int, dead_share: float, clip: float | None, seed: int
) -> None:
    n, d, n_latents = shape
    options = TopKSettings(k=min(k, n_latents), clip=clip, k_aux=max(1, d // 2), aux_coefficient=0.5)
    dead = torch.rand(n_latents, generator=torch.Generator().manual_seed(seed)) < dead_share
    fast, plain = start(seed, d, n_latents), start(seed, d, n_latents)
    (mine,), (other,) = (
        run(kernels.topk_step, fast, n, options, 1, dead),
        run(reference.topk_step, plain, n, options, 1, dead),
    )
    # After one step the first moment is a tenth of the clipped gradient.
    assert_close((fast[1], {}, {}), (plain[1], {}, {}), 1e-4)
    assert mine.error == pytest.approx(other.error, rel=1e-5)
    assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    assert torch.equal(mine.fired, other.fired)
    assert mine.n_fired == int(other.fired.sum())
    assert (mine.aux is None) == (other.aux is None)
    if mine.aux is not None:
        assert mine.aux == pytest.approx(other.aux, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("n, d, n_latents, k", [(64, 48, 700, 8), (50, 33, 1030, 20)])
def test_ten_steps_stay_together(n: int, d: int, n_latents: int, k: int) -> None:
    options = TopKSettings(k=k, k_aux=d // 2)
    dead = torch.zeros(n_latents, dtype=torch.bool)
    dead[::9] = True
    fast, plain = start(0, d, n_latents), start(0, d, n_latents)
    mine, other = (
        run(kernels.topk_step, fast, n, options, 10, dead),
        run(reference.topk_step, plain, n, options, 10, dead),
    )
    assert_close(fast, plain, 1e-3)
    for a, b in zip(mine, other):
        assert a.error == pytest.approx(b.error, rel=1e-4)
    torch.testing.assert_close(fast[0]["W_dec"].norm(dim=1), torch.ones(n_latents), rtol=0, atol=1e-6)


def test_latents_that_do_not_fire_still_follow_their_moments() -> None:
    """Equal to a dense Adam: a latent with momentum and no gradient moves on."""
    weights, first, second = state = start(1, 16, 600)
    weights["b_enc"][5] = -100.0
    first["W_enc"][5] = 1e-3
    second["W_enc"][5] = 1e-6
    before = weights["W_enc"][5].clone()
    outcome = kernels.topk_step(
        *state, rows(0, 40, 16), weights["b_dec"] - CENTER, TopKSettings(k=4), Adam(lr=1e-3, step=1)
    )
    assert outcome.fired[5] == 0
    assert (weights["W_enc"][5] < before).all()
    torch.testing.assert_close(first["W_enc"][5], torch.full((16,), 9e-4))


def test_result_is_bitwise_the_same_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit.kernels.cpu import buffers

    states = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(buffers, "thread_count", lambda threads=threads: threads)
        states.append(start(2, 40, 800))
        run(kernels.topk_step, states[-1], 200, TopKSettings(k=8), 3)
    for state in states[1:]:
        assert all(torch.equal(a[name], b[name]) for a, b in zip(states[0], state) for name in a)


def test_learners_that_take_turns_do_not_touch_each_other() -> None:
    alone = start(3, 24, 600), start(4, 24, 600)
    for state in alone:
        run(kernels.topk_step, state, 90, TopKSettings(k=6), 4)
    turns = start(3, 24, 600), start(4, 24, 600)
    for index in range(4):
        for weights, first, second in turns:
            x, adam = rows(100 + index, 90, 24), Adam(lr=1e-3, step=index + 1)
            kernels.topk_step(weights, first, second, x, weights["b_dec"] - CENTER, TopKSettings(k=6), adam)
    for a, b in zip(alone, turns):
        assert all(torch.equal(mine[name], other[name]) for mine, other in zip(a, b) for name in mine)


def test_permuting_latents_commutes_with_the_step() -> None:
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))

    def permuted(state: State) -> State:
        return tuple({n: t if n == "b_dec" else t[order] for n, t in group.items()} for group in state)  # type: ignore[return-value]

    before = permuted(start(5, 32, 900))
    run(kernels.topk_step, before, 120, TopKSettings(k=8), 3)
    state = start(5, 32, 900)
    run(kernels.topk_step, state, 120, TopKSettings(k=8), 3)
    assert_close(before, permuted(state), 1e-4)


def test_panels_of_columns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from saekit.kernels.cpu import ops

    states = []
    for size in (2**30, 8 * 150 * 16, 8 * 150 * 30):
        monkeypatch.setattr(ops, "PANEL_BYTES", size)
        states.append(start(6, 50, 700))
        run(kernels.topk_step, states[-1], 150, TopKSettings(k=10), 3)
    assert_close(states[1], states[0], 1e-4)
    assert_close(states[2], states[0], 1e-4)


def test_a_row_that_is_not_finite_shows_in_the_norm() -> None:
    weights, first, second = start(7, 16, 600)
    x = rows(0, 64, 16)
    x[3, 2] = torch.nan
    outcome = kernels.topk_step(
        weights, first, second, x, weights["b_dec"] - CENTER, TopKSettings(k=4), Adam(lr=1e-3, step=1)
    )
    assert not outcome.grad_norm < float("inf")
    assert not torch.isfinite(weights["W_enc"]).all()


def test_no_dense_array_of_rows_by_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak memory of a step grows with rows * k, not with rows * n_latents."""
    import tracemalloc

    from saekit.kernels.cpu import buffers, encode

    n, n_latents = 2048, 4096
    weights, first, second = start(8, 8, n_latents)
    made: list[int] = []
    empty = torch.empty

    def counted(*arguments: Any, **options: Any) -> Tensor:
        out = empty(*arguments, **options)
        made.append(out.numel() * out.element_size())
        return out

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(encode, "BLOCK_BYTES", 2**20)
    buffers.release()
    tracemalloc.start()
    kernels.topk_step(
        weights, first, second, rows(0, n, 8), weights["b_dec"] - CENTER, TopKSettings(k=4), Adam(lr=1e-3, step=1)
    )
    largest = max(*made, tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    buffers.release()
    assert largest < n * n_latents * 4 / 8


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    k=st.integers(1, 40),
    scaled=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40)
def test_prefixes_from_one_product_are_the_prefixes_alone(sizes: list[int], k: int, scaled: bool, seed: int) -> None:
    from saekit.kernels.cpu import ops

    n_latents, d = 400, 20
    W, b = rows(seed, n_latents, d), 0.3 * rows(seed + 1, n_latents, 1)[:, 0]
    x, offset = rows(seed + 2, 70, d), 0.1 * rows(seed + 3, 1, d)[0]
    x[3, 1] = torch.nan
    prefixes = [(size, max(1, min(k * size // n_latents if scaled else k, size))) for size in [*sizes, n_latents]]
    together = ops.topk_pairs_of_prefixes(x, ops.encoder_at(W, b, offset, x), prefixes)
    for (size, own_k), pairs in zip(prefixes, together):
        alone = ops.topk_pairs(x, ops.encoder_at(W[:size].contiguous(), b[:size].contiguous(), offset, x), own_k)
        for mine, other in ((pairs.offsets, alone.offsets), (pairs.latents, alone.latents)):
            assert (mine == other).all()
        torch.testing.assert_close(
            torch.from_numpy(pairs.values), torch.from_numpy(alone.values), rtol=0, atol=0, equal_nan=True
        )
