"""What `test_cuda` runs in a process of its own: the Triton kernels beside the plain ones.

Arguments: a device, what to check (``kernels``, ``learners`` or ``verdict``), and on the CPU a file to write one line
for each kind of launch to, for `gpu_compile`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit import kernels
from saekit.kernels import backend, dispatch, verdicts
from saekit.kernels.cuda import ops
from saekit.training import fused, kernel_check
from saekit.training.config import TopK
from saekit.training.defaults import resolve
from saekit.training.kernel_check import SIZES, SMALL, CheckSizes, problem
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


def patch_language_once() -> None:
    """Keep `triton.language` as the interpreter needs it: it is changed and restored at every call of a function."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        seen = frozenset(id(each) for each in function.__globals__.values() if each is tl or each is tl.core)
        if seen not in patched:
            patched.add(seen)
            patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


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


def check_kernels(device: str, large: bool) -> None:
    sizes = SIZES["cuda"] if large else CheckSizes(SMALL, (12, 12, 48, 4), 2, [])
    for name, work, compare in kernel_check.comparisons(subject(device), sizes):
        if work == "encode":
            assert not compare(), (name, compare())
    x, W, b = problem(9, 8, 32, 130, device)
    W[:] = W[0]  # of equal ones, the first
    found = ops.topk_encode(x, W, torch.zeros_like(b), 4)[1].sort().values
    assert torch.equal(found, torch.arange(4).expand(8, 4).to(device))
    for shape in [(20, 48, 70), *([(500, 768, 4096), (100, 4096, 2000)] * large)]:
        check_bound(3, *shape, device)
    for shape in [(40, 24, 60, 5), *([(2048, 384, 4096, 32)] * large)]:
        check_step(*shape, device)


def check_learners(device: str, large: bool) -> None:
    """Steps of every architecture are those of the plain step, and the same when done again."""
    sizes = SIZES["cuda"] if large else CheckSizes([], (12, 12, 48, 4), 2, [])
    left: list[int] = []

    def counted(learner: Any, rows: Tensor, *more: Any) -> Any:
        left.append(learner.step)
        return plain_step(learner, rows, *more)

    fused.plain_step = counted
    for name, work, compare in kernel_check.comparisons(subject(device), sizes):
        if work == "step":
            assert not compare(), (name, compare())
            assert not left, (name, left)


def check_verdict() -> None:
    """The whole of ``saekit kernels check`` on a GPU that is not there: the interpreter does its work."""
    torch.cuda.get_device_name = lambda _=None: "GPU of a test"
    torch.cuda.get_device_capability = lambda _=None: (9, 0)
    every, kernel_check.TIME_LIMIT = kernel_check.configurations, 1e9
    kernel_check.configurations = lambda *a, **k: {"topk": every(*a, **k)["topk"]}  # the others are checked above
    gpu = torch.device("cuda", 0)
    mine = dataclasses.replace(kernel_check.subject_of(gpu), tensors_on=torch.device("cpu"))
    verdict = kernel_check.check(mine, CheckSizes(SMALL[-1:], (12, 12, 48, 4), 2, [(4, 8, 32, 2)], 1))
    assert not verdict.failed, verdict.failed
    assert {each.work for each in verdict.timings} == {"encode", "step"}
    assert verdict.fast == ()  # an interpreter is slow
    verdicts.keep(verdict)
    backend._chosen = "auto"
    assert verdicts.verdict_on(gpu) == verdict
    assert not backend.triton_runs("encode", gpu)
    faster = tuple(dataclasses.replace(each, plain=1e6) for each in verdict.timings)
    verdicts.keep(dataclasses.replace(verdict, timings=faster))
    assert backend.triton_runs("encode", gpu)
    assert backend.triton_runs("step", gpu)


def subject(device: str) -> kernel_check.Subject:
    fast = kernel_check.Encoders(ops.topk_encode, ops.threshold_encode, ops.csr_decode)
    return kernel_check.Subject({}, torch.device(device), fast)


def main(device: str, what: str, launches: str = "") -> None:
    large = device == EVERYTHING
    backend._chosen = "fast"
    if not large:  # the interpreter runs on the CPU's tensors
        kernels.step_kernels = dispatch.step_kernels = lambda _: ops
        ops.SEGMENT = 32
        record_launches()
        patch_language_once()
    if what == "kernels":
        check_kernels(device, large)
    elif what == "verdict":
        check_verdict()
    else:
        check_learners(device, large)
    if launches:
        Path(launches).write_text("".join(f"{line}\n" for line in LAUNCHES))
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
