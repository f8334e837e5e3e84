"""Parts of a fused step on a CPU: pairs of prefixes, panels of columns, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fast")


def rows(seed: int, n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("panel_bytes", [2**30, 6_000])
def test_a_gradient_written_past_the_caches_is_the_same(monkeypatch: pytest.MonkeyPatch, panel_bytes: int) -> None:
    from saekit.kernels.cpu import ops
    from saekit.kernels.cpu.buffers import buffer
    from saekit.kernels.step_interface import Terms

    n, n_latents, d, k = 30, 300, 48, 3
    weights = {"W_enc": rows(0, n_latents, d), "W_dec": rows(1, n_latents, d)}
    x, gradient, offset = rows(2, n, d), rows(3, n, d), rows(4, 1, d)[0]
    latents = torch.rand(n, n_latents, generator=torch.Generator().manual_seed(5)).topk(k).indices
    pairs = ops.even_pairs(rows(6, n, k).numpy(), latents.numpy())
    terms = Terms(pairs, pairs.values > -1, pairs.values, rows(7, n * k, 1)[:, 0].numpy(), gradient)
    monkeypatch.setattr(ops, "PANEL_BYTES", panel_bytes)

    def found(cached: int) -> list[Tensor]:
        monkeypatch.setattr(ops, "CACHED", cached)
        for part in ("of dec", "of enc"):  # what is not written shows
            buffer(f"test {part}", (n_latents, d)).fill_(torch.nan)
        g = ops.gradients(x, offset, weights, terms, name="test ")
        assert 0 < g.written.sum() < n_latents
        assert (g.written == (g.counts > 0)).all()
        g = ops.filled(g)
        return [torch.from_numpy(part.copy()) for part in (g.of_enc, g.of_dec, g.of_bias, g.along, g.squares)]

    ordinary, past = found(2**30), found(0)
    for one, other in zip(ordinary, past, strict=True):
        assert torch.equal(one, other)
    wanted = torch.zeros(n_latents, d)
    kept = torch.from_numpy(pairs.values * terms.wanted).view(n, k)
    wanted.index_add_(0, latents.ravel(), (kept[:, :, None] * gradient[:, None]).reshape(-1, d))
    torch.testing.assert_close(past[1], wanted)
