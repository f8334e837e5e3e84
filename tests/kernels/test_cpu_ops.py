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
