"""Files that are never half written: atomic writes, digests, folder locks.

Everything that saekit writes goes through this module: a temporary file in the same folder, ``fsync``, rename. A crash,
a full disk or ``kill -9`` leaves either the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .errors import BusyError, FormatError

LOCK_NAME = ".saekit.lock"


def write_atomic(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Make the file at `path` from what `write` puts into a binary stream: all of it or nothing.

    Parameters
    ----------
    path
        The file to create or replace. Its folder is created.
    write
        Called once with an open binary file.

    Raises
    ------
    OSError
        What the system raised (a full disk, say); the temporary file is removed and an older file stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically."""
    write_atomic(path, lambda stream: stream.write(data))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as strict JSON (no NaN, no fallback to ``str``), indented, atomically."""
    write_bytes(path, dump_json(value).encode())


def dump_json(value: Any) -> str:
    """Return strict JSON text: keys in the order given, NaN and unknown types refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of this name as it stands where there is such a file, else with ``~`` as the home folder."""
    path = Path(name)
    if os.path.exists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no user of that name
        return path


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises
    ------
    FormatError
        The file is not JSON (truncated, say).
    FileNotFoundError
        There is no such file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(
            f"`{path}` must be JSON; it stops making sense: {error}. Restore the file from its source."
        ) from None


def digest_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data` as ``"sha256:<hex>"``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as ``"sha256:<hex>"``."""
    with open(path, "rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold `folder` (created if missing) for one run; another process that tries gets `BusyError`.

    The lock is the operating system's (``flock``), so it is released when the process ends in any way, ``kill -9``
    included; the lock file that stays behind means nothing by itself.

    Raises
    ------
    BusyError
        Another run holds the folder.
    """
    import fcntl

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_NAME, "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            owner = stream.read().strip() or "unknown"
            raise BusyError(
                f"the output folder `{folder}` is in use by another run (process {owner}). "
                "Wait for it to end, or give another --out."
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield folder


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some systems cannot open a folder, and there the rename alone must do."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
