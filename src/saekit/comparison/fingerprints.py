"""What ablating a latent does to a language model, and whether its partner in another SAE does the same.

The fingerprint of a latent is the mean change of next-token log-probabilities, a vector over the vocabulary, when
``z_j d_j`` is taken away at the tokens at which it fires most. Partners' fingerprints are taken at their own top tokens
and correlated; so are those of partners exchanged among latents that fire about as often, and the two halves of a
latent's own tokens, which is as alike as two latents can be expected to be.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..matching.shared import SharedRule
from ..measure.controls import reconstructor_of
from ..measure.fidelity import BATCH_TOKENS, LOGITS, SplicedModel, contexts_for, measure_fidelity, predicted_tokens
from ..measure.normal_equations import column_factors, row_factors
from ..measure.results import Measured
from ..models.hooks import activations, find_hook
from ..models.intervene import splice
from ..models.language import LanguageModel
from ..randomness import random_order
from ..rows.settings import TokenMask
from ..rows.tokens import CONTEXT, Contexts, places_of, token_batches
from ..sae.model import SAE
from ..settings import Progress
from .function import costs_of, exchanged, mean_over_latents, variants_of
from .pairs import MatchedPair
from .settings import FunctionSettings

if TYPE_CHECKING:
    import scipy.sparse

LEAST_TOKENS = 4
"""Tokens at which either of two partners must fire, at least, for a fingerprint."""


def in_the_model(
    saes: Sequence[SAE],
    matched: Sequence[MatchedPair],
    rule: SharedRule,
    spliced: SplicedModel,
    settings: FunctionSettings,
    progress: Progress | None = None,
) -> list[dict[str, Measured]]:
    """Return for each pair what partners do in a language model: cross-entropies of substitution, and fingerprints.

    Parameters
    ----------
    saes, matched, rule
        The SAEs, the pairs of them that are tested, when latents count as shared.
    spliced
        The language model, where the SAEs belong in it, and texts.
    settings
        How many tokens and latents.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"tokens"`` and ``"fingerprints"``.

    Raises
    ------
    DataError
        The texts give no tokens.
    """
    costs = _costs(saes, matched, spliced, settings, progress)
    fingerprints = _Fingerprints(saes, spliced, settings)
    found = []
    for number, (pair, cost) in enumerate(zip(matched, costs, strict=True)):
        found.append(cost | fingerprints.compare(pair, rule))
        if progress is not None:
            progress("fingerprints", number + 1, len(matched))
    return found


def _costs(
    saes: Sequence[SAE],
    matched: Sequence[MatchedPair],
    spliced: SplicedModel,
    settings: FunctionSettings,
    progress: Progress | None,
) -> list[dict[str, Measured]]:
    """Return the cross-entropies of each pair's first SAE with its own and its partners' decoder rows."""
    variants = [variant for pair in matched for variant in variants_of(saes, pair, settings.seed)]
    mean = torch.zeros(saes[0].d_out, device=saes[0].device)  # what mean-ablation puts in: not asked for here
    estimates, _ = measure_fidelity(
        spliced, [reconstructor_of(str(at), sae) for at, sae in enumerate(variants)], mean, intervals=True,
        progress=progress,
    )  # fmt: skip
    return [costs_of("ce", "nats per token", *(each["ce_sae"] for each in part)) for part in _threes(estimates)]


def _threes(values: Sequence[dict]) -> list[Sequence[dict]]:
    return [values[start : start + 3] for start in range(0, len(values), 3)]


@dataclass(frozen=True)
class _Seen:
    """What one SAE does at the tokens of the contexts."""

    codes: scipy.sparse.csc_matrix
    """Codes ``[tokens of all contexts, n_latents]``."""
    factors: np.ndarray
    """What one unit of decoder output is in a row, by token."""

    def top(self, latent: int, most: int) -> np.ndarray:
        """Return the tokens at which a latent fires most, strongest first."""
        part = slice(self.codes.indptr[latent], self.codes.indptr[latent + 1])
        order = np.argsort(-np.abs(self.codes.data[part]), kind="stable")
        return self.codes.indices[part][order[:most]]

    def fires(self) -> np.ndarray:
        """Return the number of tokens at which each latent fires."""
        return np.diff(self.codes.indptr)


@dataclass
class _Fingerprints:
    """Fingerprints of latents, made when they are asked for."""

    saes: Sequence[SAE]
    spliced: SplicedModel
    settings: FunctionSettings
    seen: list[_Seen] = field(init=False)
    contexts: Contexts = field(init=False)
    made: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By SAE and latent: both halves of its tokens, ``float32 [2, vocabulary]``."""

    def __post_init__(self) -> None:
        lm, texts = self.spliced.lm, self.spliced.texts
        assert texts is not None
        length = min(self.spliced.rows.get("context") or CONTEXT, lm.context, self.settings.context)
        self.contexts = contexts_for(lm, texts, length, self.settings.tokens, TokenMask.by(self.spliced.rows))
        if not int(predicted_tokens(self.contexts).sum()):
            raise DataError(f"`{texts.info['name']}` must hold texts of at least two tokens; it holds none.")
        self.seen = self._encoded(lm)

    def _encoded(self, lm: LanguageModel) -> list[_Seen]:
        import scipy.sparse

        hook = find_hook(lm.model, self.spliced.hook)
        n = len(self.contexts.ids)
        parts: list[list[scipy.sparse.coo_matrix]] = [[] for _ in self.saes]
        factors = [np.ones(n, np.float32) for _ in self.saes]
        for batch in token_batches(lm, self.contexts):
            (hidden,) = activations(lm.model, [hook], batch.inputs)
            rows, places = hidden[batch.keep].float(), places_of(self.contexts, batch)
            for at, sae in enumerate(self.saes):
                x = rows.to(sae.device, sae.dtype)
                with torch.no_grad():
                    found = sae.encode(x).to("cpu").to_scipy().tocoo()
                    factors[at][places] = row_factors(sae, x).float().cpu().numpy()
                shape = (n, sae.n_latents)
                parts[at].append(scipy.sparse.coo_matrix((found.data, (places[found.row], found.col)), shape=shape))
        return [_Seen(sum(part).tocsc(), factor) for part, factor in zip(parts, factors, strict=True)]

    def compare(self, pair: MatchedPair, rule: SharedRule) -> dict[str, Measured]:
        """Correlate the fingerprints of partners."""
        shared = pair.shared(rule).numpy()
        mine = self._chosen(pair, shared)
        theirs = pair.decoder.matching.partner.numpy()[mine]
        fires = self.seen[pair.second].fires()[theirs].astype(float)
        random = exchanged(theirs, self.settings.seed, fires)
        self._make(pair.first, mine)
        self._make(pair.second, theirs)

        def correlations(others: np.ndarray) -> np.ndarray:
            return np.array(
                [
                    _correlation(self.made[pair.first, int(j)].mean(0), self.made[pair.second, int(k)].mean(0))
                    for j, k in zip(mine, others, strict=True)
                ]
            )

        found = correlations(theirs)
        halves = [self.made[at, int(j)] for at, js in ((pair.first, mine), (pair.second, theirs)) for j in js]
        within = np.array([_correlation(*each) for each in halves])
        unmoved = random == theirs  # a single pair cannot be exchanged
        return {
            "fingerprint": mean_over_latents(found, "correlation"),
            "fingerprint_random": mean_over_latents(correlations(random)[~unmoved], "correlation"),
            "fingerprint_ceiling": mean_over_latents(2 * within / (1 + np.maximum(within, 0)), "correlation"),
            "fingerprint_shared": mean_over_latents(found[shared[mine]], "correlation"),
            "fingerprint_orphans": mean_over_latents(found[~shared[mine]], "correlation"),
        }

    def _chosen(self, pair: MatchedPair, shared: np.ndarray) -> np.ndarray:
        """Return latents whose partner fires often enough too, as many of either kind where there are that many."""
        partner = pair.decoder.matching.partner.numpy()
        mine = np.flatnonzero(partner >= 0)
        one, other = (self.seen[at].fires() for at in (pair.first, pair.second))
        mine = mine[(one[mine] >= LEAST_TOKENS) & (other[partner[mine]] >= LEAST_TOKENS)]
        mine = mine[random_order(len(mine), "fingerprints", self.settings.seed)]
        kinds = [mine[shared[mine]], mine[~shared[mine]]]
        turns = itertools.zip_longest(*(each.tolist() for each in kinds))
        taken = [latent for both in turns for latent in both if latent is not None]
        return np.array(sorted(taken[: self.settings.latents]), np.int64)

    def _make(self, at: int, latents: np.ndarray) -> None:
        """Make the fingerprints of some latents of an SAE that are not made yet."""
        wanted = [int(latent) for latent in latents if (at, int(latent)) not in self.made]
        tokens = [self.seen[at].top(latent, self.settings.tops) for latent in wanted]
        where = np.concatenate([np.empty(0, np.int64), *tokens])
        change = np.concatenate([np.empty((0,), np.float32), *(self._codes(at, j, t) for j, t in zip(wanted, tokens))])
        rows = self._written(at, np.repeat(wanted, [len(each) for each in tokens]), where, change)
        sums = torch.zeros(2 * len(wanted), self._vocabulary())
        slots = np.concatenate([np.empty(0, np.int64), *(2 * i + np.arange(len(t)) % 2 for i, t in enumerate(tokens))])
        for index, moved in self._moved(where, rows):
            sums.index_add_(0, torch.from_numpy(slots[index].astype(np.int64)), moved)
        counts = np.bincount(slots.astype(np.int64), minlength=len(sums))
        sums /= torch.from_numpy(np.maximum(counts, 1))[:, None]
        for number, latent in enumerate(wanted):
            self.made[at, latent] = sums[2 * number : 2 * number + 2]

    def _codes(self, at: int, latent: int, tokens: np.ndarray) -> np.ndarray:
        return np.asarray(self.seen[at].codes[tokens, [latent] * len(tokens)], np.float32).ravel()

    def _written(self, at: int, latents: np.ndarray, tokens: np.ndarray, codes: np.ndarray) -> Tensor:
        """Return what each latent writes at its token, in the units of the rows, ``[n, d_out]``."""
        sae, factors = self.saes[at], self.seen[at].factors[tokens.astype(np.int64)]
        W = sae.W_dec[torch.as_tensor(latents, dtype=torch.int64, device=sae.device)].float()
        scale = torch.from_numpy(codes * factors).to(W.device)
        return W * scale[:, None] * column_factors(sae).float()

    def _vocabulary(self) -> int:
        return int(self.spliced.lm.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    def _moved(self, where: np.ndarray, rows: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield which of the tokens these are, and the change of the log-probabilities of what follows each."""
        lm = self.spliced.lm
        contexts = _up_to(self.contexts, where.astype(np.int64))
        hook = self.spliced.target or self.spliced.hook
        most = max(int(contexts.lengths().max(initial=1)), min(BATCH_TOKENS, LOGITS // self._vocabulary()))
        for batch in token_batches(lm, contexts, batch_tokens=most):
            index = np.array(batch.index)
            last = torch.from_numpy(contexts.lengths()[index] - 1).to(lm.device)
            own = torch.arange(len(index), device=lm.device)
            mask = torch.zeros_like(batch.keep)
            mask[own, last] = True
            taken = rows[torch.from_numpy(index)].to(lm.device)
            with torch.no_grad():
                clean = lm.model(**batch.inputs).logits[own, last].float().log_softmax(1)
                with splice(lm, hook, lambda x: x.float() - taken.to(x.device), mask=mask):  # noqa: B023
                    ablated = lm.model(**batch.inputs).logits[own, last].float().log_softmax(1)
            yield index, (ablated - clean).cpu()


def _up_to(contexts: Contexts, tokens: np.ndarray) -> Contexts:
    """Return for each of some tokens its context, up to and including it: what comes later cannot matter."""
    first = contexts.offsets[np.searchsorted(contexts.offsets, tokens, side="right") - 1]
    spans = [np.arange(start, token + 1) for start, token in zip(first, tokens, strict=True)]
    where = np.concatenate([np.empty(0, np.int64), *spans]).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum([len(span) for span in spans])]).astype(np.int64)
    return Contexts(contexts.ids[where], contexts.document[where], contexts.position[where], offsets)


def _correlation(one: Tensor, other: Tensor) -> float:
    """Return the Pearson correlation of two vectors; 0 where one is constant."""
    a, b = (each.double() - each.double().mean() for each in (one, other))
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths > 0 else 0.0
