"""Windows of tokens around firings, and windows like them in which a latent does not fire.

A window lies anywhere around its firing, and a negative window has length and offset of a positive one, so that these
say nothing. Half of the negatives are from anywhere; half hold the token of a firing at the same offset, where the
latent does not fire: what the token alone would tell is told apart from what its context tells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..models.language import LanguageModel
from ..randomness import hashed_key
from .firings import Firings, drawn
from .layout import LABELLING, Layout

EXAMPLES = 20
"""Firings of each half that are looked at, for each latent, and as many windows without one."""

LEARNED = 128
"""Firings of the labelling half whose windows a label of the context is learned from, for each latent."""

TRIES = 6
"""Candidates for every negative window."""

DIMENSIONS = 128
"""Maximum width of the vectors of tokens; wider ones are projected at random."""

SMOOTHING = 1e-3
"""Weight of a token is ``s / (s + frequency)`` (Arora, Liang & Ma 2017, *A simple but tough-to-beat baseline for
sentence embeddings*)."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of several latents."""

    row: np.ndarray
    """Which of the latents, int64 ``[n]``."""
    number: np.ndarray
    """Number of the window among those of its latent, half and kind; a negative has that of its positive."""
    half: np.ndarray
    """`LABELLING` or `SCORING`."""
    is_positive: np.ndarray
    """Whether it is around a firing."""
    start: np.ndarray
    """First token."""
    length: np.ndarray
    """Number of tokens."""
    offset: np.ndarray
    """Where the firing is, or would be, in the window."""
    value: np.ndarray
    """Code of the firing; 0 for a negative."""

    def pick(self, mask: np.ndarray) -> Windows:
        """Return some of the windows."""
        return Windows(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all tokens of the windows, one after another, and where each begins."""
        starts = np.concatenate([[0], np.cumsum(self.length)]).astype(np.int64)
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], self.length)
        return np.repeat(self.start, self.length) + within, starts


def around(layout: Layout, token: np.ndarray, length: int, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return start and length of a window of one half around each token, placed by numbers in [0, 1)."""
    first, stop = layout.begin[token], layout.end[token]
    size = np.minimum(length, stop - first)
    low, high = np.maximum(first, token - size + 1), np.minimum(token, stop - size)
    return low + (uniform * (high - low + 1)).astype(np.int64), size


def windows_of(firings: Firings, latents: np.ndarray, layout: Layout, length: int, seed: int) -> Windows:
    """Return windows of some latents: up to `EXAMPLES` of each half that hold a firing, and as many that do not."""
    tokens = [np.flatnonzero(layout.half == half) for half in (0, 1)]
    found: list[list[np.ndarray]] = []
    for row, latent in enumerate(latents.tolist()):
        token, value = firings.of(latent)
        half = layout.half[token]
        random = np.random.Generator(np.random.PCG64(hashed_key("windows", seed, latent, n_bytes=8)))
        for which in (0, 1):
            mine = np.flatnonzero(half == which)
            if not len(mine):
                continue
            mine = mine[drawn(token[mine], latent, EXAMPLES, seed)]
            peak = token[mine].astype(np.int64)
            start, size = around(layout, peak, length, random.random(len(peak)))
            n = len(peak)
            found.append(_entry(row, which, True, (start, size, peak - start, value[mine])))
            peaks = _silent(firings, latent, layout, tokens[which], (peak, start, size), random)
            kept = peaks >= 0
            negative = (peaks - (peak - start), size, peak - start, np.zeros(n, np.float32))
            found.append([each[kept] for each in _entry(row, which, False, negative)])
    return _windows(found)


def learning_windows(firings: Firings, latents: np.ndarray, layout: Layout, length: int, seed: int) -> Windows:
    """Return windows of some latents around up to `LEARNED` firings of the labelling half each."""
    found: list[list[np.ndarray]] = []
    for row, latent in enumerate(latents.tolist()):
        token, value = firings.of(latent)
        mine = np.flatnonzero(layout.half[token] == LABELLING)
        mine = mine[drawn(token[mine], latent, LEARNED, seed)]
        peak = token[mine].astype(np.int64)
        random = np.random.Generator(np.random.PCG64(hashed_key("learning windows", seed, latent, n_bytes=8)))
        start, size = around(layout, peak, length, random.random(len(peak)))
        found.append(_entry(row, LABELLING, True, (start, size, peak - start, value[mine])))
    return _windows(found)


def _windows(found: list[list[np.ndarray]]) -> Windows:
    if not found:
        whole = np.zeros(0, np.int64)
        return Windows(whole, whole, whole, whole.astype(bool), whole, whole, whole, whole.astype(np.float32))
    return Windows(*(np.concatenate(each) for each in zip(*found, strict=True)))


def _entry(row: int, half: int, is_positive: bool, rest: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    n = len(rest[0])
    return [np.full(n, row), np.arange(n), np.full(n, half), np.full(n, is_positive), *rest]


def _silent(
    firings: Firings,
    latent: int,
    layout: Layout,
    tokens: np.ndarray,
    positive: tuple[np.ndarray, np.ndarray, np.ndarray],
    random: np.random.Generator,
) -> np.ndarray:
    """Return a token for each positive window around which one at the same offset is silent; -1 for none."""
    peak, start, size = positive
    n, offset = len(peak), (peak - start)[:, None]
    uniform = random.random((n, 2 * TRIES))
    anywhere = tokens[(uniform[:, :TRIES] * len(tokens)).astype(np.int64)]
    same = layout.occurrences(layout.ids[peak], int(layout.half[peak[0]]), uniform[:, TRIES:])
    same[: n // 2] = -1  # the first half of the negatives are from anywhere
    candidate = np.concatenate([same, anywhere], 1)
    begin = candidate - offset
    fits = (candidate >= 0) & (begin >= layout.begin[candidate]) & (begin + size[:, None] <= layout.end[candidate])
    fires = firings.fires_within(latent, begin.ravel(), (begin + size[:, None]).ravel()).reshape(begin.shape)
    good = fits & ~fires
    return np.where(good.any(1), candidate[np.arange(n), good.argmax(1)], -1)


class TokenVectors:
    """Vectors of tokens and of windows, from the model's table of embeddings: what the SAE reads comes later.

    A window is the mean of the vectors of its tokens, frequent tokens weighing less, less the mean over all tokens.
    Where the model has no table, tokens get random vectors: then windows are alike as far as they share tokens.
    """

    def __init__(self, lm: LanguageModel, layout: Layout) -> None:
        generator = torch.Generator().manual_seed(0)
        counts = np.bincount(layout.ids[layout.half >= 0], minlength=layout.n_words).astype(np.float64)
        frequency = torch.from_numpy(counts / max(counts.sum(), 1.0)).float()
        if lm.vocabulary is None:
            table = torch.randn(layout.n_words, DIMENSIONS, generator=generator)
        else:
            table = lm.model.get_input_embeddings().weight.detach()[: layout.n_words].float().cpu()  # type: ignore[operator]
            if table.shape[1] > DIMENSIONS:
                table = table @ torch.randn(table.shape[1], DIMENSIONS, generator=generator)
        self.layout = layout
        self.weight = SMOOTHING / (SMOOTHING + frequency)
        mean = (frequency * self.weight) @ table / (frequency * self.weight).sum()
        self.table = table - mean

    @property
    def width(self) -> int:
        """Width of the vectors."""
        return self.table.shape[1]

    def of_tokens(self, token: np.ndarray) -> torch.Tensor:
        """Return the vectors of the tokens at some places, of length 1."""
        return torch.nn.functional.normalize(self.table[torch.from_numpy(self.layout.ids[token])], dim=1)

    def of_windows(self, windows: Windows, *, masked: bool) -> torch.Tensor:
        """Return the vectors of windows, of length 1; `masked`: without the token of the firing, wherever it stands."""
        tokens, starts = windows.tokens()
        ids = torch.from_numpy(self.layout.ids[tokens])
        weight = self.weight[ids]
        if masked:
            peak = np.repeat(self.layout.ids[windows.start + windows.offset], windows.length)
            weight = torch.where(ids == torch.from_numpy(peak), torch.zeros(()), weight)
        bags = torch.nn.functional.embedding_bag(
            ids, self.table, torch.from_numpy(starts[:-1]), mode="sum", per_sample_weights=weight
        )
        return torch.nn.functional.normalize(bags, dim=1)
