"""Cells of a grid computed by any number of processes on any machines over a shared folder.

A cell is independent work whose result is a file. A process takes the next cell that nobody holds: its claim is a lease
of `filelock`, a file that is refreshed while the process lives. The claim of a dead process on the same machine is
taken over at once, that of a lost machine once it has not been refreshed for `LEASE`, by the clock of whoever waits.
Claims only save work: results are deterministic and written atomically, so that a cell that is computed twice, by a
machine that was lost and came back, leaves what it would have left once.

Without claims, for an array job whose tasks are numbered: ``Sharing(part=(i, n))`` computes every n-th cell.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import ConfigError, StorageError
from .files import append_text, digest_bytes, make_folder, read_json, remove_file, storage_errors, write_json
from .settings import Progress, silent
from .version import __version__

T = TypeVar("T")

CLAIMS = "claims"
"""Folder of the claims within the folder of a grid; gone when all cells are there."""

LEASE = 120.0
"""Time without a sign of life after which a claim expires; all processes must agree. Unit: seconds."""

POLL = 0.5
"""Time between two looks at cells that others hold. Unit: seconds."""

ATTEMPTS = 3
"""Processes that may die over a cell before it is given up."""

_AGREED = "grid.json"


@dataclass(frozen=True)
class Cell(Generic[T]):
    """Independent work with a result of its own."""

    name: str
    """What tells it from the others of the grid, the same in every process."""
    is_done: Callable[[], bool]
    """Whether its result is there, whoever computed it."""
    compute: Callable[[], T]
    store: Callable[[T], object]
    """Writes the result, atomically."""


@dataclass(frozen=True)
class Sharing:
    """How processes share the cells of a grid."""

    part: tuple[int, int] | None = None
    """``(i, n)``, counted from 0: every n-th cell from the i-th on, without claims; the others are left to other
    processes, and not waited for."""
    lease: float = LEASE
    """See `LEASE`."""


def compute_cells(
    folder: Path,
    cells: Sequence[Cell[Any]],
    *,
    facts: Mapping[str, Any],
    sharing: Sharing = Sharing(),
    progress: Progress = silent,
) -> int:
    """Compute the cells that are missing, together with whoever else works on them; return how many this process did.

    Comes back when every cell is there (of a numbered task: every one of its part).

    Parameters
    ----------
    folder
        Folder of the grid, on a disk that all processes see.
    cells
        All cells of the grid.
    facts
        What all processes must agree on besides the version of saekit and the names of the cells: settings, versions.
    sharing
        By claims, or the part of a numbered task.
    progress
        Called with the stage ``cells``.

    Raises
    ------
    ConfigError
        A process with other facts works in the folder.
    StorageError
        Three processes died over a cell, a result that was stored cannot be read, or the system refused.
    """
    known = {"saekit": __version__, **facts, "cells": digest_bytes("\n".join(each.name for each in cells).encode())}
    if sharing.part is not None:
        first, step = sharing.part
        return _compute_part(cells[first::step], progress)
    if all(cell.is_done() for cell in cells):
        return 0
    claims = folder / CLAIMS
    _agree(claims / _AGREED, known)
    claimed = [_Claim(cell, claims, sharing.lease) for cell in cells]
    computed = 0
    while pending := [each for each in claimed if not each.cell.is_done()]:
        progress("cells", len(cells) - len(pending), len(cells))
        done = [each.compute() for each in pending]
        computed += sum(done)
        if not any(done):
            time.sleep(POLL)
    progress("cells", len(cells), len(cells))
    _clear(claims)
    return computed


@contextmanager
def waiting_claim(folder: Path, name: str, sharing: Sharing) -> Iterator[None]:
    """Hold a claim on what all processes of a grid need first, once nobody else does: they find it made."""
    import filelock

    path = folder / CLAIMS / f"{name}.claim"
    make_folder(path.parent)
    with filelock.SoftFileLease(path, lease_duration=sharing.lease, poll_interval=POLL):
        yield


def check_part(text: str, where: str) -> tuple[int, int]:
    """Return a part of a grid from its words: ``"3/16"`` is the fourth of sixteen.

    >>> check_part("3/16", "--part")
    (3, 16)

    Raises
    ------
    ConfigError
        It is none.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None or not int(found[1]) < int(found[2]):
        raise ConfigError(
            f"{where} must be `i/n` with i from 0 to n - 1 (`3/16`: the fourth of sixteen); got {text!r}."
        )
    return int(found[1]), int(found[2])


def _compute_part(cells: Sequence[Cell[Any]], progress: Progress) -> int:
    computed = 0
    for number, cell in enumerate(cells):
        progress("cells", number, len(cells))
        if not cell.is_done():
            cell.store(cell.compute())
            _check_stored(cell)
            computed += 1
    progress("cells", len(cells), len(cells))
    return computed


def _check_stored(cell: Cell[Any]) -> None:
    """Refuse to go on where a result that was stored is not found: it would be computed for ever."""
    if not cell.is_done():
        raise StorageError(
            f"grid: the result of `{cell.name}` must be there once it is stored; it is not, or cannot be read back. "
            "Look whether something else writes to the folder, or its disk is damaged; or give another folder."
        )


class _Claim:
    """The claim of this process on a cell; kept while it waits, because it remembers how long others were silent."""

    def __init__(self, cell: Cell[Any], claims: Path, lease: float) -> None:
        import filelock

        self.cell = cell
        stem = re.sub("[^a-zA-Z0-9]+", "-", cell.name).strip("-")[:60]
        self.path = claims / f"{stem}-{digest_bytes(cell.name.encode())[7:19]}"
        self.lock = filelock.SoftFileLease(self.path.with_suffix(".claim"), lease_duration=lease)

    def compute(self) -> bool:
        """Compute the cell, unless another process holds it or has done it; return whether this one did."""
        if not self._acquire():
            return False
        attempts = self.path.with_suffix(".attempts")
        try:
            if self.cell.is_done():  # since the last look
                return False
            self._check_attempts(attempts)
            append_text(attempts, "begun\n")
            found = self.cell.compute()
            if self.lock.compromise is not None:  # this process slept, and another has the cell now
                return False
            self.cell.store(found)
            _check_stored(self.cell)
            return True
        finally:  # an error and Ctrl-C are no death: whoever comes next may try again
            if self.lock.compromise is None:
                remove_file(attempts)
            self.lock.release()

    def _acquire(self) -> bool:
        from filelock import LeaseSettingsMismatch, Timeout

        make_folder(self.path.parent)
        with storage_errors(self.path):
            try:
                self.lock.acquire(blocking=False)
            except Timeout:
                return False
            except LeaseSettingsMismatch as error:
                raise ConfigError(f"grid: all processes must agree on how long a claim holds: {error}.") from None
        return True

    def _check_attempts(self, attempts: Path) -> None:
        try:
            begun = len(attempts.read_text().splitlines())
        except (OSError, ValueError):
            return
        if begun >= ATTEMPTS:
            raise StorageError(
                f"`{self.cell.name}` must be computed by a process that lives; {begun} died over it (out of memory?). "
                f"Once that is settled, remove `{attempts}`."
            )


def _agree(path: Path, known: Mapping[str, Any]) -> None:
    """Leave what all processes must agree on, or compare with what another one left."""
    known = json.loads(json.dumps(known, default=str))
    try:
        other = read_json(path)
    except FileNotFoundError:
        write_json(path, known)  # of two at once the last stays, and both compare below
        other = read_json(path)
    other = other if isinstance(other, dict) else {}
    names = [name for name in {**known, **other} if known.get(name) != other.get(name)]
    if names:
        name = names[0]
        raise ConfigError(
            f"grid: processes of one folder must agree on `{name}`; `{path}` has {other.get(name)!r}, and this process "
            f"{known.get(name)!r}. Give another folder; or, if no other process works on it, remove `{path.parent}`."
        )


def _clear(claims: Path) -> None:
    """Remove what nobody needs any more; another process may be doing the same."""
    with suppress(OSError):
        for each in claims.iterdir():
            remove_file(each)
        claims.rmdir()
