"""Threads of the compiled kernels: one pool, on which a loop over rows or latents is spread."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

CHUNK = 64
"""Rows or latents that are summed together first. Fixed, so that sums do not depend on the number of threads."""

PIECE = 4_000_000
"""Least work that is worth handing to another thread: about 0.2 ms of one core. Unit: multiply-adds."""

PIECES = 8
"""Pieces per thread, at most: a thread that is done early, or was held up, takes more or fewer of them."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _forget_pool() -> None:
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()  # threads do not survive a fork


os.register_at_fork(after_in_child=_forget_pool)


def thread_count() -> int:
    """Return the threads to work on: torch's own number, so that one setting rules both."""
    return torch.get_num_threads()


def _alone() -> None:
    """On this thread, products of torch run on this thread alone."""
    torch.get_num_threads()  # torch sets a thread up on first use; after that the next line lasts
    torch.set_num_threads(1)


def pool_of(wanted: int) -> ThreadPoolExecutor:
    """Return our threads, at least `wanted` of them."""
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < wanted:
            if _pool is not None:
                _pool.shutdown(wait=False)
            together = threading.Barrier(wanted)
            _pool = ThreadPoolExecutor(wanted, thread_name_prefix="saekit-kernels", initializer=_alone)
            _pool_size = wanted
            # A pool starts threads when there is work for them; these wait for each other, so all have to start.
            for started in [_pool.submit(together.wait) for _ in range(wanted)]:
                started.result()
            torch.set_num_threads(torch.get_num_threads())  # what `_alone` said holds for our threads only
        return _pool


def run_everywhere(work: Callable[[], None], threads: int) -> None:
    """Call `work` on so many threads at a time, this one among them."""
    if threads <= 1:
        work()
        return
    pool = pool_of(threads)
    others = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


def spread(loop: Callable[..., None], n: int, cost: float, *arguments: Any) -> None:
    """Call ``loop(start, stop, *arguments)`` over all of ``0 .. n``, on threads.

    Parameters
    ----------
    loop
        Must write to nothing that another range writes to.
    n
        Items.
    cost
        Cost of one item, in multiply-adds.
    arguments
        What else the loop takes.
    """
    grain = max(1, round(PIECE / max(cost, 1)))
    threads = thread_count()
    if threads == 1 or n <= grain:
        if n:
            loop(0, n, *arguments)
        return
    pieces = min(-(-n // grain), PIECES * threads)
    bounds = [n * piece // pieces for piece in range(pieces + 1)]
    ticket = itertools.count()  # taking the next number is atomic

    def work() -> None:
        while (piece := next(ticket)) < pieces:
            loop(bounds[piece], bounds[piece + 1], *arguments)

    run_everywhere(work, min(threads, pieces))
