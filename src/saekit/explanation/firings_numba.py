"""The inner loop over firings that numba compiles where it is installed; `firings` has the same in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def scatter(key: Array, one: Array, other: Array, at: Array, ones: Array, others: Array) -> None:
    """Put entries behind those of the same key, in their order; ``at[key]`` is the next free place, and moves on."""
    for i in range(len(key)):
        j = key[i]
        k = at[j]
        ones[k] = one[i]
        others[k] = other[i]
        at[j] = k + 1
