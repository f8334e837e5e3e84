"""Means over seeds, and differences between the ways of getting a small SAE, paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..measure.metrics import METRICS, Metrics
from ..measure.results import Measured
from .families import NESTED
from .largest import DECIDED, FromLargest, from_largest_over_seeds
from .ranking import BASELINES
from .result import CurvePoint, Difference, SizePoint, decided

COMPARED = ("fvu", "ce_sae", "rsa", "cka", "detection", "purity", "description_length")
"""Metrics of the paired differences, as far as they were measured."""

SeedMetrics = Mapping[tuple[str, int], Mapping[int, Metrics]]
"""By way and size, then by seed."""


def curves_over_seeds(
    points: Mapping[tuple[str, int], Mapping[int, SizePoint]], overlaps: Mapping[tuple[str, int], Measured]
) -> list[CurvePoint]:
    """Return the mean of every way and size over seeds; `overlaps` are the latents that seeds share."""
    compared = {way: _from_largest({s: own for (name, s), own in points.items() if name == way}) for way, _ in points}
    return [
        CurvePoint(
            name,
            size,
            sorted(found),
            _with_ce(_over_seeds([each.metrics for each in found.values()]), overlaps.get((name, size))),
            compared[name][size],
        )
        for (name, size), found in sorted(points.items())
    ]


def _from_largest(points: Mapping[int, Mapping[int, SizePoint]]) -> dict[int, FromLargest]:
    """Return the points of one way, by size and seed, compared with those of the largest size."""
    *sizes, largest = sorted(points)
    if all(len(own) == 1 for own in points.values()):
        return {point.size: point.from_largest for own in points.values() for point in own.values()}
    whole, gaps = points[largest], []
    for size in sizes:
        found = {name: _gaps(_metrics(points[size]), _metrics(whole), name) for name in DECIDED}
        gaps.append({name: (_mean(own, METRICS[name].unit), len(own)) for name, own in found.items() if own})
    return dict(zip([*sizes, largest], from_largest_over_seeds(gaps), strict=True))


def _metrics(points: Mapping[int, SizePoint]) -> dict[int, Metrics]:
    return {seed: point.metrics for seed, point in points.items()}


def _over_seeds(metrics: list[Metrics]) -> dict[str, Measured]:
    """Return the mean over seeds with its interval; one seed keeps its own interval."""
    if len(metrics) == 1:
        return dict(metrics[0])
    names = [name for name in metrics[0] if all(name in each for each in metrics)]
    return {name: _mean([each[name].value for each in metrics], metrics[0][name].unit, name) for name in names}


def _with_ce(metrics: dict[str, Measured], overlap: Measured | None) -> Metrics:
    """Return the metrics, with a word about the cross-entropy where there is none, and what the seeds share."""
    unit = METRICS["ce_sae"].unit
    shared = {} if overlap is None else {"shared": overlap}
    none = Measured(math.nan, None, None, unit, "not measured: no language model")
    return Metrics({"ce_sae": none, **metrics, **shared})


def _mean(values: Sequence[float], unit: str, name: str | None = None) -> Measured:
    found = np.array(values, dtype=float)
    if np.isnan(found).any():
        return Measured(math.nan, None, None, unit, "undefined for some seed")
    if len(found) < 2:
        return Measured(float(found.mean()), None, None, unit, "no interval: one seed")
    from scipy.special import stdtrit

    reach = float(stdtrit(len(found) - 1, 0.975) * found.std(ddof=1) / math.sqrt(len(found)))
    mean = float(found.mean())
    metric = METRICS.get(name) if name else None
    low = mean - reach if metric is None or metric.least is None else max(mean - reach, metric.least)
    high = mean + reach if metric is None or metric.most is None else min(mean + reach, metric.most)
    return Measured(mean, low, high, unit, f"interval over {len(found)} seeds (Student's t)")


def paired_differences(values: SeedMetrics, by: Sequence[str]) -> list[Difference]:
    """Return nested minus pruned by the first ranking, and that ranking minus every other way, at each size.

    The sizes of one metric of two ways are one family of claims.
    """
    found = []
    for metric in COMPARED:
        for one, other in _pairs(list(dict.fromkeys(name for name, _ in values)), by):
            for size in sorted({size for name, size in values if name == one}):
                gaps = _gaps(values[one, size], values.get((other, size), {}), metric)
                if gaps:
                    difference = _mean(gaps, METRICS[metric].unit)
                    found.append(Difference(metric, one, other, size, difference, len(gaps)))
    return decided(found)


def _pairs(names: Sequence[str], by: Sequence[str]) -> list[tuple[str, str]]:
    """Return the ways to compare."""
    best = next((each for each in by if each not in BASELINES), None)
    if best is None:
        return []
    leaders = {name.removesuffix(f" pruned by {best}"): name for name in names if name.endswith(f"pruned by {best}")}
    pairs = [(NESTED, leader) for leader in leaders.values() if NESTED in names]
    for arch, leader in leaders.items():
        pairs += [(leader, name) for name in names if name.startswith(f"{arch} ") and name != leader]
    return pairs


def _gaps(left: Mapping[int, Metrics], right: Mapping[int, Metrics], metric: str) -> list[float]:
    """Return the differences of one metric between the SAEs of the seeds that both ways have."""
    seeds = [seed for seed in left if seed in right and metric in left[seed] and metric in right[seed]]
    return [left[seed][metric].value - right[seed][metric].value for seed in seeds]
