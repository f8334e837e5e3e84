"""How well anything reconstructs rows, how sparse its codes are and what it costs a language model: one pass for all.

Nothing of size rows times latents is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError
from ..ranks import ALONE, Ranks, agreed, in_order
from ..rows.opening import target_rows
from ..rows.shared_reading import own_batches, shared_reading
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
    sources: list[dict[str, dict[str, Estimate]]] = field(default_factory=list)
    """For each reconstructor, by source of the rows, by metric; empty where no sources were asked for."""

    def metrics(self, at: int) -> Metrics:
        """Return the metrics of one reconstructor, with intervals."""
        return as_metrics(self.estimates[at])

    def of_sources(self, at: int) -> dict[str, Metrics]:
        """Return the metrics of one reconstructor on the columns of each source."""
        return {name: as_metrics(each) for name, each in self.sources[at].items()}


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
    sources: Mapping[str, int] = MappingProxyType({}),
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
    sources
        By name the widths of the sources that lie side by side in the rows: the columns of each are measured as rows of
        their own, too.

    Raises
    ------
    DataError
        No rows, NaN in rows, or no token to predict.
    """
    with shared_reading([rows], ranks):
        found = _measure_rows(reconstructors, rows, _Columns.of(mean, sources), settings, progress or silent, ranks)
    if spliced is None or spliced.texts is None:
        return found
    costs, facts = measure_fidelity(
        spliced, reconstructors, mean, intervals=settings.intervals, progress=progress, ranks=ranks
    )
    estimates = [each | cost for each, cost in zip(found.estimates, costs, strict=True)]
    return replace(found, estimates=estimates, language_model=facts)


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
    for _, first, x, y, _ in numbered_batches(rows, like, settings.batch_rows, limit):
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
    rows: Source, like: SAE, batch_rows: int, limit: int | None, ranks: Ranks = ALONE
) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor | None]]:
    """Yield ``(number, first row, x, y, document)`` of a rank's batches; `y` is what `like` should give.

    They come in stored order, up to `limit` rows. Rows that can be read from any place are dealt in runs, so that a
    rank reads no others; rows that are computed as they are read, in turn.
    """
    for number, batch in own_batches(rows, batch_rows, ranks, limit):
        first = number * batch_rows
        room = len(batch.x) if limit is None else min(limit - first, len(batch.x))
        document = batch.document
        yield (
            number, first, batch.x[:room], target_rows(batch, like)[:room],
            None if document is None else document[:room],
        )  # fmt: skip


@dataclass(frozen=True)
class _Columns:
    """Columns of the rows whose errors are summed: all, then those of each source."""

    names: tuple[str, ...]
    """Sources, in order."""
    means: tuple[Tensor, ...]
    """Mean row over all columns, then over those of each source."""
    slices: tuple[slice, ...]
    """Where the columns are."""

    @classmethod
    def of(cls, mean: Tensor, sources: Mapping[str, int]) -> _Columns:
        """Return all columns of rows of this mean ``[d_out]``, and those of each source, by its width."""
        ends = list(accumulate(sources.values(), initial=0))
        slices = (slice(None), *(slice(start, end) for start, end in pairwise(ends)))
        return cls(tuple(sources), tuple(mean[each] for each in slices), slices)

    def moments(self, n_groups: int = N_GROUPS) -> list[Moments]:
        """Return the statistics of no rows yet."""
        return [Moments(len(mean), n_groups) for mean in self.means]

    def errors(self, moments: Sequence[Moments], n_groups: int = N_GROUPS) -> list[Reconstruction]:
        """Return the errors of no rows yet, with the statistics of the rows."""
        return [
            Reconstruction(each.d, centre=mean, moments=each, n_groups=n_groups)
            for mean, each in zip(self.means, moments, strict=True)
        ]


class _Pass:
    """What one pass over the rows gathers about one reconstructor."""

    def __init__(self, reconstructor: Reconstructor, columns: _Columns, moments: Sequence[Moments]) -> None:
        self.reconstructor = reconstructor
        self.columns = columns
        self.errors = columns.errors(moments)
        self.sparsity = None if reconstructor.sae is None else Sparsity(reconstructor.sae.n_latents)

    def of(self, part: _Part, x: Tensor, y: Tensor, group: Tensor) -> list[Reconstruction]:
        """Return the errors on the rows of a batch, with what should be made of them, and count firings."""
        y_hat, codes = self.reconstructor.forward(x)
        errors = self.columns.errors(part.moments, len(part.groups))
        for each, error in zip(self.columns.slices, errors, strict=True):
            error.update(y[:, each], y_hat[:, each], part.place)
        if self.sparsity is not None and codes is not None:
            self.sparsity.update(codes, group)
        return errors

    def sources(self, sample: Sample) -> dict[str, dict[str, Estimate]]:
        """Return the metrics of the columns of each source."""
        return {name: each.compute(sample) for name, each in zip(self.columns.names, self.errors[1:], strict=True)}

    def compute(self, sample: Sample) -> dict[str, Estimate]:
        """Return the metrics."""
        found = self.errors[0].compute(sample)
        if self.sparsity is not None:
            found |= self.sparsity.compute(sample)
        l0 = self.reconstructor.l0
        if l0 is not None:
            found["l0"] = Estimate(float(l0), reason="no interval: the number of components, fixed beforehand")
        return found | _redundancies(self.reconstructor.sae)


class _Part:
    """Sums over one batch, in the groups of its documents."""

    def __init__(self, y: Tensor, group: Tensor, columns: _Columns, by_document: bool) -> None:
        self.groups, self.place = torch.unique(group, return_inverse=True)
        self.by_document = by_document
        self.moments = columns.moments(len(self.groups))
        for each, moments in zip(columns.slices, self.moments, strict=True):
            moments.update(y[:, each], self.place)
        self.errors: list[list[Reconstruction]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process gets: the sums, not the rows' places, on the CPU."""
        return {**vars(self), "groups": self.groups.cpu(), "place": None}


def _measure_rows(
    reconstructors: Sequence[Reconstructor],
    rows: Source,
    columns: _Columns,
    settings: MeasureSettings,
    progress: Progress,
    ranks: Ranks,
) -> Measurement:
    """Measure all reconstructors in one pass over the rows."""
    like = reconstructors[0].sae
    assert like is not None  # controls come after the SAEs
    moments = columns.moments()
    passes = [_Pass(each, columns, moments) for each in reconstructors]
    limit = settings.max_rows
    total = rows.n_rows if limit is None else min(limit, rows.n_rows or limit)

    def parts() -> Iterator[tuple[int, _Part]]:
        """Yield this rank's batches, measured."""
        done = 0
        for number, first, x, y, document in numbered_batches(rows, like, settings.batch_rows, limit, ranks):
            group, by_document = row_groups(document, first, len(x))
            x, y, group = x.to(like.device), y.to(like.device), group.to(like.device)
            part = _Part(y, group, columns, by_document)
            part.errors = [each.of(part, x, y, group) for each in passes]
            yield number, part
            done += len(x) * ranks.size  # the others are about as far
            progress("rows", done if total is None else min(done, total), total)

    all_by_document = True
    for part in in_order(ranks, parts()):
        all_by_document &= part.by_document
        for whole, own in zip(moments, part.moments, strict=True):
            whole.merge(own, part.groups)
        for each, errors in zip(passes, part.errors, strict=True):
            for error, own_error in zip(each.errors, errors, strict=True):
                error.merge(own_error, part.groups)
    for each in passes:
        if each.sparsity is not None:
            each.sparsity.merge_ranks(ranks)

    def measured() -> Measurement:
        sample = document_sample(moments[0].rows_per_group, is_known=all_by_document, intervals=settings.intervals)
        estimates = [each.compute(sample) for each in passes]
        sources = [each.sources(sample) for each in passes]
        return Measurement(estimates, [each.sparsity for each in passes], moments[0].n_rows, None, sources)

    return agreed(ranks, measured)


def _redundancies(sae: SAE | None) -> dict[str, Estimate]:
    """How alike the rows of decoder and encoder are, and what is expected of random ones."""
    if sae is None or sae.n_latents < 2:
        return {}
    either = sae.has_signs  # then each of the others stands for two directions
    null = random_max_cosine((sae.n_latents - 1) * (2 if either else 1) + 1, sae.d_out)
    decoder = redundancy(sae.W_dec, either_sign=either)
    return {
        "decoder_redundancy": decoder,
        "encoder_redundancy": decoder if sae.W_enc is sae.W_dec else redundancy(sae.W_enc, either_sign=either),
        "redundancy_null": Estimate(null, reason="no interval: computed, not measured"),
    }
