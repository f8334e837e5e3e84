"""How a contestant talks to the script that measures it, and the rows that all contestants get.

A contestant is a process of its own, in its own environment. It prepares one workload and then calls `Gate.pause`
before every repetition: that reports the time since the last start signal, waits for the next one, and the work between
two calls is what is measured. So the contestants take turns, one repetition each, and only one of them ever computes.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch

DEAD_SCALE = 0.2
"""Length of a dead latent's encoder row among others."""


class Gate:
    """Standard input and output as start signals and times."""

    def __init__(self) -> None:
        self.started: tuple[float, float] | None = None
        self.out = sys.stdout
        sys.stdout = sys.stderr  # what trainers print is not an answer

    def pause(self) -> None:
        """Report the repetition that has just ended, wait for the signal to start the next; exit when there is none."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now, cpu = time.perf_counter(), time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated()
        answer = {"seconds": None, "cpu_seconds": None, "peak_bytes": peak}
        if self.started is not None:
            answer |= {"seconds": now - self.started[0], "cpu_seconds": cpu - self.started[1]}
        print(json.dumps(answer), file=self.out, flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        self.started = time.perf_counter(), time.process_time()


def job() -> tuple[str, dict]:
    """Name of the contestant and its workload: work, device, d, n, k, batch, dead."""
    return sys.argv[1], json.loads(sys.argv[2])


def dead_latents(n: int, share: float) -> torch.Tensor:
    """Which latents of a workload are dead, ``[n]`` bool.

    Their encoder rows are `DEAD_SCALE` times as long, so that they are never among the k largest, and before every step
    the trainer's counters say that they have not fired for long.
    """
    return torch.rand(n, generator=torch.Generator().manual_seed(5)) < share


def rows(d: int, batch: int, seed: int) -> torch.Tensor:
    """One batch of dense, mildly clustered activations, ``[batch, d]`` float32."""
    fixed = torch.Generator().manual_seed(0)
    centers = torch.randn(64, d, generator=fixed)
    spectrum = torch.arange(1, d + 1).float() ** -0.3
    stream = torch.Generator().manual_seed(seed + 1)
    which = torch.randint(64, (batch,), generator=stream)
    x = torch.randn(batch, d, generator=stream)
    for part, cluster in zip(x.split(64), which.split(64), strict=True):  # in place: no memory beside the rows
        part.add_(centers[cluster], alpha=0.7).mul_(spectrum).add_(0.5)
    return x
