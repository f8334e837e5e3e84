"""What `test_gpu` runs in a process of its own: the Triton kernels beside the plain ones. Argument: a device."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from saekit.kernels import gpu, reference


def problem(seed: int, n: int, d: int, n_latents: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d, generator=g), torch.randn(n_latents, d, generator=g) / d**0.5
    return x.to(device), W.to(device), (0.3 * torch.randn(n_latents, generator=g)).to(device)


def check_encode(x: Tensor, W: Tensor, b: Tensor, k: int) -> None:
    """The k largest of an exact product, up to entries that fp32 cannot tell apart."""
    values, indices = gpu.topk_encode(x, W, b, k)
    exact = x.double() @ W.double().T + b.double()
    slack = 2.0**-19 * (x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1) + b.double().abs())
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all(), "each latent once per row"
    got = exact.gather(1, indices)
    assert ((values.double() - got.relu()).abs() <= slack.gather(1, indices)).all()
    least = got.min(dim=1, keepdim=True).values
    others = exact.scatter(1, indices, -torch.inf)
    assert ((others <= least + 2 * slack.amax(dim=1, keepdim=True)) | (others <= 0)).all()
    assert (values.diff(dim=1) <= 0).all()


def check_sums(seed: int, n: int, d: int, n_latents: int, device: str) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (n,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices = torch.randint(0, n_latents, (int(offsets[-1]),), generator=g)
    weights, W = torch.randn(len(indices), generator=g), torch.randn(n_latents, d, generator=g)
    x = torch.randn(n, d, generator=g)
    rows = torch.repeat_interleave(counts)
    offsets, indices, weights, W, x, rows = (t.to(device) for t in (offsets, indices, weights, W, x, rows))
    torch.testing.assert_close(
        gpu.csr_decode(offsets, indices, weights, W), reference.csr_decode(offsets, indices, weights, W),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    products = gpu.pair_products(x, W, rows, indices)
    torch.testing.assert_close(products, (x[rows] * W[indices]).sum(1), rtol=1e-4, atol=1e-4)
    nothing = gpu.pair_products(x, W, rows, torch.full_like(indices, -1))
    assert not nothing.any()


def main(device: str) -> None:
    for seed, (n, d, n_latents, k) in enumerate([(70, 48, 700, 5), (33, 100, 1030, 20), (5, 16, 64, 3), (3, 7, 40, 2)]):
        check_encode(*problem(seed, n, d, n_latents, device), k)
    x, W, b = problem(9, 40, 32, 640, device)
    W[:] = W[0]  # everything is equal: more candidates than there is room for
    check_encode(x, W, torch.zeros_like(b), 4)
    x, W, b = problem(10, 40, 32, 640, device)
    x[3] = 0
    check_encode(x, W, b, 4)
    x[5, 2] = torch.nan
    values, _ = gpu.topk_encode(x, W, b, 4)
    assert values[5].isnan().any()
    assert torch.isfinite(values[[i for i in range(40) if i != 5]]).all()
    check_encode(x[:3], W, b - 100, 4)  # nothing is positive
    for seed, (n, d, n_latents) in enumerate([(30, 20, 50), (17, 300, 9), (1, 1, 1)]):
        check_sums(seed, n, d, n_latents, device)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
