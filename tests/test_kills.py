"""Some kills of every command that writes, and processes that save and load one SAE at the same time.

All kills are those of ``make kills``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "capture", "train", "train from a model", "classify", "transfer", "prune", "progressive", "save over an SAE",
)  # fmt: skip


def test_killed_commands_go_on_and_who_loads_while_others_save_gets_an_sae() -> None:
    """All in forks of one process that compiles everything once; not of this one, whose threads a fork would lack."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kills.py", "--sample", "2", "--seed", "1", "--seconds", "2", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    assert tuple(each["command"] for each in results["kills"]) == NAMES
    for found in results["kills"]:
        assert found["losses"] == [], found["command"]
        assert found["bypassed"] == [], found["command"]
        assert found["n_kills"] == 2
        assert found["n_events"] > 2
    together = results["contention"]
    assert together["problems"] == []
    assert together["saves"] > 5
    assert together["loads"] > 20
