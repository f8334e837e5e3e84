"""Nothing that saekit writes is ever half a file."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.kills import Killed, forked, watched
from saekit.errors import BusyError, ConfigError, FormatError, StorageError, did_you_mean, listed
from saekit.files import (
    check_folder,
    digest_bytes,
    digest_file,
    dump_json,
    locked_folder,
    read_json,
    read_together,
    replaced_together,
    write_bytes,
    write_json,
)


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


# --- what a killed process leaves, and what others have put in the way ------------------------------------------------


def test_leftovers_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "src")!r})
from saekit.files import write_atomic
def write(stream):
    stream.write(b"half")
    stream.flush()
    print("writing", flush=True)
    if sys.stdin.read(1) == "k":
        os.kill(os.getpid(), 9)
write_atomic({str(tmp_path / "file")!r}, write)
"""

    def writer() -> subprocess.Popen[bytes]:
        other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout is not None
        assert other.stdout.readline() == b"writing\n"
        return other

    killed, living = writer(), writer()
    killed.communicate(b"k")
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".mine.tmp").write_bytes(b"not of saekit")
    write_bytes(tmp_path / "other", b"")
    assert len(list(tmp_path.glob(".file.*.tmp"))) == 1
    living.communicate(b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "file", "other"]
    assert (tmp_path / "file").read_bytes() == b"half"
    assert killed.returncode == -9
    assert living.returncode == 0


def test_nothing_that_a_symlink_points_to_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".saekit.lock").symlink_to(victim)
    with pytest.raises(StorageError, match=r"`.*out` cannot be written"), locked_folder(tmp_path / "out"):
        pass
    assert victim.read_text() == "precious"
    # every name that a temporary file could be foreseen to have, and the one that it has this time
    monkeypatch.setattr("saekit.files.secrets.token_hex", lambda n: "0" * 16)
    for name in (f".file.{os.getpid()}.tmp", f".file.{'0' * 16}.tmp"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(StorageError, match="A part of the path is a file"):
        write_bytes(tmp_path / "file", b"new")
    assert victim.read_text() == "precious"


def test_a_symlink_that_is_to_be_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file").symlink_to("victim")
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "folder" / "file", b"")
        with locked_folder(tmp_path / "folder"):
            modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "folder").iterdir()]
    finally:
        os.umask(before)
    assert modes == [0o666 & ~mask] * 2
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match=r"must be a folder; a file is there. Give another --out"):
            locked_folder(folder).__enter__()
        with pytest.raises(ConfigError, match=r"must be a folder; a file is there. Give another --out"):
            check_folder(folder)
        with pytest.raises(StorageError, match="A part of the path is a file; give another path"):
            write_bytes(folder / "x", b"")
    check_folder(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(StorageError, match="It is a folder; give another path"):
        write_bytes(tmp_path, b"")


def test_a_limit_of_the_system_is_an_error_of_ours_and_leaves_the_old_file(tmp_path: Path) -> None:
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "src")!r})
from saekit.files import StorageError, write_bytes
write_bytes({str(tmp_path / "file")!r}, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes({str(tmp_path / "file")!r}, bytes(2000))
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cannot be written: File too large. Make room and run it again." in done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_no_permission_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("saekit.files.os.access", lambda *_: False)
    with pytest.raises(StorageError, match=r"Permission denied. Give a folder that you may write to"):
        check_folder(tmp_path)
    monkeypatch.setattr("saekit.files.os.open", refuse)
    with pytest.raises(StorageError, match=r"Permission denied. Give a folder that you may write to") as caught:
        write_bytes(tmp_path / "file", b"")
    assert isinstance(caught.value, OSError)
    assert caught.value.errno == errno.EACCES


def test_waiting_for_a_folder(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked_folder(tmp_path, wait=30):
            order.append("second")

    with locked_folder(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(BusyError), locked_folder(tmp_path, wait=0.05):
            pass
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_files_that_must_agree_are_old_or_new_at_every_moment(tmp_path: Path) -> None:
    """A process is killed at every write event; a reader gets one save, whole; the next save cleans up."""

    def save(number: int) -> None:
        with replaced_together(tmp_path / "c", "card", ("folder", "data")) as next_to:
            write_bytes(next_to("folder") / "inside", b"%d" % number)
            write_bytes(next_to("data"), b"%d" % number)
            write_bytes(next_to("card"), b"%d" % number)

    def read(path_of: Callable[[str], Path]) -> set[bytes]:
        return {path_of("folder").joinpath("inside").read_bytes(), *(path_of(n).read_bytes() for n in ("data", "card"))}

    def files() -> list[str]:
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())

    save(0)
    whole, seen, number = files(), [], 1
    while True:
        try:
            watch = forked(lambda n=number: watched(lambda _: save(n), tmp_path, n, at_end=False))  # type: ignore[misc]
        except Killed:
            watch = None
        (found,) = read_together(tmp_path / "c", "card", ("folder", "data"), read)
        assert found in (seen[-1] if seen else b"0", b"%d" % number)
        seen.append(found)
        if watch is not None:
            break
        if number % 2:  # every other kill comes on top of what the one before has left
            save(-number)
            seen.append(b"-%d" % number)
            assert files() == whole
        number += 1
    assert number > 20
    save(-1)
    assert files() == whole


def test_only_this_module_writes() -> None:
    """A file that is written past `saekit.files` can be left half written."""
    source = Path(__file__).parents[1] / "src" / "saekit"
    writes = re.compile(
        r"\bos\.(replace|rename|unlink|remove|mkdir|makedirs|rmdir|link|symlink|truncate)\(|\.(mkdir|unlink|touch|rename"
        r"|write_text|symlink_to|rmtree)\(|\bopen\([^)]*[\"'][rb]*[wax+][bt+]*[\"']|\bsave_file\(|\bnp\.save"
    )
    found = [
        f"{path.relative_to(source)}: {line.strip()}"
        for path in sorted(source.rglob("*.py"))
        if path.name != "files.py"
        for line in path.read_text().splitlines()
        if writes.search(line)
    ]
    assert not found
