"""Where latents fire: every firing of a pass over the texts, by latent and then by token.

A firing takes 8 bytes, token and code. Up to `HELD` of them are kept in memory; beyond that they lie in a temporary
file, so that memory stays below ``8 HELD + 24 BLOCK + 8 (n_latents + 1) (1 + firings / BLOCK)`` bytes, whatever the
number of texts: 0.64 GB, and 1 MB for every 4 million firings, with 131,072 latents. What is read off them does not
depend on how they came, nor on their order.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .. import kernels
from ..measure.token_statistics import DOCUMENT_BITS, TOKEN_BITS, TokenScores, summed
from ..memory import check_memory
from . import firings_numba

HELD = 2**26
"""Firings that are kept in memory (0.5 GB); with more they go into a temporary file."""

BLOCK = 2**22
"""Firings that are sorted at once."""

BINS_PER_OCTAVE = 4
OCTAVES = 32
"""Histograms cover magnitudes from 2^-16 to 2^16; what lies outside is counted in the first and last bin."""


@functools.cache
def _compiled() -> Callable[..., None] | None:
    try:
        import numba
    except ImportError:
        return None
    return numba.njit(cache=True, nogil=True)(firings_numba.scatter)


def by_key(key: np.ndarray, n: int, one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where each key from 0 to ``n - 1`` begins, and two columns sorted by key, stably: a counting sort."""
    starts = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=n))]).astype(np.int64)
    fast = None if kernels.mode() == "plain" else _compiled()
    if fast is None:
        order = np.argsort(key, kind="stable")
        return starts, one[order], other[order]
    ones, others = np.empty_like(one), np.empty_like(other)
    fast(key, one, other, starts[:-1].copy(), ones, others)
    return starts, ones, others


@dataclass(frozen=True, eq=False)
class Firings:
    """All firings, those of latent j at ``starts[j] .. starts[j + 1]``, in the order of their tokens."""

    starts: np.ndarray
    """int64 ``[n_latents + 1]``."""
    token: np.ndarray
    """int32 ``[firings]``: number of the token among all of the contexts."""
    value: np.ndarray
    """float32 ``[firings]``: the code, not 0."""
    n_tokens: int
    """Tokens of the contexts."""

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return len(self.starts) - 1

    @property
    def count(self) -> np.ndarray:
        """``int64 [n_latents]``: firings of each latent."""
        return np.diff(self.starts)

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and codes of the firings of a latent."""
        span = slice(self.starts[latent], self.starts[latent + 1])
        return self.token[span], self.value[span]

    def parts(self) -> Iterator[tuple[int, Firings]]:
        """Yield firings of as many latents in a row as have about `BLOCK` of them, with the number of the first."""
        first = 0
        while first < self.n_latents:
            last = int(np.searchsorted(self.starts, self.starts[first] + BLOCK, side="right")) - 1
            last = min(max(last, first + 1), self.n_latents)
            span = slice(self.starts[first], self.starts[last])
            starts = self.starts[first : last + 1] - self.starts[first]
            yield first, Firings(starts, np.asarray(self.token[span]), np.asarray(self.value[span]), self.n_tokens)
            first = last

    def latent_of(self) -> np.ndarray:
        """Return the latent of each firing."""
        return np.repeat(np.arange(self.n_latents), self.count)

    def where(self, kept: np.ndarray) -> Firings:
        """Return the firings at some tokens, ``bool [n_tokens]``."""
        mine = kept[self.token]
        starts = np.concatenate([[0], np.cumsum(mine)])[self.starts]
        return Firings(starts, self.token[mine], self.value[mine], self.n_tokens)

    def shifted(self, tokens: np.ndarray, seed: int) -> Firings:
        """Return density-matched shuffled codes: each latent's moved along `tokens` by a random step, around."""
        place = np.zeros(self.n_tokens, np.int64)
        place[tokens] = np.arange(len(tokens))
        step = np.random.Generator(np.random.Philox(key=seed)).integers(0, max(len(tokens), 1), self.n_latents)
        moved = tokens[(place[self.token] + np.repeat(step, self.count)) % max(len(tokens), 1)].astype(np.int32)
        return _by_latent(self.latent_of().astype(np.int32), moved, self.value, self.n_latents, self.n_tokens)

    def codes_at(self, latent: int, tokens: np.ndarray) -> np.ndarray:
        """Return the codes of a latent at some tokens; 0 where it does not fire."""
        token, value = self.of(latent)
        if not len(token):
            return np.zeros(len(tokens), np.float32)
        at = np.minimum(np.searchsorted(token, tokens), len(token) - 1)
        return np.where(token[at] == tokens, value[at], np.float32(0))

    def fires_within(self, latent: int, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return whether a latent fires in each of some spans of tokens."""
        token, _ = self.of(latent)
        return np.searchsorted(token, start) < np.searchsorted(token, stop)

    def token_scores(self, words: np.ndarray, counts: np.ndarray, document: np.ndarray | None = None) -> TokenScores:
        """Return activation by latent and word.

        Parameters
        ----------
        words
            int64 ``[n_tokens]``: token id, or whatever stands at each token, from 0; negative: nothing, left out.
        counts
            Rows by word.
        document
            Document of each token; not decreasing.
        """
        known = words[self.token] >= 0
        mine = self if known.all() else self.where(words >= 0)
        size = np.abs(mine.value)
        latent = mine.latent_of()
        pairs = _pairs(latent.astype(np.int32), words[mine.token].astype(np.int32), size, (self.n_latents, len(counts)))
        documents = None
        if document is not None and len(latent):
            documents = summed((latent << DOCUMENT_BITS) | document[mine.token], size.astype(np.float64)[:, None])
        squares = np.bincount(latent, size.astype(np.float64) ** 2, self.n_latents)
        return TokenScores.of_pairs(self.n_latents, pairs, counts, squares, documents)


class FiringsWriter:
    """Collects firings: ``add`` them, in any order, then ``finish``."""

    def __init__(self, n_latents: int, n_tokens: int) -> None:
        check_memory(
            "explain",
            {"the numbers of every latent": n_latents * 2000, "firings": 16 * BLOCK},
            "Take a part of the SAE: SAE.load(path, latents=…).",
        )
        self.n_latents, self.n_tokens = n_latents, n_tokens
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._blocks: list[Firings] = []
        self._n = self._n_waiting = 0

    def add(self, latent: np.ndarray, token: np.ndarray, value: np.ndarray) -> None:
        """Add firings ``[n]``: latent, number of the token among all, the code (not 0)."""
        self._waiting.append((latent.astype(np.int32), token.astype(np.int32), value.astype(np.float32)))
        self._n_waiting += len(latent)
        if self._n_waiting >= BLOCK:
            self._sort()

    def _sort(self) -> None:
        if not self._waiting:
            return
        latent, token, value = (np.concatenate(each) for each in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        block = _by_latent(latent, token, value, self.n_latents, self.n_tokens)
        self._n += len(token)
        self._blocks.append(block)
        if self._n > HELD:
            self._blocks = [self._stored(each) for each in self._blocks]

    def _stored(self, block: Firings) -> Firings:
        """Return a block whose firings lie in the temporary file."""
        if isinstance(block.token, np.memmap) or not len(block.token):
            return block
        token, value = self._in_file(len(block.token))
        token[:], value[:] = block.token, block.value
        return Firings(block.starts, token, value, self.n_tokens)

    def _in_file(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return room for the tokens and codes of `n` firings in files without a name, which go with the arrays."""
        found = []
        for kind in (np.int32, np.float32):
            with tempfile.TemporaryFile(prefix="saekit-firings-") as file:
                found.append(np.memmap(file, kind, "w+", shape=(n,)))
        return found[0], found[1]

    def finish(self) -> Firings:
        """Return all firings."""
        self._sort()
        if not self._blocks:
            nothing = np.zeros(self.n_latents + 1, np.int64)
            return Firings(nothing, np.zeros(0, np.int32), np.zeros(0, np.float32), self.n_tokens)
        if len(self._blocks) == 1:
            return self._blocks[0]
        starts = np.sum([block.starts for block in self._blocks], axis=0)
        n = self._n
        token, value = self._in_file(n) if n > HELD else (np.empty(n, np.int32), np.empty(n, np.float32))
        step = max(1, self.n_latents * BLOCK // max(n, 1))
        for first in range(0, self.n_latents, step):
            part = _merged(self._blocks, first, min(first + step, self.n_latents))
            span = slice(starts[first], starts[first] + len(part.token))
            token[span], value[span] = part.token, part.value
        self._blocks = []
        return Firings(starts, token, value, self.n_tokens)


def _merged(blocks: Sequence[Firings], first: int, last: int) -> Firings:
    """Return the firings of the latents ``first .. last - 1`` in all blocks."""
    spans = [slice(block.starts[first], block.starts[last]) for block in blocks]
    own = np.arange(last - first, dtype=np.int32)
    latent = np.concatenate([np.repeat(own, np.diff(block.starts[first : last + 1])) for block in blocks])
    token = np.concatenate([block.token[span] for block, span in zip(blocks, spans, strict=True)])
    value = np.concatenate([block.value[span] for block, span in zip(blocks, spans, strict=True)])
    return _by_latent(latent, token, value, last - first, blocks[0].n_tokens)


def _by_latent(latent: np.ndarray, token: np.ndarray, value: np.ndarray, n_latents: int, n_tokens: int) -> Firings:
    """Return firings sorted by latent, then by token."""
    starts, latent, value = by_key(token, n_tokens, latent, value)
    token = np.repeat(np.arange(n_tokens, dtype=np.int32), np.diff(starts))
    starts, token, value = by_key(latent, n_latents, token, value)
    return Firings(starts, token, value, n_tokens)


def _pairs(latent: np.ndarray, word: np.ndarray, size: np.ndarray, n: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of latent and word that occur as keys, and the sums of activation and firings of each."""
    starts, latent, size = by_key(word, n[1], latent, size)
    word = np.repeat(np.arange(n[1], dtype=np.int32), np.diff(starts))
    starts, word, size = by_key(latent, n[0], word, size)
    if not len(word):
        return np.zeros(0, np.int64), np.zeros((0, 2))
    keys = (np.repeat(np.arange(n[0]), np.diff(starts)) << TOKEN_BITS) | word
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    firings = np.diff(np.append(first, len(keys))).astype(np.float64)
    return keys[first], np.stack([np.add.reduceat(size.astype(np.float64), first), firings], 1)


def strongest(token: np.ndarray, value: np.ndarray, document: np.ndarray, n: int) -> np.ndarray:
    """Return which of a latent's firings are its strongest, at most one per document, strongest first."""
    if not len(token):
        return np.zeros(0, np.int64)
    size, where = np.abs(value), document[token]
    by_size = np.lexsort((token, -size))
    _, first = np.unique(where[by_size], return_index=True)
    return by_size[np.sort(first)[:n]]


def drawn(token: np.ndarray, latent: int, n: int, seed: int) -> np.ndarray:
    """Return which of some firings of a latent a uniform sample holds: those of the smallest hash, in that order.

    SplitMix64 (Steele, Lea & Flood 2014) of token and latent, so that a sample does not depend on what else fires.
    """
    with np.errstate(over="ignore"):
        x = token.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x ^= np.uint64(latent) * np.uint64(0xD1B54A32D192ED03) + np.uint64(seed)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    if len(x) > 8 * n:  # those above cannot be among the first
        candidates = np.flatnonzero(x <= np.partition(x, n - 1)[n - 1]) if n else np.zeros(0, np.int64)
        return candidates[np.argsort(x[candidates], kind="stable")][:n]
    return np.argsort(x, kind="stable")[:n]


def by_fifths(token: np.ndarray, value: np.ndarray, latent: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return firings of every fifth of a latent's nonzero codes, `n` in all, strongest first, and their quantiles."""
    size = np.abs(value)
    order = np.lexsort((token, size))
    quantile = np.searchsorted(size[order], size) / max(len(value), 1)  # equal codes have one quantile
    found = []
    for fifth in range(5):
        part = order[len(order) * fifth // 5 : len(order) * (fifth + 1) // 5]
        found.append(part[drawn(token[part], latent, n // 5 + (4 - fifth < n % 5), seed)])
    picked = np.concatenate(found).astype(np.int64)
    picked = picked[np.lexsort((token[picked], -size[picked]))]
    return picked, quantile[picked]


def histogram(value: np.ndarray) -> list[list[float]]:
    """Return ``[lower end, count]`` of the bins of magnitude that hold some of a latent's codes, smallest first."""
    with np.errstate(divide="ignore"):
        at = np.floor((np.log2(np.abs(value.astype(np.float64))) + OCTAVES / 2) * BINS_PER_OCTAVE)
    bins = BINS_PER_OCTAVE * OCTAVES
    counts = np.bincount(np.clip(at, 0, bins - 1).astype(np.int64), minlength=bins)
    return [[float(np.exp2(i / BINS_PER_OCTAVE - OCTAVES / 2)), float(counts[i])] for i in np.flatnonzero(counts)]
