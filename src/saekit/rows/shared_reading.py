"""Rows that several ranks read: of stored ones each reads a part, of a language model's each makes a part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from ..ranks import LONGEST, Member, Ranks
from .capture_texts import Split
from .shuffle import ShufflePlan
from .source import Batch, Source
from .stream import StreamRows

_GATHER = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@contextmanager
def shared_reading(sources: Iterable[Source], ranks: Member) -> Iterator[None]:
    """Split the forward passes of streams over the ranks in the block; the rows are bitwise those of one process."""
    streams = [each for each in sources if isinstance(each, StreamRows)]
    if ranks.size == 1 or not streams:
        yield
        return
    split = _split_of(ranks)
    for each in streams:
        each.shared.split = split
    try:
        yield
    finally:
        for each in streams:
            each.shared.split = None


def own_batches(source: Source, batch_rows: int, ranks: Ranks, limit: int | None = None) -> Iterator[tuple[int, Batch]]:
    """Yield a rank's batches in stored order, each with its number among all.

    Rows that can be read from any place are dealt in runs of batches, so that a rank reads no others (but for the rest
    of its last block); others in turn, and every rank reads all of them.

    Parameters
    ----------
    source, batch_rows
        What is read, and rows of a batch.
    ranks
        Which rank of how many this is.
    limit
        Maximum number of rows on all ranks together; the last batch may hold more.
    """
    plan = getattr(source, "plan", None)
    if ranks.size == 1 or not isinstance(plan, ShufflePlan):
        for number, batch in enumerate(source.batches(batch_rows)):
            if ranks.has(number):
                yield number, batch
            if limit is not None and (number + 1) * batch_rows >= limit:
                return
        return
    n_batches = -(-min(plan.n_rows, plan.n_rows if limit is None else limit) // batch_rows)
    first, last = (n_batches * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    if first < last:
        yield from zip(range(first, last), source.batches(batch_rows, start=plan.place(first * batch_rows)))


def _split_of(ranks: Member) -> Split:
    """Return this rank's part of the forward passes of a language model; a reading thread may use it."""
    group = dist.new_group(backend="gloo", timeout=LONGEST)

    def everyones(x: Tensor, counts: Sequence[int]) -> list[Tensor]:
        own = x.new_zeros(max(counts), *x.shape[1:])
        own[: len(x)] = x
        whole = own.new_empty(len(counts) * len(own), *own.shape[1:])
        assert _GATHER is not None
        _GATHER(whole, own, group=group)
        return [part[:count] for part, count in zip(whole.split(len(own)), counts)]

    return Split(ranks.rank, ranks.size, everyones)
