"""Scores of windows: how alike those of a latent are, and whether they can be told from windows without it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..measure.token_statistics import TOKEN_BITS, summed
from .clusters import separation
from .firing_windows import EXAMPLES, TokenVectors, Windows, learning_windows, windows_of
from .firings import Firings
from .layout import LABELLING, SCORING, Layout

LEAST = 4
"""Fewer windows of a kind than this, and a latent has no score of it."""

AT_ONCE = 256
"""Latents whose windows are scored together."""

CONTEXT_TOKENS = 10
"""Tokens of a label that is made of the context."""

PRIOR = 2.0
"""Weight of the frequencies of all tokens in the log-odds of those around firings, in windows."""


@dataclass
class WindowScores:
    """Scores of some latents; arrays have an entry per latent, NaN where there are too few windows."""

    latents: np.ndarray
    scores: dict[str, np.ndarray]
    context_labelling: np.ndarray
    """AUC of the label made of the context, on windows of the labelling half that it was not made of."""
    context_detection: np.ndarray
    """The same on those of the scoring half."""
    context_tokens: list[list[int]] = field(default_factory=list)
    """Tokens of that label."""
    clusters: list[list[tuple[float, list[int], list[int]]]] = field(default_factory=list)
    """Fraction, tokens fired on and tokens around, of each group of contexts."""
    is_polysemantic: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """1 or 0; NaN where there are too few windows."""


def window_scores(
    firings: Firings, latents: np.ndarray, layout: Layout, vectors: TokenVectors, length: int, seed: int
) -> WindowScores:
    """Score the windows of some latents."""
    found = [
        _scores(firings, latents[i : i + AT_ONCE], layout, vectors, length, seed)
        for i in range(0, max(len(latents), 1), AT_ONCE)
    ]
    return functools.reduce(_joined, found)


def _joined(one: WindowScores, other: WindowScores) -> WindowScores:
    """Return the scores of further latents behind those of some."""
    return WindowScores(
        np.concatenate([one.latents, other.latents]),
        {name: np.concatenate([value, other.scores[name]]) for name, value in one.scores.items()},
        np.concatenate([one.context_labelling, other.context_labelling]),
        np.concatenate([one.context_detection, other.context_detection]),
        one.context_tokens + other.context_tokens,
        one.clusters + other.clusters,
        np.concatenate([one.is_polysemantic, other.is_polysemantic]),
    )


def _scores(
    firings: Firings, latents: np.ndarray, layout: Layout, vectors: TokenVectors, length: int, seed: int
) -> WindowScores:
    windows = windows_of(firings, latents, layout, length, seed)
    n = len(latents)
    whole, masked = (_Table.of(windows, vectors.of_windows(windows, masked=each), n) for each in (False, True))
    context = _context(windows, learning_windows(firings, latents, layout, length, seed), layout, n)
    separated = separation(*_for_clusters(windows, masked, vectors, n), seed)
    clusters = _described(windows, separated.group, layout, n)
    scores = {
        "embedding": whole.detection(),
        "embedding_masked": masked.detection(),
        "cohesion": masked.cohesion(),
        "intruder": whole.intruder(seed),
        "context": context.detection,
        "separation": separated.excess,
    }
    return WindowScores(
        latents, scores, context.labelling, context.label_detection, context.tokens, clusters, separated.is_apart
    )


@dataclass(frozen=True, eq=False)
class _Table:
    """Vectors by latent: ``[half, is positive, n, EXAMPLES, d]``, with a mask of those that exist, and the codes."""

    vector: Tensor
    there: Tensor
    value: Tensor

    @classmethod
    def of(cls, windows: Windows, vectors: Tensor, n: int) -> _Table:
        shape = (2, 2, n, EXAMPLES)
        at = tuple(
            torch.from_numpy(each.astype(np.int64))
            for each in (windows.half, windows.is_positive, windows.row, windows.number)
        )
        vector = torch.zeros(*shape, vectors.shape[1])
        there, value = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        vector[at], there[at], value[at] = vectors, True, torch.from_numpy(np.abs(windows.value))
        return cls(vector, there, value)

    def means(self, half: int, positive: int) -> Tensor:
        """Return the mean vector of the windows of a half."""
        count = self.there[half, positive].sum(1).clamp_min(1)
        return self.vector[half, positive].sum(1) / count[:, None]

    def detection(self) -> np.ndarray:
        """Return the AUC of being nearer to positives than to negatives of the labelling half, in the scoring half."""
        direction = self.means(LABELLING, 1) - self.means(LABELLING, 0)
        score = torch.einsum("knd,pknd->pkn", direction[:, None].expand(-1, EXAMPLES, -1), self.vector[SCORING])
        enough = self.there[LABELLING].sum(2).amin(0) >= LEAST
        return np.where(enough.numpy(), _auc(score, self.there[SCORING]), np.nan)

    def cohesion(self) -> np.ndarray:
        """Return the mean cosine of pairs of positive windows, weighted by their codes: that of `Cohesion`."""
        vector, there, value = (torch.cat(list(each[:, 1]), 1) for each in (self.vector, self.there, self.value))
        weight = (value * there).double()
        total, squares = weight.sum(1), weight.square().sum(1)
        both = (weight[..., None] * vector).sum(1).square().sum(1)
        pairs = total.square() - squares
        enough = there.sum(1) >= LEAST
        return torch.where(enough & (pairs > 0), (both - squares) / pairs.clamp_min(1e-30), torch.nan).numpy()

    def intruder(self, seed: int) -> np.ndarray:
        """Return how often one negative among four positives is the least alike to the others: 0.2 is chance."""
        positive, negative = self.vector[SCORING, 1], self.vector[SCORING, 0]
        n_positive = self.there[SCORING, 1].sum(1)
        hits = torch.zeros(len(positive), EXAMPLES)
        for trial in range(EXAMPLES):
            index = (trial * 4 + torch.arange(4))[None] % n_positive.clamp_min(1)[:, None]
            four = positive.gather(1, index[..., None].expand(-1, -1, positive.shape[2]))
            five = torch.cat([four, negative[:, trial, None]], 1)
            cosine = five @ five.transpose(1, 2)
            mean = (cosine.sum(2) - cosine.diagonal(dim1=1, dim2=2)).double()
            least = mean[:, :4].amin(1)
            ties = 1 + (mean[:, :4] <= mean[:, 4:] + 1e-9).sum(1)
            hits[:, trial] = torch.where(mean[:, 4] <= least + 1e-9, 1.0 / ties, 0.0)
        there = self.there[SCORING, 0]
        enough = (n_positive >= LEAST) & (there.sum(1) >= LEAST)
        mean = (hits * there).sum(1) / there.sum(1).clamp_min(1)
        return np.where(enough.numpy(), mean.double().numpy(), np.nan)


def _auc(score: Tensor, there: Tensor) -> np.ndarray:
    """Return the AUC of positives, ``score[1]``, against negatives, ``score[0]``; NaN below `LEAST` of either."""
    gap = score[1][:, :, None] - score[0][:, None, :]
    pairs = there[1][:, :, None] & there[0][:, None, :]
    wins = ((gap > 1e-7).double() + (gap.abs() <= 1e-7).double() / 2) * pairs
    count = pairs.sum((1, 2))
    enough = there.sum(2).amin(0) >= LEAST
    return torch.where(enough, wins.sum((1, 2)) / count.clamp_min(1), torch.nan).numpy()


# ------------------------------------------------------------------------------------------- tokens around the firings


@dataclass(frozen=True, eq=False)
class _Context:
    labelling: np.ndarray
    label_detection: np.ndarray
    detection: np.ndarray
    tokens: list[list[int]]


def _context(windows: Windows, learning: Windows, layout: Layout, n: int) -> _Context:
    """Learn the tokens around firings: naive Bayes of the tokens of windows, and a label of its best tokens.

    The label is chosen by how well one made of every second document of the labelling half tells the others.
    """
    counts = layout.counts("token", LABELLING)
    unigram = (counts + 0.5) / (counts + 0.5).sum()
    keys, odds, mass = _log_odds(learning, layout, unigram)
    is_other = layout.is_other[learning.start]
    half_keys, half_odds, half_mass = _log_odds(learning.pick(~is_other), layout, unigram)
    label, tokens = _best_tokens(keys, odds, mass, n)
    half_label, _ = _best_tokens(half_keys, half_odds, half_mass, n)
    others = layout.is_other[windows.start]
    return _Context(
        _told(windows, (windows.half == LABELLING) & others, layout, half_keys[half_label], half_odds[half_label], n),
        _told(windows, windows.half == SCORING, layout, keys[label], odds[label], n),
        _told(windows, windows.half == SCORING, layout, keys, odds, n),
        tokens,
    )


def _keys(windows: Windows, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return ``latent << TOKEN_BITS | token`` of every different token of each window, and the window."""
    tokens, starts = windows.tokens()
    window = np.repeat(np.arange(len(windows.row)), np.diff(starts))
    both = np.unique((window << TOKEN_BITS) | layout.ids[tokens])
    window = both >> TOKEN_BITS
    return (windows.row[window] << TOKEN_BITS) | (both & (2**TOKEN_BITS - 1)), window


def _log_odds(windows: Windows, layout: Layout, unigram: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keys, log-odds of a token in windows of a latent against all windows, and its worth for a label.

    How often a token is in some window follows from its frequency and the mean length: ``1 - (1 - p)^length``.
    """
    if not len(windows.row):
        return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
    key, _ = _keys(windows, layout)
    keys, sums = summed(key, np.ones((len(key), 1)))
    row, token = keys >> TOKEN_BITS, keys & (2**TOKEN_BITS - 1)
    n = np.bincount(windows.row)
    length = np.bincount(windows.row, windows.length) / np.maximum(n, 1)
    usual = -np.expm1(length[row] * np.log1p(-unigram[token]))
    rate = (sums[:, 0] + PRIOR * usual) / (n[row] + PRIOR)
    odds = np.log(rate) - np.log(usual)
    return keys, odds, rate * odds * np.abs(odds)


def _best_tokens(keys: np.ndarray, odds: np.ndarray, mass: np.ndarray, n: int) -> tuple[np.ndarray, list[list[int]]]:
    """Return which keys are a label's, in their order, and the tokens of each latent, best first."""
    row = keys >> TOKEN_BITS
    order = np.lexsort((keys, -mass, row))
    place = np.arange(len(keys)) - np.searchsorted(row[order], row[order])
    kept = order[(place < CONTEXT_TOKENS) & (odds[order] > 0)]
    tokens: list[list[int]] = [[] for _ in range(n)]
    for key in keys[kept].tolist():
        tokens[key >> TOKEN_BITS].append(key & (2**TOKEN_BITS - 1))
    return np.sort(kept), tokens


def _told(windows: Windows, mask: np.ndarray, layout: Layout, keys: np.ndarray, odds: np.ndarray, n: int) -> np.ndarray:
    """Return the AUC of the sum of log-odds over the tokens of windows."""
    part = windows.pick(mask)
    if not len(part.row) or not len(keys):
        return np.full(n, np.nan)
    key, window = _keys(part, layout)
    at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    score = np.bincount(window, np.where(keys[at] == key, odds[at], 0.0), len(part.row))
    return auc_of(part, score, n)


def auc_of(windows: Windows, score: np.ndarray, n: int) -> np.ndarray:
    """Return for each of `n` latents the AUC of a score of windows, of one half, for whether it fires in them."""
    table = _Table.of(
        Windows(windows.row, windows.number, np.ones_like(windows.half), *(getattr(windows, each) for each in _REST)),
        torch.from_numpy(score)[:, None].float(),
        n,
    )
    return _auc(table.vector[SCORING, ..., 0], table.there[SCORING])


_REST = ("is_positive", "start", "length", "offset", "value")


# ------------------------------------------------------------------------------------------------------------ clusters


def _for_clusters(windows: Windows, masked: _Table, vectors: TokenVectors, n: int) -> tuple[Tensor, Tensor]:
    """Return vectors of the positive windows ``[n, 2 EXAMPLES, d]``, token and context alike, and which exist."""
    peaks = _Table.of(windows, vectors.of_tokens(windows.start + windows.offset), n)
    both = torch.cat([peaks.vector[:, 1], masked.vector[:, 1]], 3) / 2**0.5
    return torch.cat(list(both), 1), torch.cat(list(masked.there[:, 1]), 1)


def _described(
    windows: Windows, group: Tensor, layout: Layout, n: int
) -> list[list[tuple[float, list[int], list[int]]]]:
    """Return fraction, tokens and context of the clusters of every latent, the largest first."""
    found: list[list[tuple[float, list[int], list[int]]]] = [[] for _ in range(n)]
    positive = windows.pick(windows.is_positive)
    if not len(positive.row):
        return found
    of = group.numpy()[positive.row, positive.half * EXAMPLES + positive.number]
    counts = layout.counts("token", LABELLING) + layout.counts("token", SCORING)
    unigram = (counts + 0.5) / (counts + 0.5).sum()
    clusters = int(group.max()) + 1 if group.numel() else 0
    split = Windows(positive.row * clusters + of, *(getattr(positive, each) for each in ("number", "half", *_REST)))
    split = split.pick(of >= 0)
    peak = layout.ids[split.start + split.offset]
    peaks, sums = summed((split.row << TOKEN_BITS) | peak, np.ones((len(peak), 1)))
    keys, odds, mass = _log_odds(split, layout, unigram)
    _, around = _best_tokens(keys, odds, mass, n * clusters)
    size = np.bincount(split.row, minlength=n * clusters)
    starts = np.searchsorted(peaks >> TOKEN_BITS, np.arange(n * clusters + 1))
    for row in np.flatnonzero(size):
        span = slice(starts[row], starts[row + 1])
        order = np.argsort(-sums[span, 0], kind="stable")[:CONTEXT_TOKENS]
        fired = (peaks[span][order] & (2**TOKEN_BITS - 1)).tolist()
        whole = size[row // clusters * clusters : (row // clusters + 1) * clusters].sum()
        found[row // clusters].append((float(size[row] / whole), fired, around[row]))
    return [sorted(each, key=lambda cluster: -cluster[0]) for each in found]
