"""Where the time of a TopK step at the sizes of real models goes: CPU time of its parts, on one thread.

``python benchmarks/shares.py`` measures the shapes of ``benchmarks/step.py --floor`` and writes a table.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena
from gate import rows

SHAPES = [(1024, 32768, 64, 1024), (2304, 65536, 64, 1024)]
REPETITIONS = 5
PARTS = {
    "rounding of the encoder": ("ops", "encoder_at"),
    "product": ("low_bit_matmul", "multiply8"),
    "product in bf16": ("low_bit_matmul", "multiply"),
    "product by torch": ("torch", "mm"),
    "selection": ("selection_numba", "choose"),
    "decode": ("ops", "reconstruct"),
    "gradients": ("ops", "gradients"),
    "Adam": ("ops", "descend"),
}
"""Functions of `saekit.kernels.cpu`, and of torch, that are timed."""
ABOUT = """## Where the time of a step goes

A TopK step at the shapes of real models on one thread: CPU time of its parts, medians of {n} steps. "Rounding" makes
the bytes that candidates are found with; "selection" multiplies candidates again in fp32, whose rows come from memory.
"Copy" is `target.copy_(source)` of as many bytes as "gradients" and "Adam" have to read or write: gradients written
(8 nd), then they are read, and weights and moments are read and written (56 nd)."""


def main() -> None:
    import saekit.kernels.cpu as cpu
    from saekit.kernels.cpu import low_bit_matmul, ops, selection_numba  # noqa: F401

    torch.set_num_threads(1)
    spent: dict[str, float] = defaultdict(float)
    for label, (module, name) in PARTS.items():
        owner = torch if module == "torch" else getattr(cpu, module)
        setattr(owner, name, timed(getattr(owner, name), label, spent))
    workloads = []
    for d, n, k, batch in SHAPES:
        found = shares(d, n, k, batch, spent)
        workloads.append({"title": f"topk: d = {d}, n = {n:,}, k = {k}, batch {batch:,}", "milliseconds": found})
        print(workloads[-1], flush=True)
    folder = arena.ROOT / "benchmarks"
    record = {"command": "python benchmarks/shares.py", "machine": arena.machine(), "workloads": workloads}
    (folder / "step-shares.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [ABOUT.format(n=REPETITIONS), "", f"`{record['command']}` on {record['machine']}.", ""]
    for workload in workloads:
        whole = workload["milliseconds"]["whole step"]
        lines += [f"**{workload['title']}**", "", "| part | ms | share of the step |", "| --- | --- | --- |"]
        lines += [f"| {part} | {ms:.4g} | {ms / whole:.0%} |" for part, ms in workload["milliseconds"].items()]
        lines.append("")
    arena.replace_part(folder / "README.md", "step-shares", "\n".join(lines))


def timed(function: Any, label: str, spent: dict[str, float]) -> Any:
    """The same function, whose CPU time is added up."""

    def work(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **options)
        finally:
            spent[label] += time.process_time() - start

    return work


def shares(d: int, n: int, k: int, batch: int, spent: dict[str, float]) -> dict[str, float]:
    """Milliseconds of each part of a step, and of the copy of as many bytes as the passes over the weights."""
    from saekit.training.config import TopK
    from saekit.training.defaults import resolve
    from saekit.training.fused import fused_step
    from saekit.training.learner import initialize_learner

    batches = [rows(d, batch, seed) for seed in range(2)]
    sample = batches[0]
    learner = initialize_learner(
        TopK(n, k=k),
        0,
        resolve(TopK(n, k=k), d, 10_000, batch),
        bias=sample.mean(0),
        scale=d**0.5 / sample.norm(dim=1).mean(),
        sample=sample,
        device="cpu",
    )
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(2 + REPETITIONS):
        spent.clear()
        start = time.process_time()
        assert bool(fused_step(learner, batches[turn % 2]).finite)
        whole = time.process_time() - start
        if turn >= 2:
            for label in PARTS:
                times[label].append(spent[label])
            times["the rest"].append(whole - sum(spent.values()))
            times["whole step"].append(whole)
    del learner
    source, target = torch.ones(2, 8 * n * d)  # 64 bytes for each of nd
    for _ in range(3):
        start = time.process_time()
        target.copy_(source)
        times["copy of as many bytes"].append(time.process_time() - start)
    return {label: 1e3 * statistics.median(each) for label, each in times.items() if any(each)}


main()
