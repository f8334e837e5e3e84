"""Files that are never half written: atomic writes, digests, folder locks.

Everything that saekit writes goes through this module: a temporary file in the same folder, ``fsync``, rename. A crash,
a full disk or ``kill -9`` leaves either the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
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


def read_json(path: str | os.PathLike[str], *, finite: bool = True) -> Any:
    """Read a JSON file; `finite` as in `parse_json`.

    Raises
    ------
    FormatError
        The file is not JSON (truncated, say), or cannot be read.
    FileNotFoundError
        There is no such file.
    """
    return parse_json(read_bytes(path), path, finite=finite)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a whole file.

    Raises
    ------
    FormatError
        It cannot be read: a folder, say, or one of another user.
    FileNotFoundError
        There is no such file.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"`{path}` must be a file that can be read; {error.strerror or error}.") from None


def parse_json(text: str | bytes, where: object, *, finite: bool = True) -> Any:
    """Return the value of JSON text: only what JSON has, and only what can be passed on.

    Refused besides broken text: NaN and infinity, whole numbers of more than 64 bits, a key that stands twice in an
    object, half a character (a lone surrogate), and more than 100 levels.

    Parameters
    ----------
    text
        The text; bytes are UTF-8.
    where
        What messages call it: a path, say.
    finite
        False: NaN and infinity are numbers, as in configurations of models.

    Raises
    ------
    FormatError
        See above.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        number = _finite if finite else float
        value = json.loads(
            text, parse_int=_whole, parse_float=number, parse_constant=number, object_pairs_hook=_without_repeats
        )
        _check_depth(value)
        if "\\ud" in text or "\\uD" in text or not text.isascii():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FormatError(
            f"`{where}` must be JSON; it stops making sense: {reason}. Restore the file from its source."
        ) from None
    return value


_DEEPEST = 100


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= (number := int(digits)) < 2**64:
        raise ValueError(f"the whole number {digits[:24]} has more than 64 bits")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:24]} is not finite")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in an object")
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise RecursionError


SEAL = "seal"
"""Key of the digest of a description over all its other entries, the digests of its data files among them."""


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its seal as the last entry: the digest of all others, keys sorted, without spaces."""
    bare = {key: item for key, item in value.items() if key != SEAL}
    plain = json.loads(json.dumps(bare, allow_nan=False))  # as it will be read back: keys are texts, tuples are lists
    return {**bare, SEAL: digest_bytes(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())}


def write_sealed(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object with its seal; see `write_json`."""
    write_json(path, seal(value))


def read_sealed(path: str | os.PathLike[str], *, since: int = 0, version: str = "schema") -> Any:
    """Read what `write_sealed` wrote, and return it without its seal.

    A description names the digests of the data that it belongs to, so that the two are bound together by its seal.

    Parameters
    ----------
    path
        The file. One without a seal is returned as it is.
    since, version
        Files whose entry `version` is at least `since` must have a seal; 0: none must.

    Raises
    ------
    FormatError
        As `read_json`, or an entry was changed after the file was written.
    FileNotFoundError
        There is no such file.
    """
    return unsealed(read_json(path), path, since=since, version=version)


def unsealed(value: Any, where: object, *, since: int = 0, version: str = "schema") -> Any:
    """Return a JSON value without its seal, once that fits; see `read_sealed`."""
    if not isinstance(value, dict):
        return value
    bare = {key: item for key, item in value.items() if key != SEAL}
    needed = since and isinstance(value.get(version), int) and value[version] >= since
    if (SEAL in value or needed) and seal(bare)[SEAL] != value.get(SEAL):
        raise FormatError(
            f"`{where}` must be as it was written; its seal does not fit its entries: one was edited, or the file is "
            "damaged. Restore it from a copy, or make it again."
        )
    return bare


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
