"""A choice made again on resampled training rows: how uncertain it is, and what else it could have been."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..inputs.split import codes_of
from ..measure.paired_scores import auc_of, macro_f1_of

RESAMPLES = 200
"""Times that a choice is repeated."""


def resampled_rows(groups: np.ndarray | None, n_rows: int, seed: Sequence[int]) -> np.ndarray:
    """Return how often each row is drawn, with replacement: ``float32 [1 + RESAMPLES, n_rows]``; first once each.

    Parameters
    ----------
    groups
        ``[n_rows]``; rows of one group are drawn together. None: every row by itself.
    n_rows
        Number of rows.
    seed
        Random seed, in parts.
    """
    units = np.arange(n_rows) if groups is None else codes_of(groups.tolist())
    n = int(units.max()) + 1
    drawn = np.random.Generator(np.random.PCG64(list(seed))).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return np.concatenate([np.ones((1, n_rows)), drawn[:, units]]).astype(np.float32)


def scores_again(
    y: np.ndarray, inner: Sequence[float], labels: Sequence[np.ndarray], weights: np.ndarray, metric: str
) -> np.ndarray:
    """Return the scores of options in the inner folds under each row of weights, ``float64 [n_weights, n_options]``.

    The score of an option is its mean over the inner folds, moved by what the weights change of the score of all that
    the inner folds said.

    Parameters
    ----------
    y
        ``[n]`` class codes.
    inner
        Mean score of each option over the inner folds.
    labels
        What the inner folds said of each row, ``[n]`` per option: class codes, or ranks for AUC.
    weights
        ``float32 [n_weights, n]``, the first all 1; see `resampled_rows`.
    metric
        ``macro_f1`` or ``auc``.
    """
    score = {"auc": auc_of, "macro_f1": macro_f1_of}[metric]
    again = np.stack([score(y, each, weights) for each in labels], axis=1)
    return np.asarray(inner) + again - again[:1]


def likeliest(scores: np.ndarray, n: int) -> list[int]:
    """Return up to `n` options: the best on the rows as they are, then those that most often are, the first of equals.

    >>> likeliest(np.eye(6)[[2, 0, 1, 1, 2, 5]], 3)
    [2, 1, 0]
    """
    chosen = scores.argmax(1)
    options, counts = np.unique(chosen, return_counts=True)
    others = sorted(zip(-counts, options))
    return [int(chosen[0]), *(int(option) for _, option in others if option != chosen[0])][:n]
