"""Step time of every training method beside TopK's, in turns: ratios of the least CPU time of one step.

``python benchmarks/methods.py`` measures 768 dimensions, 4,096 latents and 2,048 rows (1 minute); ``--quick`` few
steps of a small one; ``--write`` puts the table into README.md and the numbers into methods.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import saekit as sk
from saekit import kernels
from saekit.files import write_json
from saekit.training import fused
from saekit.training.defaults import resolve
from saekit.training.fused import fused_step, fuses
from saekit.training.initialization import initial_scale
from saekit.training.learner import Learner, initialize_learner
from saekit.training.step import plain_step

HERE = Path(__file__).resolve().parent
LEFT: list[int] = []
"""Steps that the fused step has left to the plain one."""


def counted(learner: Learner, x: torch.Tensor, target: torch.Tensor | None = None) -> Any:
    """Note a step that is left to the plain one, and do it."""
    LEFT.append(learner.step)
    return plain_step(learner, x, target)


fused.plain_step = counted  # type: ignore[attr-defined]
MARKS = "<!-- methods -->", "<!-- end of methods -->"


def configs(n: int, k: int, d: int) -> dict[str, Any]:
    """The methods: what is trained."""
    top = {"n_latents": n, "k": k, "dead_after_rows": 10**9}
    jump = {"n_latents": n, "target_l0": k, "dead_after_rows": 10**9}
    return {
        "TopK": sk.TopK(**top),
        "TopK, aligned": sk.TopK(**top, aligned=True),
        "TopK, l2": sk.TopK(**top, l2=0.03),
        "TopK, orthogonal, chunks of 8,192": sk.TopK(**top, orthogonal=0.25),
        "TopK, orthogonal, chunks of 512": sk.TopK(**top, orthogonal=0.25, orthogonal_chunk=512),
        "TopK, soft-frozen decoder": sk.TopK(**top, control="soft-frozen-decoder"),
        "TopK, k annealed from 4k (first steps)": sk.TopK(**top, k_start=4 * k, k_fraction=1.0),
        "AbsTopK": sk.TopK(**top, sign="magnitude"),
        "AbsTopK, incoherence (iSAE)": sk.TopK(**top, sign="magnitude", incoherence=0.1),
        "HierarchicalTopK": sk.HierarchicalTopK(**top),
        "BatchTopK": sk.BatchTopK(**top),
        "BatchTopK, crosscoder of two sources": sk.BatchTopK(**top, parts=(d // 2, d - d // 2)),
        "Matryoshka": sk.Matryoshka(**top),
        "Matryoshka, detached": sk.Matryoshka(**top, detached=True),
        "Matryoshka, truncated": sk.Matryoshka(**top, k_per_size="truncated"),
        "Matryoshka, truncated, detached": sk.Matryoshka(**top, k_per_size="truncated", detached=True),
        "JumpReLU": sk.JumpReLU(**jump),
        "JumpReLU, tanh": sk.JumpReLU(**jump, tanh=0.003),
        "JumpReLU, tanh, pre_activation": sk.JumpReLU(**jump, tanh=0.003, pre_activation=1e-5),
        "Gated": sk.Gated(**jump),
        "ReLU": sk.ReLU(**jump),
    }


def batches(d: int, n_rows: int) -> Iterator[torch.Tensor]:
    """Rows that are sums of few of 4 d directions, with noise."""
    stream = torch.Generator().manual_seed(0)
    basis = torch.nn.functional.normalize(torch.randn(4 * d, d, generator=stream))
    while True:
        codes = torch.rand(n_rows, 4 * d, generator=stream) * (torch.rand(n_rows, 4 * d, generator=stream) < 0.01)
        yield 8 * codes @ basis + 0.05 * torch.randn(n_rows, d, generator=stream)


def learner_of(config: Any, sample: torch.Tensor) -> Learner:
    """A learner at its start."""
    bias = sample.mean(0)
    resolved = resolve(config, sample.shape[1], 1000, len(sample))
    scale = initial_scale(sample, config.scaling, bias)
    return initialize_learner(config, 0, resolved, bias=bias, scale=scale, sample=sample, device="cpu")


def measure(d: int, n: int, k: int, rows: int, turns: int, warm: int) -> list[dict[str, Any]]:
    """Seconds of CPU time of the cheapest step of each method, after `warm` steps of each."""
    stream = batches(d, rows)
    sample = next(stream)
    methods = configs(n, k, d)
    learners = {name: learner_of(config, sample) for name, config in methods.items()}
    best, left = dict.fromkeys(methods, float("inf")), dict.fromkeys(methods, 0)
    for turn in range(warm + turns):
        x = next(stream)
        for name, learner in learners.items():
            count, began = len(LEFT), time.process_time()
            fused_step(learner, x)
            if turn >= warm:
                best[name] = min(best[name], time.process_time() - began)
                left[name] += len(LEFT) - count
        print(f"turn {turn + 1} of {warm + turns}", flush=True)
    return [
        {"method": name, "seconds": best[name], "ratio": best[name] / best["TopK"],
         "fused": fuses(learners[name]), "plain_steps": left[name]}
        for name in methods
    ]  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The section of README.md."""
    s = found["shape"]
    lines = [
        MARKS[0],
        "## Training methods beside TopK",
        "",
        f"CPU time of the cheapest of {found['turns']} steps on {found['threads']} thread, all methods in turns on the "
        f"same rows: d = {s['d']}, n = {s['n']:,}, k = {s['k']}, {s['rows']:,} rows, after {found['warm']} steps, no "
        "latents dead.",
        "Plain: measured steps that were left to plain torch, as those are in which a row has more than n/4 codes or "
        "pairs in the band. Transcoders and every `control` but the soft-frozen decoder always take that step.",
        "",
        "| method | step, ms | times TopK | plain |",
        "| --- | --: | --: | --: |",
    ]
    lines += [
        f"| {e['method']} | {1000 * e['seconds']:.0f} | {e['ratio']:.2f} | {e['plain_steps']} |" for e in found["steps"]
    ]
    return "\n".join([*lines, "", "`" + found["command"] + "`", MARKS[1]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape and few steps")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write README.md's table and methods.json")
    options = parser.parse_args()
    shape = {"d": 64, "n": 1024, "k": 8, "rows": 256} if options.quick else {"d": 768, "n": 4096, "k": 32, "rows": 2048}
    warm = 1 if options.quick else 3
    torch.set_num_threads(1)
    if kernels.step_kernels(torch.device("cpu")) is None:
        sys.exit(f"the fast kernels do not run here: {kernels.unavailable()}")
    steps = measure(**shape, turns=2 if options.quick else options.turns, warm=warm)
    found = {
        "shape": shape, "turns": options.turns, "warm": warm, "threads": 1, "steps": steps, "saekit": sk.__version__,
        "command": " ".join(["python", "benchmarks/methods.py", *sys.argv[1:]]),
    }  # fmt: skip
    print(table(found))
    if options.write:
        write_json(HERE / "methods.json", found)
        text = (HERE / "README.md").read_text(encoding="utf-8")
        if MARKS[0] in text:
            before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
            text = before + table(found) + after
        else:
            text = text.rstrip("\n") + "\n\n" + table(found) + "\n"
        (HERE / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
