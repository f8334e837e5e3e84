"""Which latents matter: scores streamed over rows in one pass, and the order that they give.

A latent's score is a mean over rows, so it does not depend on how rows are cut into batches. The scores of all latents
are gathered together; `rank` sorts an SAE by one of them, which changes none of its reconstructions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, did_you_mean
from ..places import Warned
from ..rows.opening import Rows, facts_of, source_for, target_rows, warnings_on_rows
from ..rows.source import Columns, Source
from ..sae.codes import Codes
from ..sae.model import SAE
from ..sae.naming import name_of
from ..sae.parts import is_crosscoder
from ..settings import Progress, check_whole, silent
from .accumulators import check_rows, double
from .normal_equations import NormalEquations, column_factors, error_factors, row_factors

SCORES = {
    "energy": "E[z^2]",
    "weighted_energy": "E[z^2] * ||decoder row||^2, in squared units of the rows",
    "frequency": "E[z != 0]",
    "mean": "E[|z|]",
    "loss": "E[||x - xh without the latent||^2 - ||x - xh||^2], the other codes as they are",
}
"""Scores by name, with their formula; ``z`` a latent's code. Higher is more important."""

GATHERED_NUMBERS = 2**22
"""Decoder entries that are gathered at once (float32: 16 MiB)."""


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of every latent over the same rows."""

    scores: dict[str, Tensor]
    """By name: ``float64 [n_latents]``, the mean over rows that `SCORES` says."""
    n_rows: int
    """Rows seen."""
    rows: dict[str, Any] = field(default_factory=dict)
    """What the rows are: digest, model, hook, data."""
    warnings: list[Warned] = field(default_factory=list)
    """In what the rows are not like those of the training."""

    @property
    def alive(self) -> Tensor:
        """``bool [n_latents]``: which latents fired at all."""
        return self.scores["frequency"] > 0

    def order(self, by: str) -> Tensor:
        """Latents from the most to the least important; equal scores (the dead, say) stay in stored order.

        Raises
        ------
        ConfigError
            No score of this name.
        """
        if by not in self.scores:
            raise ConfigError(f"importance: `by` must name a score; got `{by}`. {did_you_mean(by, self.scores)}")
        return descending(self.scores[by])


class ImportanceSums:
    """Accumulates the scores of one SAE: ``update`` with rows, ``merge`` with another, ``compute``.

    Parameters
    ----------
    sae
        Whose latents.
    """

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        columns = error_factors(sae)
        self._W = sae.W_dec.float() * columns.float()  # decoder rows in the units of the rows; see `error_factors`
        self._weights = columns / column_factors(sae) if is_crosscoder(sae) else None
        self._squares = self._W.square().sum(1)
        names = ("fires", "sum", "energy", "weighted_energy", "loss")
        self._sums = {name: double(torch.zeros(sae.n_latents, device=sae.device)) for name in names}
        self._n_rows = 0

    def update(self, x: Tensor, codes: Codes | None = None, *, target: Tensor | None = None) -> None:
        """Add rows ``[n, d_in]``, and their codes where they are already there; of a transcoder with their `target`.

        Raises
        ------
        ShapeError, DataError
            Rows of another width, or NaN in them.
        """
        sae = self._sae
        check_rows(x, sae.d_in)
        x = x.to(sae.device, sae.dtype)
        codes = sae.encode(x) if codes is None else codes
        target = x if target is None else target.to(x)
        check_rows(target, sae.d_out)
        residual = (target - sae.decode(codes, x)).float()
        if self._weights is not None:
            residual = residual * self._weights.float()
        z, latent, row = codes.values.float(), codes.indices, codes.row_of()
        written = z * row_factors(sae, x).float()[row]
        square = written.square() * self._squares[latent]
        toward = torch.empty_like(z)
        step = max(1, GATHERED_NUMBERS // sae.d_out)
        for start in range(0, len(z), step):
            part = slice(start, start + step)
            toward[part] = (self._W[latent[part]] * residual[row[part]]).sum(1)
        per_code = {
            "fires": torch.ones_like(z),
            "sum": z.abs(),
            "energy": z.square(),
            "weighted_energy": square,
            "loss": square + 2 * written * toward,
        }
        for name, values in per_code.items():
            total = self._sums[name]
            total.index_add_(0, latent.to(total.device), double(values))
        self._n_rows += len(x)

    def merge(self, other: ImportanceSums) -> None:
        """Add what `other`, of the same SAE, saw."""
        for name, total in self._sums.items():
            total += other._sums[name].to(total.device)
        self._n_rows += other._n_rows

    def compute(self, rows: dict[str, Any] | None = None) -> Importance:
        """Return the scores.

        Raises
        ------
        DataError
            No row was added.
        """
        if not self._n_rows:
            raise DataError("importance: there must be at least one row; none was added. Is the data empty?")
        means = {name: (total / self._n_rows).cpu() for name, total in self._sums.items()}
        scores = {
            "energy": means["energy"],
            "weighted_energy": means["weighted_energy"],
            "frequency": means["fires"],
            "mean": means["sum"],
            "loss": means["loss"],
        }
        return Importance(scores, self._n_rows, rows or {})


def importance(
    sae: SAE, rows: Rows, *, max_rows: int | None = None, batch_rows: int = 4096, progress: Progress | None = None
) -> Importance:
    """Measure every score of every latent, in one pass over the rows.

    Parameters
    ----------
    sae
        An SAE, or a transcoder, whose latents matter for the rows that it predicts.
    rows
        A source, an array ``[n, d_in]``, or the path of a cache folder or array file; for a transcoder with targets.
    max_rows
        Maximum number of rows; None for all.
    batch_rows
        Rows at a time; changes no score beyond rounding.
    progress
        Called as ``progress("importance", done, total)``.

    Returns
    -------
    Importance
        Needs memory for a few numbers per latent, whatever the number of rows.

    Raises
    ------
    ShapeError
        The rows have another width.
    DataError
        No rows, or NaN in them.
    ConfigError
        A setting out of range.
    """
    source = source_for(sae, rows, "importance")
    scores = ImportanceSums(sae)
    with torch.no_grad():
        for batch in batches(source, max_rows, batch_rows, "importance", progress):
            scores.update(batch.x, target=target_rows(batch, sae))
    return replace(scores.compute(facts_of(source)), warnings=warnings_on_rows([(name_of(sae), sae)], source))


def descending(scores: Tensor) -> Tensor:
    """Return the latents from the largest to the smallest score; ties stay in order."""
    return scores.argsort(descending=True, stable=True)


# ------------------------------------------------------------------------------------------------------- shared parts


def normal_equations(
    saes: list[SAE],
    source: Source,
    rows: int | None,
    batch_rows: int,
    progress: Progress | None,
    stage: str = "importance",
) -> list[NormalEquations]:
    """Return the products of codes with each other and with the rows, for each SAE, from one pass."""
    equations = [NormalEquations(sae.n_latents, sae.d_out) for sae in saes]
    with torch.no_grad():
        for batch in batches(source, rows, batch_rows, stage, progress):
            for sae, each in zip(saes, equations, strict=True):
                x = batch.x.to(sae.device, sae.dtype)
                target = target_rows(batch, sae).to(x) if sae.is_transcoder else None
                each.update(sae, sae.encode(batch.x), x, target=target)
    if not equations[0].n_rows:
        raise DataError(f"{stage}: there must be at least one row; the source has none. Is the data empty?")
    return equations


def batches(
    source: Source, limit: int | None, batch_rows: int, stage: str, progress: Progress | None
) -> Iterator[Columns]:
    """Yield rows in stored order, at most `limit`."""
    check_whole(stage, max_rows=limit, batch_rows=batch_rows)
    most = sys.maxsize if limit is None else limit
    total = source.n_rows if limit is None else min(limit, source.n_rows or limit)
    tell = progress or silent
    done = 0
    for batch in source.batches(batch_rows):
        rows = batch.map(lambda column, room=most - done: column[:room])  # type: ignore[misc]
        yield rows
        done += len(rows)
        tell(stage, done, total)
        if done >= most:
            return
