"""The result of choosing a number of latents per row: the curve that it was chosen from, and whether that decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..errors import ConfigError, FormatError
from ..measure.intervals import student
from ..measure.results import Measured, Result
from ..settings import brief


@dataclass(frozen=True)
class KPoint:
    """One number of latents per row."""

    __repr__ = brief

    k: int
    """Latents per row."""
    projections: list[float]
    """Metric `decoder_projection` of the SAE of each seed."""
    fvu: list[float | None]
    """FVU of each on its last training batches; None where that is not defined."""
    projection: Measured = field(default_factory=lambda: Measured(math.nan))
    """Mean over the seeds; the interval is that of a mean over as many, with the spread of the seeds at all k."""


@dataclass(frozen=True, repr=False)
class KChoice(Result):
    """Which number of latents per row SAEs trained on a part of the rows speak for."""

    KIND: ClassVar[str] = "k_choice"
    SCHEMA: ClassVar[int] = 1
    PARTS: ClassVar[tuple[str, ...]] = ("points",)

    config: dict[str, Any]
    """Configuration of the SAEs, but for `k`."""
    rows: dict[str, Any]
    """``info`` of the rows."""
    rows_used: int
    """Rows, the first of the run, on which every SAE of the choice was trained, in one pass. They are read on top of
    those of the run, which begins with the same rows."""
    points: list[KPoint]
    """The curve, by increasing k."""
    k: int | None
    """The k of the lowest projection; None where the curve does not decide."""
    near: list[int]
    """The values of k on the curve that are not told apart from the lowest."""
    why: str
    """What the curve says, in words."""

    @property
    def n_saes(self) -> int:
        """Return the number of SAEs that the choice trained."""
        return sum(len(point.projections) for point in self.points)

    @property
    def decided(self) -> int:
        """Return the k that was chosen; raises `ConfigError` where the curve does not decide."""
        if self.k is None:
            raise ConfigError(
                f"choose_k: the curve must have a minimum that seeds agree on; {self.why}. Give `k` (--k 16, say), or "
                "other values to try (`ks`), more seeds or a larger `share` (--set k_choice.share=0.3)."
            )
        return self.k

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        ks = [point.k for point in self.points]
        if not ks or ks != sorted(set(ks)) or (self.k is not None and self.k not in ks):
            raise FormatError(
                f"`k_choice.points` must be of increasing k, the one that was chosen among them; got {ks}."
            )

    def table(self) -> list[list[str]]:
        """Return the curve as rows of text, headings first."""
        lines = [["", "decoder projection", "fvu (training)", ""]]
        for point in self.points:
            said = "chosen" if point.k == self.k else "not told apart" if self.k and point.k in self.near else ""
            known = [each for each in point.fvu if each is not None]
            fvu = f"{sum(known) / len(known):.3g}" if known else "–"
            lines.append([f"k = {point.k}", str(point.projection), fvu, said])
        return lines

    def caption(self) -> str:
        """Return what the curve says, and what it cost."""
        return f"{self.why}; the choice read {self.rows_used:,} rows on top of the run, {self.n_saes} SAEs each"


def with_means(points: Sequence[KPoint]) -> list[KPoint]:
    """Return points with the mean over their seeds and its interval."""
    error, degrees = _noise(points)
    found = []
    for point in points:
        mean = sum(point.projections) / len(point.projections)
        arm = student(degrees) * error / math.sqrt(len(point.projections))
        measured = Measured(mean, mean - arm, mean + arm, "row lengths", "interval over seeds")
        found.append(replace(point, projection=measured))
    return found


def decide(points: Sequence[KPoint]) -> tuple[int | None, list[int], str]:
    """Return the k of the lowest mean projection where the curve decides, the k near it, and what the curve says.

    It decides where the lowest mean lies inside the curve, and both ends lie above it by more than the 95% interval of
    a difference of two means allows (Student's t with the spread of the seeds, pooled over all k).

    Parameters
    ----------
    points
        By increasing k, with the same number of seeds each, two at least.
    """
    error, degrees = _noise(points)
    means = [sum(point.projections) / len(point.projections) for point in points]
    best = min(range(len(points)), key=means.__getitem__)
    k = points[best].k
    reach = student(degrees) * error * math.sqrt(2 / len(points[0].projections))
    near = [point.k for point, mean in zip(points, means) if mean - means[best] <= reach]
    ends = [points[0].k, points[-1].k]
    if k in ends:
        side = "smallest" if k == ends[0] else "largest"
        return None, near, f"the projection is lowest at the {side} k that was tried, {k}"
    flat = [end for end in ends if end in near]
    if flat:
        text = f"it is lowest at k = {k}, but seeds differ as much as k = {flat[0]} differs from it: the curve is flat"
        return None, near, text
    others = [each for each in near if each != k]
    also = f", not told apart from {', '.join(map(str, others))}" if others else ""
    return k, near, f"the projection is lowest at k = {k}{also}"


def _noise(points: Sequence[KPoint]) -> tuple[float, float]:
    """Return the standard deviation over seeds, pooled over all k, and its degrees of freedom."""
    squares, degrees = 0.0, 0
    for point in points:
        mean = sum(point.projections) / len(point.projections)
        squares += sum((value - mean) ** 2 for value in point.projections)
        degrees += len(point.projections) - 1
    return math.sqrt(squares / degrees), float(degrees)
