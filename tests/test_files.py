"""Nothing that saekit writes is ever half a file."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from saekit.errors import BusyError, FormatError, did_you_mean, listed
from saekit.files import digest_bytes, digest_file, dump_json, locked_folder, read_json, write_bytes, write_json


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    write_bytes(path, b"old")

    def disk_full(stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    from saekit.files import write_atomic

    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, disk_full)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_json_is_strict_and_round_trips(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, "ü"], "a": {"x": True}}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert list(read_json(tmp_path / "v.json")) == ["b", "a"]
    with pytest.raises(ValueError, match="Out of range"):
        dump_json(float("nan"))
    with pytest.raises(TypeError):
        dump_json(object())
    (tmp_path / "v.json").write_text('{"a": ')
    with pytest.raises(FormatError, match="must be JSON"):
        read_json(tmp_path / "v.json")


def test_digests_agree(tmp_path: Path) -> None:
    write_bytes(tmp_path / "f", b"abc")
    assert digest_file(tmp_path / "f") == digest_bytes(b"abc")
    assert digest_bytes(b"abc").startswith("sha256:ba7816bf")


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "src")!r})
from saekit.files import locked_folder
with locked_folder({str(tmp_path)!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=f"process {other.pid}"), locked_folder(tmp_path):
            pass
        other.kill()
        other.wait()
    with locked_folder(tmp_path):
        pass


def test_suggestions() -> None:
    assert did_you_mean("warmup_step", ["warmup_steps", "lr"]) == "Did you mean `warmup_steps`?"
    assert did_you_mean("zzz", ["a", "b"]) == "Known: `a`, `b`."
    assert listed(range(7)) == "`0`, `1`, `2`, `3`, `4` and 2 more"
