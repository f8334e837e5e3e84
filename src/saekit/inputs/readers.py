"""Records of local files, as a stream: CSV, TSV, JSON, JSON Lines, Parquet and lines of text, gzipped or not.

A name stands for the file that is called so: nothing in it is a pattern, an address or a chain of file systems. Cells
of CSV and TSV are text. No more than one record is held in memory, and a record has a maximum length.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, InputError, listed
from ..files import local_path, open_file
from .hub_datasets import is_saved, open_saved
from .records import rows_of_columns
from .tables import first_line

LONGEST_RECORD = 2**25
"""Maximum number of characters in a line, a cell of CSV, or a value of JSON."""

_CHUNK = 2**20
_PARQUET_ROWS = 256  # converted to Python at once
_EXPANSION = 100  # text is packed to a third or a tenth of its size; what unpacks to more is damaged or hostile
_EXPANSION_FLOOR = 2**24  # bytes for which that does not matter
_CSV_LIMIT = threading.Lock()
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "heldout", "eval")
"""Words in names of files and folders that say which split they are."""

_SPLIT_WORDS = re.compile(rf"(?<![a-z0-9])({'|'.join(SPLITS)})(?![a-z0-9])")

Records = tuple[Iterable[Any], dict[str, Any]]
"""Records, and what is known about their source as plain JSON."""


def find_local(name: str) -> tuple[Path | None, str | None]:
    """Return the local file or folder of this name, and the split behind an ``@`` where the rest is the name."""
    before, _, split = name.rpartition("@")
    for each, named in ((name, None), *([(before, split)] if before else [])):
        path = local_path(each)
        if os.path.exists(path):
            return path, named
    return None, None


def ending(path: Path) -> str | None:
    """Return the ending that says what a file is, compression left aside; None when unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in ENDINGS else None


def open_local(path: Path, split: str | None, wanted: Collection[str] | None) -> Records:
    """Return the records of a file, of all files of a folder, or of a folder that ``save_to_disk`` wrote.

    Parameters
    ----------
    path
        File or folder.
    split
        Split whose files are read: those that name it. None: ``train`` in a folder where every file names its split.
    wanted
        Names of the columns that are needed; None: all. Others may be there.

    Raises
    ------
    DataError
        Files of an unknown kind or of several, or of no such split.
    """
    source = {"kind": "file", "name": path.resolve().name, "path": str(path.resolve())}
    if path.is_dir() and is_saved(path):
        return open_saved(path, split)
    files, split = files_of_split(_files(path), path, split)
    if split is not None:
        source["split"] = split
    return (record for file in files for record in read_file(file, wanted)), source


def _files(path: Path) -> list[Path]:
    """Return a file, or the files of a folder and its subfolders without the hidden ones; all of one kind."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if ending(file) and file.is_file() and _is_shown(file, path))
    endings = {ending(file) for file in files}
    if len(endings) != 1 or None in endings:
        found = f"the folder holds {listed(sorted(map(str, endings)))}" if path.is_dir() else f"got `{path.name}`"
        raise InputError(
            f"a text source must end in {listed(ENDINGS, 6)} (with or without `.gz`), one kind per folder; {found}. "
            "Convert it, or read it yourself and pass a list of texts."
        )
    return files


def _is_shown(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def files_of_split(files: list[Path], root: Path, split: str | None) -> tuple[list[Path], str | None]:
    """Return the files of a split, and its name; all files where they have none."""
    top = root.parent if files == [root] else root
    names = [file.relative_to(top).as_posix().lower() for file in files]
    words = [next(iter(_SPLIT_WORDS.findall(name)), "") for name in names]
    split = split or _first_choice(words, root.name)
    if split is None:
        return files, None
    pattern = re.compile(rf"(?<![a-z0-9]){re.escape(split.lower())}(?![a-z0-9])")
    chosen = [file for file, name in zip(files, names) if pattern.search(name)]
    if not chosen:
        raise _no_split(root.name, split, sorted({*words} - {""}))
    return chosen, split


def _no_split(name: str, split: str, known: list[str]) -> DataError:
    has = f"its files name {listed(known)}." if known else "files have splits only where their names say so."
    return DataError(
        f"`{name}` must have the split `{split}`; {has} Leave the split out, or give the file that is meant."
    )


def _first_choice(words: list[str], name: str) -> str | None:
    """Return ``train`` where every file names one of several splits; else None: all files are read."""
    known = sorted(set(words))
    if len(known) < 2 or "" in known:
        return None
    if "train" not in known:
        raise InputError(f"`{name}` holds the splits {listed(known)}. Say which one is meant (split=…, @SPLIT).")
    return "train"


def read_file(path: Path, wanted: Collection[str] | None = None) -> Iterator[Any]:
    """Yield the records of a file: dictionaries, or texts.

    Raises
    ------
    DataError
        The file cannot be read; the message says where.
    """
    n = 0
    try:
        if ending(path) == ".parquet":
            records = _parquet_records(path, wanted)
        else:
            records = _READERS[str(ending(path))](_characters(path))
        for record in records:
            yield record
            n += 1
    except Exception as error:
        if isinstance(error, UnicodeDecodeError) and ending(path) != ".parquet":
            raise _encoding(path, error) from None
        # csv, json, gzip, zlib, pyarrow and the system raise classes of their own
        after = f" after {n:,} records" if n else ""
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise InputError(
            f"`{path.name}` cannot be read{after}: {reason}. Is the file complete, and of the kind its ending says?"
        ) from error


# -------------------------------------------------------------------------------------------------------- characters


class _Unpacked(io.RawIOBase):
    """The bytes of a gzipped file; expansion beyond all measure is refused."""

    def __init__(self, path: Path) -> None:
        self._packed = open_file(path)
        self._stream = gzip.GzipFile(fileobj=self._packed)
        self._limit = max(_EXPANSION_FLOOR, _EXPANSION * path.stat().st_size)
        self._n = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._stream.readinto(buffer)
        self._n += n
        if self._n > self._limit:
            raise ValueError(f"it expands to more than {_EXPANSION} times its size; if that is meant, unpack it first")
        return n

    def tell(self) -> int:
        return self._n

    def close(self) -> None:
        self._stream.close()
        self._packed.close()
        super().close()


def open_bytes(path: Path) -> io.BufferedReader:
    """Open a file as a stream of bytes, unpacked where its name ends in ``.gz``."""
    return io.BufferedReader(_Unpacked(path)) if path.suffix.lower() == ".gz" else open_file(path)


class _Characters(io.TextIOWrapper):
    """The characters of a file in UTF-8, with or without a byte order mark."""

    def __init__(self, binary: Any) -> None:
        super().__init__(binary, encoding="utf-8-sig", newline="")

    def lines(self) -> Iterator[str]:
        """Yield the lines with their ends."""
        while line := self.readline(LONGEST_RECORD):
            if len(line) == LONGEST_RECORD:
                raise ValueError(_too_long("line"))
            yield line


def _characters(path: Path) -> _Characters:
    return _Characters(open_bytes(path))


def _too_long(what: str) -> str:
    return f"a {what} must have fewer than {LONGEST_RECORD:,} characters. Cut it into several texts"


def _encoding(path: Path, error: UnicodeDecodeError) -> DataError:
    """Return the error about bytes that are no UTF-8, with their place in the file."""
    with open_bytes(path) as stream:
        at = _first_wrong_byte(stream)
        kind = "UTF-16" if at == 0 and error.object[:1] in (b"\xff", b"\xfe") else "LATIN1"
    unpacked = "unpack it and " if path.suffix.lower() == ".gz" else ""
    return DataError(
        f"`{path.name}` must be text in UTF-8; byte {at:,} is 0x{error.object[error.start]:02x}, which does not belong "
        f"there. If it is {kind}, {unpacked}convert it: iconv -f {kind} -t UTF-8 OLD > NEW"
    )


def _first_wrong_byte(stream: io.BufferedReader) -> int:
    """Return the place of the first byte that does not continue UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    seen = 0
    while True:
        block = stream.read(_CHUNK)
        pending = len(decoder.getstate()[0])
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            return seen - pending + error.start
        seen += len(block)


# -------------------------------------------------------------------------------------------------------------- kinds


def _line_records(stream: _Characters) -> Iterator[str]:
    for line in stream.lines():
        yield from line.rstrip("\r\n").split("\r")


def _csv_records(stream: _Characters, delimiter: str = ",") -> Iterator[dict[str, str]]:
    rows = _cells(stream.lines(), delimiter)
    header = next(rows, None)
    if header is None:
        raise ValueError("it is empty; the first row must name the columns")
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    if len(set(names)) < len(names):
        raise ValueError(f"column names must differ; they are {listed(names, 12)}")
    for cells in rows:
        if len(cells) != len(names):
            raise ValueError(f"a row must have {len(names)} cells, as the first one has; the next has {len(cells)}")
        yield dict(zip(names, cells))


def _tsv_records(stream: _Characters) -> Iterator[dict[str, str]]:
    return _csv_records(stream, "\t")


def _cells(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """Yield the cells of rows, empty rows left out."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        with _CSV_LIMIT:  # the limit of the csv module is one for the whole process; it is kept as it was
            limit = csv.field_size_limit(LONGEST_RECORD)
            try:
                row = next(reader, None)
            except csv.Error as error:
                if "field larger" in str(error):
                    raise ValueError(_too_long("cell")) from None
                raise ValueError(f"{error}; a quote inside a quoted cell must be doubled") from None
            finally:
                csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield row


def _json_records(stream: _Characters) -> Iterator[Any]:
    """Yield the values of JSON Lines, or the entries of one array; one table of columns by rows."""
    values = _json_values(stream)
    first = next(values, None)
    if isinstance(first, dict) and first and all(_is_plain_list(value) for value in first.values()):
        second = next(values, None)
        if second is None:
            yield from rows_of_columns(first)
            return
        yield first
        yield second
    elif first is not None:
        yield first
    yield from values


def _is_plain_list(value: object) -> bool:
    return isinstance(value, list) and not any(isinstance(each, list | dict) for each in value[:1])


def _json_values(stream: _Characters) -> Iterator[Any]:
    """Yield JSON values that follow one another, or the entries of one array."""
    text = _JsonText(stream)
    is_array = text.peek() == "["
    text.at += is_array
    n = 0
    while (found := text.peek()) != ("]" if is_array else ""):
        if not found:
            raise ValueError("the array is not closed")
        if is_array and n:
            if found != ",":
                raise ValueError("there must be a comma between the entries of an array")
            text.at += 1
            text.peek()
        yield text.value()
        n += 1
    text.at += is_array
    if text.peek():
        raise ValueError("something follows the array")


class _JsonText:
    """Characters of a stream from which JSON values are taken one after another."""

    def __init__(self, stream: _Characters) -> None:
        self._stream = stream
        self._text = ""
        self._decode = json.JSONDecoder().raw_decode
        self.at = 0
        """Place of the next character."""

    def peek(self) -> str:
        """Return the next character that is no space; nothing at the end."""
        while True:
            while self.at < len(self._text) and self._text[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self._text) or not self._read(_CHUNK):
                return self._text[self.at : self.at + 1]

    def value(self) -> Any:
        """Return the value that begins here."""
        while True:
            problem = None
            try:
                value, end = self._decode(self._text, self.at)
            except json.JSONDecodeError as error:
                problem = error
            length = len(self._text) - self.at
            # a value that reaches the end of what was read may go on: a number, a string, a nested list
            is_cut = end == len(self._text) if problem is None else _may_go_on(problem, len(self._text))
            if is_cut and length > LONGEST_RECORD:
                raise ValueError(_too_long("value of JSON"))
            if is_cut and self._read(max(_CHUNK, length)):
                continue
            if problem is not None:
                raise ValueError(f"{problem.msg} in JSON")
            self.at = end
            return value

    def _read(self, n: int) -> bool:
        more = self._stream.read(n)
        self._text, self.at = self._text[self.at :] + more, 0
        return bool(more)


def _may_go_on(error: json.JSONDecodeError, length: int) -> bool:
    """Return whether more characters may mend it: an open string, or an error in the last few."""
    return error.msg.startswith("Unterminated string") or error.pos >= length - 8


def _parquet_records(path: Path, wanted: Collection[str] | None) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    # pyarrow must seek in the file, so a gzipped one is unpacked in memory
    with open_bytes(path) as stream:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else stream)
        names = file.schema_arrow.names
        chosen = [name for name in names if wanted is None or name in wanted]
        for batch in file.iter_batches(_PARQUET_ROWS, columns=chosen if len(chosen) == len(wanted or names) else None):
            yield from batch.to_pylist()


_READERS: dict[str, Callable[[_Characters], Iterator[Any]]] = {
    ".csv": _csv_records,
    ".tsv": _tsv_records,
    ".json": _json_records,
    ".jsonl": _json_records,
    ".txt": _line_records,
}
ENDINGS = (*_READERS, ".parquet")
"""What text files end in, compression left aside."""
