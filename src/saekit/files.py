"""Files that are never half written: atomic writes, digests, folder locks.

Everything that saekit writes goes through this module: a temporary file in the same folder, ``fsync``, rename. A crash,
a full disk or ``kill -9`` leaves either the old file or the new one. What the system refuses is a `StorageError`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from .errors import BusyError, ConfigError, FormatError, SaekitError, StorageError

T = TypeVar("T")

LOCK_NAME = ".saekit.lock"
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_NEXT = ".next"
_POLL = 0.01  # seconds between two attempts to get a lock
_TICK = 0.005  # seconds; times of files are not told more exactly

SAVE_WAIT = 60.0
"""Seconds that a save waits for others who save into the same folder."""


def write_atomic(path: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Make the file at `path` from what `write` puts into a binary stream: all of it or nothing.

    Parameters
    ----------
    path
        The file to create or replace. Its folder is created; temporary files that killed processes left there are
        removed.
    write
        Called once with an open binary file.

    Raises
    ------
    StorageError
        The system refused (a full disk, say); the temporary file is removed and an older file stays as it was.
    """
    path = check_path(path)
    with storage_errors(path):
        if path.is_dir():  # of "." there is no name beside which a temporary file could lie
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary, stream = _temporary(path)
        try:
            with stream:  # held until it has its name: a file that nobody holds is a leftover
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    _sync_folder(path.parent)


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` behind what is in a file; a kill may leave a part of it.

    Raises
    ------
    StorageError
        The system refused.
    """
    with storage_errors(Path(path)), open(path, "a", encoding="utf-8", opener=_open_own) as stream:
        stream.write(text)


def _open_own(path: str, flags: int) -> int:
    """Open a file to write into it; neither through a link, nor a pipe, which may wait for ever."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def make_folder(folder: Path) -> None:
    """Make a folder, and those that it lies in, where they are missing.

    Raises
    ------
    StorageError
        The system refused.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_file(path: str | os.PathLike[str]) -> None:
    """Remove a file that nobody needs; one that is not there, or cannot be removed, is left."""
    with suppress(OSError):
        os.unlink(path)


def rename_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Give a file another name, in place of the file that has it.

    Raises
    ------
    StorageError
        The system refused.
    """
    with storage_errors(Path(target)):
        os.replace(source, target)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in a folder whose writers have ended; those of living ones are locked."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if _LEFTOVER.fullmatch(entry.name)]:
            with suppress(OSError):
                handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _try_lock(handle):
                        os.unlink(folder / name)
                finally:
                    os.close(handle)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise what the system refuses in this block as `StorageError`, with what to do about it."""
    check_path(path)
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, path) from error


def storage_error(error: OSError, path: Path) -> StorageError:
    """Return what the system said about a path as an error of saekit, which keeps the number of the system's."""
    reason = error.strerror or str(error)
    found = StorageError(f"`{path}` cannot be written: {reason}. {_ADVICE.get(error.errno or 0, _NOTHING_LOST)}")
    found.errno, found.strerror, found.filename = error.errno, error.strerror, os.fspath(path)
    return found


_NOTHING_LOST = "What was complete before is still there."
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"Make room and run it again. {_NOTHING_LOST}"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Give a folder that you may write to."),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "A part of the path is a file; give another path."),
    errno.EISDIR: "It is a folder; give another path.",
}


def _temporary(path: Path) -> tuple[Path, IO[bytes]]:
    """Open a new file with a name that nobody can foresee, beside the one that it becomes, and lock it."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        _try_lock(handle)
        if os.fstat(handle).st_nlink:  # else another process took it for a leftover before it was locked
            return temporary, os.fdopen(handle, "wb")
        os.close(handle)


CACHE = "SAEKIT_CACHE"
"""Environment variable with the folder of `cache_folder`."""


def cache_folder() -> Path:
    """Return the folder of what can be made again: $SAEKIT_CACHE, or ~/.cache/saekit.

    Raises
    ------
    ConfigError
        There is neither that variable nor a home folder.
    """
    try:
        chosen = os.environ.get(CACHE)
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "saekit"
    except RuntimeError:
        raise ConfigError(f"{CACHE} must name a folder: there is no home folder to keep files in.") from None


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically."""
    write_atomic(path, lambda stream: stream.write(data))


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as strict JSON (no NaN, no fallback to ``str``), indented, atomically."""
    write_bytes(path, dump_json(value).encode())


def dump_json(value: object) -> str:
    """Return strict JSON text: keys in the order given, NaN and unknown types refused."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that the system can look up, whether something is there or not.

    Raises
    ------
    ConfigError
        It is empty (an unset variable of a shell, which ``Path`` takes for the folder of now), too long, or holds a
        character that no path has: a NUL, half of a surrogate pair.
    """
    if not os.fspath(path):
        raise ConfigError("a path must not be empty; `.` is the folder that you are in.")
    try:
        os.lstat(path)
    except ValueError:
        raise ConfigError(f"a path must not hold a NUL or half a character; got {os.fspath(path)[:40]!r}….") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            name = os.fspath(path)
            raise ConfigError(
                f"a path must be one that the system can look up; got `{name[:40]}…`, which is too long "
                f"({len(name):,} characters)."
            ) from None
    return Path(path)


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of this name as it stands where there is such a file, else with ``~`` as the home folder."""
    path = check_path(name)
    if os.path.exists(path):
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # no user of that name
        return path


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
        with open_file(path) as stream:
            return stream.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"`{path}` must be a file that can be read; {error.strerror or error}.") from None


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a file to read its bytes; whoever reads a pipe or a device may wait for ever, or fill the memory.

    Raises
    ------
    FormatError
        It is a folder, a pipe, a device or a socket.
    ConfigError
        As `check_path`.
    OSError
        As ``open``.
    """
    path = check_path(path)
    stream = None
    with suppress(IsADirectoryError):
        stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if stream is None or not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        if stream is not None:
            stream.close()
        raise FormatError(f"`{path}` must be a file that can be read; it is a folder, a pipe or a device.")
    return stream


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse what `open_file` refuses, for libraries that open files themselves."""
    open_file(path).close()


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


def _check_depth(value: object) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
        if not level:
            return
    raise RecursionError


SEAL = "seal"
"""Key of the digest of a description over all its other entries, the digests of its data files among them."""


def seal(value: Mapping[str, object]) -> dict[str, Any]:
    """Return a JSON object with its seal as the last entry: the digest of all others, keys sorted, without spaces."""
    bare = {key: item for key, item in value.items() if key != SEAL}
    plain = json.loads(json.dumps(bare, allow_nan=False))  # as it will be read back: keys are texts, tuples are lists
    return {**bare, SEAL: digest_bytes(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())}


def write_sealed(path: str | os.PathLike[str], value: Mapping[str, object]) -> None:
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


def unsealed(value: object, where: object, *, since: int = 0, version: str = "schema") -> Any:
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
    with open_file(path) as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse an output folder that cannot be made or written to; nothing is made.

    Raises
    ------
    ConfigError
        A file is there, or it lies in one.
    StorageError
        No permission.
    """
    place = check_path(folder).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise _no_folder(Path(folder))
    if not os.access(place, os.W_OK | os.X_OK):
        raise storage_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), Path(folder))


def check_new_folder(folder: str | os.PathLike[str], where: str) -> Path:
    """Return a folder that does not exist, or is empty.

    Raises
    ------
    ConfigError
        It is a file, or something is in it.
    """
    place = check_path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{where}: `{place}` must not exist, or be an empty folder; it is not. Give another one.")
    return place


def _no_folder(folder: Path) -> ConfigError:
    return ConfigError(f"the output folder `{folder}` must be a folder; a file is there. Give another --out.")


@contextmanager
def locked_folder(folder: str | os.PathLike[str], *, wait: float = 0.0) -> Iterator[Path]:
    """Hold `folder` (created if missing) for one run; another process that tries gets `BusyError`.

    The lock is the operating system's (``flock``), so it is released when the process ends in any way, ``kill -9``
    included; a lock file that stays behind means nothing by itself.

    Parameters
    ----------
    folder
        The folder.
    wait
        Seconds to wait for another run to end.

    Raises
    ------
    BusyError
        Another run holds the folder.
    ConfigError
        It is a file, or lies in one.
    StorageError
        The folder cannot be made or written to.
    """
    folder = check_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise _no_folder(folder) from None
    except OSError as error:
        raise storage_error(error, folder) from error
    with storage_errors(folder):
        handle = _hold(folder / LOCK_NAME, time.monotonic() + wait)
    try:
        remove_leftovers(folder)
        yield folder
    finally:
        remove_file(folder / LOCK_NAME)  # while it is held: nobody else can hold a file of this name
        os.close(handle)


@contextmanager
def replaced_together(
    folder: str | os.PathLike[str], card: str, parts: Sequence[str], *, wait: float = SAVE_WAIT
) -> Iterator[Callable[[str], Path]]:
    """Replace files that must agree: whoever reads them with `read_together` gets all old ones or all new ones.

    The block writes every part, and then the card, to the paths that it is told. The card is the last: with it the new
    files count, and a kill afterwards costs nothing. A part may be a folder.

    Parameters
    ----------
    folder
        Where they lie; held meanwhile. Who holds it already is waited for.
    card, parts
        Name of the file that says what the others are, and names of these.
    wait
        Seconds.
    """
    with locked_folder(folder, wait=wait) as place:
        _settle(place, card, parts)
        try:
            yield lambda name: place / f"{name}{_NEXT}"
        finally:
            _settle(place, card, parts)


def read_together(
    folder: str | os.PathLike[str], card: str, parts: Sequence[str], read: Callable[[Callable[[str], Path]], T]
) -> T:
    """Return what `read` makes of files that are replaced together; it is told the path of each."""
    place = Path(folder)

    def path_of(name: str) -> Path:
        replacement = place / f"{name}{_NEXT}"
        return replacement if (place / f"{card}{_NEXT}").exists() and replacement.exists() else place / name

    names = [name for each in (card, *parts) for name in (each, f"{each}{_NEXT}")]
    return read_steadily([place / name for name in names], lambda: read(path_of))


def is_there(folder: Path, card: str) -> bool:
    """Return whether there is something for `read_together` to read."""
    return (folder / card).is_file() or (folder / f"{card}{_NEXT}").is_file()


def read_steadily(paths: Sequence[Path], read: Callable[[], T]) -> T:
    """Return what `read` returns; where it fails while any of the files is being replaced, it is called again."""
    repeats = 1
    while True:
        before = [_state(path) for path in paths]
        try:
            return read()
        except (SaekitError, OSError):
            if [_state(path) for path in paths] == before:
                if not repeats:
                    raise
                repeats -= 1  # it may be another file of the same tick
                time.sleep(_TICK)


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is replaced."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _settle(folder: Path, card: str, parts: Sequence[str]) -> None:
    """Bring a replacement to its end: forward if the new card is there, else back."""
    if (folder / f"{card}{_NEXT}").exists():
        for name in (*parts, card):
            replacement = folder / f"{name}{_NEXT}"
            if replacement.is_dir():
                _remove_tree(folder / name)
            if replacement.exists():
                rename_file(replacement, folder / name)
    for name in parts:
        _remove_tree(folder / f"{name}{_NEXT}")


def _remove_tree(path: Path) -> None:
    """Remove a file, or a folder with everything in it; or nothing, if nothing is there."""
    if path.is_dir() and not path.is_symlink():
        for inside in list(path.iterdir()):
            _remove_tree(inside)
        with suppress(OSError):
            path.rmdir()
    else:
        remove_file(path)


def _hold(path: Path, until: float) -> int:
    """Open the lock file of a folder and lock it; return its descriptor."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if _try_lock(handle) is not False:
                if os.fstat(handle).st_nlink:
                    os.ftruncate(handle, 0)
                    os.write(handle, str(os.getpid()).encode())
                    return handle
                # it was removed by the process that held it: there is another one of this name, or none
            elif time.monotonic() >= until:
                owner = os.pread(handle, 32, 0).decode(errors="replace").strip() or "unknown"
                raise BusyError(
                    f"the output folder `{path.parent}` is in use by another run (process {owner}). "
                    "Wait for it to end, or give another --out."
                )
            else:
                time.sleep(_POLL)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _try_lock(handle: int) -> bool | None:
    """Lock an open file without waiting; False where another process has it, None where the system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some systems cannot open a folder, and there the rename alone must do."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
