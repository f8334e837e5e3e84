"""Windows of tokens to test labels on: one rule for those where a latent fires and those where it does not.

A window that holds a firing has it at a random offset; every window without one takes the offset, the length and the
marks of one with. Who sees offsets, lengths and marks alone can tell nothing. A window holds tokens of its half alone:
what repeats the labelling half is in none (`Layout`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse

from .firings import Firings
from .layout import LABELLING, SCORING, Layout

CANDIDATES = 8192
"""Tokens of the scoring half around which windows without a firing are looked for, the same for all latents."""

MARKED = 0.3
"""Tokens are marked from this fraction of the largest code in their window, by magnitude."""


@dataclass(frozen=True)
class Window:
    """A run of tokens, some of them marked."""

    fires: bool
    """Whether the latent fires in it."""
    hard: bool
    """Whether one without a firing was chosen because it resembles those with one."""
    document: int
    """Number of the text."""
    start: int
    """Its first token among all."""
    marks: tuple[bool, ...]
    """For each token whether it is marked; of a window without a firing, as in one with."""

    @property
    def stop(self) -> int:
        """The end of its tokens."""
        return self.start + len(self.marks)


class LabelWindows:
    """Windows of the two halves of a corpus; see `Layout`."""

    def __init__(self, layout: Layout, length: int, seed: int) -> None:
        self.layout, self.length, self.seed = layout, length, seed
        self.first, self.last = layout.begin, layout.end
        usable = np.flatnonzero(layout.half == SCORING)
        generator = np.random.Generator(np.random.PCG64([seed, 61]))
        self.candidates = np.sort(generator.permutation(usable)[:CANDIDATES])
        self.bags = self._bags(self.candidates)

    def _bags(self, tokens: np.ndarray) -> scipy.sparse.csr_matrix:
        """Return unit vectors of the tokens around some tokens, each weighed by its rarity."""
        ids, half = self.layout.ids, self.length // 2
        spans = [np.arange(max(self.first[t], t - half), min(self.last[t], t + half + 1)) for t in tokens]
        where = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        row = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        counts = np.bincount(ids, minlength=int(ids.max(initial=0)) + 1)
        weight = np.log(len(ids) / np.maximum(counts, 1))[ids[where]]
        bags = scipy.sparse.csr_matrix((weight, (row, ids[where])), shape=(len(spans), len(counts)))
        norms = np.sqrt(np.asarray(bags.multiply(bags).sum(1)).ravel())
        return scipy.sparse.diags_array(1 / np.maximum(norms, 1e-12)) @ bags

    def labelling_windows(self, latent: int, firings: Firings, n: int) -> list[Window]:
        """Return windows of the labelling half in which a latent fires: half of them its strongest, one per text."""
        token, value = firings.of(latent)
        mine = self.layout.half[token] == LABELLING
        generator = np.random.Generator(np.random.PCG64([self.seed, 67, latent]))
        strongest = np.argsort(-np.abs(value[mine]), kind="stable")
        order = np.concatenate([strongest[: n // 2], generator.permutation(strongest[n // 2 :])])
        return self._firing(token[mine][order], value[mine][order], firings.of(latent), n, generator)

    def scoring_windows(self, latent: int, firings: Firings, n: int) -> list[Window]:
        """Return up to `n` windows of the scoring half with a firing and as many without, in random order.

        Half of those without are any, half the most similar to those with; none where there are no two of each.
        """
        token, value = firings.of(latent)
        mine = self.layout.half[token] == SCORING
        generator = np.random.Generator(np.random.PCG64([self.seed, 71, latent]))
        order = generator.permutation(int(mine.sum()))
        fire = self._firing(token[mine][order], value[mine][order], firings.of(latent), n, generator)
        both = [each for pair in self._pairs(fire, token, generator) for each in pair]
        return [both[i] for i in generator.permutation(len(both))] if len(both) >= 4 else []

    def _firing(
        self,
        token: np.ndarray,
        value: np.ndarray,
        every: tuple[np.ndarray, np.ndarray],
        n: int,
        generator: np.random.Generator,
    ) -> list[Window]:
        """Return windows around firings, in their order and at most one per text, at random offsets."""
        found: dict[int, Window] = {}
        for t in token.tolist():
            document = int(self.layout.document[t])
            if document in found:
                continue
            length = min(self.length, int(self.last[t] - self.first[t]))
            least, most = max(self.first[t], t - length + 1), min(t, self.last[t] - length)
            start = int(generator.integers(least, most + 1))
            first, last = np.searchsorted(every[0], [start, start + length])
            size = np.zeros(length)
            size[every[0][first:last] - start] = np.abs(every[1][first:last])
            marks = tuple((size >= MARKED * size.max()).tolist())
            found[document] = Window(True, False, document, start, marks)
            if len(found) == n:
                break
        return list(found.values())

    def _pairs(
        self, fire: list[Window], token: np.ndarray, generator: np.random.Generator
    ) -> Iterator[tuple[Window, Window]]:
        """Yield each window with a firing with one without, of another text each; those that find none are left out."""
        if not fire:
            return
        peaks = np.array([each.start + _anchor(each) for each in fire])
        like = np.asarray(self.bags @ self._bags(peaks).sum(0).T).ravel()
        orders = {
            True: self.candidates[np.argsort(-like, kind="stable")],
            False: generator.permutation(self.candidates),
        }
        used: set[int] = set()
        at = {True: 0, False: 0}
        for number, model in enumerate(fire):
            hard = number % 2 == 1
            while at[hard] < len(orders[hard]):
                t = int(orders[hard][at[hard]])
                at[hard] += 1
                start = t - _anchor(model)
                stop, document = start + len(model.marks), int(self.layout.document[t])
                inside = self.first[t] <= start and stop <= self.last[t]
                silent = np.searchsorted(token, start) == np.searchsorted(token, stop)
                if inside and silent and document not in used:
                    used.add(document)
                    yield model, Window(False, hard, document, start, model.marks)
                    break


def _anchor(window: Window) -> int:
    """Return the offset of the first mark."""
    return window.marks.index(True)
