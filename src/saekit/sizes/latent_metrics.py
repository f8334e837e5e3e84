"""What the latents of each size are like: how interpretable, whose children, how many bits they cost, whether other
seeds have them too.

The latents that are new between two sizes are a *ring*. All of this is measured in one pass over the rows, whatever the
number of sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..errors import ShapeError
from ..matching.shared import shared_latents
from ..measure.chance import Chance, against_chance
from ..measure.mdl import DescriptionLength
from ..measure.metrics import METRICS
from ..measure.results import Measured
from ..measure.token_statistics import TokenScores, token_detection
from ..rows.source import Batch, Source
from ..sae.codes import Codes
from ..sae.model import SAE
from ..settings import Progress, silent

CHANCE_DRAWS = 32
"""Chance samples for the purity of latents that fire in the same way."""

RUN_ROWS = 64
"""Rows without a document are divided in runs of this many."""

OVER_LATENTS = "interval over latents"
ONE_SAE = "no interval: one number per SAE"


@dataclass(frozen=True, eq=False)
class Sized:
    """One size of an SAE.

    Parameters
    ----------
    sae
        The SAE of this size, its first latents those of the sizes before.
    codes
        From rows ``[n, d]`` to the codes of the latents kept.
    nested
        Whether its first latents are those of the size before; false for SAEs that were trained apart.
    """

    sae: SAE
    codes: Callable[[Tensor], Codes]
    n_latents: int
    nested: bool

    @property
    def decoder(self) -> Tensor:
        """Return the decoder rows of the latents kept."""
        return self.sae.W_dec[: self.n_latents]


def latent_metrics(
    sized: Sequence[Sized],
    source: Source,
    n_rows: int,
    *,
    batch_rows: int,
    seed: int = 0,
    progress: Progress = silent,
) -> list[dict[str, Measured]]:
    """Measure the latents at every size, in one pass.

    Parameters
    ----------
    sized
        From small to large.
    source
        Rows; with token ids there is interpretability: tokens are learned on every other document (of those that come)
        and detection is scored on the rest.
    n_rows
        Rows to see.
    batch_rows
        Rows at a time; changes nothing beyond rounding.
    seed
        Random seed of the chance level.

    Returns
    -------
    list of dict
        By size: ``description_length``; with tokens ``purity``, ``purity_chance``, ``detection`` and the same of the
        ring (``ring_purity``, ``ring_detection``); between nested sizes ``parent_cosine``, ``coactivation`` and
        ``handed_over``.
    """
    passes = [_Pass(each) for each in sized]
    rings = [_Ring.of(one, other) for one, other in zip([None, *sized], sized)]
    first = 0
    with torch.no_grad():
        for batch in source.batches(batch_rows):
            x = batch.x[: n_rows - first]
            if not len(x):
                break
            second = _second_half(batch, first)[: len(x)]
            token = None if batch.token is None else batch.token[: len(x)]
            codes = [each.sized.codes(x) for each in passes]
            for each, mine in zip(passes, codes, strict=True):
                each.update(mine, token, second)
            for ring, before, mine in zip(rings[1:], codes, codes[1:]):
                if ring is not None:
                    ring.update(before, mine)
            first += len(x)
            progress("latents", first, n_rows)
    chance = passes[0].chance(seed)  # all sizes saw the same tokens
    starts = [0, *(each.n_latents for each in sized)]
    found = [each.compute(start if each.sized.nested else 0, chance) for each, start in zip(passes, starts)]
    return [values if ring is None else values | ring.compute() for values, ring in zip(found, rings, strict=True)]


class _Pass:
    """Accumulators of one size."""

    def __init__(self, sized: Sized) -> None:
        self.sized = sized
        self._length = DescriptionLength(sized.n_latents)
        self._halves = [TokenScores(sized.n_latents), TokenScores(sized.n_latents)]
        self._tokens_known = True

    def update(self, codes: Codes, token: Tensor | None, second: Tensor) -> None:
        """Add rows; `second` says which are scored."""
        self._length.update(codes)
        if token is None or bool((token < 0).any()):
            self._tokens_known = False
            return
        for scores, mine in zip(self._halves, (~second, second), strict=True):
            scores.update(codes.rows(mine), token[mine.to(token.device)])

    def chance(self, seed: int) -> Chance | None:
        """Return the chance level of the tokens of the first half; None where there is no interpretability."""
        return Chance.of(self._halves[0], draws=CHANCE_DRAWS, seed=seed) if self._has_tokens else None

    @property
    def _has_tokens(self) -> bool:
        return self._tokens_known and all(half.n_rows for half in self._halves)

    def compute(self, ring_from: int, chance: Chance | None) -> dict[str, Measured]:
        """Return the metrics; the ring is the latents from `ring_from` on."""
        found = {"description_length": _measured("description_length", self._length.compute())}
        learned, scored = self._halves
        if chance is None:
            return found
        detection = token_detection(learned, scored)
        learned.merge(scored)
        purity = learned.compute().purity
        by_chance = against_chance(learned, chance)["purity"].chance
        for name, values in (("purity", purity), ("purity_chance", by_chance), ("detection", detection)):
            found[name] = over_latents(name, values)
        for name, values in (("ring_purity", purity), ("ring_detection", detection)):
            found[name] = over_latents(name, values[ring_from:])
        return found


class _Ring:
    """How the latents that are new at a size relate to their parents: the nearest of the latents before them."""

    def __init__(self, smaller: Sized, larger: Sized) -> None:
        self._start, self._end = smaller.n_latents, larger.n_latents
        new, old = larger.decoder[self._start :], smaller.decoder
        self._parent, self._cosine = nearest(new, old)
        self._fires = self._with_parent = self._handed_over = 0.0

    @staticmethod
    def of(smaller: Sized | None, larger: Sized) -> _Ring | None:
        """Return None where there is no size before that `larger` contains."""
        return _Ring(smaller, larger) if smaller is not None and larger.nested else None

    def update(self, small: Codes, large: Codes) -> None:
        """Add the codes of the same rows at both sizes."""
        before = _fired(small)[:, self._parent]
        after = _fired(large)
        child, parent = after[:, self._start : self._end], after[:, self._parent]
        together = child.multiply(before)
        self._fires += float(child.sum())
        self._with_parent += float(together.sum())
        self._handed_over += float(together.sum() - together.multiply(parent).sum())

    def compute(self) -> dict[str, Measured]:
        """Return the metrics."""
        none = "undefined: no new latent fires"
        return {
            "parent_cosine": over_latents("parent_cosine", self._cosine),
            "coactivation": _ratio("coactivation", self._with_parent, self._fires, none),
            "handed_over": _ratio("handed_over", self._handed_over, self._with_parent, none + " with its parent"),
        }


def nearest(rows: Tensor, among: Tensor) -> tuple[np.ndarray, Tensor]:
    """Return for each of `rows` ``[n, d]`` the index of the row of `among` with the largest cosine, and that cosine."""
    unit = among.float() / among.float().norm(dim=1, keepdim=True).clamp_min(1e-30)
    places, cosines = [], []
    for block in rows.float().split(max(1, 2**22 // len(among))):
        best = kernels.matmul(block / block.norm(dim=1, keepdim=True).clamp_min(1e-30), unit.T).max(1)
        places.append(best.indices)
        cosines.append(best.values)
    return torch.cat(places).cpu().numpy(), torch.cat(cosines).double().cpu()


def seed_overlap(saes: Sequence[SAE]) -> Measured:
    """Return the fraction of latents that two of the SAEs have in common, the mean over pairs.

    A latent is shared when the best one-to-one matching of decoder rows and that of encoder rows pair it with the same
    latent, and both cosines exceed 0.7, as in `saekit.compare`.

    Raises
    ------
    ShapeError
        The SAEs have different numbers of latents.
    """
    if len({sae.n_latents for sae in saes}) > 1:
        raise ShapeError(f"seed_overlap: all SAEs must be of one size; got {[sae.n_latents for sae in saes]}.")
    shares = []
    for i, one in enumerate(saes):
        for other in saes[i + 1 :]:
            shares.append(float(shared_latents(one, other).double().mean()))
    if not shares:
        return _measured("shared", math.nan, "undefined: one seed")
    if len(shares) < 2:
        return _measured("shared", shares[0], "no interval: one pair of seeds")
    reason = f"from {min(shares):.3g} to {max(shares):.3g} over {len(shares)} pairs of seeds; no interval: they overlap"
    return _measured("shared", sum(shares) / len(shares), reason)


def over_latents(name: str, values: Tensor) -> Measured:
    """Return the mean over the latents that have a value, with its normal interval over them."""
    values = values[~values.isnan()].double()
    metric = METRICS[name]
    if not len(values):
        return Measured(math.nan, None, None, metric.unit, "undefined: no latent of them fires")
    mean = float(values.mean())
    if len(values) < 2:
        return Measured(mean, None, None, metric.unit, "no interval: one latent")
    reach = 1.96 * float(values.std()) / math.sqrt(len(values))
    low = mean - reach if metric.least is None else max(mean - reach, metric.least)
    high = mean + reach if metric.most is None else min(mean + reach, metric.most)
    return Measured(mean, low, high, metric.unit, OVER_LATENTS)


def _measured(name: str, value: float, reason: str = ONE_SAE) -> Measured:
    return Measured(value, None, None, METRICS[name].unit, reason)


def _ratio(name: str, numerator: float, denominator: float, undefined: str) -> Measured:
    return _measured(name, numerator / denominator) if denominator else _measured(name, math.nan, undefined)


def _fired(codes: Codes) -> Any:
    """Return which codes there are, as a sparse table of ones that is quick to take columns of."""
    fired = codes.to_scipy().tocsc()
    fired.data = np.ones_like(fired.data)
    return fired


def _second_half(batch: Batch, first: int) -> Tensor:
    """Return which rows are in every other pair of documents (or runs of 64 rows), so that halves of halves differ."""
    number = torch.arange(first, first + batch.n_rows) // RUN_ROWS
    if batch.document is not None:
        number = torch.where(batch.document >= 0, batch.document.cpu(), number)
    return number // 2 % 2 == 1
