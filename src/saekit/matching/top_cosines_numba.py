"""Compiled loops over blocks of cosines; `saekit.matching.top_cosines` has the same in torch for everything else.

Rows or columns are worked on in ranges ``start .. stop`` that nobody else writes to.
"""

from __future__ import annotations

import numpy as np
from numba import njit

CHUNK = 64
"""Entries that are first asked whether any of them is large enough: a test of all is vector code, and hardly ever
true once the heaps are full."""


@njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def pair_cosines(
    start: int, stop: int, a: np.ndarray, p: np.ndarray, i: np.ndarray, b: np.ndarray, q: np.ndarray, j: np.ndarray,
    out: np.ndarray,
) -> None:  # fmt: skip
    """``out[e] = a[i[e]] . b[j[e]] * p[i[e]] * q[j[e]]`` in float64."""
    d = a.shape[1]
    for e in range(start, stop):
        left = i[e]
        right = j[e]
        total = np.float64(0.0)
        for k in range(d):
            total += np.float64(a[left, k]) * np.float64(b[right, k])
        out[e] = total * p[left] * q[right]


@njit(nogil=True, cache=True)
def _sift(value: np.ndarray, item: np.ndarray, k: int, new_value: np.floating, new_item: int) -> None:
    """Put a new entry in the place of the least of a heap of `k`."""
    at = 0
    while 2 * at + 1 < k:
        child = 2 * at + 1
        if child + 1 < k and value[child + 1] < value[child]:
            child += 1
        if value[child] >= new_value:
            break
        value[at] = value[child]
        item[at] = item[child]
        at = child
    value[at] = new_value
    item[at] = new_item


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
def _any_above(line: np.ndarray, limits: np.ndarray, least: np.floating) -> int:
    """Whether ``line - limits`` exceeds `least` anywhere. Without branches or a start index it is vectorized."""
    above = 0
    for c in range(len(line)):
        above |= line[c] - limits[c] > least
    return above


@njit(nogil=True, cache=True)
def keep_by_row(
    start: int, stop: int, tile: np.ndarray, prices: np.ndarray, first: int, value: np.ndarray, item: np.ndarray
) -> None:
    """Enter ``tile[r, c] - prices[c]`` into the heap of row r (least first) where it is among the largest."""
    width = tile.shape[1]
    k = value.shape[1]
    for r in range(start, stop):
        line = tile[r]
        heap = value[r]
        for at in range(0, width, CHUNK):
            end = min(at + CHUNK, width)
            if _any_above(line[at:end], prices[at:end], heap[0]):
                for c in range(at, end):
                    one = line[c] - prices[c]
                    if one > heap[0]:
                        _sift(heap, item[r], k, one, first + c)


@njit(nogil=True, cache=True)
def keep_by_column(
    start: int, stop: int, tile: np.ndarray, first: int, limits: np.ndarray, value: np.ndarray, item: np.ndarray
) -> None:  # fmt: skip
    """Enter ``tile[r, c]`` into the heap of column c where it is among the largest; ``limits`` is the least of each."""
    k = value.shape[1]
    for r in range(tile.shape[0]):
        line = tile[r]
        for at in range(start, stop, CHUNK):
            end = min(at + CHUNK, stop)
            if _any_above(line[at:end], limits[at:end], np.float32(0.0)):
                for c in range(at, end):
                    if line[c] > limits[c]:
                        _sift(value[c], item[c], k, line[c], first + r)
                        limits[c] = value[c, 0]
