"""Two halves of the same rows that share no document: one to choose on, one to measure on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..inputs.texts import Texts
from .source import Batch, Source, rows_in_words

RUN_ROWS = 64
"""Rows without a document are divided in runs of this many."""


@dataclass(frozen=True)
class Half:
    """Rows of every second document (every second run of 64 rows where documents are unknown), in stored order.

    Parameters
    ----------
    source
        All rows.
    second
        False: the documents with even numbers; True: those with odd ones.
    """

    __repr__ = rows_in_words

    source: Source
    second: bool

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.source.d_in

    @property
    def n_rows(self) -> int | None:
        """Not known before reading."""
        return None

    @property
    def info(self) -> dict[str, Any]:
        """What the rows are, and that these are half of them."""
        part = f"{'odd' if self.second else 'even'} documents (runs of {RUN_ROWS} rows where unknown)"
        return {**self.source.info, "n_rows": None, "part": part}

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield rows in stored order, in batches of at most `batch_rows`; see `Source.batches`.

        Raises
        ------
        ConfigError
            A seed or a start: a half is not shuffled.
        """
        if seed is not None or start != (0, 0):
            raise ConfigError("Half: rows of a half come in stored order from the beginning; leave `seed` and `start`.")
        first = 0
        for batch in self.source.batches(batch_rows):
            mine = self._is_mine(batch, first)
            first += batch.n_rows
            if bool(mine.any()):
                kept = batch.map(lambda column, mine=mine: column[mine])  # type: ignore[misc]
                yield Batch(kept.x, kept.token, kept.document, kept.position, kept.target, batch.next)

    def _is_mine(self, batch: Batch, first: int) -> Tensor:
        number = torch.arange(first, first + batch.n_rows) // RUN_ROWS
        if batch.document is not None:
            number = torch.where(batch.document >= 0, batch.document.cpu(), number)
        return (number % 2 == 1) == self.second


def halves(source: Source) -> tuple[Half, Half]:
    """Return the rows of even and of odd documents: nothing chosen on the first was seen in the second."""
    return Half(source, False), Half(source, True)


def text_halves(texts: Texts) -> tuple[Texts, Texts]:
    """Return the texts with even and those with odd indices, as `halves` divides their rows."""
    parts = []
    for start, name in ((0, "even"), (1, "odd")):
        columns = {key: column[start::2] for key, column in texts.columns.items()}
        info = {**texts.info, "n_texts": len(texts.texts[start::2]), "part": f"texts in {name} places"}
        info["digest"] = f"{texts.digest} ({name})"
        parts.append(
            dataclasses.replace(texts, texts=texts.texts[start::2], ids=texts.ids[start::2], columns=columns, info=info)
        )
    return parts[0], parts[1]
