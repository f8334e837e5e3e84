"""Texts of two topics as token ids, and latents that fire on words, topics and positions of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from saekit.explanation.firings import Firings, FiringsWriter
from saekit.explanation.layout import Layout
from saekit.rows.tokens import Contexts

WORDS = 60
TOPIC = 2  # every document is of one of so many
NO_TABLE = SimpleNamespace(vocabulary=None)


def contexts(n_documents: int = 160, length: int = 40, seed: int = 0) -> Contexts:
    """Return texts: words 0-19 are everywhere, 20-39 belong to topic 0, 40-59 to topic 1."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(length // 2, length, n_documents)
    ids = []
    for number, n in enumerate(lengths):
        own = 20 + 20 * (number % TOPIC) + generator.integers(0, 20, n)
        ids.append(np.where(generator.random(n) < 0.4, own, generator.integers(0, 20, n)))
    return Contexts(
        np.concatenate(ids).astype(np.int32),
        np.repeat(np.arange(n_documents), lengths),
        np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def planted(layout: Layout, seed: int = 0) -> Firings:
    """Return a latent each: of word 7; after word 3; before word 5; of topic 1; of first tokens; of words 25 and 47."""
    generator = np.random.default_rng(seed)
    own = layout.ids
    on = [
        own == 7,
        layout.previous == 3,
        layout.next == 5,
        (layout.document % TOPIC == 1) & (generator.random(len(own)) < 0.4),
        layout.position == 0,
        (own == 25) | (own == 47),
    ]
    return firings_of(on, seed)


def firings_of(on: list[np.ndarray], seed: int = 0) -> Firings:
    """Return the firings of latents that fire where each of some masks is true."""
    generator = np.random.default_rng(seed)
    writer = FiringsWriter(len(on), len(on[0]))
    for latent, mask in enumerate(on):
        token = np.flatnonzero(mask)
        writer.add(np.full(len(token), latent), token, generator.uniform(0.5, 2, len(token)))
    return writer.finish()
