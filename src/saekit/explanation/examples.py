"""Where latents fire, in bounded memory: top examples, a uniform sample of firings, histograms; in one pass over codes.

What is kept of a set of firings does not depend on how they are cut into blocks, nor on their order.
"""

from __future__ import annotations

import numpy as np

PENDING = 2**20
"""Firings that wait before they are sorted in (16 MiB)."""

BINS_PER_OCTAVE = 4
OCTAVES = 32
"""Histograms cover magnitudes from 2^-16 to 2^16; what lies outside is counted in the first and last bin."""


class Examples:
    """Accumulates firings: ``add`` blocks of them, then read ``top``, ``sample``, ``histogram``.

    Parameters
    ----------
    n_latents
        Number of latents.
    n_top
        Strongest firings that are kept of each latent, by magnitude, at most one per document.
    n_sample
        Firings that are kept of each latent, drawn uniformly: those with the smallest hash of token and latent.
    seed
        Random seed of the sample.
    """

    def __init__(self, n_latents: int, n_top: int, n_sample: int, seed: int = 0) -> None:
        self.n_latents, self.n_top, self.n_sample = n_latents, n_top, n_sample
        self._seed = np.uint64(seed)
        self._histogram = np.zeros((n_latents, BINS_PER_OCTAVE * OCTAVES), np.int64)
        self._maximum = np.zeros(n_latents)
        self._total = np.zeros(n_latents)
        self._top = _Firings.none()
        self._sample = _Firings.none()
        self._waiting: list[_Firings] = []

    def add(self, latent: np.ndarray, token: np.ndarray, document: np.ndarray, value: np.ndarray) -> None:
        """Add firings ``[n]``: latent, number of the token among all, its document, the code (not 0)."""
        self._waiting.append(_Firings(latent, token, document, value.astype(np.float32)))
        if sum(len(each.latent) for each in self._waiting) >= PENDING:
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        new = _Firings.cat(self._waiting)
        self._waiting = []
        size = np.abs(new.value)
        np.add.at(self._histogram, (new.latent, _bin(size)), 1)
        np.maximum.at(self._maximum, new.latent, size)
        self._total += np.bincount(new.latent, size, self.n_latents)
        self._top = _best_of_documents(_Firings.cat([self._top, new])).first(self.n_top)
        both = _Firings.cat([self._sample, new])
        self._sample = both.pick(np.lexsort((both.token, self._hash(both), both.latent))).first(self.n_sample)

    @property
    def histogram(self) -> np.ndarray:
        """``int64 [n_latents, bins]``: firings by magnitude; see `bin_edges`."""
        self._settle()
        return self._histogram

    @property
    def count(self) -> np.ndarray:
        """``int64 [n_latents]``: firings."""
        return self.histogram.sum(1)

    @property
    def maximum(self) -> np.ndarray:
        """``[n_latents]``: the largest code, by magnitude."""
        self._settle()
        return self._maximum

    @property
    def total(self) -> np.ndarray:
        """``[n_latents]``: sum of the magnitudes of the codes."""
        self._settle()
        return self._total

    def _hash(self, firings: _Firings) -> np.ndarray:
        """SplitMix64 (Steele, Lea & Flood 2014) of token and latent: the same in every block and order."""
        with np.errstate(over="ignore"):
            x = firings.token.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            x ^= firings.latent.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + self._seed
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
            return x ^ (x >> np.uint64(31))

    def top(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and codes of the strongest firings of a latent, strongest first."""
        return self._kept("_top", latent)

    def sample(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and codes of a uniform sample of the firings of a latent, strongest first."""
        token, value = self._kept("_sample", latent)
        order = np.lexsort((token, -np.abs(value)))
        return token[order], value[order]

    def _kept(self, name: str, latent: int) -> tuple[np.ndarray, np.ndarray]:
        self._settle()
        kept: _Firings = getattr(self, name)
        start, stop = np.searchsorted(kept.latent, [latent, latent + 1])
        return kept.token[start:stop], kept.value[start:stop]


class _Firings:
    """Arrays of equal length, one entry per firing."""

    def __init__(self, latent: np.ndarray, token: np.ndarray, document: np.ndarray, value: np.ndarray) -> None:
        self.latent, self.token, self.document, self.value = latent, token, document, value

    @classmethod
    def none(cls) -> _Firings:
        whole = np.zeros(0, np.int64)
        return cls(whole, whole, whole, np.zeros(0, np.float32))

    @classmethod
    def cat(cls, parts: list[_Firings]) -> _Firings:
        names = ("latent", "token", "document", "value")
        return (
            cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names)) if parts else cls.none()
        )

    def pick(self, index: np.ndarray) -> _Firings:
        return _Firings(self.latent[index], self.token[index], self.document[index], self.value[index])

    def first(self, n: int) -> _Firings:
        """Return the first `n` of every latent; sorted by latent."""
        start = np.searchsorted(self.latent, self.latent)
        return self.pick(np.flatnonzero(np.arange(len(self.latent)) - start < n))


def _best_of_documents(firings: _Firings) -> _Firings:
    """Return the strongest firing of every latent in every document, by latent, then strongest first."""
    size = -np.abs(firings.value)
    by_document = firings.pick(np.lexsort((firings.token, size, firings.document, firings.latent)))
    new = np.ones(len(by_document.latent), bool)
    same = by_document.latent[1:] == by_document.latent[:-1]
    new[1:] = ~(same & (by_document.document[1:] == by_document.document[:-1]))
    best = by_document.pick(np.flatnonzero(new))
    return best.pick(np.lexsort((best.token, -np.abs(best.value), best.latent)))


def _bin(size: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        at = np.floor((np.log2(size) + OCTAVES / 2) * BINS_PER_OCTAVE)
    return np.clip(at, 0, BINS_PER_OCTAVE * OCTAVES - 1).astype(np.int64)


def bin_edges() -> np.ndarray:
    """Return the lower ends of the bins of a histogram."""
    return np.exp2(np.arange(BINS_PER_OCTAVE * OCTAVES) / BINS_PER_OCTAVE - OCTAVES / 2)
