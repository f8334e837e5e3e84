"""What latents respond to, told from tokens and documents alone: no explanations, no language model, no key.

For every latent the fraction of its activation that falls on each token, ``p(t) = sum_i a_i [tok_i = t] / sum_i a_i``,
and on each document. A latent that fires once is perfectly pure; so scores come with what chance would give a latent
that fires as often (`against_chance`), and with how well the tokens seen in some documents tell, in other documents,
where the latent fires (`token_detection`). These are scores of coherence, not of causal meaning: a frozen decoder can
have coherent latents too.

References
----------
Miller (1955), *Note on the bias of information estimates*; Kish (1965), *Survey Sampling* (effective sample size).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ShapeError
from ..sae.codes import Codes
from .accumulators import double

TOKEN_BITS = 32
"""A pair of latent and token is one int64: the token in these low bits."""

DOCUMENT_BITS = 40
"""The same for documents; ids are taken modulo ``2**40``, latents go to ``2**23``."""

PENDING = 2**20
"""Pairs that wait before they are added to the sums (24 MiB)."""


class PairSums:
    """Sums over pairs of latent and something, kept for the pairs that occur: sorted keys and their sums."""

    def __init__(self, columns: int) -> None:
        self._keys = np.zeros(0, dtype=np.int64)
        self._sums = np.zeros((0, columns))
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add ``values [n, columns]`` to the sums at ``keys [n]``; keys may repeat."""
        if len(keys):
            self._waiting.append(summed(keys, values))
            if sum(len(each) for each, _ in self._waiting) > max(PENDING, len(self._keys)):
                self.pairs()

    def merge(self, other: PairSums) -> None:
        """Add the sums of `other`."""
        self.add(*other.pairs())

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys, increasing, and their sums."""
        if self._waiting:
            keys, sums = zip((self._keys, self._sums), *self._waiting, strict=True)
            self._keys, self._sums = summed(np.concatenate(keys), np.concatenate(sums))
            self._waiting = []
        return self._keys, self._sums


def summed(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different keys, increasing, and the sums of the values ``[n, columns]`` of each."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[first], np.add.reduceat(values[order], first, axis=0)


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Scores of every latent, ``float64 [n_latents]``; NaN for a latent that never fired."""

    purity: Tensor
    """``max_t p(t)``: 1 where it responds to one token only."""
    entropy: Tensor
    """``-sum p log p`` in nats, with Miller's correction for few firings; at most ``log(tokens seen)``."""
    lift: Tensor
    """``KL(p, unigram)`` in nats with the same correction, at least 0: 0 where it responds to any token as often as the
    token comes."""
    spread: Tensor
    """``1 / sum_d q_d^2`` with q_d the fraction of its activation in document d: the number of documents it fires
    on. NaN where documents are not known."""
    fires: Tensor
    """Rows on which it fired; 0 for a dead one."""
    effective_fires: Tensor
    """``(sum a)^2 / sum a^2``: firings that would vary as much with equal activations."""
    n_rows: int
    """Rows seen."""

    def named(self) -> dict[str, Tensor]:
        """Return the scores by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "n_rows"}


class TokenScores:
    """Accumulates activation by latent and token: ``update`` with codes, ``merge`` with another, ``compute``.

    Needs memory for the pairs of latent and token, and of latent and document, that occur.

    Parameters
    ----------
    n_latents
        Width of the codes.
    n_vocab
        Number of tokens there are; None for as many as come.
    """

    def __init__(self, n_latents: int, n_vocab: int | None = None) -> None:
        self.n_latents = n_latents
        self.n_vocab = n_vocab
        self._tokens = PairSums(2)  # activation, firings
        self._documents = PairSums(1)
        self._squares = np.zeros(n_latents)
        self._counts = np.zeros(n_vocab or 0)  # rows by token
        self._documents_known = True

    @classmethod
    def of_pairs(
        cls,
        n_latents: int,
        pairs: tuple[np.ndarray, np.ndarray],
        counts: np.ndarray,
        squares: np.ndarray,
        documents: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> TokenScores:
        """Return what sums that were made elsewhere say.

        Parameters
        ----------
        n_latents
            Number of latents.
        pairs
            Keys ``latent << TOKEN_BITS | token``, increasing, and ``[n, 2]`` activation and firings.
        counts
            Rows by token.
        squares
            Sum of the squared activations of each latent.
        documents
            Keys ``latent << DOCUMENT_BITS | document`` and ``[n, 1]`` activation; None where they are not known.
        """
        found = cls(n_latents)
        found._tokens.add(*pairs)
        if documents is not None:
            found._documents.add(*documents)
        found._documents_known = documents is not None
        found._squares += squares
        found._count(counts)
        return found

    def take(self, latents: np.ndarray) -> TokenScores:
        """Return what was seen of some latents, ascending, as if there were no others."""

        def kept(sums: PairSums, bits: int) -> tuple[np.ndarray, np.ndarray]:
            keys, values = sums.pairs()
            at = np.searchsorted(latents, keys >> bits)
            mine = latents[np.minimum(at, len(latents) - 1)] == keys >> bits if len(latents) else keys < 0
            return (at[mine] << bits) | (keys[mine] & (2**bits - 1)), values[mine]

        documents = kept(self._documents, DOCUMENT_BITS) if self._documents_known else None
        return TokenScores.of_pairs(
            len(latents), kept(self._tokens, TOKEN_BITS), self._counts, self._squares[latents], documents
        )

    def update(self, codes: Codes, token: Tensor, document: Tensor | None = None) -> None:
        """Add the codes of a batch of rows.

        Parameters
        ----------
        codes
            Codes of ``n`` rows.
        token
            ``[n]`` whole numbers from 0: the token of each row. Pass the previous or the next one to learn what comes
            before or after.
        document
            ``[n]`` document of each row, negative where unknown; None where no document is known.

        Raises
        ------
        ShapeError
            The codes have another width, or there is not one token (document) per row.
        DataError
            A token below 0 or from `n_vocab` on, or an activation that is not finite.
        """
        self._check_shapes(codes, token, document)
        if not codes.n_rows:
            return
        tokens = self._checked(token)
        a = double(codes.values).abs().cpu().numpy()  # of signed codes the strength, for they would cancel
        if not np.isfinite(a).all():
            raise DataError("codes must be finite; they hold NaN or infinity. Check the weights of the SAE.")
        latent, row = codes.indices.cpu().numpy(), codes.row_of().cpu().numpy()
        self._count(np.bincount(tokens))
        self._squares += np.bincount(latent, a * a, self.n_latents)
        self._tokens.add((latent << TOKEN_BITS) | tokens[row], np.stack([a, np.ones_like(a)], 1))
        if document is None:
            self._documents_known = False
            return
        documents = document.cpu().numpy().astype(np.int64)[row]
        known = documents >= 0
        keys = (latent << DOCUMENT_BITS) | (documents % 2**DOCUMENT_BITS)
        self._documents.add(keys[known], a[known, None])

    def _check_shapes(self, codes: Codes, token: Tensor, document: Tensor | None) -> None:
        if codes.n_latents != self.n_latents:
            raise ShapeError(f"codes must have {self.n_latents} latents; they have {codes.n_latents}.")
        for name, each in (("token", token), ("document", document)):
            if each is not None and tuple(each.shape) != (codes.n_rows,):
                raise ShapeError(
                    f"`{name}` must hold one number per row, ({codes.n_rows},); it has shape {tuple(each.shape)}."
                )

    def _checked(self, token: Tensor) -> np.ndarray:
        """Return tokens as ``int64 [n]``; raises `DataError` where one is out of range."""
        tokens = token.cpu().numpy().astype(np.int64)
        most = self.n_vocab or 2 ** (TOKEN_BITS - 1)
        if tokens.min() < 0 or tokens.max() >= most:
            wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise DataError(f"tokens must lie within 0..{most - 1}; got {wrong}. Are the rows of another tokenizer?")
        return tokens

    def merge(self, other: TokenScores) -> None:
        """Add what `other` saw.

        Raises
        ------
        ShapeError
            It is about another number of latents.
        """
        if other.n_latents != self.n_latents:
            raise ShapeError(f"both must be of {self.n_latents} latents; the other is of {other.n_latents}.")
        self._tokens.merge(other._tokens)
        self._documents.merge(other._documents)
        self._squares += other._squares
        self._count(other._counts)
        self._documents_known &= other._documents_known

    def _count(self, counts: np.ndarray) -> None:
        if len(counts) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros(len(counts) - len(self._counts))])
        self._counts[: len(counts)] += counts

    @property
    def n_rows(self) -> int:
        """Rows seen."""
        return int(self._counts.sum())

    def checked_rows(self) -> int:
        """Rows seen, at least 1.

        Raises
        ------
        DataError
            No row was added.
        """
        if not self.n_rows:
            raise DataError("interpretability needs at least one row; none was added. Is the data empty?")
        return self.n_rows

    @property
    def token_counts(self) -> np.ndarray:
        """``float64 [tokens]``: rows by token."""
        return self._counts

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """``(latent, token, activation, firings)`` of every pair that occurred, by latent, then token."""
        keys, sums = self._tokens.pairs()
        return keys >> TOKEN_BITS, keys & (2**TOKEN_BITS - 1), sums[:, 0], sums[:, 1]

    def compute(self) -> TokenStats:
        """Return the scores.

        Raises
        ------
        DataError
            No row was added.
        """
        self.checked_rows()
        n = self.n_latents
        latent, token, activation, firings = self.pairs()
        total = np.bincount(latent, activation, n)
        fires = np.bincount(latent, firings, n)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = activation / total[latent]
            effective = np.where(fires > 0, total**2 / self._squares, 0.0)
            distinct = np.bincount(latent, minlength=n)
            purity, entropy, lift = _shapes(latent, p, self._counts[token] / self.n_rows, distinct, effective, n)
            keys, sums = self._documents.pairs()
            owner, share = keys >> DOCUMENT_BITS, sums[:, 0]
            in_documents = np.bincount(owner, share, n)
            spread = in_documents**2 / np.bincount(owner, share**2, n)
        if not self._documents_known:
            spread = np.full(n, math.nan)
        alive = fires > 0
        entropy = np.minimum(entropy, math.log(max(1, int(np.count_nonzero(self._counts)))))
        scores = [torch.from_numpy(np.where(alive, each, math.nan)) for each in (purity, entropy, lift, spread)]
        return TokenStats(
            scores[0], scores[1], scores[2], scores[3],
            torch.from_numpy(fires), torch.from_numpy(effective), self.n_rows,
        )  # fmt: skip

    def top_tokens(self, n: int = 5, *, by: str = "share") -> list[list[tuple[int, float]]]:
        """Return the tokens that each latent responds to, with the share p(t) of its activation.

        Parameters
        ----------
        n
            Tokens per latent, at most.
        by
            ``"share"``: the largest p(t). ``"lift"``: the largest part of the lift, ``p log(p / unigram)``, which
            leaves out tokens that are merely common.

        Raises
        ------
        ConfigError
            `n` is below 1 or `by` is something else.
        """
        if n < 1 or by not in ("share", "lift"):
            raise ConfigError(f"top_tokens: `n` must be at least 1 and `by` 'share' or 'lift'; got {n} and {by!r}.")
        latent, token, activation, _ = self.pairs()
        p = activation / np.bincount(latent, activation, self.n_latents)[latent] if len(latent) else activation
        value = p if by == "share" else p * np.log(p * self.n_rows / self._counts[token])
        order = np.lexsort((token, -value, latent))
        starts = np.searchsorted(latent, np.arange(self.n_latents + 1))
        found = []
        for start, end in itertools.pairwise(starts):
            best = order[start : min(end, start + n)]
            found.append([(int(token[at]), float(p[at])) for at in best if by == "share" or value[at] > 0])
        return found


def _shapes(
    latent: np.ndarray, p: np.ndarray, unigram: np.ndarray, distinct: np.ndarray, effective: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Purity, entropy and lift of distributions given as pairs sorted by latent; see `TokenStats`."""
    purity = np.zeros(n)
    np.maximum.at(purity, latent, p)
    plain = -np.bincount(latent, p * np.log(p), n)
    entropy = plain + (distinct - 1) / (2 * effective)
    cross = -np.bincount(latent, p * np.log(unigram), n)
    return purity, entropy, np.maximum(cross - entropy, 0.0)


# ------------------------------------------------------------------------------------------------------------- labels


def labels_of(
    scores: TokenScores, decode: Callable[[int], str], n: int = 3, *, by: str = "lift", least_share: float = 0.02
) -> list[str]:
    """Return a label for every latent: the tokens that it responds to, as ``"`return` · `Returns` · `yield`"``.

    Parameters
    ----------
    scores
        What the latents did.
    decode
        From a token id to its text, for example ``lambda t: tokenizer.decode([t])``.
    n
        Tokens per label, at most. Tokens that look the same without the space around them count as one.
    by
        As for `TokenScores.top_tokens`; by lift, so that a latent is not called by tokens that are everywhere.
    least_share
        Tokens with less of the activation are left out, except for the first.

    Returns
    -------
    list of str
        Empty for a latent that never fired.
    """
    texts: dict[int, str] = {}
    labels = []
    for tokens in scores.top_tokens(4 * n, by=by):
        shares: dict[str, float] = {}
        for token, share in tokens:
            if token not in texts:
                texts[token] = shown_token(decode(token))
            shares[texts[token]] = shares.get(texts[token], 0.0) + share
        kept = [text for place, (text, share) in enumerate(shares.items()) if not place or share >= least_share]
        labels.append(" · ".join(f"`{text}`" for text in kept[:n]))
    return labels


def shown_token(text: str) -> str:
    """Return a token's text without the space around it; white space alone is written as in a string literal."""
    return text.strip() if text.strip() else repr(text)[1:-1]


def shifted(codes: Codes, *, seed: int = 0) -> Codes:
    """Density-matched shuffled codes: every latent's codes moved along the rows by a random step of its own, around.

    Each latent keeps its activations, how often it fires and how its firings follow each other; what they fell on is
    lost.

    Parameters
    ----------
    codes
        Number of all rows: the shift is over all of them.
    seed
        Random seed of the steps.
    """
    n, generator = max(codes.n_rows, 1), torch.Generator().manual_seed(seed)
    step = torch.randint(0, n, (codes.n_latents,), generator=generator).to(codes.indices.device)
    row = (codes.row_of() + step[codes.indices]) % n
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=codes.n_rows)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(offsets, codes.indices[order], codes.values[order], codes.n_latents)


# -------------------------------------------------------------------------------------------------- held-out detection


def token_detection(learned: TokenScores, scored: TokenScores, *, n: int | None = None) -> Tensor:
    """How well tokens tell where a latent fires, in documents that the tokens were not learned from.

    Rows of `scored` are ordered by how often the latent fired on their token in `learned` (one pseudo-row at the
    latent's own rate keeps a token seen once from being certain); the score is the area under the ROC curve of that
    order: 0.5 is chance, 1 where the token alone decides. High: a lexical latent; low: one that needs context, or none
    at all.

    Parameters
    ----------
    learned
        Codes on some documents.
    scored
        Codes of the same latents on others.
    n
        Only the `n` best tokens of each latent count, as a label names them; None for all.

    Returns
    -------
    Tensor
        ``float64 [n_latents]`` in [0, 1]; NaN for latents that fire on no or on all rows of `scored`, or on none of
        `learned`.

    Raises
    ------
    ShapeError
        The two are of different numbers of latents.
    """
    if learned.n_latents != scored.n_latents:
        raise ShapeError(
            f"token_detection: both must be of one SAE; they are of {learned.n_latents} and {scored.n_latents} latents."
        )
    size = learned.n_latents
    latent, token, _, firings = learned.pairs()
    fires = np.bincount(latent, firings, size)
    own_rate = fires / max(learned.n_rows, 1)
    rate = (firings + own_rate[latent]) / (learned.token_counts[token] + 1) if len(latent) else firings
    if n is not None:
        order = np.lexsort((token, -rate, latent))
        starts = np.searchsorted(latent, np.arange(size))
        place = np.empty(len(latent), dtype=np.int64)
        place[order] = np.arange(len(latent)) - starts[latent[order]]
        kept = place < n
        latent, token, rate = latent[kept], token[kept], rate[kept]
    their_latent, their_token, _, their_firings = scored.pairs()
    counts = np.zeros(max(len(scored.token_counts), int(token.max()) + 1 if len(token) else 1))
    counts[: len(scored.token_counts)] = scored.token_counts
    their_keys = (their_latent << TOKEN_BITS) | their_token
    keys = (latent << TOKEN_BITS) | token
    at = np.searchsorted(their_keys, keys)
    inside = np.minimum(at, max(len(their_keys) - 1, 0))
    hit = their_keys[inside] == keys if len(their_keys) else np.zeros(len(keys), dtype=bool)
    positive = np.where(hit, their_firings[inside], 0.0) if len(their_keys) else np.zeros(len(keys))
    negative = counts[token] - positive
    # Every other row has a token on which the latent never fired: one group, below all others.
    their_fires = np.bincount(their_latent, their_firings, size)
    rest_negative = scored.n_rows - their_fires - np.bincount(latent, negative, size)
    rest_positive = their_fires - np.bincount(latent, positive, size)
    order = np.lexsort((rate, latent))
    latent, rate, positive, negative = latent[order], rate[order], positive[order], negative[order]
    tied = np.cumsum(np.concatenate([[True], (latent[1:] != latent[:-1]) | (rate[1:] != rate[:-1])])) - 1
    tied = tied[: len(latent)]
    groups = int(tied[-1]) + 1 if len(tied) else 0
    group_latent = np.zeros(groups, dtype=np.int64)
    group_latent[tied] = latent
    group_positive, group_negative = np.bincount(tied, positive, groups), np.bincount(tied, negative, groups)
    before = np.cumsum(group_negative) - group_negative
    first = np.searchsorted(group_latent, np.arange(size))
    start = np.concatenate([before, [group_negative.sum()]])[first]
    lower = before - start[group_latent] + rest_negative[group_latent]
    wins = rest_positive * rest_negative / 2 + np.bincount(
        group_latent, group_positive * (lower + group_negative / 2), size
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = wins / (their_fires * (scored.n_rows - their_fires))
    return torch.from_numpy(np.where((fires > 0) & np.isfinite(auc), auc, math.nan))


class Cohesion:
    """How alike the contexts are on which a latent fires: the mean cosine of their embeddings, weighted by activation.

    ``sum_{i<k} a_i a_k cos(e_i, e_k) / sum_{i<k} a_i a_k`` (MonoSemanticity), from sums over rows alone:
    ``(||sum a e||^2 - sum a^2) / ((sum a)^2 - sum a^2)`` with e of length 1.

    Parameters
    ----------
    n_latents
        Width of the codes.
    d
        Width of the embeddings; memory is ``n_latents * d`` float64.
    """

    def __init__(self, n_latents: int, d: int) -> None:
        self._codes = torch.zeros(n_latents, d, dtype=torch.float64)
        self._all = torch.zeros(d, dtype=torch.float64)
        self._sums = torch.zeros(2, n_latents, dtype=torch.float64)
        self._n_rows = 0

    def update(self, codes: Codes, embedding: Tensor) -> None:
        """Add codes of n rows with the embedding ``[n, d]`` of each row's context; a row of zeros stays zero.

        Raises
        ------
        ShapeError
            Another number of rows, another width.
        """
        n_latents, d = self._codes.shape
        if codes.n_latents != n_latents or tuple(embedding.shape) != (codes.n_rows, d):
            raise ShapeError(
                f"Cohesion: codes of {n_latents} latents and embeddings ({codes.n_rows}, {d}) are needed; "
                f"got {codes.n_latents} latents and {tuple(embedding.shape)}."
            )
        e = double(embedding).cpu()
        e = e / e.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        z = abs(codes.to_scipy().astype(np.float64))
        self._codes += torch.from_numpy(np.asarray(z.T @ e.numpy()))
        self._all += e.sum(0)
        self._sums[0] += torch.from_numpy(np.asarray(z.sum(0)).ravel())
        self._sums[1] += torch.from_numpy(np.asarray(z.multiply(z).sum(0)).ravel())
        self._n_rows += codes.n_rows

    def merge(self, other: Cohesion) -> None:
        """Add what `other`, of the same shape, saw."""
        self._codes += other._codes
        self._all += other._all
        self._sums += other._sums
        self._n_rows += other._n_rows

    def compute(self) -> tuple[Tensor, float]:
        """Return the mean cosine of every latent, ``float64 [n_latents]``, and of all pairs of rows.

        The first is NaN below two firings. The second is what a latent that fires anywhere has.
        """
        total, squares = self._sums
        pairs = total**2 - squares
        cosine = torch.where(pairs > 1e-12 * total**2, (self._codes.square().sum(1) - squares) / pairs, math.nan)
        n = self._n_rows
        everything = float((self._all.square().sum() - n) / (n * (n - 1))) if n > 1 else math.nan
        return cosine, everything
