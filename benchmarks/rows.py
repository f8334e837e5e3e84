"""Reading captured rows from shards, shuffled, beside reading the bare files and copying as many bytes in memory.

``python benchmarks/rows.py`` writes shards of 768-dimensional bf16 rows into a temporary folder and reads them in turns
(files in the page cache); ``--quick`` a few rows, nothing written down.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena
import torch

from saekit.rows.shards import ShardRows, ShardWriter
from saekit.rows.source import Columns

D, BATCH = 768, 4096
ABOUT = """## Reading rows

Rows that were captured to disk, {n:,} of {d} dimensions in bf16 ({gb:.1f} GB), read in turns, files in the page cache.
"shards" are batches of 4,096 fp32 rows in shuffled order, as training reads them; "with digests" includes the check
that every shard gets before its first row is used in a process. "files" reads the same files into memory in order,
"copy" copies as many bytes from memory to memory, "fp32" also makes them fp32: what any reader of bf16 rows has to do.
A TopK step at d = 768, n = 16,384 takes {step:.2f} GB of such rows in a second."""


def write_shards(folder: Path, n: int) -> None:
    writer = ShardWriter.open(folder, D, "bfloat16", {"benchmark": "rows"})
    stream = torch.Generator().manual_seed(0)
    for first in range(0, n, 65_536):
        size = min(65_536, n - first)
        ids = torch.arange(first, first + size)
        writer.append(Columns(torch.randn(size, D, generator=stream).bfloat16(), ids.int(), ids, ids.int()), {})
    writer.finish({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rows, nothing written")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    n = 20_000 if options.quick else 300_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "rows"
        write_shards(folder, n)
        files = sorted(folder.glob("*.safetensors"))
        gb = sum(path.stat().st_size for path in files) / 1e9
        opened = ShardRows(folder, verify="size")
        source, target = torch.zeros(n, D, dtype=torch.bfloat16), torch.zeros(n, D, dtype=torch.bfloat16)
        wide = torch.zeros(65_536, D)
        space = bytearray(max(path.stat().st_size for path in files))

        def read(rows: ShardRows) -> None:
            total = 0
            for batch in rows.batches(BATCH, seed=0):
                total += len(batch.x)
                if total >= n:
                    return

        def read_files() -> None:
            for path in files:
                with open(path, "rb", buffering=0) as stream:
                    stream.readinto(space)

        def widen() -> None:
            for part in source.split(len(wide)):
                wide[: len(part)].copy_(part)

        jobs = {
            "shards": lambda: read(opened),
            "shards, with digests": lambda: read(ShardRows(folder)),
            "files": read_files,
            "copy": lambda: target.copy_(source),
            "fp32": widen,
        }
        times: dict[str, list[float]] = {job: [] for job in jobs}
        for turn in range(1 + (1 if options.quick else options.repetitions)):
            for job, work in jobs.items():
                before = time.perf_counter()
                work()
                if turn:
                    times[job].append(time.perf_counter() - before)
    lines = ["| what | GB/s | range | time / copy |", "| --- | --- | --- | --- |"]
    for job, took in times.items():
        ratio = statistics.median(a / b for a, b in zip(took, times["copy"]))
        median, low, high = gb / statistics.median(took), gb / max(took), gb / min(took)
        lines.append(f"| {job} | {median:.2f} | {low:.2f} to {high:.2f} | {ratio:.1f}× |")
    step = json.loads((arena.ROOT / "benchmarks" / "step.json").read_text())["workloads"]
    [seconds] = [w["results"]["saekit"]["seconds"] for w in step if w["title"].startswith("topk: d = 768, n = 16,384")]
    about = ABOUT.format(n=n, d=D, gb=gb, step=BATCH * D * 2 / seconds / 1e9)
    command = f"`python benchmarks/rows.py` on {arena.machine()}."
    text = "\n".join([about, "", command, "", *lines])
    print(text)
    if not options.quick:
        record = {"machine": arena.machine(), "rows": n, "d": D, "gb": gb, "seconds": times}
        (arena.ROOT / "benchmarks" / "rows.json").write_text(json.dumps(record, indent=1) + "\n")
        arena.replace_part(arena.ROOT / "benchmarks" / "README.md", "rows", text)


main()
