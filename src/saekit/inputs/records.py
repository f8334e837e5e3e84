"""Records of whatever holds data in memory: lists, tables, frames, columns, data sets, iterators.

A record is a text or an image, a pair of one with its label, or a dictionary of columns. Containers that do not iterate
over their records (a frame iterates over the names of its columns) are read row by row.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np

from ..errors import InputError, listed
from .hub_datasets import choose_split, named_labels

READABLE = (
    "a list (array, Series, iterator) of texts or images, of dictionaries, or of pairs (text, label); two columns "
    "(texts, labels); a dictionary of columns; a DataFrame of pandas or polars; a table of pyarrow; a Dataset"
)
"""What can be read, for messages."""

_ROWS_AT_ONCE = 256  # of an arrow table, converted to Python


def open_values(data: Any, split: str | None) -> tuple[Iterator[Any], dict[str, Any]]:
    """Return the records of a container in memory, and what is known about it.

    Raises
    ------
    DataError
        The container does not hold records, or has no such split.
    """
    source: dict[str, Any] = {"kind": "list", "name": "list"}
    if _are_splits(data):
        source["split"] = choose_split(data, split, type(data).__name__)
        return named_labels(data[source["split"]]), source
    if split is not None and split != str(getattr(data, "split", None)):
        raise InputError(
            f"data in memory have no split `{split}` ({type(data).__name__}). Give the rows that are meant and leave "
            "the split out, or give a DatasetDict."
        )
    return records_of(data), source


def records_of(data: object) -> Iterator[Any]:
    """Yield the records of a container in memory.

    Yields
    ------
    str, dict, tuple or object
        A dictionary for each row of a table; a tuple for each entry of a pair of columns; else what the container
        holds. Numbers of numpy come as plain ones, missing values as None.

    Raises
    ------
    DataError
        The container does not hold records, or its columns differ in length.
    """
    rows = _rows_of_table(data)
    if rows is not None:
        yield from rows
        return
    for entry in _entries(data):
        rows = None if isinstance(entry, Mapping | tuple | str) else _rows_of_table(entry)
        if rows is None:
            yield plain(entry)
        else:  # a table in pieces
            yield from rows


def one_column(data: object, text: str = "text") -> list[Any]:
    """Return the entries of a list, of the one column of a table, or of its column `text`.

    Raises
    ------
    DataError
        The table has several columns and none of that name.
    """
    found = []
    for record in records_of(data):
        if isinstance(record, Mapping):
            if len(record) != 1 and text not in record:
                raise InputError(
                    f"texts must be one column; got the columns {listed(record)}. Give the one that holds them."
                )
            record = record[text] if text in record else next(iter(record.values()))
        found.append(record)
    return found


def rows_of_columns(columns: Mapping[object, object]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table that is given by columns.

    Raises
    ------
    DataError
        Columns differ in length.
    """
    names = [str(name) for name in columns]
    if len(set(names)) < len(names):
        raise InputError(f"columns must have different names; they are called {listed(names, 12)}.")
    for values in _side_by_side({name: _entries(column) for name, column in zip(names, columns.values())}):
        yield dict(zip(names, values))


def plain(value: object) -> Any:
    """Return a cell as a plain value: numbers of numpy and arrow unpacked, missing values as None."""
    if isinstance(value, np.generic):
        value = value.item()
    elif hasattr(value, "as_py"):
        value = value.as_py()
    if type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value):
        return None
    return value


def repeatable(data: object) -> Any:
    """Return data that can be read again: an iterator remembers what it has given."""
    return _Remembered(data) if isinstance(data, Iterator) and not isinstance(data, io.IOBase) else data


@dataclass(eq=False)
class _Remembered:
    """An iterator that can be read again from its beginning; no further than it was asked for."""

    rest: Iterator[Any]
    given: list[Any] = field(default_factory=list)

    def __iter__(self) -> Iterator[Any]:
        index = 0
        while True:
            if index == len(self.given):
                try:
                    self.given.append(next(self.rest))
                except StopIteration:
                    return
            yield self.given[index]
            index += 1


def _rows_of_table(data: Any) -> Iterator[Any] | None:
    """Return the rows of a table; None where the data are none."""
    if isinstance(data, Mapping):
        return _rows_of_mapping(data)
    if isinstance(data, np.ndarray) and data.dtype.names:
        return rows_of_columns({name: data[name] for name in data.dtype.names})
    if _is_pair(data):
        return _rows_of_pair(*data)
    for marks, rows in _FRAMES:
        if all(hasattr(data, mark) for mark in marks):
            return rows(data)
    return None


def _rows_of_mapping(data: Mapping[Any, Any]) -> Iterator[Any]:
    if _are_splits(data):
        return named_labels(data[choose_split(data, None, type(data).__name__)])
    if not data or not all(_is_container(values) for values in data.values()):
        raise InputError(
            "a dictionary must hold columns of one length, {'text': […], 'label': […]}; this one has the keys "
            f"{listed(data)}. Records come in a list: [{{'text': …}}, {{'text': …}}]."
        )
    return rows_of_columns(data)


def _is_pair(data: object) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and all(map(_is_container, data))


def _rows_of_pair(texts: object, labels: object) -> Iterator[tuple[Any, ...]]:
    return _side_by_side({"the texts": records_of(texts), "the labels": iter(one_column(labels))})


def _rows_of_frame(frame: Any) -> Iterator[dict[str, Any]]:
    names = [str(name) for name in frame.columns]
    if len(set(names)) < len(names):
        raise InputError(f"columns must have different names; they are called {listed(names, 12)}.")
    for values in frame.itertuples(index=False, name=None):
        yield dict(zip(names, map(plain, values)))


def _rows_of_batches(batches: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for batch in batches:
        for first in range(0, len(batch), _ROWS_AT_ONCE):
            yield from batch.slice(first, _ROWS_AT_ONCE).to_pylist()


def _rows_of_stream(data: object) -> Iterator[dict[str, Any]]:
    import pyarrow

    return _rows_of_batches(pyarrow.RecordBatchReader.from_stream(data))


_FRAMES: tuple[tuple[tuple[str, ...], Callable[[Any], Iterator[Any]]], ...] = (
    (("itertuples", "columns"), _rows_of_frame),  # pandas
    (("iter_rows", "columns"), lambda data: iter(data.iter_rows(named=True))),  # polars
    (("column_names", "features"), named_labels),  # datasets
    (("to_batches", "schema"), lambda data: _rows_of_batches(data.to_batches())),  # tables of pyarrow
    (("to_pylist", "schema"), lambda data: _rows_of_batches([data])),  # a batch of them
    (("__arrow_c_stream__", "schema"), _rows_of_stream),  # whoever speaks Arrow
    (("__arrow_c_stream__", "columns"), _rows_of_stream),
)
"""What a table is recognized by, and how its rows are read; the libraries themselves need not be there."""


def _are_splits(data: object) -> bool:
    """Return whether the data are a dictionary of data sets, one per split."""
    return isinstance(data, Mapping) and bool(data) and all(hasattr(each, "column_names") for each in data.values())


def _is_container(values: object) -> bool:
    return not isinstance(values, str | bytes | tuple) and isinstance(values, Iterable) and hasattr(values, "__len__")


def _side_by_side(columns: Mapping[str, Iterator[object]]) -> Iterator[tuple[Any, ...]]:
    """Yield the entries of columns that have one length."""
    end = object()
    for n, values in enumerate(zip_longest(*columns.values(), fillvalue=end)):
        short = [name for name, value in zip(columns, values) if value is end]
        if short:
            raise InputError(f"columns must have one length; {listed(short)} ends after {n} entries, others go on.")
        yield tuple(map(plain, values))


def _entries(data: Any) -> Iterator[Any]:
    """Return the entries of what is no table."""
    why = ""
    if isinstance(data, str | bytes):
        why = ": one string. Put it into a list"
    elif isinstance(data, io.IOBase):
        why = ": an open file. Give its path"
    elif isinstance(data, Set):
        why = ", which has no order. Make it a list"
    elif isinstance(data, np.ndarray) and data.ndim in (0, 2):  # more axes: images
        if data.shape[1:] == (1,):
            return iter(data[:, 0])
        why = f" of shape {data.shape}. Give one column"
    elif hasattr(data, "__iter__") or hasattr(data, "__getitem__"):
        return iter(data)
    raise InputError(f"data in memory must be {READABLE}; got {type(data).__name__}{why}.")
