"""Does importance fall off as a power of the rank? Fits, intervals, and comparisons with other distributions.

References
----------
Clauset, Shalizi & Newman (2009), *Power-law distributions in empirical data*, 0706.1062; Vuong (1989), *Likelihood
ratio tests for model selection and non-nested hypotheses*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..measure.results import Measured
from ..measure.verdicts import holm
from ..sae.model import SAE

LEAST_LATENTS = 10
"""Alive latents that a fit needs at least."""

LEAST_CLAIM = 200
"""Alive latents below which no power law is claimed: of 100, a wide log-normal would be taken for one in 3 of 10."""

LEAST_TAIL = 0.1
"""Fraction of the alive latents that the maximum likelihood fit must leave in its tail (and at least 10)."""

STARTS = 200
"""Places that are tried as the beginning of the tail, at most."""


@dataclass(frozen=True)
class Rival:
    """Likelihood ratio of the power law to another distribution, over the tail and at least the larger half."""

    name: str
    """``"lognormal"`` or ``"exponential"``."""
    log_ratio: float
    """Sum over latents of ``log p_power - log p_rival``: positive where the power law fits better."""
    p: float
    """How easily the sign is chance: Vuong's test; for the log-normal, of which the power law is a limit, the
    likelihood ratio test."""
    verdict: str
    """``"power law"``, the rival's name, or ``"undecided"`` at 5 %, corrected for two rivals (Holm)."""


@dataclass(frozen=True)
class PowerLaw:
    """``importance ~ C * rank^-alpha`` over sorted importances, by two methods."""

    alpha: Measured
    """Exponent from least squares of log importance on log rank, all alive latents; interval from resampled ones."""
    r2: float
    """Fraction of the variance of log importance that the line explains. It can be high for a curved line."""
    log10_c: float
    """Logarithm to base 10 of C."""
    ranks: tuple[int, int]
    """First and last rank of the line: the alive latents."""
    alpha_likelihood: Measured
    """Exponent from maximum likelihood over the tail: ``1 / (gamma - 1)`` of the density ``value^-gamma``."""
    tail: int
    """Latents in that tail, those of largest importance; where it begins minimizes the Kolmogorov-Smirnov distance."""
    distance: float
    """That distance: 0 is a perfect power law."""
    rivals: list[Rival]
    """Against log-normal and exponential."""
    dead: int
    """Latents without importance, which no fit includes."""

    @property
    def verdict(self) -> str:
        """One sentence: is it a power law? Only where no rival fits better and the exponential fits worse."""
        better = [rival.name for rival in self.rivals if rival.verdict == rival.name]
        if better:
            return f"not a power law: {' and '.join(better)} fits better"
        beaten = [rival.name for rival in self.rivals if rival.verdict == "power law"]
        if "exponential" not in beaten:
            return "undecided: the importances do not tell a power law from an exponential"
        if self.ranks[1] < LEAST_CLAIM:
            return f"undecided: {self.ranks[1]} alive latents would hardly tell a power law from a log-normal"
        return "a power law: it fits better than an exponential, and no log-normal fits better"


def power_law(values: Tensor | np.ndarray | Any, *, draws: int = 200, seed: int = 0) -> PowerLaw:
    """Fit a power law to importances (or eigenvalues), and test it against log-normal and exponential.

    Parameters
    ----------
    values
        ``[n]`` numbers, in any order. Those that are 0 or negative count as dead and are left out.
    draws
        Resamples of the values behind the interval of the least squares exponent.
    seed
        Random seed of the resamples.

    Raises
    ------
    DataError
        Fewer than 10 positive values, values with NaN, or values that are all the same.
    ConfigError
        `draws` is below 2.
    """
    if draws < 2:
        raise ConfigError(f"power_law: `draws` must be at least 2; got {draws}.")
    numbers = torch.as_tensor(values).detach().double().cpu().numpy().ravel()
    if np.isnan(numbers).any():
        raise DataError("power_law: values must not hold NaN; they do.")
    ordered = np.sort(numbers[numbers > 0])[::-1]
    if len(ordered) < LEAST_LATENTS or ordered[0] == ordered[-1]:
        raise DataError(
            f"power_law: at least {LEAST_LATENTS} positive values that differ are needed; got {len(ordered)} positive "
            f"ones of {len(numbers)}. Are nearly all latents dead?"
        )
    slope, intercept, r2 = _line(ordered)
    generator = np.random.Generator(np.random.PCG64(seed))
    resampled = []
    for _ in range(draws):
        sample = np.sort(generator.choice(ordered, len(ordered)))[::-1]
        resampled.append(-_line(sample)[0])
    low, high = (float(-2 * slope - end) for end in np.quantile(resampled, [0.975, 0.025]))
    tail, gamma, distance = _tail(ordered)
    error = (gamma - 1) / math.sqrt(tail)
    ends = (gamma - 1 - 1.96 * error, gamma - 1 + 1.96 * error)
    return PowerLaw(
        alpha=Measured(-slope, low, high, "exponent", "interval from resampled latents"),
        r2=r2,
        log10_c=intercept / math.log(10),
        ranks=(1, len(ordered)),
        alpha_likelihood=Measured(
            1 / (gamma - 1), 1 / ends[1], 1 / ends[0] if ends[0] > 0 else None, "exponent", "asymptotic interval"
        ),
        tail=tail,
        distance=distance,
        rivals=_rivals(ordered[: max(tail, math.ceil(len(ordered) / 2))]),
        dead=len(numbers) - len(ordered),
    )


def decoder_spectrum(sae: SAE) -> Tensor:
    """Eigenvalues of the covariance of the decoder's rows, largest first, ``float64 [d_out]``.

    In squared units of the decoder; they sum to the mean squared distance of a row from the mean row. Those that are
    rounding errors of the largest (with fewer latents than dimensions) are 0.
    """
    W = sae.W_dec.double().cpu()
    W = W - W.mean(0)
    found = torch.linalg.eigvalsh(W.T @ W / len(W)).flip(0)
    return torch.where(found > len(found) * torch.finfo(found.dtype).eps * found[0], found, 0.0)


def _line(ordered: np.ndarray) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of log value on log rank."""
    x, y = np.log(np.arange(1, len(ordered) + 1)), np.log(ordered)
    x_c, y_c = x - x.mean(), y - y.mean()
    slope = float(x_c @ y_c / (x_c @ x_c))
    spread = float(y_c @ y_c)
    r2 = slope**2 * float(x_c @ x_c) / spread if spread > 0 else math.nan
    return slope, float(y.mean() - slope * x.mean()), r2


def _tail(ordered: np.ndarray) -> tuple[int, float, float]:
    """Length, density exponent and distance of the tail that looks most like a power law."""
    least = max(LEAST_LATENTS, math.ceil(LEAST_TAIL * len(ordered)))
    lengths = np.unique(np.linspace(least, len(ordered), min(STARTS, len(ordered) - least + 1)).astype(int))
    best = (len(ordered), 2.0, math.inf)
    for length in lengths:
        tail = ordered[:length]
        logs = float(np.log(tail / tail[-1]).sum())
        if logs <= 0:
            continue
        gamma = 1 + length / logs
        # P(value >= v): from the fit, and the highest and lowest step of the data at v.
        fitted = (tail / tail[-1]) ** (1 - gamma)
        steps = np.arange(length + 1) / length
        distance = float(np.maximum(np.abs(fitted - steps[1:]), np.abs(fitted - steps[:-1])).max())
        if distance < best[2]:
            best = (int(length), gamma, distance)
    return best


def _rivals(tail: np.ndarray) -> list[Rival]:
    """Compare the power law with others where there is enough to see the difference.

    Any distribution looks like a power law over a tail that is short enough, so at least the larger half counts.
    """
    start = tail[-1]
    logs = np.log(tail / start)
    gamma = 1 + len(tail) / float(logs.sum())
    power = math.log((gamma - 1) / start) - gamma * logs
    rate = 1 / max(float(tail.mean() - start), 1e-300)
    exponential = math.log(rate) - rate * (tail - start)
    gaps = {"lognormal": power - _lognormal(tail), "exponential": power - exponential}
    ratios = {name: float(gap.sum()) for name, gap in gaps.items()}
    p_values = {"lognormal": _nested(ratios["lognormal"]), "exponential": _vuong(gaps["exponential"])}
    adjusted = dict(zip(p_values, holm(list(p_values.values()))))
    return [
        Rival(
            name, ratio, p_values[name], "undecided" if adjusted[name] >= 0.05 else "power law" if ratio > 0 else name
        )
        for name, ratio in ratios.items()
    ]


def _nested(ratio: float) -> float:
    """P-value of the likelihood ratio test with one parameter more; 1 where that does not help."""
    return math.erfc(math.sqrt(max(-ratio, 0.0)))


def _vuong(gap: np.ndarray) -> float:
    """Two-sided p-value of Vuong's test, from the log-likelihood ratio of each value."""
    ratio, spread = float(gap.sum()), float(gap.std())
    return math.erfc(abs(ratio) / (spread * math.sqrt(2 * len(gap)))) if spread > 0 else 1.0


def _lognormal(tail: np.ndarray) -> np.ndarray:
    """Log density of the best log-normal that is cut off below the tail."""
    from scipy.optimize import minimize
    from scipy.special import log_ndtr

    logs, first = np.log(tail), math.log(tail[-1])

    def density(mean: float, log_width: float) -> np.ndarray:
        width = math.exp(log_width)
        z = (logs - mean) / width
        return -logs - log_width - 0.5 * math.log(2 * math.pi) - 0.5 * z**2 - log_ndtr((mean - first) / width)

    def cost(parameters: np.ndarray) -> float:
        value = -float(density(*parameters).sum())
        return value if math.isfinite(value) else 1e300

    # Far below the tail a log-normal becomes a power law; the bounds keep the search where numbers are still exact.
    begin = np.array([logs.mean(), math.log(max(float(logs.std()), 1e-3))])
    bounds = [(first - 200, float(logs[0]) + 10), (-7.0, 6.0)]
    found = minimize(cost, begin, method="Nelder-Mead", bounds=bounds, options={"maxiter": 4000, "maxfev": 4000})
    return density(*found.x)
