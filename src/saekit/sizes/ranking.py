"""The order of latents: by importance, greedily, or a baseline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, did_you_mean
from ..measure.importance import SCORES, descending, importance, normal_equations
from ..measure.normal_equations import greedy_order
from ..measure.weight_scores import WEIGHT_SCORES, weight_scores
from ..places import Warned, warn
from ..progress import shows_progress
from ..ranks import refuse_unsplit
from ..rows.opening import facts_of, source_for, warnings_on_rows
from ..sae.model import SAE
from ..sae.naming import name_of
from ..settings import Progress, suggest_keywords

GREEDY = {
    "forward": "greedy: at each step add the latent that lowers E[||x - xh||^2] most",
    "backward": "greedy: at each step remove the latent whose loss raises E[||x - xh||^2] least",
}
"""Orders that account for what the other latents kept already explain; the codes are those of the whole SAE."""

NORM_RATIO = 1.5
"""Ratio of the lengths of two decoder rows from which codes alone say little about importance."""

BASELINES = {"random": "a random order", "unsorted": "the order in which the latents are stored"}
"""Orders that use no information about the latents: the baselines of every ranking."""

ORDERS = {**SCORES, **WEIGHT_SCORES, **GREEDY, **BASELINES}
"""Everything that `rank` and `prune` take as `by`, besides scores of your own."""


@suggest_keywords
@shows_progress
def rank(
    sae: SAE,
    rows: Any = None,
    *,
    by: str | Tensor = "energy",
    max_rows: int | None = None,
    batch_rows: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
) -> SAE:
    """Return the same SAE with its latents in order of importance, so that ``take(m)`` keeps the m that matter most.

    Reconstructions stay as they were. What was ranked by, and the fraction of the score that prefixes hold, is written
    into ``provenance["ranking"]``; a saved file says so as its ``latent_order``. The scores themselves stay on the SAE
    (``sae.scores``, saved with it): all of `SCORES` where rows were seen, a greedy order as ``n_latents`` for its
    first latent down to 1 for its last, scores of your own as ``"given"``.

    Parameters
    ----------
    sae
        An SAE or a transcoder.
    rows
        A source of rows, as for `importance`; not needed for ``"random"``, ``"unsorted"``, scores of the weights
        (``"alignment_self"``, ``"encoder_norm"``), scores that the SAE carries and scores of your own.
    by
        A name in `ORDERS`, a name in ``sae.scores`` (``"stability"``, written by ``compare(…, write=True)``), or scores
        ``[n_latents]`` from elsewhere (relevance to a class, from
        `saekit.estimators.select.rate_latents`): higher is more important. Latents with equal scores keep their
        stored order. With rows, the names of `SCORES` are measured anew.
    max_rows
        Maximum number of rows [all].
    batch_rows, progress
        As for `importance`.
    seed
        Random seed of the random order.

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
    refuse_unsplit("rank")
    order = _order(sae, by, _Rows(sae, rows, max_rows, batch_rows, progress), seed)
    warn(order.warnings)
    if order.ranking["by"] == "unsorted":
        return sae
    provenance = {**sae.provenance, "latent_order": order.ranking["by"], "ranking": order.ranking}
    provenance.pop("sizes", None)  # a curve measured along another order
    return sae.with_scores(**order.scores).permute(order.latents).replace(provenance=provenance)


@dataclass(frozen=True)
class _Rows:
    """The rows to rank on, as they were asked for."""

    sae: SAE
    given: Any
    max_rows: int | None
    batch_rows: int
    progress: Progress | None


@dataclass(frozen=True)
class _Order:
    """An order of latents."""

    latents: Tensor
    """From the most to the least important."""
    ranking: dict[str, Any]
    """Where it comes from."""
    scores: dict[str, Tensor] = field(default_factory=dict)
    """The scores behind it, of the latents as they are stored now."""
    warnings: list[Warned] = field(default_factory=list)
    """In what the rows are not like those of the training."""


def _order(sae: SAE, by: str | Tensor, rows: _Rows, seed: int) -> _Order:
    if not isinstance(by, str):
        return _by_given(sae, by)
    by = by.replace("-", "_")
    if by == "unsorted":
        return _Order(torch.arange(sae.n_latents), {"by": by})
    if by == "random":
        order = torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(seed))
        return _Order(order, {"by": by, "seed": seed})
    if by in WEIGHT_SCORES:
        return _by_weights(sae, by)
    if by in sae.scores and (rows.given is None or by not in ORDERS):
        return _by_stored(sae, by)
    check_order(sae, by, "rank")
    if rows.given is None:
        raise ConfigError(f"rank: importance by `{by}` is measured on rows; got none. Pass rows like the training's.")
    return _greedily(by, rows) if by in GREEDY else _by_importance(by, rows)


def _by_given(sae: SAE, by: Tensor) -> _Order:
    scores = torch.as_tensor(by).detach().double().cpu()
    if scores.shape != (sae.n_latents,):
        raise ConfigError(
            f"rank: scores given as `by` must be one number per latent, ({sae.n_latents},); got {tuple(scores.shape)}."
        )
    if bool(scores.isnan().any()):
        raise DataError("rank: scores given as `by` must not hold NaN; they do. Give such latents a low score.")
    order = descending(scores)
    return _Order(order, {"by": "given", **_fractions(scores[order])}, {"given": scores})


def _by_stored(sae: SAE, by: str) -> _Order:
    scores = sae.scores[by].double()
    if bool(scores.isnan().any()):
        raise DataError(f"rank: `{by}` of this SAE must not hold NaN; it does. Give such latents a low score.")
    order = descending(scores)
    return _Order(order, {"by": by, "formula": "stored with the SAE", **_fractions(scores[order])})


def _by_weights(sae: SAE, by: str) -> _Order:
    found = weight_scores(sae)
    if by not in found:
        raise ConfigError(
            f"rank: `{by}` compares what a latent reads with what it writes; {name_of(sae)} is a transcoder, which "
            f"reads one space and writes another. {did_you_mean('encoder_norm', ORDERS)}"
        )
    order = descending(found[by])
    return _Order(order, {"by": by, "formula": ORDERS[by], **_fractions(found[by][order])}, found)


def _greedily(by: str, rows: _Rows) -> _Order:
    sae = rows.sae
    source = source_for(sae, rows.given, "rank")
    equations = normal_equations([sae], source, rows.max_rows, rows.batch_rows, rows.progress)[0]
    order, losses = greedy_order(*equations.quadratic(sae), by)
    facts = {"n_rows": equations.n_rows, **facts_of(source), "best": int(losses.argmin())}
    kept_longer = torch.empty(sae.n_latents)
    kept_longer[order] = torch.arange(sae.n_latents, 0, -1, dtype=torch.float32)
    told = warnings_on_rows([(name_of(sae), sae)], source)
    return _Order(order, {"by": by, "formula": ORDERS[by], **facts, **_plain(told)}, {by: kept_longer}, told)


def _by_importance(by: str, rows: _Rows) -> _Order:
    found = importance(rows.sae, rows.given, max_rows=rows.max_rows, batch_rows=rows.batch_rows, progress=rows.progress)
    order, told = found.order(by), found.warnings + _unequal_norms(rows.sae, by)
    ranking = {
        "by": by, "formula": ORDERS[by], "n_rows": found.n_rows, **found.rows, "alive": int(found.alive.sum()),
        **_fractions(found.scores[by][order]), **_plain(told),
    }  # fmt: skip
    return _Order(order, ranking, found.scores, told)


def _unequal_norms(sae: SAE, by: str) -> list[Warned]:
    """Return a warning where the lengths of decoder rows, which codes alone do not show, would decide the order."""
    if by not in ("energy", "mean"):
        return []
    norms = sae.W_dec.float().norm(dim=1)
    norms = norms[norms > 0]
    if not len(norms) or float(norms.max() / norms.min()) <= NORM_RATIO:
        return []
    message = (
        f"the decoder rows of {name_of(sae)} have lengths from {float(norms.min()):.3g} to {float(norms.max()):.3g}, "
        f"which `{by}` of the codes does not see: rank by weighted_energy, or fold_norms() first"
    )
    return [Warned("decoder_norms", message)]


def _plain(told: list[Warned]) -> dict[str, Any]:
    """Return the warnings as an entry of a provenance; nothing where there are none."""
    return {"warnings": [each.to_json() for each in told]} if told else {}


def _fractions(scores: Tensor) -> dict[str, Any]:
    """Return the fraction of the total score that the first 1, 2, 4, ... latents hold."""
    total = float(scores.clamp_min(0).sum())
    if not total > 0:
        return {}
    held = scores.clamp_min(0).cumsum(0) / total
    sizes = [2**power for power in range(len(scores).bit_length()) if 2**power <= len(scores)]
    return {"share": {str(size): round(float(held[size - 1]), 6) for size in sizes}}


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
