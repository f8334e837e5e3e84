"""Latents that fire on the same tokens, without counting all pairs: candidates from a sample, then counted exactly."""

from __future__ import annotations

import numpy as np

from .firings import Firings, drawn

SAMPLED = 64
"""Firings of a latent at which it is looked what else fires."""

CANDIDATES = 8
"""Latents that are counted exactly, for each."""


def coactive(firings: Firings, latents: np.ndarray, n: int, seed: int) -> list[list[dict[str, float]]]:
    """Return the latents that fire on the same tokens as each of some, ``{"latent", "jaccard"}``, most alike first."""
    import scipy.sparse

    if not len(latents) or not n:
        return [[] for _ in latents]
    samples = []
    for latent in latents.tolist():
        token, _ = firings.of(latent)
        samples.append(token[drawn(token, latent, SAMPLED, seed)])
    tokens, at = np.unique(np.concatenate(samples), return_inverse=True)
    marked = np.zeros(firings.n_tokens, bool)
    marked[tokens] = True
    there = firings.where(marked)
    rows = np.searchsorted(tokens, there.token)
    ones = np.ones(len(rows), np.float32)
    shape = (len(tokens), firings.n_latents)
    fired = scipy.sparse.csc_array((ones, rows, there.starts), shape=shape).tocsr()
    sizes = [len(each) for each in samples]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    sampled = scipy.sparse.csr_array((np.ones(len(at), np.float32), at, starts), shape=(len(latents), len(tokens)))
    both = (sampled @ fired).tocsr()
    count = firings.count.astype(np.float64)
    found = []
    for row, latent in enumerate(latents.tolist()):
        span = slice(both.indptr[row], both.indptr[row + 1])
        others, hits = both.indices[span], both.data[span] * (count[latent] / max(sizes[row], 1))
        kept = others != latent
        others, hits = others[kept], hits[kept]
        order = np.argsort(-hits / (count[latent] + count[others] - hits), kind="stable")[:CANDIDATES]
        found.append(_exact(firings, latent, others[order], n))
    return found


def _exact(firings: Firings, latent: int, others: np.ndarray, n: int) -> list[dict[str, float]]:
    mine, _ = firings.of(latent)
    pairs = []
    for other in others.tolist():
        theirs, _ = firings.of(other)
        small, large = sorted((mine, theirs), key=len)
        at = np.minimum(np.searchsorted(large, small), len(large) - 1)
        shared = int((large[at] == small).sum())
        pairs.append((shared / (len(mine) + len(theirs) - shared), other))
    best = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:n]
    return [{"latent": float(other), "jaccard": round(jaccard, 4)} for jaccard, other in best]
