"""What a crosscoder says about its two sources: which latents both have, which only one, and whether that is so.

The relative norm of a latent is ``|d_b| / (|d_a| + |d_b|)``, d_a and d_b the parts of its decoder row. A latent with a
part in one source alone may be one of both all the same (2504.02922): its direction is in what the crosscoder does not
reconstruct of the other source (*complete shrinkage*), or other latents write it there (*latent decoupling*). Latent
scaling measures both. With z the codes of a latent, d the part of its decoder row in the source where that is longer,
and y of a source either the error with the latent's own part put back, or the reconstruction by all latents::

    beta = argmin_b sum over rows |b z d - y|^2 = d . (Y^T z) / (|d|^2 |z|^2),    nu = beta(other source) / beta(own)

`nu_error` and `nu_reconstruction`; a latent is *specific* to a source where its relative norm says so and both are
low. All of it is in scaled rows. How many would be called specific if the sources held the same is measured on a
crosscoder of one of them next to itself with noise (`null_rows`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from ..errors import ConfigError, DataError, FormatError, ShapeError
from ..measure.intervals import wilson_interval
from ..measure.results import Measured, Result
from ..places import Warned
from ..progress import shows_progress
from ..provenance import facts_of_sae, library_versions, release
from ..rows.joined import null_rows
from ..rows.opening import Rows, source_for, warnings_on_rows
from ..rows.source import Source
from ..sae.model import SAE
from ..sae.parts import PARTS, parts_of, widths_of
from ..settings import Progress, brief, silent, suggest_keywords
from .settings import SourceSettings

EDGES = (0.1, 0.4, 0.6, 0.9)
"""Relative norms between the five kinds (2504.02922)."""


@dataclass(frozen=True)
class SourceCounts:
    """Latents that fire on the rows and write something, as fractions of them."""

    __repr__ = brief

    kinds: dict[str, Measured]
    """By kind: ``only in a`` (relative norm below .1), ``mostly in a``, ``shared`` (.4 to .6), ``mostly in b``,
    ``only in b`` (above .9)."""
    specific: dict[str, Measured]
    """By source: only in it, and neither shrunk nor decoupled in the other. Empty for sources of different widths, in
    which directions cannot be compared."""


@dataclass(frozen=True, repr=False)
class SourceComparison(Result):
    """Which latents of a crosscoder belong to both of its sources, and which to one."""

    KIND: ClassVar[str] = "source_comparison"
    SCHEMA: ClassVar[int] = 1

    rows: dict[str, Any]
    """``info`` of the rows."""
    n_rows: int
    """Rows seen."""
    sae: dict[str, Any]
    """Latents, width, rule, digest, provenance of the crosscoder."""
    sources: list[str]
    """Names of the two sources, a and b."""
    n_alive: int
    """Latents that fire on the rows, and write something."""
    found: SourceCounts
    """What the crosscoder says."""
    null: SourceCounts | None
    """What a crosscoder says of which both sources hold the same; None where none was given."""
    relative_norm: list[float | None]
    """Relative norm of each latent; None for decoder rows of length 0."""
    nu_error: list[float | None] = field(default_factory=list)
    """nu of the error, for each latent; None where it does not fire, or beta in its own source is not positive."""
    nu_reconstruction: list[float | None] = field(default_factory=list)
    """nu of the reconstruction, likewise."""

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        if len(self.sources) != 2 or len(self.relative_norm) != self.sae.get("n_latents"):
            raise FormatError("`source_comparison` must be of two sources, with a number for each latent; it is not.")

    def table(self) -> list[list[str]]:
        """Return the kinds of latents as rows of text, headings first."""
        null = self.null
        lines = [["", "fraction of live latents", *(["null"] if null else [])]]
        for name, value in self.found.kinds.items():
            lines.append([name, str(value), *([str(null.kinds[name])] if null else [])])
        for name, value in self.found.specific.items():
            lines.append([f"specific to {name}", str(value), *([str(null.specific[name])] if null else [])])
        return lines

    def caption(self) -> str:
        """Return the line under the table."""
        limits = f"nu of error up to {self.settings['error_limit']:g}, of reconstruction up to "
        said = f"; specific: only there, and {limits}{self.settings['reconstruction_limit']:g}"
        null = "" if self.null else "; no null was given: how many are called so by error is not known"
        return f"{self.n_alive:,} latents fire on {self.n_rows:,} rows{said if self.found.specific else ''}{null}"


def kind_names(a: str, b: str) -> list[str]:
    """Return the names of the five kinds of latents, from those of source a to those of source b."""
    return [f"only in {a}", f"mostly in {a}", "shared", f"mostly in {b}", f"only in {b}"]


@suggest_keywords
@shows_progress
def compare_sources(
    sae: SAE,
    rows: Rows,
    *,
    null: SAE | None = None,
    settings: SourceSettings = SourceSettings(),
    progress: Progress | None = None,
) -> SourceComparison:
    """Compare the two sources of a crosscoder.

    Parameters
    ----------
    sae
        A crosscoder of two sources, trained on joined rows.
    rows
        Joined rows of the same sources: what `join_rows` returns.
    null
        A crosscoder trained in the same way on ``null_rows(rows)``.
    settings
        Limits, and how many rows.
    progress
        Called as ``progress("rows", done, total)`` [shown on stderr; ``False``: none].

    Raises
    ------
    ConfigError
        Not a crosscoder of two sources, rows of other sources or of other modules, a null for sources of different
        widths, or one that was trained on something else.
    ShapeError
        A null of another shape.
    """
    source = source_for(sae, rows, "compare_sources")
    widths, names = _parts_of(sae, source)
    places = _checked_places(sae, source)
    if null is not None and (null.n_latents, null.d_in) != (sae.n_latents, sae.d_in):
        raise ShapeError(
            f"compare_sources: the null must be a crosscoder of the same shape, {(sae.n_latents, sae.d_in)}; it is "
            f"{(null.n_latents, null.d_in)}. Train it with the same configuration."
        )
    if null is not None and widths[0] == widths[1] and not _is_null(null.provenance):
        raise ConfigError(
            "compare_sources: the null must be a crosscoder of rows whose sources hold the same; this one was trained "
            "on others. Train it on null_rows(rows) (--rows joined-null:a=PATH,b=PATH)."
        )
    measured = _measure(sae, source, widths, settings, progress or silent)
    other = None
    if null is not None:
        other = _measure(null, null_rows(source), widths, settings, progress or silent).counts(names, settings)
    return SourceComparison(
        saekit=release(),
        versions=library_versions(False),
        settings={
            "max_rows": settings.max_rows,
            "error_limit": settings.error_limit,
            "reconstruction_limit": settings.reconstruction_limit,
            "null": None if null is None else null.digest(),
        },
        rows=dict(source.info),
        n_rows=measured.n_rows,
        sae=facts_of_sae(sae),
        sources=names,
        n_alive=int(measured.alive.sum()),
        found=measured.counts(names, settings),
        null=other,
        relative_norm=_plain(measured.relative_norm),
        nu_error=_plain(measured.nu_error),
        nu_reconstruction=_plain(measured.nu_reconstruction),
        warnings=places,
    )


def _parts_of(sae: SAE, source: Source) -> tuple[tuple[int, int], list[str]]:
    """Return widths and names of the two sources, checked."""
    own = parts_of(sae, "compare_sources")
    if len(own) != 2:
        raise ConfigError(
            f"compare_sources: the SAE must be a crosscoder of two sources; it is one of {len(own) or 1}. Train one "
            "on join_rows({'a': rows, 'b': others})."
        )
    widths = widths_of(source.info)
    names = list(own)
    if widths is None:  # other sources were refused before
        raise ConfigError(
            f"compare_sources: the rows must be joined ones of the sources {names}, as in training; they are not. "
            "Make them with join_rows, with the same names in the same order."
        )
    return (widths[0], widths[1]), names


def _is_null(known: Mapping[str, Any]) -> bool:
    """Return whether joined rows, or the SAE of such, are those of `null_rows`."""
    return any(part.get("null") for part in known.get(PARTS) or ())


def _checked_places(sae: SAE, source: Source) -> list[Warned]:
    """Return what is not as in the training; refuse the null of the rows, and sources of other modules."""
    for what, known in (("SAE", sae.provenance), ("rows", source.info)):
        if _is_null(known):
            raise ConfigError(
                f"compare_sources: the {what} must be of the sources themselves; it is of their null. Give what was "
                "trained on joined rows as the SAE, those rows, and what was trained on the null as `null` (--null)."
            )
    found = warnings_on_rows([("the crosscoder", sae)], source)
    if wrong := next((each for each in found if each.code == "other_hook"), None):
        raise ConfigError(f"compare_sources: each source must be that of the training. {wrong.message}")
    return found


@dataclass(frozen=True)
class _Measured:
    """What one pass over rows says about the latents of a crosscoder; NaN where nothing."""

    n_rows: int
    alive: np.ndarray
    relative_norm: np.ndarray
    nu_error: np.ndarray
    nu_reconstruction: np.ndarray

    def counts(self, names: Sequence[str], settings: SourceSettings) -> SourceCounts:
        """Return the kinds of latents that fire."""
        n = int(self.alive.sum())
        norms = self.relative_norm[self.alive]
        if not n:
            raise DataError(
                "compare_sources: some latent must fire on the rows and write something; none does. Were the rows "
                "captured alike?"
            )
        kind = np.digitize(norms, EDGES)
        each = kind_names(*names)
        kinds = {name: wilson_interval(int((kind == at).sum()), n) for at, name in enumerate(each)}
        if not len(self.nu_error):
            return SourceCounts(kinds, {})
        low = (self.nu_error[self.alive] <= settings.error_limit) & (
            self.nu_reconstruction[self.alive] <= settings.reconstruction_limit
        )  # NaN is not low
        ends = {names[0]: 0, names[1]: len(EDGES)}
        return SourceCounts(
            kinds, {name: wilson_interval(int((low & (kind == at)).sum()), n) for name, at in ends.items()}
        )


def _measure(sae: SAE, source: Source, widths: tuple[int, int], settings: SourceSettings, tell: Progress) -> _Measured:
    """Return what one pass over the rows says about the latents."""
    D = sae.W_dec.detach().double().cpu()
    parts = D.split(widths, dim=1)
    lengths = torch.stack([part.norm(dim=1) for part in parts])
    relative = (lengths[1] / lengths.sum(0)).numpy()
    comparable = widths[0] == widths[1]
    own = (lengths[1] > lengths[0]).long()
    d = torch.where(own[:, None] > 0, parts[1], parts[0]) if comparable else torch.empty(0)
    squares, n_rows = np.zeros(sae.n_latents), 0
    along = np.zeros((2, 2, sae.n_latents))  # error and reconstruction, of each source: d . (Y^T z)
    fired = np.zeros(sae.n_latents, dtype=np.int64)
    total = source.n_rows if settings.max_rows is None else min(settings.max_rows, source.n_rows or settings.max_rows)
    for batch in source.batches(settings.batch_rows):
        x = batch.x if settings.max_rows is None else batch.x[: settings.max_rows - n_rows]
        with torch.no_grad():
            codes = sae.encode(x)
            u = sae.scaling.apply(x.to(sae.device, sae.dtype))[0].cpu().double()
        z = codes.to("cpu").to_scipy().astype(np.float64)
        fired += np.bincount(z.indices, minlength=sae.n_latents)
        squares += np.asarray(z.multiply(z).sum(0)).ravel()
        n_rows += len(x)
        if comparable:
            written = torch.from_numpy(z @ D.numpy())
            error = u - written - sae.b_dec.detach().cpu().double()
            for at, y in enumerate((error, written)):
                for part, own_part in enumerate(y.split(widths, dim=1)):
                    along[at, part] += ((z.T @ own_part.numpy()) * d.numpy()).sum(1)
        tell("rows", n_rows, total)
        if settings.max_rows is not None and n_rows >= settings.max_rows:
            break
    alive = (fired > 0) & np.isfinite(relative)  # a row of length 0 is in neither source
    if not comparable:
        return _Measured(n_rows, alive, relative, np.empty(0), np.empty(0))
    put_back = np.stack([(d * part).sum(1).numpy() * squares for part in parts])
    error_nu, reconstruction_nu = (_ratio(each, own.numpy()) for each in (along[0] + put_back, along[1]))
    return _Measured(n_rows, alive, relative, error_nu, reconstruction_nu)


def _ratio(betas: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return beta of the other source / beta of its own ``[n_latents]``, the common factor left out; NaN where that is
    not positive.
    """
    index = np.arange(len(own))
    mine, other = betas[own, index], betas[1 - own, index]
    return np.where(mine > 0, other / np.where(mine > 0, mine, 1.0), math.nan)


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values.tolist()]
