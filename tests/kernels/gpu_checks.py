"""What `test_cuda` runs in a process of its own: the Triton kernels beside the plain ones.

Arguments: a device, what to check (``kernels`` or ``learners``), and on the CPU a file to write one line for each kind
of launch to, for `gpu_compile`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels import backend, dispatch, reference
from saekit.kernels.cuda import ops
from saekit.training import fused
from saekit.training.config import BatchTopK, Gated, HierarchicalTopK, JumpReLU, Matryoshka, ReLU, TopK
from saekit.training.defaults import resolve
from saekit.training.learner import initialize_learner, tensors_of
from saekit.training.step import plain_step

EVERYTHING = "cuda"
"""Device on which all shapes are tried; the interpreter gets the small ones."""


LAUNCHES: dict[str, None] = {}
KINDS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}


def record_launches() -> None:
    """From now on, `LAUNCHES` gets a line for each kind of launch."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def recorded(kernel: Any, *values: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        options = {name: more[name] for name in ("num_warps", "num_stages") if name in more}
        arguments: dict[str, Any] = {}
        for name, value in [*zip(kernel.arg_names, values), *more.items()]:
            if isinstance(value, Tensor):
                arguments[name] = KINDS[value.dtype]
            elif name.isupper():
                arguments[name] = value
            elif name not in options:
                arguments[name] = "fp32" if isinstance(value, float) else "i32"
        LAUNCHES[json.dumps([kernel.__name__, arguments, options])] = None
        return run(kernel, *values, grid=grid, warmup=warmup, **more)

    InterpretedFunction.run = recorded


def problem(seed: int, n: int, d: int, n_latents: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, W = torch.randn(n, d, generator=g), torch.randn(n_latents, d, generator=g) / d**0.5
    return x.to(device), W.to(device), (0.3 * torch.randn(n_latents, generator=g)).to(device)


def check_encode(x: Tensor, W: Tensor, b: Tensor, k: int, block_rows: int | None = None) -> None:
    """The k largest of an exact product, up to entries that fp32 cannot tell apart."""
    values, indices = ops.topk_encode(x, W, b, k, block_rows=block_rows)
    exact = x.double() @ W.double().T + b.double()
    slack = 2.0**-19 * (x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1) + b.double().abs())
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all(), "each latent once per row"
    got = exact.gather(1, indices)
    assert ((values.double() - got.relu()).abs() <= slack.gather(1, indices)).all()
    least = got.min(dim=1, keepdim=True).values
    others = exact.scatter(1, indices, -torch.inf)
    assert ((others <= least + 2 * slack.amax(dim=1, keepdim=True)) | (others <= 0)).all()
    assert (values.diff(dim=1) <= 0).all()


def check_hard_rows(device: str) -> None:
    x, W, b = problem(9, 8, 32, 130, device)
    W[:] = W[0]  # everything is equal: more candidates than there is room for
    check_encode(x, W, torch.zeros_like(b), 4)
    assert torch.equal(
        ops.topk_encode(x, W, torch.zeros_like(b), 4)[1].sort().values, torch.arange(4).expand(8, 4).to(device)
    )
    x, W, b = problem(10, 8, 50, 130, device)  # no multiple of a tile: no row is read for another
    x[3] = 0
    check_encode(x, W, b, 4)
    check_encode(x, W, torch.zeros_like(b), 4)
    x[5, 2] = torch.nan
    values, _ = ops.topk_encode(x, W, b, 4)
    assert values[5].isnan().any()
    assert torch.isfinite(values[[i for i in range(8) if i != 5]]).all()
    check_encode(x[:3], W, b - 100, 4)  # nothing is positive
    W[7, 1] = torch.nan
    assert ops.topk_encode(x, W, b, 4)[0].isnan().any(dim=1).all()


def check_bound(seed: int, n: int, d: int, n_latents: int, device: str) -> None:
    """The bf16 product is nowhere further off than it may be, for rows of very uneven entries too."""
    x, W, b = problem(seed, n, d, n_latents, device)
    g = torch.Generator().manual_seed(seed)
    x *= (4 * torch.randn(d, generator=g)).exp().to(device)
    b *= 30
    rows, latents = ops._round(x), ops._round(W)
    bound = ops._bound(rows, latents, b)
    exact = x.double() @ W.double().T + b.double()
    for part, product in ops._blocks(rows, latents, bound, 16):
        a = product.double()
        most = ops.ROUNDING * a.abs() + bound.row[part, None].double() * bound.latent.double() + bound.bias.double()
        off = (a - exact[part]).abs()
        assert (off <= most).all(), float((off / most).max())
        assert (off > most / 50).any()


def check_threshold(seed: int, n: int, d: int, n_latents: int, device: str) -> None:
    x, W, b = problem(seed, n, d, n_latents, device)
    threshold = torch.full_like(b, 2.2)
    offsets, indices, values = ops.threshold_encode(x, W, b, threshold, block_rows=16)
    exact = x.double() @ W.double().T + b.double()
    dense = torch.zeros_like(exact)
    rows = torch.repeat_interleave(torch.arange(n, device=device), offsets.diff())
    assert len(rows) == len(indices) > n
    dense[rows, indices] = values.double()
    sure = exact.where(exact > 2.2 + 1e-4, 0)
    assert ((dense - sure).abs() <= 1e-4 * (sure > 0) + 2.3 * ((exact - 2.2).abs() < 1e-4)).all()
    plain = reference.threshold_encode(x, W, b, torch.full_like(b, -1))
    for mine, other in zip(ops.threshold_encode(x, W, b, torch.full_like(b, -1)), plain):  # dense: the plain kernel
        assert torch.equal(mine, other)


def check_sums(seed: int, n: int, d: int, n_latents: int, device: str) -> None:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (n,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    indices = torch.randint(0, n_latents, (int(offsets[-1]),), generator=g)
    weights, W = torch.randn(len(indices), generator=g), torch.randn(n_latents, d, generator=g)
    offsets, indices, weights, W = (t.to(device) for t in (offsets, indices, weights, W))
    torch.testing.assert_close(
        ops.csr_decode(offsets, indices, weights, W), reference.csr_decode(offsets, indices, weights, W),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def check_step(n: int, d: int, n_latents: int, k: int, device: str) -> None:
    """A step from a tilted state has the gradient of dense differentiation, with latents that are dead."""
    config = TopK(n_latents, k=k, k_aux=d // 2, aux_coefficient=0.5, clip=0.5, dead_after_rows=1, lr=1e-3)
    stream = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=stream)
    learners, outcomes = [], []
    for step in (fused.fused_step, plain_step):
        stream.manual_seed(n)
        start = {"bias": torch.full((d,), 0.5), "scale": None, "sample": x, "device": device}
        learner = initialize_learner(config, 0, resolve(config, d, 40, n), **start)
        p = learner.parameters
        p["W_enc"] += 0.1 * torch.randn(n_latents, d, generator=stream).to(device)
        p["b_enc"] += 0.1 * torch.randn(n_latents, generator=stream).to(device)
        p["b_enc"][0] += 3.0  # fires in every row: its pairs are cut into segments
        p["b_dec"] += torch.randn(d, generator=stream).to(device)
        learner.rows_since_fired += 10 * (torch.rand(n_latents, generator=stream) < 0.2).to(device)
        learner.step = 5  # before, none can be dead
        outcomes.append(step(learner, x.to(device)))
        learners.append(tensors_of(learner))
    mine, other = outcomes
    for name, t in learners[0].items():
        u, v = t.double(), learners[1][name].double()
        assert float((u - v).abs().max()) <= 1e-4 * float(v.abs().max()) + 1e-9, name
    for field in ("error", "loss", "grad_norm", "fired"):
        a, b = float(getattr(mine, field)), float(getattr(other, field))
        assert abs(a - b) <= 1e-4 * abs(b), field
    a, b = float(mine.parts["aux"]), float(other.parts["aux"])
    assert b > 0
    assert abs(a - b) <= 1e-4 * b
    lengths = learners[0]["parameters.W_dec"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(n_latents, device=device), rtol=0, atol=1e-6)


def configurations(n: int, k: int, **more: Any) -> dict[str, Any]:
    target = {"target_l0": float(k), **more}
    more = {"k": k, **more}
    quarter = n // 4
    return {
        "topk": TopK(n, **more),
        "batchtopk": BatchTopK(n, **more),
        "jumprelu": JumpReLU(n, bandwidth=0.1, **target),
        "relu": ReLU(n, **target),
        "gated": Gated(n, **target),
        "matryoshka": Matryoshka(n, sizes=(quarter, n), **more),
        "matryoshka-truncated": Matryoshka(n, sizes=(quarter, n), k_per_size="truncated", **more),
        "matryoshka-batch": Matryoshka(n, sizes=(quarter, n), over="batchtopk", **more),
        "hierarchical": HierarchicalTopK(n, levels=(k // 2, k), **more),
    }


def check_learners(n: int, d: int, n_latents: int, k: int, steps: int, device: str) -> None:
    """Steps of every architecture are those of the plain step, and the same when done again."""
    stream = torch.Generator().manual_seed(0)
    basis = torch.randn(40, d, generator=stream)
    codes = torch.rand(steps * n, 40, generator=stream) * (torch.rand(steps * n, 40, generator=stream) < 0.1)
    x = (codes @ basis + 0.5).to(device)

    def new(config: Any) -> Any:
        start = {"bias": x.mean(0), "scale": torch.tensor(2.0, device=device), "sample": x, "device": device}
        return initialize_learner(config, 0, resolve(config, d, 40, n), **start)

    left: list[int] = []

    def counted(learner: Any, rows: Tensor) -> Any:
        left.append(learner.step)
        return plain_step(learner, rows)

    fused.plain_step = counted
    for name, config in configurations(n_latents, k, lr=1e-3, dead_after_rows=n).items():
        mine, again, plain = (new(config) for _ in range(3))
        assert fused.fuses(mine), name
        left.clear()
        for part in x.split(n):
            a, b = fused.fused_step(mine, part), plain_step(plain, part)
            assert a.parts.keys() == b.parts.keys()
            for field in ("loss", "error", "fired", "dead", "grad_norm"):
                torch.testing.assert_close(
                    getattr(a, field), getattr(b, field), rtol=5e-4, atol=5e-4, check_dtype=False, msg=f"{name} {field}"
                )
        assert not left, (name, left)
        if device == EVERYTHING or name == "topk":
            for part in x.split(n):
                fused.fused_step(again, part)
            assert all(torch.equal(t, tensors_of(again)[key]) for key, t in tensors_of(mine).items()), name
        for key, t in tensors_of(mine).items():
            u, v = t.double(), tensors_of(plain)[key].double()
            assert float((u - v).norm()) <= 3e-3 * float(v.norm()) + 1e-9, (name, key)


def check_kernels(device: str, large: bool) -> None:
    shapes = [(9, 48, 150, 5), (5, 100, 130, 20), (3, 7, 40, 2)]
    for seed, (n, d, n_latents, k) in enumerate(shapes + [(300, 768, 16384, 32), (70, 64, 40000, 100)] * large):
        check_encode(*problem(seed, n, d, n_latents, device), k, block_rows=4 if n == 9 else None)
    check_hard_rows(device)
    for shape in [(20, 48, 70), *([(500, 768, 4096), (100, 4096, 2000)] * large)]:
        check_bound(3, *shape, device)
    check_threshold(4, 20, 32, 200, device)
    for seed, (n, d, n_latents) in enumerate([(30, 20, 50), (17, 300, 9), (1, 1, 1)]):
        check_sums(seed, n, d, n_latents, device)
    for shape in [(40, 24, 60, 5), *([(2048, 384, 4096, 32)] * large)]:
        check_step(*shape, device)


def main(device: str, what: str, launches: str = "") -> None:
    large = device == EVERYTHING
    backend._chosen = "fast"
    if not large:  # the interpreter runs on the CPU's tensors
        kernels.step_kernels = dispatch.step_kernels = lambda _: ops
        ops.SEGMENT = 32
        record_launches()
    if what == "kernels":
        check_kernels(device, large)
    else:
        check_learners(*((512, 64, 1024, 8, 10) if large else (12, 12, 48, 4, 2)), device)
    if launches:
        Path(launches).write_text("".join(f"{line}\n" for line in LAUNCHES))
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
