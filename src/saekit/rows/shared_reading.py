"""Rows that a language model makes while several ranks read them: each runs a part of the forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from ..ranks import LONGEST, Member
from .capture_texts import Split
from .source import Source
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
