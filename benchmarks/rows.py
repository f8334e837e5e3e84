"""Reading captured rows from shards, shuffled, beside reading the bare files and copying as many bytes in memory.

``python benchmarks/rows.py`` writes shards of 768-dimensional bf16 rows into a temporary folder and reads them in turns
(files in the page cache); ``--quick`` a few rows, nothing written down. ``--ranks`` prints what reading costs a rank of
data-parallel training, beside its step: CPU time, one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena
import torch

from saekit import kernels
from saekit.rows.shards import ShardRows, ShardWriter
from saekit.rows.source import Columns
from saekit.training.config import TopK
from saekit.training.defaults import resolve
from saekit.training.learner import initialize_learner
from saekit.training.step import plain_step

D, BATCH = 768, 4096
ABOUT = """## Reading rows

Rows that were captured to disk, {n:,} of {d} dimensions in bf16 ({gb:.1f} GB), read in turns, files in the page cache.
"shards" are batches of 4,096 fp32 rows in shuffled order, as training reads them; "with digests" includes the check
that every shard gets before its first row is used in a process. "files" reads the same files into memory in order,
"copy" copies as many bytes from memory to memory, "fp32" also makes them fp32: what any reader of bf16 rows has to do.
A TopK step at d = 768, n = 16,384 takes {step:.2f} GB of such rows in a second."""


def write_shards(folder: Path, n: int, d: int = D) -> None:
    writer = ShardWriter.open(folder, d, "bfloat16", {"benchmark": "rows"})
    stream = torch.Generator().manual_seed(0)
    for first in range(0, n, 65_536):
        size = min(65_536, n - first)
        ids = torch.arange(first, first + size)
        writer.append(Columns(torch.randn(size, d, generator=stream).bfloat16(), ids.int(), ids, ids.int()), {})
    writer.finish({})


def of_a_rank(d: int, n: int = 65_536, n_latents: int = 16_384) -> str:
    """What a step of `BATCH` rows costs one of two ranks: reading all of them, and a plain step of half of them."""
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name) / "rows", n, d)
        rows = ShardRows(Path(name) / "rows")

        def read() -> None:
            for _ in itertools.islice(rows.batches(BATCH, seed=0), n // BATCH):
                pass

        def copy() -> None:
            for number in range(rows.plan.n_blocks):
                rows.read(sorted(rows.plan.ranges(0, number) or ()))

        every, copied = (cheapest(work) / (n / BATCH) for work in (read, copy))
    x = torch.randn(BATCH // 2, d, generator=torch.Generator().manual_seed(0))
    config = TopK(n_latents, k=32)
    with kernels.using("plain"):
        how = resolve(config, d, 1000, BATCH)
        learner = initialize_learner(config, 0, how, bias=x.mean(0), scale=None, sample=x, device="cpu")
        step = cheapest(lambda: plain_step(learner, x))
    pages = " / ".join(f"{share_of_pages(d, ranks):.0%}" for ranks in (2, 8))
    return f"| {d:,} | {1e3 * every:.0f} | {1e3 * copied:.1f} | {1e3 * step:,.0f} | {every / step:.1%} | {pages} |"


def cheapest(work: Callable[[], object]) -> float:
    """CPU seconds of the cheapest of four calls, the first left out."""
    found = []
    for _ in range(4):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found[1:])


def share_of_pages(d: int, ranks: int, n: int = 65_536, page: int = 4096) -> float:
    """Share of the pages of `n` rows that hold a row of one rank, whose rows lie anywhere."""
    at = torch.arange(n)
    own = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: n // ranks]
    first, last = 2 * d * at[own] // page, (2 * d * (at[own] + 1) - 1) // page
    touched = torch.zeros(2 * d * n // page + 1, dtype=torch.bool)
    for step in range(int((last - first).max()) + 1):
        touched[torch.minimum(first + step, last)] = True
    return float(touched.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rows, nothing written")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--ranks", action="store_true", help="print what a rank of data-parallel training reads")
    options = parser.parse_args()
    if options.ranks:
        torch.set_num_threads(1)
        print(
            "| d | all rows of a step, ms | copied out of files | plain step of half, ms | share | pages, 2 / 8 ranks |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        print(*(of_a_rank(d) for d in (768, 2304)), sep="\n")
        return
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
