"""What the code for several ranks costs one: the plain step as it is, against one without any call into the mesh.

python benchmarks/one_rank.py              # CPU time in turns (about 20 seconds)
"""

from __future__ import annotations

import argparse
import statistics
import time
from types import ModuleType
from typing import Any

import torch

from saekit.training import losses, penalties, step
from saekit.training.config import TopK
from saekit.training.defaults import resolve
from saekit.training.learner import Learner, initialize_learner

D_IN, LATENTS, K, ROWS = 256, 4096, 32, 512
STEPS = 2
"""Steps that are timed together."""

NOTHING: dict[str, Any] = {
    "over_latents": lambda mesh, x: x,
    "over_rows": lambda mesh, x: x,
    "entering": lambda mesh, x: x,
    "ranks": lambda mesh, values, k: None,
    "reduce_gradients": lambda mesh, gradients: None,
    "sum_over_rows": lambda mesh, x: x,
    "gathered": lambda mesh, x, group="latents": x,
}
"""What stands for the functions of the mesh: what they return in one process."""


def timed(learner: Learner, x: torch.Tensor, functions: dict[tuple[ModuleType, str], Any]) -> float:
    """CPU seconds of some steps with these functions."""
    for (module, name), function in functions.items():
        setattr(module, name, function)
    begin = time.process_time()
    for _ in range(STEPS):
        step.plain_step(learner, x)
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="two pairs")
    options = parser.parse_args()
    repetitions = 2 if options.quick else options.repetitions
    torch.set_num_threads(1)
    x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(0))
    config = TopK(LATENTS, k=K)

    def new() -> Learner:
        how = resolve(config, D_IN, 10_000, ROWS)
        return initialize_learner(config, 0, how, bias=x.mean(0), scale=None, sample=x, device="cpu")

    modules = (step, losses, penalties)
    own = {(each, name): getattr(each, name) for each in modules for name in NOTHING if hasattr(each, name)}
    bare = {(module, name): NOTHING[name] for module, name in own}
    one, other = new(), new()
    timed(one, x, own), timed(other, x, bare)
    ratios = []
    for turn in range(repetitions):
        first, second = ((one, own), (other, bare))[:: 1 if turn % 2 else -1]
        seconds = {id(learner): timed(learner, x, functions) for learner, functions in (first, second)}
        ratios.append(seconds[id(one)] / seconds[id(other)])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{config!r}, d {D_IN}, {ROWS} rows: with the mesh / without, {repetitions} pairs of {STEPS} steps in turns")
    print(f"median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
