"""How a TopK training step and encoding grow with n, d, k and rows: saekit beside the peers, in turns.

``python benchmarks/growth.py`` varies one size at a time (about 20 minutes); ``--quick`` one size of each, nothing
written.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena

BASE = {"d": 384, "n": 4096, "k": 32, "batch": 4096}
SIZES = {"n": (4096, 8192, 16384, 32768), "d": (192, 384, 768, 1536), "k": (8, 32, 128), "batch": (1024, 4096, 16384)}
DEAD = (0.0, 0.02, 0.1, 0.5)
WORDS = {"n": "n, latents", "d": "d, width", "k": "k", "batch": "rows", "dead": "share of latents that are dead"}
ABOUT = """## How it grows

Median milliseconds of a TopK step and of encoding, one size varied at a time from d = 384, n = 4,096, k = 32 and 4,096
rows; contestants as above. "exponent" is the slope between the smallest and the largest size on logarithmic axes: 1 is
proportional. Peak memory (GB, of the whole process) is behind the slash. Dead latents have encoder rows too short to be
chosen and counters that say so; AuxK (d / 2 dead latents per row, the default of all four) then does its work, of which
there is none before."""


def rows_of(work: str, size: str, values: tuple[int, ...], results: dict[int, dict[str, Any]]) -> list[str]:
    """A Markdown table: contestants by sizes."""
    lines = [f"**{work}: {WORDS[size]}**", ""]
    lines += [
        f"| contestant | {' | '.join(f'{v:,}' for v in values)} | {'last / first' if 0 in values else 'exponent'} |"
    ]
    lines += ["| --- |" + " --- |" * (len(values) + 1)]
    for name in results[values[0]]:
        cells = [f"{1e3 * results[v][name]['seconds']:.4g} / {results[v][name]['peak_gb']:.2f}" for v in values]
        first, last = (results[v][name]["seconds"] for v in (values[0], values[-1]))
        if 0 in values:
            growth = f"{last / first:.2f}×"
        elif len(values) > 1:
            growth = f"{math.log(last / first) / math.log(values[-1] / values[0]):.2f}"
        else:
            growth = ""
        lines.append(f"| {name} | {' | '.join(cells)} | {growth} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest of each size once, nothing written")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    names = ["saekit", "bf16 product", *arena.available_peers()]
    lines, record, done = [], [], {}
    for work in ("step", "encode"):
        for size, values in {**SIZES, **({"dead": DEAD} if work == "step" else {})}.items():
            values = values[:1] if options.quick else values
            results = {}
            for value in values:
                job = {"work": work, "arch": "topk", **BASE, size: value}
                key = json.dumps(job, sort_keys=True)
                if key not in done:
                    count = 1 if options.quick else options.repetitions
                    done[key] = arena.measure(names, job, repetitions=count, warmup=1 if options.quick else 2)
                results[value] = done[key]
                record.append({**job, "results": done[key]})
            part = rows_of(work, size, values, results)
            print(*part, sep="\n", flush=True)
            lines += part
    if not options.quick:
        whole = {"machine": arena.machine(), "workloads": record}
        (arena.ROOT / "benchmarks" / "growth.json").write_text(json.dumps(whole, indent=1) + "\n")
        command = f"`python benchmarks/growth.py` on {arena.machine()}."
        arena.replace_part(
            arena.ROOT / "benchmarks" / "README.md", "growth", "\n".join([ABOUT, "", command, "", *lines])
        )


main()
