"""Which number formats can narrow down a top-k: how many latents a proven bound leaves to be multiplied again in fp32.

``python benchmarks/candidates.py`` takes about a minute, on any machine; ``--quick`` a few rows, nothing written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena
import torch
from torch import Tensor

from saekit import capture

N, K = 16_384, 32
ABOUT = """## Formats for candidates

A top-k is exact when every latent that could be among the k largest is multiplied again in fp32. Which could is bounded
by Cauchy-Schwarz from what rounding took off the row and off the latent (rounding of the product included), so a coarse
format leaves more of them: latents per row of {n:,} (k = {k}) on average, and the bound at the k-th largest in units of
the standard deviation of a row's pre-activations. "balanced" moves a factor of each column from the rows to the
latents before, as the kernels do. Encoders are random directions for Gaussian rows, and otherwise rows of the same data
at length 1, since a trained encoder's are near its data. "with large columns" has four columns of the rows 50 times as
large, which some language models have. A latent costs 4 d bytes of memory traffic; an int8 or fp8 product saves half of
the time of a bf16 product at most."""


def bf16(t: Tensor) -> Tensor:
    """To 8 bits of significand."""
    return t.bfloat16().float()


def int8(t: Tensor) -> Tensor:
    """To whole numbers up to 127, scaled by row."""
    scale = t.abs().amax(1, keepdim=True) / 127
    return (t / scale).round() * scale


def fp8(t: Tensor) -> Tensor:
    """To e4m3 (4 bits of significand), scaled by row to its whole range."""
    scale = t.abs().amax(1, keepdim=True) / 448
    return (t / scale).to(torch.float8_e4m3fn).float() * scale


FORMATS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bf16": (bf16, 2.0**-8),
    "int8": (int8, 0.0),
    "fp8 (e4m3)": (fp8, 0.0),
}
"""How numbers are rounded, and the relative error of the rounded product."""


def left(x: Tensor, W: Tensor, rounded: Callable[[Tensor], Tensor], unit: float) -> tuple[float, float]:
    """Latents per row that could be among the K largest, and the bound at the K-th largest."""
    x_low, W_low = rounded(x), rounded(W)
    lost_x, lost_W = (x - x_low).norm(dim=1, keepdim=True), (W - W_low).norm(dim=1)
    product = x_low @ W_low.T
    bound = lost_x * W_low.norm(dim=1) + x.norm(dim=1, keepdim=True) * lost_W + unit * product.abs()
    exact = x @ W.T
    kth = exact.topk(K, dim=1)
    spread = exact.std(1)
    share = (bound.gather(1, kth.indices[:, -1:])[:, 0] / spread).mean()
    return float((product + bound >= kth.values[:, -1:]).sum(1).float().mean()), float(share)


def balanced(x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """The same products, of columns of equal size."""
    factor = (W.square().mean(0) / x.square().mean(0)) ** 0.25
    return x * factor, W / factor


def rows_of(model: str, layer: int, n: int) -> Tensor:
    """Centred activations, in random order."""
    source = capture(model, "builtin", layer=layer, tokens=n)
    x = torch.cat([batch.x for batch in source.batches(4096)])[:n]
    return (x - x.mean(0))[torch.randperm(n, generator=torch.Generator().manual_seed(0))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, nothing written")
    options = parser.parse_args()
    asked = 32 if options.quick else 512
    g = torch.Generator().manual_seed(0)
    problems = {"Gaussian, d = 768": (torch.randn(asked, 768, generator=g), torch.randn(N, 768, generator=g))}
    for name, path in arena.models().items():
        x = rows_of(path, 2, N + asked)
        problems[f"{name}, layer 2, d = {x.shape[1]}"] = x[:asked], x[asked:]
    x, W = problems["Gaussian, d = 768"]
    large = torch.ones(768)
    large[:4] = 50.0
    problems["Gaussian with large columns, d = 768"] = x * large, W
    lines = ["| rows | format | latents left | bound |", "| --- | --- | --- | --- |"]
    record = []
    for name, (x, W) in problems.items():
        W = torch.nn.functional.normalize(W)
        for kind, (rounded, unit) in FORMATS.items():
            for moved in (False, True) if kind != "bf16" else (False,):
                count, bound = left(*(balanced(x, W) if moved else (x, W)), rounded, unit)
                label = f"{kind}, balanced" if moved else kind
                lines.append(f"| {name} | {label} | {count:,.0f} | {bound:.2f} |")
                record.append({"rows": name, "format": label, "left": count, "bound": bound})
    text = "\n".join([ABOUT.format(n=N, k=K), "", "`python benchmarks/candidates.py`", "", *lines])
    print(text)
    if not options.quick:
        (arena.ROOT / "benchmarks" / "candidates.json").write_text(json.dumps(record, indent=1) + "\n")
        arena.replace_part(arena.ROOT / "benchmarks" / "README.md", "candidates", text)


main()
