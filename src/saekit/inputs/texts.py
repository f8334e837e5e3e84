"""Texts from wherever they lie: the built-in corpus, a local file, a data set of the Hugging Face hub, a list.

Files are read by the builders of ``datasets`` as a stream: nothing is copied into a cache. Columns are named, never
guessed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ..errors import DataError, OfflineError, listed
from ..randomness import random_order
from ..settings import brief, check_whole
from .hub_datasets import HubName, open_hub, quiet_datasets
from .tables import Table, first_line, no_column

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    # keep_default_na: a text that reads "null" or "NA" is a text
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
TEXT_ENDINGS = tuple(_BUILDERS)
"""What text files end in, compression left aside."""

_SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True, eq=False)
class Texts(Table, Sequence[str]):
    """Texts in a fixed order, with the other columns of their table.

    Examples
    --------
    >>> texts = read_texts(["one text", "another"])
    >>> len(texts), texts[1], texts.ids
    (2, 'another', ('0', '1'))
    """

    __repr__ = brief

    texts: tuple[str, ...] = field(repr=False)
    """The texts; none is empty."""
    ids: tuple[str, ...] = field(repr=False)
    """One name per text: the number of its row in the file, or its name in the built-in corpus."""
    columns: dict[str, tuple[Any, ...]] = field(repr=False)
    """The other columns of the table, one entry per text."""
    info: dict[str, Any]
    """Where the texts come from (plain JSON): kind, name, split, text, n_texts, n_empty, complete, digest."""

    def __len__(self) -> int:
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.texts[index]


def read_texts(
    data: str | os.PathLike[str] | Iterable[Any],
    *,
    text: str = "text",
    split: str | None = None,
    limit: int | None = None,
    characters: int | None = None,
    columns: Sequence[str] | None = None,
) -> Texts:
    """Read texts and the other columns of their table.

    Parameters
    ----------
    data
        ``"builtin"``; a path to a csv, tsv, json, jsonl, parquet or txt file, gzipped or not, or to a folder of such
        files (a line of a txt file is a text); a hub name ``owner/name[:config][@split]``; or an iterable of strings or
        of dictionaries. The name may be followed by ``@split`` for ``"builtin"`` too (``all``, ``train``, ``heldout``).
        ``"builtin:paragraphs"`` is the same corpus by paragraph, with its ``section`` and ``library`` as labels and its
        ``module`` as group.
    text
        Name of the column that holds the text.
    split
        Split of a hub data set or of the built-in corpus; None: ``train`` where there is one; all of the built-in.
    limit
        Maximum number of texts; None: all.
    characters
        Stop after the text in which this many characters are reached; None: no limit.
    columns
        Names of other columns to keep; None: all that hold plain values.

    Returns
    -------
    Texts
        Empty texts left out and counted in ``info["n_empty"]``. The built-in corpus comes in a fixed shuffled order, so
        that its beginning is a sample of the whole.

    Raises
    ------
    DataError
        No such file, no such column, no text at all, or a file that cannot be parsed.
    OfflineError
        A hub data set is wanted and the hub cannot be reached.
    ConfigError
        `limit` or `characters` is not positive.
    """
    check_whole("read_texts", limit=limit, characters=characters)
    records: Iterable[Any]
    if isinstance(data, Texts):
        records = _records_of(data, text)
        source: dict[str, Any] = {key: data.info[key] for key in ("kind", "name", "split") if key in data.info}
    elif isinstance(data, str | os.PathLike):
        records, source = _open(os.fspath(data), split)
    else:
        records, source = data, {"kind": "list", "name": "list"}
    gathered = _Gathering(text, source["name"], columns)
    complete = True
    with quiet_datasets() if source["kind"] in ("hub", "file") else nullcontext():
        for row, record in enumerate(_read(records, source["name"])):
            if gathered.reaches(limit, characters):
                complete = False
                break
            gathered.add(row, record)
    return gathered.finish(source, complete)


def _records_of(texts: Texts, text: str) -> Iterator[dict[str, Any]]:
    for i in range(len(texts)):
        columns = {name: values[i] for name, values in texts.columns.items()}
        yield {**columns, text: texts.texts[i], "__id__": texts.ids[i]}


@dataclass
class _Gathering:
    """Texts that are not empty, with their columns, as they are read."""

    text: str
    name: str
    """Name of the source, for messages."""
    wanted: Sequence[str] | None
    """Columns to keep; None: all that hold plain values."""
    texts: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] | None = None
    """The columns that are kept; None before the first record."""
    n_empty: int = 0
    n_characters: int = 0

    def reaches(self, limit: int | None, characters: int | None) -> bool:
        """Return whether there are enough texts or characters."""
        if limit is not None and len(self.texts) >= limit:
            return True
        return characters is not None and self.n_characters >= characters

    def add(self, row: int, record: Any) -> None:
        """Take the text of a record, unless it is empty."""
        if isinstance(record, str):
            record = {self.text: record}
        value, others = _record(record, row, self.text, self.name)
        if self.columns is None:
            self.columns = self._chosen(others)
        if not value.strip():
            self.n_empty += 1
            return
        self.texts.append(value)
        self.ids.append(str(others.get("__id__", row)))
        for name, values in self.columns.items():
            values.append(others.get(name))
        self.n_characters += len(value)

    def _chosen(self, others: Mapping[str, Any]) -> dict[str, list[Any]]:
        wanted = self.wanted
        if wanted is None:
            wanted = [name for name, other in others.items() if isinstance(other, _SCALARS)]
        for name in wanted:
            if name not in others:
                raise no_column(name, others, self.name)
        return {name: [] for name in wanted if name != "__id__"}

    def finish(self, source: Mapping[str, Any], complete: bool) -> Texts:
        """Return the texts.

        Raises
        ------
        DataError
            There are none.
        """
        if not self.texts:
            raise DataError(
                f"`{self.name}` must hold at least one text that is not empty; "
                + (
                    f"all {self.n_empty} texts of column `{self.text}` are empty."
                    if self.n_empty
                    else "it has no rows."
                )
                + " Check the file and the name of the column."
            )
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        info = {
            **source,
            "text": self.text,
            "n_texts": len(self.texts),
            "n_empty": self.n_empty,
            "complete": complete,
            "digest": "sha256:" + digest.hexdigest(),
        }
        columns = {name: tuple(values) for name, values in (self.columns or {}).items()}
        return Texts(tuple(self.texts), tuple(self.ids), columns, info)


def _record(record: Any, row: int, text: str, name: str) -> tuple[str, dict[str, Any]]:
    """Return the text of a record, and its other columns."""
    if not isinstance(record, Mapping):
        raise DataError(
            f"`{name}` must hold texts or dictionaries with a column `{text}`; record {row} is {type(record).__name__}."
        )
    if text not in record:
        raise no_column(text, record, name)
    value = record[text]
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise DataError(
            f"column `{text}` of `{name}` must hold text; row {row} has {value!r} ({type(value).__name__}). "
            "Name the column that holds the text (--text)."
        )
    return value, {key: other for key, other in record.items() if key != text}


def _read(records: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the records, with errors of the readers turned into ours."""
    try:
        yield from records
    except (DataError, OfflineError):
        raise
    except Exception as error:
        # the builders of datasets raise classes of pandas, pyarrow, gzip and fsspec
        raise DataError(
            f"`{name}` cannot be read: {first_line(error)}. Is the file complete, and of the kind its ending says?"
        ) from error


def _open(data: str, split: str | None) -> tuple[Iterable[Any], dict[str, Any]]:
    """Return the records of a named source, and what it is."""
    name, _, named_split = data.partition("@")
    if name in ("builtin", "builtin:paragraphs"):
        return _open_builtin(name, split or named_split or "all")
    path = Path(data).expanduser()
    if path.exists():
        return _open_file(path)
    hub = HubName.parse(data)
    if hub is None or _ending(path) is not None:
        raise DataError(
            f"`{data}` must be `builtin`, a file or a hub data set `owner/name`; there is no such file. "
            f"Files end in {listed(_BUILDERS, 6)}, with or without `.gz`. Check the path."
        )
    return open_hub(hub, split)


def _open_builtin(name: str, split: str) -> tuple[Iterable[Any], dict[str, Any]]:
    """Open the built-in corpus: whole docstrings, or their paragraphs with their section."""
    from . import corpus

    whole = name == "builtin"
    found: Sequence[Any] = corpus.docs(split=split) if whole else corpus.paragraphs(split=split)  # type: ignore[arg-type]
    columns = ("text", "module", "library") if whole else ("text", "module", "library", "section")
    records = (
        {**{column: getattr(found[i], column) for column in columns}, "__id__": found[i].id}
        for i in random_order(len(found), "corpus")
    )
    return records, {"kind": "builtin", "name": name, "split": split}


def _ending(path: Path) -> str | None:
    """Return the ending that says what a file is, compression left aside; None when unknown."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _BUILDERS else None


def _open_file(path: Path) -> tuple[Iterable[Any], dict[str, Any]]:
    files = sorted(file for file in path.rglob("*") if _ending(file)) if path.is_dir() else [path]
    endings = {_ending(file) for file in files}
    if len(endings) != 1 or None in endings:
        found = f"the folder holds {listed(sorted(map(str, endings)))}" if path.is_dir() else f"got `{path.name}`"
        raise DataError(
            f"a text source must end in {listed(_BUILDERS, 6)} (with or without `.gz`), one kind per folder; {found}. "
            "Convert it, or read it yourself and pass a list of texts."
        )
    builder, options = _BUILDERS[endings.pop() or ""]
    from datasets import load_dataset

    def records() -> Iterator[Any]:
        # pyarrow must seek in a parquet file, so a gzipped one is unpacked in memory
        for file in files:
            if builder == "parquet" and file.suffix == ".gz":
                yield from _gzipped_parquet(file)
            else:
                yield from load_dataset(builder, data_files=str(file), split="train", streaming=True, **options)

    return records(), {"kind": "file", "name": path.name}


def _gzipped_parquet(path: Path) -> Iterator[Any]:
    import gzip
    import io

    import pyarrow.parquet

    with gzip.open(path) as stream:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()))
    for batch in table.iter_batches():
        yield from batch.to_pylist()
