"""The result of explained predictions: which latents decided about texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..measure.results import Result
from ..provenance import library_versions, release
from .decisions import Explanation

if TYPE_CHECKING:
    from .text_classifier import TextClassifier


@dataclass(frozen=True, repr=False)
class Decisions(Result):
    """Texts with the latents that decided about their classes."""

    KIND: ClassVar[str] = "decisions"
    SCHEMA: ClassVar[int] = 1
    PARTS: ClassVar[tuple[str, ...]] = ("predictions",)

    sae: dict[str, Any]
    """Latents and digest."""
    model: dict[str, Any]
    """The model that read the texts."""
    arm: str
    """The classifier."""
    predictions: list[Explanation]
    """One per text."""

    @classmethod
    def of(cls, classifier: TextClassifier, predictions: Sequence[Explanation]) -> Decisions:
        """Return the explained predictions of a classifier."""
        return cls(
            saekit=release(),
            versions=library_versions(True),
            settings={},
            sae={"n_latents": classifier.sae.n_latents, "digest": classifier.sae.digest()},
            model=dict(classifier.card["model"]),
            arm=str(classifier.card["arm"]),
            predictions=list(predictions),
            warnings=list(classifier.warnings()),
        )

    def table(self) -> list[list[str]]:
        """Return a row per text."""
        lines = [["text", "predicted", "probability", "latents shown carry"]]
        for each in self.predictions:
            part = "–" if each.shown_fraction is None else f"{each.shown_fraction:.0%}"
            lines.append([each.text[:60], each.predicted, f"{each.probabilities[each.predicted]:.2f}", part])
        return lines
