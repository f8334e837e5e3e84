"""What a language model says about labels of latents: how well they tell where a latent fires."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..measure.numbers import decimals
from ..measure.results import Measured, Result

TOLD = 0.95
"""Percentile among labels of other latents from which a label is told from them."""

SHOWN = 25
"""Rows of the table."""


@dataclass(frozen=True)
class LabelTest:
    """One test of one label, on windows of documents that it was not made of."""

    scorer: str
    """``detection`` (does the label fit the text?) or ``fuzzing`` (does it fit the marked words?)."""
    auc: Measured
    """Area under the ROC curve of the answers for whether the latent fires, over the windows that were answered."""
    n: int
    """Windows that were answered."""
    missing: int
    """Windows without an answer, or with one that is neither yes nor no."""
    least: float | None
    """The AUC if every missing answer were wrong."""
    most: float | None
    """The AUC if every missing answer were right."""
    hard: float | None
    """The AUC against the windows without a firing that resemble those with one."""
    other_label: float | None
    """The AUC on the same windows with the label of another latent."""
    percentile: float | None = None
    """Fraction of the latents whose windows under another's label give less, ties counted half."""


@dataclass(frozen=True)
class LabelScore:
    """A label with its tests."""

    latent: int
    """Number of the latent."""
    label: str
    """What was tested."""
    tests: list[LabelTest] = field(default_factory=list)
    """A test per scorer."""
    reason: str | None = None
    """Why it was not tested."""


@dataclass(frozen=True, repr=False)
class LabelScores(Result):
    """How well labels tell where latents fire, by a language model."""

    KIND: ClassVar[str] = "label_scores"
    SCHEMA: ClassVar[int] = 1
    PARTS: ClassVar[tuple[str, ...]] = ("scores",)

    sae: dict[str, Any]
    """Latents, width, rule, digest, provenance."""
    model: dict[str, Any]
    """Name, digest and number type of the model."""
    hook: str
    """Where the codes come from."""
    data: dict[str, Any]
    """Name and digest of the texts; documents left out because they are nearly in the other half."""
    judge: dict[str, Any]
    """Names of the model that tested and of that which wrote the labels, prompts asked and their tokens."""
    means: dict[str, Measured]
    """Mean AUC over latents by scorer, and under the name ``<scorer>_other_label`` that of labels of other latents."""
    scores: list[LabelScore]
    """An entry per latent."""

    def __getitem__(self, latent: int) -> LabelScore:
        """Return the entry of a latent."""
        return next(each for each in self.scores if each.latent == latent)

    def table(self) -> list[list[str]]:
        """Return a row per test, the best first."""
        lines = [["latent", "label", "test", "auc", "of other labels", "above %", "n", "missing"]]
        found = [(score, test) for score in self.scores for test in score.tests]
        for score, test in sorted(found, key=lambda pair: -_sortable(pair[1].auc.value))[:SHOWN]:
            above = "–" if test.percentile is None else f"{100 * test.percentile:.0f}"
            other = "–" if test.other_label is None else decimals(test.other_label)
            numbers = [str(test.auc), other, above, str(test.n), str(test.missing)]
            lines.append([str(score.latent), score.label, test.scorer, *numbers])
        return lines

    def caption(self) -> str:
        """Return what the answers are worth."""
        lines = []
        for name, mean in self.means.items():
            if not name.endswith("_other_label"):
                other = self.means[f"{name}_other_label"]
                under = f", {other:.2f} under the label of another latent" if other.is_defined else ""
                lines.append(f"{name}: AUC {mean:.2f} on average{under} (0.5 is chance).")
        lines += [f"Latent {each.latent} was not tested: {each.reason}." for each in self.scores if each.reason]
        asked, missing = self.judge["prompts"], self.judge["missing"]
        lines.append(
            f"Answers of {short_name(self.judge['name'])}: {missing:,} of {asked:,} are missing. A model that knows "
            "little of such texts scores good labels low."
        )
        return "\n".join(lines)


def short_name(name: str) -> str:
    """Return the name of a model with its digest cut.

    >>> short_name("builtin sha256:179da18638e755a7")
    'builtin sha256:179da186…'
    """
    return re.sub(r"(sha256:\w{8})\w+", r"\1…", name)


def _sortable(value: float) -> float:
    return -math.inf if math.isnan(value) else value
