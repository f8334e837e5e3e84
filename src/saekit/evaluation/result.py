"""The result of an evaluation: plain data, its table and its notebook view."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from ..errors import ConfigError, FormatError, did_you_mean, listed
from ..files import unsealed
from ..measure.accumulators import DensityHistogram
from ..measure.intervals import no_intervals
from ..measure.metrics import Metrics, leading_ablation, leading_recovered
from ..measure.results import Measured, Result, result_to_json
from ..settings import brief


@dataclass(frozen=True)
class Control:
    """The same numbers for a baseline of the SAE."""

    __repr__ = brief

    metrics: Metrics
    """Its own values."""
    differences: Metrics
    """The SAE's value minus its own, over the same resamples of documents (paired)."""
    about: dict[str, Any] = field(default_factory=dict)
    """How it was made."""
    verdicts: dict[str, str] = field(default_factory=dict)
    """By metric (`fvu` and, with a language model, `ce_sae`): whether the SAE is ``better``, ``worse``, ``equivalent``
    or ``undecided``, for the margin of the metric, corrected for the number of SAEs and baselines (Holm)."""
    detects: dict[str, float] = field(default_factory=dict)
    """By the same metrics: the true difference that such an interval, uncorrected, decides 4 times in 5."""
    sources: dict[str, Metrics] = field(default_factory=dict)
    """Its own values on the columns of each source, as those of the SAE."""


@dataclass(frozen=True)
class Evaluated:
    """What was measured about one SAE."""

    __repr__ = brief

    name: str
    """What tables call it; unique within an evaluation."""
    sae: dict[str, Any]
    """n_latents, d_in, rule, digest of all tensors, provenance."""
    on_training_rows: bool | None
    """Whether the rows are the ones it was trained on (same digest); None where that is not known."""
    metrics: Metrics
    """Its values."""
    density: DensityHistogram
    """How often its latents fire."""
    controls: dict[str, Control]
    """By name: ``untrained``, ``frozen-decoder`` where given, ``pca``; of a transcoder ``linear`` (the best affine map
    of rank L0 from its rows to those that it predicts) and ``affine`` (of full rank)."""
    truth: dict[str, Measured] = field(default_factory=dict)
    """How much of the known dictionary of synthetic rows it has found: `saekit.evaluation.truth.TRUTH` says what each
    name means. Empty where that was not asked for, and in files of schema 1 to 3."""
    pursuit: dict[str, Measured] = field(default_factory=dict)
    """What codes by matching pursuit make of the same decoder: see `saekit.evaluation.pursuit.PURSUIT`. Empty where
    that was not asked for, for transcoders, and in files of schema 1 to 3."""
    sources: dict[str, Metrics] = field(default_factory=dict)
    """By source of a crosscoder: fvu, cosine and the other metrics of reconstruction, on the columns of that source as
    if they were all of the row. Empty without a crosscoder, and in files of schema 1 to 4."""
    hedging: dict[str, Measured] = field(default_factory=dict)
    """How much its latents carry parts of features that it is too narrow to hold apart: see
    `saekit.evaluation.hedging.HEDGING`. Empty where that was not asked for, and in files of schema 1 to 5."""


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """How well SAEs reconstruct rows, and what they cost the language model, compared with baselines.

    Examples
    --------
    ::

        result = sk.evaluate(saes, rows)
        result.entry("topk-64-k8-seed0").metrics.fvu.value    # of one SAE; `result.metrics` where there is only one
        result.entries[1].controls["pca"].differences["fvu"]  # SAE minus PCA, with its interval
        result.to_pandas()                                    # a row per SAE
    """

    KIND: ClassVar[str] = "evaluation"
    SCHEMA: ClassVar[int] = 6

    rows: dict[str, Any]
    """``info`` of the rows: model, hook, data, digest, filters."""
    n_rows: int
    """Rows seen."""
    language_model: dict[str, Any] | None
    """Model, hook, texts and tokens of the cross-entropies; None without them."""
    entries: list[Evaluated]
    """One per SAE, in the order given."""

    PARTS: ClassVar[tuple[str, ...]] = ("entries", "controls")

    def items_of(self, part: str) -> list[Any]:
        """Return one entry per SAE, or one per SAE and baseline."""
        if part == "entries":
            return list(self.entries)
        return [
            {"name": entry.name, "control": label, "metrics": control.metrics, "difference": control.differences}
            for entry in self.entries
            for label, control in entry.controls.items()
        ]

    def entry(self, name: str | None = None) -> Evaluated:
        """Return the entry of the SAE of that name, or of the only one.

        Raises
        ------
        ConfigError
            There is no such SAE; or there are several and none is named.
        """
        names = [each.name for each in self.entries]
        if name is None and len(names) > 1:
            raise ConfigError(
                f"this evaluation holds {len(names)} SAEs, {listed(names)}: choose one with `entry({names[0]!r})` or "
                "`entries[0]`, or take all with `to_pandas()`."
            )
        if name is not None and name not in names:
            raise ConfigError(f"there is no SAE `{name}` in this evaluation. {did_you_mean(name, names)}")
        return self.entries[0 if name is None else names.index(name)]

    @property
    def metrics(self) -> Metrics:
        """Metrics of the only SAE; with several, `entry` chooses one (`ConfigError`)."""
        return self.entry().metrics

    @property
    def controls(self) -> dict[str, Control]:
        """Baselines of the only SAE; with several, `entry` chooses one (`ConfigError`)."""
        return self.entry().controls

    def truth_table(self) -> list[list[str]]:
        """Return what SAEs found of a known dictionary as rows of text, headings first; no rows without one."""
        return _table_of({entry.name: entry.truth for entry in self.entries}, "known dictionary")

    def pursuit_table(self) -> list[list[str]]:
        """Return what matching pursuit makes of the decoders as rows of text; no rows where that was not asked for."""
        return _table_of({entry.name: entry.pursuit for entry in self.entries}, "matching pursuit")

    def hedging_table(self) -> list[list[str]]:
        """Return the hedging degree of the SAEs as rows of text; no rows where that was not asked for."""
        return _table_of({entry.name: entry.hedging for entry in self.entries}, "hedging")

    def sources_table(self) -> list[list[str]]:
        """Return FVU and cosine on the columns of each source as rows of text, SAEs and baselines; no rows without."""
        sources = self.entries[0].sources
        if not sources:
            return []
        lines = [["source", *(f"{source}: {name}" for source in sources for name in SOURCE_METRICS)]]
        for entry in self.entries:
            each: list[tuple[str, Evaluated | Control]] = [(entry.name, entry)]
            each += [(f"  {label}", control) for label, control in entry.controls.items()]
            lines += [
                [label, *(_cell(one.sources[source], name) for source in sources for name in SOURCE_METRICS)]
                for label, one in each
            ]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: everything, and `metrics` of the first SAE once more at the top level."""
        plain = result_to_json(self)
        return {
            "kind": plain.pop("kind"),
            "schema": plain.pop("schema"),
            "metrics": self.entries[0].metrics.to_json(),
            **plain,
        }

    @classmethod
    def from_json(cls, plain: object, where: str = "evaluation") -> Self:
        """Return the evaluation that `to_json` made; raises `FormatError` also where the two `metrics` differ."""
        plain = unsealed(plain, where)
        top = plain.pop("metrics", None) if isinstance(plain, dict) else None
        result = super().from_json(plain, where)
        if top != result.entries[0].metrics.to_json():
            raise FormatError("`metrics` must equal those of the first entry; they differ. The file was altered.")
        return result

    @classmethod
    def migrate(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object of schema 1 or 2 in the layout of 3: untrained SAEs had no factor."""
        if plain.get("schema") not in (1, 2) or not isinstance(plain.get("entries"), list):
            return plain
        plain = copy.deepcopy(plain)
        for entry in plain["entries"]:
            controls = entry.get("controls") if isinstance(entry, dict) else None
            untrained = controls.get("untrained") if isinstance(controls, dict) else None
            if isinstance(untrained, dict) and isinstance(untrained.setdefault("about", {}), dict):
                untrained["about"].setdefault("factor", 1.0)
        return plain

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        if not self.entries:
            raise FormatError("`evaluation.entries` must hold at least one SAE; it is empty.")

    def table(self, names: tuple[str, ...] | None = None) -> list[list[str]]:
        """Rows of text, headings first; each SAE is followed by its controls.

        Parameters
        ----------
        names
            Metrics to show; by default fvu, l0, dead_fraction, cosine and, with a language model, ce_sae,
            kl and the fraction of it recovered, first against the ablation that costs the model less.
        """
        metrics = self.entries[0].metrics
        names = names or (*(name for name in _SHOWN if name in metrics), *leading_recovered(metrics))
        lines = [["", *(_HEADINGS.get(name, name) for name in names)]]
        for entry in self.entries:
            lines.append([entry.name, *(_cell(entry.metrics, name) for name in names)])
            lines += [
                [f"  {label}", *(_cell(control.metrics, name) for name in names)]
                for label, control in entry.controls.items()
            ]
        return lines

    def caption(self) -> str:
        """Return the line under the table: rows, tokens, level of the intervals."""
        tokens = "" if self.language_model is None else f", {self.language_model['n_tokens']:,} predicted tokens"
        seen = "; rows that the SAE was trained on" if any(entry.on_training_rows for entry in self.entries) else ""
        level = no_intervals(entry.metrics.get(name) for entry in self.entries for name in _SHOWN)
        level = level or f"{self.settings['intervals']['level']:.0%} intervals"
        return f"{self.n_rows:,} rows{tokens}; {level}{seen}{_against(self.entries[0].metrics)}"


def _table_of(measured: dict[str, dict[str, Measured]], title: str) -> list[list[str]]:
    known = {name: each for name, each in measured.items() if each}
    if not known:
        return []
    names = list(next(iter(known.values())))
    return [[title, *names], *([name, *(str(each[key]) for key in names)] for name, each in known.items())]


SOURCE_METRICS = ("fvu", "cosine")
"""Metrics of each source that tables show."""

_SHOWN = ("fvu", "l0", "dead_fraction", "cosine", "ce_sae", "kl")
_HEADINGS = {
    "dead_fraction": "dead",
    "ce_sae": "ce",
    "ce_recovered_zero": "recovered (zero)",
    "ce_recovered_mean": "recovered (mean)",
}


def _against(metrics: Metrics) -> str:
    """Return what the recovered cross-entropy is measured against: the ablation that costs less, next to the other."""
    if not all(name in metrics for name in ("ce_zero", "ce_mean")):
        return ""
    costs = {name: metrics[f"ce_{name}"].value for name in ("mean", "zero")}
    first = leading_ablation(costs["zero"], costs["mean"])
    other = next(name for name in costs if name != first)
    return f"; recovered from {first}-ablation, CE {costs[first]:.3g} ({other}-ablation: {costs[other]:.3g})"


def _cell(metrics: Metrics, name: str) -> str:
    return str(metrics[name]) if name in metrics else "–"
