"""Step, encoding and matching of two checkouts of saekit in turns: CPU time of one thread.

    git worktree add /tmp/before REVISION
    python benchmarks/against.py /tmp/before .            # all workloads
    python benchmarks/against.py /tmp/before . --only "topk step" --rounds 30
    python benchmarks/against.py /tmp/before . --train 2 --busy

Each checkout runs its own `benchmarks/contestants/ours.py` and `benchmarks/match.py` in a process of its own, with the
CPU time of the process as its clock: what other processes do to the machine hardly shows in the minimum of many
rounds. Every other round begins with the second checkout. The last line is the geometric mean of the ratios.

``--train 2``: whole calls of `saekit.train` on two threads instead, wall time and medians; ``--busy``: beside a process
that computes without end.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SMALL, MEDIUM, LARGE = (64, 2048, 16, 2048), (384, 4096, 32, 1024), (768, 16384, 32, 1024)
"""``d, n, k, rows``."""
TRAINED = {(64, 128, 6, 256): 100, (64, 1024, 8, 1024): 50, (768, 16384, 32, 4096): 4}
"""Steps of a call by ``d, n, k, rows``."""
MATCHED = (768, 2048)
"""``d, n`` of the matching."""


def workloads() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and job of each."""
    for work, archs, shapes in (
        ("step", ("topk", "batchtopk", "jumprelu"), (SMALL, MEDIUM)),
        ("step", ("topk",), (LARGE,)),
        ("encode", ("topk", "jumprelu"), (MEDIUM, LARGE)),
    ):
        for arch in archs:
            for d, n, k, batch in shapes:
                job = {"work": work, "arch": arch, "d": d, "n": n, "k": k, "batch": batch}
                yield f"{arch} {work} {d} × {n:,}, {batch:,} rows", job
    d, n = MATCHED
    yield f"match {d} × {n:,}", {"work": "match", "d": d, "n": n}


def trainings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and job of each call of `saekit.train`."""
    for (d, n, k, batch), steps in TRAINED.items():
        job = {"work": "train", "d": d, "n": n, "k": k, "batch": batch, "steps": steps}
        yield f"{steps} steps {d} × {n:,}, {batch:,} rows", job


def train(job: dict[str, Any]) -> None:
    """Train again and again."""
    from gate import Gate, rows

    from saekit import TopK, TrainSettings, train

    gate, x, settings = Gate(), rows(job["d"], job["batch"] * job["steps"], 0), TrainSettings(batch_rows=job["batch"])
    while True:
        gate.pause()
        train(TopK(job["n"], k=job["k"]), x, settings=settings, progress=False)


def contest(checkout: Path, job: dict[str, Any]) -> None:
    """Do a job again and again, whenever a line comes: the process that `Side` starts."""
    sys.path.insert(0, str(checkout / "benchmarks" / "contestants"))
    if job["work"] == "train":
        train(job)
    time.perf_counter = time.process_time  # what the checkout's own scripts read
    if job["work"] != "match":
        sys.argv = ["ours.py", "saekit", json.dumps(job)]
        runpy.run_path(str(checkout / "benchmarks" / "contestants" / "ours.py"))
    from gate import Gate

    match = runpy.run_path(str(checkout / "benchmarks" / "match.py"))
    gate = Gate()
    while True:
        gate.pause()
        match["measure"](job["n"], job["d"], "cpu")


class Side:
    """One checkout at one job."""

    def __init__(self, checkout: Path, job: dict[str, Any]) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": str(job.get("threads", 1))}
        command = [sys.executable, __file__, str(checkout), "--contest", json.dumps(job)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, text=True, env=environment)
        self.times: list[float] = []
        self.answer()

    def answer(self) -> float | None:
        """Seconds of the repetition that has just ended."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a checkout stopped; see above")
        return json.loads(line)["seconds"]

    def repeat(self) -> None:
        """One repetition."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.times.append(self.answer())


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Have a process compute beside this one."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def compare(checkouts: list[Path], job: dict[str, Any], rounds: int, warmup: int = 3) -> tuple[float, float, float]:
    """Least seconds of both (medians of wall time), and the median over the rounds of ``second / first``."""
    sides = [Side(checkout, job) for checkout in checkouts]
    for index in range(warmup + rounds):
        for side in sides[:: -1 if index % 2 else 1]:
            side.repeat()
    for side in sides:
        side.process.stdin.close()
        side.process.wait()
    first, second = (side.times[warmup:] for side in sides)
    typical = statistics.median if job["work"] == "train" else min
    return typical(first), typical(second), statistics.median(b / a for a, b in zip(first, second))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="+", type=Path, help="before, now")
    parser.add_argument("--rounds", type=int, default=30, help="half of them with the second checkout first")
    parser.add_argument("--only", default="", help="only workloads whose name has this in it")
    parser.add_argument("--train", type=int, default=0, metavar="THREADS", help="whole trainings on so many threads")
    parser.add_argument("--busy", action="store_true", help="beside a process that computes without end")
    parser.add_argument("--contest", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    checkouts = [path.resolve() for path in options.checkouts]
    if options.contest:
        contest(checkouts[0], json.loads(options.contest))
    print(
        "| workload | before, ms | now, ms | now / before | median of the ratios |\n| --- | ---: | ---: | ---: | ---: |"
    )
    ratios = []
    with busy(options.busy):
        for name, job in trainings() if options.train else workloads():
            if options.only in name:
                before, now, median = compare(checkouts, job | {"threads": options.train or 1}, options.rounds)
                ratios.append(now / before)
                line = f"| {name} | {1e3 * before:.2f} | {1e3 * now:.2f} | {ratios[-1]:.3f} | {median:.3f} |"
                print(line, flush=True)
    print(f"\ngeometric mean {statistics.geometric_mean(ratios):.3f}")


if __name__ == "__main__":
    main()
