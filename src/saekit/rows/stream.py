"""Rows made by a language model while they are read, without a cache on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import ConfigError, listed
from ..files import digest_bytes
from ..inputs.records import repeatable
from ..models.hooks import Hook, find_hooks
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.pretrained import dtype_name
from ..places import without_locations
from ..randomness import random_order
from ..sae.finite import check_finite
from ..settings import check_whole, suggest_keywords
from .capture_texts import TextRunner, open_texts
from .outliers import OutlierFilter
from .settings import StreamSettings
from .shuffle import read_ahead, read_batches
from .source import Batch, Block, check_reading, rows_in_words
from .tokens import Contexts


@suggest_keywords
def stream(
    model: str | os.PathLike[str] | LanguageModel,
    data: str | os.PathLike[str] | Iterable[object],
    *,
    layer: int | None = None,
    hook: str | Hook | None = None,
    tokens: int | None = None,
    text: str = "text",
    settings: StreamSettings = StreamSettings(),
) -> StreamRows:
    """Return rows that are computed while they are read, so that nothing is stored.

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

    Raises
    ------
    ModelError, OfflineError, DataError, ConfigError
        As for `capture`.
    """
    check_whole("stream", tokens=tokens)
    lm = load_language_model(model, **settings.placement)
    hooks = find_hooks(lm.model, layer, hook, site=settings.site)
    if len(hooks) > 1 or isinstance(layer if hook is None else hook, list | tuple):
        raise ConfigError(f"a stream has one hook; got {listed(found.name for found in hooks)}. Use `capture`.")
    data = repeatable(data)
    runner = TextRunner(lm, hooks, lm.row_dtype, settings)
    reader = open_texts(runner, data, text=text, tokens=tokens)
    (sample,) = reader.sample()
    for x in sample.matrices:
        check_finite(x.float(), 0, "the stream")
    keep = OutlierFilter.measured(settings.outliers, sample.x)
    contexts = reader.contexts.pick(range(reader.enough))
    n_kept = int(runner.n_rows(contexts).sum())
    special = {"skipped": settings.skip_special, "n": int((contexts.position < 0).sum())}
    info = {
        "kind": "stream",
        **lm.info,
        **hooks[0].info,
        **reader.info(),
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
        runner=runner,
        contexts=contexts,
        info={**info, "digest": digest},
        keep=keep,
        block_contexts=max(1, round(settings.block_tokens * len(contexts) / max(len(contexts.ids), 1))),
        prefetch=settings.prefetch,
    )


@dataclass(frozen=True, eq=False)
class StreamRows:
    """Rows computed by a language model as they are read; made by `stream`.

    A block is a fixed number of contexts that follow one another in an order computed from (seed, epoch); its rows are
    permuted. To begin at a place, only its block is computed.
    """

    __repr__ = rows_in_words

    runner: TextRunner = field(repr=False)
    contexts: Contexts = field(repr=False)
    info: dict[str, Any] = field(repr=False)
    keep: OutlierFilter | None
    block_contexts: int
    """Contexts in a block."""
    prefetch: bool = True
    """Whether a second thread computes the next block."""
    seconds: dict[str, float] = field(default_factory=lambda: {"lm": 0.0, "wait": 0.0})
    """Time so far: ``lm`` in the language model, ``wait`` in which the reader waited for it. Unit: s."""

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
        if not self.prefetch:
            return read_batches(lambda number: self._waited(lambda: self._block(seed, number)), batch_rows, start)
        return read_ahead(lambda number: self._block(seed, number), batch_rows, start, waited=self._waited)

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
        chosen = (
            range(first, last) if seed is None else random_order(len(self.contexts), "chunks", seed, epoch)[first:last]
        )
        begin = time.perf_counter()
        (rows,) = self.runner.rows(self.contexts.pick(chosen))
        self.seconds["lm"] += time.perf_counter() - begin
        for x in rows.matrices:
            check_finite(x.float(), 0, f"block {number} of the stream")
        if self.keep is not None:
            rows = self.keep.apply(rows)
        if seed is None:
            return Block(rows)
        return Block(rows, torch.from_numpy(random_order(len(rows), "rows", seed, number)))
