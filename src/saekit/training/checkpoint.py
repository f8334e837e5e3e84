"""Checkpoints: one safetensors file per generation, and a small JSON file that says which generations are whole.

::

    checkpoints/step-00000500.safetensors      every tensor of every learner, and the loop's running sums
    checkpoints/step-00001000.safetensors
    checkpoints/index.json                     newest first: step, position in the rows, digest of the file

The tensors are written first, the index after them, each atomically: a ``kill -9`` at any moment leaves an index whose
files are complete. The newest generation and the one before it are kept; a generation whose digest is wrong is passed
over.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FormatError
from ..files import digest_bytes, digest_file, read_sealed, remove_file, write_bytes, write_sealed
from ..forms import NATURAL, check_form

FOLDER = "checkpoints"
INDEX = "index.json"
KEPT = 2
"""Generations kept: the one before the newest is there for the case that a disk damages the newest."""
FORMAT = 2
"""Version of the index."""
_FORM = {"generations": [{"step": NATURAL, "file": str, "digest": str}]}


def write(out: Path, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], *, scheduled: bool = True) -> Path:
    """Write a generation and remove the oldest.

    Parameters
    ----------
    out
        The run's folder.
    step
        Steps done.
    tensors
        What to keep, by name.
    facts
        JSON-able; returned by `read`.
    scheduled
        False for one of an interruption: it goes when the next one comes or the run ends, so that what is kept does not
        depend on interruptions.

    Returns
    -------
    Path
        The tensor file.
    """
    from safetensors.torch import save

    folder = out / FOLDER
    data = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    path = folder / f"step-{step:08d}.safetensors"
    write_bytes(path, data)
    entry = {"step": step, "file": path.name, "digest": digest_bytes(data), **facts}
    older = [old for old in _entries(out) if old["step"] < step and _is_scheduled(old)]
    if scheduled:
        _write_index(folder, [entry, *older][:KEPT])
    else:
        _write_index(folder, [{**entry, "scheduled": False}, *older[:KEPT]])
    return path


def tidy(out: Path) -> None:
    """Remove what interruptions and kills left, once the run has ended; without a generation the whole folder."""
    folder, entries = out / FOLDER, _entries(out)
    scheduled = [entry for entry in entries if _is_scheduled(entry)]
    if scheduled != entries:
        _write_index(folder, scheduled)
    _remove_all_but(folder, scheduled)
    if folder.is_dir() and not scheduled:
        remove_file(folder / INDEX)
        with suppress(OSError):
            folder.rmdir()


def _is_scheduled(entry: dict[str, Any]) -> bool:
    return bool(entry.get("scheduled", True))


def _write_index(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Write the index, and remove older generations."""
    write_sealed(folder / INDEX, {"format": FORMAT, "generations": entries})
    _remove_all_but(folder, entries)


def _remove_all_but(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Remove what is in the folder and not in its index: older generations, and what killed runs left."""
    kept = {INDEX, *(entry["file"] for entry in entries)}
    for stale in folder.glob("*"):
        if stale.name not in kept:
            remove_file(stale)


def read(out: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return the facts and tensors of the newest whole generation; None when there has been none yet.

    Raises
    ------
    FormatError
        The index is not readable, or comes from a newer release, or every generation it names is missing or altered.
    """
    from safetensors.torch import load_file

    entries = _entries(out)
    for entry in entries:
        path = out / FOLDER / Path(entry["file"]).name
        if path.is_file() and digest_file(path) == entry["digest"]:
            return entry, load_file(path)
    if entries:
        raise FormatError(
            f"`{out / FOLDER}` must hold an unaltered checkpoint; every file that its index names is missing "
            "or has another digest. Start again in another folder."
        )
    return None


def newest(out: Path | None) -> str | None:
    """Return the path of the newest generation, for messages; None when there is none."""
    entries = _entries(out) if out is not None else []
    return str(out / FOLDER / entries[0]["file"]) if out is not None and entries else None


def _entries(out: Path) -> list[dict[str, Any]]:
    path = out / FOLDER / INDEX
    if not path.is_file():
        return []
    index = read_sealed(path, since=2, version="format")
    if not isinstance(index, dict) or index.get("format") not in (1, FORMAT):
        found = index.get("format") if isinstance(index, dict) else index
        raise FormatError(
            f"`{path}` must have checkpoint format {FORMAT}; got {found!r}. Resume with the release that wrote it."
        )
    check_form(index, _FORM, path)
    entries: list[dict[str, Any]] = index["generations"]
    return entries
