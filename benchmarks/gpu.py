"""The Triton kernels on a CUDA device: steps, encoding, where a step's time goes, how close the bound is.

``python benchmarks/gpu.py`` needs nothing but torch, Triton and saekit's sources (about 2 minutes); first
``python tests/kernels/gpu_checks.py cuda kernels`` and ``... cuda learners``, which say whether the kernels are right.
The peers stand beside saekit in ``step.py --device cuda`` and ``encode.py --device cuda``. ``--quick`` runs something
small once, also on a CPU with ``TRITON_INTERPRET=1`` in the environment (to see that this script works).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import torch
from gate import rows

import saekit.kernels
from saekit.kernels import reference
from saekit.kernels.cuda import ops
from saekit.training.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from saekit.training.defaults import resolve
from saekit.training.fused import fused_step, fuses
from saekit.training.learner import initialize_learner
from saekit.training.step import plain_step

SHAPES = [(64, 2048, 16, 2048), (768, 16384, 32, 4096), (768, 32768, 32, 4096), (2304, 65536, 64, 4096)]
OTHERS = {
    "batchtopk": lambda n, k: BatchTopK(n, k=k),
    "jumprelu": lambda n, k: JumpReLU(n, target_l0=float(k)),
    "relu": lambda n, k: ReLU(n, target_l0=float(k)),
    "gated": lambda n, k: Gated(n, target_l0=float(k)),
    "matryoshka": lambda n, k: Matryoshka(n, k=k),
}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], repetitions: int) -> float:
    """Median wall time of ten calls in a row, per call: what a training loop sees."""
    times = []
    for turn in range(repetitions + 1):
        synchronize()
        before = time.perf_counter()
        for _ in range(10):
            work()
        synchronize()
        if turn:
            times.append((time.perf_counter() - before) * 100)
    return statistics.median(times)


def learner(config: Any, d: int, batch: int, device: str) -> Any:
    sample = rows(d, batch, 0).to(device)
    start = {"bias": sample.mean(0), "scale": d**0.5 / sample.norm(dim=1).mean(), "sample": sample, "device": device}
    return initialize_learner(config, 0, resolve(config, d, 10_000, batch), **start)


def steps(make: Callable[[], Any], d: int, batch: int, device: str, repetitions: int) -> dict[str, float]:
    """Fused and plain steps from the same start, and the peak of device memory."""
    batches = [rows(d, batch, seed).to(device) for seed in range(2)]
    found: dict[str, float] = {}
    for name, step in (("fused", fused_step), ("plain", plain_step)):
        mine = learner(make(), d, batch, device)
        assert name == "plain" or fuses(mine)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        found[f"{name} step, ms"] = milliseconds(lambda s=step, m=mine: [s(m, x) for x in batches], repetitions) / 2
        if torch.cuda.is_available():
            found[f"{name} peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def encoding(d: int, n: int, k: int, batch: int, device: str, repetitions: int) -> dict[str, float]:
    """Encoding, and the bare products: bf16, and where torch has them int8 and fp8."""
    x = rows(d, batch, 0).to(device)
    x -= x.mean(0)
    W = torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(1))).to(device)
    b = torch.zeros(n, device=device)
    found = {
        "encode, ms": milliseconds(lambda: ops.topk_encode(x, W, b, k), repetitions),
        "plain encode, ms": milliseconds(lambda: reference.topk_encode(x, W, b, k), repetitions),
    }
    part = min(batch, 1024)
    low_x, low_W = x[:part].bfloat16(), W.bfloat16()
    found["bf16 product, ms"] = milliseconds(lambda: low_x @ low_W.T, repetitions) * batch / part
    if torch.cuda.is_available():
        x8, W8 = (t.clamp(-4, 4).mul(31).to(torch.int8) for t in (x[:part], W))
        found["int8 product, ms"] = milliseconds(lambda: torch._int_mm(x8, W8.T), repetitions) * batch / part
        xf, Wf, one = x[:part].to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn), torch.ones((), device=device)
        fp8 = lambda: torch._scaled_mm(xf, Wf.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
        found["fp8 product, ms"] = milliseconds(fp8, repetitions) * batch / part
    # Candidates that the bound leaves, and how much of it is used.
    low, latents = ops._round(x[:part]), ops._round(W)
    bound = ops._bound(low, latents, b)
    room = max(1024, 4 * k)
    for rows_, product in ops._blocks(low, latents, bound, part):
        candidates = torch.empty((len(product), room), dtype=torch.int32, device=device)
        counts = torch.empty(len(product), dtype=torch.int32, device=device)
        ops._select(product, bound, rows_, candidates, counts, n, k)
        found["candidates per row"] = float(counts.float().mean())
        off = (product.double() - x[rows_].double() @ W.double().T).abs()
        most = ops.ROUNDING * product.double().abs() + bound.row[rows_, None].double() * bound.latent + bound.bias
        found["largest error / bound"] = float((off / most).max())
        break
    return found


def kernels_of_a_step(d: int, n: int, k: int, batch: int, device: str) -> list[tuple[float, str]]:
    """Microseconds of each kernel in a TopK step, largest first."""
    from torch.profiler import ProfilerActivity, profile

    mine, x = learner(TopK(n, k=k), d, batch, device), rows(d, batch, 0).to(device)
    for _ in range(3):
        fused_step(mine, x)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            fused_step(mine, x)
        synchronize()
    spent = [(event.self_device_time_total / 5, event.key) for event in found.key_averages()]
    return sorted((pair for pair in spent if pair[0] > 0), reverse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="something small, once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="", help="a file to write the numbers to, as JSON")
    options = parser.parse_args()
    repetitions = 1 if options.quick else 9
    saekit.kernels.use("fast")
    if options.device == "cpu":  # the interpreter runs on the CPU's tensors
        saekit.kernels.dispatch.step_kernels = saekit.kernels.step_kernels = lambda _: ops
    record: dict[str, Any] = {"torch": torch.__version__, "device": options.device}
    if torch.cuda.is_available():
        record["device"] = torch.cuda.get_device_name()
    for shape in [(8, 64, 2, 4)] if options.quick else SHAPES:
        d, n, k, batch = shape
        title = f"topk d {d}, n {n}, k {k}, {batch} rows"
        record[title] = steps(lambda n=n, k=k: TopK(n, k=k), d, batch, options.device, repetitions)
        record[title] |= encoding(d, n, k, batch, options.device, repetitions)
        print(title, *(f"  {key}: {value:.4g}" for key, value in record[title].items()), sep="\n", flush=True)
        if torch.cuda.is_available():
            spent = kernels_of_a_step(*shape, options.device)
            record[title]["kernels, us"] = {name: us for us, name in spent}
            print(*(f"    {us:8.1f} us  {name[:90]}" for us, name in spent[:25]), sep="\n", flush=True)
    d, n, k, batch = (8, 64, 2, 4) if options.quick else SHAPES[1]
    for name, make in OTHERS.items():
        record[name] = steps(lambda m=make: m(n, k), d, batch, options.device, repetitions)
        print(name, {key: round(value, 3) for key, value in record[name].items()}, flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(record, indent=1) + "\n")


main()
