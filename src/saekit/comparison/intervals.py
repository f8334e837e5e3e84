"""Intervals over latents, over SAEs, and over pairs of SAEs, which share SAEs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..measure.intervals import NORMAL, jackknife_error, student
from ..measure.results import Measured


def standard_error(values: Tensor) -> float:
    """Return the standard error of the mean; infinite of one value."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def over_latents(
    value: float,
    error: float,
    *,
    least: float = -1.0,
    most: float = 1.0,
    unit: str = "cosine",
    reason: str = "over latents",
) -> Measured:
    """Return a value with its normal interval, cut at its range."""
    if not math.isfinite(error):
        return Measured(value, None, None, unit, "no interval: there is one latent")
    return Measured(value, max(value - NORMAL * error, least), min(value + NORMAL * error, most), unit, reason)


def over_saes(
    values: Sequence[float] | np.ndarray,
    unit: str = "",
    *,
    fallback: float | None = None,
    most: float | None = None,
    reason: str | None = None,
) -> Measured:
    """Return the mean over SAEs with the interval of Student's t.

    Parameters
    ----------
    values
        One number per SAE; those that are not finite do not count.
    unit
        Their unit.
    fallback
        Standard error over latents, for the interval of one or two SAEs.
    most
        Upper end of the range, which begins at 0; None where there is none.
    reason
        What the interval is over [the number of SAEs].
    """
    each = np.asarray([value for value in values if math.isfinite(value)])
    if not len(each):
        return Measured(math.nan, None, None, unit, "undefined in every SAE")
    mean, n = float(each.mean()), len(each)
    reason = reason or f"interval over {n} SAEs"
    if n >= 3:
        half = student(n - 1) * float(each.std(ddof=1)) / math.sqrt(n)
    elif fallback is not None:
        half, reason = NORMAL * fallback, "interval over latents: it needs at least 3 SAEs to be over SAEs"
    else:
        return Measured(mean, None, None, unit, "no interval: it needs at least 3 SAEs")
    low, high = mean - half, mean + half
    return Measured(
        mean, low if most is None else max(low, 0.0), high if most is None else min(high, most), unit, reason
    )


@dataclass(frozen=True)
class OverPairs:
    """Means over pairs of SAEs. Pairs share SAEs, so SAEs are left out, not pairs."""

    pairs: Sequence[tuple[int, int]]
    """Which SAEs each pair is of."""
    n_saes: int
    """SAEs in all."""

    @property
    def meaning(self) -> str:
        """What intervals of the means come from."""
        if self.n_saes == 2:
            return "over latents of the one pair (how seeds differ takes 3 SAEs)"
        return f"from a jackknife over the {self.n_saes} SAEs"

    def mean(self, each: Sequence[Measured], least: float = 0.0, most: float = 1.0) -> Measured:
        """Return the mean over pairs; with 3 SAEs or more the interval of a jackknife that leaves out one at a time."""
        unit = each[0].unit
        if self.n_saes == 2:
            one = each[0]
            return Measured(one.value, one.low, one.high, unit, "interval over latents: one pair of SAEs")
        values = np.array([measured.value for measured in each])
        kept = [
            [value for value, pair in zip(values, self.pairs, strict=True) if sae not in pair]
            for sae in range(self.n_saes)
        ]
        if not all(kept):
            reason = "no interval: all pairs that count have one SAE in common"
            return Measured(float(values.mean()), None, None, unit, reason)
        error = jackknife_error([float(np.mean(each_kept)) for each_kept in kept])
        if not error:  # all pairs alike, at 0 or 1 say: what the latents leave open remains
            return _widest(float(values.mean()), each)
        error *= student(self.n_saes - 1) / NORMAL
        reason = f"interval from a jackknife over {self.n_saes} SAEs"
        return over_latents(float(values.mean()), error, least=least, most=most, unit=unit, reason=reason)


def _widest(value: float, each: Sequence[Measured]) -> Measured:
    """Return a value within the widest interval of several over latents."""
    lows, highs = ([end for end in ends if end is not None] for ends in zip(*((m.low, m.high) for m in each)))
    low, high = (min(lows), max(highs)) if lows and highs else (None, None)
    return Measured(value, low, high, each[0].unit, "interval over latents: all pairs of SAEs are alike")
