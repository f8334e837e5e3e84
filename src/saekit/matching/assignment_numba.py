"""Inner loops of the assignment: plain Python over integers that numba compiles where it is installed.

Nothing here depends on numba: without it the same functions run interpreted, on lists, and return the same numbers.
The problem is square: as many rows as columns, edges ``starts[i] .. starts[i + 1]`` of row i lead to ``columns`` with
integer ``gains``, and a perfect matching exists. ``prices`` belong to columns; ``mate`` is the column of a row,
``owner`` the row of a column, -1 for none.
"""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import TypeAlias

Ints: TypeAlias = MutableSequence[int]
"""A list, or an array of int64."""

LOWEST = -(2**62)
"""Below every gain less a price, and far enough from the end of int64 that a difference does not wrap around."""

HIGHEST = 2**62
"""A column's distance before it is reached; above every path."""

PRICE_LIMIT = 2**60
"""Prices above this mean that rows bid each other up for too few columns: the auction gives up before they wrap."""


def release(starts: Ints, columns: Ints, gains: Ints, prices: Ints, mate: Ints, owner: Ints, slack: int) -> None:
    """Undo every match whose row would gain more than `slack` elsewhere."""
    for i in range(len(mate)):
        if mate[i] < 0:
            continue
        best = LOWEST
        own = LOWEST
        for e in range(starts[i], starts[i + 1]):
            value = gains[e] - prices[columns[e]]
            if value > best:
                best = value
            if columns[e] == mate[i]:
                own = value
        if own < best - slack:
            owner[mate[i]] = -1
            mate[i] = -1


def auction(
    starts: Ints, columns: Ints, gains: Ints, prices: Ints, mate: Ints, owner: Ints, stack: Ints, epsilon: int,
    span: int, budget: int,
) -> int:  # fmt: skip
    """Let unmatched rows bid until all are matched within `epsilon` of their best; returns the bids left, -1 if none.

    A row takes its best column and raises its price to where the second best would do as well, plus `epsilon`. A row
    with one edge raises it by `span`, the largest difference of gains.
    """
    top = 0
    for i in range(len(mate)):
        if mate[i] < 0:
            stack[top] = i
            top += 1
    while top > 0:
        if budget <= 0:
            return -1
        budget -= 1
        top -= 1
        i = stack[top]
        best = LOWEST
        second = LOWEST
        where = -1
        for e in range(starts[i], starts[i + 1]):
            value = gains[e] - prices[columns[e]]
            if value > best:
                second = best
                best = value
                where = columns[e]
            elif value > second:
                second = value
        prices[where] += epsilon + (span if second == LOWEST else best - second)
        if prices[where] > PRICE_LIMIT:
            return -1
        other = owner[where]
        owner[where] = i
        mate[i] = where
        if other >= 0:
            mate[other] = -1
            stack[top] = other
            top += 1
    return budget


def tighten(starts: Ints, columns: Ints, gains: Ints, prices: Ints, mate: Ints, worth: Ints) -> None:
    """Make every match tight by lowering the gains that beat it, which `release` has left small.

    Afterwards ``worth[i] + prices[j] >= gains`` on every edge, with equality on every match.
    """
    for i in range(len(mate)):
        best = LOWEST
        own = LOWEST
        for e in range(starts[i], starts[i + 1]):
            value = gains[e] - prices[columns[e]]
            if value > best:
                best = value
            if columns[e] == mate[i]:
                own = value
        if mate[i] < 0:
            worth[i] = best
            continue
        worth[i] = own
        for e in range(starts[i], starts[i + 1]):
            if gains[e] - prices[columns[e]] > own:
                gains[e] = own + prices[columns[e]]


def augment(
    starts: Ints, columns: Ints, gains: Ints, prices: Ints, mate: Ints, owner: Ints, worth: Ints, distance: Ints,
    origin: Ints, heap_key: Ints, heap_item: Ints, seen: Ints,
) -> None:  # fmt: skip
    """Match every unmatched row along a shortest augmenting path (Dijkstra on reduced costs), keeping prices feasible.

    `distance` must hold `HIGHEST` for every column; `origin`, `seen` are scratch per column, the heap per edge.
    """
    for source in range(len(mate)):
        if mate[source] >= 0:
            continue
        size = 0
        n_seen = 0
        row = source
        reached = 0
        end = -1
        while end < 0:
            for e in range(starts[row], starts[row + 1]):
                j = columns[e]
                length = reached + worth[row] + prices[j] - gains[e]
                if length < distance[j]:
                    if distance[j] == HIGHEST:
                        seen[n_seen] = j
                        n_seen += 1
                    distance[j] = length
                    origin[j] = row
                    at = size
                    size += 1
                    while at > 0 and heap_key[(at - 1) // 2] > length:
                        heap_key[at] = heap_key[(at - 1) // 2]
                        heap_item[at] = heap_item[(at - 1) // 2]
                        at = (at - 1) // 2
                    heap_key[at] = length
                    heap_item[at] = j
            while True:
                if size == 0:
                    end = -2
                    break
                reached = heap_key[0]
                j = heap_item[0]
                size -= 1
                key = heap_key[size]
                item = heap_item[size]
                at = 0
                while 2 * at + 1 < size:
                    child = 2 * at + 1
                    if child + 1 < size and heap_key[child + 1] < heap_key[child]:
                        child += 1
                    if heap_key[child] >= key:
                        break
                    heap_key[at] = heap_key[child]
                    heap_item[at] = heap_item[child]
                    at = child
                heap_key[at] = key
                heap_item[at] = item
                if reached == distance[j] and origin[j] >= 0:  # not an entry that a shorter way has overtaken
                    break
            if end == -2:
                break
            if owner[j] < 0:
                end = j
            else:
                row = owner[j]
                # A negative origin marks a column whose distance is final.
                origin[j] = -1 - origin[j]
        if end >= 0:
            worth[source] -= reached
            for k in range(n_seen):
                j = seen[k]
                if origin[j] < 0:
                    origin[j] = -1 - origin[j]
                    prices[j] += reached - distance[j]
                    worth[owner[j]] -= reached - distance[j]
            while True:
                row = origin[end]
                following = mate[row]
                mate[row] = end
                owner[end] = row
                if row == source:
                    break
                end = following
        for k in range(n_seen):
            distance[seen[k]] = HIGHEST
            origin[seen[k]] = 0
