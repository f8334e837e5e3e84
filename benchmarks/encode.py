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

Rows to codes in compressed sparse rows. Peers hand out what their own `encode` gives in its sparsest form: values and
indices (eai-sparsify, dictionary-learning), a dense tensor made sparse (sae-lens). saekit's codes are those of the fp32
product. "bf16 product" is the encoder's product alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repetition of the smallest shape, nothing written")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--shapes", default="", help="d:n:k:batch,... instead of the usual ones")
    parser.add_argument("--only", default="", help="contestants, separated by commas")
    options = parser.parse_args()
    shapes = [tuple(int(part) for part in shape.split(":")) for shape in options.shapes.split(",") if shape] or SHAPES
    workloads = []
    for d, n, k, batch in shapes[:1] if options.quick else shapes:
        for arch in ("topk", "jumprelu", "relu"):
            if arch != "topk" and (d, n) != (768, 16384):
                continue
            peers = arena.available_peers() if arch == "topk" else []
            names = ["saekit", "bf16 product", "saekit plain", *peers]
            results = arena.measure(
                [name for name in names if not options.only or name in options.only.split(",")],
                {"work": "encode", "arch": arch, "d": d, "n": n, "k": k, "batch": batch},
                repetitions=1 if options.quick else options.repetitions,
            )
            title = f"{arch}: d = {d}, n = {n:,}, about {k} codes per row, {batch:,} rows"
            workloads.append({"title": title, "arch": arch, "d": d, "n": n, "k": k, "batch": batch, "results": results})
            print(title, *arena.HEADER, *arena.table(results, "saekit"), "", sep="\n", flush=True)
    if not options.quick and not options.only and not options.shapes:
        arena.write(
            "encode", workloads, ABOUT, " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])
        )


main()
