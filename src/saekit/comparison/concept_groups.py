"""What many seeds share: concept groups, and how the share that only one of them has falls with their number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError, DataError
from ..measure.intervals import jackknife_error, student
from ..measure.results import Measured

LEAST_POINTS = 4
"""Points of a curve that a power law with offset (three numbers) is fitted to at least."""

DECIDING_SAES = 20
"""SAEs below which an offset is undecided: over less than a decade a slow power law looks like one with an offset."""

NO_OFFSET = 0.01
"""Fraction of the latents below which an offset counts as none."""

STEEPEST = 8.0
"""Largest exponent that is tried."""


@dataclass(frozen=True)
class Groups:
    """Latents of several SAEs that are one concept: at most one latent of each SAE in a group."""

    of: list[list[int]] = field(repr=False)
    """Per SAE and latent: the number of its group, -1 for a latent that no other SAE has."""
    size: list[int] = field(repr=False)
    """Per group: the number of SAEs that have it, 2 to m; larger groups come first."""
    consistency: list[float] = field(repr=False)
    """Per group: the fraction of the pairs of its latents that are shared. 1: all of them recognise each other."""
    count: list[int]
    """Concepts that exactly 1, 2, … m of the SAEs have; the first number counts the latents without a group."""
    mean_consistency: float | None
    """Mean of `consistency`, weighted by the pairs; None without groups."""
    contested: int
    """Shared pairs left out because they would put two latents of one SAE into a group: weaker pairs give way."""

    @property
    def n_groups(self) -> int:
        """Number of groups."""
        return len(self.size)

    def members(self) -> list[list[tuple[int, int]]]:
        """``(SAE, latent)`` of each group."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.size]
        for sae, groups in enumerate(self.of):
            for latent, group in enumerate(groups):
                if group >= 0:
                    found[group].append((sae, latent))
        return found


Shared = tuple[int, int, np.ndarray, np.ndarray, np.ndarray]
"""Two SAEs, latents of the first, their partners in the second, and how close each pair is."""


def concept_groups(n_latents: Sequence[int], shared: Sequence[Shared]) -> Groups:
    """Cluster the shared pairs of all pairs of SAEs: closest pairs first, never two latents of one SAE together.

    Without conflicts these are the connected components of "shared". Pairs that are equally close are taken in an
    order of their groups' making, so the clusters do not depend on the order of the SAEs unless they tie and conflict.

    Parameters
    ----------
    n_latents
        Number of latents of each SAE.
    shared
        One entry per pair of SAEs: ``(i, j, latents of i, their partners in j, closeness)``; larger is closer.
    """
    starts = np.concatenate([[0], np.cumsum(n_latents)]).astype(np.int64)
    total, m = int(starts[-1]), len(n_latents)
    left = np.concatenate([np.zeros(0, np.int64), *(starts[i] + mine for i, _, mine, _, _ in shared)])
    right = np.concatenate([np.zeros(0, np.int64), *(starts[j] + theirs for _, j, _, theirs, _ in shared)])
    close = np.concatenate([np.zeros(0), *(each for *_, each in shared)])
    edges = np.argsort(-close, kind="stable")
    roots, contested = _clusters(np.repeat(np.arange(m), n_latents), left[edges], right[edges])
    sizes = np.bincount(roots, minlength=total)
    within = roots[left] == roots[right]
    n_edges = np.bincount(roots[left[within]], minlength=total)
    strength = np.bincount(roots[left[within]], close[within], minlength=total)
    kept = np.flatnonzero(sizes > 1)
    order = kept[np.lexsort((-strength[kept], -sizes[kept]))]
    number = np.full(total, -1, dtype=np.int64)
    number[order] = np.arange(len(order))
    of = number[roots]
    pairs = sizes[order] * (sizes[order] - 1) // 2
    consistency = n_edges[order] / np.maximum(pairs, 1)
    return Groups(
        of=[of[starts[i] : starts[i + 1]].tolist() for i in range(m)],
        size=sizes[order].tolist(),
        consistency=[round(float(value), 6) for value in consistency],
        count=np.bincount(sizes[sizes > 0], minlength=m + 1)[1:].tolist(),
        mean_consistency=float(n_edges[order].sum() / pairs.sum()) if len(order) else None,
        contested=contested,
    )


def _clusters(sae_of: np.ndarray, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, int]:
    """Join nodes along edges in their order, unless two nodes of one SAE would come together.

    Returns
    -------
    roots, contested
        ``int64 [n_nodes]``, equal for nodes of one cluster; edges that were left out.
    """
    parent = list(range(len(sae_of)))
    has = [1 << int(sae) for sae in sae_of]  # SAEs in the cluster, as bits

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    contested = 0
    for one, other in zip(left.tolist(), right.tolist(), strict=True):
        a, b = root(one), root(other)
        if a == b:
            continue
        if has[a] & has[b]:
            contested += 1
            continue
        parent[b] = a
        has[a] |= has[b]
    return np.array([root(node) for node in range(len(sae_of))], dtype=np.int64), contested


# --------------------------------------------------------------------------------------------------- only in one of m


def only_in_one(has: Sequence[np.ndarray], saes: Sequence[int] | None = None) -> np.ndarray:
    """Return the fraction of latents that only one of s = 2 … m SAEs has: mean over bases and all orders of the rest.

    For a latent that c of the m - 1 others have, C(m - 1 - c, s - 1) / C(m - 1, s - 1) of the subsets have none.

    Parameters
    ----------
    has
        Per SAE ``bool [n_latents, m]``: which SAEs have each of its latents.
    saes
        Only these SAEs; None for all.

    Returns
    -------
    numpy.ndarray
        ``[bases, m - 1]``: the curve of every base.
    """
    kept = list(range(len(has)) if saes is None else saes)
    m = len(kept)
    curves = np.zeros((m, m - 1))
    for row, base in enumerate(kept):
        others = has[base][:, [sae for sae in kept if sae != base]].sum(1)
        for size in range(2, m + 1):
            missed = np.array([math.comb(m - 1 - c, size - 1) / math.comb(m - 1, size - 1) for c in range(m)])
            curves[row, size - 2] = missed[others].mean()
    return curves


@dataclass(frozen=True)
class SharingLaw:
    """``share only in one ~ amplitude * m^-exponent + offset`` as the number m of SAEs grows.

    The offset is the fraction of latents that no number of further seeds would find, as far as the law holds beyond the
    seeds there are. Intervals come from a jackknife
    that leaves out one SAE at a time: SAEs are what was sampled, not pairs of them.
    """

    amplitude: Measured
    exponent: Measured
    offset: Measured
    """0 where the curve falls to nothing."""
    plain_amplitude: Measured
    """The same law without an offset."""
    plain_exponent: Measured
    error: float
    """Root mean squared error of the law with offset over m = 2 … M."""
    plain_error: float
    """The same without."""
    aic_difference: float | None
    """Akaike's criterion of the law without offset minus that of the law with: positive favours the offset. None below
    six points (it corrects for few). The points are not independent, so this is a guide, not a test."""
    held_out: float
    """Absolute error at m = M of the law with offset fitted to the points before."""
    plain_held_out: float
    """The same without offset."""
    verdict: str
    """``"offset"``: its interval lies above 0 and it predicts the last point better; ``"no offset"``: its interval lies
    below 0.01 and it predicts no better; otherwise, and with fewer than 20 SAEs, ``"undecided"``."""


def sharing_law(has: Sequence[np.ndarray]) -> SharingLaw:
    """Fit `SharingLaw` to the curve of `only_in_one`.

    Raises
    ------
    ConfigError
        Fewer than 5 SAEs: the law has three numbers and the curve must have a point to spare.
    """
    m = len(has)
    if m < LEAST_POINTS + 1:
        raise ConfigError(
            f"sharing_law: a power law with offset needs at least {LEAST_POINTS + 1} SAEs; got {m}. Train more seeds."
        )
    sizes = np.arange(2, m + 1)
    curve = only_in_one(has).mean(0)
    without = [only_in_one(has, [sae for sae in range(m) if sae != out]).mean(0) for out in range(m)]
    fit, plain = (_Fit.to(sizes, curve, without, offset=offset) for offset in (True, False))
    return SharingLaw(
        amplitude=fit.amplitude,
        exponent=fit.exponent,
        offset=fit.offset,
        plain_amplitude=plain.amplitude,
        plain_exponent=plain.exponent,
        error=float(np.sqrt(np.mean(fit.errors**2))),
        plain_error=float(np.sqrt(np.mean(plain.errors**2))),
        aic_difference=_aic_difference(fit.errors, plain.errors),
        held_out=fit.held_out,
        plain_held_out=plain.held_out,
        verdict=offset_verdict(m, fit.offset, is_better=fit.held_out < plain.held_out),
    )


def offset_verdict(n_saes: int, offset: Measured, *, is_better: bool) -> str:
    """Return what is known about an offset: see `SharingLaw.verdict`."""
    if n_saes < DECIDING_SAES or offset.low is None or offset.high is None:
        return "undecided"
    if offset.low > 0 and is_better:
        return "offset"
    return "no offset" if offset.high < NO_OFFSET and not is_better else "undecided"


@dataclass(frozen=True)
class _Fit:
    """The law with or without offset, fitted to a curve."""

    amplitude: Measured
    exponent: Measured
    offset: Measured
    errors: np.ndarray
    """At each point of the curve."""
    held_out: float
    """Absolute error at the last point of the fit to the others."""

    @classmethod
    def to(cls, sizes: np.ndarray, curve: np.ndarray, without: Sequence[np.ndarray], *, offset: bool) -> _Fit:
        """Fit the law; `without` holds the curves that leave out one SAE each."""
        fitted = fit_law(sizes, curve, offset=offset)
        left_out = np.array([fit_law(sizes[:-1], each, offset=offset) for each in without])
        numbers = [_jackknife(value, others, len(without)) for value, others in zip(fitted, left_out.T, strict=True)]
        before = fit_law(sizes[:-1], curve[:-1], offset=offset)
        held_out = abs(float(law(before, sizes[-1:])[0] - curve[-1]))
        return cls(numbers[0], numbers[1], numbers[2], law(fitted, sizes) - curve, held_out)


def law(fit: tuple[float, float, float], m: np.ndarray) -> np.ndarray:
    """``amplitude * m^-exponent + offset``."""
    return fit[0] * np.asarray(m, dtype=float) ** -fit[1] + fit[2]


def fit_law(m: np.ndarray, share: np.ndarray, *, offset: bool = True) -> tuple[float, float, float]:
    """Least squares ``amplitude * m^-exponent + offset``, none of the three below 0; without `offset` it is 0.

    For each exponent the other two are a linear problem; the exponent is searched.

    Raises
    ------
    DataError
        Fewer than two points, or shares that are not numbers.
    """
    from scipy.optimize import minimize_scalar

    m, share = np.asarray(m, dtype=float), np.asarray(share, dtype=float)
    if len(m) < 2 or not np.isfinite(share).all():
        raise DataError(f"fit_law: at least two points of finite shares are needed; got {share.tolist()}.")

    def linear(exponent: float) -> tuple[float, float, float]:
        powers = m**-exponent
        if offset and exponent > 1e-9:
            spread = powers - powers.mean()
            amplitude = max(float(spread @ share / (spread @ spread)), 0.0)
            rest = float(share.mean() - amplitude * powers.mean())
            if rest >= 0:
                return amplitude, exponent, rest
        return max(float(powers @ share / (powers @ powers)), 0.0), exponent, 0.0

    def cost(exponent: float) -> float:
        return float(np.square(law(linear(exponent), m) - share).sum())

    grid = np.concatenate([[0.0], np.geomspace(1e-3, STEEPEST, 400)])
    best = int(np.argmin([cost(value) for value in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    exponent = float(found.x) if found.fun < cost(grid[best]) else float(grid[best])
    return linear(exponent)


def _aic_difference(with_offset: np.ndarray, plain: np.ndarray) -> float | None:
    """Corrected for few points; the variance of the error counts as a number that is fitted."""
    n = len(plain)
    if n < 6:
        return None

    def criterion(errors: np.ndarray, k: int) -> float:
        variance = max(float(np.mean(errors**2)), 1e-12)
        return n * math.log(variance) + 2 * k + 2 * k * (k + 1) / (n - k - 1)

    return criterion(plain, 3) - criterion(with_offset, 4)


def _jackknife(value: float, left_out: np.ndarray, m: int) -> Measured:
    if value == 0 and not left_out.any():
        return Measured(value, None, None, "", "no interval: 0 is the bound of the fit, with and without each SAE")
    half = student(m - 1) * jackknife_error(left_out)
    reason = f"interval from a jackknife over {m} SAEs"
    return Measured(value, max(value - half, 0.0), value + half, "", reason)
