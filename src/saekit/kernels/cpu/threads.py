"""Threads of the compiled kernels: one pool, on which a loop over rows or latents is spread."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")

CHUNK = 64
"""Rows or latents that are summed together first. Fixed, so that sums do not depend on the number of threads."""

PIECE = 4_000_000
"""Least work that is worth handing to another thread: about 0.2 ms of one core. Unit: multiply-adds."""

PIECES = 8
"""Pieces per thread, at most: a thread that is done early, or was held up, takes more or fewer of them."""

GRAIN = 2**15
"""Fewest numbers for which an operation of torch takes a second thread."""

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()
_own = threading.local()
"""``companion``: the thread on which this one's small work is done; ``count``: the threads of that work's caller."""


def _forget_pool() -> None:
    global _pool, _pool_size, _pool_lock, _own
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()  # threads do not survive a fork
    _own = threading.local()


os.register_at_fork(after_in_child=_forget_pool)


def thread_count() -> int:
    """Return the threads to work on: torch's own number, so that one setting rules both."""
    return getattr(_own, "count", None) or torch.get_num_threads()


def _alone() -> None:
    """On this thread, products of torch run on this thread alone."""
    torch.get_num_threads()  # torch sets a thread up on first use; after that the next line lasts
    torch.set_num_threads(1)


def _start(wanted: int) -> ThreadPoolExecutor:
    """Start threads of ours."""
    together = threading.Barrier(wanted)
    pool = ThreadPoolExecutor(wanted, thread_name_prefix="saekit-kernels", initializer=_alone)
    # A pool starts threads when there is work for them; these wait for each other, so all have to start.
    for started in [pool.submit(together.wait) for _ in range(wanted)]:
        started.result()
    torch.set_num_threads(torch.get_num_threads())  # what `_alone` said holds for our threads only
    return pool


def pool_of(wanted: int) -> ThreadPoolExecutor:
    """Return our threads, at least `wanted` of them."""
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < wanted:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _pool_size = _start(wanted), wanted
        return _pool


def with_one_torch_thread(work: Callable[[], T], numbers: float = math.inf) -> T:
    """Return what `work` returns, done where torch has one thread; our own loops have as many as here.

    After each operation torch's threads keep their cores busy for milliseconds, waiting for the next; where another
    process needs a core too, each operation then waits for a slice of the scheduler. To set torch's number here for a
    while would also set it for every thread that first meets torch meanwhile, and for good; so another thread does it.

    Parameters
    ----------
    work
        Whatever it raises is raised here.
    numbers
        What `work` goes over, where that is known: torch has one thread for few by itself.
    """
    if torch.get_num_threads() == 1 or numbers < GRAIN:
        return work()
    count = thread_count()
    pool_of(count)  # from here: on that thread `_start` would take its number for everybody's
    if not hasattr(_own, "companion"):
        _own.companion = _start(1)  # one for each thread that asks, so that nobody's work waits for another's

    def counted() -> T:
        _own.count = count
        return work()

    return _own.companion.submit(counted).result()


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
