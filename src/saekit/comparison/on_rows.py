"""How alike SAEs act on the same rows: correlations of matched latents, CKA, RSA."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..matching.matching import Matching
from ..matching.shared import SharedRule, have_signs
from ..measure.intervals import row_groups, wilson_interval
from ..measure.results import Measured
from ..measure.similarity import linear_cka, rsa
from ..rows.opening import target_rows
from ..rows.source import Columns, Source
from ..sae.codes import Codes
from ..sae.model import SAE
from ..settings import Progress
from .function import Substitution, acting_together, mean_over_latents
from .intervals import over_latents, standard_error
from .pairs import MatchedPair
from .result import OnRows
from .settings import ComparisonSettings

if TYPE_CHECKING:
    import scipy.sparse

SAMPLE_ROWS = 512
"""Rows that are compared with each other for CKA and RSA."""


@dataclass(frozen=True)
class Activity:
    """What SAEs do on the same rows."""

    on_rows: list[OnRows]
    """Per pair."""
    n_rows: int
    """Rows seen."""
    frequency: list[list[float]]
    """Per SAE and latent: fraction of rows on which it fires."""
    function: list[dict[str, Measured]]
    """Per pair: whether partners do the same; see `FUNCTION`."""


NOT_SEEN = Activity([], 0, [], [])
"""Without rows."""


class _CodeSums:
    """Sums over rows of the codes of one SAE, and a sample of its codes."""

    def __init__(self, sae: SAE) -> None:
        self.sae = sae
        self.sum, self.squares, self.fired = np.zeros((3, sae.n_latents))
        self.samples: list[Codes] = []
        self.parts: list[scipy.sparse.csr_matrix] = []

    def update(self, x: Tensor, sampled: Tensor) -> None:
        """Add rows; those at the indices `sampled` are kept."""
        with torch.no_grad():
            self.codes = self.sae.encode(x.to(self.sae.device))
        codes = self.codes.to("cpu")
        self.last = codes.to_scipy().astype(np.float64)
        self.parts.append(codes.to_scipy().astype(np.float32))
        self.samples.append(codes.rows(sampled))
        self.sum += self.last.sum(axis=0)
        self.squares += self.last.power(2).sum(axis=0)
        self.fired += np.bincount(codes.indices.numpy(), minlength=codes.n_latents)

    def all_codes(self) -> scipy.sparse.csr_matrix:
        """Return the codes of all rows."""
        import scipy.sparse

        return scipy.sparse.vstack(self.parts, format="csr")

    def sample(self) -> Codes:
        """Return the codes that were kept."""
        return Codes.cat(self.samples).rows(slice(SAMPLE_ROWS))


def act_on(
    saes: Sequence[SAE],
    matched: Sequence[MatchedPair],
    rule: SharedRule,
    source: Source,
    settings: ComparisonSettings,
    progress: Progress | None,
) -> Activity:
    """Compare what SAEs do on rows, in one pass for all of them.

    Raises
    ------
    DataError
        No rows.
    """
    sums = [_CodeSums(sae) for sae in saes]
    products = [np.zeros(len(pair.decoder.matching.partner)) for pair in matched]
    groups: list[np.ndarray] = []
    n_rows = 0
    substitution = None
    for columns, group, sampled in _sampled_batches(source, settings, progress):
        x = columns.x
        groups.append(group[0][sampled].numpy())
        for each in sums:
            each.update(x, sampled)
        if not n_rows and (columns.target is not None or not saes[0].is_transcoder):
            substitution = Substitution(saes, matched, settings.seed)
        if substitution is not None:
            substitution.update(x, target_rows(columns, saes[0]), group, [each.codes for each in sums])
        for pair, product in zip(matched, products, strict=True):
            mine, theirs = _partners(pair.decoder.matching)
            both = sums[pair.first].last[:, mine].multiply(sums[pair.second].last[:, theirs])
            product[mine] += np.asarray(both.sum(axis=0)).ravel()
        n_rows += len(x)
    if not n_rows:
        raise DataError("compare: there must be at least one row; the source has none. Is the data empty?")
    documents = np.concatenate(groups)[:SAMPLE_ROWS]
    samples = [each.sample() for each in sums]
    on_rows = []
    for pair, product in zip(matched, products, strict=True):
        signed = have_signs(sums[pair.first].sae, sums[pair.second].sae)
        similarity = _similarity(samples[pair.first], samples[pair.second], documents, signed)
        correlation, n_pairs = _correlation(pair, sums, product, n_rows)
        on_rows.append(OnRows(correlation, n_pairs, *similarity, _shared_alive(pair, rule, sums), _pw_mcc(pair, sums)))
    frequency = [[round(float(n), 9) for n in each.fired / n_rows] for each in sums]
    return Activity(on_rows, n_rows, frequency, _function(matched, rule, sums, substitution, settings.seed))


def _function(
    matched: Sequence[MatchedPair],
    rule: SharedRule,
    sums: Sequence[_CodeSums],
    substitution: Substitution | None,
    seed: int,
) -> list[dict[str, Measured]]:
    """Return for each pair whether partners do the same on the rows."""
    costs = [{} for _ in matched] if substitution is None else substitution.compute()
    codes = [each.all_codes() for each in sums]
    return [
        cost
        | acting_together(
            pair,
            (codes[pair.first], codes[pair.second]),
            pair.shared(rule).numpy(),
            seed,
            have_signs(sums[pair.first].sae, sums[pair.second].sae),
        )
        for pair, cost in zip(matched, costs, strict=True)
    ]


def _sampled_batches(
    source: Source, settings: ComparisonSettings, progress: Progress | None
) -> Iterator[tuple[Columns, tuple[Tensor, bool], Tensor]]:
    """Rows, their `row_groups`, and the indices in the batch of those that are sampled evenly over all rows."""
    limit = settings.max_rows or sys.maxsize
    total = limit if source.n_rows is None else min(limit, source.n_rows)
    step = max(1, total // SAMPLE_ROWS)
    done = 0
    for batch in source.batches(settings.batch_rows):
        rows = batch.map(lambda column, room=limit - done: column[:room])  # type: ignore[misc]
        group = row_groups(rows.document, done, len(rows))
        yield rows, group, torch.arange(-done % step, len(rows), step)
        done += len(rows)
        if progress is not None:
            progress("rows", done, total)
        if done >= limit:
            return


def _shared_alive(pair: MatchedPair, rule: SharedRule, sums: Sequence[_CodeSums]) -> Measured:
    """Shared pairs that both fire, as a fraction of the latents that fire in the SAE that has fewer of them."""
    alive, alive_other = (sums[at].fired > 0 for at in (pair.first, pair.second))
    n = int(min(alive.sum(), alive_other.sum()))
    if not n:
        return Measured(math.nan, None, None, "fraction", "undefined: no latent of one of the SAEs fires on the rows")
    shared = pair.shared(rule)
    both = alive[shared.numpy()] & alive_other[pair.decoder.matching.partner[shared].numpy()]
    return wilson_interval(int(both.sum()), n)


def _pw_mcc(pair: MatchedPair, sums: Sequence[_CodeSums]) -> Measured:
    """Mean cosine of the pairs, matched by decoder, of which both latents fire."""
    mine, theirs = _partners(pair.decoder.matching)
    both = (sums[pair.first].fired[mine] > 0) & (sums[pair.second].fired[theirs] > 0)
    return mean_over_latents(pair.decoder.matching.cosine.numpy()[mine[both]])


def _partners(matching: Matching) -> tuple[np.ndarray, np.ndarray]:
    """Return the latents of both SAEs that have a partner, in step."""
    mine = (matching.partner >= 0).nonzero().squeeze(1)
    return mine.numpy(), matching.partner[mine].numpy()


def _correlation(
    pair: MatchedPair, sums: Sequence[_CodeSums], products: np.ndarray, n_rows: int
) -> tuple[Measured, int]:
    """Mean Pearson correlation over pairs of latents, and how many have one."""
    indices = _partners(pair.decoder.matching)
    both = [(sums[at], which) for at, which in zip((pair.first, pair.second), indices, strict=True)]
    total_a, total_b = (each.sum[which] for each, which in both)
    squares_a, squares_b = (each.squares[which] for each, which in both)
    variance_a, variance_b = squares_a - total_a**2 / n_rows, squares_b - total_b**2 / n_rows
    # A latent that never fires, or always alike, has no correlation.
    alive = (variance_a > 1e-12 * squares_a) & (variance_b > 1e-12 * squares_b)
    n_pairs = int(alive.sum())
    if not n_pairs:
        return Measured(math.nan, None, None, "correlation", "undefined: no pair of which both latents fire"), 0
    covariance = products[indices[0]][alive] - total_a[alive] * total_b[alive] / n_rows
    opposite = pair.decoder.matching.opposite.numpy()[indices[0]][alive]
    covariance = np.where(opposite, -covariance, covariance)
    each = torch.from_numpy(np.clip(covariance / np.sqrt(variance_a[alive] * variance_b[alive]), -1, 1))
    mean, error = float(each.mean()), standard_error(each)
    return over_latents(mean, error, unit="correlation", reason="over pairs of latents"), n_pairs


def _similarity(one: Codes, other: Codes, documents: np.ndarray, signed: bool) -> tuple[Measured, Measured]:
    """CKA and RSA of the codes of the same rows; of signed codes RSA takes each and its negative."""
    cka = linear_cka(one, other, documents).measured("fraction", most=1.0)
    dense, of_other = one.to_dense(), other.to_dense()
    if signed:  # the mean of a row would depend on which way round its latents point
        dense, of_other = (torch.cat([each, -each], 1) for each in (dense, of_other))
    return cka, rsa(dense, of_other, documents).measured("correlation", least=-1.0, most=1.0)
