"""Whether a run was long enough, from its own curve: how much FVU still fell per doubling of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from ..errors import listed
from ..places import Warned
from ..sae.model import SAE
from ..settings import is_number
from .defaults import ResolvedConfig

FALL_LIMIT = 0.1
"""Fall of FVU per doubling of the rows from which an SAE is undertrained. Runs of 100,000, 400,000 and 1,600,000 rows
(``train(TopK(1024, k=16), rows, tokens=...)``, stories260K after block 2) fall by 25%, 15% and 8% and end at FVU .060,
.043 and .037. Unit: fraction of FVU."""
FALL = "fvu_fall_per_doubling"
"""Name of the fall among the metrics in an SAE's provenance."""
LEAST_POINTS = 5
"""Points of a curve from which its slope is told."""
CURVE_POINTS = 100
"""Points of a curve that are kept."""

Point = tuple[int, float]
"""Rows that were seen, and the FVU of the batches since the point before."""


def fall_of(points: Sequence[Point], resolved: ResolvedConfig) -> float | None:
    """Return `fall_per_doubling` of a learner's curve."""
    constant_to = resolved.total_steps - resolved.decay_steps
    return fall_per_doubling(points, resolved.warmup_steps * resolved.batch_rows, constant_to * resolved.batch_rows)


def fall_per_doubling(points: Sequence[Point], constant_from: int, constant_to: int) -> float | None:
    """Return the fraction of FVU that the last doubling of the rows took off, at a constant learning rate.

    It is ``1 - 2**slope`` with the slope of ``log2(FVU)`` over ``log2(rows)``, a straight line through the points from
    half of `constant_to` on. The decay of the learning rate at the end is left out: it lowers FVU in every run.

    Parameters
    ----------
    points
        The curve.
    constant_from, constant_to
        Rows after which the warm-up ends and the decay begins.

    Returns
    -------
    float or None
        None when the warm-up or the decay covers half of those rows, or fewer than five points are there.

    Examples
    --------
    >>> fall_per_doubling([(rows, rows**-0.5) for rows in range(1, 101)], 5, 80)  # doctest: +ELLIPSIS
    0.2928...
    """
    half = constant_to / 2
    last = [(rows, fvu) for rows, fvu in points if half <= rows <= constant_to and fvu > 0]
    if constant_from > half or len(last) < LEAST_POINTS:
        return None
    rows, fvu = np.log2(np.asarray(last, dtype=np.float64)).T
    slope = float(np.polynomial.polynomial.polyfit(rows, fvu, 1)[1])
    return 1 - 2**slope


def adds_point(before: int, step: int, total_steps: int) -> bool:
    """Return whether a curve gets a point at a step, with the step of the point before: one per percent of the run."""
    return step * CURVE_POINTS // total_steps > before * CURVE_POINTS // total_steps


def is_undertrained(fall: float | None) -> TypeGuard[float]:
    """Return whether FVU still fell so fast that a longer run is worth its time."""
    return fall is not None and fall > FALL_LIMIT


def undertrained(named: Iterable[tuple[str, SAE]]) -> list[Warned]:
    """Return a warning that names the SAEs that say of themselves that they were trained too short; none for none."""
    falls = {name: fall for name, sae in named if is_undertrained(fall := recorded_fall(sae.provenance))}
    if not falls:
        return []
    text = f"FVU of {listed(falls)} still fell by up to {max(falls.values()):.0%} per doubling of the rows when the "
    text += "training ended: seeds that are not trained to the end share few latents, whatever there is to find. "
    return [Warned("undertrained", text + "Train on more rows before you conclude that latents are not shared.")]


def recorded_fall(provenance: Mapping[str, Any]) -> float | None:
    """Return the fall per doubling that an SAE's provenance holds; None where there is none."""
    metrics = provenance.get("metrics")
    fall: Any = metrics.get(FALL) if isinstance(metrics, Mapping) else None
    return float(fall) if is_number(fall) else None
