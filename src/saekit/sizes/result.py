"""Results about sizes: what each size of an SAE keeps, and how ways to small SAEs compare."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..errors import ConfigError, FormatError
from ..measure.intervals import no_intervals
from ..measure.metrics import METRICS, Metrics
from ..measure.results import Measured, Result, to_plain
from ..measure.verdicts import Claim, Stored, detectable, family_verdicts, resolution
from ..sae.model import SAE
from ..settings import brief
from .largest import DECIDED, FromLargest, enough
from .power_law import PowerLaw
from .prune import competes

IN_FILE = ("fvu", "l0", "dead_fraction", "ce_sae", "ce_recovered_zero", "ce_recovered_mean", "rsa", "cka")
"""Metrics of a curve that are written into an SAE's file."""

SHOWN = ("fvu", "l0", "ce_sae", "ce_recovered_mean", "ce_recovered_zero", "rsa", "cka")
"""Metrics of the table of a curve, as far as they were measured."""


@dataclass(frozen=True)
class SizePoint:
    """One size of the curve."""

    __repr__ = brief

    size: int
    """Latents kept."""
    metrics: Metrics
    """Measured with these latents alone."""
    from_largest: FromLargest = field(default_factory=FromLargest)
    """Compared with the largest size of the curve, paired over documents. Empty for that one, and in files of schema 1
    and 2."""


@dataclass(frozen=True, repr=False)
class SizeCurve(Result):
    """Fidelity, sparsity and similarity of an SAE at several sizes, over the same rows.

    Examples
    --------
    ::

        curve = sk.measure_sizes(sk.rank(sae, rows), heldout, [64, 256, 1024])
        curve.points[0].metrics.fvu.value
        curve.smallest(fvu=0.2)             # latents that suffice
        curve.write_into(sae).save("out")   # then SAE.load("out", fvu=0.2)
    """

    KIND: ClassVar[str] = "size_curve"
    SCHEMA: ClassVar[int] = 3
    PARTS: ClassVar[tuple[str, ...]] = ("points",)

    rows: dict[str, Any]
    """``info`` of the rows."""
    n_rows: int
    """Rows seen."""
    language_model: dict[str, Any] | None
    """Model, hook, texts and tokens of the cross-entropies; None without them."""
    sae: dict[str, Any]
    """Name, n_latents, rule, order of the latents, provenance of the SAE."""
    points: list[SizePoint] = field(default_factory=list)
    """From the smallest size to the largest."""

    @property
    def sizes(self) -> list[int]:
        """Return the number of latents of each point."""
        return [point.size for point in self.points]

    def values(self, name: str) -> list[Measured]:
        """Return one metric at every size.

        Raises
        ------
        AttributeError
            It was not measured.
        """
        return [getattr(point.metrics, name) for point in self.points]

    def smallest(self, *, fvu: float) -> int:
        """Return the smallest measured size whose FVU is at most `fvu`.

        Raises
        ------
        ConfigError
            No size meets it; the message says which is best.
        """
        meets = [point.size for point in self.points if point.metrics.fvu.value <= fvu]
        if not meets:
            best = min(self.points, key=lambda point: point.metrics.fvu.value)
            raise ConfigError(
                f"smallest: no measured size reaches an FVU of {fvu:g}; the best is {best.metrics.fvu.value:.3g} with "
                f"{best.size:,} latents. Ask for no less."
            )
        return min(meets)

    def write_into(self, sae: SAE) -> SAE:
        """Return `sae` with this curve in its provenance: saved, its file says what each prefix is worth.

        Raises
        ------
        ConfigError
            The curve is of another number of latents, or was measured with a selection that no prefix has.
        """
        if self.sizes and self.sizes[-1] > sae.n_latents:
            raise ConfigError(
                f"write_into: the curve must be one of this SAE; it goes to {self.sizes[-1]:,} latents where the SAE "
                f"has {sae.n_latents:,}."
            )
        if self.settings.get("selection") == "after" and competes(sae):
            raise ConfigError(
                "write_into: a file needs the curve of selection='before', which is what loading a prefix does; this "
                "one was measured with 'after'."
            )
        sizes = {"measured_on": self._measured_on(), "points": [_in_file(point) for point in self.points]}
        return sae.replace(provenance={**sae.provenance, "sizes": sizes})

    def _measured_on(self) -> dict[str, Any]:
        """Return what a file says about the rows and tokens."""
        return {
            "n_rows": self.n_rows,
            **{key: self.rows[key] for key in ("model", "hook", "data", "digest") if self.rows.get(key) is not None},
            **({} if self.language_model is None else {"n_tokens": self.language_model["n_tokens"]}),
        }

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        if not self.sizes or self.sizes != sorted(set(self.sizes)):
            raise FormatError(f"`size_curve.points` must be of increasing sizes; they are of {self.sizes}.")

    def table(self, names: tuple[str, ...] | None = None) -> list[list[str]]:
        """Return rows of text, headings first, for some metrics (by default `SHOWN`)."""
        names = names or tuple(name for name in SHOWN if name in self.points[0].metrics)
        lines = [["latents", *names]]
        for point in self.points:
            lines.append([f"{point.size:,}", *(str(point.metrics[name]) for name in names)])
        return lines

    def caption(self) -> str:
        """Return the line under the table."""
        about = f"{self.sae['name']}: {self.n_rows:,} rows, latents in {order_in_words(self.sae['order'])}"
        return "; ".join([about, *filter(None, [self.answer()])])

    def answer(self) -> str:
        """Return how many latents keep what all of them give, from paired differences; empty where there are none.

        The cross-entropy decides where it was measured, else FVU.
        """
        for name in reversed(DECIDED):
            words = {p.size: p.from_largest.verdicts[name] for p in self.points if name in p.from_largest.verdicts}
            if words:
                gaps = [p.from_largest.differences[name] for p in self.points if p.size in words]
                return enough_in_words(words, self.sizes[-1], name, no_intervals(gaps))
        return ""


def enough_in_words(verdicts: Mapping[int, str], largest: int, metric: str, why_none: str = "") -> str:
    """Say how many latents keep a metric within its margin; without any interval (`why_none`), that it is not decided.

    >>> enough_in_words({64: "worse", 128: "equivalent"}, 256, "fvu")
    '128 of 256 latents keep fvu within 0.01 of all'
    """
    first, last = enough(verdicts, largest)
    kept = f"{metric} within {METRICS[metric].margin:g} of all"
    if why_none:
        return f"how many latents keep {kept}: {not_decided(why_none)}"
    if first < last:
        return f"between {first:,} and {last:,} latents keep {kept}; more rows would narrow it"
    return f"no smaller size keeps {kept}" if first == largest else f"{first:,} of {largest:,} latents keep {kept}"


def not_decided(why_none: str) -> str:
    """Turn the reason why there are no intervals into that why nothing is decided.

    >>> not_decided("no intervals: 12 documents, 40 are needed"), not_decided("no intervals asked for")
    ('not decided: 12 documents, 40 are needed', 'not decided: no intervals asked for')
    """
    return f"not decided: {why_none.removeprefix('no intervals: ')}"


def order_in_words(order: str | None) -> str:
    """Return what the latents of an SAE are in the order of.

    >>> order_in_words("energy"), order_in_words("none")
    ('order of energy', 'the order of the file')
    """
    return "the order of the file" if order in (None, "none") else f"order of {order}"


def _in_file(point: SizePoint) -> dict[str, Any]:
    metrics = {name: point.metrics[name].to_json() for name in IN_FILE if name in point.metrics}
    return {"latents": point.size, "metrics": metrics}


@dataclass(frozen=True)
class CurvePoint:
    """One way of getting an SAE of one size, over all seeds."""

    __repr__ = brief

    name: str
    """``"topk pruned by energy"``, ``"matryoshka"``, ``"topk trained separately"``, ..."""
    size: int
    """Latents."""
    seeds: list[int]
    """The seeds behind it."""
    metrics: Metrics
    """Mean over seeds, with the interval of Student's t over seeds; with one seed, its own over documents."""
    from_largest: FromLargest = field(default_factory=FromLargest)
    """Compared with the largest size of the same way, paired by seed; with one seed, over documents. Empty for that
    one, and in files of schema 1 to 3."""

    def to_json(self) -> dict[str, Any]:
        """Return name, size, seeds, the comparison with the largest size, and every metric."""
        about = {"name": self.name, "size": self.size, "seeds": self.seeds, "from_largest": to_plain(self.from_largest)}
        return {**about, **self.metrics.to_json()}

    @classmethod
    def from_json(cls, plain: Any, where: str = "curve") -> CurvePoint:
        """Return the point that `to_json` wrote.

        Raises
        ------
        FormatError
            Name, size or seeds are missing or of another type.
        """
        rest = dict(plain) if isinstance(plain, dict) else {}
        name, size, seeds = (rest.pop(key, None) for key in ("name", "size", "seeds"))
        compared = rest.pop("from_largest", None)
        if not isinstance(name, str) or not isinstance(size, int) or not isinstance(seeds, list):
            raise FormatError(f"`{where}` must hold `name`, `size`, `seeds` and metrics; it is {plain!r}.")
        found = FromLargest() if compared is None else FromLargest.from_json(compared, f"{where}.from_largest")
        return cls(name, size, seeds, Metrics.from_json(rest, where), found)


@dataclass(frozen=True)
class Difference:
    """One way minus another at the same size, paired by seed."""

    __repr__ = brief

    metric: str
    name: str
    """The first way."""
    minus: str
    """The second."""
    size: int
    difference: Measured
    """Mean over the seeds that both have, with the interval of Student's t; none with a single seed."""
    seeds: int
    """Number of these seeds."""
    verdict: str = "undecided"
    """``better``, ``worse``, ``equivalent`` or ``undecided``: the first way compared with the second, for the margin of
    the metric, corrected for the number of sizes (Holm)."""
    detects: float | None = None
    """True difference that such an interval, uncorrected, decides 4 times in 5; None without an interval."""

    @property
    def claim(self) -> Claim:
        """The difference, turned so that more is better, with the margin of its metric."""
        metric = METRICS[self.metric]
        stored = Stored(self.difference, max(self.seeds - 1, 1)).oriented(-1 if metric.better == "lower" else 1)
        return Claim(stored, metric.margin)


def decided(differences: Sequence[Difference]) -> list[Difference]:
    """Return differences with their verdicts; the sizes of one metric of two ways are one family of claims."""
    found = list(differences)
    families: dict[tuple[str, str, str], list[int]] = {}
    for at, each in enumerate(found):
        families.setdefault((each.metric, each.name, each.minus), []).append(at)
    for family in families.values():
        verdicts = family_verdicts([found[at].claim for at in family], least=None, most=None)
        for at, word in zip(family, verdicts, strict=True):
            half = resolution(found[at].difference)
            detects = None if math.isnan(half) else detectable(half, METRICS[found[at].metric].margin)
            found[at] = replace(found[at], verdict=word, detects=detects)
    return found


def _of_schema_2(plain: dict[str, Any]) -> Difference:
    """Return a stored difference of schema 2, with the number of seeds that its interval states."""
    gap = Measured.from_json(plain["difference"])
    seeds = re.search(r"interval over (\d+) seeds", gap.reason or "")
    return Difference(**{**plain, "difference": gap, "seeds": int(seeds[1]) if seeds else 1, "verdict": "undecided"})


@dataclass(frozen=True)
class Ranking:
    """How importance falls off in one vanilla SAE."""

    __repr__ = brief

    name: str
    """Name of the SAE."""
    by: str
    """The score."""
    fit: PowerLaw | None
    """Power law of the sorted scores; None where too few latents are alive."""
    ranks: list[int]
    """Some ranks from the first to the last."""
    scores: list[float]
    """The sorted score at each of these ranks."""


@dataclass(frozen=True, repr=False)
class Progressive(Result):
    """Fidelity along sizes for every way of getting a small SAE from the same rows.

    Examples
    --------
    ::

        result = progressive({"a": topk, "b": matryoshka}, heldout, fit=rows)
        [(point.name, point.size, point.metrics.fvu.value) for point in result.curves]
    """

    KIND: ClassVar[str] = "progressive"
    SCHEMA: ClassVar[int] = 4
    PARTS: ClassVar[tuple[str, ...]] = ("curves", "differences", "rankings", "spectra")

    rows: dict[str, Any]
    """The rows measured on."""
    n_rows: int
    language_model: dict[str, Any] | None
    curves: list[CurvePoint]
    """By name, then size."""
    differences: list[Difference]
    """Claims to test: nested minus pruned, energy minus frequency, energy minus unsorted, at each size."""
    rankings: list[Ranking]
    """Power laws of the importance in the vanilla SAEs."""
    spectra: list[Ranking]
    """Power laws of the eigenvalues of the decoder's covariance."""
    runs: list[SizeCurve] = field(default_factory=list)
    """The curve of every single SAE."""

    @classmethod
    def migrate(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object of schema 1 or 2 in today's layout: its differences are decided by today's rule."""
        if plain.get("schema") not in (1, 2) or not isinstance(plain.get("differences"), list):
            return plain
        try:
            found = decided([_of_schema_2(each) for each in plain["differences"]])
        except (TypeError, KeyError, FormatError):  # what is wrong with it is said when it is read
            return plain
        return plain | {"differences": to_plain(found)}

    @property
    def names(self) -> list[str]:
        """Return the ways, in order."""
        return list(dict.fromkeys(point.name for point in self.curves))

    def table(self, metric: str = "fvu") -> list[list[str]]:
        """Return rows of text for one metric: a row per way, a column per size."""
        sizes = sorted({point.size for point in self.curves})
        at = {(point.name, point.size): point.metrics for point in self.curves}
        lines = [[metric, *(f"{size:,}" for size in sizes)]]
        for name in self.names:
            cells = [at.get((name, size)) for size in sizes]
            lines.append([name, *("" if c is None or metric not in c else f"{c[metric].value:.3f}" for c in cells)])
        return lines

    def caption(self) -> str:
        """Return the line under the table."""
        return f"FVU by latents; {self.n_rows:,} rows"
