"""Rows made by a language model while they are read, without a cache on disk."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, overload

import numpy as np
import torch

from ..files import digest_bytes
from ..inputs.records import repeatable
from ..models.hooks import Hook, are_several, find_hooks
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.pretrained import dtype_name
from ..places import without_locations
from ..randomness import random_order
from ..sae.finite import check_finite
from ..settings import check_whole, suggest_keywords
from .capture_texts import Split, TextReader, TextRunner, open_texts
from .outliers import OutlierFilter
from .settings import StreamSettings
from .shuffle import read_ahead, read_batches
from .source import Batch, Block, Columns, check_reading, rows_in_words
from .tokens import Contexts

HELD_BLOCKS = 8
"""Maximum number of blocks that are kept for the other hooks: more than `train` reads before its first step. One that
was dropped is computed again."""


@overload
def stream(
    model: str | os.PathLike[str] | LanguageModel,
    data: str | os.PathLike[str] | Iterable[object],
    *,
    layer: int | None = None,
    hook: str | Hook | None = None,
    tokens: int | None = None,
    text: str = "text",
    settings: StreamSettings = ...,
) -> StreamRows: ...
@overload
def stream(
    model: str | os.PathLike[str] | LanguageModel,
    data: str | os.PathLike[str] | Iterable[object],
    *,
    layer: Sequence[int] | Literal["all"] | None = None,
    hook: Sequence[str | Hook] | None = None,
    tokens: int | None = None,
    text: str = "text",
    settings: StreamSettings = ...,
) -> dict[str, StreamRows]: ...
@suggest_keywords
def stream(
    model: str | os.PathLike[str] | LanguageModel,
    data: str | os.PathLike[str] | Iterable[object],
    *,
    layer: int | Sequence[int] | Literal["all"] | None = None,
    hook: str | Hook | Sequence[str | Hook] | None = None,
    tokens: int | None = None,
    text: str = "text",
    settings: StreamSettings = StreamSettings(),
) -> StreamRows | dict[str, StreamRows]:
    """Return rows that are computed while they are read, so that nothing is stored.

    Several hooks share every forward pass, as long as they are read side by side (as `train` reads them); the rows of
    each are bitwise those of a stream of its own.

    Parameters
    ----------
    model, data, layer, hook, text
        As for `capture`.
    tokens
        Size of a pass: contexts until this many tokens are reached. None: all.
    settings
        Everything else.

    Returns
    -------
    StreamRows
        For a list of layers or hooks a dictionary from the hooks' names (``"layers.2"``) to streams.

    Raises
    ------
    ModelError, OfflineError, DataError, ConfigError
        As for `capture`.
    """
    check_whole("stream", tokens=tokens)
    lm = load_language_model(model, **settings.placement)
    hooks = find_hooks(lm.model, layer, hook, site=settings.site)
    runner = TextRunner(lm, hooks, lm.row_dtype, settings)
    reader = open_texts(runner, repeatable(data), text=text, tokens=tokens)
    samples = reader.sample()
    shared = SharedBlocks(runner, reader.contexts.pick(range(reader.enough)))
    streams = {each.name: _stream_at(reader, shared, at, samples[at]) for at, each in enumerate(hooks)}
    several = are_several(layer, hook)
    return streams if several else streams[hooks[0].name]


def _stream_at(reader: TextReader, shared: SharedBlocks, at: int, sample: Columns) -> StreamRows:
    """Return the rows at one of the hooks."""
    runner, contexts, settings = shared.runner, shared.contexts, shared.settings
    for x in sample.matrices:
        check_finite(x.float(), 0, "the stream")
    keep = OutlierFilter.measured(settings.outliers, sample.x)
    n_kept = int(runner.n_rows(contexts).sum())
    special = {"skipped": settings.skip_special, "n": int((contexts.position < 0).sum())}
    info = {
        "kind": "stream",
        **runner.lm.info,
        **runner.hooks[at].info,
        **reader.info(runner.hooks[at]),
        "filters": {"special": special, "outliers": None if keep is None else keep.info()},
        "d_in": sample.x.shape[1],
        **({} if sample.target is None else {"d_out": sample.target.shape[1]}),
        "dtype": dtype_name(runner.dtype),
        "n_tokens": n_kept,
        "n_rows": n_kept if keep is None else None,
        "block_tokens": settings.block_tokens,
    }
    digest = digest_bytes(json.dumps(without_locations(info), sort_keys=True).encode())
    return StreamRows(
        shared=shared,
        at=at,
        info={**info, "digest": digest},
        keep=keep,
        block_contexts=max(1, round(settings.block_tokens * len(contexts) / max(len(contexts.ids), 1))),
        prefetch=settings.prefetch,
    )


_Key: TypeAlias = tuple[int | None, int, int]


@dataclass(eq=False)
class SharedBlocks:
    """Blocks of rows at several hooks: one forward pass for all who read the same block."""

    runner: TextRunner
    contexts: Contexts
    split: Split | None = None
    """The processes that share the forward passes; `train` sets it for the time of a distributed run."""
    _waiting: dict[_Key, dict[int, Columns]] = field(default_factory=dict)
    """Rows that were computed and not yet taken, by block, by the index of the hook."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def settings(self) -> StreamSettings:
        """How the texts are read."""
        settings = self.runner.settings
        assert isinstance(settings, StreamSettings)
        return settings

    def take(self, key: _Key, at: int, chosen: Callable[[], Sequence[int] | np.ndarray]) -> Columns:
        """Return the rows of a block at one hook; the others wait for whoever takes them.

        Parameters
        ----------
        key
            Seed, number and contexts of the block: blocks of two sizes hold other rows.
        at
            Index of the hook.
        chosen
            Returns the contexts of the block.
        """
        with self._lock:
            if at not in self._waiting.get(key, {}):
                self._waiting[key] = dict(enumerate(self.runner.rows(self.contexts.pick(chosen()), self.split)))
            rows = self._waiting[key].pop(at)
            if not self._waiting[key]:
                del self._waiting[key]
            while len(self._waiting) > HELD_BLOCKS:  # nobody else may be reading
                del self._waiting[next(iter(self._waiting))]
            return rows


@dataclass(frozen=True, eq=False)
class StreamRows:
    """Rows computed by a language model as they are read; made by `stream`.

    A block is a fixed number of contexts that follow one another in an order computed from (seed, epoch); its rows are
    permuted. To begin at a place, only its block is computed.
    """

    __repr__ = rows_in_words

    shared: SharedBlocks = field(repr=False)
    at: int
    """Index of the hook."""
    info: dict[str, Any] = field(repr=False)
    keep: OutlierFilter | None
    block_contexts: int
    """Contexts in a block."""
    prefetch: bool = True
    """Whether a second thread computes the next block."""
    seconds: dict[str, float] = field(default_factory=lambda: {"lm": 0.0, "wait": 0.0})
    """Time so far: ``lm`` in the language model, ``wait`` in which the reader waited for it. Unit: s."""

    @property
    def contexts(self) -> Contexts:
        """The texts, cut into contexts."""
        return self.shared.contexts

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return int(self.info["d_in"])

    @property
    def n_rows(self) -> int | None:
        """Rows of one pass; None with the filter for outliers, whose effect is known only afterwards."""
        return self.info["n_rows"]

    def batches(self, batch_rows: int, *, seed: int | None = None, start: tuple[int, int] = (0, 0)) -> Iterator[Batch]:
        """Yield rows in batches; see `saekit.rows.source.Source.batches`."""
        start = check_reading(self, batch_rows, seed, start)
        # several readers in threads of their own would meet the other processes in different orders
        if not self.prefetch or (self.shared.split is not None and len(self.shared.runner.hooks) > 1):
            return read_batches(lambda number: self._waited(lambda: self._block(seed, number)), batch_rows, start)
        return read_ahead(
            lambda number: self._block(seed, number),
            batch_rows,
            start,
            cancels=self.shared.split is None,
            waited=self._waited,
        )

    def _waited(self, block: Callable[[], Block | None]) -> Block | None:
        begin = time.perf_counter()
        try:
            return block()
        finally:
            self.seconds["wait"] += time.perf_counter() - begin

    def _block(self, seed: int | None, number: int) -> Block | None:
        n_blocks = -(-len(self.contexts) // self.block_contexts)
        epoch, index = divmod(number, n_blocks)
        if seed is None and epoch:
            return None
        first, last = index * self.block_contexts, min((index + 1) * self.block_contexts, len(self.contexts))

        def chosen() -> Sequence[int] | np.ndarray:
            if seed is None:
                return range(first, last)
            return random_order(len(self.contexts), "chunks", seed, epoch)[first:last]

        begin = time.perf_counter()
        rows = self.shared.take((seed, number, self.block_contexts), self.at, chosen)
        self.seconds["lm"] += time.perf_counter() - begin
        for x in rows.matrices:
            check_finite(x.float(), 0, f"block {number} of the stream")
        if self.keep is not None:
            rows = self.keep.apply(rows)
        if seed is None:
            return Block(rows)
        return Block(rows, torch.from_numpy(random_order(len(rows), "rows", seed, number)))
