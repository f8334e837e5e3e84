"""What results of `classify` and `transfer` have in common: arms, compared with the best dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..measure.results import Measured, Result
from ..settings import brief
from .settings import ALIASES


@dataclass(frozen=True, kw_only=True)
class ComparedArm:
    """One way to classify, compared with the best dense one."""

    __repr__ = brief

    name: str
    kind: str
    """One of ``saekit.classification.settings.KINDS``."""
    family: str
    """floor, words, dense, reduced, control or sae."""
    source: str
    """The SAE behind its features; ``dense``, ``words``, ``pixels`` or empty."""
    pool: str
    macro_f1: Measured
    """Macro-F1 on the test set; between values of classifiers of the tested value itself, mean over the diagonal."""
    auc: Measured
    """The same of AUC."""
    difference: Measured
    """Macro-F1 minus that of the best dense arm, on the same test rows; between values of transferred macro-F1."""
    auc_difference: Measured
    """The same of AUC."""
    verdict: str
    """Verdict of the difference at the margin: better, equivalent, worse, undecided, corrected for the number of arms
    (Holm); empty without dense arms. Of macro-F1, or of AUC where ``settings["metric"]`` is ``auc``."""


@dataclass(frozen=True, repr=False)
class ArmsResult(Result):
    """A result that holds arms."""

    data: dict[str, Any]
    """Name, digest, columns, rows in train and test."""
    model: dict[str, Any]
    """The model that read it."""
    saes: list[dict[str, Any]]
    """Name, shape, digest and provenance of each SAE."""
    classes: dict[str, list[int | None]]
    """Rows of each class in train (of the first fold) and in test."""
    best_dense: str | None
    """The dense arm that all are compared with: the one with the highest inner macro-F1 (chosen without the test set);
    None without dense arms."""
    arms: list[Any]

    @property
    def verdict_metric(self) -> str:
        """What the verdicts look at: ``macro_f1`` or ``auc``."""
        return str(self.settings.get("metric", "macro_f1"))

    def gap(self, arm: ComparedArm) -> str:
        """Return what the verdict of an arm looks at, as text."""
        gap = arm.auc_difference if self.verdict_metric == "auc" else arm.difference
        return f"{gap:+.3f}" if gap.is_defined else "–"

    def arm(self, name: str | None) -> Any:
        """Return the arm of that name; or the first one of that kind (``sae``, ``dense``, …).

        Raises
        ------
        ConfigError
            There is none.
        """
        names, kinds = ([getattr(arm, which) for arm in self.arms] for which in ("name", "kind"))
        for wanted, known in ((name, names), (ALIASES.get(str(name), name), kinds)):
            if wanted in known:
                return self.arms[known.index(wanted)]
        raise ConfigError(f"there is no arm `{name}` in this {self.KIND}. {did_you_mean(str(name), names)}")
