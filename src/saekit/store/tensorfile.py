"""The safetensors container, read by byte range: a header first, then any rows of any tensor, and nothing else.

The layout is the published one: 8 bytes little-endian header length, that many bytes of JSON (name -> dtype, shape,
data_offsets), then the tensors. Files written here are read by every safetensors library and the other way round.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import FormatError
from ..files import open_file, parse_json, write_atomic
from ..sae.digest import bytes_of
from ..settings import is_whole

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types that an SAE may use, by their name in the file."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes, the limit of the format


@dataclass(frozen=True)
class Entry:
    """Where one tensor is in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte from the beginning of the file, in bytes."""

    @property
    def n_bytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What the file says about itself."""

    entries: dict[str, Entry]
    """Tensors in the order of their bytes."""
    metadata: dict[str, str]
    n_bytes: int
    """Size that the whole file must have, in bytes."""


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write `tensors` atomically; equal tensors make equal bytes.

    Returns
    -------
    tuple
        Size in bytes and the digest ``"sha256:…"`` of the file.
    """
    # Wide types first keeps every tensor aligned; Python's sort keeps the given order among equals.
    order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        table[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()

    def parts() -> Iterable[bytes | memoryview]:
        yield len(header).to_bytes(8, "little")
        yield header
        for name in order:
            yield bytes_of(tensors[name])

    def fill(stream: IO[bytes]) -> None:
        for part in parts():
            digest.update(part)
            stream.write(part)

    write_atomic(path, fill)
    return 8 + len(header) + end, f"sha256:{digest.hexdigest()}"


def read_header(path: Path) -> Header:
    """Read and check the header of a file on disk; see `parse_header`."""
    with open_file(path) as stream:
        return parse_header(stream, path)


def parse_header(stream: IO[bytes], path: Path) -> Header:
    """Read and check the header; reads no tensor.

    Parameters
    ----------
    stream
        The file, readable and seekable: on disk, or elsewhere by range requests.
    path
        What messages call it.

    Raises
    ------
    FormatError
        The file is truncated, longer than its header says, or not in this format.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise _broken(path, f"its first 8 bytes announce a header of {length:,} bytes in a file of {size:,}")
    text = read_exactly(stream, length, path)
    try:
        table = parse_json(text, path)
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
            raise TypeError("its metadata must be texts")
        entries = {name: _entry(value, 8 + length) for name, value in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, f"its header cannot be read ({type(error).__name__}: {error})") from None
    entries = dict(sorted(entries.items(), key=lambda item: item[1].start))
    end = 8 + length
    for name, entry in entries.items():
        if entry.start != end:
            raise _broken(path, f"tensor `{name}` begins at byte {entry.start:,}, not at {end:,}")
        end += entry.n_bytes
    if size != end:
        kind = "truncated" if size < end else "longer than it should be"
        raise _broken(path, f"it is {kind}: {size:,} bytes where its header needs {end:,}")
    return Header(entries, metadata, end)


def read_exactly(stream: IO[bytes], length: int, path: Path) -> bytes:
    """Read the next `length` bytes; a file may return fewer than it is asked for.

    Raises
    ------
    FormatError
        The file ends before.
    """
    parts: list[bytes] = []
    while length:
        part = stream.read(length)
        if not part:
            raise FormatError(f"`{path}` is truncated: {length:,} bytes are missing. Copy it again.")
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def read_rows(stream: IO[bytes], entry: Entry, rows: int | None = None) -> Tensor:
    """Read the first `rows` rows (axis 0) of a tensor, or all of it, and no other bytes."""
    shape = entry.shape if rows is None else (rows, *entry.shape[1:])
    tensor = torch.empty(shape, dtype=entry.dtype)
    if tensor.numel():
        stream.seek(entry.start)
        left = bytes_of(tensor)
        while left:  # the system may hand out less than was asked for (2 GiB at most on Linux)
            got = stream.readinto(left)  # type: ignore[attr-defined]
            if not got:
                name = getattr(stream, "name", "the file")
                raise FormatError(f"`{name}` is truncated: {len(left):,} bytes are missing. Copy it again.")
            left = left[got:]
    return tensor


def _entry(value: dict[str, Any], base: int) -> Entry:
    start, end = value["data_offsets"]
    if not isinstance(value["shape"], list) or not all(is_whole(each) for each in (start, end, *value["shape"])):
        raise TypeError("shapes and offsets must be whole numbers")
    if value["dtype"] not in DTYPES:
        raise ValueError(f"element type {value['dtype']!r} is not one of {', '.join(DTYPES)}")
    shape = tuple(value["shape"])
    entry = Entry(DTYPES[value["dtype"]], shape, base + start)
    if min(shape, default=0) < 0 or entry.n_bytes != end - start:
        raise ValueError(f"shape {shape} does not fill data_offsets {start}..{end}")
    return entry


def _broken(path: Path, why: str) -> FormatError:
    return FormatError(f"`{path}` must be a whole safetensors file; {why}. Copy or download it again.")
