"""Stateless randomness: permutations and keys computed from a seed and a purpose, so that nothing is remembered."""

from __future__ import annotations

import hashlib

import numpy as np


def random_order(n: int, *key: int | str) -> np.ndarray:
    """Return a permutation of ``range(n)`` that depends on `key` alone: the stable argsort of Philox words.

    Parameters
    ----------
    n
        Length, at least 0.
    key
        Integers and words, hashed together, so that neighbouring seeds are unrelated.

    Returns
    -------
    numpy.ndarray
        int64 ``[n]``; the same on every machine and in every numpy release: Philox fixes its raw words.
    """
    return np.argsort(np.random.Philox(key=hashed_key(*key)).random_raw(n), kind="stable")


def hashed_key(*key: int | str, n_bytes: int = 16) -> int:
    """Return an integer of `n_bytes` bytes from the SHA-256 of `key`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in ("saekit.rows", *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:n_bytes], "little")
