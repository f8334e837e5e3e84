"""Training step of a TopK SAE: saekit beside the peers' own trainers, in turns.

``python benchmarks/step.py`` measures all shapes (about 15 minutes); ``--quick`` one repetition of the small ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena

SHAPES = [
    (64, 2048, 16, 2048),
    (384, 4096, 32, 4096),
    (768, 4096, 32, 4096),
    (384, 16384, 32, 4096),
    (768, 16384, 32, 4096),
]
ABOUT = """## Training step

One step of a TopK SAE with Adam, unit decoder rows and AuxK: selection, loss, gradients, (for all but eai-sparsify)
clipping of the global gradient norm, update, counters of dead latents. Every peer runs in its own trainer class.
saekit's codes are those of the fp32 product. Contestants take turns, one step each; ratios are medians over the turns.
"bf16 product" is the encoder's product alone. Peak memory is that of the whole process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest shape, nothing written")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--shapes", default="", help="d:n:k:batch,... instead of the usual ones")
    parser.add_argument("--only", default="", help="contestants, separated by commas")
    options = parser.parse_args()
    shapes = [tuple(int(part) for part in shape.split(":")) for shape in options.shapes.split(",") if shape] or SHAPES
    names = ["saekit", "bf16 product", "saekit plain", *arena.available_peers()]
    names = [name for name in names if not options.only or name in options.only.split(",")]
    workloads = []
    for d, n, k, batch in shapes[:1] if options.quick else shapes:
        small = n * d < 1e6
        results = arena.measure(
            names,
            {"work": "step", "d": d, "n": n, "k": k, "batch": batch},
            repetitions=1 if options.quick else options.repetitions * (5 if small else 1),
            warmup=10 if small else 2,
        )
        title = f"d = {d}, n = {n:,}, k = {k}, batch {batch:,}"
        workloads.append({"title": title, "d": d, "n": n, "k": k, "batch": batch, "results": results})
        print(title, *arena.HEADER, *arena.table(results, "saekit"), "", sep="\n", flush=True)
    if not options.quick and not options.only and not options.shapes:
        arena.write("step", workloads, ABOUT, " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]))


main()
