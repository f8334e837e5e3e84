"""Fidelity, sparsity and similarity along the prefixes of an SAE's latents."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from ..measure.accumulators import Sparsity
from ..measure.fidelity import SplicedModel, place_warnings
from ..measure.intervals import N_GROUPS, Estimate, document_sample, row_groups
from ..measure.metrics import METRICS, Metrics
from ..measure.reconstruction import interval_facts, measure_saes
from ..measure.results import Measured
from ..measure.similarity import linear_cka, rsa
from ..progress import shows_progress
from ..provenance import library_versions, release
from ..ranks import refuse_unsplit
from ..rows.opening import source_for, target_rows
from ..rows.origin import refuse_unread
from ..rows.source import Columns, Source
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.naming import common_width, name_of, named_saes
from ..settings import Progress, silent, suggest_keywords
from .largest import from_largest
from .latent_metrics import Sized, latent_metrics
from .prune import check_sizes, competes
from .result import SizeCurve, SizePoint
from .settings import SizeSettings


def default_sizes(n_latents: int) -> list[int]:
    """Return halves of halves down to a 64th (and at least 1 latent), and all.

    >>> default_sizes(1024)
    [16, 32, 64, 128, 256, 512, 1024]
    """
    return sorted({max(1, n_latents >> halvings) for halvings in range(7)})


@suggest_keywords
@shows_progress
def measure_sizes(
    sae: SAE | Sequence[SAE],
    rows: Any,
    sizes: Sequence[int] | None = None,
    *,
    model: Any = None,
    data: Any = None,
    name: str | None = None,
    settings: SizeSettings = SizeSettings(),
    progress: Progress | None = None,
) -> SizeCurve:
    """Measure prefixes of an SAE: what ``SAE.load(path, latents=m)`` gives at each size m.

    Parameters
    ----------
    sae
        The SAE, its latents in order of importance (see `rank`; a Matryoshka SAE is in order as trained). Or several
        ordinary SAEs of increasing sizes (what `prune` returned, or separately trained ones), each measured whole.
    rows
        A source of rows, an array ``[n, d_in]``, or the path of a cache folder or array file. Better not the rows that
        the latents were ranked on.
    sizes
        Numbers of latents to keep, increasing; by default halves down to a 64th. Not for several SAEs.
    model, data
        A causal language model and texts for the cross-entropies, as for `evaluate`.
    name
        Name of the SAE in the curve; by default its rule and number of latents.
    settings
        What is measured, on how many rows. With ``selection="before"`` a TopK SAE selects its k within the prefix; with
        ``"after"`` it selects among all latents, and those beyond the prefix are dropped. ``latents=True`` measures, in
        one more pass, bits per row (``description_length``); where rows know their tokens, interpretability of all
        latents and of those new at each size (``purity``, ``detection``, ``ring_purity``, ``ring_detection``); between
        prefixes how new latents relate to their parents (``parent_cosine``, ``coactivation``, ``handed_over``). See
        `saekit.sizes.latent_metrics`.
    progress
        Called as ``progress(stage, done, total)`` [shown on stderr; ``False``: none].

    Returns
    -------
    SizeCurve

    Raises
    ------
    ConfigError
        A size outside 1..n_latents, or sizes that do not increase.
    ShapeError, DataError
        As `evaluate`.
    """
    refuse_unsplit("measure_sizes")
    prefixes = _prefixes(sae, sizes, settings.selection)
    whole = sae if isinstance(sae, SAE) else prefixes[-1].sae
    source = source_for(whole, rows, "measure_sizes")
    saes = [each.measured for each in prefixes]
    common_width(named_saes(saes, "measure_sizes"), "measure_sizes")
    if model is not None and data is None:
        raise ConfigError("measure_sizes: `model` must come with `data`, the texts it reads; got none.")
    refuse_unread(model, data, "measure_sizes")
    spliced = None if model is None else SplicedModel.of(model, data, saes, source, settings, "measure_sizes")
    found = measure_saes(saes, source, spliced=spliced, settings=settings, progress=progress)
    measured = [dict(found.metrics(at)) for at in range(len(prefixes))]
    more = _MoreMetrics(prefixes, source, found.n_rows, settings, progress or silent)
    for extra in (more.sparsity(), more.similarity(), more.of_latents(nested=isinstance(sae, SAE))):
        for values, each in zip(measured, extra):
            values.update(each)
    return SizeCurve(
        saekit=release(),
        versions=library_versions(spliced is not None),
        settings={
            "rows": settings.max_rows,
            "tokens": None if spliced is None else spliced.tokens,
            "batch_rows": settings.batch_rows,
            "seed": settings.seed,
            "intervals": interval_facts(settings.intervals),
            "selection": settings.selection,
            "sample_rows": settings.sample_rows,
            "latents": settings.latents,
            "each_size": "a prefix of one SAE" if isinstance(sae, SAE) else "an SAE of its own",
        },
        rows=dict(source.info),
        n_rows=found.n_rows,
        language_model=found.language_model,
        sae=_about(whole, name, saes[-1].digest()),
        points=[
            SizePoint(each.size, Metrics(values), compared)
            for each, values, compared in zip(prefixes, measured, from_largest(found.estimates), strict=True)
        ],
        warnings=place_warnings([(name or name_of(whole), whole)], source, spliced),
    )


def _about(sae: SAE, name: str | None, digest: str) -> dict[str, Any]:
    """Return what the curve says about its SAE."""
    return {
        "name": name or f"{sae.rule.name}-{sae.n_latents}",
        "n_latents": sae.n_latents,
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "order": sae.provenance.get("latent_order", "none"),
        "digest": digest,
        "provenance": {key: value for key, value in sae.provenance.items() if key != "sizes"},
    }


@dataclass(frozen=True)
class _Prefix:
    """One size."""

    sae: SAE
    """Encodes; all of its latents compete."""
    size: int
    """Number of latents that are kept of its codes."""
    measured: SAE
    """Reconstructs what the size reconstructs."""

    @property
    def cut(self) -> bool:
        """Return whether codes lose latents after the selection."""
        return self.size < self.sae.n_latents

    def codes(self, x: Tensor) -> Codes:
        """Return the codes of the latents kept."""
        codes = self.sae.encode(x)
        return codes.take(self.size) if self.cut else codes


def _prefixes(sae: SAE | Sequence[SAE], sizes: Sequence[int] | None, selection: str) -> list[_Prefix]:
    if not isinstance(sae, SAE):
        return _whole(list(sae), sizes)
    wanted = default_sizes(sae.n_latents) if sizes is None else check_sizes(sae, sizes, "measure_sizes")
    if selection == "after" and competes(sae):
        return [_Prefix(sae, size, _ablated(sae, size)) for size in wanted]
    return _whole([sae.take(size) if size < sae.n_latents else sae for size in wanted])


def _whole(saes: Sequence[SAE], sizes: Sequence[int] | None = None) -> list[_Prefix]:
    """Return SAEs that are measured as they are."""
    found = [each.n_latents for each in saes]
    if sizes is not None or not saes or found != sorted(set(found)):
        raise ConfigError(
            f"measure_sizes: several SAEs must be of increasing sizes, and `sizes` left out; got {found}."
        )
    return [_Prefix(each, each.n_latents, each) for each in saes]


def _are_prefixes(saes: Sequence[SAE]) -> bool:
    """Return whether each SAE begins with the latents of the one before."""
    return all(
        torch.equal(large.W_dec[: small.n_latents], small.W_dec)
        and torch.equal(large.W_enc[: small.n_latents], small.W_enc)
        for small, large in itertools.pairwise(saes)
    )


def _ablated(sae: SAE, size: int) -> SAE:
    """Return the SAE whose latents from `size` on compete but write nothing."""
    writes = torch.arange(sae.n_latents, device=sae.device) < size
    return sae.replace(W_dec=torch.where(writes[:, None], sae.W_dec, sae.W_dec.new_zeros(())))


@dataclass(frozen=True)
class _MoreMetrics:
    """The metrics of every size that `evaluate` does not measure."""

    prefixes: Sequence[_Prefix]
    source: Source
    n_rows: int
    settings: SizeSettings
    progress: Progress

    def sparsity(self) -> list[dict[str, Measured]]:
        """Return the sparsity of the latents kept, where the selection was among all."""
        return [self._sparsity_after(each) if each.cut else {} for each in self.prefixes]

    def similarity(self) -> list[dict[str, Measured]]:
        """Return similarities between rows, their reconstructions and their codes, over a sample."""
        if not self.settings.sample_rows:
            return []
        rows, document = self._sample()
        found = []
        for done, each in enumerate(self.prefixes, start=1):
            found.append(_similarity(each, rows, document if self.settings.intervals else None))
            self.progress("similarity", done, len(self.prefixes))
        return found

    def of_latents(self, *, nested: bool) -> list[dict[str, Measured]]:
        """Return the metrics of the latents at every size; `nested` says that all sizes are of one SAE."""
        if not self.settings.latents:
            return []
        nested = nested or _are_prefixes([each.sae for each in self.prefixes])
        sized = [Sized(each.sae, each.codes, each.size, nested and i > 0) for i, each in enumerate(self.prefixes)]
        settings = self.settings
        return latent_metrics(
            sized, self.source, self.n_rows, batch_rows=settings.batch_rows, seed=settings.seed, progress=self.progress
        )

    def _sparsity_after(self, prefix: _Prefix) -> dict[str, Measured]:
        sparsity, counted = Sparsity(prefix.size), np.zeros(0)
        first, by_document = 0, True
        for batch in self.source.batches(self.settings.batch_rows):
            x = batch.x[: self.n_rows - first]
            if not len(x):
                break
            document = None if batch.document is None else batch.document[: len(x)]
            group, known = row_groups(document, first, len(x))
            by_document &= known
            with torch.no_grad():
                sparsity.update(prefix.codes(x), group)
            here = np.bincount(group.numpy(), minlength=N_GROUPS).astype(float)
            counted = here if not len(counted) else counted + here
            first += len(x)
        sample = document_sample(counted, is_known=by_document, intervals=self.settings.intervals)
        return _bounded(sparsity.compute(sample))

    def _sample(self) -> tuple[Columns, np.ndarray]:
        """Return rows drawn evenly, with the document of each (or its run of 64 rows, where unknown)."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        wanted = torch.randperm(self.n_rows, generator=generator)[: self.settings.sample_rows].sort().values
        parts, documents, first = [], [], 0
        for batch in self.source.batches(self.settings.batch_rows):
            here = wanted[(wanted >= first) & (wanted < first + batch.n_rows)] - first
            parts.append(Columns(batch.x[here], target=target_rows(batch, self.prefixes[0].sae)[here]))
            run = (here + first) // 64
            known = run if batch.document is None else torch.where(batch.document[here] >= 0, batch.document[here], run)
            documents.append(known)
            first += batch.n_rows
            if first >= self.n_rows:
                break
        return Columns.cat(parts), torch.cat(documents).numpy()


def _similarity(prefix: _Prefix, sampled: Columns, group: np.ndarray | None) -> dict[str, Measured]:
    sae, x = prefix.measured, target_rows(sampled, prefix.measured)
    with torch.no_grad():
        rows = sampled.x.to(sae.device, sae.dtype)
        codes = prefix.codes(rows)
        x_hat = sae.decode(codes, rows)
    return _bounded(
        {"rsa": rsa(x, x_hat, group), "cka": linear_cka(x, x_hat, group), "cka_codes": linear_cka(x, codes, group)}
    )


def _bounded(estimates: Mapping[str, Estimate]) -> dict[str, Measured]:
    """Return estimates as numbers of their metrics, within the bounds of these."""
    return {
        key: each.measured(METRICS[key].unit, least=METRICS[key].least, most=METRICS[key].most)
        for key, each in estimates.items()
    }
