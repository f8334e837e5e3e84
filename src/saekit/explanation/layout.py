"""Tokens of the texts, as explanations read them: the half of each, the tokens around it, its position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import DataError
from ..randomness import random_order
from ..rows.tokens import Contexts
from .halves import labelling_among

REPEATED = 12
"""Tokens in a row that also stand in the labelling half make a near-duplicate: they are scored in neither."""

LABELLING, SCORING, NEITHER = 0, 1, -1

POSITIONS = np.unique(np.concatenate([np.arange(4), *([2**n, 3 * 2 ** (n - 1)] for n in range(2, 24))])).astype(int)
"""First positions of the classes of positions."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Arrays with an entry per token of all contexts."""

    ids: np.ndarray
    """Token ids, int64."""
    document: np.ndarray
    """Number of the text, int64."""
    position: np.ndarray
    """Place in the text; -1 for tokens that were added."""
    half: np.ndarray
    """int8: `LABELLING`, `SCORING`, or `NEITHER` for added tokens and for what repeats the labelling half."""
    first: np.ndarray
    """Where the piece of text begins that the model reads with the token, int64."""
    stop: np.ndarray
    """Where it ends."""
    begin: np.ndarray
    """Where the run of tokens of one half begins that the token lies in: windows stay within it."""
    end: np.ndarray
    """Where it ends."""
    n_repeated: int
    """Tokens of the scoring half that were left out, because they repeat the labelling half."""

    @classmethod
    def of(cls, contexts: Contexts) -> Layout:
        """Return the layout of contexts.

        Raises
        ------
        DataError
            No documents to label from, or none to score on.
        """
        real = contexts.position >= 0
        documents, back = np.unique(contexts.document[real], return_inverse=True)
        if len(documents) < 2:
            raise DataError(
                "explain: there must be documents to label from and others to score on; the texts give "
                f"{len(documents)} document{'s' * (len(documents) != 1)} with tokens in all. Give more texts."
            )
        half = np.full(len(real), NEITHER, np.int8)
        half[real] = np.where(labelling_among(documents)[back], LABELLING, SCORING)
        piece = np.repeat(np.arange(len(contexts)), contexts.lengths())
        new = np.ones(len(piece), bool)
        new[1:] = (
            (piece[1:] != piece[:-1]) | (contexts.document[1:] != contexts.document[:-1]) | (real[1:] != real[:-1])
        )
        first, stop = _runs(new)
        ids = contexts.ids.astype(np.int64)
        repeated = _repeated(ids, half, stop)
        half[repeated] = NEITHER
        if not (half == LABELLING).any() or not (half == SCORING).any():
            raise DataError(
                "explain: both halves of the documents must have tokens of their own; one of them has none, or only "
                "what the other has too. Give more texts."
            )
        new[1:] |= half[1:] != half[:-1]
        begin, end = _runs(new)
        return cls(ids, contexts.document, contexts.position, half, first, stop, begin, end, int(repeated.sum()))

    def facts(self) -> dict[str, int]:
        """Return how many documents are in either half, and how many tokens are in neither."""
        documents = [len(np.unique(self.document[self.half == half])) for half in (LABELLING, SCORING)]
        return {
            "labelling_documents": documents[0],
            "scoring_documents": documents[1],
            "repeated_tokens": self.n_repeated,
        }

    @cached_property
    def is_other(self) -> np.ndarray:
        """Whether each token is of one of every second document, in random order."""
        documents, number = np.unique(self.document, return_inverse=True)
        return (random_order(len(documents), "every second document") % 2 == 1)[number]

    @cached_property
    def n_words(self) -> int:
        """One more than the largest token id."""
        return int(self.ids.max()) + 1

    @cached_property
    def previous(self) -> np.ndarray:
        """Token before each in its piece of text, -1 for none."""
        found = np.full(len(self.ids), -1, np.int64)
        found[1:] = np.where(self.first[1:] < np.arange(1, len(self.ids)), self.ids[:-1], -1)
        return found

    @cached_property
    def next(self) -> np.ndarray:
        """Token behind each in its piece of text, -1 for none."""
        found = np.full(len(self.ids), -1, np.int64)
        found[:-1] = np.where(self.stop[:-1] > np.arange(1, len(self.ids)), self.ids[1:], -1)
        return found

    @cached_property
    def place(self) -> np.ndarray:
        """Class of the position of each token: see `POSITIONS`."""
        return np.where(self.position >= 0, np.searchsorted(POSITIONS, self.position, side="right") - 1, -1)

    def words(self, kind: str) -> np.ndarray:
        """Return what stands at each token: ``token``, ``previous``, ``next``, or the class of its ``position``."""
        return {"token": self.ids, "previous": self.previous, "next": self.next, "position": self.place}[kind]

    def counts(self, kind: str, half: int) -> np.ndarray:
        """Return the tokens of a half by what stands there."""
        words = self.words(kind)
        words = words[(self.half == half) & (words >= 0)]
        size = len(POSITIONS) if kind == "position" else self.n_words
        return np.bincount(words, minlength=size).astype(np.float64)

    @cached_property
    def _by_token(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        found = []
        for half in (LABELLING, SCORING):
            where = np.flatnonzero(self.half == half)
            order = np.argsort(self.ids[where], kind="stable")
            found.append((where[order], np.searchsorted(self.ids[where][order], np.arange(self.n_words + 1))))
        return tuple(found)

    def occurrences(self, token: np.ndarray, half: int, uniform: np.ndarray) -> np.ndarray:
        """Return occurrences of tokens in a half, by numbers in [0, 1) ``[n, tries]``; -1 for none."""
        where, starts = self._by_token[half]
        count = (starts[token + 1] - starts[token])[:, None]
        at = np.minimum(starts[token][:, None] + (uniform * count).astype(np.int64), max(len(where) - 1, 0))
        return np.where(count > 0, where[at], -1)


def _runs(new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each token where the run around it begins and ends, from where runs begin."""
    begins = np.flatnonzero(new)
    number = np.cumsum(new) - 1
    return begins[number], np.append(begins[1:], len(new))[number]


def _repeated(ids: np.ndarray, half: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Return which tokens of the scoring half lie in `REPEATED` tokens in a row that the labelling half holds too."""
    n = len(ids) - REPEATED + 1
    found = np.zeros(len(ids), bool)
    if n < 1:
        return found
    key = np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(REPEATED):
            key = key * np.uint64(0x9E3779B97F4A7C15) + ids[i : i + n].astype(np.uint64) + np.uint64(1)
    whole = np.arange(n) + REPEATED <= stop[:n]
    labelling = np.unique(key[whole & (half[:n] == LABELLING)])
    scoring = np.flatnonzero(whole & (half[:n] == SCORING))
    for begin in scoring[np.isin(key[scoring], labelling)]:
        found[begin : begin + REPEATED] = True
    return found
