"""Which latents matter: scores streamed over rows in one pass, and the order that they give.

A latent's score is a mean over rows, so it does not depend on how rows are cut into batches. The scores of all latents
are gathered together; `rank` sorts an SAE by one of them, which changes none of its reconstructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import ArrayRows, Source, open_rows
from ..errors import ConfigError, DataError, ShapeError, did_you_mean
from ..measure.accumulate import check_rows, double
from ..sae import SAE, Codes
from .normal import NormalEquations, column_factors, greedy_order, row_factors

SCORES = {
    "energy": "E[z^2]",
    "weighted_energy": "E[z^2] * ||decoder row||^2, in squared units of the rows",
    "frequency": "E[z != 0]",
    "mean": "E[z]",
    "loss": "E[||x - xh without the latent||^2 - ||x - xh||^2], the other codes as they are",
}
"""Scores by name, with their formula; ``z`` a latent's code. Higher is more important."""

GREEDY = {
    "forward": "greedy: at each step add the latent that lowers E[||x - xh||^2] most",
    "backward": "greedy: at each step remove the latent whose loss raises E[||x - xh||^2] least",
}
"""Orders that account for what the other latents kept already explain; the codes are those of the whole SAE."""

CONTROLS = {"random": "a random order", "unsorted": "the order in which the latents are stored"}
"""Orders that know nothing: what every ranking must beat."""

ORDERS = {**SCORES, **GREEDY, **CONTROLS}
"""Everything that `rank` and `prune` take as `by`, besides scores of your own."""

GATHERED_NUMBERS = 2**22
"""Decoder entries that are gathered at once (float32: 16 MiB)."""

Progress = Callable[[str, int, int | None], None]
"""Called with the stage, how much is done, and the total where it is known."""


@dataclass(frozen=True, eq=False)
class Importance:
    """Scores of every latent over the same rows."""

    scores: dict[str, Tensor]
    """By name: ``float64 [n_latents]``, the mean over rows that `SCORES` says."""
    n_rows: int
    """Rows seen."""
    rows: dict[str, Any] = field(default_factory=dict)
    """What the rows are: digest, model, hook, data."""

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


class Scores:
    """Accumulates the scores of one SAE: ``update`` with rows, ``merge`` with another, ``compute``.

    Parameters
    ----------
    sae
        Whose latents; its rows in and out must have the same width.

    Raises
    ------
    ShapeError
        A transcoder: there is no reconstruction to lose.
    """

    def __init__(self, sae: SAE) -> None:
        if sae.d_in != sae.d_out:
            raise ShapeError(
                f"importance: the SAE must write rows of the width it reads; it maps {sae.d_in} to {sae.d_out}. "
                "The importance of a transcoder's latents needs target rows, which are not taken."
            )
        self._sae = sae
        columns = column_factors(sae)
        self._W = sae.W_dec.float() * columns.float()  # decoder rows in the units of the rows
        self._squares = self._W.square().sum(1)
        names = ("fires", "sum", "energy", "weighted_energy", "loss")
        self._sums = {name: double(torch.zeros(sae.n_latents, device=sae.device)) for name in names}
        self._n_rows = 0

    def update(self, x: Tensor, codes: Codes | None = None) -> None:
        """Add rows ``[n, d_in]``, and their codes where they are already there.

        Raises
        ------
        ShapeError, DataError
            Rows of another width, or NaN in them.
        """
        sae = self._sae
        check_rows(x, sae.d_in)
        x = x.to(sae.device, sae.dtype)
        codes = sae.encode(x) if codes is None else codes
        residual = (x - sae.decode(codes, x)).float()
        z, latent, row = codes.values.float(), codes.indices, codes.row_of()
        written = z * row_factors(sae, x).float()[row]
        square = written.square() * self._squares[latent]
        toward = torch.empty_like(z)
        step = max(1, GATHERED_NUMBERS // sae.d_in)
        for start in range(0, len(z), step):
            part = slice(start, start + step)
            toward[part] = (self._W[latent[part]] * residual[row[part]]).sum(1)
        per_code = {
            "fires": torch.ones_like(z),
            "sum": z,
            "energy": z.square(),
            "weighted_energy": square,
            "loss": square + 2 * written * toward,
        }
        for name, values in per_code.items():
            total = self._sums[name]
            total.index_add_(0, latent.to(total.device), double(values))
        self._n_rows += len(x)

    def merge(self, other: Scores) -> None:
        """Add what `other`, of the same SAE, saw."""
        for name, total in self._sums.items():
            total += other._sums[name].to(total.device)
        self._n_rows += other._n_rows

    def compute(self, rows: dict[str, Any] | None = None) -> Importance:
        """The scores.

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
    sae: SAE, source: Any, *, rows: int | None = None, batch_rows: int = 4096, progress: Progress | None = None
) -> Importance:
    """Every score of every latent, in one pass over the rows.

    Parameters
    ----------
    sae
        An SAE with ``d_in = d_out``.
    source
        Rows: a source, an array ``[n, d_in]``, or the path of a cache folder or array file.
    rows
        Most rows to see; None for all.
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
        The rows have another width, or the SAE is a transcoder.
    DataError
        No rows, or NaN in them.
    ConfigError
        A setting out of range.
    """
    source = as_source(sae, source, "importance")
    scores = Scores(sae)
    with torch.no_grad():
        for x in batches(source, rows, batch_rows, "importance", progress):
            scores.update(x)
    return scores.compute(facts_of(source))


def rank(
    sae: SAE,
    source: Any = None,
    *,
    by: str | Tensor = "energy",
    rows: int | None = None,
    batch_rows: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> SAE:
    """The same SAE with its latents in order of importance, so that ``take(m)`` keeps the m that matter most.

    Reconstructions stay as they were. What was ranked by, and the share of the score that prefixes hold, is written
    into ``provenance["ranking"]``; a saved file says so as its ``latent_order``. The scores themselves stay on the SAE
    (``sae.scores``, saved with it): all of `SCORES` where rows were seen, a greedy order as ``n_latents`` for its
    first latent down to 1 for its last, scores of your own as ``"given"``.

    Parameters
    ----------
    sae
        An SAE with ``d_in = d_out``.
    source
        Rows, as for `importance`; not needed for ``"random"``, ``"unsorted"``, scores that the SAE carries and scores
        of your own.
    by
        A name in `ORDERS`, a name in ``sae.scores`` (``"stability"``, written by ``compare(…, write=True)``), or scores
        ``[n_latents]`` from elsewhere (relevance to a class, from `saekit.estimators.rate_latents`): higher is more
        important. Latents with equal scores keep their stored order. With rows, the names of `SCORES` are measured
        anew.
    rows, batch_rows, progress
        As for `importance`.
    seed
        Of the random order.

    Returns
    -------
    SAE
        A permutation of `sae`.

    Raises
    ------
    ConfigError
        `by` is unknown or has another length, or it needs rows and there are none.
    DataError, ShapeError
        As `importance`; scores with NaN.

    Examples
    --------
    ::

        small = sk.rank(sae, rows, by="energy").take(256)
    """
    order, ranking, scores = _order(sae, source, by, rows, batch_rows, seed, progress)
    if ranking["by"] == "unsorted":
        return sae
    provenance = {**sae.provenance, "latent_order": ranking["by"], "ranking": ranking}
    provenance.pop("sizes", None)  # a curve measured along another order
    return sae.with_scores(**scores).permute(order).replace(provenance=provenance)


def _order(
    sae: SAE,
    source: Any,
    by: str | Tensor,
    rows: int | None,
    batch_rows: int,
    seed: int,
    progress: Progress | None,
) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    """The order, what it comes from, and the scores behind it (of the latents as they are stored now)."""
    if not isinstance(by, str):
        scores = torch.as_tensor(by).detach().double().cpu()
        if scores.shape != (sae.n_latents,):
            raise ConfigError(
                f"rank: scores given as `by` must be one number per latent, ({sae.n_latents},); "
                f"got {tuple(scores.shape)}."
            )
        if bool(scores.isnan().any()):
            raise DataError("rank: scores given as `by` must not hold NaN; they do. Give such latents a low score.")
        order = descending(scores)
        return order, {"by": "given", **_shares(scores[order])}, {"given": scores}
    by = by.replace("-", "_")
    if by in CONTROLS:
        if by == "unsorted":
            return torch.arange(sae.n_latents), {"by": by}, {}
        order = torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(seed))
        return order, {"by": by, "seed": seed}, {}
    if by in sae.scores and (source is None or by not in ORDERS):
        scores = sae.scores[by].double()
        if bool(scores.isnan().any()):
            raise DataError(f"rank: `{by}` of this SAE must not hold NaN; it does. Give such latents a low score.")
        order = descending(scores)
        return order, {"by": by, "formula": "stored with the SAE", **_shares(scores[order])}, {}
    check_order(sae, by, "rank")
    if source is None:
        raise ConfigError(f"rank: importance by `{by}` is measured on rows; got none. Pass rows like the training's.")
    if by in GREEDY:
        source = as_source(sae, source, "rank")
        equations = normal_equations([sae], source, rows, batch_rows, progress)[0]
        order, losses = greedy_order(*equations.quadratic(sae), by)
        facts = {"n_rows": equations.n_rows, **facts_of(source), "best": int(losses.argmin())}
        kept_longer = torch.empty(sae.n_latents)
        kept_longer[order] = torch.arange(sae.n_latents, 0, -1, dtype=torch.float32)
        return order, {"by": by, "formula": ORDERS[by], **facts}, {by: kept_longer}
    found = importance(sae, source, rows=rows, batch_rows=batch_rows, progress=progress)
    order = found.order(by)
    alive = int(found.alive.sum())
    ranking = {"by": by, "formula": ORDERS[by], "n_rows": found.n_rows, **found.rows, "alive": alive}
    return order, {**ranking, **_shares(found.scores[by][order])}, found.scores


def check_order(sae: SAE, by: str, where: str, also: Iterable[str] = ()) -> None:
    """Refuse a name that neither `ORDERS`, nor `also`, nor the SAE's scores have.

    Raises
    ------
    ConfigError
        There is nothing of this name.
    """
    known = [*ORDERS, *also, *sae.scores]
    if by.replace("-", "_") not in known:
        stability = " Stability is written by `saekit compare --write`." if by == "stability" else ""
        raise ConfigError(
            f"{where}: `by` must be an importance or a score that the SAE carries; got `{by}`. "
            f"{did_you_mean(by, known)}{stability}"
        )


def _shares(scores: Tensor) -> dict[str, Any]:
    """Share of the total score that the first 1, 2, 4, ... latents hold."""
    total = float(scores.clamp_min(0).sum())
    if not total > 0:
        return {}
    held = scores.clamp_min(0).cumsum(0) / total
    sizes = [2**power for power in range(len(scores).bit_length()) if 2**power <= len(scores)]
    return {"share": {str(size): round(float(held[size - 1]), 6) for size in sizes}}


def descending(scores: Tensor) -> Tensor:
    """Places from the largest to the smallest score; ties stay in order."""
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
    """Products of codes with each other and with the rows, for each SAE, in one pass."""
    equations = [NormalEquations(sae.n_latents, sae.d_out) for sae in saes]
    with torch.no_grad():
        for x in batches(source, rows, batch_rows, stage, progress):
            for sae, each in zip(saes, equations, strict=True):
                each.update(sae, sae.encode(x), x.to(sae.device, sae.dtype))
    if not equations[0].n_rows:
        raise DataError(f"{stage}: there must be at least one row; the source has none. Is the data empty?")
    return equations


def as_source(sae: SAE, source: Any, where: str) -> Source:
    """Rows of the SAE's width from whatever was given.

    Raises
    ------
    ShapeError
        Another width.
    """
    if not isinstance(source, Source):
        source = open_rows(source) if isinstance(source, str) or hasattr(source, "__fspath__") else ArrayRows(source)
    if source.d_in != sae.d_in:
        raise ShapeError(
            f"{where}: rows must have the width of the SAE, {sae.d_in}; they have {source.d_in}. "
            "Was it trained on another model or hook?"
        )
    return source


def batches(
    source: Source, limit: int | None, batch_rows: int, stage: str, progress: Progress | None
) -> Iterator[Tensor]:
    """Rows in stored order, at most `limit`."""
    for name, value in (("rows", limit), ("batch_rows", batch_rows)):
        if value is not None and value < 1:
            raise ConfigError(f"{stage}: `{name}` must be at least 1; got {value}.")
    done = 0
    total = source.n_rows if limit is None else min(limit, source.n_rows or limit)
    for batch in source.batches(batch_rows):
        x = batch.x if limit is None else batch.x[: limit - done]
        yield x
        done += len(x)
        if progress is not None:
            progress(stage, done, total)
        if limit is not None and done >= limit:
            return


def facts_of(source: Source) -> dict[str, Any]:
    """What is written down about rows: enough to find them again."""
    return {key: source.info[key] for key in ("model", "hook", "data", "digest") if source.info.get(key) is not None}
