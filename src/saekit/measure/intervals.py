"""Confidence intervals of what is measured on documents, groups or rows: one definition for every question.

Rows of one document are not independent, so what is left out in turn is a whole document (or group of rows). The error
is that of a delete-one jackknife, bias included; its degrees of freedom follow from the sizes of the documents, so that
a few long ones widen the interval instead of hiding in it; fractions are computed on the logit and positive quantities
on the log scale, which keeps them in their range. All estimates over the same `Sample` leave out the same documents, so
a difference of two is a paired one. `benchmarks/interval_coverage.py` measures how often the intervals hold the truth.

References
----------
Efron & Tibshirani (1993), *An Introduction to the Bootstrap*: jackknife (chapter 11), acceleration (section 14.3);
Hall (1992), *The Bootstrap and Edgeworth Expansion*: skewness of studentized values (section 3.6);
Imbens & Kolesár (2016), 1601.01981, and Hansen (2025), *Jackknife standard errors for clustered regression*: degrees of
freedom with few clusters of unequal size; Kish (1965), *Survey Sampling*: the effective number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .results import Measured

N_GROUPS = 509
"""Documents are put into at most this many groups (document id modulo a prime): bounded memory, still many clusters."""

LEVEL = 0.95

BLOCK_ROWS = 64
"""Rows without a document are left out in runs of this many."""

NORMAL = 1.959964
"""97.5 % point of the normal distribution."""

LEAST_EFFECTIVE = 3.0
"""Effective number of documents below which there is no interval: it would rest on one or two of them."""

LEAST_DOCUMENTS = 40
"""Documents below which there is no interval over documents. A sample knows nothing of texts that it does not hold:
those that are one in ten, and have other values, are missing from 12 in 100 samples of 20 documents, so that intervals
hold the truth in 81 to 87 of 100, and from 1.5 in 100 samples of 40 (`benchmarks/real_coverage.py`)."""

OVER_LATENTS = "over latents"
"""Stated with the interval of a fraction of latents."""

MOST_SKEW = 1.5
"""What skewness adds to the longer arm of an interval, as a fraction of it, at most."""


def row_groups(
    document: Tensor | None, first_row: int, n_rows: int, block_rows: int = BLOCK_ROWS
) -> tuple[Tensor, bool]:
    """Return the group of each row: from its document, or from its position where no document is known.

    Parameters
    ----------
    document
        ``int64 [n_rows]`` document ids, negative where unknown; or None.
    first_row
        Number of rows before this batch, so that any batching gives the same groups.
    n_rows
        Rows in this batch.
    block_rows
        Rows without a document are grouped by runs of this many consecutive rows.

    Returns
    -------
    groups, by_document
        ``int64 [n_rows]`` in ``[0, N_GROUPS)``; whether every row had a document.
    """
    device = None if document is None else document.device
    place = torch.arange(first_row, first_row + n_rows, device=device) // block_rows
    if document is None:
        return place.remainder(N_GROUPS), False
    known = document >= 0
    return torch.where(known, document.long(), place).remainder(N_GROUPS), bool(known.all())


def effective_number(sizes: np.ndarray | Sequence[float]) -> float:
    """Kish's effective number of groups: how many groups of equal size would tell as much.

    >>> effective_number([10, 10, 10]), round(effective_number([100, 1, 1]), 2)
    (3.0, 1.04)
    """
    each = np.asarray(sizes, dtype=np.float64)
    squares = float(np.square(each).sum())
    return float(each.sum()) ** 2 / squares if squares else 0.0


def degrees_of_freedom(sizes: np.ndarray) -> float:
    """Satterthwaite's degrees of freedom of an error from groups of these sizes, whose rows go together; at least 1.

    >>> degrees_of_freedom(np.ones(20))
    19.0
    """
    n = int(np.count_nonzero(sizes))
    return max(1.0, effective_number(np.square(sizes)) * (n - 1) / n if n else 0.0)


def student(degrees: float, level: float = LEVEL) -> float:
    """Return the upper end of Student's t for a two-sided interval."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, (1 + level) / 2))


def jackknife_error(left_out: Sequence[float] | np.ndarray) -> float:
    """Return the standard error of an estimate from the estimates that leave out one of its m parts each."""
    values, m = np.asarray(left_out), len(left_out)
    return math.sqrt((m - 1) / m * float(np.square(values - np.mean(values)).sum()))


@dataclass(frozen=True, eq=False)
class Sample:
    """The independent parts of what was measured: documents, groups or rows, each left out in turn.

    Parameters
    ----------
    sizes
        ``float64 [n]`` rows of each part.
    weights
        ``float64 [n, slots]``: 1 for what stays and 0 for the part left out; None where there is no interval.
    reason
        Carried into every estimate: why there is no interval, or what stands in for documents.
    names
        Names of the parts, by which samples of several test sets are joined; None: they share nothing.
    """

    sizes: np.ndarray
    weights: np.ndarray | None
    reason: str | None = None
    names: tuple[str, ...] | None = None

    @classmethod
    def over(
        cls, rows_per_group: np.ndarray | Sequence[float], *, intervals: bool = True, reason: str | None = None
    ) -> Sample:
        """Return the sample whose parts are the groups with at least one row.

        Parameters
        ----------
        rows_per_group
            ``[n_groups]`` row counts.
        intervals
            Whether intervals are asked for.
        reason
            Stated with every interval.
        """
        rows = np.asarray(rows_per_group, dtype=np.float64)
        present = np.flatnonzero(rows > 0)
        why_none = why_no_interval(rows[present], "documents") if intervals else "no interval asked for"
        if why_none:
            return cls(rows[present], None, why_none)
        weights = np.ones((len(present), len(rows)))
        weights[np.arange(len(present)), present] = 0
        return cls(rows[present], weights, reason)

    def ratio(self, numerator: np.ndarray, denominator: np.ndarray, *, undefined: str = "0 / 0") -> Estimate:
        """``sum(numerator) / sum(denominator)`` over groups, and the same without each."""
        left_out = None
        if self.weights is not None:
            left_out = _divide(self.weights @ numerator, self.weights @ denominator)
        return self.estimate(float(_divide(numerator.sum(), denominator.sum())), left_out, undefined=undefined)

    def estimate(self, value: float, left_out: np.ndarray | None, *, undefined: str = "0 / 0") -> Estimate:
        """Return an estimate from a value and those without each part; says so where either is not defined."""
        if not math.isfinite(value):
            return Estimate(math.nan, reason=f"undefined: {undefined}")
        if left_out is not None and not np.isfinite(left_out).all():
            return Estimate(value, reason=f"no interval: undefined without some documents ({undefined})")
        return Estimate(value, left_out, None if left_out is None else self, self.reason)


def document_sample(
    rows_per_group: np.ndarray | Sequence[float], *, is_known: bool = True, intervals: bool = True
) -> Sample:
    """Return the sample whose parts are documents: no interval from fewer than `LEAST_DOCUMENTS` of them.

    Parameters
    ----------
    rows_per_group
        ``[n_groups]`` row counts.
    is_known
        Whether the groups are documents; else they are runs of `BLOCK_ROWS` rows, which is stated with every interval.
    intervals
        Whether intervals are asked for.
    """
    n = int(np.count_nonzero(np.asarray(rows_per_group)))
    if not is_known:
        reason = f"interval from runs of {BLOCK_ROWS} consecutive rows: documents are not known"
        return Sample.over(rows_per_group, intervals=intervals, reason=reason)
    found = Sample.over(rows_per_group, intervals=intervals)
    if not intervals or n >= LEAST_DOCUMENTS:
        return found
    missing, there = 0.9**n, f"there {'is' if n == 1 else 'are'} {n}"
    return replace(
        found,
        weights=None,
        reason=f"no interval: it needs at least {LEAST_DOCUMENTS} documents; {there}, and texts that are one in "
        f"ten would be missing from {missing:.0%} of such samples",
    )


def why_no_interval(sizes: np.ndarray, what: str) -> str | None:
    """Return why parts of these sizes allow no interval; None where they do."""
    effective = effective_number(sizes)
    if effective >= LEAST_EFFECTIVE - 1e-9:
        return None
    few = f"there {'is' if len(sizes) == 1 else 'are'} {len(sizes)}"
    if len(sizes) >= LEAST_EFFECTIVE:
        few = f"the largest outweigh the rest: {len(sizes)} tell as much as {effective:.1f} of equal size"
    return f"no interval: it needs at least {LEAST_EFFECTIVE:g} {what} of similar size; {few}"


def no_intervals(values: Iterable[Measured | Mapping[str, object] | None]) -> str:
    """Return why none of these values has an interval, to be said once for all; empty where one has, or none is given.

    Fractions of latents do not count: their intervals are over latents, and exist without documents.

    Parameters
    ----------
    values
        As measured, or as in JSON. None and what is not defined are passed over.

    >>> few = "no interval: it needs at least 40 documents; there are 25, and more"
    >>> no_intervals([Measured(0.5, reason=few)]), no_intervals([Measured(0.5, reason=few), Measured(0.5, 0.4, 0.6)])
    ('no intervals: 25 documents, 40 are needed', '')
    """
    plain = [each.to_json() if isinstance(each, Measured) else each for each in values if each is not None]
    known = [each for each in plain if each.get("value") is not None and each.get("reason") != OVER_LATENTS]
    if not known or any(each.get("low") is not None for each in known):
        return ""
    reasons = [str(each.get("reason")) for each in known]
    reason = next((each for each in reasons if each.startswith("no interval")), "no interval")
    few = _FEW.search(reason)
    if few is None:
        return reason.split(";")[0].replace("no interval", "no intervals", 1)
    n = int(few["n"])
    what = few["what"].removesuffix("s") if n == 1 else few["what"]
    return f"no intervals: {n:,} {what}, {int(few['least']):,} are needed"


_FEW = re.compile(r"needs at least (?P<least>\d+) (?P<what>[a-z ]+?)(?: of similar size)?; there (?:is|are) (?P<n>\d+)")


@dataclass(frozen=True, eq=False)
class Estimate:
    """A value with what it becomes without each part of the sample.

    Parameters
    ----------
    value
        The estimate on everything.
    left_out
        ``float64 [n]`` the same without each part of `sample`, or None where there is no interval.
    sample
        The parts.
    reason
        As in `Measured`.
    ends
        An interval from elsewhere.
    counts
        Independent observations behind a fraction: an interval where all parts agree is as wide as these allow.
    choice
        Variance that comes on top: that of a choice which was made elsewhere, and repeated there on resamples.
    """

    value: float
    left_out: np.ndarray | None = None
    sample: Sample | None = None
    reason: str | None = None
    ends: tuple[float, float] | None = None
    counts: float | None = None
    choice: float = 0.0

    @property
    def spread(self) -> Spread | None:
        """How uncertain the value is, the choice included; None where that is not known."""
        found = self._over_parts
        return None if found is None else replace(found, error=math.hypot(found.error, math.sqrt(self.choice)))

    @property
    def _over_parts(self) -> Spread | None:
        """How uncertain the value is for the parts of the sample alone."""
        if self.left_out is None or self.sample is None or math.isnan(self.value):
            return None
        return Spread.of(self.value, self.left_out, self.sample.sizes)

    def measured(
        self, unit: str, level: float = LEVEL, *, least: float | None = None, most: float | None = None
    ) -> Measured:
        """Return the estimate with its interval, within the range of the quantity.

        A choice widens both arms as independent errors add: near an end of the range its error would be many times
        larger on the logit scale than it is.
        """
        ends, spread = self.ends, self._over_parts
        if ends is not None:
            ends = _cut(ends, least, most)
        elif spread is not None:
            found = interval(self.value, spread, level, least=least, most=most, counts=self.counts)
            more = student(spread.degrees, level) * math.sqrt(self.choice)
            down, up = (math.hypot(end - self.value, more) for end in found)
            ends = _cut((self.value - down, self.value + up), least, most)
        low, high = (None, None) if ends is None else ends
        return Measured(self.value, low, high, unit, self.reason)

    def minus(self, other: Estimate) -> Estimate:
        """Return the difference of two estimates over the same parts (paired)."""
        if other is self:
            return Estimate(0.0, reason=self.reason, ends=None if self.left_out is None else (0.0, 0.0))
        if not _same_parts(self.sample, other.sample):
            return mean_estimate([self, other], (1.0, -1.0))
        left_out = None if self.left_out is None or other.left_out is None else self.left_out - other.left_out
        reason = self.reason or other.reason
        if left_out is None and reason is None:
            reason = "one side has no interval"
        return Estimate(self.value - other.value, left_out, self.sample, reason, counts=self.counts)

    def plus(self, shift: float) -> Estimate:
        """Return the estimate moved by a constant."""
        moved = None if self.left_out is None else self.left_out + shift
        return replace(self, value=self.value + shift, left_out=moved)

    def p_value(self, null: float = 0.0) -> float:
        """Two-sided p-value of `null`, which agrees with the interval; NaN where there is none."""
        spread = self.spread
        return math.nan if spread is None else spread.p_value(self.value - null)


@dataclass(frozen=True)
class Spread:
    """How far an estimate may be from the truth."""

    error: float
    """Root mean squared error: the standard error and the estimated bias."""
    degrees: float
    """Degrees of freedom of that error."""
    skew: float = 0.0
    """Acceleration of the bias-corrected bootstrap: positive where the truth is further above than below."""

    @classmethod
    def of(cls, value: float, left_out: np.ndarray, sizes: np.ndarray) -> Spread:
        """Return the spread from the jackknife."""
        n, mean = len(left_out), float(np.mean(left_out))
        pulls = mean - left_out
        squares = float(np.square(pulls).sum())
        error = math.hypot(math.sqrt((n - 1) / n * squares), (n - 1) * (mean - value))
        skew = float((pulls**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
        # what differs by rounding alone does not differ
        return cls(error if error > 1e-12 * max(abs(value), 1e-3) else 0.0, degrees_of_freedom(sizes), skew)

    def arms(self, level: float) -> tuple[float, float]:
        """Return how many errors the interval reaches down and up: Student's t, more on the side of the skew.

        The error varies with the value where the sample is skewed; to second order that adds ``a (2 t^2 + 1)`` to the
        arm on the side of the skew, a the acceleration (Hall 1992, section 3.6). The other arm is not shortened.
        """
        reach = student(self.degrees, level)
        longer = reach * (1 + min(abs(self.skew) * (2 * reach + 1 / reach), MOST_SKEW))
        return (reach, longer) if self.skew > 0 else (longer, reach)

    def p_value(self, gap: float) -> float:
        """Two-sided p-value of a true gap of 0."""
        from scipy.special import stdtr

        if self.error == 0:
            return 1.0 if gap == 0 else 0.0
        return float(2 * stdtr(self.degrees, -abs(gap) / self.error))


def interval(
    value: float,
    spread: Spread,
    level: float = LEVEL,
    *,
    least: float | None = None,
    most: float | None = None,
    counts: float | None = None,
) -> tuple[float, float]:
    """Return the interval of a value within its range.

    Parameters
    ----------
    value, spread
        The estimate, and how uncertain it is.
    level
        Coverage.
    least, most
        Range of the quantity. With both, the interval is symmetric on the logit scale of that range, and holds an end
        of the range that it would reach on the plain scale; with `least` alone it is symmetric on the log scale.
    counts
        Independent observations: where the estimate does not vary, what they leave open (1 - 0.025^(1/n)).
    """
    if spread.error == 0:
        half = 0.0 if counts is None else 1 - ((1 - level) / 2) ** (1 / max(counts, 1.0))
        return _cut((value - half, value + half), least, most)
    down, up = spread.arms(level)
    scale, slope, back = _scale(value, least, most)
    low, high = back(scale - down * slope * spread.error), back(scale + up * slope * spread.error)
    if least is not None and most is not None:  # the logit scale alone would exclude 0 and 1, which may be the truth
        low = least if value - down * spread.error <= least else low
        high = most if value + up * spread.error >= most else high
    return _cut((min(low, value), max(high, value)), least, most)


def _same_parts(one: Sample | None, other: Sample | None) -> bool:
    if one is None or other is None or one is other:
        return True
    return one.names == other.names and np.array_equal(one.sizes, other.sizes)


def _scale(value: float, least: float | None, most: float | None) -> tuple[float, float, Callable[[float], float]]:
    """Return a value on the scale of its interval, the slope there, and the way back."""
    if least is not None and most is not None and least < value < most:
        width = most - least
        part = (value - least) / width
        slope = 1 / (part * (1 - part) * width)
        return math.log(part / (1 - part)), slope, lambda z: least + width / (1 + math.exp(min(-z, 700.0)))
    if least is not None and most is None and value > least:
        return math.log(value - least), 1 / (value - least), lambda z: least + math.exp(min(z, 700.0))
    return value, 1.0, lambda z: z


def _cut(ends: tuple[float, float], least: float | None, most: float | None) -> tuple[float, float]:
    low, high = ends
    return low if least is None else max(low, least), high if most is None else min(high, most)


def mean_estimate(estimates: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """Return a weighted sum of estimates, by default their mean, over the parts of all their samples.

    Parts of one name are one part; parts without names are independent.
    """
    if len(estimates) == 1 and weights is None:
        return estimates[0]
    each = np.full(len(estimates), 1 / len(estimates)) if weights is None else np.asarray(weights)
    value = float(each @ [estimate.value for estimate in estimates])
    missing = next((one for one in estimates if one.left_out is None or one.sample is None), None)
    if all(one.sample is estimates[0].sample for one in estimates) and missing is None:
        left_out = value + sum(w * (one.left_out - one.value) for w, one in zip(each, estimates))  # type: ignore[operator]
        return replace(estimates[0], value=value, left_out=np.asarray(left_out))
    if missing is not None:
        return Estimate(value, reason=missing.reason or "no interval in some cell")
    pulls: dict[object, float] = {}
    sizes: dict[object, float] = {}
    for weight, one in zip(each, estimates):
        assert one.sample is not None
        assert one.left_out is not None
        names = one.sample.names or [(id(one.sample), part) for part in range(len(one.left_out))]
        for name, pull, size in zip(names, one.left_out - one.value, one.sample.sizes):
            pulls[name] = pulls.get(name, 0.0) + weight * float(pull)
            sizes[name] = sizes.get(name, 0.0) + float(size)
    sample = Sample(np.array(list(sizes.values())), None, names=tuple(map(str, sizes)))
    counts = [one.counts for one in estimates if one.counts is not None]
    return Estimate(
        value, value + np.array(list(pulls.values())), sample, estimates[0].reason,
        counts=effective_number(sample.sizes) if counts else None,
    )  # fmt: skip


def wilson_interval(count: int, n: int) -> Measured:
    """Return the fraction ``count / n`` of latents with its Wilson score interval, which also holds at 0 and 1."""
    p, z2 = count / n, NORMAL**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Measured(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)), "fraction", OVER_LATENTS)


def measured_mean(
    values: Sequence[float] | np.ndarray, unit: str = "", *, least: float | None = None, most: float | None = None
) -> Measured:
    """Mean of independent values (one per document, seed or data set) with its interval.

    >>> measured_mean([1.0, 2.0, 3.0]).value
    2.0
    """
    each = np.asarray(values, dtype=np.float64)
    if not len(each):
        return Measured(math.nan, None, None, unit, "undefined: there is no value")
    estimate = Sample.over(np.ones(len(each))).ratio(each, np.ones(len(each)))
    if estimate.left_out is None and estimate.reason:
        estimate = replace(estimate, reason=estimate.reason.replace("documents", "values"))
    return estimate.measured(unit, least=least, most=most)


def _divide(numerator: np.ndarray | float, denominator: np.ndarray | float) -> np.ndarray:
    """Division that gives NaN or infinity without a warning; the caller states what is undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(numerator, denominator)
