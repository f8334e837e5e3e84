"""The fraction of variance unexplained, and rows that do not vary: one definition for training and for measuring."""

from __future__ import annotations

import numpy as np

FLAT = 2.0**-46
"""Variance up to which rows do not vary, as a fraction of their squares: the square of what float32 resolves."""

SAME_ROWS = "the rows do not vary: to the precision of float32 all are the same, and there is no variance to explain"
"""What is said where a number needs rows that vary."""


def fraction_unexplained(error: object, variance: object, square: object) -> np.ndarray:
    """Return the FVU, ``error / variance``; NaN where the rows do not vary.

    Parameters
    ----------
    error
        ``sum ||x - xh||^2``: a number, or one for each resample.
    variance
        ``sum ||x - mean(x)||^2`` over the same rows.
    square
        ``sum ||x||^2`` over the same rows.

    >>> fraction_unexplained([1.0, 1.0], [4.0, 0.0], 8.0).tolist()
    [0.25, nan]
    """
    error, variance, square = (np.asarray(each, dtype=float) for each in (error, variance, square))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > FLAT * square, error / variance, np.nan)
