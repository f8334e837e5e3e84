"""How well anything reconstructs rows, how sparse its codes are and what it costs a language model: one pass for all.

Nothing of size rows times latents is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..ranks import ALONE, Ranks, agreed, in_order
from ..rows.opening import target_rows
from ..rows.shared_reading import shared_reading
from ..rows.source import Source
from ..sae.model import SAE
from ..settings import Progress, silent
from .accumulators import Moments, Reconstruction, Sparsity
from .controls import Reconstructor, reconstructor_of
from .fidelity import SplicedModel, measure_fidelity
from .intervals import BLOCK_ROWS, LEVEL, N_GROUPS, Estimate, Sample, document_sample, row_groups
from .linear import AffineMap, Regression
from .metrics import METRICS, Metrics
from .pca import PCA, Covariance
from .redundancy import random_max_cosine, redundancy
from .settings import MeasureSettings

CALIBRATION_ROWS = 32_768
"""First rows that the mean row and the principal components are computed from."""

SAMPLE_ROWS = 4_096
"""Rows of these, evenly spaced, that thresholds, scales and the number of components are found from, at most."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of the first rows: what mean-ablation puts in place of a row, and what controls are made from."""

    mean: Tensor
    """Mean ``[d_out]`` of the rows that are reconstructed, or predicted."""
    sample: Tensor
    """Some of these rows ``[m, d_in]``, evenly spaced, so that they come from many documents."""
    pca: PCA | None
    """Principal components; None where they were not asked for, of a single row, and for transcoders."""
    linear: AffineMap | None
    """The best affine map to the rows that a transcoder predicts; None for SAEs, or where it was not asked for."""
    about: str
    """Which rows."""


@dataclass(frozen=True)
class Measurement:
    """What one pass over the rows, and one over the texts, gave for each reconstructor, in order."""

    estimates: list[dict[str, Estimate]]
    """By metric."""
    sparsities: list[Sparsity | None]
    """How often latents fire; None where there are none (PCA)."""
    n_rows: int
    """Rows seen."""
    language_model: dict[str, Any] | None
    """Model, hook, texts and tokens of the cross-entropies; None without them."""

    def metrics(self, at: int) -> Metrics:
        """Return the metrics of one reconstructor, with intervals."""
        return as_metrics(self.estimates[at])


def measure_saes(
    saes: Sequence[SAE],
    rows: Source,
    *,
    spliced: SplicedModel | None = None,
    settings: MeasureSettings = MeasureSettings(),
    progress: Progress | None = None,
) -> Measurement:
    """Measure SAEs without any control.

    Parameters
    ----------
    saes
        SAEs of the width of the rows.
    rows
        What they reconstruct; transcoders predict the targets that come with them.
    spliced
        A language model and texts for the cross-entropies.
    settings
        How many rows and resamples.
    progress
        Called as ``progress(stage, done, total)`` with the stages ``"rows"`` and ``"tokens"``.
    """
    mean = calibrate(rows, settings, like=saes[0], with_controls=False).mean
    each = [reconstructor_of(str(at), sae) for at, sae in enumerate(saes)]
    return measure_reconstructors(each, rows, mean, spliced=spliced, settings=settings, progress=progress)


def measure_reconstructors(
    reconstructors: Sequence[Reconstructor],
    rows: Source,
    mean: Tensor,
    *,
    spliced: SplicedModel | None = None,
    settings: MeasureSettings = MeasureSettings(),
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Measurement:
    """Measure SAEs and controls on the same rows and texts; all share the resamples of documents.

    Several ranks measure a batch each in turn. Sums of a batch are added in the order of the batches, so that the
    result has the same bits for any number of ranks.

    Parameters
    ----------
    reconstructors
        SAEs first, then controls.
    rows
        What they reconstruct; transcoders predict the targets that come with them.
    mean
        ``[d_out]`` row that variances are computed about (any, near the mean) and that mean-ablation puts in.
    spliced, settings, progress
        See `measure_saes`.
    ranks
        The ranks that share the work, if there are several; all get the result.

    Raises
    ------
    DataError
        No rows, NaN in rows, or no token to predict.
    """
    with shared_reading([rows], ranks):
        found = _measure_rows(reconstructors, rows, mean, settings, progress or silent, ranks)
    if spliced is None or spliced.texts is None:
        return found
    costs, facts = measure_fidelity(
        spliced, reconstructors, mean, intervals=settings.intervals, progress=progress, ranks=ranks
    )
    estimates = [each | cost for each, cost in zip(found.estimates, costs, strict=True)]
    return Measurement(estimates, found.sparsities, found.n_rows, facts)


def interval_facts(intervals: bool) -> dict[str, Any]:
    """Return what results say about their intervals."""
    return {
        "level": LEVEL,
        "method": "jackknife over documents, paired between an SAE and its controls" if intervals else "none",
        "documents": f"put into at most {N_GROUPS} groups by document id",
        "rows_without_document": f"runs of {BLOCK_ROWS} consecutive rows",
    }


def as_metrics(estimates: dict[str, Estimate], *, ranged: bool = True) -> Metrics:
    """Return estimates with unit and interval, cut at the range of the metric (a difference has another range)."""
    values = {}
    for key, each in estimates.items():
        metric = METRICS[key]
        least, most = (metric.least, metric.most) if ranged else (None, None)
        values[key] = each.measured(metric.unit, least=least, most=most)
    return Metrics(values)


def calibrate(
    rows: Source, settings: MeasureSettings, *, like: SAE, with_controls: bool, own: bool = True
) -> Calibration:
    """Compute the mean row, what controls are made from, and a sample from the first rows.

    Parameters
    ----------
    rows
        Where they come from.
    settings
        How many rows are measured, how many are read at a time.
    like
        One of the SAEs that are measured: all reconstruct the rows, or all predict the targets.
    with_controls
        Whether to compute principal components, or the best affine map to the targets.
    own
        Whether these are the rows that are measured, of which no more than `settings` says are seen.

    Raises
    ------
    DataError
        No rows.
    """
    limit = min(CALIBRATION_ROWS, settings.max_rows or CALIBRATION_ROWS) if own else CALIBRATION_ROWS
    moments = Moments(like.d_out, n_groups=1)
    covariance, regression = Covariance(rows.d_in), None
    if with_controls and like.is_transcoder:
        regression = Regression(rows.d_in, like.d_out)
    sample: list[Tensor] = []
    stride = -(-min(limit, rows.n_rows or limit) // SAMPLE_ROWS)
    for first, x, y, _ in numbered_batches(rows, like, settings.batch_rows, limit):
        moments.update(y, torch.zeros(len(y), dtype=torch.long))
        if regression is not None:
            regression.update(x, y)
        elif with_controls:
            covariance.update(x)
        sample.append(x[-first % stride :: stride].clone())
    if not sample:
        raise DataError("evaluate: there must be at least one row; the source has none. Is the data empty?")
    pca = covariance.compute() if covariance.n_rows > 1 else None
    linear = None if regression is None or regression.n_rows < 2 else regression.compute()
    about = f"the first {moments.n_rows:,} of the rows evaluated" if own else f"{moments.n_rows:,} rows given as `fit`"
    return Calibration(moments.mean.float(), torch.cat(sample), pca, linear, about)


def numbered_batches(
    rows: Source, like: SAE, batch_rows: int, limit: int | None
) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
    """Yield ``(first row, x, y, document)`` in stored order, up to `limit` rows; `y` is what `like` should give."""
    first = 0
    for batch in rows.batches(batch_rows):
        room = len(batch.x) if limit is None else limit - first
        if room <= 0:
            return
        document = batch.document
        yield first, batch.x[:room], target_rows(batch, like)[:room], None if document is None else document[:room]
        first += min(len(batch.x), room)
        if limit is not None and first >= limit:
            return


class _Pass:
    """What one pass over the rows gathers about one reconstructor."""

    def __init__(self, reconstructor: Reconstructor, mean: Tensor, moments: Moments) -> None:
        self.reconstructor = reconstructor
        self.mean = mean
        self.error = Reconstruction(moments.d, centre=mean, moments=moments)
        self.sparsity = None if reconstructor.sae is None else Sparsity(reconstructor.sae.n_latents)

    def of(self, part: _Part, x: Tensor, y: Tensor, group: Tensor) -> Reconstruction:
        """Return the error on the rows of a batch, with what should be made of them, and count firings."""
        y_hat, codes = self.reconstructor.forward(x)
        error = Reconstruction(self.error.moments.d, centre=self.mean, moments=part.moments, n_groups=len(part.groups))
        error.update(y, y_hat, part.place)
        if self.sparsity is not None and codes is not None:
            self.sparsity.update(codes, group)
        return error

    def compute(self, sample: Sample) -> dict[str, Estimate]:
        """Return the metrics."""
        found = self.error.compute(sample)
        if self.sparsity is not None:
            found |= self.sparsity.compute(sample)
        l0 = self.reconstructor.l0
        if l0 is not None:
            found["l0"] = Estimate(float(l0), reason="no interval: the number of components, fixed beforehand")
        return found | _redundancies(self.reconstructor.sae)


class _Part:
    """Sums over one batch, in the groups of its documents."""

    def __init__(self, y: Tensor, group: Tensor, by_document: bool) -> None:
        self.groups, self.place = torch.unique(group, return_inverse=True)
        self.by_document = by_document
        self.moments = Moments(y.shape[1], n_groups=len(self.groups))
        self.moments.update(y, self.place)
        self.errors: list[Reconstruction] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process gets: the sums, not the rows' places, on the CPU."""
        return {**vars(self), "groups": self.groups.cpu(), "place": None}


def _measure_rows(
    reconstructors: Sequence[Reconstructor],
    rows: Source,
    mean: Tensor,
    settings: MeasureSettings,
    progress: Progress,
    ranks: Ranks,
) -> Measurement:
    """Measure all reconstructors in one pass over the rows."""
    like = reconstructors[0].sae
    assert like is not None  # controls come after the SAEs
    moments = Moments(like.d_out)
    passes = [_Pass(each, mean, moments) for each in reconstructors]
    limit = settings.max_rows
    total = rows.n_rows if limit is None else min(limit, rows.n_rows or limit)

    def parts() -> Iterator[tuple[int, _Part]]:
        """Yield this rank's batches, measured."""
        for number, (first, x, y, document) in enumerate(numbered_batches(rows, like, settings.batch_rows, limit)):
            if ranks.has(number):
                group, by_document = row_groups(document, first, len(x))
                x, y, group = x.to(like.device), y.to(like.device), group.to(like.device)
                part = _Part(y, group, by_document)
                part.errors = [each.of(part, x, y, group) for each in passes]
                yield number, part
            progress("rows", first + len(x), total)

    all_by_document = True
    for part in in_order(ranks, parts()):
        all_by_document &= part.by_document
        moments.merge(part.moments, part.groups)
        for each, error in zip(passes, part.errors, strict=True):
            each.error.merge(error, part.groups)
    for each in passes:
        if each.sparsity is not None:
            each.sparsity.merge_ranks(ranks)

    def measured() -> Measurement:
        sample = document_sample(moments.rows_per_group, is_known=all_by_document, intervals=settings.intervals)
        estimates = [each.compute(sample) for each in passes]
        return Measurement(estimates, [each.sparsity for each in passes], moments.n_rows, None)

    return agreed(ranks, measured)


def _redundancies(sae: SAE | None) -> dict[str, Estimate]:
    """How alike the rows of decoder and encoder are, and what is expected of random ones."""
    if sae is None or sae.n_latents < 2:
        return {}
    null = random_max_cosine(sae.n_latents, sae.d_out)
    decoder = redundancy(sae.W_dec)
    return {
        "decoder_redundancy": decoder,
        "encoder_redundancy": decoder if sae.W_enc is sae.W_dec else redundancy(sae.W_enc),
        "redundancy_null": Estimate(null, reason="no interval: computed, not measured"),
    }
