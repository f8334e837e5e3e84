"""Seconds until a library is imported, and until its command line answers: saekit beside the peers, in turns.

``python benchmarks/imports.py`` starts every one of them several times in a fresh process; ``--quick`` once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "contestants"))

import arena

OURS = {
    "import saekit": "import saekit",
    "saekit --help": "import sys; sys.argv = ['saekit', '--help']; from saekit.cli import main; main()",
    "saekit.TopK, saekit.train": "import saekit; saekit.TopK, saekit.train",
    "import torch": "import torch",
}
PEERS = {
    "import sae_lens": "import sae_lens",
    "import sparsify": "import sparsify",
    "import dictionary_learning": "import dictionary_learning",
}
ABOUT = """## Imports

Seconds of a fresh process, files in the page cache; a process that does nothing takes the time of "python"."""


def seconds(python: str, code: str) -> float:
    """One process."""
    environment = os.environ | {"PYTHONPATH": str(arena.ROOT / "src"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    before = time.perf_counter()
    subprocess.run([python, "-c", code], check=True, env=environment, stdout=subprocess.DEVNULL, stderr=-3)
    return time.perf_counter() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="once each, nothing written")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    jobs = {"python": (sys.executable, "pass")} | {name: (sys.executable, code) for name, code in OURS.items()}
    if arena.available_peers():
        jobs |= {name: (str(arena.PEER_PYTHON), code) for name, code in PEERS.items()}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(1 + (1 if options.quick else options.repetitions)):
        for name, (python, code) in jobs.items():
            took = seconds(python, code)
            if turn:  # the first turn fills the page cache
                times[name].append(took)
    lines = ["| what | median, s | range, s |", "| --- | --- | --- |"]
    lines += [f"| {n} | {statistics.median(t):.2f} | {min(t):.2f} to {max(t):.2f} |" for n, t in times.items()]
    print(*lines, sep="\n")
    if options.quick:
        return
    machine = arena.machine()
    text = "\n".join([ABOUT, "", f"`python benchmarks/imports.py` on {machine}.", "", *lines])
    arena.replace_part(arena.ROOT / "benchmarks" / "README.md", "imports", text)
    record = {"seconds": times, "machine": machine}
    (arena.ROOT / "benchmarks" / "imports.json").write_text(json.dumps(record, indent=1) + "\n")


main()
