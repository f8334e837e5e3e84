"""Rows made by a language model while they are read, without a cache on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..errors import ConfigError, listed
from ..files import digest_bytes
from ..models.hooks import Hook, Site
from ..models.language import LanguageModel
from ..models.pretrained import dtype_name
from ..randomness import random_order
from .capture import Data, Settings, _contexts, _kept_per_context, _measure, _request, _run
from .outliers import OUTLIER_TIMES, OutlierFilter
from .shuffle import read_ahead, read_batches
from .source import Batch, Block, check_finite, check_reading
from .tokens import Contexts

BLOCK_TOKENS = 32_768
"""Tokens in a shuffled block of a stream. Unit: tokens."""


def stream(
    model: str | os.PathLike[str] | LanguageModel,
    data: Data,
    *,
    layer: int | None = None,
    hook: str | Hook | None = None,
    site: Site = "resid",
    tokens: int | None = None,
    text: str = "text",
    split: str | None = None,
    context: int | None = None,
    pack: bool = False,
    skip_special: bool = True,
    outliers: float | None = OUTLIER_TIMES,
    padding: Literal["right", "left"] = "right",
    batch_tokens: int | None = None,
    block_tokens: int = BLOCK_TOKENS,
    model_dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    prefetch: bool = True,
) -> StreamRows:
    """Rows that are computed while they are read, so that nothing is stored; see `capture` for the settings they share.

    Parameters
    ----------
    model, data, layer, hook, site, text, split, context, pack, skip_special, outliers, padding, batch_tokens
        As for `capture`.
    tokens
        Size of a pass: contexts until this many tokens are reached. None: all.
    block_tokens
        Tokens that are computed and shuffled together. Contexts are shuffled over the whole data before that.
    model_dtype, device, device_map
        How the model is loaded; see `load_model`.
    prefetch
        Compute the next block in a second thread while this one is being used.

    Returns
    -------
    StreamRows

    Raises
    ------
    ModelError, OfflineError, DataError, ConfigError
        As for `capture`.
    """
    if isinstance(block_tokens, bool) or not isinstance(block_tokens, int) or block_tokens < 1:
        raise ConfigError(f"`block_tokens` must be a positive integer; got {block_tokens!r}.")
    request = _request(
        model, data, layer, hook, site, tokens, text, split, context, pack, skip_special, outliers, None,
        padding, batch_tokens, model_dtype, device, device_map,
    )  # fmt: skip
    if request.several:
        raise ConfigError(f"a stream has one hook; got {listed(found.name for found in request.hooks)}. Use `capture`.")
    texts, contexts, enough = _contexts(request)
    ((d_in, keep),) = _measure(request, contexts)
    contexts = contexts.pick(range(enough))
    n_kept = int(_kept_per_context(contexts, skip_special).sum())
    info = {
        "kind": "stream",
        **request.info(request.hooks[0], texts),
        "filters": {
            "special": {"skipped": skip_special, "n": int((contexts.position < 0).sum())},
            "outliers": None if keep is None else keep.info(),
        },
        "d_in": d_in,
        "dtype": dtype_name(request.settings.dtype),
        "n_tokens": n_kept,
        "n_rows": n_kept if keep is None else None,
        "block_tokens": block_tokens,
    }
    digest = digest_bytes(json.dumps(info, sort_keys=True).encode())
    return StreamRows(
        lm=request.lm,
        contexts=contexts,
        info={**info, "digest": digest},
        keep=keep,
        settings=request.settings,
        block_contexts=max(1, round(block_tokens * len(contexts) / max(len(contexts.ids), 1))),
        prefetch=prefetch,
    )


@dataclass(frozen=True, eq=False)
class StreamRows:
    """Rows computed by a language model as they are read; made by `stream`.

    A block is a fixed number of contexts that follow one another in an order computed from (seed, epoch); its rows are
    permuted. To begin at a place, only its block is computed.
    """

    lm: LanguageModel
    contexts: Contexts = field(repr=False)
    info: dict[str, Any] = field(repr=False)
    keep: OutlierFilter | None
    settings: Settings = field(repr=False)
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
        """Rows in batches; see `saekit.rows.source.Source.batches`."""
        start = check_reading(batch_rows, seed, start)
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
        (rows,) = _run(self.lm, self.contexts.pick(chosen), self.settings)
        self.seconds["lm"] += time.perf_counter() - begin
        check_finite(rows.x.float(), 0, f"block {number} of the stream")
        if self.keep is not None:
            rows = self.keep.apply(rows)
        if seed is None:
            return Block(rows)
        return Block(rows, torch.from_numpy(random_order(len(rows), "rows", seed, number)))
