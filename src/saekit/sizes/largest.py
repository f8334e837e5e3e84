"""Each size compared with the largest one: paired differences, verdicts by the one rule, and how many are enough."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..forms import check_form
from ..measure.intervals import Estimate
from ..measure.metrics import METRICS, Metrics
from ..measure.reconstruction import as_metrics
from ..measure.results import Measured
from ..measure.verdicts import HasInterval, Stored, family_verdicts

DECIDED = ("fvu", "ce_sae")
"""Metrics that say whether a size is enough; of both, less is better."""


@dataclass(frozen=True)
class FromLargest:
    """How much worse one size is than the largest."""

    differences: Metrics = field(default_factory=lambda: Metrics({}))
    """By metric (`DECIDED`): the value of this size minus that of the largest, paired; more is worse."""
    verdicts: dict[str, str] = field(default_factory=dict)
    """By the same metrics: whether this size is ``better``, ``worse`` or ``equivalent``, or ``undecided``, for the
    margin of the metric, corrected for the number of sizes (Holm)."""

    @classmethod
    def from_json(cls, plain: Any, where: str = "from_largest") -> FromLargest:
        """Return the comparison of a file.

        Raises
        ------
        FormatError
            It holds something else.
        """
        check_form(plain, {"differences": dict, "verdicts": dict}, where)
        words = plain["verdicts"]
        for name, word in words.items():
            check_form(word, str, where, f"verdicts.{name}")
        return cls(Metrics.from_json(plain["differences"], f"{where}.differences"), dict(words))


def from_largest(estimates: Sequence[Mapping[str, Estimate]]) -> list[FromLargest]:
    """Compare the estimates of every size with those of the last one, over the same documents."""
    *parts, last = estimates
    names = [[name for name in DECIDED if name in each and name in last] for each in parts]
    gaps = [{name: each[name].minus(last[name]) for name in own} for each, own in zip(parts, names, strict=True)]
    gains = [{name: last[name].minus(each[name]) for name in own} for each, own in zip(parts, names, strict=True)]
    return _decided([as_metrics(each, ranged=False) for each in gaps], gains)


def from_largest_over_seeds(sizes: Sequence[Mapping[str, tuple[Measured, int]]]) -> list[FromLargest]:
    """Compare means over seeds.

    Parameters
    ----------
    sizes
        For every size but the largest, by metric: the mean of its differences from the largest, with the interval over
        seeds, and the number of seeds.
    """
    gains = [{name: Stored(gap, max(n - 1, 1)).oriented(-1) for name, (gap, n) in each.items()} for each in sizes]
    return _decided([Metrics({name: gap for name, (gap, _) in each.items()}) for each in sizes], gains)


def _decided(differences: Sequence[Metrics], gains: Sequence[Mapping[str, HasInterval]]) -> list[FromLargest]:
    """Return differences with their verdicts, and nothing for the largest size; each metric is one family of claims."""
    verdicts: list[dict[str, str]] = [{} for _ in gains]
    for name in DECIDED:
        words = family_verdicts([each.get(name) for each in gains], METRICS[name].margin, least=None, most=None)
        for own, word in zip(verdicts, words, strict=True):
            own |= {name: word} if word else {}
    return [*(FromLargest(*pair) for pair in zip(differences, verdicts, strict=True)), FromLargest()]


def enough(verdicts: Mapping[int, str], largest: int) -> tuple[int, int]:
    """Return the sizes between which the smallest lies that keeps what `largest` gives; equal where that is decided.

    Parameters
    ----------
    verdicts
        By size, increasing, below `largest`.

    >>> enough({64: "worse", 128: "equivalent", 256: "equivalent"}, 512), enough({64: "worse", 128: "undecided"}, 512)
    ((128, 128), (128, 512))
    """
    sizes = [*verdicts]
    losing = list(itertools.takewhile(lambda size: verdicts[size] == "worse", sizes))
    keeping = list(itertools.takewhile(lambda size: verdicts[size] in ("equivalent", "better"), reversed(sizes)))
    return [*sizes, largest][len(losing)], [largest, *keeping][-1]
