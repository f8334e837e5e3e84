"""Tokens and positions that latents respond to, and how well these tell where a latent fires in other documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..measure.chance import Chance, against_chance
from ..measure.token_statistics import TOKEN_BITS, TokenScores, labels_of, shown_token, token_detection
from .explanation_result import TokenShare
from .firings import Firings
from .layout import LABELLING, POSITIONS, SCORING, Layout

KINDS = ("token", "previous", "next", "position")
"""What a label can be made of, other than the context."""

SHARES = 8
"""Tokens of each kind on a card."""

BETTER = 0.02
"""By how much a label of another kind than the token must detect better in the labelling half."""


@dataclass
class Responses:
    """What latents respond to; arrays have an entry per latent, NaN where it is not known."""

    scores: dict[str, np.ndarray]
    """By name."""
    by_kind: dict[str, np.ndarray]
    """Held-out AUC of a label of each kind."""
    labelling: dict[str, np.ndarray]
    """AUC of the same labels in the half that they were made of."""
    kind: np.ndarray
    """Index in `KINDS` of the best label there."""
    purity_percentile: np.ndarray
    """Fraction of density-matched chance samples with a lower purity."""
    labels: dict[str, list[str]] = field(default_factory=dict)
    """By kind: the label of each latent that is named."""
    shares: dict[str, list[list[TokenShare]]] = field(default_factory=dict)
    """By kind but the position: tokens of each of these."""
    positions: list[list[list[float]]] = field(default_factory=list)
    """For each of these: ``[first position, rate]``."""


@dataclass(frozen=True)
class Named:
    """Latents that are told in words: not all, for of very many the words alone would take gigabytes."""

    latents: np.ndarray
    """Ascending."""
    decode: Callable[[int], str]
    """From a token id to its text."""

    def within(self, first: int, n: int) -> np.ndarray:
        """Return those among `n` latents from `first` on, counted from there."""
        inside = (self.latents >= first) & (self.latents < first + n)
        return self.latents[inside] - first


def responses(firings: Firings, layout: Layout, label_tokens: int, seed: int, named: Named | None = None) -> Responses:
    """Measure what latents respond to, and write the labels of those that are named."""
    counts = {(kind, half): layout.counts(kind, half) for kind in KINDS for half in (LABELLING, SCORING)}
    found: list[Responses] = []
    chance: Chance | None = None
    for first, part in firings.parts():
        halves = [part.where(layout.half == half) for half in (LABELLING, SCORING)]
        one = Responses({}, {}, {}, np.zeros(part.n_latents, np.int64), np.zeros(part.n_latents))
        for kind in KINDS:
            words, document = layout.words(kind), layout.document if kind == "token" else None
            learned = halves[0].token_scores(words, counts[kind, LABELLING], document)
            scored = halves[1].token_scores(words, counts[kind, SCORING])
            if kind == "token":
                chance = chance or Chance.of(learned, seed=seed)
                one.purity_percentile = against_chance(learned, chance)["purity"].percentile.numpy()
                one.scores["lexical"] = token_detection(learned, scored).numpy()
            _measure(one, kind, learned, scored, label_tokens)
            if named is not None:
                mine = named.within(first, part.n_latents)
                _name(one, kind, learned.take(mine), scored.take(mine), label_tokens, named.decode)
        one.kind = _best_kind(one.labelling)
        found.append(one)
    return _joined(found)


def _best_kind(labelling: dict[str, np.ndarray]) -> np.ndarray:
    """Return the index of the kind of label that tells best: that of the token, unless another is clearly better."""
    auc = np.stack([np.nan_to_num(labelling[kind]) for kind in KINDS])
    auc[1:] -= BETTER
    return auc.argmax(0)


def _measure(one: Responses, kind: str, learned: TokenScores, scored: TokenScores, label_tokens: int) -> None:
    nothing = np.full(learned.n_latents, np.nan)
    stats = learned.compute() if learned.n_rows else None  # no text of two tokens: nothing stands before or after
    suffix = "" if kind == "token" else f"_{kind}"
    if kind != "position":
        one.scores[f"purity{suffix}"] = stats.purity.numpy() if stats else nothing
        one.scores[f"entropy{suffix}"] = stats.entropy.numpy() if stats else nothing
    if kind == "token":
        one.scores["documents"] = stats.spread.numpy() if stats else nothing
    n = None if kind == "position" else label_tokens
    one.labelling[kind] = token_detection(learned, learned, n=n).numpy()
    one.by_kind[kind] = token_detection(learned, scored, n=n).numpy()


def _name(
    one: Responses,
    kind: str,
    learned: TokenScores,
    scored: TokenScores,
    label_tokens: int,
    decode: Callable[[int], str],
) -> None:
    if kind == "position":
        learned.merge(scored)
        one.positions = _position_rates(learned)
        one.labels[kind] = [_position_label(each) for each in one.positions]
        return
    words = {"token": "", "previous": "after ", "next": "before "}
    labels = labels_of(learned, decode, label_tokens)
    one.labels[kind] = [f"{words[kind]}{label}" if label else "" for label in labels]
    texts: dict[int, str] = {}
    latent, token, _, firings = learned.pairs()
    keys = (latent << TOKEN_BITS) | token
    one.shares[kind] = []
    for j, tokens in enumerate(learned.top_tokens(SHARES)):
        shares = []
        for t, share in tokens:
            if t not in texts:
                texts[t] = shown_token(decode(t))
            at = np.searchsorted(keys, (j << TOKEN_BITS) | t)
            rate = float(firings[at] / learned.token_counts[t])
            shares.append(TokenShare(texts[t], round(share, 4), round(rate, 4)))
        one.shares[kind].append(shares)


def _position_rates(scores: TokenScores) -> list[list[list[float]]]:
    latent, place, _, firings = scores.pairs()
    found: list[list[list[float]]] = [[] for _ in range(scores.n_latents)]
    for j, at, n in zip(latent.tolist(), place.tolist(), firings.tolist(), strict=True):
        found[j].append([float(POSITIONS[at]), round(n / scores.token_counts[at], 6)])
    return found


def _position_label(rates: list[list[float]]) -> str:
    """Return the positions at which a latent fires at least half as often as at its best one."""
    most = max((rate for _, rate in rates), default=0.0)
    kept = [position for position, rate in rates if rate >= most / 2]
    if not kept:
        return ""
    first, last = int(min(kept)), int(POSITIONS[np.searchsorted(POSITIONS, max(kept)) + 1]) - 1
    return f"position {first}" if first == last else f"positions {first} to {last}"


def _joined(found: list[Responses]) -> Responses:
    if len(found) == 1:
        return found[0]

    def arrays(name: str) -> dict[str, np.ndarray]:
        return {key: np.concatenate([getattr(each, name)[key] for each in found]) for key in getattr(found[0], name)}

    def lists(name: str) -> dict[str, list[Any]]:
        return {key: [item for each in found for item in getattr(each, name)[key]] for key in getattr(found[0], name)}

    return Responses(
        arrays("scores"),
        arrays("by_kind"),
        arrays("labelling"),
        np.concatenate([each.kind for each in found]),
        np.concatenate([each.purity_percentile for each in found]),
        lists("labels"),
        lists("shares"),
        [item for each in found for item in each.positions],
    )
