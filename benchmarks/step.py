"""Training step: saekit beside the peers' own trainers and beside plain torch, in turns.

``python benchmarks/step.py`` measures all shapes (about 40 minutes); ``--quick`` one repetition of the small ones.
``--shapes 64:2048:16:2048,64:4096:16:2048,... --write`` shows how it grows with d, n, k and rows. ``--avx2``,
``--avx2 --vnni`` and ``--floor`` make tables of their own.
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
LARGE = [(1024, 32768, 64, 1024), (2304, 65536, 64, 1024)]
"""Shapes of real models, beside their floor."""
ABOUT = """## Training step

One step of a TopK SAE with Adam, unit decoder rows and AuxK: selection, loss, gradients, (for all but eai-sparsify)
clipping of the global gradient norm, update, counters of dead latents. Every peer runs in its own trainer class.
saekit's codes are those of the fp32 product. Contestants take turns, one step each; ratios are medians over the turns.
"bf16 product" is the encoder's product alone; "plain torch" is what anybody would write first (dense codes, autograd,
`torch.optim.Adam`, the same clipping and counters); "saekit plain" is saekit without compiled kernels, whose top-k
family is sparse too. Peak memory is that of the whole process. The other architectures have the same contestants but
eai-sparsify, which has TopK only, each with its own penalty and first weights: a step of the peers costs the same
however many latents fire, saekit's costs less when fewer do."""

AVX2 = """## Training step without AVX-512

The TopK step above with no instructions beyond AVX2 for any contestant, as on a laptop: numba's target, ATen's,
oneDNN's and MKL's are limited by their environment variables (`contestants/arena.py`). "fp32 product" is the encoder's
product alone, in blocks of 32 MiB, which were the fastest."""

VNNI = """## Training step with AVX2 and VNNI

The same with one instruction more, which sums products of bytes in 256-bit registers, as laptops have it that have
AVX-VNNI and no AVX-512: in that form (VEX), on a processor that has it and AVX-512 too."""

STAND_IN = (
    VNNI.rsplit(":", 1)[0]
    + """. It is a stand-in: the encoding of AVX-512 VNNI of the same instruction, run on a processor
with AVX-512 and no AVX-VNNI; what is beside the product may be compiled for 512-bit registers."""
)

FLOOR = """## Training step at the sizes of real models, and its floor

A TopK step at shapes whose weights and moments do not fit into any cache, beside the encoder's product alone and
beside the product and a pass: a copy that reads and writes as many bytes as an update which reads weights, gradients
and both moments once and writes all but the gradients. The product is in blocks of 128 MiB, the fastest. (`--product
fp32` where the processor has no bf16 instructions, so that torch's bf16 product is the slower one.)"""


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
    parser.add_argument("--vnni", action="store_true", help="with --avx2: and VNNI in 256-bit registers")
    parser.add_argument("--floor", action="store_true", help="TopK at large shapes beside product and pass, no peers")
    parser.add_argument("--product", choices=["bf16", "fp32"], default="", help="which one (bf16, with --avx2 fp32)")
    parser.add_argument("--cpu-time", action="store_true", help="time of all threads, on a machine that is shared")
    parser.add_argument("--threads", type=int, default=2, help="of each contestant")
    parser.add_argument("--write", action="store_true", help="write the tables whatever was chosen")
    options = parser.parse_args()
    chosen = [tuple(int(part) for part in shape.split(":")) for shape in options.shapes.split(",") if shape]
    peers = [] if options.only and not set(options.only.split(",")) & set(arena.PEERS) else arena.available_peers()
    # The fp32 product is the fastest in larger blocks, with more latents: smaller ones read the encoder more often.
    limit = "avx2" if not options.vnni else "avx2-vnni" if arena.has_avx_vnni() else "avx2-vnni-stand-in"
    processor = {"processor": limit, "block_bytes": 32 * 2**20} if options.avx2 else {}
    # So is torch's product at these shapes, which orders all latents anew for every block.
    processor |= {"block_bytes": 128 * 2**20} if options.product == "fp32" or options.floor else {}
    workloads = []
    product = f"{options.product or ('fp32' if options.avx2 else 'bf16')} product"
    few = options.floor or options.avx2
    for arch in [name for name in options.arch.split(",") if name] or ["topk", *([] if few else ARCHITECTURES)]:
        usual = SHAPES if arch == "topk" else FEW
        shapes = chosen or (LARGE if options.floor else FEW[-1:] if options.avx2 else usual)
        able = [peer for peer in peers if arch == "topk" or peer != "eai-sparsify"]  # which has no other architecture
        names = ["saekit", product, "saekit plain", *(["plain torch"] if arch == "topk" else []), *able]
        names = ["saekit", product, f"{product} and pass"] if options.floor else names
        names = [name for name in names if not options.only or name in options.only.split(",")]
        for d, n, k, batch in shapes[:1] if options.quick else shapes:
            small = n * d < 1e6
            sizes = {"arch": arch, "d": d, "n": n, "k": k, "batch": batch}
            results = arena.measure(
                names,
                {"work": "step", "device": options.device, **sizes, "dead": options.dead, **processor},
                repetitions=1 if options.quick else options.repetitions * (5 if small else 1),
                warmup=10 if small else 2,
                threads=options.threads,
                clock="cpu_seconds" if options.cpu_time else "seconds",
            )
            title = f"{arch}: d = {d}, n = {n:,}, k = {k}, batch {batch:,}"
            workloads.append({"title": title, **sizes, "results": results})
            print(title, *arena.HEADER, *arena.table(results, "saekit"), "", sep="\n", flush=True)
    if options.write or not (options.quick or options.only or options.shapes or options.arch):
        kind = limit if options.avx2 else "floor" if options.floor else options.device
        clock = " Times are CPU time of all threads, on a shared machine." if options.cpu_time else ""
        arena.write(
            "step" if kind == "cpu" else f"step-{kind}",
            workloads,
            {"avx2": AVX2, "avx2-vnni": VNNI, "avx2-vnni-stand-in": STAND_IN, "floor": FLOOR}.get(kind, ABOUT) + clock,
            " ".join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]]),
        )


main()
