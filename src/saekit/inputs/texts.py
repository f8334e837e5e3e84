"""Texts from wherever they lie: the built-in corpus, a local file, a data set of the Hugging Face hub, memory.

Everything is read as a stream: nothing is copied into a cache. Columns are named, never guessed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from ..errors import DataError, InputError, OfflineError, listed
from ..randomness import random_order
from ..settings import brief, check_whole
from .chat import Conversation, is_chat, n_characters
from .hub_datasets import HubName, one_split, open_hub, quiet_datasets
from .readers import ENDINGS, Records, ending, find_local, open_local
from .records import READABLE, open_values
from .tables import Table, first_line, no_column, shortened

_SCALARS = (str, int, float, bool, type(None))
_COLUMNS_WITHIN = 1000  # records after which a column that none of them had counts as missing


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
    data: object,
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
        files (a line of a txt file is a text; cells of csv and tsv are text); a folder that ``Dataset.save_to_disk``
        wrote; a hub name ``owner/name[:config][@split]``; or values in memory: a list, array, Series or iterator of
        texts, of dictionaries or of ``(text, label)`` pairs, two columns ``(texts, labels)``, a dictionary of columns,
        a frame of pandas or polars, a table of pyarrow, a ``Dataset``. Any name may be followed by ``@split``.
        ``"builtin:paragraphs"`` is the built-in corpus by paragraph, with its ``section`` and ``library`` as labels
        and its ``module`` as group.
    text
        Name of the column that holds the text, or conversations: lists of messages ``{"role": …, "content": …}``,
        which become tokens by the chat template of a model.
    split
        Split of a hub data set, of the built-in corpus (``all``, ``train``, ``heldout``), or of a folder whose files
        name theirs (``train.jsonl``, ``test-00000.parquet``); None: ``train`` where there is one; all of the built-in.
    limit
        Maximum number of texts; None: all.
    characters
        Stop after the text in which this many characters are reached; None: no limit.
    columns
        Names of other columns to keep; None: all that hold plain values.

    Returns
    -------
    Texts
        Empty and missing texts left out and counted in ``info["n_empty"]``. The built-in corpus comes in a fixed
        shuffled order, so that its beginning is a sample of the whole.

    Raises
    ------
    DataError
        No such file, split or column, no text at all, or a file that cannot be read.
    OfflineError
        A hub data set is wanted and the hub cannot be reached.
    ConfigError
        `limit` or `characters` is not positive, or two splits are named.
    """
    check_whole("read_texts", limit=limit, characters=characters)
    records, source = _open(data, text, split, columns)
    gathered = _Gathering(text, source["name"], columns)
    complete = True
    through_datasets = source["kind"] in ("hub", "disk")
    with quiet_datasets() if through_datasets else nullcontext():
        for row, record in enumerate(_read(records, source["name"]) if through_datasets else records):
            if gathered.reaches(limit, characters):
                complete = False
                break
            gathered.add(row, record)
    return gathered.finish(source, complete)


def _records_of_texts(texts: Texts, text: str) -> Iterator[dict[str, Any]]:
    own = text in ("text", texts.info["text"])
    if not own and text not in texts.columns:
        raise no_column(text, [*texts.columns, texts.info["text"]], texts.info["name"])
    for i in range(len(texts)):
        columns = {name: values[i] for name, values in texts.columns.items()}
        yield {**columns, **({text: texts.texts[i]} if own else {}), _ID: texts.ids[i]}


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
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The columns that are kept; shorter than the texts where the last ones have none."""
    names: dict[str, None] = field(default_factory=dict)
    """Names of all columns, in the order of their appearance."""
    not_plain: set[str] = field(default_factory=set)
    n_empty: int = 0
    n_characters: int = 0

    def reaches(self, limit: int | None, characters: int | None) -> bool:
        """Return whether there are enough texts or characters."""
        if limit is not None and len(self.texts) >= limit:
            return True
        return characters is not None and self.n_characters >= characters

    def add(self, row: int, record: object) -> None:
        """Take the text of a record, unless it is empty."""
        record = self._by_columns(record, row)
        self.names |= dict.fromkeys(record)
        if row + 1 == _COLUMNS_WITHIN:
            self._check_columns()
        text = self._text_of(record, row)
        if not text.strip():
            self.n_empty += 1
            return
        self.texts.append(text)
        self.ids.append(str(record.get(_ID, row)))
        self.n_characters += n_characters(text)
        for name, value in record.items():
            if name not in (self.text, _ID) and (self.wanted is None or name in self.wanted):
                self._keep(name, value, row)

    def _by_columns(self, record: object, row: int) -> Mapping[str, Any]:
        """Return a record as a dictionary; a text, or a text with its label, becomes one."""
        if isinstance(record, tuple) and len(record) == 2:
            label = self.wanted[0] if self.wanted else "label"
            return {**self._by_columns(record[0], row), label: record[1]}
        if record is None or isinstance(record, str):
            if self.text != "text":
                raise InputError(
                    f"`{self.name}` holds texts without names of columns; a column `{self.text}` is asked for. Leave "
                    "the name of the text column out."
                )
            return {"text": record}
        if not isinstance(record, Mapping):
            raise InputError(
                f"`{self.name}` must hold texts or dictionaries with a column `{self.text}`; record {row} is "
                f"{type(record).__name__}. What can be read: {READABLE}."
            )
        return record

    def _text_of(self, record: Mapping[str, object], row: int) -> str:
        if self.text not in self.names:
            raise no_column(self.text, record, self.name, hint=_chat_hint(record))
        value = record.get(self.text)
        if value is None:
            return ""
        if is_chat(value):
            value = Conversation.of(value, f"row {row} of `{self.name}`")
        if not isinstance(value, str):
            raise InputError(
                f"column `{self.text}` of `{self.name}` must hold text, or conversations; row {row} has "
                f"{shortened(value)} ({type(value).__name__}). Name the column that holds the text (--text)."
            )
        self._check_unicode(value, self.text, row)
        return value

    def _keep(self, name: str, value: object, row: int) -> None:
        if name in self.not_plain:
            return
        if self.wanted is None and not isinstance(value, _SCALARS):
            self.not_plain.add(name)
            self.columns.pop(name, None)
            return
        if isinstance(value, str):
            self._check_unicode(value, name, row)
        column = self.columns.setdefault(name, [])
        column.extend([None] * (len(self.texts) - 1 - len(column)))
        column.append(value)

    def _check_unicode(self, value: str, name: str, row: int) -> None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"column `{name}` of `{self.name}` must hold Unicode text; row {row} has half of a surrogate pair, "
                f"{value[error.start]!a}, at character {error.start}. Remove it."
            ) from None

    def _check_columns(self) -> None:
        for name in self.wanted or ():
            if name not in self.names:
                raise no_column(name, self.names, self.name)

    def finish(self, source: Mapping[str, object], complete: bool) -> Texts:
        """Return the texts.

        Raises
        ------
        DataError
            There are none, or a column is missing.
        """
        if not self.texts:
            raise InputError(
                f"`{self.name}` must hold at least one text that is not empty; "
                + (
                    f"all {self.n_empty} texts of column `{self.text}` are empty."
                    if self.n_empty
                    else "it has no rows."
                )
                + " Check the file and the name of the column."
            )
        self._check_columns()
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        info = {
            **source,
            "text": self.text,
            "n_texts": len(self.texts),
            "n_empty": self.n_empty,
            "complete": complete,
            "digest": "sha256:" + digest.hexdigest(),
        }
        for values in self.columns.values():
            values.extend([None] * (len(self.texts) - len(values)))
        return Texts(tuple(self.texts), tuple(self.ids), {k: tuple(v) for k, v in self.columns.items()}, info)


_ID = "__id__"
"""Column of names of the texts, from sources that have some."""


def _chat_hint(record: Mapping[str, object]) -> str:
    """Return which column holds conversations, if one does."""
    chats = [name for name, value in record.items() if is_chat(value)]
    return f"Conversations are in `{chats[0]}` (--text {chats[0]})." if chats else ""


def _read(records: Iterable[object], name: str) -> Iterator[Any]:
    """Yield the records of a data set, with its errors turned into ours."""
    try:
        yield from records
    except (DataError, OfflineError):
        raise
    except Exception as error:
        # datasets raises classes of pandas, pyarrow, gzip and fsspec
        raise InputError(f"`{name}` cannot be read: {first_line(error)}. Is it complete?") from error


def _open(data: object, text: str, split: str | None, columns: Sequence[str] | None) -> Records:
    """Return the records of a source, and what it is."""
    if isinstance(data, Texts):
        data.check_split(split)
        known = ("kind", "name", "path", "split")
        return _records_of_texts(data, text), {key: data.info[key] for key in known if key in data.info}
    if isinstance(data, str | os.PathLike):
        return _open_named(os.fspath(data), split, None if columns is None else {text, *columns})
    return open_values(data, split)


def _open_named(name: str, split: str | None, wanted: Collection[str] | None) -> Records:
    """Return the records of the corpus, of a local file or folder, or of a data set of the hub."""
    before, _, named = name.partition("@")
    if before in ("builtin", "builtin:paragraphs"):
        return _open_builtin(before, one_split(split, named, name) or "all")
    path, named_split = find_local(name)
    if path is not None:
        return open_local(path, one_split(split, named_split, name), wanted)
    hub = HubName.parse(name)
    if hub is None or ending(Path(hub.name)) is not None or find_local(hub.name)[0] is not None:
        raise InputError(
            f"`{shortened(name)}` must be `builtin`, a file or a hub data set `owner/name`; there is no such file. "
            f"Files end in {listed(ENDINGS, 6)}, with or without `.gz`, and have no `:config`. Check the path."
        )
    return open_hub(hub, split)


def _open_builtin(name: str, split: str) -> Records:
    """Open the built-in corpus: whole docstrings, or their paragraphs with their section."""
    from . import corpus

    whole = name == "builtin"
    found: Sequence[Any] = corpus.docs(split=split) if whole else corpus.paragraphs(split=split)  # type: ignore[arg-type]
    columns = ("text", "module", "library") if whole else ("text", "module", "library", "section")
    records = (
        {**{column: getattr(found[i], column) for column in columns}, _ID: found[i].id}
        for i in random_order(len(found), "corpus")
    )
    return records, {"kind": "builtin", "name": name, "split": split}
