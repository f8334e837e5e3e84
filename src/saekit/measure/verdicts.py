"""One rule for every verdict: *better*, *worse*, *equivalent* or *undecided*, from an interval and a margin.

A verdict is never given by a value alone. Claims that are made together (a family) are corrected by Holm's method, so
that the chance of any false one stays below 1 - level. See "Verdict" in ``docs/concepts.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ..errors import ConfigError
from .intervals import LEVEL, NORMAL, student
from .results import Measured
from .settings import MARGIN

VERDICTS = ("better", "equivalent", "worse", "undecided")

POWER = 0.8
"""Probability with which a difference should be found, where a result says which differences it finds."""

_POWER_NORMAL = 0.841621  # 80 % point of the normal distribution


def verdict(difference: Measured, margin: float = MARGIN) -> str:
    """Return the verdict of an interval of a difference for a margin around 0 (a region of practical equivalence).

    ``better``: the whole interval lies above `margin`; ``worse``: below ``-margin``; ``equivalent``: within
    ``[-margin, margin]``; ``undecided``: anything else, and where there is no interval.

    >>> verdict(Measured(0.03, 0.02, 0.04)), verdict(Measured(0.0, -0.004, 0.004)), verdict(Measured(0.0, -0.1, 0.1))
    ('better', 'equivalent', 'undecided')

    Raises
    ------
    ConfigError
        A negative margin.
    """
    if not margin >= 0:
        raise ConfigError(f"`margin` must be a difference of macro-F1 from 0; got {margin}.")
    if difference.low is None or difference.high is None:
        return "undecided"
    if difference.low > margin:
        return "better"
    if difference.high < -margin:
        return "worse"
    return "equivalent" if -margin <= difference.low and difference.high <= margin else "undecided"


class HasInterval(Protocol):
    """What has an interval of any level: an `Estimate`, or a `Stored` one."""

    def measured(
        self, unit: str, level: float = LEVEL, *, least: float | None = None, most: float | None = None
    ) -> Measured:
        """Return the value with its interval of a level."""
        ...


@dataclass(frozen=True)
class Stored:
    """A difference of which only the value and its 95 % interval are known, so that it can be decided again.

    Parameters
    ----------
    difference
        Value and interval.
    degrees
        Degrees of freedom of its error: one less than the seeds or groups; infinite where there were many.
    """

    difference: Measured
    degrees: float = math.inf

    def measured(
        self, unit: str = "", level: float = LEVEL, *, least: float | None = None, most: float | None = None
    ) -> Measured:
        """Return the interval of another level: both arms longer in proportion to Student's t."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return self.difference
        value, longer = self.difference.value, student(self.degrees, level) / student(self.degrees)
        low, high = value - (value - low) * longer, value + (high - value) * longer
        return replace(
            self.difference,
            low=low if least is None else max(low, least),
            high=high if most is None else min(high, most),
        )

    def minus(self, other: Stored) -> Stored:
        """Return this number minus another of the same rows.

        Half the width of the interval is the sum of both: that of the true paired interval is no more.
        """
        a, b = self.difference, other.difference
        degrees = min(self.degrees, other.degrees)
        if None in (a.low, a.high, b.low, b.high):
            return Stored(Measured(a.value - b.value), degrees)
        half = resolution(a) + resolution(b)
        return Stored(Measured(a.value - b.value, a.value - b.value - half, a.value - b.value + half), degrees)

    def oriented(self, sign: int, null: float = 0.0) -> Stored:
        """Return the difference from `null`, turned over where `sign` is -1, so that more is better."""
        gap = self.difference
        ends = [None if end is None else sign * (end - null) for end in (gap.low, gap.high)]
        low, high = ends if sign > 0 else ends[::-1]
        return replace(self, difference=replace(gap, value=sign * (gap.value - null), low=low, high=high))


@dataclass(frozen=True)
class Claim:
    """A difference that is claimed to be more than nothing, or (with `non_inferiority`) not less than nothing."""

    difference: HasInterval
    margin: float = MARGIN
    rule: Callable[[Measured, float], str] | None = None
    """`verdict` by default, or `non_inferiority`."""


def family_verdicts(
    differences: Sequence[HasInterval | Claim | None],
    margin: float = MARGIN,
    *,
    level: float = LEVEL,
    least: float | None = -1.0,
    most: float | None = 1.0,
) -> list[str]:
    """Return the verdicts of differences that are claimed together, by Holm's method.

    As long as n of them are open, each is decided by its interval of level ``1 - (1 - level) / n``; those that such an
    interval decides drop out, and the rest is taken again. One difference alone has its ordinary verdict.

    Parameters
    ----------
    differences
        Paired differences; None (nothing to compare with) is not part of the family and gives an empty verdict. A
        `Claim` has a margin and a rule of its own.
    margin
        As for `verdict`.
    level
        One minus the chance of any false verdict.
    least, most
        Range of a difference.
    """
    found = ["undecided" if difference is not None else "" for difference in differences]
    open_ = {
        place: each if isinstance(each, Claim) else Claim(each, margin)
        for place, each in enumerate(differences)
        if each is not None
    }
    while open_:
        at = 1 - (1 - level) / len(open_)
        decided = _decided(open_, at, least, most)
        if not decided:
            break
        for place, word in decided.items():
            found[place] = word
            del open_[place]
    return found


def _decided(open_: Mapping[int, Claim], level: float, least: float | None, most: float | None) -> dict[int, str]:
    """Return the verdicts of the claims that their intervals of a level decide, by the place of the claim."""
    said = {}
    for place, claim in open_.items():
        measured = claim.difference.measured("", level, least=least, most=most)
        said[place] = (claim.rule or verdict)(measured, claim.margin)
    return {place: word for place, word in said.items() if word != "undecided"}


def non_inferiority(difference: Measured, margin: float = MARGIN) -> str:
    """Return whether something "keeps or improves": ``holds``, ``refuted`` or ``undecided``.

    It holds where the whole interval of the difference lies above ``-margin``, and is refuted where it lies below.

    >>> non_inferiority(Measured(0.1, -0.005, 0.2)), non_inferiority(Measured(-0.1, -0.2, -0.02))
    ('holds', 'refuted')
    """
    word = verdict(difference, margin)
    if word == "undecided" and difference.low is not None:
        return "holds" if difference.low >= -margin else "undecided"
    return {"better": "holds", "equivalent": "holds", "worse": "refuted"}.get(word, "undecided")


def resolution(difference: Measured) -> float:
    """Return half the width of the interval of a difference: what it resolves; NaN without an interval."""
    if difference.low is None or difference.high is None:
        return math.nan
    return (difference.high - difference.low) / 2


def detectable(half_width: float, margin: float = 0.0) -> float:
    """Return the true difference that an interval of this half-width finds with a probability of `POWER`.

    A difference of ``margin + half_width`` is found half the time.
    """
    return margin + half_width * (1 + _POWER_NORMAL / NORMAL)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of any false rejection stays below the level. NaN stays NaN.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=float)
    known = np.flatnonzero(~np.isnan(values))
    adjusted = np.full(len(values), math.nan)
    largest = 0.0
    for place, index in enumerate(known[np.argsort(values[known], kind="stable")]):
        largest = max(largest, min(1.0, (len(known) - place) * values[index]))
        adjusted[index] = largest
    return [float(value) for value in adjusted]


def corrected_t(differences: Sequence[float], n_train: int, n_test: int) -> tuple[float, float]:
    """Nadeau and Bengio's t for differences over folds whose training sets overlap, and its p-value.

    ``t = mean(d) / sqrt((1 / r + n_test / n_train) var(d))`` with ``r - 1`` degrees of freedom. Equal differences of 0
    give ``(0, 1)``; fewer than two folds give NaN.
    """
    from scipy.special import stdtr

    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        return math.nan, math.nan
    spread = math.sqrt((1 / len(d) + n_test / n_train) * float(d.var(ddof=1)))
    if spread == 0:
        return (0.0, 1.0) if d.mean() == 0 else (math.copysign(math.inf, d.mean()), 0.0)
    t = float(d.mean()) / spread
    return t, float(2 * stdtr(len(d) - 1, -abs(t)))
