"""Maximum-weight assignment on a sparse graph, with dual prices.

Bertsekas' auction with epsilon-scaling brings every row within 2^-33 of its best; rows that it leaves unmatched within
its budget of bids are matched along shortest augmenting paths. All arithmetic is in integers (weights times 2^40), so
that the same graph gives the same matching on every machine, compiled or not.

References
----------
Bertsekas (1988), *The auction algorithm: a distributed relaxation method for the assignment problem*; Jonker &
Volgenant (1987), *A shortest augmenting path algorithm for dense and sparse linear assignment problems*; Ramshaw &
Tarjan (2012), *On minimum-cost assignments in unbalanced bipartite graphs* (the doubling).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernels import backend
from . import assignment_numba

SCALE = 2.0**40
FINEST = 2.0**-33
"""Every row ends within this much of its best: the gap of the matching is at most this times the rows."""
COARSEST = 2.0**-5
STEP = 6
BIDS_PER_ROW = 400
SWEEPS = 8


@dataclass(frozen=True)
class Graph:
    """Weighted edges between `n` rows and ``m >= n`` columns, sorted by row, each pair once."""

    n: int
    m: int
    keys: np.ndarray
    """``int64 [edges]``: row * m + column, ascending."""
    weights: np.ndarray
    """``float64 [edges]``."""

    @property
    def rows(self) -> np.ndarray:
        """Row of each edge."""
        return self.keys // self.m

    @property
    def columns(self) -> np.ndarray:
        """Column of each edge."""
        return self.keys % self.m

    def new(self, keys: np.ndarray) -> np.ndarray:
        """Which of the (unique, sorted) `keys` are not edges yet, as keys."""
        at = np.searchsorted(self.keys, keys)
        known = np.zeros(len(keys), dtype=bool)
        inside = at < len(self.keys)
        known[inside] = self.keys[at[inside]] == keys[inside]
        return keys[~known]

    def add(self, keys: np.ndarray, weights: np.ndarray) -> Graph:
        """Return the graph with more edges, none of which it has yet."""
        keys, weights = np.concatenate([self.keys, keys]), np.concatenate([self.weights, weights])
        order = np.argsort(keys, kind="stable")
        return Graph(self.n, self.m, keys[order], weights[order])


@dataclass(frozen=True)
class Solution:
    """An assignment on a graph and prices that prove how good it is."""

    mate: np.ndarray
    """``int64 [n]`` column of each row."""
    weight: np.ndarray
    """``float64 [n]`` weight of each match."""
    u: np.ndarray
    """``float64 [n]``; ``u[i] + v[j] >= weight`` on every edge."""
    v: np.ndarray
    """``float64 [m]``, at least 0 where columns outnumber rows."""


def solve(graph: Graph, start: Solution | None = None, coarsest: float = COARSEST) -> Solution:
    """Match every row of `graph`, to the largest sum of weights.

    Parameters
    ----------
    graph
        It must hold a matching of all its rows.
    start
        A solution of an earlier graph, to continue from its prices.
    coarsest
        Where the scaling of epsilon begins.
    """
    rows, columns = graph.rows, graph.columns
    gains = np.rint(graph.weights * SCALE).astype(np.int64)
    prices = np.zeros(graph.m, dtype=np.int64) if start is None else np.rint(start.v * SCALE).astype(np.int64)
    is_square = graph.n == graph.m
    if is_square:
        heads, tails, values = rows, columns, gains
    else:
        # The graph and its mirror image, columns joined to their own images by edges of weight 0 that mean "unmatched".
        own = np.arange(graph.m)
        heads = np.concatenate([rows, graph.n + own, graph.n + columns])
        tails = np.concatenate([columns, own, graph.m + rows])
        values = np.concatenate([gains, np.zeros(graph.m, dtype=np.int64), gains])
        order = np.argsort(heads, kind="stable")
        heads, tails, values = heads[order], tails[order], values[order]
        mirrored = np.zeros(graph.n, dtype=np.int64) if start is None else np.rint(start.u * SCALE).astype(np.int64)
        prices = np.concatenate([prices, mirrored])
    size = graph.m if is_square else graph.n + graph.m
    starts = np.searchsorted(heads, np.arange(size + 1)).astype(np.int64)
    mate = _run(starts, tails.astype(np.int64), values, prices, coarsest)
    worth = np.maximum.reduceat(values - prices[tails], starts[:-1]) / SCALE
    cost = prices / SCALE
    v = cost if is_square else np.maximum((cost[: graph.m] + worth[graph.n :]) / 2, 0.0)
    at = np.searchsorted(graph.keys, np.arange(graph.n) * graph.m + mate[: graph.n])
    return centred(graph, Solution(mate[: graph.n], graph.weights[at], row_prices(graph, v), v))


def centred(graph: Graph, solution: Solution, sweeps: int = SWEEPS) -> Solution:
    """Return the same matching with prices moved to the middle of where its edges let them be.

    The auction leaves a price at one end of its range. In the middle, fewer pairs outside the graph exceed their
    prices. With ``v[j]`` moved by at most half of each slack, in all columns at once, every edge stays below its
    prices.
    """
    rows, columns = graph.rows, graph.columns
    by_row = np.searchsorted(graph.keys, np.arange(graph.n) * graph.m)
    order = np.argsort(columns, kind="stable")
    present, by_column = np.unique(columns[order], return_index=True)
    others = solution.mate[rows] != columns
    mate, u, v = solution.mate, solution.u, solution.v.copy()
    lost = u + v[mate] - solution.weight  # what rounding left between a match and its prices, kept as it is
    for _ in range(sweeps):
        wanted = np.where(others, graph.weights - v[columns], -np.inf)
        high = solution.weight + lost - np.maximum.reduceat(wanted, by_row)
        offered = np.where(others, graph.weights - u[rows], -np.inf)[order]
        low = np.full(graph.m, -np.inf if graph.n == graph.m else 0.0)
        low[present] = np.maximum(low[present], np.maximum.reduceat(offered, by_column))
        now = v[mate]
        v[mate] = (np.minimum(high, now + 1) + np.maximum(low[mate], now - 1)) / 2
        u = solution.weight + lost - v[mate]
    return Solution(mate, solution.weight, row_prices(graph, v), v)


def row_prices(graph: Graph, v: np.ndarray) -> np.ndarray:
    """Return the least ``u`` with ``u[i] + v[j] >= weight`` on every edge."""
    starts = np.searchsorted(graph.keys, np.arange(graph.n) * graph.m)
    return np.maximum.reduceat(graph.weights - v[graph.columns], starts)


def _run(starts: np.ndarray, columns: np.ndarray, gains: np.ndarray, prices: np.ndarray, coarsest: float) -> np.ndarray:
    """Return matches of a square graph; `prices` are changed in place."""
    size = len(starts) - 1
    scratch = {name: np.full(size, -1, dtype=np.int64) for name in ("mate", "owner", "stack")}
    relaxed = gains.copy()
    worth = np.zeros(size, dtype=np.int64)
    distance = np.full(size, assignment_numba.HIGHEST, dtype=np.int64)
    origin, seen = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    heap_key, heap_item = np.zeros(len(gains) + 1, dtype=np.int64), np.zeros(len(gains) + 1, dtype=np.int64)
    arrays = [starts, columns, gains, prices, *scratch.values(), relaxed, worth, distance, origin, heap_key, heap_item]
    arrays.append(seen)
    compiled = _compiled()
    work: list[Any] = arrays if compiled else [array.tolist() for array in arrays]
    call: Callable[[str], Any] = compiled.__getitem__ if compiled else functools.partial(getattr, assignment_numba)
    starts, columns, gains, owned, mate, owner, stack, relaxed, worth, distance, origin, heap_key, heap_item, seen = (
        work
    )
    span = int(arrays[2].max() - arrays[2].min()) + 1
    finest, budget = int(FINEST * SCALE), BIDS_PER_ROW * size
    epsilon = max(int(coarsest * SCALE), finest)
    while True:
        call("release")(starts, columns, gains, owned, mate, owner, epsilon)
        budget = call("auction")(starts, columns, gains, owned, mate, owner, stack, epsilon, span, budget)
        if budget < 0 or epsilon == finest:
            break
        epsilon = max(epsilon // STEP, finest)
    if budget < 0:
        call("release")(starts, columns, relaxed, owned, mate, owner, finest)
        call("tighten")(starts, columns, relaxed, owned, mate, worth)
        call("augment")(
            starts, columns, relaxed, owned, mate, owner, worth, distance, origin, heap_key, heap_item, seen
        )
    prices[:] = owned
    return np.asarray(mate, dtype=np.int64)


def is_compiled() -> bool:
    """Whether the loops are compiled: numba can compile and the mode of the kernels is not ``plain``."""
    return backend.mode() != "plain" and backend.unavailable() is None


def _compiled() -> dict[str, Any]:
    return _compile() if is_compiled() else {}


@functools.cache
def _compile() -> dict[str, Any]:
    import numba

    names = ("release", "auction", "tighten", "augment")
    return {name: numba.njit(cache=True, nogil=True)(getattr(assignment_numba, name)) for name in names}
