"""Threads and scratch memory of the compiled kernels: one pool, buffers that are used again."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .huge_pages import on_large_pages

CHUNK = 64
"""Rows or latents that are summed together first. Fixed, so that sums do not depend on the number of threads."""

PIECE = 4_000_000
"""Least work that is worth handing to another thread: about 0.2 ms of one core. Unit: multiply-adds."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()
_scratch = threading.local()


def _forget_pool() -> None:
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget_pool)


def thread_count() -> int:
    """Threads to work on: torch's own number, so that one setting rules both."""
    return torch.get_num_threads()


def _alone() -> None:
    """On this thread, products of torch run on this thread alone."""
    torch.get_num_threads()  # torch sets a thread up on first use; after that the next line lasts
    torch.set_num_threads(1)


def _threads(wanted: int) -> ThreadPoolExecutor:
    """Our threads, at least `wanted` of them."""
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < wanted:
            if _pool is not None:
                _pool.shutdown(wait=False)
            together = threading.Barrier(wanted)
            _pool = ThreadPoolExecutor(wanted, thread_name_prefix="saekit-kernels", initializer=_alone)
            _pool_size = wanted
            for started in [_pool.submit(together.wait) for _ in range(wanted)]:
                started.result()
            torch.set_num_threads(torch.get_num_threads())  # what `_alone` said holds for our threads only
        return _pool


def _spread(loop: Callable[..., None], n: int, cost: float, *arguments: Any) -> None:
    """``loop(start, stop, *arguments)`` over all of ``0 .. n``, on threads; `cost` is that of one, in multiply-adds."""
    grain = max(1, round(PIECE / max(cost, 1)))
    threads = thread_count()
    if threads == 1 or n <= grain:
        if n:
            loop(0, n, *arguments)
        return
    pieces = min(-(-n // grain), 8 * threads)
    bounds = [n * piece // pieces for piece in range(pieces + 1)]
    ticket = itertools.count()  # taking the next number is atomic

    def work() -> None:
        while (piece := next(ticket)) < pieces:
            loop(bounds[piece], bounds[piece + 1], *arguments)

    pool = _threads(threads)
    others = [pool.submit(work) for _ in range(min(threads, pieces) - 1)]
    work()
    for other in others:
        other.result()


def buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that is used again by the next call on this thread (its content is undefined): new pages are slow."""
    buffers = _scratch.__dict__.setdefault("buffers", {})
    size = math.prod(shape)
    held = buffers.get((name, dtype))
    if held is None or len(held) < size:
        held = buffers[name, dtype] = on_large_pages(max(size, 1), dtype)
    return held[:size].view(shape)


def _shared(name: str, shape: tuple[int, ...]) -> Tensor:
    """bf16 in the memory of a float32 buffer that is not needed before this is no longer needed."""
    size = math.prod(shape)
    return buffer(name, (-(-size // 2),)).view(torch.bfloat16)[:size].view(shape)


def release() -> None:
    """Give back the memory that calls on this thread have kept for the next one."""
    _scratch.__dict__.clear()
