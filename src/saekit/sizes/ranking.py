"""The order of latents: by importance, greedily, or by a control."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, did_you_mean
from ..measure.importance import (
    SCORES,
    descending,
    importance,
    normal_equations,
    shares_held,
)
from ..measure.normal_equations import greedy_order
from ..rows.opening import as_source, facts_of
from ..sae.model import SAE
from ..settings import Progress

GREEDY = {
    "forward": "greedy: at each step add the latent that lowers E[||x - xh||^2] most",
    "backward": "greedy: at each step remove the latent whose loss raises E[||x - xh||^2] least",
}
"""Orders that account for what the other latents kept already explain; the codes are those of the whole SAE."""

CONTROLS = {"random": "a random order", "unsorted": "the order in which the latents are stored"}
"""Orders that know nothing: what every ranking must beat."""

ORDERS = {**SCORES, **GREEDY, **CONTROLS}
"""Everything that `rank` and `prune` take as `by`, besides scores of your own."""


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
        ``[n_latents]`` from elsewhere (relevance to a class, from
        `saekit.estimators.select.rate_latents`): higher is more important. Latents with equal scores keep their
        stored order. With rows, the names of `SCORES` are measured anew.
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
        return order, {"by": "given", **shares_held(scores[order])}, {"given": scores}
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
        return order, {"by": by, "formula": "stored with the SAE", **shares_held(scores[order])}, {}
    check_order(sae, by, "rank")
    if source is None:
        raise ConfigError(f"rank: importance by `{by}` is measured on rows; got none. Pass rows like the training's.")
    if by in GREEDY:
        source = as_source(source, sae.d_in, "rank")
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
    return order, {**ranking, **shares_held(found.scores[by][order])}, found.scores


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
