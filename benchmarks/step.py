"""Training step: saekit beside the peers' own trainers and beside plain torch, in turns.

``python benchmarks/step.py`` measures all shapes (about 40 minutes); ``--quick`` one repetition of the small ones.
``--shapes 64:2048:16:2048,64:4096:16:2048,... --write`` shows how it grows with d, n, k and rows.
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
ARCHITECTURES = ("batchtopk", "jumprelu", "relu", "gated", "matryoshka")
FEW = [(64, 2048, 16, 2048), (384, 4096, 32, 4096), (768, 16384, 32, 4096)]
"""Shapes of these."""
ABOUT = """## Training step

One step of a TopK SAE with Adam, unit decoder rows and AuxK: selection, loss, gradients, (for all but eai-sparsify)
clipping of the global gradient norm, update, counters of dead latents. Every peer runs in its own trainer class.
saekit's codes are those of the fp32 product. Contestants take turns, one step each; ratios are medians over the turns.
"bf16 product" is the encoder's product alone; "plain torch" is what anybody would write first (dense codes, autograd,
`torch.optim.Adam`, the same clipping and counters); "saekit plain" is saekit without compiled kernels, whose top-k
family is sparse too. Peak memory is that of the whole process. The other architectures have the same contestants but
eai-sparsify, which has TopK only, each with its own penalty and first weights: a step of the peers costs the same
however many latents fire, saekit's costs less when fewer do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest shape, nothing written")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--shapes", default="", help="d:n:k:batch,... instead of the usual ones")
    parser.add_argument("--only", default="", help="contestants, separated by commas")
    parser.add_argument("--arch", default="", help="architectures, separated by commas, instead of all")
    parser.add_argument(
        "--dead", type=float, default=0.0, help="share of latents that are dead before every step (topk)"
    )
    parser.add_argument("--device", default="cpu", help="cuda: needs a GPU; see PEER_PYTHON in arena.py")
    parser.add_argument("--avx2", action="store_true", help="no instructions beyond AVX2, for any contestant")
    parser.add_argument("--cpu-time", action="store_true", help="time of all threads, on a machine that is shared")
    parser.add_argument("--write", action="store_true", help="write the tables whatever was chosen")
    options = parser.parse_args()
    chosen = [tuple(int(part) for part in shape.split(":")) for shape in options.shapes.split(",") if shape]
    peers = [] if options.only and not set(options.only.split(",")) & set(arena.PEERS) else arena.available_peers()
    # The fp32 product is the fastest in blocks of 32 MiB: smaller ones read the encoder more often.
    processor = {"processor": "avx2", "block_bytes": 32 * 2**20} if options.avx2 else {}
    workloads = []
    for arch in [name for name in options.arch.split(",") if name] or ["topk", *ARCHITECTURES]:
        shapes = chosen or (SHAPES if arch == "topk" else FEW)
        able = [peer for peer in peers if arch == "topk" or peer != "eai-sparsify"]  # which has no other architecture
        product = "fp32 product" if options.avx2 else "bf16 product"
        names = ["saekit", product, "saekit plain", *(["plain torch"] if arch == "topk" else []), *able]
        names = [name for name in names if not options.only or name in options.only.split(",")]
        for d, n, k, batch in shapes[:1] if options.quick else shapes:
            small = n * d < 1e6
            sizes = {"arch": arch, "d": d, "n": n, "k": k, "batch": batch}
            results = arena.measure(
                names,
                {"work": "step", "device": options.device, **sizes, "dead": options.dead, **processor},
                repetitions=1 if options.quick else options.repetitions * (5 if small else 1),
                warmup=10 if small else 2,
                clock="cpu_seconds" if options.cpu_time else "seconds",
            )
            title = f"{arch}: d = {d}, n = {n:,}, k = {k}, batch {batch:,}"
            workloads.append({"title": title, **sizes, "results": results})
            print(title, *arena.HEADER, *arena.table(results, "saekit"), "", sep="\n", flush=True)
    if options.write or not (options.quick or options.only or options.shapes or options.arch):
        arena.write(
            "step" if options.device == "cpu" else f"step-{options.device}",
            workloads,
            ABOUT,
            " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        )


main()
