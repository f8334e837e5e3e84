"""Encoding rows to sparse codes: saekit beside the peers, in turns.

``python benchmarks/encode.py`` measures all shapes (about 10 minutes); ``--quick`` one repetition of a small one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena

SHAPES = [(384, 4096, 32, 4096), (384, 16384, 32, 4096), (768, 16384, 32, 4096), (768, 32768, 32, 4096)]
ABOUT = """## Encode

Rows to codes in compressed sparse rows. Peers hand out what their own `encode` gives in its sparsest form: for TopK
values and indices (eai-sparsify, dictionary-learning), otherwise a dense tensor made sparse. BatchTopK encodes as
JumpReLU. All biases are such that as many latents fire. saekit's codes are those of the fp32 product. "bf16 product" is
the encoder's product alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest shape, nothing written")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--shapes", default="", help="d:n:k:batch,... instead of the usual ones")
    parser.add_argument("--only", default="", help="contestants, separated by commas")
    parser.add_argument("--arch", default="", help="architectures, separated by commas, instead of all")
    parser.add_argument("--device", default="cpu", help="cuda: needs a GPU; see PEER_PYTHON in arena.py")
    options = parser.parse_args()
    chosen = [tuple(int(part) for part in shape.split(":")) for shape in options.shapes.split(",") if shape]
    shapes = chosen or SHAPES
    peers = [] if options.only and not set(options.only.split(",")) & set(arena.PEERS) else arena.available_peers()
    workloads = []
    for d, n, k, batch in shapes[:1] if options.quick else shapes:
        for arch in [name for name in options.arch.split(",") if name] or ("topk", "jumprelu", "relu"):
            if arch != "topk" and (d, n) not in ((384, 4096), (768, 16384)) and not chosen:
                continue
            able = [peer for peer in peers if arch == "topk" or peer != "eai-sparsify"]  # which has TopK only
            names = ["saekit", "bf16 product", "saekit plain", *able]
            results = arena.measure(
                [name for name in names if not options.only or name in options.only.split(",")],
                {"work": "encode", "device": options.device, "arch": arch, "d": d, "n": n, "k": k, "batch": batch},
                repetitions=1 if options.quick else options.repetitions,
            )
            title = f"{arch}: d = {d}, n = {n:,}, about {k} codes per row, {batch:,} rows"
            workloads.append({"title": title, "arch": arch, "d": d, "n": n, "k": k, "batch": batch, "results": results})
            print(title, *arena.HEADER, *arena.table(results, "saekit"), "", sep="\n", flush=True)
    if not (options.quick or options.only or options.shapes or options.arch):
        arena.write(
            "encode" if options.device == "cpu" else f"encode-{options.device}",
            workloads,
            ABOUT,
            " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        )


main()
