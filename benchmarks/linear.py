"""Layers in fp32: torch's own choice of library and oneDNN in turns, by themselves and in forward passes of two models.

``python benchmarks/linear.py`` takes about a minute; ``--quick`` once each, nothing written.
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

import arena
import torch
import torch.nn.functional as F

from saekit import capture, kernels
from saekit.kernels.cpu import onednn_linear
from saekit.models.loading import load_model

ROWS = 2048
LAYERS = [(64, 256), (192, 768), (384, 384), (384, 1536), (1536, 384), (768, 3072), (3072, 768)]
TOKENS = 20_000
ABOUT = """## Layers of a model

torch hands products in fp32 to MKL, which runs 256-bit code on processors of AMD; `saekit.kernels.fast_linears` hands
those of a model's layers to oneDNN there, which uses their 512-bit units. Milliseconds of a layer for 2,048 tokens, and
tokens a second when rows are captured: the whole of `saekit.capture`, tokenizer included. Elsewhere both columns are
the same library."""


def in_turns(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each, the first turn left out."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, work in ways.items():
            before = time.perf_counter()
            work()
            if turn:
                times[name].append(time.perf_counter() - before)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once each, nothing written")
    options = parser.parse_args()
    turns, record = (1 if options.quick else 9), []
    lines = ["| what | torch | oneDNN | ratio |", "| --- | --- | --- | --- |"]
    for d, m in LAYERS:
        x, W, b = torch.randn(ROWS, d), torch.randn(m, d), torch.randn(m)

        def many(layer: Callable[..., Any], x: Any = x, W: Any = W, b: Any = b) -> Callable[[], None]:
            return lambda: [layer(x, W, b) for _ in range(10)] and None

        with torch.no_grad():
            times = in_turns({"torch": many(F.linear), "oneDNN": many(onednn_linear._linear)}, turns)
        torch_s, own_s = (statistics.median(times[name]) / 10 for name in ("torch", "oneDNN"))
        lines.append(f"| {d} to {m:,}, ms | {1e3 * torch_s:.2f} | {1e3 * own_s:.2f} | {torch_s / own_s:.2f}× |")
        record.append({"d": d, "m": m, "seconds": times})
    for name, path in arena.models().items():
        lm, tokens = load_model(path), (1000 if options.quick else TOKENS)

        def forward(mode: str, lm: Any = lm, tokens: int = tokens) -> None:
            with kernels.using(mode):
                capture(lm, "builtin", layer=2, tokens=tokens)

        times = in_turns({"torch": lambda: forward("plain"), "oneDNN": lambda: forward("auto")}, min(turns, 5))
        torch_s, own_s = (statistics.median(times[name]) for name in ("torch", "oneDNN"))
        label = f"capture from {name}, tokens/s"
        lines.append(f"| {label} | {tokens / torch_s:,.0f} | {tokens / own_s:,.0f} | {torch_s / own_s:.2f}× |")
        record.append({"model": name, "tokens": tokens, "seconds": times})
    print(*lines, sep="\n")
    if options.quick:
        return
    machine = arena.machine()
    text = "\n".join([ABOUT, "", f"`python benchmarks/linear.py` on {machine}.", "", *lines])
    arena.replace_part(arena.ROOT / "benchmarks" / "README.md", "linear", text)
    (arena.ROOT / "benchmarks" / "linear.json").write_text(
        json.dumps({"machine": machine, "of": record}, indent=1) + "\n"
    )


main()
