"""Tokens whose activation norm is an outlier, found once by a calibration and left out by a recorded rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .source import Columns

CALIBRATION_TOKENS = 4096
"""Tokens from the beginning of the data that the median norm is taken from. Unit: tokens."""


@dataclass(frozen=True)
class OutlierFilter:
    """Tokens whose norm is above `limit` are skipped; made by measuring the median norm of the first tokens."""

    times: float
    """How many times the median is too much."""
    median: float
    """Median norm of the tokens measured."""
    n_measured: int
    """Tokens measured."""
    n_above: int = 0
    """Number of these that are skipped."""

    @staticmethod
    def measured(times: float | None, x: Tensor) -> OutlierFilter | None:
        """Return the filter for `times` the median norm of the rows `x`; None where nothing is to be left out."""
        if times is None:
            return None
        norms = x.float().norm(dim=1)
        median = norms.median()
        return OutlierFilter(times, float(median), len(x), int((norms > times * median).sum()))

    @property
    def limit(self) -> float:
        """Largest norm that is kept."""
        return self.times * self.median

    def apply(self, rows: Columns) -> Columns:
        """Return the rows that are kept."""
        kept = rows.x.float().norm(dim=1) <= self.limit
        return rows if bool(kept.all()) else rows.map(lambda column: column[kept])

    def info(self) -> dict[str, Any]:
        """Return the filter as plain JSON."""
        return {
            "times": self.times, "median": self.median, "limit": self.limit, "n_measured": self.n_measured,
            "n_above": self.n_above,
        }  # fmt: skip
