"""What is absurdly large is refused with its arithmetic, before anything is allocated."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from saekit import memory
from saekit.errors import ConfigError


def test_what_is_left_is_below_what_the_machine_has():
    assert 0 < memory.available_memory() < memory.ADDRESSES


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says what a process uses")
def test_a_limit_of_the_process_counts():
    code = "from saekit.memory import available_memory; print(available_memory())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)),
    )  # fmt: skip
    assert 2**29 < int(done.stdout) < 2**31


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_of_the_container_counts(monkeypatch, tmp_path, version):
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
        2: ("memory.max", "memory.current", "file"),
    }
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    limit, used, cached = names[version]
    (folder / limit).write_text("5000000\n")
    (folder / used).write_text("3000000\n")
    (folder / "memory.stat").write_text(f"other 7\n{cached} 1000000\n")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    assert memory.available_memory() == 3_000_000
    (folder / limit).write_text("max\n")
    assert memory.available_memory() > 3_000_000


def test_the_message_has_the_arithmetic(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 10**9)
    memory.check_memory("train", {"weights": 10**9}, "Use fewer.")
    with pytest.raises(ConfigError) as caught:
        memory.check_memory("train", {"weights": 10**9, "nothing": 0, "rows": 5 * 10**8}, "Use fewer.")
    assert str(caught.value) == (
        "train: the memory needed must be at most the 1 GB that `cpu` has left; got 1.5 GB: 1 GB for weights, "
        "500 MB for rows. Use fewer."
    )
