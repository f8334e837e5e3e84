"""Some kills of every command that writes, and processes that save and load one SAE at the same time.

All kills are those of ``make kills``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = (
    "capture", "train", "train from a model", "classify", "transfer", "prune", "progressive", "save over an SAE",
)  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Forks of a process that compiles everything once; not of this one, whose threads a fork would lack."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kills.py", "--sample", "3", "--seed", "1", "--seconds", "2", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_goes_on_and_leaves_what_an_undisturbed_one_leaves(results, name):
    (found,) = [each for each in results["kills"] if each["command"] == name]
    assert found["losses"] == []
    assert found["bypassed"] == []
    assert found["n_kills"] == 3
    assert found["n_events"] > 3


def test_who_loads_an_sae_that_others_save_gets_one_of_them(results):
    found = results["contention"]
    assert found["problems"] == []
    assert found["saves"] > 5
    assert found["loads"] > 20
