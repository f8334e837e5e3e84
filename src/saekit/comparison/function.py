"""Whether matched latents do the same: on the rows, whatever their cosine.

Three questions, each against pairs that belong to nobody: decode the codes of one SAE with the partners' decoder rows;
compare the rows on which partners fire most; match by firing together instead of by cosine. `fingerprints` asks a
fourth, of a language model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..matching.assignment import Graph, solve
from ..matching.matching import Matching
from ..matching.shared import have_signs
from ..measure.accumulators import Moments, Reconstruction
from ..measure.intervals import Estimate, Sample, document_sample, wilson_interval
from ..measure.results import Measured
from ..randomness import random_order
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.parts import in_equal_parts
from .intervals import OverPairs, over_latents, standard_error
from .pairs import MatchedPair
from .result import Pair

if TYPE_CHECKING:
    import scipy.sparse

FUNCTION = {
    "fvu_own": "FVU of the first SAE; of a crosscoder in the units of its training, in which sources weigh alike",
    "fvu_partners": "FVU of its codes decoded with the partners' decoder rows, at its own rows' lengths",
    "fvu_random": "the same with the partners permuted",
    "fvu_recovered": "(fvu_random - fvu_partners) / (fvu_random - fvu_own): 1 where partners serve as well",
    "ce_own": "cross-entropy of the language model with the reconstructions of the first SAE",
    "ce_partners": "the same, decoded with the partners' decoder rows",
    "ce_random": "the same, with the partners permuted",
    "ce_recovered": "(ce_random - ce_partners) / (ce_random - ce_own)",
    "top_overlap": "fraction of the rows on which a latent fires most that are among those of its partner",
    "top_overlap_random": "the same with partners exchanged among latents that fire about as often",
    "coactivation": "cosine of the codes of partners over the rows: how much they fire together",
    "coactivation_random": "the same with partners exchanged among latents that fire about as often",
    "coactivation_best": "the same of the one-to-one matching with the largest sum of them",
    "coactivation_agrees": "fraction of live latents that this matching gives the partner that the decoders give",
    "coactivation_agrees_shared": "the same among shared latents",
    "fingerprint": "correlation of what ablating partners does to next-token log-probabilities, each at its top tokens",
    "fingerprint_random": "the same with partners exchanged among latents that fire about as often",
    "fingerprint_ceiling": "correlation of the two halves of a latent's top tokens, stepped up (Spearman-Brown)",
    "fingerprint_shared": "`fingerprint` among shared latents",
    "fingerprint_orphans": "`fingerprint` among latents that are not shared",
}
"""What `Pair.function` and `Comparison.function` hold, by name."""

TOP_ROWS = 16
"""Rows on which a latent fires most, that overlaps are counted over."""

LEAST_COACTIVATION = 0.1
"""Pairs of latents that fire together less than that do not count as candidates of the matching by co-activation."""

COACTIVATION_PRODUCTS = 2**25
"""Products of codes that co-activations are summed from, at most; with more, rows are sampled evenly."""

NEIGHBOURS = 16
"""Latents of about equal frequency among which partners are exchanged."""


@dataclass(frozen=True)
class Partners:
    """Matched latents of two SAEs, in step, and a control of pairs that belong to nobody."""

    mine: np.ndarray
    """Latents of the first SAE that have a partner by their decoder rows."""
    theirs: np.ndarray
    """Their partners."""
    random: np.ndarray
    """The partners exchanged, each for another one."""

    @classmethod
    def of(cls, matching: Matching, key: int, frequency: np.ndarray | None = None) -> Partners:
        """Exchange partners at random; with `frequency` (of the second SAE) among those that fire about as often."""
        mine = (matching.partner >= 0).nonzero().squeeze(1).numpy()
        theirs = matching.partner[mine].numpy()
        return cls(mine, theirs, exchanged(theirs, key, None if frequency is None else frequency[theirs]))


def exchanged(theirs: np.ndarray, key: int, frequency: np.ndarray | None = None) -> np.ndarray:
    """Return partners in another order, none where it was; with `frequency` among those of about the same."""
    order = random_order(len(theirs), "random pairs", key)
    parts = [order]
    if frequency is not None:
        order = order[np.argsort(frequency[order], kind="stable")]
        parts = np.array_split(order, max(1, len(order) // NEIGHBOURS))
    random = theirs.copy()
    for part in parts:
        random[part] = theirs[np.roll(part, 1)]
    return random


def substituted(first: SAE, second: SAE, mine: np.ndarray, theirs: np.ndarray) -> SAE:
    """Return the first SAE with decoder rows of the second in place of its own, at the lengths of its own."""
    rows = second.W_dec.to(first.W_dec)[torch.from_numpy(theirs)]
    at = torch.from_numpy(mine).to(first.device)
    lengths = first.W_dec[at].norm(dim=1, keepdim=True)
    if have_signs(first, second):  # the way round that its own point
        rows = torch.where((rows * first.W_dec[at]).sum(1, keepdim=True) < 0, -rows, rows)
    W = first.W_dec.clone()
    W[at] = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) * lengths
    return first.replace(W_dec=W)


def variants_of(saes: Sequence[SAE], pair: MatchedPair, seed: int) -> list[SAE]:
    """Return the first SAE of a pair: as it is, with its partners' decoder rows, with permuted partners'."""
    partners = Partners.of(pair.decoder.matching, seed)
    first, second = saes[pair.first], saes[pair.second]
    return [
        first,
        substituted(first, second, partners.mine, partners.theirs),
        substituted(first, second, partners.mine, partners.random),
    ]


def recovered(own: Estimate, partners: Estimate, random: Estimate) -> Estimate:
    """Return how much of the way from random pairs to the SAE itself the partners go."""
    value = _fraction(own.value, partners.value, random.value)
    left_out = None
    if own.left_out is not None and partners.left_out is not None and random.left_out is not None:
        left_out = _fraction(own.left_out, partners.left_out, random.left_out)
    sample = own.sample or Sample(np.ones(1), None, own.reason)
    return sample.estimate(float(value), left_out, undefined="random pairs do as well as the SAE itself")


def _fraction(own: Any, partners: Any, random: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(random - partners, random - own)


class Substitution:
    """Reconstructs rows from the codes of the first SAE of each pair, with three decoders."""

    def __init__(self, saes: Sequence[SAE], matched: Sequence[MatchedPair], seed: int) -> None:
        self.like = saes[0]
        self.moments = Moments(saes[0].d_out)
        self.pairs = [(pair.first, variants_of(saes, pair, seed)) for pair in matched]
        self.is_known = True
        self.errors = [[self._error() for _ in variants] for _, variants in self.pairs]

    def _error(self) -> Reconstruction:
        return Reconstruction(self.moments.d, moments=self.moments)

    def update(self, x: Tensor, target: Tensor, groups: tuple[Tensor, bool], codes: Sequence[Codes]) -> None:
        """Add rows, what should be made of them, their `row_groups`, and their codes in every SAE."""
        group, by_document = groups
        self.is_known &= by_document
        wanted = in_equal_parts(self.like, target.to(self.like.device)).to(target)
        self.moments.update(wanted, group)
        for (first, variants), errors in zip(self.pairs, self.errors, strict=True):
            for variant, error in zip(variants, errors, strict=True):
                given = variant.decode(codes[first], x.to(variant.dtype)).float()
                error.update(wanted, in_equal_parts(self.like, given), group)

    def compute(self) -> list[dict[str, Measured]]:
        """Return for each pair ``fvu_own``, ``fvu_partners``, ``fvu_random``, ``fvu_recovered``."""
        sample = document_sample(self.moments.rows_per_group, is_known=self.is_known)
        found = []
        for errors in self.errors:
            own, partners, random = (error.compute(sample)["fvu"] for error in errors)
            found.append(costs_of("fvu", "fraction", own, partners, random))
        return found


def costs_of(name: str, unit: str, own: Estimate, partners: Estimate, random: Estimate) -> dict[str, Measured]:
    """Return the three costs of a substitution and the fraction recovered, by name."""
    each = {"own": own, "partners": partners, "random": random}
    costs = {f"{name}_{kind}": estimate.measured(unit, least=0.0) for kind, estimate in each.items()}
    return costs | {f"{name}_recovered": recovered(own, partners, random).measured("fraction")}


def acting_together(
    pair: MatchedPair,
    codes: tuple[scipy.sparse.csr_matrix, scipy.sparse.csr_matrix],
    shared: np.ndarray,
    seed: int,
    signed: bool = False,
) -> dict[str, Measured]:
    """Return how much partners fire together and on which rows they fire most, of latents of which both fire.

    Parameters
    ----------
    pair
        The matching by decoder rows.
    codes
        Codes of both SAEs on the same rows.
    shared
        ``bool [n_latents]`` which latents of the first SAE are shared.
    seed
        Seed of the exchanged partners.
    signed
        Whether a latent and its negative are the same in both SAEs: cosines of codes are then absolute.
    """
    frequency = [np.diff(each.tocsc().indptr) / max(each.shape[0], 1) for each in codes]
    partners = Partners.of(pair.decoder.matching, seed, frequency[1])
    live = (frequency[0][partners.mine] > 0) & (frequency[1][partners.theirs] > 0)
    together = abs(_cosines(*codes)) if signed else _cosines(*codes)
    best = _matched(together)
    mine, theirs = partners.mine[live], partners.theirs[live]
    agrees = best[mine] == theirs
    both = (frequency[0][partners.mine] > 0) & (frequency[1][partners.random] > 0)
    fires, random = partners.mine[both], partners.random[both]
    has_partner = np.flatnonzero(best >= 0)
    return {
        "top_overlap": mean_over_latents(_overlaps(codes, mine, theirs), "fraction"),
        "top_overlap_random": mean_over_latents(_overlaps(codes, fires, random), "fraction"),
        "coactivation": mean_over_latents(_entries(together, mine, theirs)),
        "coactivation_random": mean_over_latents(_entries(together, fires, random)),
        "coactivation_best": mean_over_latents(_entries(together, has_partner, best[has_partner])),
        "coactivation_agrees": _counted(agrees),
        "coactivation_agrees_shared": _counted(agrees[shared[mine]]),
    }


def _cosines(one: scipy.sparse.csr_matrix, other: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Return the cosines of the codes of every two latents that fire together, over rows sampled evenly."""
    import scipy.sparse

    products = float(np.dot(np.diff(one.indptr).astype(float), np.diff(other.indptr)))
    step = max(1, math.ceil(products / COACTIVATION_PRODUCTS))
    parts = []
    for each in (one[::step], other[::step]):
        norms = np.sqrt(np.asarray(each.power(2).sum(axis=0)).ravel())
        parts.append(each @ scipy.sparse.diags_array(1 / np.where(norms > 0, norms, 1)))
    return (parts[0].T @ parts[1]).tocsr()


def _matched(together: scipy.sparse.csr_matrix) -> np.ndarray:
    """Return the partner of each latent in the matching with the largest sum of cosines of codes; -1 for none."""
    n, m = together.shape
    swapped = n > m
    edges = (together.T if swapped else together).tocoo()
    n, m = edges.shape
    kept = edges.data >= LEAST_COACTIVATION
    # One more column for each row, of weight 0: to have no partner is allowed.
    rows = np.concatenate([edges.row[kept], np.arange(n)]).astype(np.int64)
    columns = np.concatenate([edges.col[kept], m + np.arange(n)]).astype(np.int64)
    weights = np.concatenate([edges.data[kept], np.zeros(n)])
    keys = rows * (m + n) + columns
    order = np.argsort(keys)
    mate = solve(Graph(n, m + n, keys[order], weights[order])).mate
    mate = np.where(mate < m, mate, -1)
    if not swapped:
        return mate
    partner = np.full(m, -1, np.int64)
    partner[mate[mate >= 0]] = np.flatnonzero(mate >= 0)
    return partner


def _overlaps(
    codes: tuple[scipy.sparse.csr_matrix, scipy.sparse.csr_matrix], mine: np.ndarray, theirs: np.ndarray
) -> np.ndarray:
    """Return which fraction of the top rows of a latent are top rows of its partner, where either has enough."""
    tops = [_top_rows(each) for each in codes]
    a, b = tops[0][:, mine], tops[1][:, theirs]
    counts = np.minimum(*(np.asarray(each.sum(axis=0)).ravel() for each in (a, b)))
    enough = counts >= TOP_ROWS
    return np.asarray(a.multiply(b).sum(axis=0)).ravel()[enough] / TOP_ROWS


def _top_rows(codes: scipy.sparse.csr_matrix) -> scipy.sparse.csc_matrix:
    """Return a table of the `TOP_ROWS` rows on which each latent fires most, 1 where it is one of them."""
    import scipy.sparse

    columns = codes.tocsc()
    latent = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    order = np.lexsort((columns.indices, -np.abs(columns.data), latent))
    rank = np.arange(len(order)) - columns.indptr[latent[order]]
    kept = order[rank < TOP_ROWS]
    ones = np.ones(len(kept))
    return scipy.sparse.csc_matrix((ones, (columns.indices[kept], latent[kept])), shape=columns.shape)


def _entries(table: scipy.sparse.csr_matrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.asarray(table[rows, columns]).ravel() if len(rows) else np.empty(0)


def mean_over_latents(values: np.ndarray, unit: str = "cosine") -> Measured:
    """Return a mean over latents with its interval."""
    if not len(values):
        return Measured(math.nan, None, None, unit, "undefined: there are no such latents")
    each = torch.from_numpy(np.asarray(values, np.float64))
    least = 0.0 if unit == "fraction" else -1.0
    return over_latents(float(each.mean()), standard_error(each), least=least, unit=unit)


def function_of(pairs: Sequence[Pair], over: OverPairs) -> dict[str, Measured]:
    """Return the means over pairs of what partners do, by name; of a measure that some pairs lack, over the others."""
    found = {}
    for name in FUNCTION:
        has = [at for at, pair in enumerate(pairs) if name in pair.function and pair.function[name].is_defined]
        if has:
            part = OverPairs([over.pairs[at] for at in has], over.n_saes)
            found[name] = part.mean([pairs[at].function[name] for at in has], *_range(name))
    return found


def _range(name: str) -> tuple[float, float]:
    """Return between what a measure of `FUNCTION` lies."""
    if name.endswith("_recovered"):
        return -math.inf, math.inf
    if name.startswith(("fvu", "ce")):
        return 0.0, math.inf
    return (0.0 if name.startswith(("top", "coactivation_agrees")) else -1.0), 1.0


def _counted(which: np.ndarray) -> Measured:
    if not len(which):
        return Measured(math.nan, None, None, "fraction", "undefined: there are no such latents")
    return wilson_interval(int(which.sum()), len(which))
