"""What each size of an SAE is worth: fidelity, sparsity and similarity along prefixes of its latents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, FormatError
from ..measure.accumulators import Sparsity
from ..measure.bootstrap import N_GROUPS, DocumentBootstrap, row_groups
from ..measure.fidelity import SplicedModel
from ..measure.metrics import METRICS, Metrics
from ..measure.reconstruction import interval_facts, measure_saes
from ..measure.results import Measured, Result
from ..measure.settings import CE_TOKENS, MeasureSettings
from ..measure.similarity import linear_cka, rsa
from ..provenance import library_versions, release, sae_digest
from ..rows.opening import as_source
from ..rows.source import Source
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.naming import common_width, named_saes
from ..settings import Progress
from .latent_metrics import Sized, latent_metrics
from .prune import SELECTIONS, check_sizes, competes

SAMPLE_ROWS = 512
"""Rows that are compared with each other for rsa and cka; they are drawn once, evenly over all rows."""

IN_FILE = ("fvu", "l0", "dead_fraction", "ce_sae", "ce_recovered_zero", "ce_recovered_mean", "rsa", "cka")
"""Metrics of a curve that are written into an SAE's file."""

SHOWN = ("fvu", "l0", "ce_sae", "ce_recovered_zero", "rsa", "cka")


@dataclass(frozen=True)
class SizePoint:
    """One size of the curve."""

    size: int
    """Latents kept."""
    metrics: Metrics
    """What was measured with them."""


@dataclass(frozen=True, repr=False)
class SizeCurve(Result):
    """Fidelity, sparsity and similarity of an SAE at several sizes, over the same rows.

    Examples
    --------
    ::

        curve = sk.measure_sizes(sk.rank(sae, rows), heldout, [64, 256, 1024])
        curve.points[0].metrics.fvu.value
        curve.smallest(fvu=0.2)             # latents that suffice
        curve.write_into(sae).save("out")   # then SAE.load("out", fvu=0.2)
    """

    KIND: ClassVar[str] = "size_curve"
    SCHEMA: ClassVar[int] = 1

    rows: dict[str, Any]
    """``info`` of the rows."""
    n_rows: int
    """Rows seen."""
    language_model: dict[str, Any] | None
    """Model, hook, texts and tokens of the cross-entropies; None without them."""
    sae: dict[str, Any]
    """Name, n_latents, rule, order of the latents, provenance of the SAE."""
    points: list[SizePoint] = field(default_factory=list)
    """From the smallest size to the largest."""

    @property
    def sizes(self) -> list[int]:
        """Latents of each point."""
        return [point.size for point in self.points]

    def values(self, name: str) -> list[Measured]:
        """One metric at every size.

        Raises
        ------
        AttributeError
            It was not measured.
        """
        return [getattr(point.metrics, name) for point in self.points]

    def smallest(self, *, fvu: float) -> int:
        """The smallest measured size whose FVU is at most `fvu`.

        Raises
        ------
        ConfigError
            No size meets it; the message says which is best.
        """
        meets = [point.size for point in self.points if point.metrics.fvu.value <= fvu]
        if not meets:
            best = min(self.points, key=lambda point: point.metrics.fvu.value)
            raise ConfigError(
                f"smallest: no measured size reaches an FVU of {fvu:g}; the best is {best.metrics.fvu.value:.3g} with "
                f"{best.size:,} latents. Ask for no less."
            )
        return min(meets)

    def write_into(self, sae: SAE) -> SAE:
        """`sae` with this curve in its provenance: saved, its file says what each prefix is worth.

        Raises
        ------
        ConfigError
            The curve is of another number of latents, or was measured with a selection that no prefix has.
        """
        if self.sizes and self.sizes[-1] > sae.n_latents:
            raise ConfigError(
                f"write_into: the curve must be one of this SAE; it goes to {self.sizes[-1]:,} latents where the SAE "
                f"has {sae.n_latents:,}."
            )
        if self.settings.get("selection") == "after" and competes(sae):
            raise ConfigError(
                "write_into: a file needs the curve of selection='before', which is what loading a prefix does; this "
                "one was measured with 'after'."
            )
        points = [
            {"latents": p.size, "metrics": {name: p.metrics[name].to_json() for name in IN_FILE if name in p.metrics}}
            for p in self.points
        ]
        about = {
            "n_rows": self.n_rows,
            **{key: self.rows[key] for key in ("model", "hook", "data", "digest") if self.rows.get(key) is not None},
            **({} if self.language_model is None else {"n_tokens": self.language_model["n_tokens"]}),
        }
        return sae.replace(provenance={**sae.provenance, "sizes": {"measured_on": about, "points": points}})

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        if not self.sizes or self.sizes != sorted(set(self.sizes)):
            raise FormatError(f"`size_curve.points` must be of increasing sizes; they are of {self.sizes}.")

    def table(self, names: tuple[str, ...] | None = None) -> list[list[str]]:
        """Rows of text, headings first; by default fvu, l0, ce_sae, ce_recovered_zero, rsa, cka as far as measured."""
        names = names or tuple(name for name in SHOWN if name in self.points[0].metrics)
        lines = [["latents", *names]]
        for point in self.points:
            lines.append([f"{point.size:,}", *(str(point.metrics[name]) for name in names)])
        return lines

    def caption(self) -> str:
        """Return the line under the table."""
        return f"{self.sae['name']}: {self.n_rows:,} rows, latents in order of {self.sae['order']}"


def default_sizes(n_latents: int) -> list[int]:
    """Halves of halves down to a 64th (and at least 1 latent), and all.

    >>> default_sizes(1024)
    [16, 32, 64, 128, 256, 512, 1024]
    """
    return sorted({max(1, n_latents >> halvings) for halvings in range(7)})


def measure_sizes(
    sae: SAE | Sequence[SAE],
    source: Any,
    sizes: Sequence[int] | None = None,
    *,
    selection: str = "before",
    model: Any = None,
    data: Any = None,
    text: str = "text",
    rows: int | None = None,
    tokens: int | None = None,
    sample_rows: int = SAMPLE_ROWS,
    latents: bool = False,
    batch_rows: int = 4096,
    draws: int = 1000,
    seed: int = 0,
    name: str | None = None,
    progress: Progress | None = None,
) -> SizeCurve:
    """Measure prefixes of an SAE: what ``SAE.load(path, latents=m)`` gives at each size m.

    Parameters
    ----------
    sae
        The SAE, its latents in order of importance (see `rank`; a Matryoshka SAE is in order as trained). Or several
        ordinary SAEs of increasing sizes (what `prune` returned, or separately trained ones), each measured whole.
    source
        Rows: a source, an array ``[n, d_in]``, or the path of a cache folder or array file. Better not the rows that
        the latents were ranked on.
    sizes
        Latents to keep, increasing; by default halves down to a 64th. Not for several SAEs.
    selection
        ``"before"``: a TopK SAE chooses its k among the prefix. ``"after"``: it chooses among all latents and what
        lies beyond the prefix is dropped.
    model, data, text, tokens
        A causal language model and texts for the cross-entropies, as for `evaluate`.
    rows, batch_rows, draws, seed, progress
        As for `evaluate`.
    sample_rows
        Rows that are compared pairwise for ``rsa``, ``cka`` and ``cka_codes``; 0 leaves these out.
    latents
        Whether to measure the latents too, in one more pass: bits per row (``description_length``); where rows know
        their tokens, interpretability of all latents and of those new at each size (``purity``, ``detection``,
        ``ring_purity``, ``ring_detection``); between prefixes how new latents relate to their parents
        (``parent_cosine``, ``coactivation``, ``handed_over``). See `saekit.sizes.latent_metrics`.
    name
        What the curve calls the SAE; by default its latents and rule.

    Returns
    -------
    SizeCurve

    Raises
    ------
    ConfigError
        A size outside 1..n_latents, sizes that do not increase, an unknown `selection`, `sample_rows` between 1 and 3.
    ShapeError, DataError
        As `evaluate`.
    """
    if selection not in SELECTIONS:
        raise ConfigError(f"measure_sizes: `selection` must be 'before' or 'after'; got {selection!r}.")
    if sample_rows < 0 or 0 < sample_rows < 4:
        raise ConfigError(f"measure_sizes: `sample_rows` must be 0 or at least 4; got {sample_rows}.")
    prefixes = _prefixes(sae, sizes, selection)
    whole = sae if isinstance(sae, SAE) else prefixes[-1].sae
    source = as_source(source, whole.d_in, "measure_sizes")
    measured = [each.measured for each in prefixes]
    common_width(named_saes(measured, "measure_sizes"), "measure_sizes")
    measure_settings = MeasureSettings(
        text=text, max_rows=rows, tokens=CE_TOKENS if tokens is None else tokens,
        batch_rows=batch_rows, draws=draws, seed=seed,
    )  # fmt: skip
    spliced = None
    if model is not None:
        if data is None:
            raise ConfigError("measure_sizes: `model` must come with `data`, the texts it reads; got none.")
        spliced = SplicedModel.of(model, data, measured, source, measure_settings, "measure_sizes")
    found = measure_saes(measured, source, spliced=spliced, settings=measure_settings, progress=progress)
    metrics = [dict(found.metrics(at)) for at in range(len(prefixes))]
    for each, values in zip(prefixes, metrics, strict=True):
        if each.cut:
            values.update(_sparsity_after(each, source, found.n_rows, batch_rows, draws, seed))
    if sample_rows:
        sample = _sample(source, found.n_rows, sample_rows, batch_rows, seed)
        for done, (each, values) in enumerate(zip(prefixes, metrics, strict=True), start=1):
            values.update(_similarity(each, *sample, intervals=draws > 0))
            if progress is not None:
                progress("similarity", done, len(prefixes))
    if latents:
        nested = isinstance(sae, SAE) or _are_prefixes(sae)
        sized = [Sized(each.sae, each.codes, each.size, nested and place > 0) for place, each in enumerate(prefixes)]
        for values, more in zip(
            metrics, latent_metrics(sized, source, found.n_rows, batch_rows, seed, progress), strict=True
        ):
            values.update(more)
    points = [SizePoint(each.size, Metrics(values)) for each, values in zip(prefixes, metrics, strict=True)]
    settings = {
        "rows": rows,
        "tokens": None if spliced is None else spliced.tokens,
        "batch_rows": batch_rows,
        "seed": seed,
        "intervals": interval_facts(draws),
        "selection": selection,
        "sample_rows": sample_rows,
        "latents": latents,
        "each_size": "a prefix of one SAE" if isinstance(sae, SAE) else "an SAE of its own",
    }
    about = {
        "name": name or f"{whole.rule.name}-{whole.n_latents}",
        "n_latents": whole.n_latents,
        "rule": {"name": whole.rule.name, **whole.rule.settings()},
        "order": whole.provenance.get("latent_order", "none"),
        "digest": sae_digest(measured[-1]),
        "provenance": {key: value for key, value in whole.provenance.items() if key != "sizes"},
    }
    return SizeCurve(
        release(),
        library_versions(spliced is not None),
        settings,
        dict(source.info),
        found.n_rows,
        found.language_model,
        about,
        points,
    )


@dataclass(frozen=True)
class _Prefix:
    """One size."""

    sae: SAE
    """Encodes; all of its latents compete."""
    size: int
    """Latents that are kept of its codes."""
    measured: SAE
    """Reconstructs what the size reconstructs."""

    @property
    def cut(self) -> bool:
        """Whether codes lose latents after the selection."""
        return self.size < self.sae.n_latents

    def codes(self, x: Tensor) -> Codes:
        """Codes of the latents kept."""
        codes = self.sae.encode(x)
        return codes.take(self.size) if self.cut else codes


def _prefixes(sae: SAE | Sequence[SAE], sizes: Sequence[int] | None, selection: str) -> list[_Prefix]:
    if not isinstance(sae, SAE):
        each = list(sae)
        found = [one.n_latents for one in each]
        if sizes is not None or not each or found != sorted(set(found)):
            raise ConfigError(
                f"measure_sizes: several SAEs must be of increasing sizes, with no `sizes` beside them; got {found}."
            )
        return [_Prefix(one, one.n_latents, one) for one in each]
    wanted = default_sizes(sae.n_latents) if sizes is None else check_sizes(sae, sizes, "measure_sizes")
    if selection == "before" or not competes(sae):
        small = [sae.take(size) if size < sae.n_latents else sae for size in wanted]
        return [_Prefix(one, one.n_latents, one) for one in small]
    return [_Prefix(sae, size, _silenced(sae, size)) for size in wanted]


def _are_prefixes(saes: Sequence[SAE]) -> bool:
    """Whether each SAE begins with the latents of the one before."""
    return all(
        torch.equal(large.W_dec[: small.n_latents], small.W_dec)
        and torch.equal(large.W_enc[: small.n_latents], small.W_enc)
        for small, large in itertools.pairwise(saes)
    )


def _silenced(sae: SAE, size: int) -> SAE:
    """The SAE whose latents from `size` on compete but write nothing."""
    writes = torch.arange(sae.n_latents, device=sae.device) < size
    return sae.replace(W_dec=torch.where(writes[:, None], sae.W_dec, sae.W_dec.new_zeros(())))


def _sparsity_after(
    prefix: _Prefix, source: Source, n_rows: int, batch_rows: int, draws: int, seed: int
) -> dict[str, Measured]:
    """How many of the latents kept are active, after the selection among all."""
    sparsity, counted = Sparsity(prefix.size), np.zeros(0)
    first, by_document = 0, True
    for batch in source.batches(batch_rows):
        x = batch.x[: n_rows - first]
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
    reason = None if by_document else "interval from runs of 64 consecutive rows: documents are not known"
    estimates = sparsity.compute(DocumentBootstrap.over(counted, draws=draws, seed=seed, reason=reason))
    return {
        key: each.measured(METRICS[key].unit, least=METRICS[key].least, most=METRICS[key].most)
        for key, each in estimates.items()
    }


def _sample(source: Source, n_rows: int, sample_rows: int, batch_rows: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Rows drawn evenly from the first `n_rows`, with the document of each (or its place, where unknown)."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randperm(n_rows, generator=generator)[:sample_rows].sort().values
    parts, documents, first = [], [], 0
    for batch in source.batches(batch_rows):
        here = wanted[(wanted >= first) & (wanted < first + batch.n_rows)] - first
        parts.append(batch.x[here])
        place = (here + first) // 64
        known = place if batch.document is None else torch.where(batch.document[here] >= 0, batch.document[here], place)
        documents.append(known)
        first += batch.n_rows
        if first >= n_rows:
            break
    return torch.cat(parts), torch.cat(documents).numpy()


def _similarity(prefix: _Prefix, x: Tensor, document: np.ndarray, *, intervals: bool) -> dict[str, Measured]:
    sae = prefix.measured
    with torch.no_grad():
        rows = x.to(sae.device, sae.dtype)
        codes = prefix.codes(rows)
        x_hat = sae.decode(codes, rows)
    group = document if intervals else None
    found = {
        "rsa": rsa(x, x_hat, group),
        "cka": linear_cka(x, x_hat, group),
        "cka_codes": linear_cka(x, codes, group),
    }
    return {
        key: each.measured(METRICS[key].unit, least=METRICS[key].least, most=METRICS[key].most)
        for key, each in found.items()
    }
